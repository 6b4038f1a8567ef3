"""log Φ(z), the log probability that a standard normal falls below z, for z as low as may be.

`jax.scipy.special.log_ndtr` has the value right but differentiates by exp(-z²/2 - log Φ(z)): the
second derivative, which a curvature needs, has the wrong sign from z = -1e5 on, in single
precision from -100. Here, with the inverse Mills ratio h = φ/Φ,

    (log Φ)' = h,   h = w - z,   w' = 1 - h w,

and w = z + h > 0 without cancellation: for z < -6 from Laplace's continued fraction
w = 1/(x + 2/(x + 3/(x + ...))), x = -z. Derivatives of any order are right to about 1e-12.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

_TAIL, _LEVELS = 6.0, 16


@jax.custom_jvp
def log_normal_cdf(z: jax.Array) -> jax.Array:
    """log Φ(z), of the shape of z."""
    return log_ndtr(z)


@log_normal_cdf.defjvp
def _(primals, tangents):
    (z,), (tangent,) = primals, tangents
    return log_normal_cdf(z), (_excess(z) - z) * tangent


@jax.custom_jvp
def _excess(z: jax.Array) -> jax.Array:
    """w = z + φ(z) / Φ(z)."""
    x = jnp.maximum(-z, _TAIL)
    tail = x
    for level in range(_LEVELS, 1, -1):
        tail = x + level / tail
    middle = jnp.maximum(z, -_TAIL)
    log_ratio = -0.5 * middle**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(middle)
    return jnp.where(z < -_TAIL, 1 / tail, middle + jnp.exp(log_ratio))


@_excess.defjvp
def _(primals, tangents):
    (z,), (tangent,) = primals, tangents
    w = _excess(z)
    return w, (1 - (w - z) * w) * tangent
