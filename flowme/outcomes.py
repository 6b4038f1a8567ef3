"""Outcomes other than continuous measurements: counts, categories, times to an event.

NumPyro's laws go straight into `flowme.observe`, with parameters of shape `[subject, time]`:

    counts               dist.Poisson(rate), dist.NegativeBinomial2(mean, concentration)
      out of n           dist.Binomial(n, p), dist.BetaBinomial(p * size, (1 - p) * size, n)
      with more zeros    dist.ZeroInflatedPoisson(gate, rate)
    yes or no            dist.Bernoulli(logits=x)
    ordered categories   dist.OrderedLogistic(x, cutpoints), observed as 0, 1, ..., increasing
    time to an event     dist.Weibull(scale, shape), dist.Exponential(rate), dist.Gompertz(...),
                         or `time_to_event` by a cumulative hazard of your own

A time to an event is an outcome like any other: its value is the time, in a row of its own. With
the columns CENS and LIMIT (`Study.from_frame`) a subject in whom nothing has happened until t
has the value t and CENS -1; where it happened between two visits s < t, the value is t, CENS 1
and LIMIT s.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from flowme.censoring import log_tail, tail_of_hazard

__all__ = ["time_to_event"]

_LOG_TIMES = 60.0  # times from e^-60 to e^60 are looked for


def time_to_event(
    cumulative_hazard: Callable[..., jax.Array], *parameters: ArrayLike
) -> dist.Distribution:
    """The law of the time to an event with a given cumulative hazard H(t).

    P(T > t) = exp(-H(t)) and the density is h(t) exp(-H(t)) with the hazard h = dH/dt, found by
    differentiation.

    Args:
        cumulative_hazard: H(t, *parameters) for arrays of one shape, elementwise; 0 at t = 0 and
            not decreasing. Where it stays below a limit, some never have the event.
        *parameters: what it depends on, each `[subject, time]` or a number.

    Returns:
        A NumPyro distribution on t > 0, in the unit of t. Its mean is infinite where some never
        have the event; such a subject is sampled at t = e^60.

    Reference:
        Klein and Moeschberger (2003), Survival Analysis, chapter 2.

    Example:
        >>> def log_logistic(t, median, shape):
        ...     return jnp.log1p((t / median) ** shape)
        >>> law = time_to_event(log_logistic, 3.0, 1.5)
        >>> float(law.cdf(3.0))
        0.5
    """
    return TimeToEvent(cumulative_hazard, parameters)


class TimeToEvent(dist.Distribution):
    """See `time_to_event`."""

    support = constraints.positive
    pytree_data_fields = ("parameters",)
    pytree_aux_fields = ("cumulative_hazard",)

    def __init__(self, cumulative_hazard: Callable[..., jax.Array], parameters: tuple):
        shape = jnp.broadcast_shapes(*(jnp.shape(p) for p in parameters))
        self.cumulative_hazard = cumulative_hazard
        self.parameters = tuple(jnp.broadcast_to(jnp.asarray(p, float), shape) for p in parameters)
        super().__init__(shape, validate_args=False)

    def hazard(self, value: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """H(t) and h(t)."""
        value = jnp.broadcast_to(
            jnp.asarray(value, float), jnp.broadcast_shapes(jnp.shape(value), self.batch_shape)
        )
        one = jnp.ones_like(value)
        return jax.jvp(lambda t: self.cumulative_hazard(t, *self.parameters), (value,), (one,))

    def log_prob(self, value: ArrayLike) -> jax.Array:
        total, rate = self.hazard(value)
        return jnp.log(rate) - total

    def cdf(self, value: ArrayLike) -> jax.Array:
        return -jnp.expm1(-self.hazard(value)[0])

    @property
    def mean(self) -> jax.Array:
        """∫ P(T > t) dt, by the trapezoidal rule over log t."""
        log_t = jnp.linspace(-_LOG_TIMES, _LOG_TIMES, 2401)
        t = jnp.exp(log_t).reshape(-1, *[1] * len(self.batch_shape))
        survival = jnp.exp(-self.hazard(t)[0])
        mean = jnp.sum(survival * t, 0) * (log_t[1] - log_t[0])
        return jnp.where(survival[-1] > 0, jnp.inf, mean)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """The time at which H(t) is a draw of the exponential law, by bisection of log t."""
        draw = jax.random.exponential(key, (*sample_shape, *self.batch_shape))

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            early = self.hazard(jnp.exp(middle))[0] < draw
            return jnp.where(early, middle, low), jnp.where(early, high, middle)

        start = jnp.full(draw.shape, _LOG_TIMES)
        return jnp.exp(jax.lax.fori_loop(0, 64, halve, (-start, start))[1])


@log_tail.register
def _(law: TimeToEvent, value: ArrayLike, upper: ArrayLike) -> jax.Array:
    return tail_of_hazard(law.hazard(value)[0], upper)
