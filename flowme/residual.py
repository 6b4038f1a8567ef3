"""Residual error models: the law of an observation around its prediction f.

Each is a function of the prediction f `[subject, time]` and of residual error parameters, and
returns a NumPyro distribution. Counts need none: `dist.Poisson(rate)`, `dist.Binomial(n, p)` go
straight into `flowme.observe`.

Arguments are not validated: cells that are not observed (a dose row, where f may be 0) may hold
anything, and an observed cell whose law is not finite is reported by the estimation, by subject.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike

from flowme.autocorrelation import autocorrelated as autocorrelated


def constant(f: ArrayLike, a: ArrayLike) -> dist.Distribution:
    """y = f + a ε, ε ~ N(0, 1). `a` has the unit of y."""
    return dist.Normal(f, a, validate_args=False)


def proportional(f: ArrayLike, b: ArrayLike) -> dist.Distribution:
    """y = f (1 + b ε). `b` is dimensionless: the coefficient of variation.

    A prediction of exactly 0 has no error at all and an infinite log density: leave such records
    out (a concentration before the dose), or use `combined1` or `combined2`.
    """
    return dist.Normal(f, b * jnp.abs(f), validate_args=False)


def combined1(f: ArrayLike, a: ArrayLike, b: ArrayLike) -> dist.Distribution:
    """y = f + (a + b f) ε: standard deviations add (`combined1` in Monolix and saemix)."""
    return dist.Normal(f, a + b * jnp.abs(f), validate_args=False)


def combined2(f: ArrayLike, a: ArrayLike, b: ArrayLike) -> dist.Distribution:
    """y = f + √(a² + b² f²) ε: variances add (`combined2` in Monolix and saemix)."""
    return dist.Normal(f, jnp.sqrt(a**2 + (b * f) ** 2), validate_args=False)


def exponential(f: ArrayLike, a: ArrayLike) -> dist.Distribution:
    """y = f exp(a ε): constant error on the log scale, for positive observations."""
    return dist.LogNormal(jnp.log(f), a, validate_args=False)
