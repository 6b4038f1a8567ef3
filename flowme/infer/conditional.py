"""Conditional distributions p(η_i | y_i; θ): where each is, and nodes to integrate over it.

`laplace` finds, for every subject at once, the mode m_i and the curvature of

    log p(y_i | η; θ) + log N(η; μ, Ω),

with μ, Ω the moments of the law of the random effects (for a Gaussian law this is the conditional
density itself). `quadrature` and `importance` then place nodes η_ik with log weights log v_ik, so
that for any h

    ∫ h(η) dη ≈ Σ_k v_ik h(η_ik),      p(y_i; θ) ≈ Σ_k v_ik p(y_i | η_ik; θ) p(η_ik; θ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from scipy.stats import qmc

from flowme.infer.joint import Joint, Weights
from flowme.study import Study


class Conditional(NamedTuple):
    """N(mean_i, scale_tril_i scale_trilᵀ_i): a Gaussian around p(η_i | y_i; θ)."""

    mean: jax.Array  # [subject, effect]
    scale_tril: jax.Array  # [subject, effect, effect]


class Nodes(NamedTuple):
    """Nodes η_ik and the logarithms of their weights v_ik."""

    eta: jax.Array  # [node, subject, effect]
    log_weight: jax.Array  # [node, subject]


def laplace(
    likelihood: Callable[[jax.Array], jax.Array],
    prior_mean: jax.Array,
    prior_covariance: jax.Array,
    start: jax.Array | None,
    steps: int,
    subjects: int,
) -> Conditional:
    """Modes and curvatures by damped Newton steps, all subjects at once.

    Args:
        likelihood: η `[subject, effect]` -> log p(y_i | η_i) `[subject]`.
        prior_mean: μ, `[effect]`.
        prior_covariance: Ω, `[effect, effect]`.
        start: where to start, `[subject, effect]`; None: at the best of 64 points of N(μ, Ω), for
            p(y_i | η) may have several modes (ka and CL/V may change places).
        steps: Newton steps.
        subjects: how many.
    """
    size = prior_mean.shape[0]
    precision = jnp.linalg.inv(prior_covariance + 1e-10 * jnp.eye(size))

    def objective(eta):
        residual = eta - prior_mean
        value = likelihood(eta) - 0.5 * jnp.einsum("sd,de,se->s", residual, precision, residual)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    if start is None:
        z = jax.scipy.special.ndtri(jnp.clip(_sobol(size, 64), 1e-3, 1 - 1e-3)).at[0].set(0.0)
        scale = jnp.sqrt(jnp.diagonal(prior_covariance))
        points = prior_mean + scale * jnp.asarray(z)
        scouted = jax.lax.map(
            lambda e: objective(jnp.broadcast_to(e, (subjects, size))), points, batch_size=16
        )
        start = points[jnp.argmax(scouted, axis=0)]

    def newton(eta):
        """Gradient, and the eigendecomposition of minus the Hessian made positive."""

        def gradient(e):
            return jax.grad(lambda x: jnp.sum(likelihood(x)))(e)

        basis = jnp.broadcast_to(jnp.eye(size)[:, None], (size, *eta.shape))
        push = jax.vmap(lambda v: jax.jvp(gradient, (eta,), (v,)), out_axes=(None, 0))
        slope, hessian = push(basis)
        curvature = precision - jnp.transpose(hessian, (1, 2, 0))
        curvature = 0.5 * (curvature + jnp.swapaxes(curvature, 1, 2))
        finite = jnp.all(jnp.isfinite(curvature), (1, 2)) & jnp.all(jnp.isfinite(slope), 1)
        curvature = jnp.where(finite[:, None, None], curvature, precision)
        slope = jnp.where(finite[:, None], slope, 0.0) - (eta - prior_mean) @ precision
        values, vectors = jnp.linalg.eigh(curvature)
        floor = 1e-3 * jnp.linalg.eigvalsh(precision)[0]
        return slope, jnp.maximum(jnp.abs(values), floor), vectors

    fractions = jnp.array([1.0, 0.5, 0.2, 0.05, 0.01, 0.0])

    def step(number, carry):
        eta, *_ = carry
        slope, values, vectors = newton(eta)
        move = jnp.einsum("sde,se->sd", vectors, jnp.einsum("sde,sd->se", vectors, slope) / values)
        # One round more than steps, for the curvature at the last point, in the same program text.
        move = jnp.where(number < steps, move, 0.0)
        tried = eta + fractions[:, None, None] * move
        best = jnp.argmax(jax.vmap(objective)(tried), axis=0)
        eta = jnp.take_along_axis(tried, best[None, :, None], axis=0)[0]
        return eta, values, vectors

    empty = (start, jnp.zeros(start.shape), jnp.zeros((*start.shape, size)))
    mode, values, vectors = jax.lax.fori_loop(0, steps + 1, step, empty)
    return Conditional(mode, vectors / jnp.sqrt(values)[:, None, :])


@cache
def gauss_hermite(size: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes x `[node, size]` and log weights of ∫ h(x) dx with h close to N(0, I).

    The tensor product of Gauss-Hermite rules: log weight = Σ_j log w_j + x_j²/2 for the
    probabilists' rule scaled to the normal density.
    """
    x, w = np.polynomial.hermite_e.hermegauss(order)
    log_w = np.log(w) + 0.5 * x**2
    grid = np.stack(np.meshgrid(*[x] * size, indexing="ij"), -1).reshape(-1, size)
    log_grid = np.sum(np.meshgrid(*[log_w] * size, indexing="ij"), axis=0).reshape(-1)
    return grid, log_grid


def quadrature(conditional: Conditional, order: int) -> Nodes:
    """Adaptive Gauss-Hermite nodes η_ik = m_i + L_i x_k (Pinheiro & Bates 1995)."""
    x, log_w = gauss_hermite(conditional.mean.shape[1], order)
    eta = conditional.mean + jnp.einsum("sde,ke->ksd", conditional.scale_tril, jnp.asarray(x))
    return Nodes(eta, jnp.asarray(log_w)[:, None] + _log_det(conditional.scale_tril))


class Component(NamedTuple):
    """The broad part of an importance proposal: how to draw from it, and its log density."""

    draw: Callable[[jax.Array, int], jax.Array]  # (key, n) -> [n, subject, effect]
    log_density: Callable[[jax.Array], jax.Array]  # [n, subject, effect] -> [n, subject]


def population_law(joint: Joint, theta: jax.Array, weights: Weights, study: Study) -> Component:
    """The law of the random effects itself: no mode of p(η_i | y_i) is then out of reach, and
    importance weights are bounded whatever the tails."""
    values = joint.constrain(theta)
    return Component(
        lambda key, count: joint.sample_effects(key, theta, weights, study, count),
        jax.vmap(lambda eta: joint.terms(values, weights, eta, study)[1]),
    )


def gaussian_law(mean: jax.Array, covariance: jax.Array, subjects: int) -> Component:
    """N(mean, covariance), whose draws move smoothly with its moments."""
    tril = jnp.linalg.cholesky(covariance)
    size = mean.shape[0]

    def draw(key, count):
        return mean + jax.random.normal(key, (count, subjects, size)) @ tril.T

    def log_density(eta):
        z = jnp.linalg.solve(tril, (eta - mean)[..., None])[..., 0]
        return -0.5 * jnp.sum(z**2 + math.log(2 * math.pi), -1) - jnp.linalg.slogdet(tril)[1]

    return Component(draw, log_density)


def importance(
    key: jax.Array,
    conditional: Conditional,
    broad: Component,
    count: int,
    *,
    share: float = 0.2,
    inflate: float = 1.2,
) -> tuple[Nodes, jax.Array]:
    """Randomised quasi-Monte-Carlo nodes of the mixture proposal

        q_i = (1 - share) N(m_i, inflate² C_i) + share · broad.

    Points of the first part are a Sobol sequence shifted at random, for each subject by itself.

    Args:
        key: random key; is consumed.
        conditional: m_i and the factors of C_i.
        broad: the second part.
        count: nodes per subject.

    Returns:
        The nodes, and the log density of `broad` at them, `[node, subject]`.
    """
    mean, tril = conditional.mean, inflate * conditional.scale_tril
    subjects, size = mean.shape
    wide = max(1, round(share * count))
    near = count - wide
    key_shift, key_wide = jax.random.split(key)
    shift = jax.random.uniform(key_shift, (subjects, size))
    points = (jnp.asarray(_sobol(size, near))[:, None] + shift) % 1.0
    tiny = jnp.finfo(points.dtype).eps
    z = jax.scipy.special.ndtri(jnp.clip(points, tiny, 1 - tiny))
    eta = jnp.concatenate([mean + jnp.einsum("sde,kse->ksd", tril, z), broad.draw(key_wide, wide)])
    log_wide = broad.log_density(eta)
    whitened = jnp.linalg.solve(tril, jnp.moveaxis(eta - mean, 0, -1))  # [subject, effect, node]
    log_near = -0.5 * jnp.sum(whitened**2 + math.log(2 * math.pi), 1).T - _log_det(tril)
    log_q = jnp.logaddexp(math.log(near / count) + log_near, math.log(wide / count) + log_wide)
    return Nodes(eta, -log_q - math.log(count)), log_wide


def likelihood_at(
    joint: Joint, theta: jax.Array, weights: Weights, nodes: Nodes, study: Study
) -> jax.Array:
    """log p(y_i | η_ik; θ) at the nodes, `[node, subject]`."""
    values = joint.constrain(theta)
    return jax.vmap(lambda eta: joint.terms(values, weights, eta, study)[0])(nodes.eta)


def without_impossible(nodes: Nodes, likelihood: jax.Array, conditional: Conditional) -> Nodes:
    """The nodes, those at which the likelihood is not finite moved to the mean with weight 0.

    Masking their value alone would leave a NaN in the gradient.
    """
    bad = ~jnp.isfinite(likelihood)
    eta = jnp.where(bad[..., None], conditional.mean, nodes.eta)
    return Nodes(eta, jnp.where(bad, -jnp.inf, nodes.log_weight))


def log_mean(likelihood: jax.Array, effect: jax.Array, log_weight: jax.Array) -> jax.Array:
    """log p(y_i; θ) `[subject]`; nodes at which the model is not finite count as impossible."""
    total = likelihood + effect + log_weight
    return logsumexp(jnp.where(jnp.isnan(total), -jnp.inf, total), axis=0)


@cache
def _sobol(size: int, count: int) -> np.ndarray:
    log2 = max(1, math.ceil(math.log2(count)))
    return qmc.Sobol(size, seed=0).random_base2(log2)[:count]


def _log_det(tril: jax.Array) -> jax.Array:
    """log |det| of each matrix, `[subject]`."""
    return jnp.linalg.slogdet(tril)[1]
