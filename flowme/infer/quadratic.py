"""The density of Gaussian random effects as a linear function of their first two moments.

With W = Ω^(-1/2) at θ₀, u = W η and T(u) = (1, u_j, u_j u_k for j <= k),

    log p(η; θ) = q(θ)ᵀ T(u),

so that its mean over any nodes, and the derivatives of that by θ, need the means of T and the
derivatives of q alone: those of one vector, for all subjects and nodes together. Near θ₀ the
precision of u is the identity, however near to singular Ω is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular

from flowme.infer.joint import Joint
from flowme.infer.references import References
from flowme.quick import quick


def quadratic_form(
    of: tuple[Joint, References], theta, weights, study
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """W, and q with its first and second derivatives by the part `of_density` of θ,
    `[feature, ...]`; nodes move with referenced parameters, so that η counts from their shift.

    With L the lower triangular root of Ω, M = L(θ₀)⁻¹ L(θ) and s = L(θ₀)⁻¹ (shift), the precision
    of u is P = M⁻ᵀ M⁻¹ and q = (-sᵀPs/2 - log |L| - (d/2) log 2π, P s, -P_jk (half for j = k)),
    at θ₀ with M = I and s = 0.
    """
    joint, references = of
    own = references.of_density(joint)
    L, L1, L2 = map(np.asarray, _root(of, theta, weights, study))
    d = len(L)
    W = np.full(L.shape, np.nan)
    if np.all(np.diagonal(L) != 0):
        W = solve_triangular(L, np.eye(d), lower=True, check_finite=False)
    M1, M2 = (np.moveaxis(np.tensordot(W, x, 1), (0, 1), (-2, -1)) for x in (L1, L2))
    s1 = (W @ references.matrix(joint)[:, own]).T
    both = np.einsum("ade,bef->abdf", M1, M1)
    inverse = both + np.swapaxes(both, 0, 1) - M2  # second derivatives of M⁻¹; the first are -M1
    cross = np.einsum("aed,bef->abdf", M1, M1)
    P1 = -M1 - np.swapaxes(M1, 1, 2)
    P2 = inverse + np.swapaxes(inverse, 2, 3) + cross + np.swapaxes(cross, 0, 1)
    diagonal = np.diagonal(M1, axis1=1, axis2=2)
    log_det1, log_det2 = diagonal.sum(1), np.trace(M2, axis1=2, axis2=3) - diagonal @ diagonal.T
    j, k = np.triu_indices(d)
    half = np.where(j == k, 0.5, 1.0)
    pull = np.einsum("ade,be->abd", P1, s1)
    top = -np.sum(np.log(np.abs(np.diagonal(L)))) - 0.5 * d * math.log(2 * math.pi)
    q = np.concatenate([[top], np.zeros(d), -half * np.eye(d)[j, k]])
    q1 = np.concatenate([-log_det1[:, None], s1, -half * P1[:, j, k]], 1)
    top2 = -(s1 @ s1.T) - log_det2
    bent = -half * P2[..., j, k]
    q2 = np.concatenate([top2[..., None], pull + np.swapaxes(pull, 0, 1), bent], 2)
    return W, (q, q1.T, np.moveaxis(q2, 2, 0))


@partial(quick, static_argnums=0)
def _root(of: tuple[Joint, References], theta, weights, study):
    """The lower triangular root of Ω with its derivatives by the part `of_density` of θ."""
    joint, references = of
    names, theta = references.density_sites(joint), jnp.asarray(theta)
    held = joint.constrain(theta)

    def root(part):
        now = joint.laws_at({**held, **joint.constrain(part, names)}, weights, study)
        laws = [getattr(law, "base_dist", law) for law in now]
        return jax.scipy.linalg.block_diag(*[law.scale_tril for law in laws])

    return second_order(root, theta[references.of_density(joint)])


def features(z: jax.Array) -> jax.Array:
    """T(z) = (1, z_j, z_j z_k for j <= k), `[node, feature]`."""
    j, k = np.triu_indices(z.shape[1])
    return jnp.concatenate([jnp.ones((len(z), 1)), z, z[:, j] * z[:, k]], 1)


def in_z(mean: jax.Array, tril: jax.Array) -> jax.Array:
    """A_i with T(m_i + L_i z) = A_iᵀ T(z), `[subject, feature, feature]`.

    T are the products j <= k of (1, u) = B (1, z), and those are sums of products of (1, z).
    """
    subjects, d = mean.shape
    one = jnp.broadcast_to(jnp.eye(1, 1 + d), (subjects, 1, 1 + d))
    B = jnp.concatenate([one, jnp.concatenate([mean[:, :, None], tril], 2)], 1)
    products = B[:, :, None, :, None] * B[:, None, :, None, :]
    j, k = np.triu_indices(1 + d)
    once, both = np.zeros((2, (1 + d) ** 2, len(j)))
    once[(1 + d) * j + k, np.arange(len(j))] = 1.0
    both[(1 + d) * j + k, np.arange(len(j))] = both[(1 + d) * k + j, np.arange(len(j))] = 1.0
    products = products.reshape(subjects, len(once), len(both))
    return jnp.einsum("sxy,xu,yz->szu", products, once, both, precision="highest")


def second_order(function: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value, gradient and Hessian (last axes) of an array function, all in forward mode."""
    size = x.size
    if not size:
        value = function(x)
        return value, jnp.zeros((*value.shape, 0)), jnp.zeros((*value.shape, 0, 0))

    def along(u, v):
        def slope(x):
            return jax.jvp(function, (x,), (u,))

        (value, first), (_, second) = jax.jvp(slope, (x,), (v,))
        return value, first, second

    if size == 1:  # as most often: that of an error
        value, first, second = along(jnp.ones(1), jnp.ones(1))
        return value, first[..., None], second[..., None, None]
    j, k = np.triu_indices(size)
    pairs = jax.vmap(along, out_axes=(None, -1, -1))
    value, first, second = pairs(*(jax.nn.one_hot(i, size, dtype=x.dtype) for i in (j, k)))
    place = np.zeros((size, size), int)
    place[j, k] = place[k, j] = np.arange(len(j))
    return value, first[..., np.diagonal(place)], second[..., place]
