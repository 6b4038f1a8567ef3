"""Results of any inference as one ArviZ object, with named dimensions."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpyro.distributions import constraints
from numpyro.infer import MCMC

from flowme.infer.conditional import Conditional, importance, log_mean, population_law, resample
from flowme.infer.evaluate import shifted
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights
from flowme.infer.references import References, find
from flowme.mixture_effect import MixtureRandomEffect
from flowme.predict import (
    Result,
    conditional_nodes,
    mcmc_draws,
    population_draws,
    predict,
)
from flowme.quick import soon
from flowme.roles import PopulationSite
from flowme.study import Study


def to_arviz(result: Result, key: jax.Array | None = None, *, draws: int = 500) -> Any:
    """A fit or an MCMC run as an ArviZ object: `InferenceData` of ArviZ 0.x, `DataTree` of 1.x.

    Groups, with the dimensions chain, draw, subject, time (number of the record), effect,
    parameter, component:

    - `posterior`: population parameters, η and ψ. Of a fit: θ from the normal approximation
      N(θ̂, I⁻¹) of the estimate, unconstrained; η_i from p(η_i | y_i; θ̂); ψ_i = ψ(η_i; θ̂).
    - `log_likelihood`: log p(y_i; θ) of every draw of θ, with η_i integrated out.
    - `sample_stats` (MCMC only): divergences, energy, lp, steps, acceptance.
    - `observed_data`, `constant_data`: what was measured (NaN where not), when, covariates.
    - `population`: 10 000 draws of η and ψ of new subjects from the fitted law, `[sample, ...]`.
    - `predictions`: `pred_<outcome>` at η = 0 and `ipred_<outcome>` at the conditional means.

    The log-likelihood is the marginal one because `az.loo` and `az.compare` then leave out a
    subject. Given its own η_i, a subject's likelihood says how well data already seen can be
    followed, which favours the wider law of η; and as η_i has no data but y_i, leaving these out
    changes it so much that importance weights fail.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        key: random key; `jax.random.key(0)` by default.
        draws: draws of a fit; an MCMC run has its own.
    """
    # Here because importing ArviZ takes seconds, which a fit should not wait for.
    import arviz as az

    if draws < 4:
        raise ValueError(f"expected at least 4 draws; got {draws}.")
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    drawn = _fit_draws(keys[0], result, draws) if isinstance(result, Fit) else _chains(result)
    names = Names.of(drawn.joint, drawn.study)
    groups = {
        "posterior": names.dataset(_posterior(drawn), ("chain", "draw"), drawn.about),
        "log_likelihood": names.dataset(_log_likelihood(keys[1], drawn), ("chain", "draw")),
        "observed_data": names.dataset(_observed(drawn.study)),
        "constant_data": names.dataset(_constant(drawn.study)),
        "predictions": names.dataset(_predictions(result)),
        "population": names.dataset(_population(keys[2], result, drawn.joint), ("sample",)),
    }
    if isinstance(result, MCMC):
        groups["sample_stats"] = names.dataset(_sample_stats(result), ("chain", "draw"))
    if az.__version__.startswith("0."):
        return az.InferenceData(attrs=drawn.about, **groups)  # type: ignore
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=drawn.about), **groups})


def reported(joint: Joint, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Population parameters as one reads them: correlations for their Cholesky factors, the
    means of all components of a mixture, and no flow weights.

    Args:
        joint: the model.
        values: population parameters by site, on their own scale.
    """
    found = {}
    for name, site in _reported_sites(joint).items():
        value = values[name]
        if _is_correlation(site):
            value = value @ jnp.swapaxes(value, -1, -2)
        elif name == f"{site.effect}_locs" and _is_mixture(joint, site):
            law, probs = joint.roles.laws[site.effect], values[f"{site.effect}_probs"]
            value = law.with_parameters(probs=probs, locs=value).component_means
        found[_reported_name(name, site)] = value
    return found


class Names(NamedTuple):
    """The dimensions of every variable and the coordinates of every dimension.

    `parameters` are the population parameters as reported, in the order of the model.
    """

    parameters: tuple[str, ...]
    dims: dict[str, tuple[str, ...]]
    coords: dict[str, np.ndarray]
    units: dict[str, str]

    @classmethod
    def of(cls, joint: Joint, study: Study) -> Names:
        roles = joint.roles
        ids = np.array(study.ids)
        coords: dict[str, np.ndarray] = {
            "subject": ids.astype(str) if ids.dtype == object else ids,
            "time": np.arange(1, study.time.shape[1] + 1),
        }
        dims: dict[str, tuple[str, ...]] = {}
        units, parameters = dict(study.units), []
        for name in roles.effects:
            dim, occasion = _dim("effect", name, roles.effects), _occasion(joint, name)
            dims[name] = ("subject", *occasion, dim)
            coords |= {dim: np.array(roles.components(name)), **occasion}
        for name, names in roles.individual.items():
            dim = _dim("parameter", name, roles.individual)
            dims[name] = ("subject", *["time"] * (name in roles.changing), dim)
            coords[dim] = np.array(names)
        for name, site in _reported_sites(joint).items():
            found = _parameter_dims(joint, name, site)
            name = _reported_name(name, site)
            dims[name] = tuple(found)
            coords |= {dim: np.array(names) for dim, names in found.items()}
            units[name] = site.unit
            parameters.append(name)
        return cls(tuple(parameters), dims, coords, units)

    def dataset(
        self,
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]],
        sample: tuple[str, ...] = (),
        about: dict[str, Any] | None = None,
    ) -> xr.Dataset:
        """A group: each variable with its dimensions after those of `sample`."""
        arrays: dict[str, xr.DataArray] = {}
        used: dict[str, np.ndarray] = {}
        for name, (dims, value) in variables.items():
            value = np.asarray(value)
            attrs = {"units": self.units[name]} if self.units.get(name) else {}
            arrays[name] = xr.DataArray(value, dims=(*sample, *dims), attrs=attrs)
            used |= dict(zip(sample, map(np.arange, value.shape), strict=False))
            used |= {dim: self.coords[dim] for dim in dims}
        return xr.Dataset(arrays, coords=used, attrs=about)


class _Drawn(NamedTuple):
    """Draws, and the θ₀ and Gaussians around which their marginal likelihood is integrated."""

    joint: Joint
    study: Study
    weights: Weights
    theta: jax.Array  # [chain, draw, parameter]
    eta: jax.Array  # [chain, draw, subject, effect]
    psi: dict[str, jax.Array]  # [chain, draw, subject, parameter]
    references: References
    theta0: jax.Array
    conditional: Conditional
    about: dict[str, Any]


_POINTS = 256  # nodes per subject of the marginal likelihood


def _fit_draws(key: jax.Array, fit: Fit, draws: int) -> _Drawn:
    key_theta, key_nodes, key_choice = jax.random.split(key, 3)
    covariance = fit.covariance()
    theta = jnp.broadcast_to(fit.theta, (draws, fit.joint.size))
    text = "population parameters: the estimate repeated, its covariance is not available"
    if covariance is not None:
        noise = jax.random.normal(key_theta, theta.shape)
        theta = theta + noise @ jnp.linalg.cholesky(covariance).T
        text = "population parameters: asymptotic normal distribution of the estimate"
    nodes, log_share = conditional_nodes(key_nodes, fit, _POINTS)
    eta, psi = _resampled(
        fit.joint, draws, key_choice, nodes, log_share, fit.theta, fit.weights, fit.study
    )
    found = find(fit.joint, fit.theta, fit.weights, fit.study)
    about = {
        "inference_library": "flowme",
        "inference": f"VariationalEM, {'MAP' if fit.use_priors else 'maximum likelihood'}",
        "draws": f"{text}; random effects: conditional distributions at the estimate",
        "converged": int(fit.converged),
        "minus_two_ll": fit.minus_two_ll,
    }
    theta, eta, psi = jax.tree.map(lambda x: x[None], (theta, eta, psi))  # one chain
    return _Drawn(
        fit.joint, fit.study, fit.weights, theta, eta, psi, found, fit.theta, fit.conditional,
        about,
    )  # fmt: skip


def _chains(mcmc: MCMC) -> _Drawn:
    draws = mcmc_draws(mcmc)
    joint, study, weights = draws.joint, draws.study, draws.weights
    theta0 = draws.theta.mean((0, 1))
    found = find(joint, theta0, weights, study)
    # η as it would be at θ₀ with the same ψ: known better than η itself, and the nodes of the
    # marginal likelihood move back with θ.
    shift = (draws.theta - theta0) @ jnp.asarray(found.matrix(joint)).T
    eta = draws.eta + shift[:, :, None]
    mean = eta.mean((0, 1))
    covariance = jnp.einsum("cnsd,cnse->sde", eta - mean, eta - mean) / (eta[..., 0, 0].size - 1)
    jitter = 1e-8 * jnp.trace(covariance, axis1=1, axis2=2)[:, None, None]
    tril = jnp.linalg.cholesky(covariance + (jitter + 1e-12) * jnp.eye(joint.effect_size))
    samples = mcmc.get_samples(group_by_chain=True)
    psi = {name: samples[name] for name in joint.roles.individual}
    about = {
        "inference_library": "flowme",
        "inference": f"{type(mcmc.sampler).__name__} of NumPyro {version('numpyro')}",
        "draws": "posterior distribution of all parameters",
    }
    return _Drawn(
        joint, study, weights, draws.theta, draws.eta, psi, found, theta0,
        Conditional(mean, tril), about,
    )  # fmt: skip


@partial(soon, static_argnums=(0, 1))
def _resampled(joint: Joint, draws: int, key, nodes, log_share, theta, weights, study):
    """Draws of weighted nodes, η `[draw, subject, effect]` and ψ by site; NaN for a subject none
    of whose nodes has a share."""
    eta = resample(key, nodes, log_share, draws)
    eta = jnp.where(jnp.isfinite(log_share).any(0)[:, None], eta, jnp.nan)
    return eta, jax.vmap(lambda e: joint.individual(theta, weights, e, study))(eta)


def _posterior(drawn: _Drawn) -> dict[str, tuple]:
    joint = drawn.joint

    def at(theta):
        return reported(joint, joint.constrain(theta))

    values = soon(jax.vmap(jax.vmap(at)))(drawn.theta)
    values |= {**_by_site(joint, drawn.eta), **drawn.psi}
    for name, present in joint.roles.present.items():  # no occasion, no random effect
        values[name] = jnp.where(present[..., None], values[name], jnp.nan)
    names = Names.of(joint, drawn.study)
    # In the order of the model: jit sorts by name.
    order = [*names.parameters, *joint.roles.effects, *joint.roles.individual]
    return {name: (names.dims[name], values[name]) for name in order}


def _by_site(joint: Joint, eta: Any) -> dict[str, Any]:
    """η `[..., effect]` by site; between occasions `[..., occasion, effect]`."""
    ends = np.cumsum([len(names) for names in joint.roles.effects.values()])[:-1]
    found = dict(zip(joint.roles.effects, jnp.split(jnp.asarray(eta), ends, -1), strict=True))
    for name, present in joint.roles.present.items():
        found[name] = found[name].reshape(*found[name].shape[:-1], present.shape[1], -1)
    return found


def _log_likelihood(key: jax.Array, drawn: _Drawn) -> dict[str, tuple]:
    thetas = drawn.theta.reshape(-1, drawn.theta.shape[-1])
    # Many draws at once while they fit: what does not depend on θ (an ODE) is then solved once.
    cells = _POINTS * int(np.prod(drawn.study.time.shape))
    values = _marginal(
        drawn.joint, drawn.references, max(1, 2_000_000 // cells), key, drawn.theta0, thetas,
        drawn.weights, drawn.conditional, drawn.study,
    )  # fmt: skip
    outcomes = drawn.joint.roles.outcomes
    name = outcomes[0] if len(outcomes) == 1 else "y"
    return {name: (("subject",), values.reshape(*drawn.theta.shape[:2], -1))}


@partial(soon, static_argnums=(0, 1, 2))
def _marginal(joint, references, batch, key, theta0, thetas, weights, conditional, study):
    """log p(y_i; θ) at each θ, `[draw, subject]`."""
    broad = population_law(joint, theta0, weights, study)
    nodes, _ = importance(key, conditional, broad, _POINTS)
    likelihood, density = shifted(joint, references, theta0, weights, study)
    free, own = references.of_likelihood(joint), references.of_density(joint)

    def marginal(theta):
        return log_mean(
            likelihood(theta[free], nodes.eta), density(theta[own], nodes.eta), nodes.log_weight
        )

    return jax.lax.map(marginal, thetas, batch_size=batch)


def _sample_stats(mcmc: MCMC) -> dict[str, tuple]:
    fields = mcmc.get_extra_fields(group_by_chain=True)
    names = {"num_steps": "n_steps", "accept_prob": "acceptance_rate"}
    stats = {names.get(k, k): np.asarray(v) for k, v in fields.items() if v.ndim == 2}
    if "potential_energy" in stats:
        stats["lp"] = -stats.pop("potential_energy")
    if "n_steps" in stats:
        stats["tree_depth"] = np.log2(stats["n_steps"]).astype(int) + 1
    return {name: ((), value) for name, value in stats.items()}


def _observed(study: Study) -> dict[str, tuple]:
    return {
        name: (("subject", "time"), np.where(study.observed[name], study.values[name], np.nan))
        for name in study.values
    }


def _constant(study: Study) -> dict[str, tuple]:
    dims = ("subject", "time")
    return {
        "time_of_record": (dims, np.where(study.recorded, study.time, np.nan)),
        **{name: (dims[: np.ndim(x)], x) for name, x in study.covariates.items()},
        **{f"censored_{name}": (dims, x) for name, x in study.censored.items()},
        **{f"limit_{name}": (dims, x) for name, x in study.limit.items()},
    }


def _predictions(result: Result) -> dict[str, tuple]:
    kinds = {"pred": predict(result, population=True), "ipred": predict(result)}
    return {
        f"{kind}_{name}": (("subject", "time"), value)
        for kind, values in kinds.items()
        for name, value in values.items()
    }


def _population(key: jax.Array, result: Result, joint: Joint) -> dict[str, tuple]:
    eta, psi = population_draws(key, result)
    values = {**_by_site(joint, eta), **psi}
    values |= {name: values[name][:, 0] for name in joint.roles.present}  # all have the same law
    sites = {"effect": joint.roles.effects, "parameter": joint.roles.individual}
    return {
        name: ((_dim(kind, name, found),), values[name])
        for kind, found in sites.items()
        for name in found
    }


# Names of dimensions.


def _dim(kind: str, site: str, sites: dict[str, Any]) -> str:
    return kind if len(sites) == 1 else f"{site}_{kind}"


def _occasion(joint: Joint, name: str) -> dict[str, np.ndarray]:
    """The axis of occasions of a random effect, if it has one."""
    present = joint.roles.present
    if name not in present:
        return {}
    return {_dim("occasion", name, present): np.arange(1, present[name].shape[1] + 1)}


def _parameter_dims(joint: Joint, name: str, site: PopulationSite) -> dict[str, Any]:
    """Dimensions of a population parameter, as reported, and their coordinates."""
    effects = joint.roles.effects
    names = joint.roles.components(site.effect) or joint.roles.effect_names
    effect = _dim("effect", site.effect, effects) if site.effect else "effect"
    known: dict[str, Any] = {effect: names, f"{effect}_bis": names}
    if site.effect and _is_mixture(joint, site):
        count = joint.roles.laws[site.effect].components
        known = {_dim("component", site.effect, effects): np.arange(1, count + 1), **known}
    elif not _is_correlation(site) and not (site.effect and site.shape == (len(names),)):
        ends = [str(k + 1) for k in range(len(site.shape))] if len(site.shape) > 1 else [""]
        known = {
            f"{name}_element{end}": np.arange(1, n + 1)
            for end, n in zip(ends, site.shape, strict=False)
        }
    return dict(list(known.items())[: len(site.shape)])


def _reported_sites(joint: Joint) -> dict[str, PopulationSite]:
    sampled_weights = {f"{effect}_weights" for effect in joint.roles.laws}
    sites = joint.roles.population.items()
    return {name: site for name, site in sites if name not in sampled_weights}


def _reported_name(name: str, site: PopulationSite) -> str:
    if not _is_correlation(site):
        return name
    stem = name.removesuffix("_cholesky")
    return stem if stem != name else f"{name}_corr"


def _is_correlation(site: PopulationSite) -> bool:
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.corr_cholesky


def _is_mixture(joint: Joint, site: PopulationSite) -> bool:
    return isinstance(joint.roles.laws.get(site.effect), MixtureRandomEffect)
