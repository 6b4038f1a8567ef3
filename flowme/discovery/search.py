"""One round of a search: propose, screen, fit, remember."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arms import Arm, as_rows, mask
from .memory import Memory
from .problem import Problem

_DEPTH = 4  # times the number to be chosen: how far down a ranking new structures are looked for
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
        near = nearest(rows, elite)
        rankings.append(judged(memory, rows, [screen for _, screen in tangents], near))
    chosen: dict[tuple[int, ...], np.ndarray] = {}
    for rank in range(_DEPTH * n):
        for order, used, rates in rankings:
            if rank < len(order) and len(chosen) < n:
                _consider(memory, used[order[rank]], rates[order[rank]], chosen)
    return list(chosen), list(chosen.values())


def nearest(rows: np.ndarray, elite: np.ndarray) -> np.ndarray:
    """Which elite [E, L] differs from each structure [n, R] in the fewest reactions, [n]."""
    members = np.pad(elite, ((0, 0), (0, 1)))[:, rows].sum(-1)  # [E, n] reactions in common
    return (elite.sum(1)[:, None] - 2 * members).argmin(0)


def judged(
    memory: Memory, rows: np.ndarray, screens: list, which: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Structures in the order of what the screens predict [n], those of their reactions that have
    a rate [n, R], and the rates [n, R]. `which` of the screens judges each; the first if None."""
    which = np.zeros(len(rows), int) if which is None else which
    deviance, rates = np.zeros(len(rows)), np.zeros(rows.shape)
    for i, screen in enumerate(screens):
        if (which == i).any():
            deviance[which == i], rates[which == i] = screen(rows[which == i])
    used = np.where(rates > 0, rows, len(memory.problem.library))
    value = deviance + memory.penalty(used)
    first = np.unique(np.sort(used, axis=1), axis=0, return_index=True)[1]  # supports, once each
    order = first[np.argsort(value[first], kind="stable")]
    return order, used, rates


def _consider(memory: Memory, rows: np.ndarray, rates: np.ndarray, chosen: dict) -> None:
    """Add the structure's canonical form to the chosen, unless it is empty or known."""
    found = {int(r): k for r, k in zip(rows, rates, strict=True) if r < len(memory.problem.library)}
    key = memory.key(found)
    if 0 < len(key) <= memory.problem.slots and key not in memory.scored and key not in chosen:
        chosen[key] = np.array([found.get(r, _MODEST) for r in key])
