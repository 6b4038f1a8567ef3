r"""Screens: what a structure would explain, from one quadratic form for all of them.

Where the data are nearly linear in the rates, SSE(κ) = SSE₀ - 2 cᵀκ + κᵀGκ, and the best rates of a
structure are a non-negative least squares problem on a small part of G. Two such forms:

`integral_screen`: integral matching. x_s(t) - x_s(0) = Σ_r κ_r N_sr ∫₀ᵗ x̂^(y_r), x̂ a smoother. It
needs no model, but what a smoother blurs, superfluous reactions explain.

`tangent_screen`: around the best ODE fit. Its columns are the sensitivities of the trajectories to
*every* reaction of the library, also those that it lacks: G predicts the fit of any structure
nearby, hidden species and unknown initial states included.

Reference for the first: Dattner & Klaassen, Electron. J. Statist. 9 (2015) 1939.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .fit import Estimate
from .problem import Problem
from .smooth import Smooth

_RIDGE = 1e-9


class Screen(NamedTuple):
    """SSE_s(κ) = total_s - 2 cross_sᵀκ + κᵀ gram_s κ of each species s, in float64 whatever JAX
    uses.

    Attributes:
        gram: [S, L, L].
        cross: [S, L].
        total: SSE without any reaction, [S].
        variance: σ² of each species by which the rates are chosen, [S].
        pooled: whether χ² = Σ_s SSE_s / σ_s² counts as a whole, n log(χ² / n), as it must where
            the SSE are of integrals; else by species, as in `Problem.deviance`.
        problem: how SSE become a deviance.
    """

    gram: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    variance: np.ndarray
    pooled: bool
    problem: Problem

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviance [n] and rates [n, R] of structures, rows [n, R] padded by L."""
        L = self.cross.shape[1]
        gram = np.pad(self.gram, ((0, 0), (0, 1), (0, 1)))[:, rows[:, :, None], rows[:, None, :]]
        cross = np.pad(self.cross, ((0, 0), (0, 1)))[:, rows]
        weighted = (np.tensordot(1 / self.variance, a, 1) for a in (gram, cross))
        rates = np.where(rows < L, non_negative(*weighted), 0.0)
        squares = self.total[:, None] - 2 * np.einsum("snr,nr->sn", cross, rates)
        squares = squares + np.einsum("nr,snrq,nq->sn", rates, gram, rates, optimize=True)
        squares = np.maximum(squares.T, 0.0)
        if not self.pooled:
            return self.problem.deviance(squares), rates
        count = self.problem.courses.count
        least = (count * self.problem.floor**2 / self.variance).sum()
        chi2 = np.maximum((squares / self.variance).sum(1), least)
        return count.sum() * np.log(chi2 / count.sum()), rates


def non_negative(gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """argmin of xᵀGx - 2cᵀx over x ≥ 0, for a batch of small problems, [n, R, R], [n, R] -> [n, R].

    Block principal pivoting: all variables of the wrong sign change sides at once; only the last
    of them when that has not helped three times.

    Reference: Kim & Park, SIAM J. Sci. Comput. 33 (2011) 3261.
    """
    n, R = cross.shape
    size = np.sqrt(np.maximum(np.einsum("nrr->nr", gram), 0.0))
    size = np.where(size > 0, size, 1.0)
    G = gram / (size[:, :, None] * size[:, None, :]) + _RIDGE * np.eye(R)
    c = cross / size
    small = 1e-10 * np.maximum(np.abs(c).max(1, initial=0.0), 1e-300)[:, None]
    free = np.ones((n, R), bool)
    x = np.zeros((n, R))
    fewest, chances = np.full(n, R + 1), np.full(n, 3)
    todo = np.arange(n)
    for _ in range(5 * R):
        f = free[todo]
        both = f[:, :, None] & f[:, None, :]
        part = np.where(both, G[todo], 0.0) + np.eye(R) * ~f[:, :, None]
        now = np.linalg.solve(part, np.where(f, c[todo], 0.0)[..., None])[..., 0]
        dual = c[todo] - np.einsum("nrq,nq->nr", G[todo], now)
        wrong = np.where(f, now < -small[todo], dual > small[todo])
        x[todo] = np.where(f, np.maximum(now, 0.0), 0.0)
        bad = wrong.sum(1)
        fell = bad < fewest[todo]
        fewest[todo] = np.minimum(fewest[todo], bad)
        chances[todo] = np.where(fell, 3, chances[todo] - 1)
        last = R - 1 - wrong[:, ::-1].argmax(1)
        single = wrong & (np.arange(R) == last[:, None])
        free[todo] = f ^ np.where((chances[todo] >= 0)[:, None], wrong, single)
        todo = todo[bad > 0]
        if not todo.size:
            break
    return x / size


def integral_screen(problem: Problem, smooth: Smooth) -> Screen:
    """Integral matching with the smoothed trajectories; initial states unless known are free."""
    courses, net = problem.courses, problem.courses.net(problem.library)
    monomials, source = np.unique(problem.library.consumed, axis=0, return_inverse=True)
    S, M = net.shape[1], len(monomials)
    gram, cross, total = np.zeros((S, M, M)), np.zeros((S, M)), np.zeros(S)
    for c in range(len(courses.conditions)):
        integral = _integrals(courses.time[c], smooth, c, courses.initial[c], monomials)
        for s in range(S):
            seen = courses.observed[c, :, s]
            columns, y = integral[seen], courses.values[c, seen, s] - courses.initial[c, s]
            if seen.any() and not courses.known[c, s]:
                columns, y = columns - columns.mean(0), y - y.mean()
            gram[s] += columns.T @ columns
            cross[s] += columns.T @ y
            total[s] += y @ y
    return Screen(
        net.T[:, :, None] * net.T[:, None, :] * gram[:, source[:, None], source[None, :]],
        net.T * cross[:, source],
        total,
        np.maximum(smooth.variance, problem.floor**2),
        True,
        problem,
    )


def _integrals(
    time: np.ndarray, smooth: Smooth, c: int, fallback: np.ndarray, monomials: np.ndarray
) -> np.ndarray:
    """∫₀ᵗ x̂^y at the records, [T, monomial], by Boole's rule between two of them."""
    parts = np.arange(5) / 4
    step = np.diff(time)
    fine = time[:-1, None] + parts * step[:, None]  # [T - 1, 5]
    x = smooth(c, fine, fallback)
    values = np.prod(x[..., None, :] ** monomials, -1)  # [T - 1, 5, M]
    boole = np.array([7, 32, 12, 32, 7]) / 90
    pieces = np.einsum("i,jim->jm", boole, values) * step[:, None]
    return np.vstack([np.zeros(len(monomials)), np.cumsum(pieces, 0)])


def tangent_screen(problem: Problem, fitted: Estimate) -> Screen:
    """The quadratic form of the SSE around an ODE fit, by the rates of the whole library."""
    x, slopes = problem.along_library(fitted.rows, fitted.log_rates, fitted.initial)
    variance = problem.variance(fitted.squares)
    sd = np.sqrt(variance)[:, None]
    off = (problem.design.values - x) / sd * problem.design.observed  # [T, S, C]
    by = slopes * (problem.design.observed / sd)[:, :, None]  # [T, S, L + O, C]
    L, S = len(problem.library), len(variance)
    gram, slope, chi2 = np.zeros((S, L, L)), np.zeros((S, L)), np.zeros(S)
    for c in range(x.shape[-1]):
        explained = _without_own(np.concatenate([by[..., c], off[:, :, None, c]], 2), L)
        for s in range(S):
            columns, residual = explained[:, s, :L], explained[:, s, L]
            gram[s] += columns.T @ columns
            slope[s] += columns.T @ residual
            chi2[s] += residual @ residual
    rates = np.zeros(L)
    rates[list(fitted.rows)] = np.exp(fitted.log_rates)
    total = chi2 + 2 * slope @ rates + gram @ rates @ rates
    cross = (slope + gram @ rates) * variance[:, None]
    gram = gram * variance[:, None, None]
    return Screen(gram, cross, total * variance, variance, False, problem)


def _without_own(columns: np.ndarray, L: int) -> np.ndarray:
    """What the initial state of the condition cannot explain: from [T, S, L + O + 1], where the
    last is the residual, to [T, S, L + 1]."""
    T, S, _ = columns.shape
    flat = columns.reshape(T * S, -1)
    kept, own = np.delete(flat, np.s_[L:-1], axis=1), flat[:, L:-1]
    if own.any():
        basis, singular, _ = np.linalg.svd(own, full_matrices=False)
        basis = basis[:, singular > 1e-9 * singular[0]]
        kept = kept - basis @ (basis.T @ kept)
    return kept.reshape(T, S, -1)
