r"""Screens: what a structure would explain, from one quadratic form for all of them.

Where the data are nearly linear in the rates, χ²(κ) = χ₀² - 2 cᵀκ + κᵀGκ, and the best rates of a
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
    """χ²(κ) = total - 2 crossᵀκ + κᵀ gram κ, in float64 whatever JAX uses.

    Attributes:
        gram: [L, L].
        cross: [L].
        total: χ² without any reaction.
        count: number of measurements, n.
        least: χ²/n where all residuals are at the problem's floor: below, structures are equal.
    """

    gram: np.ndarray
    cross: np.ndarray
    total: float
    count: int
    least: float

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviance n log(χ²/n) [n] and rates [n, R] of structures, rows [n, R] padded by L."""
        L = self.cross.size
        gram = np.pad(self.gram, (0, 1))[rows[:, :, None], rows[:, None, :]]
        cross = np.append(self.cross, 0.0)[rows]
        rates = np.where(rows < L, non_negative(gram, cross), 0.0)
        chi2 = self.total - 2 * np.einsum("nr,nr->n", cross, rates)
        chi2 = chi2 + np.einsum("nr,nrq,nq->n", rates, gram, rates)
        return self.count * np.log(np.maximum(chi2 / self.count, self.least)), rates


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
    variance = np.maximum(smooth.variance, problem.floor**2)
    L = len(problem.library)
    gram, cross, total = np.zeros((L, L)), np.zeros(L), 0.0
    for c in range(len(courses.conditions)):
        integral = _integrals(courses.time[c], smooth, c, courses.initial[c], monomials)
        for s in range(len(courses.species)):
            seen = courses.observed[c, :, s]
            if not seen.any():
                continue
            columns, y = integral[seen], courses.values[c, seen, s] - courses.initial[c, s]
            if not courses.known[c, s]:
                columns, y = columns - columns.mean(0), y - y.mean()
            n = net[:, s] / np.sqrt(variance[s])
            gram += np.outer(n, n) * (columns.T @ columns)[source][:, source]
            cross += n * (columns.T @ y)[source] / np.sqrt(variance[s])
            total += y @ y / variance[s]
    return Screen(gram, cross, total, *_extent(problem, variance))


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
    """The quadratic form of χ² around an ODE fit, by the rates of the whole library."""
    x, slopes = problem.along_library(fitted.rows, fitted.log_rates, fitted.initial)
    weight = problem.design.observed / np.sqrt(problem.variance(fitted.squares))[:, None]
    residual = (problem.design.values - x) * weight  # [T, S, C]
    columns = slopes * weight[:, :, None]  # [T, S, L + O, C]
    L = len(problem.library)
    gram, slope = np.zeros((L, L)), np.zeros(L)
    for c in range(x.shape[-1]):
        by_rates = _explained(columns[..., c].reshape(-1, columns.shape[2]), L)
        gram += by_rates.T @ by_rates
        slope += by_rates.T @ residual[..., c].reshape(-1)
    rates = np.zeros(L)
    rates[list(fitted.rows)] = np.exp(fitted.log_rates)
    total = (residual**2).sum() + 2 * rates @ slope + rates @ gram @ rates
    extent = _extent(problem, problem.variance(fitted.squares))
    return Screen(gram, slope + gram @ rates, float(total), *extent)


def _extent(problem: Problem, variance: np.ndarray) -> tuple[int, float]:
    """Number of measurements, and χ²/n at the floor where χ² has these variances."""
    count = problem.courses.count
    return int(count.sum()), float((count * problem.floor**2 / variance).sum() / count.sum())


def _explained(columns: np.ndarray, L: int) -> np.ndarray:
    """The columns by rates with those by the initial state projected out."""
    by_rates, own = columns[:, :L], columns[:, L:]
    if not own.any():
        return by_rates
    basis, singular, _ = np.linalg.svd(own, full_matrices=False)
    basis = basis[:, singular > 1e-9 * singular[0]]
    return by_rates - basis @ (basis.T @ by_rates)
