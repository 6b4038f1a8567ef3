"""Proposers of structures, behind one interface.

An arm has `propose(rng, n, memory)`, which gives about n structures as masks [n, L] given what the
search knows, and `update(structures, rewards)`, which tells it how those that were fitted fared.
What it proposes is screened; the most promising structures are fitted. To write another arm,
write these two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .door import check_whole
from .memory import Memory

_MOST = 100  # steps or generations of a proposal, which share its structures


class Arm(Protocol):
    """A proposer of structures."""

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        """Structures to screen, bool [n, L]."""

    def update(self, structures: np.ndarray, rewards: np.ndarray) -> None:
        """Structures [n, L] that were fitted, and their rewards [n]."""


class _Memoryless:
    def update(self, structures: np.ndarray, rewards: np.ndarray) -> None:
        """Nothing is learned but what the memory holds."""


@dataclass(frozen=True)
class Random(_Memoryless):
    """Each reaction as likely as any other, each number of reactions up to the slots."""

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        return drawn(rng, n, np.zeros(len(memory.problem.library)), memory.problem.slots)


@dataclass(frozen=True)
class ClassPrior(_Memoryless):
    """Reactions by their prior weight."""

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        return drawn(rng, n, memory.prior, memory.problem.slots)


@dataclass(frozen=True)
class Stepwise(_Memoryless):
    """Forward, backward and swapping steps, each to the best neighbour by the screen.

    Attributes:
        starts: random structures to begin from, beside the empty one and the best fit.
        steps: most steps from each.
    """

    starts: int = 2
    steps: int = 12

    def __post_init__(self):
        check_whole("starts", self.starts, 0)
        check_whole("steps", self.steps, 1, _MOST)

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        L, slots = len(memory.problem.library), memory.problem.slots
        begin = [np.zeros(L, bool), *drawn(rng, self.starts, memory.prior, slots)]
        begin += [mask(L, s.fit.rows) for s in memory.best(1)]
        found = []
        for now in begin:
            value = np.inf
            for _ in range(self.steps):
                around = neighbours(now, slots)
                if not len(around):
                    break
                scores = screened(memory, around)
                order = np.argsort(scores)
                found.append(around[order[: n // (2 * self.steps)]])
                if scores[order[0]] >= value:
                    break
                now, value = around[order[0]], scores[order[0]]
        return np.concatenate(found)


@dataclass(frozen=True)
class Genetic(_Memoryless):
    """Generations of crossover and mutation, selected by the screen.

    Attributes:
        generations: of each proposal.
    """

    generations: int = 8

    def __post_init__(self):
        check_whole("generations", self.generations, 1, _MOST)

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        L, slots = len(memory.problem.library), memory.problem.slots
        size = n // self.generations
        parents = [mask(L, s.fit.rows) for s in memory.best(size // 4)]
        population = np.array([*parents, *drawn(rng, size, memory.prior, slots)])
        found = []
        for _ in range(self.generations):
            found.append(population)
            scores = screened(memory, population)
            survivors = population[np.argsort(scores, kind="stable")[: size // 3]]
            population = np.concatenate([survivors, children(rng, size, survivors, slots)])
        return np.concatenate(found)


@dataclass(frozen=True)
class GeneticLocal(_Memoryless):
    """Children of the best fits, and all structures one step from some of them.

    Selection is by the reward of the ODE fit. Each round looks around a few of the best, the
    better the more often.

    Attributes:
        parents: best fits that have children.
        around: of them, whose neighbours are proposed.
    """

    parents: int = 24
    around: int = 2

    def __post_init__(self):
        check_whole("parents", self.parents, 1)
        check_whole("around", self.around, 0)

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        L, slots = len(memory.problem.library), memory.problem.slots
        best = np.array([mask(L, s.fit.rows) for s in memory.best(self.parents)])
        if not len(best):
            return drawn(rng, n, memory.prior, slots)
        chosen = np.unique(rng.geometric(0.35, self.around) - 1)
        near = [neighbours(best[i], slots) for i in chosen if i < len(best)]
        return np.concatenate([*near, children(rng, n // 4, best, slots)])


@dataclass(frozen=True)
class Union:
    """Several arms with one memory: all at first, then one at a time, drawn by chance.

    Attributes:
        arms: the arms.
    """

    arms: tuple[Arm, ...]

    def __post_init__(self):
        if not isinstance(self.arms, tuple | list) or not self.arms:
            raise ValueError(f"expected a tuple of one arm or more; got {self.arms!r}")

    def propose(self, rng: np.random.Generator, n: int, memory: Memory) -> np.ndarray:
        chosen = self.arms if not memory.scored else [self.arms[rng.integers(len(self.arms))]]
        return np.concatenate([arm.propose(rng, n // len(chosen), memory) for arm in chosen])

    def update(self, structures: np.ndarray, rewards: np.ndarray) -> None:
        for arm in self.arms:
            arm.update(structures, rewards)

    def state(self) -> dict[str, np.ndarray]:
        """What the arms have learned, by the arm's number and name."""
        learned = ((i, arm.state()) for i, arm in enumerate(self.arms) if hasattr(arm, "state"))
        return {f"{i}/{name}": value for i, own in learned for name, value in own.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        for i, arm in enumerate(self.arms):
            if hasattr(arm, "restore"):
                first = f"{i}/"
                own = {k.removeprefix(first): v for k, v in arrays.items() if k.startswith(first)}
                arm.restore(own)


def mask(L: int, rows: tuple[int, ...]) -> np.ndarray:
    """A structure as bool [L]."""
    chosen = np.zeros(L, bool)
    chosen[list(rows)] = True
    return chosen


def as_rows(masks: np.ndarray, slots: int) -> np.ndarray:
    """Masks [n, L] as rows [n, R] padded by L."""
    L = masks.shape[1]
    order = np.argsort(~masks, axis=1, kind="stable")[:, :slots]
    return np.where(np.take_along_axis(masks, order, 1), order, L)


def drawn(rng: np.random.Generator, n: int, log_weight: np.ndarray, slots: int) -> np.ndarray:
    """n structures of 1 to R reactions, drawn without replacement by their weights."""
    keys = log_weight + rng.gumbel(size=(n, log_weight.size))
    rank = np.argsort(np.argsort(-keys, axis=1), axis=1)
    return rank < rng.integers(1, min(slots, log_weight.size) + 1, size=(n, 1))


def neighbours(structure: np.ndarray, slots: int) -> np.ndarray:
    """All structures with one reaction more, less or other, bool [n, L]."""
    inside, outside = np.flatnonzero(structure), np.flatnonzero(~structure)
    without = np.tile(structure, (inside.size, 1))
    without[np.arange(inside.size), inside] = False
    swapped = np.repeat(without, outside.size, axis=0)
    swapped[np.arange(len(swapped)), np.tile(outside, inside.size)] = True
    added = np.tile(structure, (outside.size if inside.size < slots else 0, 1))
    added[np.arange(len(added)), outside[: len(added)]] = True
    found = np.concatenate([without, added, swapped])
    return found[found.any(1)]


def children(rng: np.random.Generator, n: int, parents: np.ndarray, slots: int) -> np.ndarray:
    """n structures, each of two parents' reactions and up to two mutations."""
    one, two = parents[rng.integers(len(parents), size=(2, n))]
    child = np.where(rng.random((n, 1)) < 0.5, one, two)
    mixed = np.where(rng.random(child.shape) < 0.5, one, two)
    child = np.where(rng.random((n, 1)) < 0.6, mixed, child)
    for _ in range(2):
        child ^= rng.random(child.shape) < 0.5 * child / np.maximum(child.sum(1, keepdims=True), 1)
        child ^= (rng.random(child.shape) < 0.7 / child.shape[1]) & ~child
    over = np.where(child, rng.random(child.shape), 2.0)
    kept = child & (np.argsort(np.argsort(over, axis=1), axis=1) < slots)
    return kept[kept.any(1)]


def screened(memory: Memory, masks: np.ndarray) -> np.ndarray:
    """Deviance and penalty of structures by the memory's screen, [n]: the lower the better."""
    rows = as_rows(masks, memory.problem.slots)
    deviance, rates = memory.screen(rows)
    used = np.where(rates > 0, rows, len(memory.problem.library))
    return deviance + memory.penalty(used)
