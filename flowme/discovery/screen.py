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

import jax.numpy as jnp
import numpy as np

from .fit import Estimate
from .problem import Problem
from .simulate import Normal, Reactions, normal
from .smooth import Smooth

_RIDGE = 1e-9
_LEAST = 1e-6  # χ²/n below which a screen cannot tell structures apart


class Screen(NamedTuple):
    """χ²(κ) = total - 2 crossᵀκ + κᵀ gram κ, in float64 whatever JAX uses.

    Attributes:
        gram: [L, L].
        cross: [L].
        total: χ² without any reaction.
        count: number of measurements.
    """

    gram: np.ndarray
    cross: np.ndarray
    total: float
    count: int

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviance n log(χ²/n) [n] and rates [n, R] of structures, rows [n, R] padded by L."""
        L = self.cross.size
        gram = np.pad(self.gram, (0, 1))[rows[:, :, None], rows[:, None, :]]
        cross = np.append(self.cross, 0.0)[rows]
        rates = np.where(rows < L, non_negative(gram, cross), 0.0)
        chi2 = self.total - 2 * np.einsum("nr,nr->n", cross, rates)
        chi2 = chi2 + np.einsum("nr,nrq,nq->n", rates, gram, rates)
        return self.count * np.log(np.maximum(chi2 / self.count, _LEAST)), rates


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
    return Screen(gram, cross, total, int(courses.count.sum()))


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
    rows = problem.rows([fitted.rows])
    log_rates = np.zeros(problem.slots)
    log_rates[: len(fitted.rows)] = fitted.log_rates
    variance = problem.variance(fitted.squares)
    along = Reactions(*(jnp.asarray(a[..., :-1, None]) for a in problem.reactions))
    C = len(problem.courses.conditions)
    result = normal(
        Reactions(*map(jnp.asarray, problem.gather(rows))),
        jnp.asarray(log_rates[:, None]),
        jnp.asarray(fitted.initial.T[..., None]),
        jnp.broadcast_to(1 / jnp.sqrt(variance)[:, None, None], (variance.size, C, 1)),
        problem.design,
        problem.substeps,
        along,
    )
    squares, gradient, hessian = Normal(*(np.asarray(a[..., 0], float) for a in result))
    L = len(problem.library)
    gram, slope = _project(gradient, hessian, L)
    rates = np.zeros(L)
    rates[list(fitted.rows)] = np.exp(fitted.log_rates)
    chi2 = float((squares.sum(1) / variance).sum())
    total = chi2 + 2 * rates @ slope + rates @ gram @ rates
    return Screen(gram, slope + gram @ rates, total, int(problem.courses.count.sum()))


def _project(gradient: np.ndarray, hessian: np.ndarray, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Gram [L, L] and slope [L] with every condition's initial state at its best."""
    gram, slope = hessian[:L, :L].sum(-1), gradient[:L].sum(-1)
    for c in range(gradient.shape[-1] if gradient.shape[0] > L else 0):
        own = hessian[L:, L:, c]
        back = np.linalg.pinv(own, hermitian=True) @ hessian[L:, :L, c]
        gram = gram - hessian[:L, L:, c] @ back
        slope = slope - gradient[L:, c] @ back
    return gram, slope
