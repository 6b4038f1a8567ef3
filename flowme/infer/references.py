"""Which population parameters stand beside a random effect: θ_a + η_j and nothing else.

Such parameters are *referenced* (mu-referenced): a shift of θ_a is undone by one of η_j, so that
p(y_i | ψ_i) need not be differentiated with respect to θ_a.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from numpyro.primitives import Messenger

from flowme.effects import RandomEffect
from flowme.infer.joint import Joint, Weights, outcomes
from flowme.quick import quick
from flowme.study import Study

_SOME = 256  # subjects tried with the likelihood
_ROOM = 4_000_000  # numbers η that are tried together, with ψ


class References(NamedTuple):
    """The population parameters that enter only as θ_a + η_j."""

    pairs: tuple[tuple[int, str, int], ...]  # effect j; the site of θ_a and its element there
    sites: frozenset[str]  # population parameters all of whose elements are referenced
    loops: bool = False  # whether p(y | ψ) is computed by loops, as of an ODE

    def matrix(self, joint: Joint) -> np.ndarray:
        """1 where parameter a is referenced by effect j, `[effect, parameter]`."""
        matrix = np.zeros((joint.effect_size, joint.size))
        for effect, site, element in self.pairs:
            matrix[effect, joint.slices[site].start + element] = 1.0
        return matrix

    def likelihood_sites(self, joint: Joint) -> list[str]:
        """Parameters that p(y | ψ) is to be differentiated by, the nodes moving along."""
        sites = joint.roles.population.items()
        return [name for name, site in sites if not (site.effect or name in self.sites)]

    def density_sites(self, joint: Joint) -> list[str]:
        """Parameters that p(η; θ) is to be differentiated by: those of the laws of the random
        effects, and those that move the nodes. Laws that are not flowme's may depend on any."""
        own = bool(np.all(_referable(joint)))
        sites = joint.roles.population.items()
        return [name for name, site in sites if site.effect or name in self.sites or not own]

    def of_likelihood(self, joint: Joint) -> np.ndarray:
        """Places of `likelihood_sites` in θ."""
        return _places(joint, self.likelihood_sites(joint))

    def of_density(self, joint: Joint) -> np.ndarray:
        """Places of `density_sites` in θ."""
        return _places(joint, self.density_sites(joint))


def _places(joint: Joint, names: list[str]) -> np.ndarray:
    slices = [joint.slices[name] for name in names]
    return np.concatenate([np.zeros(0, int), *(np.arange(s.start, s.stop) for s in slices)])


@partial(quick, static_argnums=0)
def _likelihoods(joint: Joint, thetas, weights: Weights, etas, study: Study):
    def likelihood(theta, eta):
        return joint.likelihood(joint.constrain(theta), weights, eta, study)

    return jax.vmap(likelihood)(thetas, etas)


@partial(quick, static_argnums=0)
def _individuals(joint: Joint, thetas, weights: Weights, etas, study: Study):
    def parameters(theta, eta):
        found = joint.individual(theta, weights, eta, study)
        return jnp.concatenate([psi.reshape(len(psi), -1) for psi in found.values()], 1)

    return jax.vmap(parameters)(thetas, etas)


class _Cut(Messenger):
    """Individual parameters that depend on nothing."""

    def process_message(self, msg):
        if msg["type"] == "individual":
            msg["value"] = {name: jnp.ones(x.shape) for name, x in msg["fn"]().items()}


@partial(jax.jit, static_argnums=0)
def _given_individual(joint: Joint, values, weights: Weights, eta, study: Study):
    """The parameters of the outcomes' laws, ψ being given."""
    with _Cut():
        x, _ = outcomes(joint, values, weights, eta, study)
    return x


def _program(joint: Joint, theta, weights: Weights, study: Study) -> tuple[Any, Any]:
    """The text of `_given_individual`, which JAX remembers, and the structure of its arguments."""
    eta = jax.ShapeDtypeStruct((study.subjects.size, joint.effect_size), jnp.result_type(float))
    arguments = jax.eval_shape(joint.constrain, theta), weights, eta, study
    text = _given_individual.trace(joint, *arguments).jaxpr
    return text.jaxpr, jax.tree.structure(arguments)


def _beside_individual(joint: Joint, program, arguments) -> np.ndarray | None:
    """Whether each element of θ enters p(y_i | ψ_i; θ) beside ψ_i, `[parameter]`: read from the
    program that computes it, without running it. None where random effects do, or are not in ψ."""
    if not joint.roles.individual:
        return None
    _, used = dce_jaxpr(program, [True] * len(program.outvars))
    enters, _, effects, _ = jax.tree.unflatten(arguments, used)
    beside = np.zeros(joint.size, bool)
    for name, where in joint.slices.items():
        beside[where] = enters[name]
    return None if effects else beside


def _loops(program) -> bool:
    """Whether a program, or one that it calls, has a loop."""
    if any(step.primitive.name in ("while", "scan") for step in program.eqns):
        return True
    inner = [x for step in program.eqns for x in jax.tree.leaves(step.params)]
    programs = (getattr(x, "jaxpr", x) for x in inner)
    return any(_loops(x) for x in programs if hasattr(x, "eqns"))


def find(joint: Joint, theta: jax.Array, weights: Weights, study: Study) -> References:
    """Find the population parameters θ_a that enter only as θ_a + η_j.

    By trying, at two random places: for every subject, moving θ_a up must change ψ_i, and moving
    η_j down by as much must undo that. (For every subject: in one arm of a trial the effect of the
    treatment cannot be told from the mean.) Where a model has no individual parameters, or random
    effects beside them, log p(y_i | η; θ) takes the place of ψ_i, and of a large study 256
    subjects are tried, spread over it. Laws that are not flowme's are left alone: they may have
    kinks.
    """
    program, arguments = _program(joint, theta, weights, study)
    beside = _beside_individual(joint, program, arguments)
    size = study.subjects.size
    spread = np.unique(np.linspace(0, size - 1, min(_SOME, size)).astype(int))
    each = 2 * (1 + joint.size * (1 + joint.effect_size)) * joint.effect_size  # numbers η of each
    parts = -(-size // max(32, _ROOM // max(each, 1)))
    chunks = [spread] if beside is None else np.array_split(np.arange(size), parts)
    # All of one length, so that nothing is compiled twice.
    chunks = [np.resize(rows, len(chunks[0])) for rows in chunks]
    undone = np.all([_undone(joint, theta, weights, study, rows, beside) for rows in chunks], 0)
    found = undone & _referable(joint)
    if beside is not None:
        found &= ~beside[:, None]
    pairs: list[tuple[int, str, int]] = []
    for site, where in joint.slices.items():
        partners = [np.flatnonzero(row) for row in found[where]]
        taken = {effect for effect, *_ in pairs}
        # All elements of a site or none, each with an effect of its own.
        new = [int(j[0]) for j in partners if len(j) == 1]
        if len(set(new) - taken) == len(partners) and not joint.roles.population[site].effect:
            pairs += [(effect, site, element) for element, effect in enumerate(new)]
    sites = frozenset(site for _, site, _ in pairs)
    return References(tuple(pairs), sites, _loops(program))


def _undone(joint: Joint, theta, weights: Weights, study: Study, rows, beside) -> np.ndarray:
    """Whether a shift of θ_a moves ψ_i (or, `beside` being None, log p(y_i)) of each of these
    subjects, and one of η_j undoes that, `[parameter, effect]`."""
    some = jax.tree.map(lambda x: np.asarray(x)[rows], study)
    d, p = joint.effect_size, joint.size
    rng = np.random.default_rng(0)
    places = np.asarray(theta) + 0.1 * rng.normal(size=(2, p))
    eta = 0.2 * rng.normal(size=(2, len(rows), d))
    up, down = 0.3 * np.eye(p), -0.3 * np.eye(d)[:, None]
    # Per place: as it is, each θ_a up, and each with each η_j down.
    thetas = [np.concatenate([t[None], t + up, np.repeat(t + up, d, axis=0)]) for t in places]
    etas = [
        np.concatenate([np.repeat(e[None], 1 + p, 0), np.tile(e + down, (p, 1, 1))]) for e in eta
    ]

    program = _likelihoods if beside is None else _individuals
    values = program(joint, np.concatenate(thetas), weights, np.concatenate(etas), some)
    values = np.asarray(values).reshape(2, 1 + p + p * d, len(rows), -1)
    base, alone, both = np.split(values, [1, 1 + p], axis=1)
    both = both.reshape(2, p, d, *base.shape[2:])
    rounding, share = (1e-12, 1e-6) if base.dtype == np.float64 else (2e-6, 1e-2)
    with np.errstate(invalid="ignore"):  # a place may lie where the model is not finite
        # A parameter may be small in its unit; a log-likelihood near 0 is so by chance.
        least = 1.0 if beside is None else np.abs(base).max(axis=(0, 1, 2))
        noise = rounding * (least + np.abs(base))
        moved = np.abs(alone - base)
        left = np.abs(both - base[:, None])
        undone = np.all(left <= (share * moved + 10 * noise)[:, :, None], -1)
        undone &= np.any(moved > 100 * noise, -1)[:, :, None]
    has_data = sum(np.asarray(mask).any(1) for mask in some.observed.values()) > 0
    return np.all(undone[..., has_data], axis=(0, -1))


def _referable(joint: Joint) -> np.ndarray:
    """The effects whose law is one of flowme's, `[effect]`."""
    laws = joint.roles.laws
    return np.concatenate(
        [
            np.full(len(names), isinstance(laws.get(site), RandomEffect))
            for site, names in joint.roles.effects.items()
        ]
    )
