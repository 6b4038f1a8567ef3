"""What a search has to solve: data, candidate reactions, and how well a structure explains them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .data import TimeCourses
from .library import Library
from .simulate import (
    Design,
    Reactions,
    design,
    library_arrays,
    sensitivities,
)

_FLOOR = 1e-3  # of a species' standard deviation: noise below is not resolved by fixed steps


@dataclass(frozen=True, eq=False)
class Problem:
    """Time courses and the library of reactions that may explain them.

    The residuals of species s are normal with a standard deviation σ_s of its own, estimated with
    the rates: a structure's deviance is

        D = Σ_s [ n_s log σ̂_s² + SSE_s / σ̂_s² ],   σ̂_s² = max(SSE_s / n_s, floor_s²),

    and BIC = D + p log n. The floor, a thousandth of the species' standard deviation, is where
    the error of the solver begins to count.

    Attributes:
        courses: the data.
        library: L candidate reactions.
        slots: most reactions of a structure, R.
        batch: structures that are simulated together, B.
        substeps: steps of the solver between two records.
        reactions: the library as arrays; see `library_arrays`.
        design: the data as arrays.
    """

    courses: TimeCourses
    library: Library
    slots: int
    batch: int
    substeps: int
    reactions: Reactions = field(repr=False)
    design: Design = field(repr=False)

    @classmethod
    def of(cls, courses: TimeCourses, library: Library, slots: int = 8, batch: int = 16) -> Problem:
        """The problem, with the arrays of its kernels."""
        arrays = library_arrays(library, courses), design(courses)
        return cls(courses, library, slots, batch, 2, *arrays)

    def with_substeps(self, substeps: int) -> Problem:
        """The problem with other steps of the solver."""
        return replace(self, substeps=substeps)

    @property
    def floor(self) -> np.ndarray:
        """Smallest σ of each species, [S]."""
        values = np.where(self.courses.observed, self.courses.values, np.nan)
        seen = self.courses.count > 1
        sd = [np.nanstd(values[..., s]) if seen[s] else 1.0 for s in range(len(seen))]
        return _FLOOR * np.maximum(np.array(sd, float), 1e-3)

    def variance(self, squares: np.ndarray) -> np.ndarray:
        """σ̂² of each species from its sum of squares, [..., S] -> [..., S]."""
        return np.maximum(squares / np.maximum(self.courses.count, 1), self.floor**2)

    def deviance(self, squares: np.ndarray) -> np.ndarray:
        """D from the sums of squares of the species, [..., S] -> [...]; inf where not finite."""
        count = self.courses.count
        variance = self.variance(np.where(np.isfinite(squares), squares, 1.0))
        deviance = (count * np.log(variance) + squares / variance).sum(-1)
        return np.where(np.isfinite(squares).all(-1), deviance, np.inf)

    def bic(self, deviance: np.ndarray, parameters: int) -> np.ndarray:
        """D + p log n."""
        return deviance + parameters * np.log(self.courses.count.sum())

    def gather(self, structures: np.ndarray) -> Reactions:
        """The reactions of B structures, rows [B, R] of which L is an empty slot."""
        chosen = (np.moveaxis(a[:, structures], 1, -1) for a in self.reactions)  # [S, R, B]
        return Reactions(*(np.ascontiguousarray(a) for a in chosen))

    def rows(self, structures: list[tuple[int, ...]]) -> np.ndarray:
        """Structures of at most R reactions as rows [B, R], the empty slots L."""
        empty = len(self.library)
        return np.array([[*s, *[empty] * (self.slots - len(s))] for s in structures], int)

    def along_library(
        self, rows: tuple[int, ...], log_rates: np.ndarray, initial: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x [T, S, C] of one structure and its derivatives by all κ and the estimated initial
        states [T, S, L + O, C]; log rates [R], initial states [C, S]."""
        library = Reactions(*(a[:, :-1, None] for a in self.reactions))
        found = sensitivities(*self._one(rows, log_rates, initial), library)
        x, slopes = (np.asarray(a, float) for a in found)
        return x, slopes

    def path(
        self, rows: tuple[int, ...], log_rates: np.ndarray, initial: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x and dx/dτ of one structure at the records, [C, T, S] each."""
        x = self.along_library(rows, log_rates, initial)[0].transpose(2, 0, 1)
        with_one = np.concatenate([np.ones((*x.shape[:2], 1)), x], -1)
        first, second, net = (a[:, list(rows)] for a in self.reactions)
        return x, (with_one @ first) * (with_one @ second) * np.exp(log_rates) @ net.T

    def _one(self, rows: tuple[int, ...], log_rates: np.ndarray, initial: np.ndarray) -> tuple:
        """The arguments of a kernel for one structure."""
        padded = np.zeros((self.slots, 1))
        padded[: len(rows), 0] = log_rates
        one = self.gather(self.rows([rows]))
        return one, padded, initial.T[..., None].copy(), self.design, self.substeps
