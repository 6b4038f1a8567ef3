r"""Learning a graph policy within one task, by risk-seeking policy gradient.

A batch of structures is built reaction by reaction, each gets its reward, and the share ε of the
best raises its own probability:

.. math:: \nabla J = \sum_{i \in \text{best } ε} w_i \nabla \log π(τ_i)
          + c_e \sum_{i \in \text{elite}} w_i \nabla \log π(τ_i) + c_H \nabla H(π),

with weights w by rank, so that neither the scale of rewards nor a wall near a perfect fit matters.
The elite are the best structures seen so far, whoever proposed them.

References:
    Petersen et al., ICLR 2021: risk-seeking policy gradients. Abolafia et al., arXiv 1801.03526:
    priority queue training.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .environment import Environment, reset
from .policy import GraphPolicy, graph_of
from .rollout import UNIT, Features, Params, horizon, log_probability

_MOST = 16  # structures of a batch that raise their probability, and as many that teach the value


@dataclasses.dataclass(frozen=True)
class Learner:
    """How a policy learns; it holds no weights, so that one compiled program serves all tasks of
    a size.

    Attributes:
        policy: the network.
        epsilon: share of a batch that counts.
        elites: structures remembered.
        elite_weight: c_e, of the elite's likelihood beside the batch's.
        entropy: c_H, bonus for the entropy of a step.
        learning_rate: of Adam.
        updates: gradient steps for each batch.
    """

    policy: GraphPolicy = GraphPolicy()
    epsilon: float = 0.05
    elites: int = 16
    elite_weight: float = 1.0
    entropy: float = 0.02
    learning_rate: float = 1e-2
    updates: int = 4

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.learning_rate))


class LearnerState(NamedTuple):
    """What was learned, and the elite.

    Attributes:
        params: weights.
        optimizer: state of the optimiser.
        structures: the elite, bool [K, L], the best first.
        orders: how each is built, additions [K, T].
        rewards: of each, [K].
    """

    params: Params
    optimizer: Any
    structures: np.ndarray
    orders: np.ndarray
    rewards: np.ndarray


class Batch(NamedTuple):
    """Structures to learn from: orders [M, T], weight of each likelihood [M], and what its value
    should be, [M] (nan: unknown)."""

    orders: Any
    weight: Any
    rank: Any


def init(
    learner: Learner,
    key: Array,
    env: Environment,
    features: Features,
    policy: Any = None,
    prior: Any = None,
) -> LearnerState:
    """The state to begin a task with.

    Args:
        learner: how it learns.
        key: for new weights.
        env: what may be built.
        features: what the data say.
        policy: weights of earlier tasks, of any size; new ones if None.
        prior: log prior weight of each reaction, [L]; all alike if None.
    """
    size, length = len(env.library), horizon(env)
    if policy is None:
        policy = _weights(learner.policy, key, env, features)
    bias = np.zeros(size) if prior is None else np.asarray(prior) / UNIT
    params = Params(policy, jnp.asarray(bias, float))
    return LearnerState(
        params,
        learner.optimizer.init(params),
        np.zeros((0, size), bool),
        np.zeros((0, length), np.int32),
        np.zeros(0),
    )


@partial(jax.jit, static_argnames="policy")
def _weights(policy: GraphPolicy, key: Array, env: Environment, features: Features) -> Any:
    first = reset(env)
    return policy.init(key, graph_of(env), first, features(first.chosen))


@partial(jax.jit, static_argnames=("learner",))
def _train(
    learner: Learner,
    params: Any,
    optimizer: Any,
    env: Environment,
    features: Features,
    batch: Batch,
) -> tuple[Any, Any]:
    def loss(params: Any) -> Array:
        log_p, entropy, value = log_probability(learner.policy, params, env, features, batch.orders)
        weight = batch.weight
        counts = weight > 0
        likelihood = jnp.sum(jnp.where(counts, weight * log_p, 0.0))
        bonus = jnp.sum(jnp.where(counts, entropy, 0.0)) / jnp.maximum(counts.sum(), 1)
        known = jnp.isfinite(batch.rank)
        target = jnp.where(known, batch.rank, 0.0)[:, None]
        miss = optax.sigmoid_binary_cross_entropy(value, target).mean(-1)
        value_loss = jnp.sum(jnp.where(known, miss, 0.0)) / jnp.maximum(known.sum(), 1)
        return -likelihood - learner.entropy * bonus + 0.1 * value_loss

    def one(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, optimizer = carry
        change, optimizer = learner.optimizer.update(jax.grad(loss)(params), optimizer, params)
        return optax.apply_updates(params, change), optimizer

    return jax.lax.fori_loop(0, learner.updates, one, (params, optimizer))


def update(
    learner: Learner,
    state: LearnerState,
    env: Environment,
    features: Features,
    structures: np.ndarray,
    orders: np.ndarray,
    rewards: np.ndarray,
) -> LearnerState:
    """The state after a batch of structures [n, L], built by additions [n, T], with rewards [n].

    Rewards that are not finite are the worst. Of a structure that comes twice, one counts.
    """
    rewards = np.where(np.isfinite(rewards), rewards, -np.inf)
    _, distinct = np.unique(structures, axis=0, return_index=True)
    distinct = distinct[np.argsort(-rewards[distinct], kind="stable")]
    rank = 1 - (np.arange(len(distinct)) + 0.5) / len(distinct)
    count = min(math.ceil(learner.epsilon * len(rewards)), _MOST)
    best = distinct[:count][np.isfinite(rewards[distinct[:count]])]
    elite = _elite(learner, state, structures, orders, rewards)
    spread = np.unique(np.linspace(0, len(distinct) - 1, _MOST).astype(int))
    unknown = np.full(len(best) + len(elite[1]), np.nan)
    batch = _padded(
        2 * _MOST + learner.elites,
        np.concatenate([orders[best], elite[1], orders[distinct[spread]]]),
        np.concatenate([_by_rank(len(best)), learner.elite_weight * _by_rank(len(elite[1]))]),
        np.concatenate([unknown, rank[spread]]),
        nothing=len(env.library),
    )
    params, optimizer = _train(learner, state.params, state.optimizer, env, features, batch)
    return LearnerState(params, optimizer, *elite)


def _elite(
    learner: Learner,
    state: LearnerState,
    structures: np.ndarray,
    orders: np.ndarray,
    rewards: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best distinct structures of those remembered and new."""
    structures = np.concatenate([state.structures, structures])
    orders = np.concatenate([state.orders, orders])
    rewards = np.concatenate([state.rewards, rewards])
    _, distinct = np.unique(structures, axis=0, return_index=True)
    distinct = distinct[np.isfinite(rewards[distinct])]
    best = distinct[np.argsort(-rewards[distinct], kind="stable")[: learner.elites]]
    return structures[best], orders[best], rewards[best]


def _by_rank(n: int) -> np.ndarray:
    """Weights n, n - 1, ..., 1 that sum to 1."""
    weights = np.arange(n, 0, -1.0)
    return weights / max(weights.sum(), 1.0)


def _padded(
    size: int, orders: np.ndarray, weight: np.ndarray, rank: np.ndarray, nothing: int
) -> Batch:
    more = size - len(orders)
    return Batch(
        np.pad(orders, ((0, more), (0, 0)), constant_values=nothing),
        np.pad(weight, (0, size - len(weight))),
        np.pad(rank, (0, more), constant_values=np.nan),
    )
