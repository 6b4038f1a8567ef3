"""A choice between arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["where"]


def where(condition: jax.Array, x: Any, y: Any) -> jax.Array:
    """`jnp.where`, which is a program of its own to JAX: written, differentiated and mapped anew
    for arrays of every shape, that takes six times as long as the choice itself."""
    dtype = jnp.result_type(x, y)
    shape = np.broadcast_shapes(np.shape(condition), np.shape(x), np.shape(y))

    def wide(a: Any, dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(a, dtype), shape)

    return jax.lax.select_n(wide(condition, bool), wide(y, dtype), wide(x, dtype))
