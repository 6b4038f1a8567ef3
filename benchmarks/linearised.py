"""A nonlinear mixed model by linearisation, as R's nlme estimates it, in NumPy and SciPy alone.

The alternation of Lindstrom & Bates (1990), of which nlme prints the fixed point (Pinheiro & Bates
2000, section 7.2). Of y_i = f_i(β, η_i) + s ε, η_i ~ N(0, diag(ω²)):

1. penalised nonlinear least squares, β and all η_i together, ω and s held:
   min Σ_i |y_i - f_i(β, η_i)|² + |s η_i / ω|²;
2. the linear mixed model of z_i = y_i - f_i + X_i β + Z_i η_i with X_i = ∂f_i/∂β, Z_i = ∂f_i/∂η_i,
   z_i ~ N(X_i β, s² (I + Z_i diag(r²) Z_iᵀ)), by maximum likelihood: β and s by formula, r = ω/s by
   search. Its likelihood is the one that nlme prints.

This is not the maximum of the likelihood (`benchmarks/quadrature.py`), from which it differs the
more, the less a subject's data say of its η_i. It shares nothing with flowme.
"""

from typing import NamedTuple

import numpy as np
from quadrature import Subject
from scipy import linalg, optimize


class Estimate(NamedTuple):
    """Where the alternation stands."""

    beta: np.ndarray  # β
    omega: np.ndarray  # ω
    s: float
    eta: np.ndarray  # modes, [subject, effect]
    minus_two_ll: float  # of the linear mixed model


def alternate(
    subjects: list[Subject], beta: np.ndarray, omega: np.ndarray, s: float, most: int = 500
) -> Estimate:
    """The fixed point of the alternation, from a first guess.

    Raises:
        RuntimeError: there is none within `most` rounds.
    """
    now = Estimate(beta, omega, s, np.zeros((len(subjects), len(omega))), np.inf)
    for _ in range(most):
        new = mixed(subjects, least_squares(subjects, now))
        moved = np.concatenate([new.beta / now.beta, new.omega / now.omega, [new.s / now.s]]) - 1
        if np.max(np.abs(moved)) < 1e-6:
            return new
        now = new
    raise RuntimeError(f"expected the alternation to settle in {most} rounds; got {now}.")


def least_squares(subjects: list[Subject], now: Estimate) -> Estimate:
    """β and the modes of all η_i, given ω and s."""
    p, (n, d) = len(now.beta), now.eta.shape
    weight = now.s / now.omega

    def residual(x):
        beta, eta = x[:p], x[p:].reshape(n, d)
        misses = [a.y - a.f(beta, e[None])[0] for a, e in zip(subjects, eta, strict=True)]
        return np.concatenate([*misses, (weight * eta).ravel()])

    def slope(x):
        beta, eta = x[:p], x[p:].reshape(n, d)
        X, Z = zip(*(slopes(a, beta, e) for a, e in zip(subjects, eta, strict=True)), strict=True)
        data = np.hstack([np.concatenate(X), linalg.block_diag(*Z)])
        return -np.vstack([data, np.hstack([np.zeros((n * d, p)), -np.diag(np.tile(weight, n))])])

    start = np.concatenate([now.beta, now.eta.ravel()])
    found = optimize.least_squares(residual, start, slope, x_scale="jac", xtol=1e-10, ftol=1e-12)
    return now._replace(beta=found.x[:p], eta=found.x[p:].reshape(n, d))


def mixed(subjects: list[Subject], at: Estimate) -> Estimate:
    """The linear mixed model around β and η_i: its maximum likelihood."""
    parts = []
    for a, eta in zip(subjects, at.eta, strict=True):
        X, Z = slopes(a, at.beta, eta)
        parts.append((a.y - a.f(at.beta, eta[None])[0] + X @ at.beta + Z @ eta, X, Z))
    count = sum(len(a.y) for a in subjects)

    def profile(log_r):
        """-2LL at r with β and s at their best, β and s."""
        rows, log_det = [], 0.0
        for z, X, Z in parts:
            L = np.linalg.cholesky(np.eye(len(z)) + (Z * np.exp(2 * log_r)) @ Z.T)
            rows.append(linalg.solve_triangular(L, np.column_stack([X, z]), lower=True))
            log_det += 2 * np.log(np.diag(L)).sum()
        whole = np.concatenate(rows)
        beta = np.linalg.lstsq(whole[:, :-1], whole[:, -1])[0]
        variance = np.mean((whole[:, -1] - whole[:, :-1] @ beta) ** 2)
        return count * (np.log(2 * np.pi * variance) + 1) + log_det, beta, np.sqrt(variance)

    start = np.log(at.omega / at.s)
    log_r = optimize.minimize(lambda x: profile(x)[0], start, options={"gtol": 1e-6}).x
    minus_two_ll, beta, s = profile(log_r)
    return at._replace(beta=beta, omega=np.exp(log_r) * s, s=s, minus_two_ll=minus_two_ll)


def slopes(subject: Subject, beta: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """∂f/∂β `[time, parameter]` and ∂f/∂η `[time, effect]`, by central differences."""
    h = 1e-5 * np.maximum(1.0, np.abs(beta))
    steps = np.diag(h)
    up, down = ([subject.f(beta + sign * x, eta[None])[0] for x in steps] for sign in (1, -1))
    X = (np.array(up) - np.array(down)).T / (2 * h)
    move = 1e-5 * np.eye(len(eta))
    Z = (subject.f(beta, eta + move) - subject.f(beta, eta - move)).T / 2e-5
    return X, Z
