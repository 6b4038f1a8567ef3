"""How far a fitted structure holds: in conditions that it has not seen, and at other rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .fit import Estimate, evaluate
from .problem import Problem

_BAND = 0.25  # of a species' standard deviation
_PERTURBED = 0.05  # standard deviation of the logarithm of perturbed rates


class Robustness(NamedTuple):
    """Both parts are 0 at best.

    Attributes:
        held_out: log-likelihood that each condition loses when the rates come from the others,
            nats per measurement; NaN of one condition.
        stable: share of perturbed rates with which every species stays in the band.
    """

    held_out: float
    stable: float

    @property
    def total(self) -> float:
        """What is lost to conditions not seen and to perturbed rates."""
        return float(np.nan_to_num(self.held_out)) + self.stable - 1.0


def held_out(problem: Problem, fits: Sequence[Estimate], fit: Any) -> np.ndarray:
    """-(1/2n) Σ_s (SSE'_s - SSE_s) / σ̂_s², [n], where SSE' is of each condition with the rates
    fitted to the others; its initial state is the one known or estimated from all.

    Args:
        problem: data and library.
        fits: structures, fitted to all conditions.
        fit: the inner fit.
    """
    C = len(problem.courses.conditions)
    if C == 1:
        return np.full(len(fits), np.nan)
    cases = [(f, c) for f in fits for c in range(C)]
    without = fit(
        problem,
        [f.rows for f, _ in cases],
        [np.exp(f.log_rates) for f, _ in cases],
        initial=[f.initial for f, _ in cases],
        use=[np.arange(C) != c for _, c in cases],
    )
    squares = squares_of(
        problem,
        [again.rows for again in without],
        [again.log_rates for again in without],
        [f.initial for f, _ in cases],
        [np.arange(C) == c for _, c in cases],
    )
    predicted = squares.reshape(len(fits), C, -1).sum(1)
    own = np.stack([f.squares for f in fits])
    lost = ((predicted - own) / problem.variance(own)).sum(1) / (2 * problem.courses.count.sum())
    return -np.where(np.isfinite(lost), lost, np.inf)


def stable(problem: Problem, fit: Estimate, rng: np.random.Generator, draws: int = 100) -> float:
    """Share of draws κ exp(.05 z), z normal, with which every species stays, in root mean square
    over all records, within a quarter of its standard deviation of where it was.

    Reference: Bhamidipati et al. (2025), eLife 106497, of circuits designed without data.
    """
    courses, design = problem.courses, problem.design
    x = problem.along_library(fit.rows, fit.log_rates, fit.initial)[0]
    recorded = np.diff(courses.time, axis=1, prepend=-1.0).T[:, None] > 0  # padding is not
    everywhere = design._replace(
        values=x, observed=np.broadcast_to(recorded, x.shape).astype(float)
    )
    moved = fit.log_rates + _PERTURBED * rng.normal(size=(draws, fit.log_rates.size))
    C = len(courses.conditions)
    squares = squares_of(
        replace(problem, design=everywhere),
        [fit.rows] * draws,
        list(moved),
        [fit.initial] * draws,
        [np.ones(C)] * draws,
    )
    sd = np.std(x, axis=(0, 2), where=recorded)
    apart = np.sqrt(squares / recorded.sum())
    return float((apart < _BAND * np.maximum(sd, problem.floor)).all(1).mean())


def squares_of(
    problem: Problem,
    structures: Sequence[tuple[int, ...]],
    log_rates: Sequence[np.ndarray],
    initial: Sequence[np.ndarray],
    use: Sequence[np.ndarray],
) -> np.ndarray:
    """Σ residual² of each species over the conditions in use, [n, S]."""
    n, B = len(structures), problem.batch
    padded = np.zeros((n, problem.slots))
    for i, values in enumerate(log_rates):
        padded[i, : len(values)] = values
    rows, states, used = problem.rows(list(structures)), np.stack(initial), np.stack(use)
    found = []
    for i in range(0, n, B):
        here = np.minimum(np.arange(i, i + B), n - 1)
        ones = np.ones((B, states.shape[-1]))
        found.append(evaluate(problem, rows[here], padded[here], states[here], ones, used[here])[0])
    return np.concatenate(found)[:n]
