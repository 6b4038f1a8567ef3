"""The search: rounds of proposing, screening, fitting and remembering, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .arms import Arm, as_rows, mask
from .journal import Course, Journal
from .memory import MODEST, Memory
from .robustness import squares_of

_PRECISE = 0.5  # change of the best deviance with half the step, above which steps are halved
_MOST_SUBSTEPS = 64
_REFINED = 32  # best structures that are fitted again then
_DEPTH = 4  # times the number to be chosen: how far down a ranking new structures are looked for
_IDLE = 20  # rounds without a structure to fit, after which the library is exhausted
_ROUND = 32  # fits of one round


class Budget(NamedTuple):
    """When a search ends.

    Attributes:
        seconds: of all sittings together.
        evaluations: ODE fits; None: any number.
        patience: rounds without a better structure; None: any number.
    """

    seconds: float
    evaluations: int | None
    patience: int | None

    def spent(self, course: Course) -> str:
        """Why the search ends now; empty if it goes on."""
        if course.seconds >= self.seconds:
            return f"budget of {self.seconds:g} s spent"
        if self.evaluations is not None and course.evaluations >= self.evaluations:
            return f"budget of {self.evaluations} ODE fits spent"
        if course.idle >= _IDLE:
            return f"nothing new to fit in {course.idle} rounds"
        if self.patience is not None and course.stale >= self.patience:
            return f"nothing better in {course.stale} rounds"
        return ""


def search(
    arm: Arm,
    memory: Memory,
    fit: Any,
    rng: np.random.Generator,
    budget: Budget,
    journal: Journal,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Course:
    """Rounds until the budget is spent or Ctrl-C; what a journal holds is taken up first.

    Args:
        arm: proposes structures.
        memory: to be filled.
        fit: the inner fit.
        rng: of the arm.
        budget: when to end.
        journal: keeps the search.
        progress: whether to show a bar.
        clock: by which the seconds are counted.

    Returns:
        How the search went.
    """
    course = journal.restore(memory, rng, arm)
    journal.keep(memory, rng, arm, course)
    begun = clock() - course.seconds
    with tqdm(
        desc="Discovery", unit=" fits", initial=course.evaluations, disable=not progress
    ) as bar:
        try:
            while not (why := budget.spent(course)):
                before = memory.best(1)
                most = budget.evaluations
                fits = _ROUND if most is None else min(_ROUND, most - course.evaluations)
                n = advance(arm, memory, fit, rng, fits=fits)
                refine(memory, fit)
                better = memory.best(1) != before
                course = course.after(n, clock() - begun, better)
                if fits == _ROUND:  # a longer search has no round cut short: it goes on before it
                    journal.keep(memory, rng, arm, course)
                bar.update(n)
                bar.set_postfix_str(memory.says())
        except KeyboardInterrupt:
            why = "interrupted"
    journal.close()
    return course._replace(why=why)


def refine(memory: Memory, fit: Any) -> None:
    """Halve the solver's steps while that changes the best deviance, and fit the best again."""
    problem = memory.problem
    for best in memory.best(1):
        if problem.substeps >= _MOST_SUBSTEPS or memory.precise == best.fit.rows:
            return
        finer = problem.with_substeps(2 * problem.substeps)
        now = (best.fit.rows,), (best.fit.log_rates,), (best.fit.initial,)
        squares = squares_of(finer, *now, [np.ones(len(problem.courses.conditions))])
        change = abs(float(problem.deviance(squares)[0]) - best.fit.deviance)
        memory.precise = best.fit.rows
        if change > _PRECISE:
            memory.refine(finer)
            again = [s.fit for s in memory.best(_REFINED)]
            starts, states = [np.exp(f.log_rates) for f in again], [f.initial for f in again]
            memory.add(fit(finer, [f.rows for f in again], starts, initial=states))


def advance(
    arm: Arm,
    memory: Memory,
    fit: Any,
    rng: np.random.Generator,
    proposals: int = 2000,
    fits: int = _ROUND,
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
    for structure in rows[: _DEPTH * n] if len(chosen) < n else ():
        if len(chosen) < n:  # little is left: those too in which the screens set rates to 0
            _consider(memory, structure, np.zeros(structure.shape), chosen)
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
        chosen[key] = np.array([found.get(r) or MODEST for r in key])
