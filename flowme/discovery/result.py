"""What a search found: networks ranked, how sure each reaction is, and how they follow the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from .data import TimeCourses
from .equivalence import class_key, sparsest
from .fit import Estimate, LevenbergMarquardt, covariance, informed
from .journal import Course
from .memory import Memory, Path, Scored
from .network import ReactionNetwork
from .picture import against_data
from .robustness import Robustness, held_out, stable

_LIKELY = 9.2  # nats behind the best within which structures count: a weight of 1e-4
_MOST = 60  # structures of which the simplest of the same ODE is looked for
_SAME = 0.5  # difference of two deviances of the same ODE, fitted twice
_WIDE = 0.5  # standard error of a log rate above which the rate itself is taken for normal


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """The networks a search found, best first; `print` shows them.

    Attributes:
        leaderboard: one row per network: its reactions, BIC and how far it is from the best,
            probability among all seen, the parts of its reward, and its equivalence class.
        rates: one row per reaction of each network: rate, standard error, and that of log rate.
        inclusion: probability of each reaction, from the weights of all structures seen.
        networks: the networks of the leaderboard, in the study's units.
        initial: initial states, [network, subject, species].
        course: how the search went.
        fits: of the networks, in scaled units.
        memory: data, library and all structures seen.
    """

    leaderboard: pd.DataFrame
    rates: pd.DataFrame
    inclusion: pd.Series
    networks: tuple[ReactionNetwork, ...]
    initial: np.ndarray
    course: Course
    fits: tuple[Estimate, ...]
    memory: Memory

    @property
    def best(self) -> ReactionNetwork:
        """The first network: `fm.solve(result.best, (), study, initial=result.initial[0])`."""
        return self.networks[0]

    def plot(self, networks: int = 3, subjects: int = 6) -> Figure:
        """The data, and the trajectories of the best networks, a panel per species and subject."""
        curves = [Path(self.memory.problem, f).curves for f in self.fits[:networks]]
        names = [str(i + 1) for i in range(len(curves))]
        return against_data(self.memory.problem.courses, curves, names, subjects)

    def judge(self, hypothesis: ReactionNetwork, fit: Any = None) -> pd.Series:
        """A network of your own, fitted as those of the search were and set beside the best.

        Args:
            hypothesis: reactions of the library; the fit starts from its rates, and from those
                that the screens of the search give them.
            fit: the inner fit; `LevenbergMarquardt()` if None.

        Returns:
            BIC and reward, and how far both are from the best: "dBIC" above 0 means that the data
            prefer the best; "nats" is n times the difference of the rewards.
        """
        if not isinstance(hypothesis, ReactionNetwork):
            raise TypeError(
                f"expected a hypothesis such as ReactionNetwork(['A -> B']); got {hypothesis!r}"
            )
        problem, n = self.memory.problem, self.memory.problem.courses.count.sum()
        unit = problem.courses.rate_unit(problem.library)
        given = zip(hypothesis.reactions, hypothesis.rates, strict=True)
        rates = {problem.library.index(r): float(k) for r, k in given}
        rows = tuple(sorted(rates))
        if len(rows) > problem.slots:
            raise ValueError(
                f"expected a network of at most {problem.slots} reactions, as most_reactions says; "
                f"got {len(rows)}"
            )
        starts = [np.array([rates[r] / unit[r] for r in rows]), *self.memory.starts(rows)]
        fits = (fit or LevenbergMarquardt())(problem, [rows] * len(starts), starts)
        scored = self.memory.score(min(fits, key=lambda f: f.deviance))
        if not np.isfinite(scored.fit.deviance):
            warnings.warn(
                f"{hypothesis} could not be simulated from any of {len(starts)} starts: its "
                "numbers say nothing; give rates near those that you expect",
                stacklevel=2,
            )
        first, bic = self.leaderboard.iloc[0], -2 * n * scored.prediction
        nats = n * (self.memory.score(self.fits[0]).reward - scored.reward)
        found = {"BIC": bic, "dBIC": bic - first["BIC"], "reward": scored.reward, "nats": nats}
        return pd.Series(found, name=str(hypothesis))

    def to_arviz(self, draws: int = 1000, seed: int = 0) -> Any:
        """Draws of structure and rates as an ArviZ object: a network by its probability, then its
        log rates from the normal approximation; where the standard error of one is above 1/2, the
        rate's own, folded at 0. The rate of a reaction not in it is 0, and NaN where the data do
        not determine it. `attrs` has the units of the rates.

        Groups: `posterior` with "included" and "rate" [chain, draw, reaction] and "network"
        [chain, draw]; `observed_data` with the species [subject, time], NaN where not measured.
        """
        import arviz as az  # here because importing it takes seconds

        groups = {
            "posterior": _posterior(self, np.random.default_rng(seed), draws),
            "observed_data": _observed(self.memory.problem.courses),
        }
        if az.__version__.startswith("0."):
            return az.InferenceData(**groups)  # type: ignore
        return xr.DataTree.from_dict({"/": xr.Dataset(), **groups})

    def __str__(self) -> str:
        columns = ["network", "BIC", "dBIC", "probability", "held_out", "stable", "reward"]
        table = self.leaderboard[columns].to_string(float_format=lambda x: f"{x:.4g}")
        sure = "\n".join(f"  {p:.2f}  {r}" for r, p in self.inclusion.items() if p >= 0.05)
        c = self.course
        return (
            f"{c.evaluations} ODE fits, rounds: {c.rounds}, {c.seconds:.0f} s: {c.why}.\n\n"
            f"{table}\n\nProbability that a reaction is there:\n{sure}\n\n{self.best}"
        )

    __repr__ = __str__


def conclude(memory: Memory, fit: Any, leaders: int, course: Course, seed: int) -> Discovery:
    """The result of a search: one network for each ODE, the simplest that has it."""
    if not memory.scored:
        raise ValueError(
            f"expected a budget for at least one round of fits; got none done ({course.why})"
        )
    distinct = _distinct(memory, fit)
    weight = np.exp([_nats(memory, s) - _nats(memory, distinct[0]) for s in distinct])
    probability = weight / weight.sum()
    first = distinct[:leaders]
    robust = _robustness(memory, first, fit, seed)
    counts = memory.weights.robustness
    total = [s.reward + counts * r.total for s, r in zip(first, robust, strict=True)]
    order = np.argsort(-np.array(total), kind="stable")
    rows = [_row(memory, first[i], probability[i], robust[i], total[i]) for i in order]
    board = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))
    board.insert(2, "dBIC", board["BIC"] - board["BIC"].iloc[0])
    fits = informed(memory.problem, [first[i].fit for i in order])
    return Discovery(
        board,
        pd.concat({i + 1: _rates(memory, f) for i, f in enumerate(fits)}, names=["rank"]),
        _inclusion(memory, distinct, probability),
        tuple(network(memory, f) for f in fits),
        np.stack([f.initial * memory.problem.courses.scale for f in fits]),
        course,
        tuple(fits),
        memory,
    )


def network(memory: Memory, fit: Estimate) -> ReactionNetwork:
    """A fit as a network in the study's units."""
    library, courses = memory.problem.library, memory.problem.courses
    rows = list(fit.rows)
    rates = np.exp(fit.log_rates) * courses.rate_unit(library)[rows]
    reactions = [library.reactions[r] for r in rows]
    return ReactionNetwork(reactions, rates.tolist(), species=courses.species)


def _nats(memory: Memory, scored: Scored) -> float:
    """Log posterior probability up to a constant: -BIC / 2 and the log prior, as weighted."""
    return scored.reward * float(memory.problem.courses.count.sum())


def _distinct(memory: Memory, fit: Any) -> list[Scored]:
    """The fits near the best, those with the same ODE as one: the simplest, fitted."""
    best = memory.best(_MOST)
    near = [s for s in best if _nats(memory, best[0]) - _nats(memory, s) < _LIKELY]
    simplest = {s.fit.rows: _simplest(memory, s.fit) for s in best[: max(len(near), 20)]}
    new = {r: k for r, k in simplest.values() if r not in memory.scored}
    if new:
        memory.add(fit(memory.problem, list(new), list(new.values())))
    pairs = [(memory.scored[rows], memory.scored[r]) for rows, (r, _) in simplest.items()]
    # Where rates differ by many orders of magnitude the simplest may not have quite the same ODE.
    same = [new if new.fit.deviance < old.fit.deviance + _SAME else old for old, new in pairs]
    kept = {s.fit.rows: s for s in same}
    others = [s for s in memory.best(len(memory.scored)) if s.fit.rows not in simplest]
    kept |= {s.fit.rows: s for s in others if s.fit.rows not in kept}
    return sorted(kept.values(), key=lambda s: -s.reward)


def _simplest(memory: Memory, fit: Estimate) -> tuple[tuple[int, ...], np.ndarray]:
    """Rows and scaled rates of the simplest network with the same ODE."""
    library = memory.problem.library
    sources = [library.reactions[r].reactants for r in fit.rows]
    if len(set(sources)) == len(sources):  # canonical already
        return fit.rows, np.exp(fit.log_rates)
    simple = sparsest(network(memory, fit), library)
    unit = memory.problem.courses.rate_unit(library)
    rates = {library.index(r): k for r, k in zip(simple.reactions, simple.rates, strict=True)}
    rows = tuple(sorted(rates))
    return rows, np.array([rates[r] / unit[r] for r in rows])


def _robustness(memory: Memory, leaders: list[Scored], fit: Any, seed: int) -> list[Robustness]:
    fits = [s.fit for s in leaders]
    rng = np.random.default_rng(seed)
    lost = held_out(memory.problem, fits, fit)
    return [
        Robustness(float(h), stable(memory.problem, f, rng))
        for f, h in zip(fits, lost, strict=True)
    ]


def _row(
    memory: Memory, scored: Scored, probability: float, robust: Robustness, total: float
) -> dict[str, Any]:
    library, n = memory.problem.library, memory.problem.courses.count.sum()
    return {
        "network": "; ".join(str(library.reactions[r]) for r in scored.fit.rows),
        "BIC": -2 * n * scored.prediction,
        "probability": probability,
        "reactions": len(scored.fit.rows),
        "prediction": scored.prediction,
        "complexity": scored.complexity,
        "held_out": robust.held_out,
        "stable": robust.stable,
        "reward": total,
        "class": class_key(library, list(scored.fit.rows)),
    }


def _rates(memory: Memory, fit: Estimate) -> pd.DataFrame:
    """Rates with their standard errors by the delta method; infinite where not determined."""
    found = network(memory, fit)
    log_se = np.sqrt(np.diag(covariance(fit.information)))
    rates = np.array(found.rates, float)
    unit = [memory.problem.courses.unit(r) for r in found.reactions]
    return pd.DataFrame(
        {"rate": rates, "se": rates * log_se, "log_se": log_se, "unit": unit},
        index=pd.Index([str(r) for r in found.reactions], name="reaction"),
    )


def _inclusion(memory: Memory, distinct: list[Scored], probability: np.ndarray) -> pd.Series:
    total = np.zeros(len(memory.problem.library))
    for scored, p in zip(distinct, probability, strict=True):
        total[list(scored.fit.rows)] += p
    names = pd.Index([str(r) for r in memory.problem.library.reactions], name="reaction")
    ordered = pd.Series(total, names, name="probability").sort_values(
        ascending=False, kind="stable"
    )
    return ordered[ordered > 0]


def _posterior(found: Discovery, rng: np.random.Generator, draws: int) -> xr.Dataset:
    p = found.leaderboard["probability"].to_numpy()
    which = rng.choice(len(p), size=draws, p=p / p.sum()) + 1
    names = list(dict.fromkeys(found.rates.index.get_level_values("reaction")))
    rate = np.zeros((draws, len(names)))
    for rank in np.unique(which):
        table, here = found.rates.loc[rank], which == rank
        spread = covariance(found.fits[rank - 1].information)
        lost = np.isinf(np.diag(spread))  # not determined by the data
        spread[lost, lost] = 0.0
        size, vectors = np.linalg.eigh(spread)
        z = rng.normal(size=(here.sum(), len(table))) @ (vectors * np.sqrt(np.maximum(size, 0.0))).T
        wide = np.diag(spread) > _WIDE**2
        factor = np.where(wide, np.abs(1 + z), np.exp(np.where(wide, 0.0, z)))
        drawn = np.where(lost, np.nan, table["rate"].to_numpy() * factor)
        rate[np.ix_(here, [names.index(r) for r in table.index])] = drawn
    axes = ("chain", "draw", "reaction")
    return xr.Dataset(
        {
            "included": (axes, (rate != 0)[None]),
            "rate": (axes, rate[None]),
            "network": (axes[:2], which[None]),
        },
        coords={"chain": [0], "draw": np.arange(draws), "reaction": names},
        attrs={f"unit of {r}": unit for (_, r), unit in found.rates["unit"].items()},
    )


def _observed(courses: TimeCourses) -> xr.Dataset:
    values = np.where(courses.observed, courses.values * courses.scale, np.nan)
    time = courses.start[:, None] + courses.time * courses.duration
    axes = ("subject", "time")
    species = {s: (axes, values[..., i]) for i, s in enumerate(courses.species)}
    return xr.Dataset({**species, "at": (axes, time)}, coords={"subject": list(courses.conditions)})
