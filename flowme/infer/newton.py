"""Population parameters by trust-region Newton steps on the marginal log-likelihood.

With nodes η_ik and weights v_ik held at what they are at θ₀ (`flowme.infer.conditional`),

    F(θ) = Σ_i log Σ_k v_ik p(y_i | η_ik; θ) p(η_ik; θ)

has the value, gradient and Hessian of the marginal log-likelihood at θ₀ (Fisher's and Louis's
identities), so a step of Newton's method on F, after which the nodes are placed anew, is one on
the likelihood itself: an EM iteration with the missing information taken off the curvature, and
quadratic instead of linear convergence.

When a population parameter enters only by its sum with a random effect (log ka + η_ka), the nodes
move with it: ψ, and hence p(y_i | ψ), stay as they are and only p(η; θ) is differentiated. Such
parameters are *referenced* (mu-referenced); `references` finds them by trying.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowme.effects import RandomEffect
from flowme.infer.conditional import (
    Conditional,
    Nodes,
    gaussian_law,
    importance,
    laplace,
    likelihood_at,
    log_mean,
    quadrature,
    without_impossible,
)
from flowme.infer.joint import Joint, Weights
from flowme.study import Study


class References(NamedTuple):
    """The population parameters that enter only as θ_a + η_j."""

    pairs: tuple[tuple[int, str, int], ...]  # effect j; the site of θ_a and its element there
    sites: frozenset[str]  # population parameters all of whose elements are referenced

    def matrix(self, joint: Joint) -> np.ndarray:
        """1 where parameter a is referenced by effect j, `[effect, parameter]`."""
        matrix = np.zeros((joint.effect_size, joint.size))
        for effect, site, element in self.pairs:
            matrix[effect, joint.slices[site].start + element] = 1.0
        return matrix


class NewtonState(NamedTuple):
    """Where the iteration stands."""

    theta: jax.Array  # [parameter], unconstrained
    conditional: Conditional
    log_likelihood: jax.Array  # log p(y_i; θ), [subject]
    objective: jax.Array  # their sum, plus log p(θ) for MAP
    radius: jax.Array  # of the trust region, in the unit of θ
    gain: jax.Array  # what a full Newton step promised to add to the objective
    accepted: jax.Array


class Newton(NamedTuple):
    """The iteration for one model. `order` nodes per effect, or `points` where not Gaussian.

    Attributes:
        joint: the model.
        references: what `references` found.
        order: Gauss-Hermite nodes per effect; 0 for importance sampling.
        points: per subject, of importance sampling.
        use_priors: maximise log p(y; θ) + log p(θ).
    """

    joint: Joint
    references: References
    order: int
    points: int
    use_priors: bool

    def start(self, key, theta, weights, study) -> NewtonState:
        """The state at θ, the modes found by twenty Newton steps."""
        conditional = self.locate(theta, weights, study, None, 20)
        zero, one = jnp.zeros(study.subjects.size), jnp.ones(())
        empty = NewtonState(theta, conditional, zero, 0 * one, one, one, one > 0)
        values, total = self._objective(key, theta, conditional, weights, study)
        return empty._replace(log_likelihood=values, objective=total)

    def locate(self, theta, weights, study, start, steps) -> Conditional:
        """Modes and curvatures of the conditional distributions."""
        values = self.joint.constrain(theta)
        mean, covariance = self._moments(theta, weights, study)
        return laplace(
            lambda eta: self.joint.terms(values, weights, eta, study)[0],
            mean,
            covariance,
            start,
            steps,
            study.subjects.size,
        )

    def step(self, key, state: NewtonState, weights, study) -> NewtonState:
        """One trust-region step: accepted if it adds a tenth of what it promised."""
        gradient, hessian = self.derivatives(key, state, weights, study)
        move, promised, gain = trust_region(gradient, hessian, state.radius)
        theta = state.theta + move
        shift = jnp.asarray(self.references.matrix(self.joint)) @ move
        conditional = self.locate(theta, weights, study, state.conditional.mean - shift, 3)
        values, total = self._objective(key, theta, conditional, weights, study)

        noise = 20 * jnp.finfo(total.dtype).eps * jnp.abs(state.objective)
        ratio = (total - state.objective + noise) / (promised + noise)
        accepted = jnp.isfinite(total) & (ratio > 0.1)
        length = jnp.linalg.norm(move)
        length = jnp.where(jnp.isfinite(length), length, state.radius)
        good = accepted & (ratio > 0.7)
        radius = jnp.where(good, jnp.maximum(state.radius, 2.5 * length), state.radius)
        radius = jnp.where(accepted, radius, 0.3 * length)
        new = NewtonState(theta, conditional, values, total, radius, gain, accepted)
        kept = state._replace(radius=radius, gain=gain, accepted=accepted)
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, kept)

    def derivatives(self, key, state: NewtonState, weights, study):
        """Gradient and Hessian of the objective at θ."""
        nodes = self._nodes(key, state.theta, state.conditional, weights, study)
        marginal = self.marginal(state.theta, nodes, weights, study)

        def objective(theta):
            prior = self.joint.log_prior(theta, study) if self.use_priors else 0.0
            return jnp.sum(marginal(theta)) + prior

        return jax.grad(objective)(state.theta), jax.hessian(objective)(state.theta)

    def scores(self, key, state: NewtonState, weights, study) -> jax.Array:
        """∂ log p(y_i; θ) / ∂θ of every subject, `[subject, parameter]`."""
        nodes = self._nodes(key, state.theta, state.conditional, weights, study)
        return jax.jacfwd(self.marginal(state.theta, nodes, weights, study))(state.theta)

    def marginal(self, theta0, nodes, weights, study):
        """θ -> log p(y_i; θ) `[subject]` at fixed nodes, moved along with referenced parameters."""
        joint, references = self.joint, self.references
        matrix = jnp.asarray(references.matrix(joint))
        held = joint.constrain(theta0)

        def marginal(theta):
            values = joint.constrain(theta)
            shift = matrix @ (theta - theta0)
            inner = {k: held[k] if k in references.sites else v for k, v in values.items()}

            def at(eta):
                likelihood = joint.terms(inner, weights, eta, study)[0]
                return likelihood, joint.terms(values, weights, eta - shift, study)[1]

            likelihood, effect = jax.vmap(at)(nodes.eta)
            return log_mean(likelihood, effect, nodes.log_weight)

        return marginal

    def _objective(self, key, theta, conditional, weights, study):
        nodes = self._nodes(key, theta, conditional, weights, study)
        values = self.marginal(theta, nodes, weights, study)(theta)
        prior = self.joint.log_prior(theta, study) if self.use_priors else 0.0
        return values, jnp.sum(values) + prior

    def _moments(self, theta, weights, study):
        return self.joint.effect_moments(jax.random.key(0), theta, weights, study)

    def _nodes(self, key, theta, conditional, weights, study) -> Nodes:
        if self.order:
            nodes = quadrature(conditional, self.order)
        else:
            mean, covariance = self._moments(theta, weights, study)
            broad = gaussian_law(mean, covariance, study.subjects.size)
            nodes = importance(key, conditional, broad, self.points)[0]
        likelihood = likelihood_at(self.joint, theta, weights, nodes, study)
        return jax.lax.stop_gradient(without_impossible(nodes, likelihood, conditional))


def trust_region(gradient, hessian, radius):
    """The step that maximises gᵀs - sᵀ|H|s/2 within ‖s‖ <= radius, that maximum, and the maximum
    over all steps.

    |H| has the absolute eigenvalues of the Hessian: where the likelihood is not concave the step
    still goes up.
    """
    values, vectors = jnp.linalg.eigh(-0.5 * (hessian + hessian.T))
    scale = jnp.max(jnp.abs(values))
    values = jnp.maximum(jnp.abs(values), 1e-9 * scale)
    slope = vectors.T @ gradient

    def length(damping):
        return jnp.linalg.norm(slope / (values + damping))

    def bisect(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        too_long = length(middle) > radius
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    high = jnp.linalg.norm(slope) / radius
    _, damping = jax.lax.fori_loop(0, 60, bisect, (jnp.zeros_like(high), high))
    damping = jnp.where(length(0.0) <= radius, 0.0, damping)
    move = slope / (values + damping)
    promised = slope @ move - 0.5 * move @ (values * move)
    return vectors @ move, promised, 0.5 * jnp.sum(slope**2 / values)


def references(joint: Joint, theta: jax.Array, weights: Weights, study: Study) -> References:
    """Find the population parameters θ_a that enter only as θ_a + η_j.

    By trying, at two random places: for every subject, moving θ_a up must change log p(y_i | η; θ)
    and moving η_j down by as much must undo that. (For every subject: in one arm of a trial the
    effect of the treatment cannot be told from the mean.) Of a large study 256 subjects are
    tried, spread over it. Laws that are not flowme's are left alone: they may have kinks.
    """
    size = study.subjects.size
    some = study.subset(np.unique(np.linspace(0, size - 1, min(256, size)).astype(int)))
    d, p = joint.effect_size, joint.size
    keys = jax.random.split(jax.random.key(0), 2)
    places = np.asarray(theta + 0.1 * jax.random.normal(keys[0], (2, p)))
    eta = np.asarray(0.2 * jax.random.normal(keys[1], (2, some.subjects.size, d)))
    up, down = 0.3 * np.eye(p), -0.3 * np.eye(d)[:, None]
    # Per place: as it is, each θ_a up, and each with each η_j down.
    thetas = [np.concatenate([t[None], t + up, np.repeat(t + up, d, axis=0)]) for t in places]
    etas = [
        np.concatenate([np.repeat(e[None], 1 + p, 0), np.tile(e + down, (p, 1, 1))]) for e in eta
    ]

    def value(theta, eta, study):
        return joint.terms(joint.constrain(theta), weights, eta, study)[0]

    program = jax.jit(jax.vmap(value, in_axes=(0, 0, None)))
    values = np.asarray(program(np.concatenate(thetas), np.concatenate(etas), some))
    values = values.reshape(2, 1 + p + p * d, -1)
    base, alone, both = values[:, 0], values[:, 1 : 1 + p], values[:, 1 + p :].reshape(2, p, d, -1)
    rounding, share = (1e-12, 1e-6) if base.dtype == np.float64 else (2e-6, 1e-2)
    with np.errstate(invalid="ignore"):  # a place may lie where the model is not finite
        noise = rounding * (1 + np.abs(base))[:, None]
        moved = np.abs(alone - base[:, None])
        left = np.abs(both - base[:, None, None])
        undone = (left <= (share * moved + 10 * noise)[:, :, None]) & (moved > 100 * noise)[
            :, :, None
        ]
    has_data = sum(np.asarray(mask).any(1) for mask in some.observed.values()) > 0
    found = np.all(undone[..., has_data], axis=(0, -1)) & _referable(joint)
    pairs: list[tuple[int, str, int]] = []
    for site, where in joint.slices.items():
        partners = [np.flatnonzero(row) for row in found[where]]
        taken = {effect for effect, *_ in pairs}
        # All elements of a site or none, each with an effect of its own.
        new = [int(j[0]) for j in partners if len(j) == 1]
        if len(set(new) - taken) == len(partners) and not joint.roles.population[site].effect:
            pairs += [(effect, site, element) for element, effect in enumerate(new)]
    return References(tuple(pairs), frozenset(site for _, site, _ in pairs))


def _referable(joint: Joint) -> np.ndarray:
    """The effects whose law is one of flowme's, `[effect]`."""
    laws = joint.roles.laws
    return np.concatenate(
        [
            np.full(len(names), isinstance(laws.get(site), RandomEffect))
            for site, names in joint.roles.effects.items()
        ]
    )
