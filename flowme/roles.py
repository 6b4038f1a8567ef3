"""What each site of a model is: population parameter, random effect, individual parameter, outcome.

Found by running the model once. Sites written with NumPyro's own statements are understood too:
a latent site in the plate "subject" is a random effect, any other latent one a population
parameter, an observed one in the plate an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

from flowme import plain
from flowme.effects import RandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.hierarchy import group_effects
from flowme.quick import quick
from flowme.study import Study


class PopulationSite(NamedTuple):
    """A population parameter: its support, value to start from and what it is called."""

    shape: tuple[int, ...]
    support: constraints.Constraint
    init: np.ndarray
    unit: str = ""
    label: str = ""
    effect: str = ""  # the random effect whose distribution it belongs to, if any


class Roles(NamedTuple):
    """The sites of a model by role, in the order of its statements."""

    population: dict[str, PopulationSite]
    weights: dict[str, np.ndarray]
    effects: dict[str, tuple[str, ...]]
    individual: dict[str, tuple[str, ...]]
    outcomes: tuple[str, ...]
    laws: dict[str, Any]  # what each random effect was declared with
    shapes: dict[str, tuple[int, ...]]  # event shape of each random effect
    present: dict[str, np.ndarray]  # of effects between occasions, [subject, occasion]
    changing: tuple[str, ...]  # sites of individual parameters that change in time
    groups: dict[str, tuple[str, ...]]  # effects of groups, and what their priors depend on

    @property
    def effect_names(self) -> tuple[str, ...]:
        """Names of all random effects, `[effect]`; with the site's name where there are several."""
        if len(self.effects) == 1:
            return next(iter(self.effects.values()))
        return tuple(f"{site}_{name}" for site, names in self.effects.items() for name in names)

    def components(self, effect: str) -> tuple[str, ...]:
        """Names of the components of the law of a random effect; of one between occasions, those
        of one occasion."""
        names = self.effects.get(effect, ())
        return self.laws[effect].names if effect in self.present else names

    def reported(self) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
        """The random effects as one reads them, those between occasions once: their names, where
        each stands among all, `[occasion]`, and the cells that count, `[subject, occasion]`."""
        found, start = [], 0
        for site, names in self.effects.items():
            parts = self.components(site)
            columns = start + np.arange(len(names)).reshape(-1, len(parts))
            start += len(names)
            for name, own in zip(parts, columns.T, strict=True):
                label = name if len(self.effects) == 1 else f"{site}_{name}"
                found.append((label, own, self.present.get(site)))
        return found


def roles(model: Callable, study: Study) -> Roles:
    """The roles of the sites of `model(study)`.

    Raises:
        ValueError: no random effect, a random effect that is not real-valued, no outcome, an
            outcome that is not one law per subject, observations outside their support, or a
            `numpyro.param` that no estimation here would move.
    """
    sites, declared = _trace(model, study)
    starts, wrong = _starts_and_wrong(model, study, sites)
    found = Roles({}, {}, {}, {}, (), declared, {}, {}, (), {})
    outcomes, changing = [], []
    for name, site in sites.items():
        about = _about(site)
        if site["type"] == "param":
            law = declared.get(name.removesuffix("_weights"))
            if law is None:
                raise ValueError(
                    f"expected every numpyro.param to be the weights of a flow; got {name!r}. "
                    f"Write fm.population({name!r}, ...) for a parameter to be estimated."
                )
            found.weights[name] = np.asarray(law.weights)
        elif site["type"] == "deterministic" and about.get("role") == "individual":
            found.individual[name] = about["names"]
            changing += [name] * about["changes"]
        elif site["type"] == "sample" and _per_subject(site):
            if site["is_observed"] or about.get("role") == "outcome":
                outcomes.append(name)
                _check_outcome(name, site, study, wrong.get(name))
            else:
                found.effects[name] = _check_effect(name, site, about)
                found.shapes[name] = tuple(site["value"].shape[1:])
                if "present" in about:
                    found.present[name] = np.asarray(about["present"])
        elif site["type"] == "sample" and not site["is_observed"]:
            found.population[name] = _population(site, about, starts.get(name))
    if not found.effects:
        raise ValueError(
            "expected a model with random effects; got none. Write one as "
            "fm.random_effect('eta', fm.GaussianRandomEffect([...]), study.subjects)."
        )
    if not outcomes:
        raise ValueError("expected a model with an outcome; got none. Write fm.observe(...).")
    many = [n for n, site in found.population.items() if site.shape and not site.effect]
    groups = group_effects(model, study, many, found.population)
    return found._replace(outcomes=tuple(outcomes), changing=tuple(changing), groups=groups)


def _trace(model: Callable, study: Study) -> tuple[dict[str, dict], dict[str, Any]]:
    """The sites of the model and the declared random effects, without computing anything; but
    where a support or a starting value was computed by JAX, its number is needed: then with."""
    found: dict[str, Any] = {}

    def run(values):
        # A prediction of 0 at a dose row, under a proportional error, is masked: not to matter.
        with validation_enabled(False), _Declared() as declared, values():
            found["sites"] = trace(seed(model, jax.random.key(0))).get_trace(study)
        found["declared"] = declared.laws

    jax.eval_shape(partial(run, _Unsampled))
    latent = (s for s in found["sites"].values() if s["type"] == "sample" and not s["is_observed"])
    needed: list[Any] = [
        [vars(s["fn"].support), _about(s).get("init")] for s in latent if not _per_subject(s)
    ]
    needed += [vars(law) for law in found["declared"].values() if isinstance(law, RandomEffect)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(needed)):
        run(nullcontext)
    return found["sites"], found["declared"]


def _starts_and_wrong(model, study: Study, sites: dict[str, dict]) -> tuple[dict, dict]:
    """What `_inspect` says, by NumPy if that has all of it."""
    starts, outside = {}, {}
    for name, site in sites.items():
        if _has_no_start(site):
            _check_start(name, site["fn"])
            starts[name] = plain.median(site["fn"])
        elif _has_values(name, site, study):
            outside[name] = plain.outside(_innermost(site["fn"]), study.values[name])
    if any(x is None for x in (*starts.values(), *outside.values())):
        return jax.tree.map(np.asarray, _inspect(model, study))
    return starts, {name: study.observed[name] & x for name, x in outside.items()}


def _has_no_start(site: dict) -> bool:
    latent = site["type"] == "sample" and not (_per_subject(site) or site["is_observed"])
    return latent and _about(site).get("init") is None


def _has_values(name: str, site: dict, study: Study) -> bool:
    observed = site["type"] == "sample" and site["is_observed"]
    return observed and _per_subject(site) and name in study.values


@partial(quick, static_argnums=0)
def _inspect(model: Callable, study: Study) -> tuple[dict, dict]:
    """Medians of the population parameters that have no starting value, and which observations lie
    outside the support of their law, `[subject, time]`."""
    with validation_enabled(False):
        sites = trace(seed(model, jax.random.key(0))).get_trace(study)
    medians, wrong = {}, {}
    for name, site in sites.items():
        if _has_no_start(site):
            medians[name] = _median(site["fn"])
        elif _has_values(name, site, study):
            values, mask = study.values[name], study.observed[name]
            inside = _innermost(site["fn"]).support(jnp.asarray(values))
            wrong[name] = mask & ~jnp.broadcast_to(inside, mask.shape)
    return medians, wrong


def _median(law: dist.Distribution) -> jax.Array:
    """The median; where there is no formula of 1000 draws, taken where the parameter is
    unconstrained so that it stays in its support."""
    try:
        return jnp.broadcast_to(law.icdf(jnp.full(law.batch_shape, 0.5)), law.shape())
    except (NotImplementedError, AttributeError):
        to = biject_to(law.support)
        return to(jnp.median(to.inv(law.sample(jax.random.key(0), (1000,))), axis=0))


def _check_start(name: str, law: dist.Distribution) -> None:
    inner = _bare(law)
    if law.is_discrete or isinstance(inner, dist.ImproperUniform):
        raise ValueError(
            f"expected a continuous prior of {name!r} that values can be drawn from; got "
            f"{type(inner).__name__}. Say where to start, as in fm.population({name!r}, ..., "
            "init=...), or take another prior."
        )


def _innermost(law: dist.Distribution) -> dist.Distribution:
    while hasattr(law, "base_dist") and law.event_shape:
        law = law.base_dist
    return law


class _Unsampled(Messenger):
    """Values that nobody will look at, where the model would draw some."""

    def process_message(self, msg):
        if msg["type"] == "sample" and msg["value"] is None:
            law = msg["fn"]
            dtype = int if law.is_discrete else float
            msg["value"] = jnp.zeros(law.shape(msg["kwargs"]["sample_shape"]), dtype)


def _bare(law: dist.Distribution) -> dist.Distribution:
    while isinstance(inner := getattr(law, "base_dist", None), dist.Distribution):
        law = inner
    return law


class _Declared(Messenger):
    """Notes the distribution that each `random_effect` statement was given."""

    def __enter__(self):
        self.laws: dict[str, Any] = {}
        super().__enter__()
        return self

    def postprocess_message(self, msg):
        if msg["type"] == "random_effect":
            law = msg["value"]
            # Covariates are of the study at hand: what is kept of the law holds for any.
            self.laws[msg["effect"]] = law.typical() if isinstance(law, FlowRandomEffect) else law


def _about(site: dict) -> dict[str, Any]:
    return (site.get("infer") or {}).get("flowme", {})


def _per_subject(site: dict) -> bool:
    return any(frame.name == "subject" for frame in site["cond_indep_stack"])


def _population(site: dict, about: dict, median: np.ndarray | None) -> PopulationSite:
    law, init = site["fn"], about.get("init")
    init = median if init is None else init
    return PopulationSite(
        tuple(law.shape()),
        law.support,
        np.broadcast_to(np.asarray(init, float), law.shape()),
        about.get("unit", ""),
        about.get("label", ""),
        about.get("effect", ""),
    )


def _check_effect(name: str, site: dict, about: dict) -> tuple[str, ...]:
    law = site["fn"]
    support = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support not in (constraints.real, constraints.real_vector):
        raise ValueError(
            f"expected random effect {name!r} to be real-valued; got the support {law.support}. "
            "Let the model transform it, as in V * exp(eta.V)."
        )
    size = int(np.prod(site["value"].shape[1:], dtype=int))
    return about.get("names", tuple(f"{name}{j + 1}" for j in range(size)) if size > 1 else (name,))


def _check_outcome(name: str, site: dict, study: Study, wrong: np.ndarray | None) -> None:
    law, size = site["fn"], study.subjects.size
    if law.batch_shape != (size,):
        raise ValueError(
            f"expected outcome {name!r} to have one law per subject, batch shape [{size}]; got "
            f"{list(law.batch_shape)}. Write fm.observe(...), or add .to_event(1)."
        )
    if wrong is None:
        return
    values, inner = np.asarray(study.values[name]), _innermost(law)
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        support = inner.support if plain.ours(inner) else type(_bare(inner)).__name__
        raise ValueError(
            f"expected observations of {name!r} in the support of their law, {support}; got "
            f"{values[i, j]:g} for subject {study.subjects.ids[i]} at time {study.time[i, j]:g}"
            f"{f' (and {wrong.sum() - 1} more)' if wrong.sum() > 1 else ''}."
        )
