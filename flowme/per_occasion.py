"""Random effects between occasions, κ: one draw of the same law for every occasion of a subject."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flowme.effects import RandomEffect


class PerOccasion(RandomEffect):
    """κ_i = (κ_i1, ..., κ_iK), independent draws of one law: `[occasion effect]`.

    Its parameters are those of the law; occasion k of effect "CL" is called "CL_k". Of an
    occasion that a subject does not have, κ is in no likelihood and integrates to 1.

    Args:
        law: the law of κ at one occasion.
        occasions: K, the largest number of occasions of a subject.
    """

    pytree_data_fields: tuple[str, ...] = ("law",)
    pytree_aux_fields: tuple[str, ...] = ("occasions",)

    def __init__(self, law: RandomEffect, occasions: int):
        self.law, self.occasions = law, occasions
        names = [f"{name}_{k + 1}" for k in range(occasions) for name in law.names]
        super().__init__(names)

    def _joined(self, value: jax.Array) -> jax.Array:
        return value.reshape(*value.shape[:-2], -1)

    def each(self, value: jax.Array) -> jax.Array:
        """`[..., occasion effect]` as `[..., occasion, effect]`."""
        return value.reshape(*value.shape[:-1], self.occasions, len(self.law.names))

    def sample(self, key, sample_shape=()):
        return self._joined(self.law.sample(key, (*sample_shape, self.occasions)))

    def log_prob(self, value):
        return jnp.sum(self.law.log_prob(self.each(value)), -1)

    @property
    def mean(self):
        return jnp.tile(self.law.mean, self.occasions)

    @property
    def covariance_matrix(self):
        return jnp.kron(jnp.eye(self.occasions), self.law.covariance_matrix)

    @property
    def scale_tril(self):
        """Of the covariance, or the scale of laws that have one, per occasion."""
        tril = getattr(self.law, "scale_tril", None)
        tril = jnp.linalg.cholesky(self.law.covariance_matrix) if tril is None else tril
        return jnp.kron(jnp.eye(self.occasions), tril)

    def from_base(self, z):
        """κ of standard normal z; of laws that are sampled as a function of it."""
        return self._joined(self.law.from_base(self.each(z)))  # type: ignore[attr-defined]

    def to_base(self, kappa):
        """The z of κ."""
        return self._joined(self.law.to_base(self.each(kappa)))  # type: ignore[attr-defined]
