"""What a fitted model predicts: for its subjects, for the population, and for new subjects."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import biject_to
from numpyro.handlers import reparam
from numpyro.infer import MCMC
from numpyro.primitives import Messenger

from flowme.infer.conditional import Conditional, importance, likelihood_at, population_law
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights, start_weights
from flowme.levels import same_levels
from flowme.quick import soon
from flowme.study import Study

Result: TypeAlias = Fit | MCMC


def predict(
    result: Result, study: Study | None = None, *, population: bool = False
) -> dict[str, np.ndarray]:
    """The mean of each outcome's law at the records of a study.

    Individual predictions E[y_ij | η_i, θ] are at the mean of the conditional distribution of
    each subject, population predictions at η = 0; θ is the estimate (for an MCMC run the posterior
    mean on the unconstrained scale). For counts this is the expected count, for
    ordered categories the expected index. Predictions are of
    what is there, whether or not it could be measured: censoring does not enter them.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        study: where to predict, by default the study fitted. `study.at(times)` gives other times.
        population: predict for the typical subject (η = 0) instead of each one; the study may
            then have other subjects than those fitted.

    Returns:
        Outcome -> `[subject, time]`, in the unit of the outcome; NaN where the study is padded.

    Raises:
        ValueError: `study` has a subject that was not fitted, and `population` is False; or a
            level of a categorical covariate that the study fitted does not have.
    """
    point = estimate(result, conditional=not population)
    study = point.study if study is None else same_levels(study, point.study)
    joint = point.joint.on(study)
    if point.eta is None:
        eta = jnp.zeros((study.subjects.size, joint.effect_size))
    else:
        eta = point.eta[_positions(point.study, study)]
        if eta.shape[1] != joint.effect_size:
            raise ValueError(
                "expected as many occasions as in the study fitted, of which the random effects "
                f"are known; got {joint.effect_size} random effects for {eta.shape[1]}. For other "
                "occasions there are predict(..., population=True) and simulate(...)."
            )
    means = _means(joint, point.theta, point.weights, eta, study)
    return {name: np.asarray(mean) for name, mean in means.items()}


def simulate(
    key: jax.Array, result: Result, study: Study | None = None, *, replicates: int = 100
) -> dict[str, np.ndarray]:
    """New observations of new subjects: η ~ p(η; θ), then y ~ p(y | η; θ).

    The random effects come from the fitted law whatever its shape, a flow's as a flow. θ is the
    estimate; for an MCMC run every replicate takes another draw of it, so that the spread of
    replicates holds the uncertainty of θ too. Nothing is censored: a limit of quantification is
    to be applied to what is simulated (as `plots.vpc` does).

    Args:
        key: random key; is consumed.
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        study: whose times, doses and covariates the new subjects have; by default the study fitted.
        replicates: number of such studies.

    Returns:
        Outcome -> `[replicate, subject, time]`; NaN where the study is padded.

    Raises:
        ValueError: `study` has a level of a categorical covariate that the study fitted does not.
    """
    if replicates < 1:
        raise ValueError(f"expected at least 1 replicate; got {replicates}.")
    point = estimate(result, conditional=False)
    study = point.study if study is None else same_levels(study, point.study)
    key_theta, key = jax.random.split(key)
    thetas = jax.random.choice(key_theta, point.thetas, (replicates,))
    keys = jax.random.split(key, replicates)
    values = _simulate(point.joint.on(study), keys, thetas, point.weights, study)
    return {name: np.asarray(value) for name, value in values.items()}


def population_draws(
    key: jax.Array, result: Result, count: int = 10_000, *, gaussian: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draws from the fitted law of random effects and of individual parameters.

    New subjects with the covariates of those in the study, each equally often; for an MCMC run,
    over fifty draws of θ.

    Args:
        key: random key; is consumed.
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        count: number of draws.
        gaussian: draw η from the Gaussian with the moments of its law instead, to compare.

    Returns:
        η `[sample, effect]`, and ψ by site, each `[sample, parameter]`: of parameters that change
        in time those at the first record.
    """
    point = estimate(result, conditional=False)
    some = np.linspace(0, len(point.thetas) - 1, min(50, len(point.thetas))).astype(int)
    each = math.ceil(count / (len(some) * point.study.subjects.size))
    keys = jax.random.split(key, len(some))
    thetas = point.thetas[some]
    draws = _population(point.joint, each, gaussian, keys, thetas, point.weights, point.study)
    eta, psi = jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1])[:count], draws)
    return eta, psi


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """What any inference says about a model, in the words of `Joint`.

    Attributes:
        joint: the model.
        study: the study it was fitted to.
        weights: flow weights that are held (sampled ones are part of θ).
        theta: the estimate or posterior mean, `[parameter]`.
        thetas: the estimate alone or all draws, `[draw, parameter]`.
        eta: mean of each conditional distribution, `[subject, effect]`; None where not asked for.
    """

    joint: Joint
    study: Study
    weights: Weights
    theta: jax.Array
    thetas: jax.Array
    eta: jax.Array | None = None

    def individual(self) -> dict[str, jax.Array]:
        """ψ_i at the conditional means of η_i, by site, each `[subject, parameter]`; or
        `[subject, time, parameter]` where they change in time."""
        return _individual(self.joint, self.theta, self.weights, self.eta, self.study)


def estimate(result: Result, *, conditional: bool = True) -> Estimate:
    """The estimate of a fit or an MCMC run; with the conditional means unless told otherwise."""
    if isinstance(result, Fit):
        eta = None
        if conditional:
            nodes, log_share = conditional_nodes(jax.random.key(0), result)
            eta = jnp.einsum("ksd,ks->sd", nodes, jnp.exp(log_share))
        theta = result.theta
        return Estimate(result.joint, result.study, result.weights, theta, theta[None], eta)
    draws = mcmc_draws(result)
    thetas = draws.theta.reshape(-1, draws.theta.shape[-1])
    eta = draws.eta.mean((0, 1))
    return Estimate(draws.joint, draws.study, draws.weights, thetas.mean(0), thetas, eta)


def conditional_nodes(key: jax.Array, fit: Fit, count: int = 256) -> tuple[jax.Array, jax.Array]:
    """Weighted nodes of p(η_i | y_i; θ̂) by importance sampling, whatever the law of η.

    Args:
        key: random key; is consumed.
        fit: the fit.
        count: nodes per subject.

    Returns:
        η_ik `[node, subject, effect]`, and the logarithms of their shares, which sum to 1 over
        nodes, `[node, subject]` (NaN for a subject for whom the model is nowhere finite).
    """
    return _conditional(fit.joint, count, key, fit.theta, fit.weights, fit.conditional, fit.study)


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """An MCMC run in the words of `Joint`: θ `[chain, draw, parameter]` and
    η `[chain, draw, subject, effect]`."""

    joint: Joint
    study: Study
    weights: Weights
    theta: jax.Array
    eta: jax.Array


def mcmc_draws(mcmc: MCMC) -> Draws:
    """The draws of a NumPyro `MCMC` that was run on `model(study)`."""
    if not isinstance(mcmc, MCMC):
        raise TypeError(
            f"expected a Fit of flowme.VariationalEM or a NumPyro MCMC; got {type(mcmc).__name__}."
        )
    # NumPyro sets these at the run, and has no public name for them.
    arguments = [*getattr(mcmc, "_args", ()), *getattr(mcmc, "_kwargs", {}).values()]
    if not arguments or not isinstance(arguments[0], Study):
        raise ValueError(
            "expected an MCMC after its run on a model of a study, mcmc.run(key, study); got "
            f"{'no arguments' if not arguments else type(arguments[0]).__name__}."
        )
    study = arguments[0]
    joint = Joint.of(_as_written(mcmc.sampler.model), study)
    samples = mcmc.get_samples(group_by_chain=True)
    missing = [n for n in (*joint.roles.population, *joint.roles.effects) if n not in samples]
    if missing:
        raise ValueError(f"expected draws of every site of the model; got none of {missing}.")
    shape = next(iter(samples.values())).shape[:2]
    theta = [jnp.zeros((*shape, 0))]
    for name, site in joint.roles.population.items():
        theta.append(biject_to(site.support).inv(samples[name]).reshape(*shape, -1))
    eta = [samples[n].reshape(*shape, study.subjects.size, -1) for n in joint.roles.effects]
    return Draws(
        joint, study, start_weights(joint), jnp.concatenate(theta, -1), jnp.concatenate(eta, -1)
    )


def _as_written(model: Any) -> Callable:
    """The model without the reparametrisations it was sampled in, all other handlers kept."""
    if isinstance(model, reparam):
        return _as_written(model.fn)
    if isinstance(model, Messenger) and model.fn is not None:
        model = copy.copy(model)
        model.fn = _as_written(model.fn)
    return model


def _positions(fitted: Study, study: Study) -> np.ndarray:
    place = {name: i for i, name in enumerate(fitted.ids)}
    unknown = [name for name in study.ids if name not in place]
    if unknown:
        raise ValueError(
            f"expected a study of the subjects fitted; got new subjects {unknown[:5]}. For new "
            "subjects there are predict(..., population=True) and simulate(...)."
        )
    return np.array([place[name] for name in study.ids])


# Compiled once per model: a Joint is hashed by its identity.


def _laws(joint: Joint, theta, weights, eta, study: Study) -> dict[str, Any]:
    """The laws of the outcomes, `[subject, time]`."""
    # Without values: beside them, cells that were not observed hold the law of one that was.
    sites = joint.sites(joint.constrain(theta), weights, eta, study.unobserved())
    return {n: sites[n]["fn"] for n in joint.roles.outcomes if n in study.observed}


@partial(soon, static_argnums=0)
def _means(joint: Joint, theta, weights, eta, study):
    laws = _laws(joint, theta, weights, eta, study)
    return {name: jnp.where(study.recorded, _mean(law), jnp.nan) for name, law in laws.items()}


def _mean(law) -> jax.Array:
    """The mean of an outcome's law; of categories (NumPyro has none) that of their index."""
    inner = law
    while isinstance(inner, dist.Independent | dist.MaskedDistribution):
        inner = inner.base_dist
    if isinstance(inner, dist.CategoricalProbs):
        return inner.probs @ jnp.arange(inner.probs.shape[-1])
    return law.mean


@partial(soon, static_argnums=0)
def _individual(joint: Joint, theta, weights, eta, study):
    return joint.individual(theta, weights, eta, study)


@partial(soon, static_argnums=0)
def _simulate(joint: Joint, keys, thetas, weights, study):
    def one(arguments):
        key, theta = arguments
        key_eta, *keys_outcome = jax.random.split(key, 1 + len(joint.roles.outcomes))
        eta = joint.sample_effects(key_eta, theta, weights, study, 1)[0]
        laws = _laws(joint, theta, weights, eta, study)
        return {
            name: jnp.where(study.recorded, law.sample(k), jnp.nan)
            for k, (name, law) in zip(keys_outcome, laws.items(), strict=False)
        }

    return jax.lax.map(one, (keys, thetas))


@partial(soon, static_argnums=(0, 1, 2))
def _population(joint: Joint, count: int, gaussian: bool, keys, thetas, weights, study):
    def one(arguments):
        key, theta = arguments
        if gaussian:
            moments = joint.effect_moments(jax.random.key(0), theta, weights, study)
            eta = jax.random.multivariate_normal(key, *moments, (count, study.subjects.size))
        else:
            eta = joint.sample_effects(key, theta, weights, study, count)
        psi = jax.vmap(lambda e: joint.individual(theta, weights, e, study))(eta)
        return eta, {n: x[:, :, 0] if n in joint.roles.changing else x for n, x in psi.items()}

    return jax.lax.map(one, (keys, thetas))


@partial(soon, static_argnums=(0, 1))
def _conditional(joint: Joint, count: int, key, theta, weights, conditional: Conditional, study):
    broad = population_law(joint, theta, weights, study)
    nodes, effect = importance(key, conditional, broad, count)
    total = likelihood_at(joint, theta, weights, nodes, study) + effect + nodes.log_weight
    total = jnp.where(jnp.isnan(total), -jnp.inf, total)
    return nodes.eta, total - logsumexp(total, axis=0)
