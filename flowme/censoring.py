"""Censored observations: of some it is only known in which interval they lie.

Where `side` is 0 the observation is its value and contributes the density of its law. Else it
contributes the probability of an interval under the same law:

    side 1    P(y < value),  with a limit  P(limit < y < value)     (below quantification)
    side -1   P(y > value),  with a limit  P(value < y < limit)     (beyond the scale)

For left-censored normal errors this is log Φ((LLOQ - f) / sd), the method M3 of Beal (2001); a
limit of 0 makes it the interval (0, LLOQ), of which his M4 is the form conditional on y > 0.
The columns are those of Monolix, CENS and LIMIT.

NumPyro's censored laws clip the cdf, so that the gradient vanishes just where a prediction is far
on the wrong side. Here logarithms of tails are taken in the shorter tail: finite, with the right
first and second derivatives, for normal laws and their transformations (`residual`); other
continuous laws go through their `cdf`.

Reference:
    Beal (2001), Journal of Pharmacokinetics and Pharmacodynamics 28, 481-504.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike

from flowme.normal_tail import log_normal_cdf

_CERTAIN = 40.0  # beyond so many standard deviations, 1 - Φ is 0 in any precision


class Censored(dist.Distribution):
    """The law of observations some of which are censored. See the module.

    It says where an observation is. What it would have been is `base_dist`: samples, mean and
    support are those of the observation before it was censored.

    Args:
        base_dist: law of the observation, continuous, of shape `[subject, time]`.
        side: 0 where the value was measured, 1 where it is an upper bound, -1 a lower one.
        limit: the other end of the interval; where NaN, or not inside the support, there is none.

    Raises:
        TypeError: a law without a cdf that can be differentiated.
    """

    pytree_data_fields = ("base_dist", "side", "limit")

    def __init__(self, base_dist: dist.Distribution, side: ArrayLike, limit: Any = None):
        _check(base_dist)
        self.base_dist, self.side, self.limit = base_dist, side, limit
        super().__init__(base_dist.batch_shape, validate_args=False)

    @property
    def support(self):
        return self.base_dist.support

    @property
    def mean(self) -> jax.Array:
        return self.base_dist.mean

    def sample(self, key, sample_shape=()):
        return self.base_dist.sample(key, sample_shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        measured = jnp.equal(self.side, 0)
        below = jnp.greater(self.side, 0)
        known = log_tail(self.base_dist, value, ~below)
        if self.limit is not None:
            limit = jax.lax.stop_gradient(self.limit)  # data: no curvature is asked of it
            # NumPyro puts another value into cells that are masked: on any side of the limit.
            closed = self.base_dist.support(limit)
            closed &= jnp.where(below, limit < value, limit > value)
            limit = jnp.where(closed, limit, value)
            low, high = jnp.where(below, limit, value), jnp.where(below, value, limit)
            law = _replaced(self.base_dist, ~closed, value)
            between = _log_interval(law, low, high, closed)
            known = jnp.where(closed, between, known)
        density = _replaced(self.base_dist, ~measured, value).log_prob(value)
        return jnp.where(measured, density, known)


def _check(law: dist.Distribution) -> None:
    """Refuses laws whose tails have no derivatives."""
    if type(law) in _SPECIAL or type(law).cdf is dist.Distribution.cdf or law.is_discrete:
        raise TypeError(
            "expected a continuous law with a cdf in closed form for an outcome of which some "
            f"values are censored; got {type(law).__name__}. Take one of fm.residual, or one such "
            "as dist.Normal, dist.LogNormal, dist.Laplace, dist.Weibull. A count that is known to "
            "lie in an interval needs a law of your own."
        )


# JAX has no derivatives of these cdfs in their shape parameters.
_SPECIAL = (dist.StudentT, dist.Gamma, dist.Chi2, dist.InverseGamma, dist.Beta, dist.BetaProportion)


@functools.singledispatch
def log_tail(law: dist.Distribution, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    """log P(y > value) where `upper`, else log P(y < value).

    By the cdf: where that rounds to 0 or 1 the tail is the smallest number, without a gradient.
    """
    below = law.cdf(value)
    tail, tiny = jnp.where(upper, 1 - below, below), jnp.finfo(jnp.result_type(below)).tiny
    gone = tail < tiny  # log has no derivatives there: they overflow, and 0 times inf is NaN
    return jnp.where(gone, math.log(tiny), jnp.log(jnp.where(gone, 1.0, tail)))


@log_tail.register
def _(law: dist.Normal, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    z = jnp.where(upper, -1.0, 1.0) * (value - law.loc) / law.scale
    # A prediction of 0 with a proportional error has no scale: certain, but 0/0 in a gradient.
    certain = z > _CERTAIN
    law = _replaced(law, certain, value)
    z = jnp.where(upper, -1.0, 1.0) * (value - law.loc) / law.scale
    return jnp.where(certain, 0.0, log_normal_cdf(z))


@log_tail.register
def _(law: dist.TransformedDistribution, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    for transform in reversed(law.transforms):
        value, upper = transform.inv(value), jnp.logical_xor(upper, transform.sign < 0)
    return log_tail(law.base_dist, value, upper)


@log_tail.register
def _(law: dist.Exponential, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    return tail_of_hazard(law.rate * value, upper)


@log_tail.register
def _(law: dist.Weibull, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    return tail_of_hazard((value / law.scale) ** law.concentration, upper)


@log_tail.register
def _(law: dist.Gompertz, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    return tail_of_hazard(law.concentration * jnp.expm1(law.rate * value), upper)


def tail_of_hazard(total: ArrayLike, upper: ArrayLike) -> jax.Array:
    """`log_tail` where P(y > value) = exp(-total), the cumulative hazard."""
    total = jnp.asarray(total, float)
    tiny = jnp.finfo(total.dtype).tiny
    return jnp.where(upper, -total, _log1mexp(jnp.maximum(total, tiny)))


def _log_interval(
    law: dist.Distribution, low: ArrayLike, high: ArrayLike, closed: jax.Array
) -> jax.Array:
    """log P(low < y < high), as the difference of two tails on the side where they are short; any
    finite number, with finite derivatives, where `closed` is False."""
    upper = jax.lax.stop_gradient(log_tail(law, low, False)) > math.log(0.5)
    long = log_tail(law, jnp.where(upper, low, high), upper)
    short = log_tail(law, jnp.where(upper, high, low), upper)
    ratio = jnp.where(closed, long - short, 1.0)
    return long + _log1mexp(jnp.maximum(ratio, jnp.finfo(long.dtype).tiny))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(-x)) for x > 0."""
    near = x < math.log(2)
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(-jnp.where(near, x, 1.0))),
        jnp.log1p(-jnp.exp(-jnp.where(near, 1.0, x))),
    )


def _replaced(law: dist.Distribution, cells: jax.Array, value: ArrayLike) -> dist.Distribution:
    """The law with other parameters in cells that do not count: centre `value`, scale 1.

    A prediction there may have no density at all (0, under a proportional error), and the masked
    gradient of an infinite one is NaN.
    """
    if isinstance(law, dist.TransformedDistribution):
        for transform in reversed(law.transforms):
            value = transform.inv(value)
        inner = _replaced(law.base_dist, cells, value)
        return dist.TransformedDistribution(inner, law.transforms, validate_args=False)
    if isinstance(law, dist.Normal):
        loc, scale = jnp.where(cells, value, law.loc), jnp.where(cells, 1.0, law.scale)
        return dist.Normal(loc, scale, validate_args=False)
    return law
