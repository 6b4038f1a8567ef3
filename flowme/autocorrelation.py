"""Residual errors that are correlated in time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from flowme.censoring import log_tail
from flowme.normal_tail import log_normal_cdf
from flowme.study import Study


class Autocorrelated(dist.Distribution):
    r"""Observations of a subject whose errors are a continuous autoregression of order 1.

    With ε_j = (y_j - f_j)/s_j the standardised errors of `law` (of log y, if that is lognormal),

        corr(ε_j, ε_k) = exp(-|t_j - t_k| / τ),

    so that log p(y_j | y_1, ..., y_{j-1}) = log p(y_j) + log N(ε_j; ρ_j ε_{j-1}, 1 - ρ_j²)
    - log N(ε_j; 0, 1) with ρ_j = exp(-(t_j - t_{j-1})/τ), j - 1 being the measurement before.

    Args:
        law: `dist.Normal` or `dist.LogNormal`, of batch shape `[subject, time]`.
        tau: τ, the correlation time (unit of time), a number or `[subject, 1]`.
        time: times of the records, `[subject, time]`.
        before: the measurement before each, a position along `time`, `[subject, time]`.
        gap: the time since then, infinite for the first, `[subject, time]`.
    """

    pytree_data_fields = ("law", "tau", "time", "before", "gap")
    arg_constraints: dict[str, Any] = {}

    def __init__(self, law, tau, time, before, gap):
        self.law, self.tau, self.time, self.before, self.gap = law, tau, time, before, gap
        super().__init__(batch_shape=jnp.shape(gap), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return self.law.support

    def _normal(self) -> dist.Normal:
        return self.law.base_dist if isinstance(self.law, dist.LogNormal) else self.law

    def _after(self, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ρ and 1 - ρ² after a gap."""
        first = jnp.isinf(gap)
        steps = jnp.where(first, 1.0, gap) / self.tau  # inf times 0 is no derivative
        return jnp.where(first, 0.0, jnp.exp(-steps)), jnp.where(first, 1.0, -jnp.expm1(-2 * steps))

    def _errors(self, value):
        """ε_j, what is new in it, ε_j - ρ_j ε_{j-1}, and the variance of that."""
        normal = self._normal()
        y = jnp.log(value) if isinstance(self.law, dist.LogNormal) else value
        error = (y - normal.loc) / normal.scale
        ahead = jnp.take_along_axis(error, jnp.broadcast_to(self.before, error.shape), axis=-1)
        decay, left = self._after(self.gap)
        return error, error - decay * ahead, left

    def log_prob(self, value):
        error, new, left = self._errors(value)
        change = new**2 / left - error**2 + jnp.log(left)
        return self.law.log_prob(value) - 0.5 * change

    def log_tail(self, value, upper):
        """log P(y_j > value_j), else log P(y_j < value_j), given the measurement before."""
        _, new, left = self._errors(value)
        return log_normal_cdf(jnp.where(upper, -1.0, 1.0) * new / jnp.sqrt(left))

    def sample(self, key, sample_shape=()):
        noise = jax.random.normal(key, (*sample_shape, *self.batch_shape))
        step = jnp.diff(self.time, axis=-1, prepend=-jnp.inf)
        decay, left = self._after(step)

        def follow(error, row):
            decay, left, noise = row
            error = decay * error + jnp.sqrt(left) * noise
            return error, error

        rows = (jnp.broadcast_to(x, noise.shape) for x in (decay, left, noise))
        rows = tuple(jnp.moveaxis(x, -1, 0) for x in rows)
        _, error = jax.lax.scan(follow, jnp.zeros(noise.shape[:-1]), rows)
        normal = self._normal()
        y = normal.loc + normal.scale * jnp.moveaxis(error, 0, -1)
        return jnp.exp(y) if isinstance(self.law, dist.LogNormal) else y

    @property
    def mean(self):
        return jnp.broadcast_to(self.law.mean, self.batch_shape)

    @property
    def variance(self):
        return jnp.broadcast_to(self.law.variance, self.batch_shape)


log_tail.register(Autocorrelated, Autocorrelated.log_tail)


def autocorrelated(law: dist.Distribution, tau: ArrayLike, study: Study, outcome: str) -> Any:
    """`law` with errors whose correlation decays in time, exp(-|t - t'|/τ): for measurements that
    are closer to each other than the error's memory. Without it their number counts for too much.

    Args:
        law: a residual error model of normal or lognormal errors, such as
            `residual.constant(f, a)`, `[subject, time]`.
        tau: τ, the correlation time (unit of time), a positive number or `[subject, 1]`.
        study: the study.
        outcome: the outcome that is then observed, `fm.observe(outcome, ..., study)`.

    Raises:
        ValueError: an unknown outcome, another law, or a censored outcome.

    References:
        Chi and Reinsel, J. Am. Stat. Assoc. 84 (1989) 452; Jones and Boadi-Boateng,
        Biometrics 47 (1991) 161.
    """
    if outcome not in study.observed:
        raise ValueError(
            f"expected an outcome of the study, one of {sorted(study.observed)}; got {outcome!r}."
        )
    if not isinstance(law, dist.Normal | dist.LogNormal):
        raise ValueError(
            f"expected normal or lognormal errors, such as residual.constant(f, a); got {law!r}."
        )
    if outcome in study.censored:
        raise ValueError(
            f"expected an outcome without censored values; got {outcome!r}: the probability of an "
            "interval given the measurements around it is not there. Leave the correlation out."
        )
    mask, time = jnp.asarray(study.observed[outcome]), jnp.asarray(study.time)
    place = jnp.where(mask, jnp.arange(mask.shape[1]), -1)
    last = jax.lax.cummax(place, axis=1)
    before = jnp.concatenate([jnp.full((len(last), 1), -1), last[:, :-1]], axis=1)
    gap = time - jnp.take_along_axis(time, jnp.maximum(before, 0), axis=1)
    gap = jnp.where(before >= 0, gap, jnp.inf)
    return Autocorrelated(law, tau, time, jnp.maximum(before, 0), gap)
