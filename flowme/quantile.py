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
            `[..., dim, 3, component]`; leading axes are those of z before its last.
    """

    def __init__(self, weights: jax.Array):
        super().__init__(event_ndims_in=1)
        logits, loc, log_scale = jnp.moveaxis(weights, -2, 0)
        log_share = jax.nn.log_softmax(logits, axis=-1)
        share, scale = jnp.exp(log_share), jnp.exp(log_scale)
        loc = loc - jnp.sum(share * loc, -1, keepdims=True)
        spread = jnp.sqrt(jnp.sum(share * (scale**2 + loc**2), -1, keepdims=True))
        self._mixture = log_share, loc / spread, scale / spread  # each [..., dim, component]

    def inverse_and_log_det(self, y):
        return _inverse(self._mixture, y)

    def forward_and_log_det(self, x):
        return _forward(self._mixture, x)


@jax.jit
def _inverse(mixture, u):
    """z = Φ⁻¹(F(u)) and log |dz/du|, summed over coordinates."""
    z = _normal_score(mixture, u)
    return z, jnp.sum(_log_slope(mixture, u, z), -1)


@jax.jit
def _forward(mixture, z):
    """u = F⁻¹(Φ(z)) and log |du/dz|, summed over coordinates."""
    # Nearly, then by Newton steps: the last one carries the derivatives.
    to, held = jax.lax.stop_gradient((z, mixture))
    nearly = _between if mixture[0].ndim > 2 else _read
    u = jax.lax.fori_loop(0, 4, lambda _, u: _newton(held, u, to), nearly(held, to))
    u = _newton(mixture, u, z)
    return u, -jnp.sum(_log_slope(mixture, u, z), -1)


def _read(mixture, z):
    """F⁻¹(Φ(z)) off a table: of one mixture for all z."""
    grid = jnp.linspace(-_WIDE, _WIDE, _GRID)
    table = _normal_score(mixture, jnp.broadcast_to(grid[:, None], (_GRID, z.shape[-1])))
    read = jax.vmap(lambda z, t: jnp.interp(z, t, grid), in_axes=1, out_axes=1)
    return read(z.reshape(-1, z.shape[-1]), table).reshape(z.shape)


def _between(mixture, z):
    """F⁻¹(Φ(z)) by halving the interval between the least and the largest of its components'
    quantiles: where every z has a mixture of its own, a table would be of many points for one."""
    _, loc, scale = mixture
    each = loc + scale * z[..., None]

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        above = _normal_score(mixture, middle) > z
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, 10, halve, (each.min(-1), each.max(-1)))
    return 0.5 * (low + high)


def _newton(mixture, u, z):
    """One step towards Φ⁻¹(F(u)) = z."""
    at = _normal_score(mixture, u)
    return u - (at - z) * jnp.exp(-jax.lax.stop_gradient(_log_slope(mixture, u, at)))


def _normal_score(mixture, u):
    """z = Φ⁻¹(F(u))."""
    log_share, loc, scale = mixture
    x = (u[..., None] - loc) / scale
    right = x >= 0
    tail = erfc(jnp.where(right, x, -x) / np.sqrt(2))
    share = 0.5 * jnp.exp(log_share)
    below = jnp.sum(share * jnp.where(right, 2 - tail, tail), -1)
    above = jnp.sum(share * jnp.where(right, tail, 2 - tail), -1)
    # From the tail that is the smaller: 1 - 1e-17 is 1.
    least = jnp.maximum(jnp.minimum(below, above), jnp.finfo(x.dtype).tiny)
    return jnp.where(below < above, 1.0, -1.0) * _ndtri(least)


@jax.custom_jvp
def _ndtri(p):
    """Φ⁻¹, whose derivative 1/φ JAX would take through its rational approximations: correct, but
    minutes of compilation."""
    return ndtri(p)


@_ndtri.defjvp
def _(primals, tangents):
    z = _ndtri(*primals)
    return z, tangents[0] * jnp.sqrt(2 * jnp.pi) * jnp.exp(0.5 * z**2)


def _log_slope(mixture, u, z):
    """log dz/du = log f(u) - log φ(z) in each coordinate."""
    log_share, loc, scale = mixture
    x = (u[..., None] - loc) / scale
    density = logsumexp(log_share - 0.5 * x**2 - jnp.log(scale), axis=-1)
    return density + 0.5 * z**2


def fit_marginals(
    z: np.ndarray, components: int, subjects: int, always: bool = False
) -> np.ndarray:
    """Starting weights `[dim, 3, component]` from draws `z` `[draw, dim]` of `subjects` subjects:
    per coordinate a mixture by EM, or the Gaussian where BIC asks for no more and `always` is not
    asked for."""
    weights = np.zeros((z.shape[1], 3, components))
    for j, x in enumerate(((z - z.mean(0)) / z.std(0)).T):
        share, loc, scale, mean_log = _em(x, components)
        gaussian = -0.5 * (1 + np.log(2 * np.pi))
        price = (3 * components - 3) * np.log(subjects)
        if always or 2 * subjects * (mean_log - gaussian) > price:
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
