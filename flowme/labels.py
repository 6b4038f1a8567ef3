"""What a study knows beyond numbers: who its subjects are, and the table that it came from."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowme.columns import Columns
from flowme.table import row_name

__all__ = ["Labels", "Subjects"]


class Subjects(NamedTuple):
    """The subjects of a study: how many there are (`size`), and their identifiers (`ids`)."""

    size: int
    ids: tuple[Any, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Labels:
    """What a study knows beyond numbers: names, and the table that it came from."""

    ids: tuple[Any, ...]
    frame: pd.DataFrame
    columns: Columns
    units: dict[str, str]
    rows: np.ndarray  # [subject, time] position in `frame`; padding repeats the last
    dose_rows: np.ndarray  # [subject, dose] likewise
    written: np.ndarray  # [subject, dose] where a dose is written in its row: no additional one
    measured: dict[str, np.ndarray]  # outcome -> [subject, time], as in `frame`
    levels: dict[str, tuple[Any, ...]]  # of categorical covariates
    filled: dict[str, np.ndarray]  # covariate -> [subject, time], where its cell is empty
    linear: tuple[str, ...]  # covariates that are linear between records

    # Labels are static data of the pytree, hence part of every jit cache key. Any two count as
    # equal, so that another study of the same shape does not recompile. The price: a Study that
    # a jitted function *returns* carries the labels of the study first traced.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:  # JAX prints static data in its error messages
        return "labels"

    def subset(self, subjects: np.ndarray) -> "Labels":
        kept = np.unique(self.rows[subjects])
        return replace(
            self,
            ids=tuple(self.ids[i] for i in subjects),
            frame=self.frame.iloc[kept].copy(),
            rows=np.searchsorted(kept, self.rows[subjects]),
            dose_rows=np.searchsorted(kept, self.dose_rows[subjects]),
            written=self.written[subjects],
            measured={name: mask[subjects] for name, mask in self.measured.items()},
            filled={name: mask[subjects] for name, mask in self.filled.items()},
        )

    def row_name(self, row: int) -> str:
        """A row of the table in words, for messages."""
        return row_name(self.frame, row)

    def row_of_dose(self, compartment: int) -> str:
        """Where the table first gives a dose into a compartment, in words, for messages."""
        column = self.columns.compartment
        for subject, dose in np.argwhere(self.written) if column is not None else ():
            row = self.dose_rows[subject, dose]
            if self.frame[column].iloc[row] == compartment:
                return f" ({self.row_name(row)}, subject {self.ids[subject]!r})"
        return ""
