"""Which flows are learned side by side, and how held-out subjects choose among them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.joint import Weights
from flowme.infer.learn import Block, Learn, LearnState

DEPENDENCE = (8.0, 16.0)  # penalties on dependence between coordinates, chosen by held-out fit
_PATIENCE = 8  # updates without a better held-out likelihood after which a flow is stopped


class Learned(NamedTuple):
    """What the flows side by side have come to."""

    states: LearnState  # [state, ...]
    path: Block  # from number 0, the Gaussian
    blocks: int = 0  # of updates
    ended: bool = False  # whether held-out subjects stopped it
    why: str = ""  # it was stopped otherwise


class Plan(NamedTuple):
    """Which flows are learned side by side, and how held-out subjects choose among them."""

    folds: np.ndarray  # the fold that leaves out each subject, [subject]
    fold_count: int  # folds; 0 for none
    masks: np.ndarray  # [state, subject]
    dependence: np.ndarray  # penalty of each state, [state]
    everyone: np.ndarray  # the state of each penalty that sees all subjects, [penalty]

    @classmethod
    def of(cls, key, learn: Learn, size: int, count: int) -> Plan:
        laws = [law for law in learn.joint.roles.laws.values() if getattr(law, "network", False)]
        depends = any(law.flow.groups(len(law.names))[1].any() for law in laws)
        penalties = DEPENDENCE if depends and count else DEPENDENCE[:1]
        count = min(count, size)
        folds = np.asarray(jax.random.permutation(key, np.arange(size) % max(count, 1)))
        masks = np.concatenate([folds != np.arange(count)[:, None], np.ones((1, size), bool)])
        return cls(
            folds,
            count,
            np.tile(masks, (len(penalties), 1)).astype(float),
            np.repeat(penalties, count + 1),
            (count + 1) * np.arange(1, len(penalties) + 1) - 1,
        )

    def states(self, start: LearnState, weights: list[Weights]) -> LearnState:
        """The start of each, with its own weights, `[state, ...]`."""
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.masks), *x.shape)), start)
        return states._replace(weights=jax.tree.map(lambda *w: jnp.stack(w), *weights))

    def gaussian(self, start: LearnState, log_likelihood: np.ndarray) -> Block:
        """The first of the path: the Gaussian fit."""
        shape = (1, len(self.everyone))
        theta, weights = jax.tree.map(
            lambda x: np.broadcast_to(x, (*shape, *x.shape)), (start.theta, start.weights)
        )
        each: Any = np.broadcast_to(log_likelihood, (1, *self.masks.shape))
        return Block(each, theta, weights)

    @property
    def title(self) -> str:
        if not self.fold_count:
            return "Flow"
        return f"Flow, {self.fold_count} folds, {len(self.everyone)} penalties"

    def held_out(self, path: Block) -> np.ndarray:
        """log p(y_i) by the fold that does not see i, over that of the Gaussian,
        `[update, penalty, subject]`."""
        shape = (len(path.theta), -1, self.fold_count + 1, len(self.folds))
        values = np.asarray(path.log_likelihood).reshape(shape)
        found = np.take_along_axis(values, self.folds[None, None, None], axis=2)[:, :, 0]
        gain = found - found[:1]
        return np.where(np.isfinite(gain), gain, 0.0)  # such subjects are named at the end

    def report(self, path: Block) -> str:
        if not self.fold_count:
            return f"-2LL {-2 * path.log_likelihood[-1, -1].sum():.1f}"
        gain = self._smooth(path)
        return f"held-out -2LL {-2 * gain.max():+.1f} against the Gaussian"

    def past_the_best(self, path: Block) -> bool:
        """Whether no penalty has improved its held-out likelihood for a while."""
        if not self.fold_count:
            return False
        gain = self._smooth(path)
        return bool(np.all(np.argmax(gain, axis=0) < len(gain) - _PATIENCE))

    def choose(self, path: Block) -> tuple[int, int, np.ndarray | None]:
        """The update and penalty with the best held-out likelihood, and its curve; no update at
        all, the Gaussian, unless it is better by more than a standard error of the difference."""
        if not self.fold_count:
            return len(path.theta) - 1, 0, None
        smooth, gain = self._smooth(path), self.held_out(path)
        update, penalty = map(int, np.unravel_index(np.argmax(smooth), smooth.shape))
        error = np.sqrt(gain.shape[2]) * gain[update, penalty].std(ddof=1)
        if smooth[update, penalty] <= error:
            update = 0
        return update, penalty, gain[:, penalty].sum(1)

    def cut_short(self, path: Block, update: int, ended: bool, block: int) -> str:
        """Why the flow would have been better, perhaps, with more updates; or nothing."""
        if ended or update < len(path.theta) - block:
            return ""
        if not self.fold_count:
            return "the flow was stopped by flow_updates, not by held-out subjects (folds=0)"
        return f"the flow was still improving after {len(path.theta)} updates: raise flow_updates"

    def _smooth(self, path: Block) -> np.ndarray:
        """Total gain `[update, penalty]`, a running mean of five: each update draws fresh nodes,
        so the curve is noisy."""
        total = np.pad(self.held_out(path).sum(2), ((2, 2), (0, 0)), mode="edge")
        return np.mean([total[k : len(total) - 4 + k] for k in range(5)], axis=0)
