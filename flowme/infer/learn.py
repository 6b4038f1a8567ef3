"""Weights of a flow by stochastic EM, with the stopping time chosen on held-out subjects.

One update:

1. E-step: fresh importance nodes η_ik around every subject's conditional distribution, and their
   likelihood;
2. M-step of the density: `inner` optax steps on Σ_i log p(η_i - δ; ω, R, w), each with `draws` new
   draws of η_i from the weighted nodes, over the flow's weights w, its scales and correlations and
   a shift δ of referenced effects, which the population parameters then take over
   (parameter-expanded EM: Liu, Rubin & Wu 1998);
3. one damped Newton step on the marginal likelihood for everything else (residual error, ...).

The unrestricted maximum is a discrete distribution, so the density is held back in two ways. A
group penalty (Yuan & Lin 2006) leaves a coordinate Gaussian, or independent of the others, unless
the data pay for it: √|g| times λ ‖w_g‖ for dependence and μ s log(1 + ‖w_g‖/s), s = .3, for
marginal shape, the latter because it lets go of a shape once there is one. And held-out subjects
choose both λ and the number of updates: `side_by_side` runs all folds and penalties at once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowme.effects import RandomEffect
from flowme.infer.conditional import (
    Conditional,
    Nodes,
    everywhere,
    importance,
    log_mean,
    resample,
    without_impossible,
)
from flowme.infer.joint import Joint, Weights
from flowme.infer.references import References
from flowme.study import Study


class LearnState(NamedTuple):
    """Where the learning stands."""

    theta: jax.Array  # [parameter], unconstrained
    weights: Weights
    conditional: Conditional  # proposals; their means move with referenced parameters
    optimizer: optax.OptState
    log_likelihood: jax.Array  # log p(y_i; θ, w) before the update, [subject]


class Learn(NamedTuple):
    """The iteration for one model.

    Attributes:
        joint: the model.
        references: which population parameters can take over a shift of an effect.
        optimizer: an optax optimiser of the density's parameters.
        points: importance nodes per subject.
        draws: draws per subject in each step of the M-step.
        inner: optimiser steps per update.
        penalty: μ, of the groups that shape a marginal.
        use_priors: maximise log p(y; θ) + log p(θ).
    """

    joint: Joint
    references: References
    optimizer: optax.GradientTransformation
    points: int
    draws: int
    inner: int
    penalty: float
    use_priors: bool

    def start(self, theta, weights, conditional) -> LearnState:
        """The state from a Gaussian fit: its θ and conditional distributions."""
        optimizer = self.optimizer.init(self._density_parameters(theta, weights))
        zero = jnp.zeros(conditional.mean.shape[0])
        return LearnState(theta, weights, conditional, optimizer, zero)

    def update(self, key, state: LearnState, mask, dependence, study: Study) -> LearnState:
        """One EM update.

        Args:
            key: random key; is consumed.
            state: where it starts.
            mask: the subjects it learns from, `[subject]` (1 or 0).
            dependence: λ, the penalty of the groups of dependence.
            study: the study.
        """
        key_nodes, key_draws = jax.random.split(key)
        nodes, _ = importance(
            key_nodes, state.conditional, everywhere(state.conditional), self.points
        )
        likelihood, effect = self._terms(state, nodes, study)
        log_likelihood = log_mean(likelihood, effect, nodes.log_weight)
        log_posterior = likelihood + effect + nodes.log_weight
        mask = mask * jnp.isfinite(log_likelihood)

        def drawn(key):
            return resample(key, nodes.eta, log_posterior, self.draws)

        parameters, optimizer = self._fit_density(key_draws, state, drawn, mask, dependence, study)
        theta, weights, shift = self._absorb(state, parameters)
        fixed = Nodes(nodes.eta, nodes.log_weight + effect)
        fixed = without_impossible(fixed, likelihood, state.conditional)
        theta = self._rest(theta, state, fixed, mask, study)
        conditional = state.conditional._replace(mean=state.conditional.mean - shift)
        return LearnState(theta, weights, conditional, optimizer, log_likelihood)

    def _terms(self, state: LearnState, nodes: Nodes, study: Study) -> tuple[jax.Array, jax.Array]:
        """log p(y_i | η_ik) and log p(η_ik), `[node, subject]`."""
        values = self.joint.constrain(state.theta)
        terms = partial(self.joint.terms, values, state.weights, study=study)
        return jax.vmap(lambda eta: terms(eta=eta))(nodes.eta)

    def _learned_sites(self) -> list[str]:
        """Population parameters that belong to the laws of the random effects: their scales."""
        return [name for name, site in self.joint.roles.population.items() if site.effect]

    def _density_parameters(self, theta, weights):
        shift = jnp.zeros(self.joint.effect_size)
        return {"theta": theta, "weights": weights, "shift": shift}

    def _fit_density(self, key, state, drawn, mask, dependence, study):
        """`inner` optimiser steps, each on draws of its own, `[draw, subject, effect]`.

        (On the same draws all steps of Adam, which are as long in a direction of noise as in any
        other, would go after the noise of those.)
        """
        total = jnp.maximum(mask.sum(), 1.0)
        parameters = self._density_parameters(state.theta, state.weights)

        def loss(parameters, eta):
            theta, weights, shift = self._absorb(state, parameters)
            values = self.joint.constrain(theta)
            density = jax.vmap(lambda e: self.joint.effect_density(values, weights, e, study))(
                eta - shift
            )
            prior = self.joint.log_prior(theta, study) if self.use_priors else 0.0
            held_back = self._group_penalty(weights, dependence)
            return -(jnp.sum(density * mask) / self.draws + prior - held_back) / total

        def step(carry, key):
            parameters, optimizer = carry
            gradient = jax.grad(loss)(parameters, drawn(key))
            moves, optimizer = self.optimizer.update(gradient, optimizer)
            return (optax.apply_updates(parameters, moves), optimizer), None

        keys = jax.random.split(key, self.inner)
        carry, _ = jax.lax.scan(step, (parameters, state.optimizer), keys)
        return carry

    def _group_penalty(self, weights, dependence):
        """The group penalty; norms are rounded off at 0 so that they have a gradient there."""
        total = 0.0
        for site, values in weights.items():
            law = self.joint.roles.laws[site.removesuffix("_weights")]
            group, depends = law.flow.groups(len(law.names))
            member = group == np.arange(len(depends))[:, None]
            norm = jnp.sqrt(jnp.asarray(member, values.dtype) @ values**2 + 1e-4)
            marginal = self.penalty * 0.3 * jnp.log1p(norm / 0.3)
            price = jnp.where(depends, dependence * norm, marginal)
            total += jnp.sum(np.sqrt(member.sum(1)) * price)
        return total

    def _absorb(self, state, parameters):
        """θ with the learned scales of `parameters` and its shift, which has one place to go."""
        theta = state.theta
        for name in self._learned_sites():
            where = self.joint.slices[name]
            theta = theta.at[where].set(parameters["theta"][where])
        matrix = jnp.asarray(self.references.matrix(self.joint))
        shift = parameters["shift"] * matrix.sum(1)
        return theta + matrix.T @ shift, parameters["weights"], shift

    def _rest(self, theta, state, nodes, mask, study):
        """A damped Newton step for the population parameters that the density does not hold."""
        joint = self.joint
        kept = set(self._learned_sites()) | self.references.sites
        free = [name for name in joint.slices if name not in kept]
        if not free:
            return theta
        held = joint.constrain(state.theta)
        # Whether all laws keep their own parameters, so that none of these enters p(η).
        own = set(joint.roles.laws) == set(joint.roles.effects) and all(
            isinstance(law, RandomEffect) for law in joint.roles.laws.values()
        )

        def objective(theta):
            values = {k: v if k in free else held[k] for k, v in joint.constrain(theta).items()}

            def at(eta):
                if own:
                    return joint.likelihood(values, state.weights, eta, study)
                likelihood, effect = joint.terms(values, state.weights, eta, study)
                return likelihood + effect - jax.lax.stop_gradient(effect)

            marginal = log_mean(jax.vmap(at)(nodes.eta), 0.0, nodes.log_weight)
            prior = joint.log_prior(theta, study) if self.use_priors else 0.0
            return jnp.sum(jnp.where(mask > 0, mask * marginal, 0.0)) + prior

        select = jnp.zeros(joint.size)
        for name in free:
            select = select.at[joint.slices[name]].set(1.0)
        gradient = jax.grad(objective)(state.theta) * select
        hessian = jax.hessian(objective)(state.theta) * select[:, None] * select
        values, vectors = jnp.linalg.eigh(hessian - jnp.diag(1 - select))
        move = vectors @ (vectors.T @ gradient / jnp.maximum(jnp.abs(values), 1e-6))
        return theta + jnp.clip(0.5 * jnp.where(jnp.isfinite(move), move, 0.0), -0.1, 0.1)


class Block(NamedTuple):
    """What some updates side by side went through."""

    log_likelihood: jax.Array  # log p(y_i) before each update, [update, state, subject]
    theta: jax.Array  # θ before each, of the states asked for, [update, kept, parameter]
    weights: Weights  # and their weights, [update, kept, weight]


def side_by_side(learn: Learn, updates: int, key, states, masks, dependence, kept, study):
    """Updates of several states at once, all with the same random numbers.

    Args:
        learn: the iteration.
        updates: how many.
        key: random key; is consumed.
        states: `[state, ...]`.
        masks: the subjects that each learns from, `[state, subject]`.
        dependence: the penalty of each, `[state]`.
        kept: numbers of the states whose path is returned.
        study: the study.

    Returns:
        The states after the updates, and the `Block` they went through.
    """

    def step(before, key):
        after = jax.vmap(lambda s, m, d: learn.update(key, s, m, d, study))(
            before, masks, dependence
        )
        path = jax.tree.map(lambda x: x[kept], (before.theta, before.weights))
        return after, Block(after.log_likelihood, *path)

    return jax.lax.scan(step, states, jax.random.split(key, updates))
