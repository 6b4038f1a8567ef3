"""`discover`: from a study to the reaction networks behind it, in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flowme as fm

from .arms import Arm, GeneticLocal, Stepwise, Union
from .data import time_courses
from .door import check
from .environment import environment
from .fit import LevenbergMarquardt
from .journal import Journal
from .library import Library, up_to_second_order
from .memory import Memory
from .problem import Problem
from .reaction import Reaction
from .result import Discovery, conclude
from .reward import Weights, log_prior, plausibility
from .search import Budget, search


def discover(
    study: fm.Study,
    species: Mapping[str, str | None] | Sequence[str],
    *,
    initial: Mapping[str, Any] | None = None,
    library: Library | None = None,
    conserved: Iterable[Mapping[str, float]] = (),
    whitelist: Iterable[Reaction | str] | None = None,
    blacklist: Iterable[Reaction | str] = (),
    most_reactions: int = 8,
    arm: Arm | None = None,
    fit: Any = None,
    prior: Callable[[Reaction], float] = plausibility,
    weights: Weights | None = None,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
    evaluations: int | None = None,
    patience: int | None = 20,
    leaders: int = 10,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Discovery:
    """Finds the reaction network behind time courses, and how sure one can be of each reaction.

    The search goes round: an arm proposes structures, screens choose among them, the chosen are
    fitted as ODEs, and the best fits make the next screens. It ends with the budget, or when
    nothing better has been found for a while. Ctrl-C ends it too, with the result so far.

    A hidden species is fitted with the others, but the search for it is a search for several
    reactions at once: say what is conserved, {"E": 1, "C": 1}, or the library that it may have.

    Args:
        study: each subject is one condition: an initial state of the same reactions.
        species: the outcome that measures each species, {"A": "conc_A"}; None for a hidden
            species, {"C": None}; or names, if they are the outcomes'.
        initial: known states at each subject's first record, by species: a number, [subject], or
            the name of a covariate. The others are estimated.
        library: candidate reactions; all up to second order between the species if None.
        conserved: laws that hold, as weights of species: {"E": 1, "C": 1}.
        whitelist: the only reactions allowed.
        blacklist: reactions not allowed.
        most_reactions: of a network.
        arm: proposes structures; `Union((Stepwise(), GeneticLocal()))` if None.
        fit: the inner fit; `LevenbergMarquardt()` if None.
        prior: log weight of a reaction before the data; by default the fewer molecules, the more.
        weights: of the parts of the reward.
        seconds: budget of the search. What follows takes some seconds more: the fits without one
            condition, and the simulations, by which the leaders' robustness is judged.
        clock: by which seconds are counted; `time.process_time` for those of the CPU.
        evaluations: budget of the search in ODE fits; no limit if None.
        patience: rounds without a better structure after which the search ends; None: never.
        leaders: structures on the leaderboard, whose robustness is judged.
        seed: the same seed, data and evaluations give the same search.
        checkpoint: folder in which the search is kept; a search found there goes on.
        progress: whether to show a bar.

    Returns:
        The leaderboard, the best network and the probability of each reaction.

    Raises:
        ValueError: for data that are no time courses of concentrations, an empty library,
            contradictory conservation laws, or a checkpoint of something else; and, or a
            TypeError, for an argument that is not what it should be.
    """
    check(
        study, species, initial=initial, library=library, most_reactions=most_reactions, arm=arm,
        fit=fit, prior=prior, weights=weights, seconds=seconds, clock=clock,
        evaluations=evaluations, patience=patience, leaders=leaders, seed=seed,
        checkpoint=checkpoint,
    )  # fmt: skip
    courses = time_courses(study, species, initial)
    chosen = _allowed(courses.species, library, conserved, whitelist, blacklist)
    problem = Problem.of(courses, chosen, min(most_reactions, len(chosen)))
    memory = Memory(problem, log_prior(chosen, prior), weights or Weights())
    rng = np.random.default_rng(seed)
    proposer = Union((Stepwise(), GeneticLocal())) if arm is None else arm
    method = LevenbergMarquardt() if fit is None else fit
    budget = Budget(seconds, evaluations, patience)
    journal = Journal.open(checkpoint, memory, int(seed), proposer, method)
    course = search(proposer, memory, method, rng, budget, journal, progress, clock)
    return conclude(memory, method, leaders, course, seed)


def _allowed(
    species: tuple[str, ...],
    library: Library | None,
    conserved: Iterable[Mapping[str, float]],
    whitelist: Iterable[Reaction | str] | None,
    blacklist: Iterable[Reaction | str],
) -> Library:
    """The reactions that laws and lists leave, between the species in their order."""
    whole = up_to_second_order(species) if library is None else library
    if set(whole.species) != set(species):
        raise ValueError(
            f"expected a library between the species {list(species)}; got one between "
            f"{list(whole.species)}"
        )
    rules = environment(whole, conserved=conserved, whitelist=whitelist, blacklist=blacklist)
    allowed = np.asarray(rules.allowed)
    kept = [r for r, is_allowed in zip(whole.reactions, allowed, strict=True) if is_allowed]
    return Library(species, kept)
