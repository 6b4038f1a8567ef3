"""Which flows are learned side by side, and how held-out subjects choose among them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from flowme.infer.learn import Block, Learn, LearnState

DEPENDENCE = (0.3, 8.0)  # penalties on dependence between coordinates, chosen by held-out fit
FIRM = 8.0  # the one where nobody is held out to stop the learning
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
        penalties = (DEPENDENCE if depends else DEPENDENCE[:1]) if count else (FIRM,)
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

    @property
    def sets(self) -> np.ndarray:
        """The subjects that each fold learns from, and all, `[fold + 1, subject]`."""
        return self.masks[: self.fold_count + 1]

    def per_penalty(self, found: list[Any]) -> list[Any]:
        """What belongs to each of the `sets`, for each state."""
        return found * len(self.everyone)

    def gaussian(self, start: LearnState, log_likelihood: np.ndarray) -> Block:
        """The first of the path: the Gaussian fits, `log_likelihood` `[state, subject]`."""
        shape = (1, len(self.everyone))
        theta, weights = jax.tree.map(
            lambda x: np.broadcast_to(x, (*shape, *x.shape)), (start.theta, start.weights)
        )
        return Block(log_likelihood[None], theta, weights)  # type: ignore[arg-type]

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
        """The update and penalty with the best held-out likelihood, and its curve.

        Where held-out subjects cannot tell two penalties apart, by a standard error of the
        difference, the smaller one: little dependence costs new subjects less where there is none
        than they lose where it is held back. The Gaussian, no update at all, unless the flow is
        better by more than a standard error.
        """
        if not self.fold_count:
            return len(path.theta) - 1, 0, None
        smooth, gain = self._smooth(path), self.held_out(path)
        updates = np.argmax(smooth, axis=0)
        each = gain[updates, np.arange(len(updates))]  # [penalty, subject]
        best = smooth.max(axis=0)
        behind = best.max() - best
        told_apart = behind > _error(each[np.argmax(best)] - each)
        penalty = int(np.argmin(told_apart))
        update = int(updates[penalty])
        if best[penalty] <= _error(each[penalty]):
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
        """Total gain `[update, penalty]`, from number 1 a running mean of five: each update draws
        fresh nodes, so the curve is noisy. (Number 0, the Gaussian, is not one of its points.)"""
        total = self.held_out(path).sum(2)
        if len(total) == 1:
            return total
        wide = np.pad(total[1:], ((2, 2), (0, 0)), mode="edge")
        flows = np.mean([wide[k : len(wide) - 4 + k] for k in range(5)], axis=0)
        return np.concatenate([total[:1], flows])


def _error(gain: np.ndarray) -> np.ndarray:
    """The standard error of a total over subjects, the last axis."""
    return np.sqrt(gain.shape[-1]) * gain.std(axis=-1, ddof=1)
