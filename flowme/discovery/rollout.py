"""Structures built by a policy, and the probability with which it builds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .environment import Environment, State, act, mask_add, reset
from .policy import GraphPolicy, graph_of

UNIT = 10.0  # of a bias: one learning rate then serves it and the network

Features = Callable[[Array], Array]
"""What the data say of the candidates: chosen, bool [..., L] -> [..., L, feature]."""


class Params(NamedTuple):
    """What is learned.

    Attributes:
        policy: weights of the network, which serve any task.
        bias: of the logit of each reaction, [L], in units of 10: this task's own. Without it, and
            without features, species could only be told apart by what is chosen already, for the
            network does not see names.
    """

    policy: Any
    bias: Array


def horizon(env: Environment) -> int:
    """Most additions of an episode: reactions, hidden species, and the stop."""
    return min(env.max_steps, env.max_reactions + len(env.hidden) + 1)


@partial(jax.jit, static_argnames=("policy", "n"))
def sample(
    policy: GraphPolicy, params: Params, key: Array, env: Environment, features: Features, n: int
) -> tuple[Array, Array]:
    """n structures built by the policy, bool [n, L], and their additions, [n, T]."""
    graph = graph_of(env)
    encoded = policy.apply(params.policy, graph, method="encode")

    def logits(state: State) -> Array:
        known = features(state.chosen)
        output: Any = policy.apply(params.policy, encoded, graph, state, known, method="decode")
        return legal_logits(env, state, output.logits, params.bias)

    return _play(key, env, logits, n)


def legal_logits(env: Environment, state: State, logits: Array, bias: Any = 0.0) -> Array:
    """Log weights of the additions at states [...], -inf where not legal, [..., L + 2].

    Stopping and opening weigh, before anything is learned, as all reactions together divided by
    the room left: any number of reactions is then equally likely, in a library of any size.
    """
    size = len(env.library)
    may = mask_add(env, state)
    reactions = jnp.where(may[..., :size], logits[..., :size] + UNIT * bias, -jnp.inf)
    some = may[..., :size].any(-1, keepdims=True)
    # Double where: the derivative of an empty sum is no number.
    total = jax.nn.logsumexp(jnp.where(some, reactions, 0.0), -1, keepdims=True)
    room = jnp.maximum(env.max_reactions - state.chosen.sum(-1, keepdims=True), 1)
    others = logits[..., size:] + jnp.where(some, total - jnp.log(room), 0.0)
    return jnp.concatenate([reactions, jnp.where(may[..., size:], others, -jnp.inf)], -1)


@jax.jit
def orders_of(key: Array, env: Environment, structures: Array) -> tuple[Array, Array]:
    """A random order in which each structure [n, L] can be built, additions [n, T], and whether
    there is one, bool [n]."""
    deepest = jnp.max(jnp.where(structures, env.level, 0), -1)

    def logits(state: State) -> Array:
        wanted = structures & ~state.chosen
        stop = ~wanted.any(-1, keepdims=True)
        opens = (deepest > state.hidden)[..., None]
        may = jnp.concatenate([wanted, stop, opens], -1)
        # Where it cannot be built, anything: it is discarded.
        return jnp.where(mask_add(env, state), jnp.where(may, 0.0, -1e3), -jnp.inf)

    built, orders = _play(key, env, logits, len(structures))
    return orders, (built == structures).all(-1)


def _play(key: Array, env: Environment, logits: Callable, n: int) -> tuple[Array, Array]:
    def one(state: State, key: Array) -> tuple[State, Array]:
        add = jax.random.categorical(key, logits(state))
        add = jnp.where(state.done, len(env.library), add)
        action = jnp.stack([jnp.full_like(add, len(env.library)), add], -1)
        return act(env, state, action), add

    last, orders = jax.lax.scan(one, reset(env, (n,)), jax.random.split(key, horizon(env)))
    return last.chosen, orders.T


def log_probability(
    policy: GraphPolicy, params: Params, env: Environment, features: Features, orders: Array
) -> tuple[Array, Array, Array]:
    """log π(τ) [n] of additions [n, T]; the entropy of its steps, their mean, [n]; and the value
    of each state before, [n, T]."""
    size = len(env.library)
    graph = graph_of(env)
    first = reset(env, orders.shape)
    one_hot = jax.nn.one_hot(orders, size + 2, dtype=jnp.int32)
    before = jnp.cumsum(one_hot, 1) - one_hot
    state = State(
        chosen=first.chosen | (before[..., :size] > 0),
        hidden=first.hidden + before[..., size + 1],
        steps=first.steps - jnp.arange(orders.shape[1]),
        done=before[..., size] > 0,
    )
    output: Any = policy.apply(params.policy, graph, state, features(state.chosen))
    log_p = jax.nn.log_softmax(legal_logits(env, state, output.logits, params.bias))
    taken = jnp.take_along_axis(log_p, orders[..., None], -1)[..., 0]
    # Double where: -inf times 0 has no derivative.
    finite = jnp.where(jnp.isfinite(log_p), log_p, 0.0)
    entropy = -jnp.sum(jnp.exp(log_p) * finite, -1)
    alive = ~state.done
    steps = jnp.maximum(alive.sum(-1), 1)
    return (
        jnp.sum(jnp.where(alive, taken, 0.0), -1),
        jnp.sum(jnp.where(alive, entropy, 0.0), -1) / steps,
        output.value,
    )
