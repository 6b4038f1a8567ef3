"""The quantile function of a Gaussian mixture as a bijector: the marginal layer of a flow.

Per coordinate, with F(u) = Σ_k π_k Φ((u - μ_k) / σ_k),

    u = F⁻¹(Φ(z)),    z = Φ⁻¹(F(u)),    log |dz/du| = log f(u) - log φ(z).

A one-dimensional law with several modes, skew or heavy tails takes few weights (mixtures of
logistic laws in Ho et al. 2019, arXiv 1902.00275; of Gaussians in Meng et al. 2020,
arXiv 2003.01941). The mixture is standardised, Σ π μ = 0 and Σ π (σ² + μ²) = 1, and the identity
when all its components are equal.
"""

from __future__ import annotations

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc, logsumexp, ndtri
from scipy.cluster.vq import kmeans2

_GRID = 257  # points of the table that a quantile is first read off
_WIDE = 12.0  # of that table, in standard deviations


class MixtureQuantile(distrax.Bijector):
    """u = F⁻¹(Φ(z)) in each coordinate.

    Args:
        weights: log π_k (up to a constant), location and log scale of every component,
            `[dim, 3, component]`.
    """

    def __init__(self, weights: jax.Array):
        super().__init__(event_ndims_in=1)
        logits, loc, log_scale = jnp.moveaxis(weights, -2, 0)
        log_share = jax.nn.log_softmax(logits, axis=-1)
        share, scale = jnp.exp(log_share), jnp.exp(log_scale)
        loc = loc - jnp.sum(share * loc, -1, keepdims=True)
        spread = jnp.sqrt(jnp.sum(share * (scale**2 + loc**2), -1, keepdims=True))
        self._mixture = log_share, loc / spread, scale / spread  # each [dim, component]

    def inverse_and_log_det(self, y):
        return _inverse(self._mixture, y)

    def forward_and_log_det(self, x):
        # Read off a table, then by Newton steps: the last one carries the derivatives.
        z, mixture = jax.lax.stop_gradient((x, self._mixture))
        grid = jnp.linspace(-_WIDE, _WIDE, _GRID)
        table, _ = _inverse(mixture, jnp.broadcast_to(grid[:, None], (_GRID, x.shape[-1])))
        read = jax.vmap(lambda z, t: jnp.interp(z, t, grid), in_axes=1, out_axes=1)
        u = read(z.reshape(-1, x.shape[-1]), table).reshape(x.shape)
        u = jax.lax.fori_loop(0, 4, lambda _, u: _newton(mixture, u, z), u)
        u = _newton(self._mixture, u, x)
        return u, -_inverse(self._mixture, u)[1]


def _inverse(mixture, u):
    """z = Φ⁻¹(F(u)) and log |dz/du|, summed over coordinates."""
    log_share, loc, scale = mixture
    x = (u[..., None] - loc) / scale
    share = 0.5 * jnp.exp(log_share)
    below, above = (jnp.sum(share * erfc(s * x / np.sqrt(2)), -1) for s in (-1, 1))
    # From the tail that is the smaller: 1 - 1e-17 is 1.
    tail = jnp.maximum(jnp.minimum(below, above), jnp.finfo(x.dtype).tiny)
    z = jnp.where(below < above, 1.0, -1.0) * ndtri(tail)
    normal = -0.5 * (x**2 + jnp.log(2 * jnp.pi)) - jnp.log(scale)
    density = logsumexp(log_share + normal, axis=-1)
    return z, jnp.sum(density + 0.5 * (z**2 + jnp.log(2 * jnp.pi)), -1)


def _newton(mixture, u, z):
    """One step towards Φ⁻¹(F(u)) = z."""
    at, slope = jax.jvp(lambda v: _inverse(mixture, v)[0], (u,), (jnp.ones_like(u),))
    return u - (at - z) / jax.lax.stop_gradient(slope)


def fit_marginals(z: np.ndarray, components: int, subjects: int) -> np.ndarray:
    """Starting weights `[dim, 3, component]` from draws `z` `[draw, dim]` of `subjects` subjects:
    per coordinate a mixture by EM, or the Gaussian where BIC asks for no more."""
    weights = np.zeros((z.shape[1], 3, components))
    for j, x in enumerate(((z - z.mean(0)) / z.std(0)).T):
        share, loc, scale, mean_log = _em(x, components)
        gaussian = -0.5 * (1 + np.log(2 * np.pi))
        if 2 * subjects * (mean_log - gaussian) > (3 * components - 3) * np.log(subjects):
            weights[j] = np.log(share), loc, np.log(scale)
    return weights


def _em(x: np.ndarray, components: int, rounds: int = 100):
    """A Gaussian mixture by EM from k-means: shares, locations, scales, mean log density."""
    _, label = kmeans2(x, components, minit="++", seed=0)
    r = np.eye(components)[label] + 0.01
    r /= r.sum(1, keepdims=True)
    for _ in range(rounds):
        share = r.mean(0)
        loc = (r * x[:, None]).sum(0) / r.sum(0)
        scale = np.sqrt((r * (x[:, None] - loc) ** 2).sum(0) / r.sum(0) + 0.05**2)
        log_p = np.log(share) - 0.5 * ((x[:, None] - loc) / scale) ** 2 - np.log(scale)
        log_p -= 0.5 * np.log(2 * np.pi)
        total = np.logaddexp.reduce(log_p, axis=1)
        r = np.exp(log_p - total[:, None])
    return share, loc, scale, total.mean()
