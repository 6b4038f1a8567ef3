"""-2LL of a nonlinear mixed model by adaptive Gauss-Hermite quadrature, in NumPy and SciPy alone.

It shares nothing with flowme, so that one can judge the other. For each subject

    p(y_i) = ∫ N(y_i; f_i(β, η), s²) N(η; 0, diag(ω²)) dη,

the integrand is centred at its mode, found by least squares, and scaled by the curvature there.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import optimize, special


class Subject(NamedTuple):
    """What was measured, and the prediction `f(beta, eta)`: [node, effect] -> [node, time]."""

    y: np.ndarray
    f: Callable[[np.ndarray, np.ndarray], np.ndarray]


class Quadrature:
    """-2LL of theta = (β, log ω, log s). Modes are kept, to begin from the next time.

    Args:
        subjects: the subjects.
        size: how many β.
        effects: how many η.
        points: quadrature points in each direction.
    """

    def __init__(self, subjects: list[Subject], size: int, effects: int, points: int):
        self.subjects, self.size, self.effects = subjects, size, effects
        self.modes = np.zeros((len(subjects), effects))
        x, w = np.polynomial.hermite_e.hermegauss(points)
        self.nodes = np.array(list(product(x, repeat=effects)))
        self.log_weights = np.log(list(product(w, repeat=effects))).sum(1)

    def __call__(self, theta: np.ndarray) -> float:
        beta, omega = theta[: self.size], np.exp(theta[self.size : -1])
        return sum(
            self._one(i, subject, beta, omega, np.exp(theta[-1]))
            for i, subject in enumerate(self.subjects)
        )

    def _one(
        self, i: int, subject: Subject, beta: np.ndarray, omega: np.ndarray, s: float
    ) -> float:
        def residual(u: np.ndarray) -> np.ndarray:  # η = ω u
            return np.concatenate([(subject.y - subject.f(beta, (omega * u)[None])[0]) / s, u])

        found = optimize.least_squares(residual, self.modes[i], xtol=1e-10, ftol=1e-12)
        self.modes[i] = found.x
        scale = np.linalg.cholesky(np.linalg.inv(found.jac.T @ found.jac))
        u = found.x + self.nodes @ scale.T
        squares = ((subject.y - subject.f(beta, omega * u)) / s) ** 2
        joint = -0.5 * (squares.sum(1) + (u**2).sum(1) - (self.nodes**2).sum(1)) + self.log_weights
        integral = special.logsumexp(joint) + np.log(np.diag(scale)).sum()
        integral -= self.effects * np.log(2 * np.pi) / 2
        return -2 * (integral - len(subject.y) * (np.log(s) + np.log(2 * np.pi) / 2))

    def minimum(self, theta: np.ndarray) -> tuple[np.ndarray, float]:
        """The maximum likelihood estimate from a first guess, and its -2LL."""
        options = {"gtol": 1e-3, "eps": 1e-4}  # the modes are good to about 1e-8
        found = optimize.minimize(self, theta, method="BFGS", options=options)
        return found.x, float(found.fun)
