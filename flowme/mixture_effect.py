"""Random effects of subpopulations: a mixture of Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from scipy.cluster.vq import kmeans2
from scipy.stats import multivariate_normal

from flowme.effects import RandomEffect, check_names, corr_cholesky, positive


class MixtureRandomEffect(RandomEffect):
    r"""η ~ Σ_m π_m N(μ_m, Ω_m), with Σ_m π_m μ_m = 0: subpopulations, each Gaussian.

    Centred like the others: the last component's mean follows from those before it,
    μ_M = -Σ_{m<M} π_m μ_m / π_M. Components are numbered as they were started.

    Args:
        names: names of the effects, in order.
        components: M, the number of subpopulations.
        full: learn a correlation matrix per component; by default each Ω_m is diagonal.
        spread: prior standard deviation of the component means, a number or `[effect]`, in the
            unit of η (also the law HalfNormal(spread) of each ω under full Bayes and MAP).
    """

    pytree_data_fields = ("probs", "locs", "omega", "corr_cholesky", "spread")
    pytree_aux_fields = ("full", "components")

    def __init__(
        self,
        names: Sequence[str],
        components: int = 2,
        *,
        full: bool = False,
        spread: ArrayLike = 1.0,
    ):
        names = check_names(names)
        if not isinstance(components, int) or components < 2:
            raise ValueError(f"expected at least 2 components; got {components!r}.")
        size = len(names)
        self.components = components
        self.full = bool(full) and size > 1
        self.spread = positive("spread", spread, (size,))
        self.probs = np.full(components, 1 / components)
        # Components apart from each other along all effects: equal ones would never separate.
        position = np.linspace(-1.0, 1.0, components)
        self.locs = 0.5 * position[:-1, None] * self.spread
        self.omega = np.full((components, size), 0.5) * self.spread
        self.corr_cholesky = np.broadcast_to(np.eye(size), (components, size, size))
        super().__init__(names)

    def priors(self):
        size, count = len(self.names), self.components
        laws = {
            "probs": dist.Dirichlet(jnp.full(count, 2.0)),
            "locs": dist.Normal(0, jnp.broadcast_to(self.spread, (count - 1, size))).to_event(2),
            "omega": dist.HalfNormal(jnp.broadcast_to(self.spread, (count, size))).to_event(2),
        }
        if self.full:
            laws["corr_cholesky"] = dist.LKJCholesky(size, 2.0).expand([count]).to_event(1)
        return laws

    def start(self, key, covariance, eta, subjects):
        """Starting values by k-means on the draws, each effect divided by its SD: of ten runs, as
        they end in different places, the one whose Gaussians are the likeliest."""
        eta = np.asarray(eta)
        scale = np.maximum(eta.std(0), 1e-12)
        seeds = np.asarray(jax.random.randint(key, (10,), 0, 2**31 - 1)).tolist()
        labels = [kmeans2(eta / scale, self.components, minit="++", seed=s)[1] for s in seeds]
        found = [self._clusters(eta, label) for label in labels]
        probs, means, covariances = max(found, key=lambda x: _log_mixture(eta, *x).sum())
        sds = np.stack([np.sqrt(np.diag(c)) for c in covariances])
        values = {
            "probs": probs,
            "locs": (means - probs @ means)[:-1],
            "omega": np.maximum(sds, 0.05 * scale),
        }
        if self.full:
            values["corr_cholesky"] = np.stack([corr_cholesky(c) for c in covariances])
        return values

    def _clusters(self, eta: np.ndarray, label: np.ndarray):
        """Shares, means and covariances of labelled draws; of all draws where a label is rare."""
        parts = [eta[label == m] for m in range(self.components)]
        parts = [part if len(part) > 2 * eta.shape[1] else eta for part in parts]
        probs = np.array([np.mean(label == m) for m in range(self.components)])
        probs = (probs + 0.02) / (probs + 0.02).sum()
        means = np.stack([part.mean(0) for part in parts])
        return probs, means, [np.atleast_2d(np.cov(part, rowvar=False)) for part in parts]

    @property
    def component_means(self) -> jax.Array:
        """μ, `[component, effect]`."""
        last = -(self.probs[:-1] @ self.locs) / self.probs[-1]
        return jnp.concatenate([self.locs, last[None]])

    def _scale_tril(self):
        return jnp.asarray(self.omega)[..., None] * self.corr_cholesky

    def sample(self, key, sample_shape=()):
        key_component, key_normal = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.probs), shape=sample_shape)
        z = jax.random.normal(key_normal, sample_shape + self.event_shape)
        moved = jnp.einsum("...ij,...j->...i", self._scale_tril()[component], z)
        return self.component_means[component] + moved

    def log_prob(self, value):
        tril = self._scale_tril()
        inverse = jnp.linalg.inv(tril)
        z = jnp.einsum("mij,...mj->...mi", inverse, value[..., None, :] - self.component_means)
        log_det = jnp.sum(jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)), -1)
        normal = -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1) - log_det
        return logsumexp(jnp.log(self.probs) + normal, axis=-1)

    @property
    def covariance_matrix(self):
        tril = self._scale_tril()
        within = tril @ jnp.swapaxes(tril, -1, -2)
        between = self.component_means[:, :, None] * self.component_means[:, None, :]
        return jnp.tensordot(self.probs, within + between, 1)


def _log_mixture(eta: np.ndarray, probs, means, covariances) -> np.ndarray:
    """log Σ_m π_m N(η; μ_m, Ω_m), `[draw]`."""
    laws = (
        multivariate_normal(m, c, allow_singular=True)
        for m, c in zip(means, covariances, strict=True)
    )
    terms = [np.log(p) + law.logpdf(eta) for p, law in zip(probs, laws, strict=True)]
    return np.logaddexp.reduce(terms, axis=0)
