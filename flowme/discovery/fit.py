r"""Rates of many structures by Levenberg's and Marquardt's method on their logarithms.

Each step solves

.. math:: (H + λ\, \mathrm{diag} H)\, δ = g, \qquad
    H = \sum S^\top S / σ_s^2, \quad g = \sum S^\top r / σ_s^2,

for the log rates and the unknown initial states of every condition, the latter eliminated
condition by condition. Structures are worked off through B slots of one compiled program: when
one has converged, or will not come near the best, the next takes its slot.

Reference: Marquardt, J SIAM 11 (1963) 431.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .problem import Problem
from .simulate import Normal, normal

_LOWEST, _HIGHEST = np.log(1e-7), np.log(1e5)  # of a scaled rate
_FARTHEST = 2.0  # step of a log rate
_TRIALS = 4  # slower and slower starts of a structure whose trajectories are not finite


class Estimate(NamedTuple):
    """A structure and what its fit came to, in scaled units.

    Attributes:
        rows: of the library, sorted.
        log_rates: [R].
        initial: [C, S].
        squares: Σ residual² of each species, [S].
        deviance: see `Problem`; inf where the fit failed.
        information: Gauss-Newton's Hessian of D/2 by the log rates, initial states eliminated,
            [R, R].
    """

    rows: tuple[int, ...]
    log_rates: np.ndarray
    initial: np.ndarray
    squares: np.ndarray
    deviance: float
    information: np.ndarray


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Fits structures to the deviance of a problem.

    Attributes:
        iterations: most steps of one structure.
        tolerance: fall of the deviance in one step below which a structure has converged.
        patience: a structure is given up when at its present pace it would take more than so many
            steps to the best deviance known.
    """

    iterations: int = 40
    tolerance: float = 0.05
    patience: int = 20

    def __call__(
        self,
        problem: Problem,
        structures: Sequence[tuple[int, ...]],
        starts: Sequence[np.ndarray],
        best: float = np.inf,
        initial: Sequence[np.ndarray] | None = None,
        use: Any = None,
    ) -> list[Estimate]:
        """The estimates, one for each structure.

        Args:
            problem: data and library.
            structures: rows of the library, at most `problem.slots` each.
            starts: scaled rates to start from, [R] each.
            best: deviance that a structure must come near; inf: all are fitted to the end.
            initial: first guesses of the initial states, [C, S] each; the data's if None.
            use: whether the fit sees each condition, [C] bool for each structure; all if None.
        """
        guesses = initial or [problem.courses.initial] * len(structures)
        use = np.ones((len(structures), len(problem.courses.conditions))) if use is None else use
        slots = _Slots(problem, self, best)
        waiting = list(zip(range(len(structures)), structures, starts, guesses, use, strict=True))
        done: dict[int, Estimate] = {}
        while waiting or slots.busy.any():
            for b in np.flatnonzero(~slots.busy):
                if waiting:
                    slots.take(int(b), *waiting.pop(0))
            slots.step()
            for b in slots.finished():
                done[int(slots.name[b])] = slots.release(b)
        return [done[i] for i in range(len(structures))]


class _Slots:
    """B structures in the middle of their fits: the present point of each, and its trial."""

    def __init__(self, problem: Problem, method: LevenbergMarquardt, best: float):
        B, R = problem.batch, problem.slots
        C, S = problem.courses.initial.shape
        Q = R + problem.design.own.shape[1]
        self.problem, self.method, self.best = problem, method, best
        self.busy, self.name, self.size = np.zeros(B, bool), np.full(B, -1), np.zeros(B, int)
        self.rows = np.full((B, R), len(problem.library))
        self.use = np.ones((B, C))
        self.damping, self.fall, self.count = np.full(B, 1e-2), np.zeros(B), np.zeros(B, int)
        self.trial = np.zeros((B, R)), np.tile(problem.courses.initial, (B, 1, 1))
        self.point = tuple(x.copy() for x in self.trial)
        self.deviance, self.squares = np.full(B, np.inf), np.full((B, S), np.inf)
        self.variance = np.ones((B, S))
        self.equations = np.zeros((B, C, Q)), np.zeros((B, C, Q, Q))

    def take(
        self, b: int, name: int, rows: tuple[int, ...], start: Any, initial: Any, use: Any
    ) -> None:
        """Begin the fit of a structure in slot b."""
        n = len(rows)
        self.busy[b], self.name[b], self.size[b] = True, name, n
        self.rows[b], self.use[b] = self.problem.rows([rows])[0], use
        log_rates, states = self.trial
        log_rates[b] = 0.0
        log_rates[b, :n] = np.clip(np.log(np.maximum(start, 1e-300)), _LOWEST, _HIGHEST)
        states[b] = initial
        self.damping[b], self.fall[b], self.count[b] = 1e-2, 0.0, 0
        self.deviance[b], self.squares[b] = np.inf, np.inf
        self.variance[b] = np.maximum(self.problem.floor**2, 1e-2)

    def step(self) -> None:
        """Evaluate the trials, keep those that are better, and make the next."""
        squares, equations = evaluate(self.problem, self.rows, *self.trial, self.variance, self.use)
        deviance = self.problem.deviance(squares)
        better = deviance < self.deviance
        begun = np.isfinite(self.deviance)
        fall = np.where(begun, self.deviance, np.inf) - np.where(better, deviance, 0.0)
        self.fall = np.where(better, fall, self.fall)
        self.deviance = np.where(better, deviance, self.deviance)
        self.squares = _where(better, squares, self.squares)
        self.point = _where(better, self.trial, self.point)
        self.equations = _where(better, equations, self.equations)
        self.variance = _where(better, self.problem.variance(self.squares), self.variance)
        self.damping = np.where(better, self.damping / 5, self.damping * np.where(begun, 6, 1))
        self.count += 1
        self._propose()

    def _propose(self) -> None:
        """A step from every point; all rates lower where there is none from which x is finite."""
        by_rates, by_states = solve(*self.equations, self.damping, self.problem.slots)
        log_rates, states = self.point
        log_rates = log_rates + np.clip(by_rates, -_FARTHEST, _FARTHEST)
        if by_states.size:
            states = np.clip(states + by_states, 0.0, 10.0)
        slower = self.trial[0] - 1.0, self.trial[1]
        begun = np.isfinite(self.deviance)
        log_rates, states = _where(begun, (log_rates, states), slower)
        self.trial = np.clip(log_rates, _LOWEST, _HIGHEST), states

    def finished(self) -> np.ndarray:
        """Slots whose structure has converged, failed, or will not come near the best."""
        m = self.method
        begun = np.isfinite(self.deviance)
        settled = (self.fall < m.tolerance) | (self.damping > 1e4) | (self.count >= m.iterations)
        behind = np.where(begun, self.deviance, 0.0) - self.best
        hopeless = (self.count > 5) & (self.fall * m.patience < behind)
        ended = np.where(begun, (self.count > 1) & settled | hopeless, self.count >= _TRIALS)
        return np.flatnonzero(self.busy & ended)

    def release(self, b: int) -> Estimate:
        self.busy[b] = False
        n = self.size[b]
        rows = tuple(int(r) for r in self.rows[b, :n])
        information = eliminated(self.equations[1][b : b + 1], self.problem.slots)[0]
        return Estimate(
            rows,
            self.point[0][b, :n].copy(),
            self.point[1][b].copy(),
            self.squares[b].copy(),
            float(self.deviance[b]),
            information[:n, :n],
        )


def informed(problem: Problem, estimates: Sequence[Estimate]) -> list[Estimate]:
    """The estimates with the information at their own rates and variances: a fit that ends weighs
    residuals with the variance of the step before."""
    found: list[Estimate] = []
    for first in range(0, len(estimates), problem.batch):
        some = list(estimates[first : first + problem.batch])
        filled = some + some[:1] * (problem.batch - len(some))
        log_rates = np.zeros((len(filled), problem.slots))
        for b, estimate in enumerate(filled):
            log_rates[b, : len(estimate.rows)] = estimate.log_rates
        squares = np.stack([e.squares for e in filled])
        conditions = np.ones((len(filled), len(problem.courses.conditions)))
        _, (_, hessian) = evaluate(
            problem, problem.rows([e.rows for e in filled]), log_rates,
            np.stack([e.initial for e in filled]), problem.variance(squares), conditions,
        )  # fmt: skip
        information = eliminated(hessian, problem.slots)
        for estimate, whole in zip(some, information, strict=False):
            n = len(estimate.rows)
            found.append(estimate._replace(information=whole[:n, :n]))
    return found


def covariance(information: np.ndarray) -> np.ndarray:
    """The inverse of an information matrix; infinite variances, and no covariances, of what is in a
    direction that the data do not determine."""
    size = np.sqrt(np.maximum(np.diag(information), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(information / np.outer(size, size))
    known = values > 1e-9
    found = (vectors[:, known] / values[known]) @ vectors[:, known].T / np.outer(size, size)
    lost = (vectors[:, ~known] ** 2).sum(1) > 1e-6
    found[lost], found[:, lost] = 0.0, 0.0
    found[lost, lost] = np.inf
    return found


def evaluate(
    problem: Problem,
    rows: np.ndarray,
    log_rates: np.ndarray,
    initial: np.ndarray,
    variance: np.ndarray,
    use: np.ndarray,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Sums of squares [B, S], infinite where anything is not finite, gradient [B, C, Q + O] and
    Hessian [B, C, Q + O, Q + O]."""
    weight = use[:, :, None] / np.sqrt(variance)[:, None, :]  # [B, C, S]
    result = normal(
        problem.gather(rows),
        np.ascontiguousarray(log_rates.T),
        np.ascontiguousarray(initial.transpose(2, 1, 0)),
        np.ascontiguousarray(weight.transpose(2, 1, 0)),
        problem.design,
        problem.substeps,
    )
    squares, gradient, hessian = Normal(*(np.asarray(a, float) for a in result))
    with np.errstate(invalid="ignore"):  # an infinity in a condition not in use
        squares = np.einsum("scb,bc->bs", squares, use)
    gradient, hessian = gradient.transpose(2, 1, 0), hessian.transpose(3, 2, 0, 1)
    # Sensitivities may overflow, in single precision, where the trajectories do not.
    finite = np.isfinite(squares).all(1) & np.isfinite(hessian).all((1, 2, 3))
    finite &= np.isfinite(gradient).all((1, 2))
    return _where(finite, (squares, (gradient, hessian)), (np.inf, (0.0, 0.0)))


def _where(condition: np.ndarray, new: Any, old: Any) -> Any:
    """np.where over the first axis of an array, or of each array of a tuple."""
    if isinstance(new, tuple):
        return tuple(_where(condition, n, o) for n, o in zip(new, old, strict=True))
    return np.where(condition.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def solve(
    gradient: np.ndarray, hessian: np.ndarray, damping: np.ndarray, R: int
) -> tuple[np.ndarray, np.ndarray]:
    """δ of the log rates [B, R] and of the initial states [B, C, S]."""
    across, own = hessian[:, :, :R, R:], _damped(hessian[:, :, R:, R:], damping)
    back = np.linalg.solve(own, np.swapaxes(across, -1, -2))  # [B, C, O, R]
    alone = np.linalg.solve(own, gradient[:, :, R:, None])  # [B, C, O, 1]
    shared = _damped(hessian[:, :, :R, :R].sum(1), damping)
    left = shared - (across @ back).sum(1)
    right = (gradient[:, :, :R, None] - across @ alone).sum(1)
    rates = np.linalg.solve(left, right)
    states = alone - back @ rates[:, None]
    return rates[..., 0], states[..., 0]


def eliminated(hessian: np.ndarray, R: int) -> np.ndarray:
    """The Hessian by the log rates alone, initial states eliminated, [B, R, R]."""
    across, own = hessian[:, :, :R, R:], _damped(hessian[:, :, R:, R:], np.zeros(len(hessian)))
    explained = across @ np.linalg.solve(own, np.swapaxes(across, -1, -2))
    return (hessian[:, :, :R, :R] - explained).sum(1)


def _damped(H: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """H + λ diag H, [B, ..., n, n]; what nothing depends on (an empty slot) does not move."""
    diagonal = np.einsum("...ii->...i", H)
    more = damping.reshape(-1, *[1] * (diagonal.ndim - 1)) * diagonal + 1e-6
    more = np.where(diagonal > 0, more, 1.0)
    return H + more[..., None] * np.eye(H.shape[-1])
