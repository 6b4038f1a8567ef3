"""Rates by differential evolution: slower than Levenberg and Marquardt, but without gradients and
from anywhere, for structures whose deviance has many minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import differential_evolution

from .fit import Estimate, LevenbergMarquardt
from .problem import Problem
from .robustness import squares_of


@dataclass(frozen=True)
class DifferentialEvolution:
    """SciPy's differential evolution over the log rates, its population simulated as one batch,
    then a few steps of Levenberg and Marquardt, which estimate the unknown initial states too.

    An inner fit as any other: `discover(..., fit=DifferentialEvolution())`.

    Attributes:
        generations: most of each structure.
        population: per rate.
        width: log rates are sought within so much of their start.
        seed: of the evolution.

    Reference: Storn & Price, J. Global Optim. 11 (1997) 341.
    """

    generations: int = 40
    population: int = 8
    width: float = 4.0
    seed: int = 0

    def __call__(
        self,
        problem: Problem,
        structures: Sequence[tuple[int, ...]],
        starts: Sequence[np.ndarray],
        best: float = np.inf,
        initial: Sequence[np.ndarray] | None = None,
        use: Any = None,
    ) -> list[Estimate]:
        """The estimates, one for each structure. See `LevenbergMarquardt`."""
        guesses = initial or [problem.courses.initial] * len(structures)
        use = np.ones((len(structures), len(problem.courses.conditions))) if use is None else use
        given = zip(structures, starts, guesses, use, strict=True)
        evolved = [self._evolve(problem, *one) for one in given]
        return LevenbergMarquardt()(problem, structures, evolved, best, guesses, use)

    def _evolve(
        self, problem: Problem, rows: tuple[int, ...], start: Any, initial: Any, use: Any
    ) -> np.ndarray:
        """Rates of one structure, [R]."""
        centre = np.log(np.maximum(start, 1e-12))

        def deviance(log_rates: np.ndarray) -> np.ndarray:
            n = log_rates.shape[1]  # SciPy's vectorised functions take [R, n]
            squares = squares_of(problem, [rows] * n, list(log_rates.T), [initial] * n, [use] * n)
            return np.minimum(problem.deviance(squares), 1e12)

        found = differential_evolution(
            deviance,
            list(zip(centre - self.width, centre + self.width, strict=True)),
            maxiter=self.generations,
            popsize=self.population,
            x0=centre,
            rng=np.random.default_rng(self.seed),
            polish=False,
            vectorized=True,
            updating="deferred",
        )
        return np.exp(found.x)
