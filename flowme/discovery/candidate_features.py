"""What the data say of each candidate reaction: functions of those chosen, which are pytrees."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_SWEEPS = 30


class FixedFeatures(NamedTuple):
    """The same whatever is chosen.

    Attributes:
        values: [L, feature].
    """

    values: Array

    def __call__(self, chosen: Array) -> Array:
        """[..., L, feature]"""
        return jnp.broadcast_to(self.values, (*chosen.shape, self.values.shape[-1]))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gram", "moment", "total", "records"],
    meta_fields=["most"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class GramFeatures:
    r"""What is left of a regression to explain, from its Gram matrix alone.

    With columns a_r of the regression that a screen solves, b its left side, and
    :math:`\hat k \ge 0` the rates of the chosen reactions by least squares, the residual is
    :math:`e = b - \sum_r \hat k_r a_r`, and the features are

    - the correlation :math:`\rho_r = a_r \cdot e / (|a_r| |e|)`,
    - the gain in BIC by one step, :math:`-\log(1 - \max(\rho_r, 0)^2) - \log(n) / n`, for a record,
    - the contribution :math:`\hat k_r |a_r| / |b|`; 0 if not chosen.

    Attributes:
        gram: a_r · a_s, [L, L].
        moment: a_r · b, [L].
        total: b · b.
        records: n, the rows of the regression.
        most: most reactions chosen.
    """

    gram: Array
    moment: Array
    total: Any
    records: Any
    most: int = 8

    def __call__(self, chosen: Array) -> Array:
        """[..., L, 3]"""
        diagonal = jnp.diagonal(jnp.asarray(self.gram, float))
        length = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        gram = self.gram / jnp.outer(length, length)
        moment = self.moment / (length * jnp.sqrt(self.total))
        there, rows = jax.lax.top_k(chosen.astype(gram.dtype), min(self.most, chosen.shape[-1]))
        within = gram[rows[..., :, None], rows[..., None, :]]
        k = _non_negative(within, moment[rows], there)
        residual = moment - jnp.einsum("...r,...rl->...l", k, gram[rows])
        left = 1 - jnp.sum(k * (moment[rows] + jnp.take_along_axis(residual, rows, -1)), -1)
        correlation = residual / jnp.sqrt(jnp.maximum(left, 1e-6))[..., None]
        correlation = jnp.clip(correlation, -1, 1)
        explained = jnp.minimum(jnp.maximum(correlation, 0) ** 2, 0.999)
        gain = -jnp.log1p(-explained) - jnp.log(self.records) / self.records
        rates = jnp.put_along_axis(jnp.zeros_like(residual), rows, k, axis=-1, inplace=False)
        return jnp.stack([correlation, gain, rates], -1)


def _non_negative(gram: Array, moment: Array, there: Array) -> Array:
    """argmin_{k ≥ 0} k·G k / 2 - k·c, the diagonal of G being 1, by coordinate descent."""

    def coordinate(i: int, k: Array) -> Array:
        slope = moment[..., i] - jnp.sum(gram[..., i, :] * k, -1)
        return k.at[..., i].set(there[..., i] * jnp.maximum(k[..., i] + slope, 0))

    def sweep(_: int, k: Array) -> Array:
        return jax.lax.fori_loop(0, there.shape[-1], coordinate, k)

    return jax.lax.fori_loop(0, _SWEEPS, sweep, jnp.zeros_like(moment))
