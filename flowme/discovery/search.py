"""One round of a search: propose, screen, fit, remember."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arms import Arm, as_rows, mask
from .memory import Memory
from .problem import Problem

_MODEST = 1e-2  # scaled rate at which a reaction starts that the screen gave none


def advance(
    arm: Arm,
    memory: Memory,
    fit: Any,
    rng: np.random.Generator,
    proposals: int = 2000,
    fits: int = 32,
) -> int:
    """One round: the arm proposes, screens choose, the chosen are fitted and remembered.

    Args:
        arm: proposes structures.
        memory: what is known, to which the fits are added.
        fit: the inner fit, such as `LevenbergMarquardt()`.
        rng: of the arm.
        proposals: structures to ask the arm for.
        fits: most structures to fit.

    Returns:
        Number of structures fitted.
    """
    rows = as_rows(arm.propose(rng, proposals, memory), memory.problem.slots)
    structures, starts = promising(memory, np.unique(rows, axis=0), fits)
    if structures:
        best = min((s.fit.deviance for s in memory.best(1)), default=np.inf)
        memory.add(fit(memory.problem, structures, starts, best))
        masks = np.array([mask(len(memory.problem.library), s) for s in structures])
        arm.update(masks, np.array([memory.scored[s].reward for s in structures]))
    return len(structures)


def promising(
    memory: Memory, rows: np.ndarray, n: int
) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Up to n structures that are new, half by integral matching along the best fit and half by
    the tangent screen of the fit nearest to each, with rates to start from."""
    rankings = [judged(memory, rows, [memory.screen])]
    tangents = memory.tangents()
    if tangents:
        L = len(memory.problem.library)
        elite = np.array([mask(L, structure) for structure, _ in tangents])
        members = np.array([mask(L + 1, tuple(r))[:L] for r in rows])
        apart = (members[:, None] ^ elite).sum(-1) if len(rows) * elite.size < 1e7 else (
            members.sum(1)[:, None] + elite.sum(1) - 2 * members.astype(int) @ elite.T.astype(int)
        )
        rankings.append(judged(memory, rows, [t for _, t in tangents], apart.argmin(1)))
    chosen: dict[tuple[int, ...], np.ndarray] = {}
    queues = [iter(np.argsort(score, kind="stable")) for score, _, _ in rankings]
    looked = 0
    while len(chosen) < n and looked < 20 * n:
        for (_, used, rates), queue in zip(rankings, queues, strict=True):
            looked += 1
            i = next(queue, None)
            if i is not None and len(chosen) < n:
                _consider(memory, used[i], rates[i], chosen)
    return list(chosen), list(chosen.values())


def judged(
    memory: Memory, rows: np.ndarray, screens: list, which: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted deviance and penalty [n], reactions with a rate [n, R], and their rates [n, R]."""
    which = np.zeros(len(rows), int) if which is None else which
    deviance, rates = np.zeros(len(rows)), np.zeros(rows.shape)
    for i, screen in enumerate(screens):
        if (which == i).any():
            deviance[which == i], rates[which == i] = screen(rows[which == i])
    used = np.where(rates > 0, rows, len(memory.problem.library))
    return deviance + memory.penalty(used), used, rates


def _consider(memory: Memory, rows: np.ndarray, rates: np.ndarray, chosen: dict) -> None:
    """Add the structure's canonical form to the chosen, unless it is empty or known."""
    found = {int(r): k for r, k in zip(rows, rates, strict=True) if r < len(memory.problem.library)}
    key = memory.key(found)
    if 0 < len(key) <= memory.problem.slots and key not in memory.scored and key not in chosen:
        chosen[key] = np.array([found.get(r, _MODEST) for r in key])
