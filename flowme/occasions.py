"""Occasions of a study: stretches of a subject's time between which its parameters may change."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowme.table import Table

__all__ = ["Occasions", "arrange_occasions", "read_occasions"]

Array = Any  # a NumPy array on the host, a tracer under jit


class Occasions(NamedTuple):
    """The occasions of every subject, numbered from 0 in the order in which they come.

    An occasion lasts from its first record to the first record of the next.

    Attributes:
        index: [subject, time], the occasion of each record.
        present: [subject, occasion], False for occasions that a subject does not have.
    """

    index: Array
    present: Array

    @property
    def size(self) -> int:
        """How many subjects there are: what a plate over them asks for."""
        return self.index.shape[0]

    @property
    def most(self) -> int:
        """The largest number of occasions of a subject."""
        return self.present.shape[1]


def read_occasions(
    table: Table, columns: tuple[str, ...], code: np.ndarray, time: np.ndarray
) -> dict[str, np.ndarray]:
    """The number of the occasion of every row, by column: name -> [row].

    Each column is nested in those before it: visit 1 of period 2 is not visit 1 of period 1.
    """
    found: dict[str, np.ndarray] = {}
    order = np.lexsort((time, code))
    key = code.astype(np.int64)
    for name in columns:
        cells = [None if str(cell).strip() == "." else cell for cell in table.names(name)]
        level, _ = pd.factorize(pd.Series(cells, dtype=object))
        table.refuse(level < 0, f"an occasion in column {name!r}")
        key = pd.factorize(pd.MultiIndex.from_arrays([key, level]))[0]
        begins = np.diff(key[order], prepend=-1) != 0
        back = begins & pd.Series(np.where(begins, key[order], -1)).duplicated().to_numpy()
        for row in order[back].tolist():
            expected = f"an occasion in column {name!r} that is over when another has begun"
            cell = table.frame[name].iloc[row]
            table.found(row, expected, f"{cell} again. Number the later rows as a new one")
        run = np.cumsum(begins)
        first = np.minimum.reduceat(run, np.flatnonzero(np.diff(code[order], prepend=-2)))
        number = np.empty(len(code), np.int32)
        number[order] = run - np.repeat(first, np.unique(code[order], return_counts=True)[1])
        found[name] = number
    return found


def arrange_occasions(number: np.ndarray, rows: np.ndarray) -> Occasions:
    """The occasions of rows laid out as [subject, time], padded by the subject's last row."""
    index = number[rows]
    return Occasions(index, np.arange(index.max() + 1) <= index.max(axis=1, keepdims=True))
