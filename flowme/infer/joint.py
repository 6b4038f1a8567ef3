"""A model as functions of its unknowns: log p(y_i | η_i; θ), log p(η_i; θ), log p(θ).

θ is the vector of all population parameters, each on its unconstrained scale, `[parameter]`; w the
weights of the flows, by site; η the random effects of all sites side by side, `[subject, effect]`.
Subjects are independent given θ and w, so every function is written for all of them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from flowme import plain
from flowme.effects import RandomEffect
from flowme.quick import quick
from flowme.recorded import recorded
from flowme.roles import Roles, roles
from flowme.study import Study
from flowme.where import where

Weights = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """The joint density of `model`, whose sites play the roles `roles`.

    Two are equal when programs compiled for one serve the other.
    """

    model: Callable
    roles: Roles

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Joint):
            return NotImplemented
        return self.model == other.model and self.signature == other.signature

    def __hash__(self) -> int:
        return hash((self.model, self.signature))

    @classmethod
    def of(cls, model: Callable, study: Study) -> Joint:
        return cls(model, roles(model, study))

    def on(self, study: Study) -> Joint:
        """The same model of another study, which may have more occasions, or fewer."""
        return Joint.of(self.model, study) if self.roles.present else self

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each population parameter stands in θ."""
        found, start = {}, 0
        for name, site in self.roles.population.items():
            size = math.prod(biject_to(site.support).inverse_shape(site.shape))
            found[name] = slice(start, start + size)
            start += size
        return found

    @cached_property
    def signature(self) -> tuple:
        """What a compiled program of this model depends on besides the shape of its arguments."""
        roles = self.roles
        shapes = tuple(
            (name, site.shape, site.effect, repr(site.support))
            for name, site in roles.population.items()
        )
        laws = tuple((name, type(law).__name__) for name, law in roles.laws.items())
        return shapes, laws, tuple(roles.weights), tuple(roles.effects.items()), roles.outcomes

    @property
    def size(self) -> int:
        """Length of θ."""
        return max((s.stop for s in self.slices.values()), default=0)

    @property
    def effect_size(self) -> int:
        """Number of random effects per subject."""
        return len(self.roles.effect_names)

    def constrain(
        self, theta: jax.Array, names: Iterable[str] | None = None
    ) -> dict[str, jax.Array]:
        """Population parameters by name, on their own scale, from θ; or these alone, from their
        parts of it side by side."""
        values, start = {}, 0
        for name in self.roles.population if names is None else names:
            site = self.roles.population[name]
            to = biject_to(site.support)
            shape = to.inverse_shape(site.shape)
            stop = start + math.prod(shape)
            values[name] = to(theta[start:stop].reshape(shape))
            start = stop
        return values

    def unconstrain(self, values: dict[str, Any]) -> jax.Array:
        """θ from population parameters by name; those left out take their starting values."""
        unknown = set(values) - set(self.roles.population)
        if unknown:
            raise ValueError(
                f"expected population parameters among {sorted(self.roles.population)}; got "
                f"{sorted(unknown)}."
            )
        population = self.roles.population.items()
        given = {name: np.asarray(values.get(name, site.init), float) for name, site in population}
        fits = {name: given[name].shape == site.shape for name, site in population}
        theta: Any = None
        if all(fits.values()):
            theta, fits = _theta(self, given)
        for name, site in population:
            if not fits[name]:
                raise ValueError(
                    f"expected {name!r} of shape {list(site.shape)} strictly within its support, "
                    f"{site.support}; got {values.get(name, site.init)}."
                )
        return theta

    def split(self, eta: jax.Array) -> dict[str, jax.Array]:
        """η `[subject, effect]` by site."""
        values, start = {}, 0
        for name, names in self.roles.effects.items():
            part = eta[:, start : start + len(names)]
            values[name] = part.reshape(eta.shape[0], *self.roles.shapes[name])
            start += len(names)
        return values

    def sites(self, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study):
        """The trace of the model at these values."""
        data = {**values, **weights, **self.split(eta)}
        # Outcomes of a study without values are drawn; the key is fixed for want of a better.
        model = seed(substitute(self.model, data=data), jax.random.key(0))
        return trace(model).get_trace(study)

    def terms(
        self, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study
    ) -> tuple[jax.Array, jax.Array]:
        """log p(y_i | η_i; θ) and log p(η_i; θ), each `[subject]`."""
        sites = self.sites(values, weights, eta, study)
        zero = jnp.zeros(eta.shape[0])
        likelihood = sum((_log_prob(sites[name]) for name in self.roles.outcomes), zero)
        effect = sum((_log_prob(sites[name]) for name in self.roles.effects), zero)
        return likelihood, effect

    def likelihood(
        self, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study
    ) -> jax.Array:
        """log p(y_i | η_i; θ), `[subject]`."""
        x, log_prob, _ = self.predicted(values, weights, eta, study)
        # Kept apart, else XLA writes the structural model into every loop that reads x.
        return log_prob(jax.lax.optimization_barrier(x))

    def effect_density(
        self, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study
    ) -> jax.Array:
        """log p(η_i; θ), `[subject]`; the model is not followed beyond its random effects."""
        zero = jnp.zeros(eta.shape[0])
        sites = self._effect_sites(values, weights, eta, study)
        return sum((_log_prob(site) for site in sites), zero)

    def predicted(
        self, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study
    ) -> tuple[list[jax.Array], Callable[[list[jax.Array]], jax.Array], list[bool]]:
        """The parameters x of the outcomes' laws (predictions, error sizes), the function
        x -> log p(y_i | x) `[subject]`, and which of x are positive by what they are. What the
        model reads besides its study is remembered, as by any program of JAX's."""
        parts, then = _outcomes(self, values, weights, eta, study)

        def log_prob(x):
            return then([Part(y, part.positive) for y, part in zip(x, parts, strict=True)])

        return [part.value for part in parts], log_prob, [part.positive for part in parts]

    def log_prior(self, theta: jax.Array, study: Study) -> jax.Array:
        """log p(θ) on the parameters' own scale, no Jacobian: the penalty of MAP estimation."""
        eta = jnp.zeros((study.subjects.size, self.effect_size))
        weights = {name: jnp.asarray(w) for name, w in self.roles.weights.items()}
        sites = self.sites(self.constrain(theta), weights, eta, study)
        per_subject = {*self.roles.outcomes, *self.roles.effects}
        return sum(
            (
                jnp.sum(_log_prob(site))
                for name, site in sites.items()
                if site["type"] == "sample" and name not in per_subject
            ),
            jnp.zeros(()),
        )

    def priors(self, study: Study) -> dict[str, dist.Distribution]:
        """The priors of the population parameters by name, where none depends on another."""
        some = jax.tree.map(lambda x: x[:1], study)
        eta, values = jnp.zeros((1, self.effect_size)), self.constrain(self.unconstrain({}))
        sites = self._first(self.roles.population, values, start_weights(self), eta, some)
        return {name: site["fn"] for name, site in sites.items()}

    def laws(self, theta: jax.Array, weights: Weights, study: Study) -> list[Any]:
        """The distributions of the random effects, one per site, of batch shape `[subject]`."""
        return self.laws_at(self.constrain(theta), weights, study)

    def laws_at(self, values: dict[str, jax.Array], weights: Weights, study: Study) -> list[Any]:
        """The same, at population parameters by name."""
        eta = jnp.zeros((study.subjects.size, self.effect_size))
        return [site["fn"] for site in self._effect_sites(values, weights, eta, study)]

    def effect_sites(self, theta: jax.Array, weights: Weights, study: Study) -> list[dict]:
        """The sites of the random effects, at η = 0."""
        eta = jnp.zeros((study.subjects.size, self.effect_size))
        return self._effect_sites(self.constrain(theta), weights, eta, study)

    def _effect_sites(self, values, weights, eta, study) -> list[dict]:
        return list(self._first(self.roles.effects, values, weights, eta, study).values())

    def _first(self, names, values, weights, eta, study) -> dict[str, dict]:
        """These sites; the model is left once all of them are known."""
        data = {**values, **weights, **self.split(eta)}
        model = seed(substitute(self.model, data=data), jax.random.key(0))
        seen = _Until(names)
        with contextlib.suppress(_Known), seen:
            model(study)
        return {name: seen.sites[name] for name in names}

    def sample_effects(
        self, key: jax.Array, theta: jax.Array, weights: Weights, study: Study, count: int
    ) -> jax.Array:
        """`count` draws of every subject's η from the population, `[draw, subject, effect]`."""
        return draws_of(self.laws(theta, weights, study), key, count)

    def effect_moments(
        self, key: jax.Array, theta: jax.Array, weights: Weights, study: Study
    ) -> tuple[jax.Array, jax.Array]:
        """E η `[effect]` and Cov η `[effect, effect]`: by formula, or from 4096 draws."""
        means, blocks = [], []
        laws = self.laws(theta, weights, study)
        for k, law in zip(jax.random.split(key, len(laws)), laws, strict=True):
            inner = getattr(law, "base_dist", law)
            if isinstance(inner, RandomEffect):
                mean, covariance = inner.mean, inner.covariance_matrix
                if inner.batch_shape:  # over all subjects, as below
                    between = jnp.cov(mean, rowvar=False, bias=True)
                    mean, covariance = mean.mean(0), covariance.mean(0) + jnp.atleast_2d(between)
            else:
                # Over all subjects: the law may depend on their covariates.
                each = -(-4096 // study.subjects.size)
                draws = law.sample(k, (each,)).reshape(each * study.subjects.size, -1)
                mean, covariance = draws.mean(0), jnp.atleast_2d(jnp.cov(draws, rowvar=False))
            means.append(mean)
            blocks.append(covariance)
        return jnp.concatenate(means), jax.scipy.linalg.block_diag(*blocks)

    def individual(
        self, theta: jax.Array, weights: Weights, eta: jax.Array, study: Study
    ) -> dict[str, jax.Array]:
        """Individual parameters by site, `[subject, parameter]`, or `[subject, time, parameter]`
        where they change in time."""
        sites = self._first(self.roles.individual, self.constrain(theta), weights, eta, study)
        return {name: site["value"] for name, site in sites.items()}


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["positive"])
@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter of the law of an outcome, and whether it is positive by what it is."""

    value: jax.Array
    positive: bool


def outcomes(
    joint: Joint, values: dict[str, jax.Array], weights: Weights, eta: jax.Array, study: Study
) -> tuple[list[Part], Callable[[list[Part]], jax.Array]]:
    """The parameters of the outcomes' laws, and log p(y_i) `[subject]` of such."""
    sites = joint.sites(values, weights, eta, study)
    found = [sites[name] for name in joint.roles.outcomes]
    # Where nobody has an outcome, its masked density may be that of an impossible law: a NaN,
    # whose derivatives are not to be followed.
    seen = [jnp.any(study.observed.get(name, True)) for name in joint.roles.outcomes]
    leaves, tree = jax.tree.flatten([site["fn"] for site in found])
    numbers = jax.tree.unflatten(tree, range(len(leaves)))
    order = {i: k for k, law in enumerate(numbers) for i in _by_name(law)}
    moving = [i for i in order if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.inexact)]
    if not moving:
        raise ValueError(
            "expected a law of the outcomes with a parameter that is a real number; got "
            f"{', '.join(map(repr, joint.roles.outcomes))} without."
        )
    positive = [flag for site in found for flag in _positive(site["fn"])]

    def held(value, seen):
        return where(seen, value, jax.lax.stop_gradient(value))

    def log_prob(x):
        now = {i: held(part.value, seen[order[i]]) for i, part in zip(moving, x, strict=True)}
        laws = jax.tree.unflatten(tree, [now.get(i, y) for i, y in enumerate(leaves)])
        terms = ({**site, "fn": law} for site, law in zip(found, laws, strict=True))
        return sum(map(_log_prob, terms), jnp.zeros(eta.shape[0]))

    return [Part(jnp.asarray(leaves[i]), positive[i]) for i in moving], log_prob


_outcomes = recorded(outcomes, static_argnums=0)


def _theta(joint: Joint, values: dict[str, np.ndarray]) -> tuple[jax.Array, dict[str, Any]]:
    """What `_unconstrained` says, by NumPy if that has all of it."""
    parts: dict[str, np.ndarray] = {}
    for name, site in joint.roles.population.items():
        part = plain.unconstrained(site.support, values[name])
        if part is None:
            return _unconstrained(joint, values)
        parts[name] = part
    fits = {name: np.all(np.isfinite(part)) for name, part in parts.items()}
    return jnp.asarray(np.concatenate([np.zeros(0), *parts.values()])), fits


@partial(quick, static_argnums=0)
def _unconstrained(joint: Joint, values: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """θ, and whether each parameter is within its support."""
    pieces, within = [jnp.zeros(0)], {}
    for name, site in joint.roles.population.items():
        value = jnp.asarray(values[name], float)
        piece = jnp.ravel(biject_to(site.support).inv(value))
        within[name] = jnp.all(site.support(value)) & jnp.all(jnp.isfinite(piece))
        pieces.append(piece)
    return jnp.concatenate(pieces), within


def draws_of(laws: list[Any], key: jax.Array, count: int) -> jax.Array:
    """`count` draws of every subject's η from the laws of its sites, `[draw, subject, effect]`."""
    keys = jax.random.split(key, len(laws))
    draws = [law.sample(k, (count,)) for k, law in zip(keys, laws, strict=True)]
    return jnp.concatenate([d.reshape(*d.shape[:2], -1) for d in draws], -1)


class _Known(Exception):
    """All sites that were asked for are known."""


class _Until(Messenger):
    """Notes some sites of a model, and leaves it once it has them all."""

    def __init__(self, names):
        super().__init__()
        self.names, self.sites = set(names), {}

    def postprocess_message(self, msg):
        if msg.get("name") in self.names:
            self.sites[msg["name"]] = msg.copy()
            if len(self.sites) == len(self.names):
                raise _Known


def _positive(law: dist.Distribution) -> list[bool]:
    """Of each leaf of a law, whether it is a parameter that must be positive."""
    found: list[bool] = []
    names = type(law).gather_pytree_data_fields()
    for name, child in zip(names, law.tree_flatten()[0], strict=True):
        if isinstance(child, dist.Distribution):
            found += _positive(child)
        else:
            support = law.arg_constraints.get(name)
            known = support in (constraints.positive, constraints.nonnegative)
            found += [known] * len(jax.tree.leaves(child))
    return found


def _by_name(law: dist.Distribution) -> Iterator[Any]:
    """The leaves of a law in the order of the names of its fields. NumPyro's own order is that of
    a set, another one in every process, and a program written in it would be compiled anew."""
    fields = zip(type(law).gather_pytree_data_fields(), law.tree_flatten()[0], strict=True)
    for _, child in sorted(fields, key=lambda field: field[0]):
        own = isinstance(child, dist.Distribution)
        yield from _by_name(child) if own else jax.tree.leaves(child)


def _log_prob(site: dict) -> jax.Array:
    scale = 1.0 if site["scale"] is None else site["scale"]
    return scale * site["fn"].log_prob(site["value"])


def start_weights(joint: Joint) -> Weights:
    """The flow weights that the model states."""
    return {name: jnp.asarray(w) for name, w in joint.roles.weights.items()}
