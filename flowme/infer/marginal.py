"""The marginal log-likelihood by importance sampling, with its Monte-Carlo standard error."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from flowme.infer.conditional import importance, laplace, likelihood_at, log_mean, population_law
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights
from flowme.study import Study


class MarginalLikelihood(NamedTuple):
    """log p(y_i; θ) of every subject and its Monte-Carlo standard error, each `[subject]`."""

    log_likelihood: np.ndarray
    standard_error: np.ndarray

    @property
    def total(self) -> float:
        """log p(y; θ)."""
        return float(np.sum(self.log_likelihood))

    @property
    def total_se(self) -> float:
        """Monte-Carlo standard error of `total`."""
        return float(np.sqrt(np.sum(self.standard_error**2)))


def marginal_log_likelihood(
    key: jax.Array,
    fit: Fit,
    study: Study | None = None,
    *,
    points: int = 256,
    replicates: int = 8,
) -> MarginalLikelihood:
    """log p(y_i; θ) = log ∫ p(y_i | η; θ) p(η; θ) dη for every subject of `study`.

    Importance sampling from the mixture of a Gaussian around p(η_i | y_i; θ) and of the law of
    the random effects (`flowme.infer.conditional.importance`), in independent randomised
    quasi-Monte-Carlo replicates whose spread gives the standard error. The study need not be the
    one the model was fitted to: this is how held-out subjects are judged, whatever their law.

    Args:
        key: random key; is consumed.
        fit: a fitted model.
        study: the subjects; by default those of the fit.
        points: points per subject and replicate.
        replicates: independent replicates, at least 2.
    """
    study = fit.study if study is None else study
    return estimate_marginal(
        key, fit.joint, fit.theta, fit.weights, study, points=points, replicates=replicates
    )


def estimate_marginal(
    key: jax.Array,
    joint: Joint,
    theta: jax.Array,
    weights: Weights,
    study: Study,
    *,
    points: int = 256,
    replicates: int = 8,
) -> MarginalLikelihood:
    """`marginal_log_likelihood` of `joint` at θ and these flow weights."""
    if replicates < 2:
        raise ValueError(f"expected at least 2 replicates for a standard error; got {replicates}.")
    values = _replicates(joint, points, replicates, key, theta, weights, study)
    mean = logsumexp(values, axis=0) - jnp.log(replicates)
    relative = jnp.exp(values - mean)
    error = jnp.std(relative, axis=0, ddof=1) / jnp.sqrt(replicates)
    return MarginalLikelihood(np.asarray(mean), np.asarray(error))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _replicates(joint: Joint, points: int, replicates: int, key, theta, weights, study) -> Any:
    values = joint.constrain(theta)
    mean, covariance = joint.effect_moments(jax.random.key(0), theta, weights, study)
    conditional = laplace(
        lambda eta: joint.terms(values, weights, eta, study)[0],
        mean,
        covariance,
        None,
        20,
        study.subjects.size,
    )
    broad = population_law(joint, theta, weights, study)

    def replicate(key):
        nodes, effect = importance(key, conditional, broad, points)
        likelihood = likelihood_at(joint, theta, weights, nodes, study)
        return log_mean(likelihood, effect, nodes.log_weight)

    return jax.lax.map(replicate, jax.random.split(key, replicates))
