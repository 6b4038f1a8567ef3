"""Distributions of random effects: what they have in common, the Gaussian and Student t.

Mixtures are in `flowme.mixture_effect`, normalizing flows in `flowme.flow_effect`.

All are NumPyro distributions over a vector η of named effects, with event shape `[effect]`. What
distinguishes them from others is that they know which of their own parameters a study teaches
(`priors`), so that `flowme.random_effect` can register those at the population level. Any other
NumPyro distribution may take their place; its parameters are then the user's own statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from numpyro.distributions import constraints


class RandomEffect(dist.Distribution):
    """A distribution of random effects η `[effect]` whose parameters are learned from the study.

    To write another one: store each learned parameter under its own name, list those names in
    `pytree_data_fields`, and define `priors` (their laws under full Bayes; the support of each is
    also its constraint under maximum likelihood), `start` (their values from draws of η, which is
    how an estimation begins), `log_prob`, `sample`, `mean` and `covariance_matrix`. Set
    `network = True` when there are `weights`, a flat vector, to be learned by gradient steps.
    """

    support = constraints.real_vector
    arg_constraints: dict[str, Any] = {}
    pytree_aux_fields: tuple[str, ...] = ("names",)
    network = False
    names: tuple[str, ...]

    def __init__(self, names: Sequence[str], batch_shape: tuple[int, ...] = ()):
        self.names = check_names(names)
        super().__init__(batch_shape=batch_shape, event_shape=(len(self.names),))

    def priors(self) -> dict[str, dist.Distribution]:
        """The law of each learned parameter at the population level, by name."""
        raise NotImplementedError

    def with_parameters(self, **values: ArrayLike) -> RandomEffect:
        """The same distribution with other parameter values (those of `priors`, or `weights`)."""
        new = jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(self))
        for name, value in values.items():
            setattr(new, name, value)
        return new

    def start(
        self, key: jax.Array, covariance: np.ndarray, eta: np.ndarray, subjects: int
    ) -> dict[str, Any]:
        """Starting values of the learned parameters, from a fit of the Gaussian model.

        Args:
            key: random key; is consumed.
            covariance: Ω of that fit, `[effect, effect]`.
            eta: draws from its conditional distributions, `[draw, effect]`.
            subjects: how many subjects they are of.
        """
        raise NotImplementedError

    @property
    def covariance_matrix(self) -> jax.Array:
        """Cov(η), `[effect, effect]`."""
        raise NotImplementedError

    @property
    def variance(self):
        return jnp.diagonal(self.covariance_matrix)

    @property
    def mean(self):
        return jnp.zeros(self.event_shape)


class Scaled(RandomEffect):
    """What distributions with one scale matrix share: L = diag(ω) · Cholesky(correlation)."""

    pytree_data_fields: tuple[str, ...] = ("omega", "corr_cholesky", "omega_prior")
    pytree_aux_fields: tuple[str, ...] = ("full",)

    def __init__(self, names, *, full, omega, omega_prior, batch_shape=()):
        names = check_names(names)
        self.full = bool(full) and len(names) > 1
        self.omega = positive("omega", omega, (len(names),))
        self.corr_cholesky = np.eye(len(names))
        self.omega_prior = dist.HalfNormal(1.0) if omega_prior is None else omega_prior
        super().__init__(names, batch_shape)

    def priors(self):
        size = len(self.names)
        laws = {"omega": self.omega_prior.expand([size]).to_event(1)}
        if self.full:
            laws["corr_cholesky"] = dist.LKJCholesky(size, 2.0)
        return laws

    def start(self, key, covariance, eta, subjects):
        values = {"omega": np.sqrt(np.diag(covariance))}
        if self.full:
            values["corr_cholesky"] = corr_cholesky(covariance)
        return values

    @property
    def scale_tril(self) -> jax.Array:
        """L, `[effect, effect]`, lower triangular."""
        return self._tril

    @property
    def _tril(self) -> jax.Array:
        return self.omega[:, None] * self.corr_cholesky

    def _whiten(self, value):
        inverse = jax.scipy.linalg.solve_triangular(
            self._tril, jnp.eye(len(self.names)), lower=True
        )
        return value @ inverse.T

    def _log_det(self):
        return jnp.sum(jnp.log(self.omega)) + jnp.sum(jnp.log(jnp.diagonal(self.corr_cholesky)))


class GaussianRandomEffect(Scaled):
    r"""η ~ N(0, Ω), Ω = diag(ω) R diag(ω).

    Args:
        names: names of the effects, in order.
        full: learn the correlation matrix R; by default Ω is diagonal (R = I).
        omega: starting standard deviations ω, a number or `[effect]`, in the unit of η
            (dimensionless for a lognormal parameter, where .3 is about 30 %).
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        full: bool = False,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
    ):
        super().__init__(names, full=full, omega=omega, omega_prior=omega_prior)

    def from_base(self, z):
        """η = L z of standard normal z `[..., effect]`."""
        return z @ self.scale_tril.T

    def to_base(self, eta):
        """The z of η `[..., effect]`."""
        return self._whiten(eta)

    def sample(self, key, sample_shape=()):
        return self.from_base(jax.random.normal(key, sample_shape + self.event_shape))

    def log_prob(self, value):
        z = self._whiten(value)
        return -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1) - self._log_det()

    @property
    def covariance_matrix(self):
        return self.scale_tril @ self.scale_tril.T


class StudentTRandomEffect(Scaled):
    r"""η ~ t_ν(0, L Lᵀ): heavier tails than the Gaussian; ω is its scale, SD = ω √(ν/(ν-2)).

    Args:
        names: names of the effects, in order.
        full: learn the correlation matrix; by default the scale matrix is diagonal.
        omega: starting scales, a number or `[effect]`, in the unit of η.
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
        df: starting degrees of freedom ν. Its law is 2 + Gamma(2, 0.1), so the variance exists.
    """

    pytree_data_fields: tuple[str, ...] = ("df",)

    def __init__(
        self,
        names: Sequence[str],
        *,
        full: bool = False,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
        df: float = 10.0,
    ):
        if not np.ndim(df) == 0 or not df > 2:
            raise ValueError(f"expected df above 2, so that the variance exists; got {df}.")
        self.df = df
        super().__init__(names, full=full, omega=omega, omega_prior=omega_prior)

    def priors(self):
        shifted = dist.TransformedDistribution(
            dist.Gamma(2.0, 0.1), dist.transforms.AffineTransform(2.0, 1.0, constraints.positive)
        )
        return {**super().priors(), "df": shifted}

    def start(self, key, covariance, eta, subjects):
        values = super().start(key, covariance, eta, subjects)
        df = float(self.df)
        return {**values, "omega": values["omega"] * np.sqrt((df - 2) / df), "df": df}

    def sample(self, key, sample_shape=()):
        return dist.MultivariateStudentT(self.df, 0.0, self.scale_tril).sample(key, sample_shape)

    def log_prob(self, value):
        size, df = len(self.names), self.df
        distance = jnp.sum(self._whiten(value) ** 2, -1)
        constant = (
            gammaln(0.5 * (df + size)) - gammaln(0.5 * df) - 0.5 * size * jnp.log(df * jnp.pi)
        )
        return constant - 0.5 * (df + size) * jnp.log1p(distance / df) - self._log_det()

    @property
    def covariance_matrix(self):
        return self.df / (self.df - 2) * self.scale_tril @ self.scale_tril.T


def corr_cholesky(covariance: np.ndarray) -> np.ndarray:
    sd = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(sd, sd)
    # Kept off the boundary, where the unconstrained parameter would be infinite.
    return np.linalg.cholesky((1 - 1e-4) * correlation + 1e-4 * np.eye(len(sd)))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise TypeError(
            f"expected a list of effect names such as ['ka', 'V'], each a Python name; got "
            f"{names!r}."
        )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected one or more different effect names; got {list(names)}.")
    return tuple(names)


def positive(what: str, value: ArrayLike, shape: tuple[int, ...]) -> Any:
    if isinstance(value, jax.core.Tracer):  # its value is not known before the program runs
        return jnp.broadcast_to(value, shape)
    array = np.asarray(value, float)
    if array.ndim and array.shape != shape or not np.all((array > 0) & np.isfinite(array)):
        raise ValueError(
            f"expected {what} positive, a number or of shape {list(shape)}; got {value}."
        )
    return np.broadcast_to(array, shape)
