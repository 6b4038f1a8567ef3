"""What each site of a model is: population parameter, random effect, individual parameter, outcome.

Found by running the model once. Sites written with NumPyro's own statements are understood too:
a latent site in the plate "subject" is a random effect, any other latent one a population
parameter, an observed one in the plate an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

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

    @property
    def effect_names(self) -> tuple[str, ...]:
        """Names of all random effects, `[effect]`; with the site's name where there are several."""
        if len(self.effects) == 1:
            return next(iter(self.effects.values()))
        return tuple(f"{site}_{name}" for site, names in self.effects.items() for name in names)


def roles(model: Callable, study: Study) -> Roles:
    """The roles of the sites of `model(study)`.

    Raises:
        ValueError: no random effect, a random effect that is not real-valued, no outcome, an
            outcome that is not one law per subject, observations outside their support, or a
            `numpyro.param` that no estimation here would move.
    """
    # A prediction of 0 at a dose row, under a proportional error, is masked and must not matter.
    with validation_enabled(False), _Declared() as declared:
        sites = trace(seed(model, jax.random.key(0))).get_trace(study)
    found = Roles({}, {}, {}, {}, (), declared.laws, {})
    outcomes = []
    for name, site in sites.items():
        about = _about(site)
        if site["type"] == "param":
            if name.removesuffix("_weights") not in declared.laws:
                raise ValueError(
                    f"expected every numpyro.param to be the weights of a flow; got {name!r}. "
                    f"Write fm.population({name!r}, ...) for a parameter to be estimated."
                )
            found.weights[name] = np.asarray(site["value"])
        elif site["type"] == "deterministic" and about.get("role") == "individual":
            found.individual[name] = about["names"]
        elif site["type"] == "sample" and _per_subject(site):
            if site["is_observed"] or about.get("role") == "outcome":
                outcomes.append(name)
                _check_outcome(name, site, study)
            else:
                found.effects[name] = _check_effect(name, site, about)
                found.shapes[name] = tuple(site["value"].shape[1:])
        elif site["type"] == "sample" and not site["is_observed"]:
            found.population[name] = _population(site, about)
    if not found.effects:
        raise ValueError(
            "expected a model with random effects; got none. Write one as "
            "fm.random_effect('eta', fm.GaussianRandomEffect([...]), study.subjects)."
        )
    if not outcomes:
        raise ValueError("expected a model with an outcome; got none. Write fm.observe(...).")
    return found._replace(outcomes=tuple(outcomes))


class _Declared(Messenger):
    """Notes the distribution that each `random_effect` statement was given."""

    def __enter__(self):
        self.laws: dict[str, Any] = {}
        super().__enter__()
        return self

    def postprocess_message(self, msg):
        if msg["type"] == "random_effect":
            self.laws[msg["effect"]] = msg["value"]


def _about(site: dict) -> dict[str, Any]:
    return (site.get("infer") or {}).get("flowme", {})


def _per_subject(site: dict) -> bool:
    return any(frame.name == "subject" for frame in site["cond_indep_stack"])


def _population(site: dict, about: dict) -> PopulationSite:
    law = site["fn"]
    init = about.get("init")
    if init is None:
        # The median, taken where the parameter is unconstrained so that it stays in its support.
        to = biject_to(law.support)
        draws = to.inv(law.sample(jax.random.key(0), (1000,)))
        init = to(jnp.median(draws, axis=0))
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


def _check_outcome(name: str, site: dict, study: Study) -> None:
    law, size = site["fn"], study.subjects.size
    if law.batch_shape != (size,):
        raise ValueError(
            f"expected outcome {name!r} to have one law per subject, batch shape [{size}]; got "
            f"{list(law.batch_shape)}. Write fm.observe(...), or add .to_event(1)."
        )
    if name not in study.values or not site["is_observed"]:
        return
    values, mask = np.asarray(study.values[name]), np.asarray(study.observed[name])
    inner = law
    while hasattr(inner, "base_dist") and inner.event_shape:
        inner = inner.base_dist
    wrong = mask & ~np.broadcast_to(np.asarray(inner.support(values)), mask.shape)
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        raise ValueError(
            f"expected observations of {name!r} in the support of their law, {inner.support}; got "
            f"{values[i, j]:g} for subject {study.subjects.ids[i]} at time {study.time[i, j]:g}"
            f"{f' (and {wrong.sum() - 1} more)' if wrong.sum() > 1 else ''}."
        )
