"""What a search knows: every structure fitted, by equivalence class, and screens around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from .equivalence import canonical
from .fit import Estimate
from .problem import Problem
from .reward import Weights, complexity, prediction
from .screen import Screen, integral_screen, tangent_screen
from .smooth import Smooth

_ELITE = 6  # structures around which there are tangent screens
MODEST = 1e-2  # scaled rate at which a reaction starts that a screen gave none


class Scored(NamedTuple):
    """A fit and its reward."""

    fit: Estimate
    prediction: float
    complexity: float
    reward: float


class Memory:
    """All fits of a search. It knows no truth: only the data, and what was asked to be fitted.

    Attributes:
        problem: data and library.
        prior: log prior of each reaction, [L].
        weights: of the reward's parts.
        scored: by canonical rows.
        precise: the best structure when the solver's steps were last found short enough.
    """

    def __init__(self, problem: Problem, prior: np.ndarray, weights: Weights):
        self.problem, self.prior, self.weights = problem, prior, weights
        self.scored: dict[tuple[int, ...], Scored] = {}
        self.precise: tuple[int, ...] | None = None
        self._keys: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._tangents: dict[tuple[int, ...], Screen] = {}
        self._matched: tuple[tuple[int, ...], Screen] | None = None
        self._smooth = Smooth(problem.courses)
        self._splines = integral_screen(problem, self._smooth)

    def key(self, rows: Iterable[int]) -> tuple[int, ...]:
        """The canonical structure of the same class."""
        structure = tuple(rows)
        if structure not in self._keys:
            self._keys[structure] = canonical(self.problem.library, list(structure))
        return self._keys[structure]

    def add(self, fits: Iterable[Estimate]) -> None:
        """Score fits and keep them."""
        for fit in fits:
            self.scored[fit.rows] = self.score(fit)

    def score(self, fit: Estimate) -> Scored:
        """The parts of a fit's reward, all but robustness."""
        parameters = len(fit.rows) + int((~self.problem.courses.known).sum())
        predicted = float(prediction(self.problem, np.array(fit.deviance), parameters))
        rows = self.problem.rows([fit.rows])
        simple = float(complexity(self.problem, self.prior, rows)[0])
        total = self.weights.prediction * predicted + self.weights.complexity * simple
        return Scored(fit, predicted, simple, total)

    def best(self, n: int = 1) -> list[Scored]:
        """The n of largest reward, best first."""
        return sorted(self.scored.values(), key=lambda s: -s.reward)[:n]

    def says(self) -> str:
        """The best structure in words, and its BIC."""
        if not self.scored:
            return "nothing yet"
        best = self.best()[0]
        reactions = "; ".join(str(self.problem.library.reactions[r]) for r in best.fit.rows)
        n = self.problem.courses.count.sum()
        return (
            f"{len(self.scored)} structures, best: {reactions} (BIC {-2 * n * best.prediction:.1f})"
        )

    def penalty(self, rows: np.ndarray) -> np.ndarray:
        """What is added to a deviance to make it -2n × reward, rows [n, R] padded by L."""
        n = self.problem.courses.count.sum()
        size = (rows < len(self.problem.library)).sum(1)
        simple = complexity(self.problem, self.prior, rows) * n
        return size * np.log(n) - 2 * self.weights.complexity * simple

    @property
    def screen(self) -> Screen:
        """Integral matching along the trajectories of the best fit; splines before there is one."""
        if not self.scored:
            return self._splines
        best = self.best()[0].fit
        if self._matched is None or self._matched[0] != best.rows:
            along = Path(self.problem, best, self._smooth.variance)
            self._matched = best.rows, integral_screen(self.problem, along)
        return self._matched[1]

    def starts(self, rows: tuple[int, ...]) -> list[np.ndarray]:
        """Scaled rates [R] from which the fit of a structure may start: those of its own fit, if
        there is one, and what each screen gives them."""
        padded = self.problem.rows([rows])
        screens = [self.screen, *(screen for _, screen in self.tangents())]
        given = [screen(padded)[1][0, : len(rows)] for screen in screens]
        own = [np.exp(self.scored[rows].fit.log_rates)] if rows in self.scored else []
        return own + [np.where(rates > 0, rates, MODEST) for rates in given]

    def refine(self, problem: Problem) -> None:
        """The same problem with another solver: what was computed with the last is forgotten."""
        self.problem, self._matched = problem, None
        self._tangents.clear()

    def tangents(self) -> list[tuple[tuple[int, ...], Screen]]:
        """Tangent screens of the best fits, with their structures."""
        elite = [s.fit for s in self.best(_ELITE) if np.isfinite(s.fit.deviance)]
        for fit in elite:
            if fit.rows not in self._tangents:
                self._tangents[fit.rows] = tangent_screen(self.problem, fit)
        self._tangents = {fit.rows: self._tangents[fit.rows] for fit in elite}
        return list(self._tangents.items())


class Path(Smooth):
    """The trajectories of a fit in place of a smoother: what it gives obeys an ODE."""

    def __init__(self, problem: Problem, fit: Estimate, variance: np.ndarray | None = None):
        x, slope = problem.path(fit.rows, fit.log_rates, fit.initial)
        self.curves = {}
        for c, time in enumerate(problem.courses.time):
            t, first = np.unique(time, return_index=True)
            for s in range(x.shape[-1]):
                self.curves[c, s] = CubicHermiteSpline(t, x[c, first, s], slope[c, first, s])
        self.variance = problem.variance(fit.squares) if variance is None else variance
