"""What a search has to solve: data, candidate reactions, and how well a structure explains them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .data import TimeCourses
from .library import Library
from .simulate import Design, Reactions, design, library_arrays

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
    """

    courses: TimeCourses
    library: Library
    slots: int = 8
    batch: int = 16
    substeps: int = 2
    reactions: Reactions = field(init=False, repr=False)
    design: Design = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reactions", library_arrays(self.library, self.courses))
        object.__setattr__(self, "design", design(self.courses))

    @property
    def floor(self) -> np.ndarray:
        """Smallest σ of each species, [S]."""
        values = np.where(self.courses.observed, self.courses.values, np.nan)
        seen = self.courses.count > 1
        sd = [np.nanstd(values[..., s]) if seen[s] else 1.0 for s in range(len(seen))]
        return _FLOOR * np.maximum(sd, 1e-3)

    def variance(self, squares: np.ndarray) -> np.ndarray:
        """σ̂² of each species from its sum of squares, [..., S] -> [..., S]."""
        return np.maximum(squares / np.maximum(self.courses.count, 1), self.floor**2)

    def deviance(self, squares: np.ndarray) -> np.ndarray:
        """D from the sums of squares of the species, [..., S] -> [...]; inf where not finite."""
        count = self.courses.count
        variance = self.variance(np.where(np.isfinite(squares), squares, 1.0))
        deviance = (count * np.log(variance) + squares / variance).sum(-1)
        return np.where(np.isfinite(squares).all(-1), deviance, np.inf)

    def bic(self, deviance: np.ndarray, parameters: np.ndarray | int) -> np.ndarray:
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
