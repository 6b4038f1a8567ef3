"""The semi-nonparametric law of random effects: a Gaussian times a squared polynomial.

Gallant & Nychka (1987, Econometrica 55, 363), for mixed-effects models Davidian & Gallant (1993,
Biometrika 80, 475). With the Hermite polynomials h_n = He_n / √n!, orthonormal under the normal
density φ,

    p(z) = P(z)² φ(z),   P(z) = Σ_α a_α Π_j h_{α_j}(z_j),   |α| = Σ_j α_j ≤ K,   Σ_α a_α² = 1,

the density integrates to one by itself, and its moments follow from z h_n = √(n+1) h_{n+1} +
√n h_{n-1} without any integral.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from scipy.optimize import minimize

from flowme.effects import Scaled

_FAR = 14.0  # no mass beyond: φ(14) · 14¹⁶ is 1e-25
_TINY = 1e-30  # beside P², so that its logarithm has a gradient at a zero of P


class SemiNonparametricRandomEffect(Scaled):
    r"""η = L R⁻¹ (z - c), z with density P(z)² φ(z), c = E z, R Rᵀ = Cov z.

    Centred by formula, whatever the coefficients: E η = 0 and Cov η = L Lᵀ, L = diag(ω) ·
    Cholesky(correlation). Coefficients are learned as a / a₀ without the leading 1, `[term]`, so
    that 0 is the Gaussian. The degree K is the smoothing parameter: 0 is the Gaussian, 1 or 2
    suffice for skewness or two modes, more are prone to spurious ones. With q effects there are
    (K + q)! / K! q! - 1 coefficients: choose K by BIC or on held-out subjects.

    Args:
        names: names of the effects, in order.
        degree: K, the total degree of P.
        full: learn the correlation matrix; by default Cov η is diagonal.
        omega: starting standard deviations ω, a number or `[effect]`, in the unit of η.
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
    """

    pytree_data_fields = ("coefficients",)
    pytree_aux_fields = ("degree",)

    def __init__(
        self,
        names: Sequence[str],
        degree: int = 2,
        *,
        full: bool = False,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
    ):
        if not isinstance(degree, int) or not 0 <= degree <= 8:
            raise ValueError(f"expected a degree from 0 to 8, a whole number; got {degree!r}.")
        super().__init__(names, full=full, omega=omega, omega_prior=omega_prior)
        self.degree = degree
        # Off 0: where the polynomial is constant, the second-degree terms have no gradient.
        self.coefficients = np.full(len(_powers(len(self.names), degree)) - 1, 0.1)

    def priors(self):
        if not self.degree:
            return super().priors()
        count = len(_powers(len(self.names), self.degree)) - 1
        return {**super().priors(), "coefficients": dist.Normal(0, 1).expand([count]).to_event(1)}

    def start(self, key, covariance, eta, subjects):
        """The best of several climbs of the density of the draws, their moments held."""
        values = super().start(key, covariance, eta, subjects)
        if not self.degree:
            return values
        draws = jnp.asarray(eta - np.mean(eta, 0))[:: max(1, len(eta) // 1000)]
        law = self.with_parameters(**values)

        def loss(coefficients):
            held_back = 0.5 * jnp.sum(coefficients**2) / 100  # keeps a₀ off 0
            density = law.with_parameters(coefficients=coefficients).log_prob(draws)
            return held_back - jnp.mean(density)

        program = jax.jit(jax.value_and_grad(loss))
        starts = 0.7 * jax.random.normal(key, (12, *np.shape(self.coefficients)))
        found = [
            minimize(lambda x: tuple(map(np.asarray, program(x))), x, jac=True) for x in starts
        ]
        best = min(found, key=lambda r: r.fun if np.isfinite(r.fun) else np.inf)
        return {**values, "coefficients": best.x}

    def _tensor(self):
        """The coefficients a_α, with Σ a² = 1, `[degree + 1] * effect`; 0 where |α| > K."""
        size = len(self.names)
        powers = _powers(size, self.degree)
        a = jnp.concatenate([jnp.ones(1), jnp.asarray(self.coefficients)])
        a = a / jnp.sqrt(jnp.sum(a**2))
        return jnp.zeros((self.degree + 1,) * size).at[tuple(powers.T)].set(a)

    def _moments(self):
        """c = E z and R with R Rᵀ = Cov z: P z_j has coefficients A_j, E z_j z_k = ⟨A_j, A_k⟩."""
        size, a = len(self.names), self._tensor()
        up = _times_z(self.degree)
        wide = jnp.pad(a, [(0, 1)] * size)
        moved = [
            jnp.moveaxis(jnp.tensordot(up, jnp.moveaxis(wide, j, 0), 1), 0, j) for j in range(size)
        ]
        by_z = jnp.stack([m.reshape(-1) for m in moved])
        c = by_z @ wide.reshape(-1)
        return c, jnp.linalg.cholesky(by_z @ by_z.T - jnp.outer(c, c))

    def log_prob(self, value):
        c, R = self._moments()
        z = c + self._whiten(value) @ R.T
        h = _hermite(z, self.degree)  # [..., effect, n]
        polynomial = self._tensor()
        for j in reversed(range(len(self.names))):
            polynomial = jnp.sum(polynomial * _spread(h[..., j, :], j), -1)
        normal = -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1)
        jacobian = jnp.sum(jnp.log(jnp.diagonal(R))) - self._log_det()
        return jnp.log(polynomial**2 + _TINY) + normal + jacobian

    def sample(self, key, sample_shape=()):
        """One coordinate after another, each by the inverse of its conditional distribution
        function: ∫₋∞ˣ h_l φ = -h_{l-1}(x) φ(x) / √l."""
        size, count = len(self.names), self.degree + 1
        uniform = jax.random.uniform(key, (*sample_shape, size))
        tensor = jnp.broadcast_to(self._tensor(), (*sample_shape, *(count,) * size))
        z = []
        for j in range(size):
            rest = tensor.reshape(*sample_shape, count, -1)
            gram = jnp.einsum("...mr,...nr->...mn", rest, rest)
            series = jnp.einsum("...mn,mnl->...l", gram, _products(self.degree))
            z.append(_quantile(series / series[..., :1], uniform[..., j]))
            rest = jnp.einsum("...n,...nr->...r", _hermite(z[-1], self.degree), rest)
            tensor = rest.reshape(*sample_shape, *(count,) * (size - j - 1))
        c, R = self._moments()
        inverse = jax.scipy.linalg.solve_triangular(R, jnp.eye(size), lower=True)
        return (jnp.stack(z, -1) - c) @ (self.scale_tril @ inverse).T

    @property
    def covariance_matrix(self):
        return self.scale_tril @ self.scale_tril.T


def _spread(h: jax.Array, axes: int) -> jax.Array:
    """h `[..., n]` as `[..., 1 (axes times), n]`."""
    return h.reshape(*h.shape[:-1], *(1,) * axes, h.shape[-1])


def _hermite(x: jax.Array, degree: int) -> jax.Array:
    """h_0(x), ..., h_K(x), `[..., n]`."""
    h = [jnp.ones_like(x), x]
    for n in range(1, degree):
        h.append((x * h[n] - n**0.5 * h[n - 1]) / (n + 1) ** 0.5)
    return jnp.stack(h[: degree + 1], -1)


def _quantile(series: jax.Array, u: jax.Array) -> jax.Array:
    """x with F(x) = u, by bisection; the density is Σ_l q_l h_l φ with q_0 = 1."""
    degree = series.shape[-1] - 1
    root = np.sqrt(np.arange(1, degree + 1))

    def distribution(x):
        tail = jnp.sum(series[..., 1:] / root * _hermite(x, degree)[..., :-1], -1)
        return jax.scipy.stats.norm.cdf(x) - jax.scipy.stats.norm.pdf(x) * tail

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        below = distribution(middle) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 50, halve, (jnp.full_like(u, -_FAR), jnp.full_like(u, _FAR)))
    return 0.5 * (low + high)


@cache
def _powers(size: int, degree: int) -> np.ndarray:
    """The α with |α| ≤ K, `[term, effect]`, 0 first."""
    box = itertools.product(range(degree + 1), repeat=size)
    return np.array([alpha for alpha in box if sum(alpha) <= degree])


@cache
def _times_z(degree: int) -> np.ndarray:
    """The matrix of h ↦ z h on h_0, ..., h_{K+1}."""
    off = np.sqrt(np.arange(1, degree + 2))
    return np.diag(off, 1) + np.diag(off, -1)


@cache
def _products(degree: int) -> np.ndarray:
    """∫ h_m h_n h_l φ, `[m, n, l]`, l up to 2 K: by a Gauss-Hermite rule that is exact."""
    x, w = np.polynomial.hermite_e.hermegauss(2 * degree + 1)
    h = [np.ones_like(x), x]
    for n in range(1, 2 * degree):
        h.append((x * h[n] - n**0.5 * h[n - 1]) / (n + 1) ** 0.5)
    table = np.stack(h[: 2 * degree + 1])
    low = table[: degree + 1]
    return np.einsum("mx,nx,lx,x->mnl", low, low, table, w / w.sum())
