"""Reaction networks whose truth is known, simulated. Numbers as in the literature they are from."""

import numpy as np
import pandas as pd
from scipy.integrate import solve_ivp

import flowme as fm
from flowme import discovery

# Number: name, reactions and rates, initial conditions of training, end of the 40 times.
# Sources of the numbers: ODEBench (1, 4, 5), CRNN (7), Foo et al. 2025 (10, 11), our own (others).
NETWORKS = {
    1: ("logistic", {"X -> 2X": 2.1, "2X -> X": 0.5}, [[0.13], [2.24], [6], [9]], 3),
    2: (
        "Lotka-Volterra",
        {"A -> 2A": 1, "A + B -> 2B": 0.5, "B -> 0": 0.8},
        [[2, 1], [1, 3], [4, 1], [0.5, 0.5]],
        10,
    ),
    3: (
        "unequal LV",
        {"A -> 2A": 1.84, "A + B -> 2B": 1.45, "B -> 0": 3.0, "A + B -> B": 0.3},
        [[8.3, 3.4], [0.4, 0.65], [2, 1], [1, 3]],
        10,
    ),
    4: (
        "SIR",
        {"S + I -> 2I": 0.4, "I -> R": 0.314},
        [[7.2, 0.98, 0], [4, 0.3, 0], [3, 2, 1], [6, 0.1, 0]],
        12,
    ),
    5: (
        "SEIR",
        {"S + I -> E + I": 0.28, "E -> I": 0.47, "I -> R": 0.30},
        [[0.6, 0.3, 0.09, 0.01], [0.4, 0.3, 0.25, 0.05], [0.9, 0.05, 0.05, 0], [2, 0, 0.3, 0]],
        10,
    ),
    6: (
        "Michaelis-Menten",
        {"S + E -> C": 2, "C -> S + E": 0.3, "C -> E + P": 0.7},
        [[2, 1, 0, 0], [1, 0.5, 0, 0], [0.5, 1.5, 0, 0], [3, 0.3, 0.2, 0.5]],
        8,
    ),
    7: (
        "CRNN case 1",
        {"2A -> B": 0.1, "A -> C": 0.2, "C -> D": 0.13, "B + D -> E": 0.3},
        [[1.1, 0.9, 0, 0, 0], [0.5, 1.1, 0, 0, 0], [1.2, 0.3, 0, 0, 0], [0.3, 0.6, 0, 0, 0]],
        40,
    ),
    10: (
        "Foo, 3 species",
        {"X -> Y": 1, "X + Y -> Z": 1, "Z -> X + Y": 1},
        [[0, 0, 1], [1, 0, 0.2], [0.5, 1, 0], [2, 0.3, 0.5]],
        10,
    ),
    11: (
        "insect stages",
        {"E -> L": 1, "L -> A": 1, "A -> A + E": 1, "2A -> A": 1},
        [[0, 0, 3], [2, 0, 0.5], [0, 2, 1], [1, 1, 0.1]],
        10,
    ),
    12: (
        "HIV T-I-V",
        {
            "0 -> T": 0.5,
            "T -> 0": 0.1,
            "T + V -> I + V": 0.4,
            "I -> 0": 0.6,
            "I -> I + V": 2,
            "V -> 0": 1.5,
        },
        [[5, 0, 0.1], [2, 0.5, 0.5], [8, 0, 0.02], [1, 1, 2]],
        15,
    ),
}
SPECIES = {4: "SIR", 5: "SEIR", 6: "SECP", 11: "ELA", 12: "TIV"}


def truth_of(number):
    reactions = {r: float(k) for r, k in NETWORKS[number][1].items()}
    return discovery.ReactionNetwork(reactions, species=tuple(SPECIES.get(number, "")) or None)


def solved(network, starts, times):
    """x of each initial state, [condition, time, species], to 1e-9."""
    consumed = np.array(
        [[dict(r.reactants).get(s, 0) for s in network.species] for r in network.reactions]
    )
    rates, net = np.array(network.rates, float), network.net

    def field(t, x):
        return (rates * np.prod(x**consumed, 1)) @ net

    span = (0, times[-1])
    tight = {"t_eval": times, "method": "LSODA", "rtol": 1e-9, "atol": 1e-12}
    found = [solve_ivp(field, span, np.array(x, float), **tight).y.T for x in starts]
    short = [np.pad(y, ((0, times.size - len(y)), (0, 0)), constant_values=np.inf) for y in found]
    return np.array(short)


def simulated(number, noise, seed):
    """A study, and the names of the covariates that hold its initial states."""
    network, (_, _, starts, end) = truth_of(number), NETWORKS[number]
    times = np.linspace(0, end, 40)
    x = solved(network, starts, times)
    y = x + noise * x.std((0, 1)) * np.random.default_rng(seed).normal(size=x.shape)
    index = pd.MultiIndex.from_product([range(len(starts)), times], names=["ID", "TIME"])
    frame = pd.DataFrame(y.reshape(-1, y.shape[-1]), index, network.species).reset_index()
    for i, s in enumerate(network.species):
        frame[f"{s}0"] = np.repeat([float(start[i]) for start in starts], times.size)
    initial = {s: f"{s}0" for s in network.species}
    study = fm.Study.from_frame(frame, outcome=list(network.species), covariates=initial.values())
    return study, initial
