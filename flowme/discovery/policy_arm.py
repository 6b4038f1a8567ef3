"""The graph policy as one arm of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .candidate_features import GramFeatures
from .environment import Environment, environment
from .learner import Learner, LearnerState, init, update
from .rollout import Features, orders_of, sample

_TOGETHER = 64  # structures that one program builds: one compilation, and bounded memory


def space_of(memory: Any) -> Environment:
    """What may be built in a search: from its problem's library, as many reactions as its slots."""
    return environment(memory.problem.library, max_reactions=memory.problem.slots)


def features_of(memory: Any) -> GramFeatures:
    """What is left to explain by the search's screen, its species weighted by their variance."""
    screen = memory.screen
    weight = 1 / np.asarray(screen.variance)
    return GramFeatures(
        gram=jnp.asarray(np.tensordot(weight, screen.gram, 1)),
        moment=jnp.asarray(np.tensordot(weight, screen.cross, 1)),
        total=jnp.asarray(weight @ screen.total),
        records=jnp.asarray(float(memory.problem.courses.count.sum())),
        most=memory.problem.slots,
    )


def prior_of(memory: Any) -> np.ndarray:
    """Log prior weight of each reaction, [L]."""
    return memory.prior


class PolicyArm:
    """Proposes what a policy samples, and learns from all that was fitted, whoever proposed it.

    Args:
        learner: how it learns.
        policy: weights of the network to begin with, of tasks of any size; new ones if None.
        space: `space(memory) -> Environment`, asked once: what may be built.
        features: `features(memory) -> Features`, asked at each proposal: what the data say of
            the candidates. They should be of one type, so that nothing is compiled twice.
        prior: `prior(memory) -> [L]`, asked once: log prior weights of the reactions.
        screen: `screen(memory, structures [n, L]) -> [n]`, the lower the better. If given, a
            proposal has several rounds and the policy learns from the screen between them, as the
            generations of a genetic algorithm do.
        rounds: of a proposal with a screen.
        most: structures of a proposal, if fewer than asked for: what a policy samples is dear,
            0.1 to 4 ms of a CPU each for 30 to 420 candidates.
        seed: of the first weights.
    """

    def __init__(
        self,
        learner: Learner | None = None,
        policy: Any = None,
        *,
        space: Callable[[Any], Environment] = space_of,
        features: Callable[[Any], Features] = features_of,
        prior: Callable[[Any], Any] = prior_of,
        screen: Callable[[Any, np.ndarray], np.ndarray] | None = None,
        rounds: int = 4,
        most: int = 512,
        seed: int = 0,
    ):
        self.learner, self.policy, self.seed = learner or Learner(), policy, seed
        self.space, self.features, self.prior = space, features, prior
        self.screen, self.rounds, self.most = screen, rounds, most
        self.env: Any = None
        self._given: Any = None
        self._now: Any = None
        self._learned: LearnerState | None = None
        self._kept: dict[str, np.ndarray] = {}
        self._orders: dict[bytes, np.ndarray] = {}

    def __repr__(self) -> str:
        """What it proposes depends on, besides the data."""
        given = "" if self.policy is None else ", policy given"
        rounds = "" if self.screen is None else f", rounds={self.rounds}"
        return f"PolicyArm({self.learner}, most={self.most}, seed={self.seed}{rounds}{given})"

    def propose(self, rng: np.random.Generator, n: int, memory: Any) -> np.ndarray:
        """Structures to screen, bool [n, L]."""
        if self.env is None:
            self.env, self._given = self.space(memory), self.prior(memory)
        self._now = self.features(memory)
        rounds = self.rounds if self.screen is not None else 1
        self._orders.clear()
        found = []
        for i in range(rounds):
            structures, orders = self._sample(rng, max(1, min(n, self.most) // rounds))
            found.append(structures)
            if self.screen is not None and i < rounds - 1:
                scores = np.asarray(self.screen(memory, structures))
                self._learn(structures, orders, -scores, elite=False)
        return np.concatenate(found)

    def update(self, structures: np.ndarray, rewards: np.ndarray) -> None:
        """Learns from structures [n, L] that were fitted and their rewards [n]."""
        structures, rewards = np.asarray(structures, bool), np.asarray(rewards, float)
        if self._now is None or not len(structures):
            return  # before its first proposal it knows no data
        orders = np.zeros((len(structures), self._begin().orders.shape[1]), np.int32)
        buildable = np.ones(len(structures), bool)
        others = []
        for i, structure in enumerate(structures):
            if structure.tobytes() in self._orders:
                orders[i] = self._orders[structure.tobytes()]
            else:
                others.append(i)
        for part in np.array_split(others, range(_TOGETHER, len(others), _TOGETHER)):
            rows = part.astype(int)
            orders[rows], buildable[rows] = self._order(structures[rows], len(rows))
        self._learn(structures[buildable], orders[buildable], rewards[buildable], elite=True)

    def state(self) -> dict[str, np.ndarray]:
        """What it has learned, as arrays by name; a search keeps it after each round."""
        if self._learned is None:
            return self._kept
        leaves = jax.tree_util.tree_leaves_with_path(self._learned)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self._kept, self._learned = dict(arrays), None

    @property
    def weights(self) -> Any:
        """Weights of the network, for tasks of any size."""
        return self._begin().params.policy

    def _begin(self) -> LearnerState:
        if self._learned is None:
            if self._now is None:
                raise ValueError("expected a proposal before the weights are asked for; got none")
            key = jax.random.key(self.seed)
            fresh = init(self.learner, key, self.env, self._now, self.policy, self._given)
            paths, tree = jax.tree_util.tree_flatten_with_path(fresh)
            kept = [self._kept.get(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
            self._learned = jax.tree.unflatten(tree, kept)
        return self._learned

    def _sample(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        params, policy = self._begin().params, self.learner.policy
        parts = []
        for _ in range(-(-n // _TOGETHER)):
            key = jax.random.key(int(rng.integers(2**31)))
            parts.append(sample(policy, params, key, self.env, self._now, _TOGETHER))
        structures, orders = (np.concatenate(x)[:n] for x in zip(*parts, strict=True))
        for structure, order in zip(structures, orders, strict=True):
            self._orders[structure.tobytes()] = order
        return structures, orders

    def _order(self, structures: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Orders in which structures of others can be built, and whether they can."""
        padded = np.pad(structures, ((0, _TOGETHER - n), (0, 0)))
        key = jax.random.key(int(structures.sum()) + self.seed)
        orders, buildable = orders_of(key, self.env, padded)
        return np.asarray(orders)[:n], np.asarray(buildable)[:n]

    def _learn(
        self, structures: np.ndarray, orders: np.ndarray, rewards: np.ndarray, elite: bool
    ) -> None:
        before = self._begin()
        if not len(structures):
            return
        after = update(self.learner, before, self.env, self._now, structures, orders, rewards)
        if not elite:  # a screen's reward is on another scale than those of fits
            after = after._replace(
                structures=before.structures, orders=before.orders, rewards=before.rewards
            )
        self._learned = after
