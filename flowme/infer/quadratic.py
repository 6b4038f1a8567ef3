"""The density of Gaussian random effects as a linear function of their first two moments.

With W = Ω^(-1/2) at θ₀, u = W η and T(u) = (1, u_j, u_j u_k for j <= k),

    log p(η; θ) = q(θ)ᵀ T(u),

so that its mean over any nodes, and the derivatives of that by θ, need the means of T and the
derivatives of q alone: those of one vector, for all subjects and nodes together. Near θ₀ the
precision of u is the identity, however near to singular Ω is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.joint import Joint
from flowme.infer.references import References
from flowme.quick import quick


@partial(quick, static_argnums=0)
def quadratic_form(
    static: tuple[Joint, References], theta, weights, study
) -> tuple[jax.Array, tuple[Any, ...]]:
    """W, and q with its first and second derivatives by the part `of_density` of θ,
    `[feature, ...]`; nodes move with referenced parameters, so that η counts from their shift."""
    joint, references = static
    own = references.of_density(joint)

    def root(theta):
        laws = [getattr(law, "base_dist", law) for law in joint.laws(theta, weights, study)]
        return jax.scipy.linalg.block_diag(*[law.scale_tril for law in laws])

    tril = root(theta)
    solve = partial(jax.scipy.linalg.solve_triangular, lower=True)
    d = len(tril)
    j, k = np.triu_indices(d)

    def quadratic(part):
        moved = theta.at[own].set(part)
        now = root(moved)
        inverse = solve(solve(tril, now), jnp.eye(d))
        precision = inverse.T @ inverse
        shift = solve(tril, jnp.asarray(references.matrix(joint)) @ (moved - theta))
        pull = precision @ shift
        log_scale = jnp.sum(jnp.log(jnp.diagonal(now))) + 0.5 * d * math.log(2 * math.pi)
        top = -0.5 * shift @ pull - log_scale
        bent = -precision[j, k] * np.where(j == k, 0.5, 1.0)
        return jnp.concatenate([top[None], pull, bent])

    return solve(tril, jnp.eye(d)), second_order(quadratic, theta[own])


def features(z: jax.Array) -> jax.Array:
    """T(z) = (1, z_j, z_j z_k for j <= k), `[node, feature]`."""
    j, k = np.triu_indices(z.shape[1])
    return jnp.concatenate([jnp.ones((len(z), 1)), z, z[:, j] * z[:, k]], 1)


def in_z(mean: jax.Array, tril: jax.Array) -> jax.Array:
    """A_i with T(m_i + L_i z) = A_iᵀ T(z), `[subject, feature, feature]`."""
    subjects, d = mean.shape
    j, k = np.triu_indices(d)
    left, right = jnp.swapaxes(tril[:, j], 1, 2), jnp.swapaxes(tril[:, k], 1, 2)
    once = np.where(j == k, 0.5, 1.0)[:, None]
    square = (left[:, j] * right[:, k] + left[:, k] * right[:, j]) * once
    cross = mean[:, None, j] * right + mean[:, None, k] * left
    one, none = jnp.ones((subjects, 1, 1)), jnp.zeros((subjects, d + len(j), 1))
    high = jnp.concatenate([mean, mean[:, j] * mean[:, k]], 1)[:, None]
    linear = jnp.concatenate([jnp.swapaxes(tril, 1, 2), jnp.zeros((subjects, len(j), d))], 1)
    rest = jnp.concatenate([linear, jnp.concatenate([cross, square], 1)], 2)
    return jnp.block([[one, high], [none, rest]])


def second_order(function, x):
    """Value, gradient and Hessian (last axes) of an array function, all in forward mode."""
    if not x.size:
        value = function(x)
        return value, jnp.zeros((*value.shape, 0)), jnp.zeros((*value.shape, 0, 0))

    def first(x):
        value, slope = jax.jacfwd(lambda x: (function(x),) * 2, has_aux=True)(x)[::-1]
        return slope, (value, slope)

    hessian, (value, slope) = jax.jacfwd(first, has_aux=True)(x)
    return value, slope, hessian
