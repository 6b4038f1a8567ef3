"""Smoothing splines of noisy time courses, for the first screen."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import CubicSpline

from .data import TimeCourses

_CERTAIN = 1e6  # weight of a known initial value beside a measurement


class Smooth:
    """Natural cubic smoothing splines of every observed species in every condition.

    Each minimises Σ_j w_j (y_j - f(t_j))² + λ ∫ f''², λ by generalised cross-validation.

    Reference: Green & Silverman (1994), Nonparametric Regression, sections 2.3 and 3.4.

    Attributes:
        curves: splines by (condition, species), in scaled units.
        variance: of the residuals of each species, [species].
    """

    def __init__(self, courses: TimeCourses):
        self.curves: dict[tuple[int, int], CubicSpline] = {}
        C, _, S = courses.observed.shape
        squares, freedom = np.zeros((2, S))
        for c in range(C):
            for s in range(S):
                t, y, w = _points(courses, c, s)
                if t.size > 3:
                    fitted, used = smoothed(t, y, w)
                    squares[s] += ((y - fitted) ** 2)[w == 1].sum()
                    freedom[s] += max(t.size - used, 1.0)
                    self.curves[c, s] = CubicSpline(t, fitted, bc_type="natural")
                elif t.size > 1:
                    self.curves[c, s] = CubicSpline(t[[0, -1]], y[[0, -1]])
        self.variance = squares / np.maximum(freedom, 1.0)

    def __call__(self, c: int, t: np.ndarray, fallback: np.ndarray) -> np.ndarray:
        """The species of condition c at times t, at least 0; `fallback` where unknown, [t, S]."""
        found = [
            self.curves[c, s](t) if (c, s) in self.curves else np.full(t.shape, x)
            for s, x in enumerate(fallback)
        ]
        return np.maximum(np.stack(found, -1), 0.0)


def _points(courses: TimeCourses, c: int, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, values and weights of one curve, a known initial value as a certain measurement."""
    seen = courses.observed[c, :, s]
    t, first = np.unique(courses.time[c][seen], return_index=True)
    y, w = courses.values[c, seen, s][first], np.ones(t.size)
    if seen.any() and courses.known[c, s]:
        later = t > 0
        t, y = np.append(0.0, t[later]), np.append(courses.initial[c, s], y[later])
        w = np.append(_CERTAIN, w[later])
    return t, y, w


def smoothed(t: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
    """Values at the knots of the smoothing spline through (t, y), and its degrees of freedom."""
    h = np.diff(t)
    n = t.size
    Q, R = np.zeros((n, n - 2)), np.zeros((n - 2, n - 2))
    for j in range(n - 2):
        Q[j : j + 3, j] = 1 / h[j], -1 / h[j] - 1 / h[j + 1], 1 / h[j + 1]
        R[j, j] = (h[j] + h[j + 1]) / 3
        if j:
            R[j, j - 1] = R[j - 1, j] = h[j] / 6
    root = 1 / np.sqrt(w)
    rough = root[:, None] * (Q @ np.linalg.solve(R, Q.T)) * root
    eigenvalues, vectors = np.linalg.eigh(rough)
    eigenvalues = np.maximum(eigenvalues, 0.0)
    projected = vectors.T @ (y / root)
    penalties = np.logspace(-6, 8, 85) / np.median(eigenvalues)
    left = penalties[:, None] * eigenvalues / (1 + penalties[:, None] * eigenvalues)
    score = ((left * projected) ** 2).sum(1) / left.sum(1) ** 2
    kept = 1 - left[score.argmin()]
    return root * (vectors @ (kept * projected)), float(kept.sum())
