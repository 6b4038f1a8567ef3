"""Reaction networks whose time courses the tests of discovery are about."""

import numpy as np
import pandas as pd
from scipy.integrate import solve_ivp

import flowme as fm
from flowme.discovery import ReactionNetwork

# Rates, initial states, and the last of the times.
LOTKA_VOLTERRA = (
    ReactionNetwork({"A -> 2A": 1.0, "A + B -> 2B": 0.5, "B -> 0": 0.8}),
    np.array([[2, 1], [1, 3], [4, 1], [0.5, 0.5]]),
    10.0,
)
SIR = (
    ReactionNetwork({"S + I -> 2I": 0.4, "I -> R": 0.314}, species=("S", "I", "R")),
    np.array([[7.2, 0.98, 0], [4, 0.3, 0], [3, 2, 1], [6, 0.1, 0]]),
    12.0,
)
MICHAELIS_MENTEN = (
    ReactionNetwork(
        {"S + E -> C": 2.0, "C -> S + E": 0.3, "C -> E + P": 0.7}, species=("S", "E", "C", "P")
    ),
    np.array([[2, 1, 0, 0], [1, 0.5, 0, 0], [0.5, 1.5, 0, 0], [3, 0.3, 0, 0.5]]),
    8.0,
)


def observed(case, noise=0.05, seed=0, points=40):
    """A study of a network: each initial state a subject, y = x + noise sd(x) ε, initial states as
    covariates "A0", "B0", ..."""
    network, starts, end = case
    times = np.linspace(0, end, points)
    x = np.array([path(network, x0, times) for x0 in starts])
    y = x + noise * x.std((0, 1)) * np.random.default_rng(seed).normal(size=x.shape)
    index = pd.MultiIndex.from_product([range(len(starts)), times], names=["ID", "TIME"])
    frame = pd.DataFrame(y.reshape(-1, y.shape[-1]), index, network.species).reset_index()
    for s, name in enumerate(network.species):
        frame[f"{name}0"] = np.repeat(starts[:, s], points)
    return fm.Study.from_frame(
        frame,
        outcome=list(network.species),
        covariates=[f"{s}0" for s in network.species],
        units={"time": "h", network.species[0]: "mM"},
    )


def path(network, start, times):
    """x by SciPy, [time, species]."""
    taken = [dict(r.reactants) for r in network.reactions]
    consumed = np.array([[t.get(s, 0) for s in network.species] for t in taken])
    rates = np.array(network.rates, float)
    found = solve_ivp(
        lambda t, x: (rates * np.prod(x**consumed, 1)) @ network.net,
        (0, times[-1]), start, t_eval=times, rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    return found.y.T
