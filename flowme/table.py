"""Tables: which column is what, columns as numbers and back, and everything wrong with one."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

__all__ = [
    "Columns",
    "StudyError",
    "StudyWarning",
    "Table",
    "find_columns",
    "read_csv",
    "write_column",
]


class StudyError(ValueError):
    """A table that cannot be a `Study`. `findings` holds everything that is wrong with it."""

    def __init__(self, findings: Sequence[str], shown: int = 20):
        self.findings = tuple(findings)
        lines = [f"  {finding}" for finding in self.findings[:shown]]
        if len(self.findings) > shown:
            lines.append(f"  and {len(self.findings) - shown} more")
        count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        super().__init__("\n".join([f"This table cannot be a Study: {count}.", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return StudyError, (self.findings,)


class StudyWarning(UserWarning):
    """The table was read, but not just as it is written: in another order, or with empty cells
    of covariates filled in."""


_NONMEM = {
    "subject": "ID",
    "time": "TIME",
    "outcome": "DV",
    "amount": "AMT",
    "event": "EVID",
    "missing": "MDV",
    "compartment": "CMT",
    "rate": "RATE",
    "duration": "DUR",
    "additional": "ADDL",
    "interval": "II",
    "steady_state": "SS",
    "censored": "CENS",
    "limit": "LIMIT",
    "outcome_type": "DVID",
    "occasions": "OCC",
}


_OF_DOSES = ("duration", "additional", "interval", "steady_state")


class Columns(NamedTuple):
    """The column of each role; `outcome`, `censored` and `limit` map the outcome to its column."""

    subject: str
    time: str
    outcome: dict[str, str]
    covariates: tuple[str, ...]
    time_varying: tuple[str, ...]
    censored: dict[str, str]
    limit: dict[str, str]
    amount: str | None = None
    event: str | None = None
    missing: str | None = None
    compartment: str | None = None
    rate: str | None = None
    duration: str | None = None
    additional: str | None = None
    interval: str | None = None
    steady_state: str | None = None
    outcome_type: str | None = None
    occasions: tuple[str, ...] = ()


def find_columns(
    frame: pd.DataFrame,
    named: Mapping[str, Any],
    covariates: tuple[str, ...],
    time_varying: tuple[str, ...],
) -> Columns:
    """The columns as named by the user or, where left out, by their NONMEM names."""
    if not isinstance(frame, pd.DataFrame):
        raise StudyError([f"expected a pandas DataFrame; got {type(frame).__name__}"])
    given = dict(named)
    for role, name in _NONMEM.items():
        if role in _OF_DOSES and given["amount"] is None:
            continue  # DUR, II or SS may be anything in a table without doses
        if given[role] is None and name in frame.columns:
            given[role] = name
        if given[role] is None and role in ("subject", "time", "outcome"):
            present = ", ".join(map(str, frame.columns))
            raise StudyError(
                [f"expected a column for {role}; got none. Name it: {role}=... (of: {present})"]
            )
    outcome = _named(given.pop("outcome"))
    if named["outcome_type"] is None and list(outcome.values()) != ["DV"]:
        given["outcome_type"] = None  # DVID tells the kinds of DV apart, not of another column
    censored, limit = (_by_outcome(given.pop(role), outcome) for role in ("censored", "limit"))
    given["occasions"] = _tuple(given["occasions"])
    columns = Columns(
        outcome=outcome,
        covariates=tuple(name for name in covariates if name not in time_varying),
        time_varying=time_varying,
        censored=censored,
        limit=limit,
        **given,
    )
    findings = _column_findings(frame, columns)
    if findings:
        raise StudyError(findings)
    return columns


def _column_findings(frame: pd.DataFrame, columns: Columns) -> list[str]:
    """What is wrong with the columns themselves, before any row is looked at."""
    used: list[Any] = []
    for role in columns:
        used += role.values() if isinstance(role, dict) else _tuple(role)
    present = ", ".join(map(str, frame.columns))
    findings = [
        f"expected column {name!r}; got a table without it. Its columns are: {present}"
        for name in dict.fromkeys(used)
        if name not in frame.columns
    ]
    if not frame.columns.is_unique:
        twice = sorted(set(map(str, frame.columns[frame.columns.duplicated()])))
        findings.append(f"expected distinct column names; got {', '.join(twice)} more than once")
    if not columns.outcome:
        findings.append("expected at least one outcome; got none")
    if columns.outcome_type is not None and len(columns.outcome) != 1:
        findings.append(
            f"expected one outcome column beside outcome_type; got {list(columns.outcome)}"
        )
    if len(set(columns.outcome.values())) < len(columns.outcome):
        findings.append(
            f"expected a column of its own for each outcome; got {columns.outcome}. "
            "Use outcome_type= for the column that tells them apart"
        )
    for role in ("censored", "limit"):
        findings += _findings_by_outcome(role, getattr(columns, role), columns.outcome)
    for column in {c: None for name, c in columns.limit.items() if name not in columns.censored}:
        findings.append(
            f"expected a column of -1, 0, 1 beside the limits in {column!r}; got none. "
            "Name it: censored=..."
        )
    return findings


def _findings_by_outcome(role: str, columns: dict[str, str], outcome: dict[str, str]) -> list[str]:
    """What is wrong with the columns of a role that each outcome has by itself."""
    findings = []
    if len(outcome) > 1 and len(set(columns.values())) < len(columns):
        what = {"censored": "censoring", "limit": "limits"}[role]
        findings.append(
            f"expected a column of {what} for each outcome; got "
            f"{sorted(set(columns.values()))}. Write {role}={{outcome: column}}"
        )
    for name in columns:
        if name not in outcome:
            findings.append(f"expected {role} to name outcomes of {list(outcome)}; got {name!r}")
    return findings


def _by_outcome(columns: str | Mapping[str, str] | None, outcome: Iterable[str]) -> dict[str, str]:
    """Outcome -> column, where one column may be named for all."""
    if isinstance(columns, str):
        return dict.fromkeys(outcome, columns)
    return dict(columns or {})


def _named(outcome: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(outcome, Mapping):
        return dict(outcome)
    return {name: name for name in _tuple(outcome)}


def _tuple(names: Any) -> tuple[Any, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


class Table:
    """A table under inspection: its columns as numbers, and all that is found wrong with it."""

    def __init__(self, frame: pd.DataFrame, subject: str):
        self.frame = frame
        self.rows = frame.index.tolist()
        self.ids = frame[subject].tolist()
        self.findings: list[str] = []

    def name(self, row: int) -> str:
        word = self.frame.index.name  # `Study.from_csv` names its index "line"
        return f"{word if isinstance(word, str) else 'row'} {self.rows[row]!r}"

    def found(self, row: int, expected: str, got: str) -> None:
        where = f"{self.name(row)}, subject {self.ids[row]!r}"
        self.findings.append(f"{where}: expected {expected}; got {got}")

    def refuse(
        self, wrong: np.ndarray, expected: str, got: np.ndarray | None = None, advice: str = ""
    ) -> None:
        """One finding for each row where `wrong` is True; `got` are numbers, None for none."""
        for row in np.flatnonzero(wrong).tolist():
            self.found(row, expected, ("none" if got is None else f"{got[row]:g}") + advice)

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
        values, text = _floats(cells)
        if text.any() and np.isnan(values).all():
            # Nothing in the column is a number: one finding says so better than one for each row.
            told = text & (np.cumsum(text) == 1)
            hint = f"Encode it as numbers, e.g. frame[{column!r}].map({{...}}){or_text}"
        elif not text.any() and any(isinstance(cell, str) for cell in cells):
            told = np.arange(len(cells)) == 0
            hint = f"Convert the column: pd.to_numeric(frame[{column!r}])"
        else:
            told = text
            hint = "Write a number, or leave the cell empty where none is needed"
        for row in np.flatnonzero(told).tolist():
            got = f"the text {str(cells.iloc[row])!r}. {hint}"
            self.found(row, f"a number in column {column!r}", got)
        lacking = np.isinf(values) | (np.isnan(values) & np.broadcast_to(required, values.shape))
        self.refuse(lacking & ~text, f"a finite number in column {column!r}", values, advice)
        return values


def _floats(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64, and where it holds something else than numbers."""
    if pd.api.types.is_numeric_dtype(column) and column.dtype.kind != "c":
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.zeros(values.shape, bool)
    cells = column.astype(object)
    legible = np.array([isinstance(c, str | Real | np.bool_) for c in cells], bool)
    values = pd.to_numeric(cells.where(legible), errors="coerce").to_numpy(np.float64)
    return values, np.isnan(values) & ~cells.isna().to_numpy(bool)


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
    if subject in frame and pd.api.types.is_integer_dtype(frame[subject]):
        written = pd.read_csv(io.StringIO(text), usecols=[subject], dtype=str)[subject].str.strip()
        if (written != frame[subject].astype(str)).any():
            frame[subject] = written
    frame.index = pd.Index([line for line, _ in rows], name="line")
    return frame


def write_column(frame: pd.DataFrame, column: str, rows: np.ndarray, cells: np.ndarray) -> None:
    """Writes numbers into rows of a column; the column keeps its dtype if that can hold them."""
    old = frame[column]
    values, _ = _floats(old)
    if np.array_equal(values[rows], cells, equal_nan=True):
        return  # float64 cannot say all that a column can (large integers, kinds of NA)
    values = values.copy()  # pandas lends its own memory
    values[rows] = cells
    new = pd.Series(values)
    try:
        same = new.astype(old.dtype)
        if np.array_equal(_floats(same)[0], values, equal_nan=True):
            new = same
    except (TypeError, ValueError):  # NaN in a column of integers
        pass
    frame[column] = new.array
