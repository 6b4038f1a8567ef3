"""Which arm finds known reaction networks from noisy time courses? A row per run, as it comes.

    python benchmarks/discovery.py [networks] [noise] [arms] [seeds] [CPU s] [patience]
    python benchmarks/discovery.py 2,4,6,7,10,11,12 0,0.05 default,random 3 60 0

Four initial conditions of 40 points, noise in units of each species' standard deviation, initial
states known. Columns: recovered exactly, or up to dynamical equivalence; F1 of the ODE's terms;
error in four initial conditions held out, normalised; dBIC to the truth, fitted alike after the
choice (above 0: the search missed it; at most 0: the data prefer, or cannot exclude, another), and
the same of the whole reward, by which the choice is made; structures fitted; CPU seconds, with
compilation. A row of PySINDy, plain and weak, has what terms can tell. The last row of an arm sums
it up: `well` counts runs recovered or missed for want of information. At the end the hare and the
lynx, real data.

The truth is used to simulate and, after the choice, to judge. It enters no search.
"""

import itertools
import sys
import time
import warnings

import jax
import numpy as np
import pandas as pd
from discovery_networks import NETWORKS, simulated, solved, truth_of
from scipy.integrate import solve_ivp

import flowme as fm
from flowme import discovery
from flowme.discovery.policy_arm import PolicyArm

jax.config.update("jax_enable_x64", True)

ARMS = {
    "default": lambda: None,
    "random": discovery.Random,
    "class prior": discovery.ClassPrior,
    "stepwise": discovery.Stepwise,
    "genetic": discovery.Genetic,
    "genetic local": discovery.GeneticLocal,
    "policy": PolicyArm,
    "with policy": lambda: discovery.Union(
        (discovery.Stepwise(), discovery.GeneticLocal(), PolicyArm())
    ),
}


def held_out(network, number):
    """Error in initial conditions between those of training, in standard deviations."""
    starts, end = np.array(NETWORKS[number][2], float), NETWORKS[number][3]
    new, times = 0.6 * starts + 0.4 * np.roll(starts, 1, 0), np.linspace(0, end, 40)
    true = solved(truth_of(number), new, times)
    error = (solved(network, new, times) - true) / true.std((0, 1))
    return np.sqrt(np.mean(error**2))


def terms(network):
    """The terms of the ODE: (species, monomial)."""
    total = {}
    for r, k in zip(network.reactions, network.rates, strict=True):
        for s, n in r.net.items():
            total[s, r.reactants] = total.get((s, r.reactants), 0.0) + float(k) * n
    return {term for term, size in total.items() if abs(size) > 1e-9}


def f1(found, true):
    return 2 * len(found & true) / (len(found) + len(true))


def simplest(network):
    """The reactions of the simplest network with the same ODE."""
    return set(discovery.sparsest(network).reactions)


def judged(result, number):
    """Everything that needs the truth, after the choice. dBIC is that of the best above the
    truth's."""
    true, best = truth_of(number), result.best
    alike = result.judge(true)
    return {
        "exact": set(best.reactions) == set(true.reactions),
        "equivalent": len(best) <= len(true) and discovery.recovers(best, true, every=True),
        "F1": f1(terms(best), terms(true)),
        "held out": held_out(best, number),
        "dBIC": -alike["dBIC"],
        "dReward": -2 * alike["nats"],
        "reactions": len(best),
        "structures": len(result.memory.scored),
        "fits": result.course.evaluations,
    }


def searched(arm, number, noise, seed, seconds, patience):
    study, initial = simulated(number, noise, seed)
    begun = time.process_time()
    result = discovery.discover(
        study, list(initial), initial=initial, arm=ARMS[arm](), seconds=seconds,
        clock=time.process_time, patience=patience, seed=seed, progress=False,
    )  # fmt: skip
    return {**judged(result, number), "CPU s": time.process_time() - begun}


def sindy(weak, number, noise, seed):
    """PySINDy's terms; of a range of thresholds that whose simulation has the best BIC."""
    import pysindy

    study, _ = simulated(number, noise, seed)
    network = truth_of(number)
    begun = time.process_time()
    x = [np.stack([study.values[s][i] for s in study.outcomes], -1) for i in range(4)]
    t = np.asarray(study.time[0])
    best = None
    for threshold in np.logspace(-2.3, -0.2, 12):
        optimizer = pysindy.STLSQ(threshold=threshold, alpha=1e-3)
        library = pysindy.PolynomialLibrary(degree=2)
        if weak:
            library = pysindy.WeakPDELibrary(library, spatiotemporal_grid=t, K=200, p=4)
        smooth = pysindy.SmoothedFiniteDifference()
        extra = {} if weak else {"differentiation_method": smooth}
        model = pysindy.SINDy(optimizer, feature_library=library, **extra)
        model.fit(x, t=t)
        coefficients = model.coefficients()
        value = _bic(coefficients, library_powers(len(network.species)), x, t)
        if best is None or value < best[0]:
            best = value, coefficients
    found = {
        (s, monomial)
        for i, s in enumerate(network.species)
        for monomial, size in zip(monomials(network.species), best[1][i], strict=True)
        if size
    }
    true = terms(network)
    return {"F1": f1(found, true), "exact": found == true, "CPU s": time.process_time() - begun}


def library_powers(S):
    """Powers of 1, x_i and x_i x_j in PySINDy's order, [term, S]."""
    pairs = itertools.combinations_with_replacement(range(S), 2)
    rows = [np.zeros(S), *np.eye(S), *(np.eye(S)[i] + np.eye(S)[j] for i, j in pairs)]
    return np.array(rows, int)


def monomials(species):
    return [
        tuple(sorted((s, int(n)) for s, n in zip(species, powers, strict=True) if n))
        for powers in library_powers(len(species))
    ]


def _bic(coefficients, powers, x, t):
    squares = 0.0
    for y in x:
        field = lambda t, z: coefficients @ np.prod(z**powers, 1)  # noqa: E731
        found = solve_ivp(field, (t[0], t[-1]), y[0], t_eval=t, rtol=1e-6, atol=1e-8).y.T
        if found.shape != y.shape or not np.isfinite(found).all():
            return np.inf
        squares = squares + ((found - y) ** 2 / np.std(np.concatenate(x), 0) ** 2).sum()
    n = sum(y.size for y in x)
    return n * np.log(squares / n) + np.count_nonzero(coefficients) * np.log(n)


def main(networks, noises, arms, seeds, seconds, patience):
    print(f"{'arm':15s} {'network':17s} noise seed | " + " ".join(f"{c:>10s}" for c in COLUMNS))
    for arm in arms:
        rows = []
        for number, noise, seed in itertools.product(networks, noises, range(seeds)):
            if arm.startswith("sindy"):
                row = sindy(arm == "sindy weak", number, noise, seed)
            else:
                row = searched(arm, number, noise, seed, seconds, patience)
            rows.append(row)
            said = " ".join(f"{_short(row.get(c, np.nan)):>10s}" for c in COLUMNS)
            print(f"{arm:15s} {NETWORKS[number][0]:17s} {noise:5g} {seed:4d} | {said}", flush=True)
        table = pd.DataFrame(rows)
        if "dBIC" in table:
            recovered = table["exact"] | table["equivalent"]
            well = recovered | (table["dBIC"] <= 0.5)
            print(
                f"{arm}: {len(table)} runs, exact {table['exact'].sum()}, exact or equivalent "
                f"{recovered.sum()}, well {well.sum()}, mean F1 {table['F1'].mean():.3f}, largest "
                f"held-out error where recovered {table.loc[recovered, 'held out'].max():.2g}"
            )
        else:
            print(
                f"{arm}: {len(table)} runs, exact {table['exact'].sum()}, "
                f"mean F1 {table['F1'].mean():.3f}"
            )


def hare_and_lynx():
    """Pelts of 1900 to 1920: is it Lotka and Volterra, with each reaction above .9?"""
    begun = time.process_time()
    study = fm.datasets.hare_lynx()
    species = {"H": "hare", "L": "lynx"}
    result = discovery.discover(study, species, clock=time.process_time, progress=False)
    print(f"\nhare and lynx, {time.process_time() - begun:.1f} CPU s\n{result}")


def _short(x):
    if isinstance(x, bool | np.bool_):
        return "yes" if x else "-"
    return f"{x:.3g}" if abs(x) < 1e4 else f"{x:.0f}"


COLUMNS = ("exact", "equivalent", "F1", "held out", "dBIC", "dReward", "reactions", "structures",
           "fits", "CPU s")  # fmt: skip

if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="pysindy")
    usual = ["2,4,6,7,10,11,12", "0,0.05", "default", "3", "30", "20"]
    given = [*sys.argv[1:], *usual[len(sys.argv) - 1 :]]
    main(
        [int(n) for n in given[0].split(",")],
        [float(x) for x in given[1].split(",")],
        given[2].split(","),
        int(given[3]),
        float(given[4]),
        int(given[5]) or None,
    )
    hare_and_lynx()
