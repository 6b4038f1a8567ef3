"""A mixture of Gaussians with one covariance, held fixed: what a smoothed NPMLE is."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from flowme.effects import RandomEffect


class KernelMixtureRandomEffect(RandomEffect):
    r"""η ~ Σ_k w_k N(m_k, S Sᵀ): nothing of it is learned, the study that taught it is behind it.

    Not centred: E η = Σ_k w_k m_k, so population parameters are what they were held at when the
    centres were placed, not the means of individual parameters.

    Args:
        names: names of the effects, in order.
        locs: m, `[component, effect]`.
        probs: w, `[component]`, non-negative, with sum 1.
        scale_tril: S, `[effect, effect]`, lower triangular.
    """

    pytree_data_fields = ("locs", "probs", "scale_tril")

    def __init__(
        self, names: Sequence[str], locs: ArrayLike, probs: ArrayLike, scale_tril: ArrayLike
    ):
        super().__init__(names)
        size, count = len(self.names), np.shape(locs)[0]
        shapes = [np.shape(x) for x in (locs, probs, scale_tril)]
        if shapes != [(count, size), (count,), (size, size)]:
            raise ValueError(
                f"expected locs [component, effect], probs [component] and scale_tril [effect, "
                f"effect] of {size} effects; got shapes {shapes}."
            )
        if np.any(np.asarray(probs) < 0) or abs(np.sum(probs) - 1) > 1e-4:
            raise ValueError(f"expected probs to be non-negative with sum 1; got {probs}.")
        self.locs, self.probs, self.scale_tril = locs, probs, scale_tril

    def priors(self):
        return {}

    def start(self, key, covariance, eta, subjects):
        return {}

    def sample(self, key, sample_shape=()):
        key_component, key_normal = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.probs), shape=sample_shape)
        z = jax.random.normal(key_normal, sample_shape + self.event_shape)
        return jnp.asarray(self.locs)[component] + z @ jnp.asarray(self.scale_tril).T

    def log_prob(self, value):
        size = len(self.names)
        inverse = jax.scipy.linalg.solve_triangular(
            jnp.asarray(self.scale_tril), jnp.eye(size), lower=True
        )
        # ‖x - m‖² = ‖x‖² - 2 x·m + ‖m‖², from the first centre: no array [..., component, effect].
        origin = jnp.asarray(self.locs)[0]
        x, m = (value - origin) @ inverse.T, (self.locs - origin) @ inverse.T
        distance = jnp.sum(x**2, -1)[..., None] - 2 * x @ m.T + jnp.sum(m**2, -1)
        constant = -0.5 * size * jnp.log(2 * jnp.pi) + jnp.sum(jnp.log(jnp.diagonal(inverse)))
        return constant + logsumexp(jnp.log(self.probs) - 0.5 * distance, axis=-1)

    @property
    def mean(self):
        return jnp.asarray(self.probs) @ self.locs

    @property
    def covariance_matrix(self):
        centred = self.locs - self.mean
        return jnp.asarray(self.scale_tril) @ jnp.asarray(self.scale_tril).T + (
            (self.probs * centred.T) @ centred
        )
