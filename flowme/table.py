"""A table under inspection: its columns as numbers, and everything that is wrong with it."""

import csv
import io
from collections.abc import Hashable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "StudyError",
    "StudyWarning",
    "Table",
    "counted",
    "floats",
    "is_empty",
    "is_name",
    "read_csv",
    "row_name",
]


class StudyError(ValueError):
    """A table that cannot be a `Study`. `findings` holds everything that is wrong with it."""

    def __init__(self, findings: Sequence[str], shown: int = 20):
        self.findings = tuple(findings)
        lines = [f"  {finding}" for finding in self.findings[:shown]]
        if len(self.findings) > shown:
            lines.append(f"  and {len(self.findings) - shown} more")
        count = counted(len(self.findings), "finding")
        super().__init__("\n".join([f"This table cannot be a Study: {count}.", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return StudyError, (self.findings,)


class StudyWarning(UserWarning):
    """The table was read, but not just as it is written: in another order, or with empty cells
    of covariates filled in."""


def counted(number: int, word: str) -> str:
    """How many, in words: "1 row", "2 rows"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def is_name(cell: Any) -> bool:
    """Whether a cell can name something: a subject, a level, a column. A list cannot."""
    try:
        hash(cell)
    except TypeError:
        return False
    return isinstance(cell, Hashable)


def is_empty(cell: Any) -> bool:
    """Whether there is nothing in a cell: no value, or text of blanks."""
    if isinstance(cell, str):
        return not cell.strip()
    return pd.api.types.is_scalar(cell) and bool(pd.isna(cell))


def row_name(frame: pd.DataFrame, row: int) -> str:
    """A row in words: "row 3", or "line 5" of a file (`Study.from_csv` names its index so)."""
    word = frame.index.name
    label = frame.index[row]
    label = label.item() if isinstance(label, np.generic) else label
    return f"{word if isinstance(word, str) else 'row'} {label!r}"


class Table:
    """A table under inspection: its columns as numbers, and all that is found wrong with it."""

    def __init__(self, frame: pd.DataFrame, subject: str):
        self.frame = frame
        self.ids = frame[subject].tolist()
        self.findings: list[str] = []

    def name(self, row: int) -> str:
        return row_name(self.frame, row)

    def found(self, row: int, expected: str, got: str) -> None:
        where = f"{self.name(row)}, subject {self.ids[row]!r}"
        self.findings.append(f"{where}: expected {expected}; got {got}")

    def refuse(
        self, wrong: np.ndarray, expected: str, got: np.ndarray | str = "none", advice: str = ""
    ) -> None:
        """One finding for each row where `wrong` is True; `got` are numbers, or words for all."""
        for row in np.flatnonzero(wrong).tolist():
            self.found(row, expected, (got if isinstance(got, str) else f"{got[row]:g}") + advice)

    def refuse_empty(self, wrong: np.ndarray, column: str, expected: str, advice: str = "") -> None:
        """One finding for each row where `wrong` is True, whose cell in the column is empty."""
        cells = self.frame[column]
        for row in np.flatnonzero(wrong).tolist():
            written = isinstance(cells.dtype, np.dtype) and isinstance(cells.iloc[row], Real)
            self.found(row, expected, ("nan" if written else "an empty cell") + advice)

    def names(self, column: str) -> list[Any]:
        """The cells of a column that names something, None where empty; what cannot name anything
        (a list) is a finding, and None."""
        cells = self.frame[column].tolist()
        wrong = np.array([not is_name(cell) for cell in cells], bool)
        for row in np.flatnonzero(wrong).tolist():
            expected = f"a number or text in column {column!r}"
            self.found(row, expected, f"a {type(cells[row]).__name__}")
        return [
            None if bad or is_empty(cell) else cell for bad, cell in zip(wrong, cells, strict=True)
        ]

    def numbers(
        self,
        column: str,
        required: np.ndarray | bool = False,
        advice: str = "",
        or_text: str = "",
    ) -> np.ndarray:
        """A column as float64, NaN where empty; text, infinity and lacking values are findings.
        `or_text` is what else may be done about a column of text."""
        cells = self.frame[column]
        values, text = floats(cells)
        written = np.array([isinstance(cell, str) and not is_empty(cell) for cell in cells], bool)
        if text.any() and np.isnan(values).all():
            # Nothing in the column is a number: one finding says so better than one for each row.
            told = text & (np.cumsum(text) == 1)
            hint = f"Encode it as numbers, e.g. frame[{column!r}].map({{...}}){or_text}"
        elif not text.any() and written.any():
            told = written & (np.cumsum(written) == 1)
            hint = f"Convert the column: pd.to_numeric(frame[{column!r}])"
        else:
            told = text
            hint = "Write a number, or leave the cell empty where none is needed"
        for row in np.flatnonzero(told).tolist():
            got = f"the text {str(cells.iloc[row])!r}. {hint}"
            self.found(row, f"a number in column {column!r}", got)
        lacking = np.isinf(values) | (np.isnan(values) & np.broadcast_to(required, values.shape))
        expected = f"a finite number in column {column!r}"
        self.refuse(lacking & np.isinf(values), expected, values, advice)
        self.refuse_empty(lacking & np.isnan(values) & ~text, column, expected, advice)
        return values


def floats(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64, and where it holds something else than numbers."""
    if pd.api.types.is_numeric_dtype(column) and column.dtype.kind != "c":
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.zeros(values.shape, bool)
    cells = column.astype(object)
    legible = np.array([isinstance(c, str | Real | np.bool_) for c in cells], bool)
    values = pd.to_numeric(cells.where(legible), errors="coerce").to_numpy(np.float64)
    return values, np.isnan(values) & ~np.array([is_empty(cell) for cell in cells], bool)


def read_csv(path: str | Path, subject: str) -> pd.DataFrame:
    """A file as a table whose index is the line on which each row ends.

    Identifiers such as 007 in the column `subject` stay as they are written.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    reader = csv.reader(io.StringIO(text))
    lines = [
        (reader.line_num, len(cells)) for cells in reader if "".join(cells).strip() or cells[1:]
    ]
    if not lines:
        raise StudyError([f"expected a header and rows in {str(path)!r}; got an empty file"])
    (_, width), *rows = lines
    # pandas would fill a short line with empty cells, and shift a long one.
    ragged = [
        f"line {line}: expected {width} cells, as in the header; got {cells}"
        for line, cells in rows
        if cells != width
    ]
    if ragged:
        raise StudyError(ragged)
    frame = pd.read_csv(io.StringIO(text), na_values=["."])
    if is_name(subject) and subject in frame and pd.api.types.is_integer_dtype(frame[subject]):
        written = pd.read_csv(io.StringIO(text), usecols=[subject], dtype=str)[subject].str.strip()
        if (written != frame[subject].astype(str)).any():
            frame[subject] = written
    frame.index = pd.Index([line for line, _ in rows], name="line")
    return frame
