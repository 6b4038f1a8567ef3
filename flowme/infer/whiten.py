"""The coordinates of `flowme.infer.coordinates`, from a fit."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.handlers import seed, trace

from flowme.infer.coordinates import Coordinates, Map, by_site, frame, has_base, inner, times
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.quick import soon
from flowme.study import Study


def whiten(coordinates: Coordinates, fit: Fit, study: Study) -> Map:
    """The numbers of the coordinates: two small programs, kept for fits of the same model."""
    joint = coordinates.joint
    weights = {**start_weights(joint), **{k: jnp.asarray(w) for k, w in fit.weights.items()}}
    theta, scale = posterior_gaussian(joint, fit, study)
    mean, tril = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), fit.conditional)
    parts = _expand(coordinates, fit.theta, weights, mean, tril, study)
    gradient, cross = _derivatives(coordinates, fit.theta, scale, weights, mean, study)
    gradient = gradient + cross @ jnp.linalg.solve(scale, theta - fit.theta)
    information, offset, slope = parts
    found = Map(theta, scale, weights, mean, information, gradient, cross, offset, slope)
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), found)


def posterior_gaussian(joint: Joint, fit: Fit, study: Study) -> tuple[jax.Array, jax.Array]:
    """N(θ₀, S Sᵀ) near the posterior of θ: the fit's Gaussian times that of the prior's moments,

        S Sᵀ = (I(θ̂) + D)⁻¹,    θ₀ = θ̂ + S Sᵀ D (m - θ̂),    D = diag(1/prior variances).

    Where the fit knows nothing (an Ω that degenerates) this is the prior. I(θ̂) is the observed
    information, its negative eigenvalues taken for 0; unknown, it is taken for 100 D.

    Returns:
        θ₀ `[parameter]` and S `[parameter, parameter]`.
    """
    mean, variance = map(np.asarray, _prior_moments(joint, study))
    prior = np.diag(1 / variance)
    information = 100 * prior
    if fit.information is not None and np.all(np.isfinite(fit.information)):
        information = np.asarray(_positive(jnp.asarray(fit.information)))
    scale = np.linalg.inv(np.linalg.cholesky(information + prior)).T
    theta = np.asarray(fit.theta)
    return jnp.asarray(theta + scale @ scale.T @ prior @ (mean - theta)), jnp.asarray(scale)


@partial(soon, static_argnums=0)
def _prior_moments(joint: Joint, study: Study) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each element of θ under the prior, `[parameter]`, from 1000 draws."""
    sites = trace(seed(joint.model, jax.random.key(0))).get_trace(study)
    moments = [jnp.zeros((2, 0))]
    for name, site in joint.roles.population.items():
        to = biject_to(site.support)
        try:
            draws = to.inv(sites[name]["fn"].sample(jax.random.key(0), (1000,))).reshape(1000, -1)
            moments.append(jnp.stack([draws.mean(0), draws.var(0)]))
        except NotImplementedError:  # an improper prior
            start = to.inv(site.init).reshape(-1)
            moments.append(jnp.stack([start, jnp.full(start.shape, 1e4)]))
    mean, variance = jnp.concatenate(moments, 1)
    return mean, jnp.maximum(variance, 1e-12)


@partial(soon, static_argnums=0)
def _expand(coordinates: Coordinates, theta, weights, mean, tril, study):
    """I_i, and b_i, S_i with η ≈ μ + L (b_i + S_i u) around m̂_i."""
    joint = coordinates.joint
    laws = joint.laws(theta, weights, study)
    location, L = frame(joint, laws)
    inverse, precision = jnp.linalg.inv(L), jnp.linalg.inv(tril)
    prior = jnp.swapaxes(inverse, -1, -2) @ inverse
    information = _positive(jnp.swapaxes(precision, -1, -2) @ precision - prior)
    whitened = times(inverse, mean - location)
    offset = jnp.zeros(mean.shape)
    slope = jnp.broadcast_to(jnp.eye(mean.shape[-1]), tril.shape)
    for name, law, where in by_site(joint, laws):
        if has_base(joint, name):
            u = inner(law).to_base(mean[:, where])
            jacobian = _jacobian(inner(law).from_base, u)
            bent = inverse[..., where, where] @ jacobian
            offset = offset.at[:, where].set(whitened[:, where] - times(bent, u))
            slope = slope.at[:, where, where].set(bent)
    return information, offset, slope


def _jacobian(function, u: jax.Array) -> jax.Array:
    """∂ function(u)_i / ∂u_i of every subject, `[subject, effect, effect]`."""
    basis = jnp.eye(u.shape[-1])
    push = jax.vmap(lambda v: jax.jvp(function, (u,), (jnp.broadcast_to(v, u.shape),))[1])
    return jnp.moveaxis(push(basis), 0, -1)


@partial(soon, static_argnums=0)
def _derivatives(coordinates: Coordinates, theta, scale, weights, mean, study):
    """g_i = ∂ log p(y_i | η; θ)/∂η at m̂_i and θ̂, and G_i S by differences over ±1/2 of an SD."""
    joint = coordinates.joint

    def slope(theta):
        def total(eta):
            return jnp.sum(joint.likelihood(joint.constrain(theta), weights, eta, study))

        return jax.grad(total)(mean)

    steps = 0.5 * scale.T
    slopes = jax.lax.map(slope, jnp.concatenate([theta[None], theta + steps, theta - steps]))
    up, down = jnp.split(slopes[1:], 2)
    return slopes[0], jnp.moveaxis(up - down, 0, -1)


def _positive(matrix: jax.Array) -> jax.Array:
    """Symmetric matrices with their negative eigenvalues set to 0, and 0 where not finite."""
    matrix = jnp.where(jnp.isfinite(matrix), matrix, 0.0)
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + jnp.swapaxes(matrix, -1, -2)))
    return (vectors * jnp.maximum(values, 0.0)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
