"""The rows of a table as arrays: doses and outcomes, refused if anything is wrong."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowme.columns import Columns
from flowme.covariate_table import Covariates, Stated, read_covariates, remark
from flowme.events import Timeline
from flowme.occasions import read_occasions
from flowme.regimen import Regimen, read_regimen, write_out
from flowme.table import StudyError, StudyWarning, Table, counted

__all__ = ["Outcomes", "Rows", "read_rows"]


class Outcomes(NamedTuple):
    """Each outcome over the rows of the table: outcome -> [row]."""

    values: dict[str, np.ndarray]
    observed: dict[str, np.ndarray]
    censored: dict[str, np.ndarray]  # of outcomes that have censored values
    limit: dict[str, np.ndarray]  # of outcomes that have limits; NaN where there is none
    written: np.ndarray  # [row] True where an observation stands, legible or not


class Rows(NamedTuple):
    """A table that was read, and nothing found wrong with it."""

    ids: tuple[Any, ...]
    line: Timeline  # the rows in the order of the table, then additional doses
    row: np.ndarray  # [item] the row of the table that it comes from
    outcomes: Outcomes
    covariates: Covariates
    occasions: dict[str, np.ndarray]  # name -> [row]
    columns: Columns  # where the levels of `outcome_type` name the outcomes


def read_rows(
    frame: pd.DataFrame,
    columns: Columns,
    stated: Stated,
    units: dict[str, str],
    keep_unobserved: bool,
    replicates: bool,
) -> Rows:
    """Reads all rows, and refuses the table if anything is wrong with it."""
    if frame.empty:
        raise StudyError(["expected at least one row; got an empty table"])
    table = Table(frame, columns.subject)
    table.names(columns.subject)
    if table.findings:  # lists and their like tell no subjects apart
        raise StudyError(table.findings)
    code, ids = pd.factorize(frame[columns.subject])
    table.refuse(code < 0, f"an identifier in column {columns.subject!r}")
    time = table.numbers(columns.time, True)
    kinds = _kinds(table, columns)
    outcomes, columns = _read_outcomes(table, columns, kinds)
    covariates = read_covariates(table, columns, stated, code, time)
    occasions = read_occasions(table, columns.occasions, code, time)
    _refuse_early_doses(table, code, time, kinds.regimen)
    for name, observed in outcomes.observed.items() if not replicates else ():
        _refuse_duplicates(table, name, code, time, observed)
    nameable = ["time", "amount", *outcomes.values, *covariates.values]
    table.findings += [
        f"expected units of {', '.join(nameable)}; got {name!r}"
        for name in units
        if name not in nameable
    ]
    if not keep_unobserved:
        seen = np.isin(code, code[outcomes.written])
        first = np.isin(np.arange(len(code)), np.unique(code, return_index=True)[1])
        advice = ". Leave the subject out, or write keep_unobserved=True"
        table.refuse(first & ~seen & (code >= 0), "an observation of this subject", advice=advice)
    if table.findings:
        raise StudyError(table.findings)
    _warn_of_order(code, time, ids.tolist())
    remark(covariates)
    line, row = write_out(kinds.regimen, code, time)
    return Rows(tuple(ids.tolist()), line, row, outcomes, covariates, occasions, columns)


def _warn_of_order(code: np.ndarray, time: np.ndarray, ids: list[Any]) -> None:
    order = np.argsort(code, kind="stable")
    back = (np.diff(time[order]) < 0) & (np.diff(code[order]) == 0)
    unsorted = np.unique(code[order][1:][back])
    starts = code[np.insert(np.diff(code) != 0, 0, True)]
    apart = np.flatnonzero(np.bincount(starts) > 1)
    for subjects, what in ((unsorted, "sorted by time"), (apart, "gathered from several places")):
        if subjects.size:
            warnings.warn(
                f"The rows of {subjects.size} of {counted(len(ids), 'subject')} were {what}, "
                f"subject {ids[subjects[0]]!r} first; Study.to_frame gives them back as they were.",
                StudyWarning,
                stacklevel=4,
            )


# What each row is ---------------------------------------------------------------------------------


class _Kinds(NamedTuple):
    """What each row is, [row]; `measured` rows may hold observations."""

    measured: np.ndarray
    silent: np.ndarray  # MDV = 1: whatever is written as the outcome does not count
    regimen: Regimen


def _kinds(table: Table, columns: Columns) -> _Kinds:
    """Tells doses from measurements, and reads the doses."""
    event = None if columns.event is None else _read_event(table, columns.event)
    regimen = read_regimen(table, columns, event)
    silent = np.zeros(len(table.frame))
    if columns.missing is not None:
        silent = table.numbers(columns.missing, True)
        unknown = ~np.isin(silent, (0, 1)) & np.isfinite(silent)
        table.refuse(unknown, f"{columns.missing} in {{0, 1}}", silent)
    measured = (~regimen.dose if event is None else event == 0) & (silent != 1)
    return _Kinds(measured, silent == 1, regimen)


def _read_event(table: Table, column: str) -> np.ndarray:
    event = table.numbers(column, True)
    rxode = (event > 100) & np.isfinite(event)
    unknown = ~np.isin(event, (0, 1, 2, 3, 4)) & np.isfinite(event) & ~rxode
    for wrong, advice in ((rxode, ". That is an RxODE code: write 1 for a dose"), (unknown, "")):
        table.refuse(wrong, f"{column} in {{0, 1, 2, 3, 4}}", event, advice)
    return event


def _refuse_early_doses(table: Table, code: np.ndarray, time: np.ndarray, regimen: Regimen) -> None:
    """A dose below the first row of its subject and before it in time; a reset that goes back."""
    first = np.unique(code, return_index=True)[1][np.unique(code, return_inverse=True)[1]]
    given = regimen.dose | regimen.reset
    for row in np.flatnonzero(given & (time < time[first]) & (code >= 0)).tolist():
        table.found(
            row,
            f"a dose at or after time {time[first[row]]:g}, when the subject's rows begin "
            f"({table.name(first[row])})",
            f"{time[row]:g}. If that is right, sort the rows by time",
        )
    latest: dict[int, float] = {}
    for row in range(len(code)):
        before = latest.get(code[row], -np.inf)
        if regimen.reset[row] and time[row] < before:
            expected = "a reset at or after the rows above it: times run on through a reset"
            advice = f". Add {before:g} to the times from here on, or more"
            table.found(row, expected, f"time {time[row]:g} after {before:g}{advice}")
        latest[code[row]] = max(before, time[row])


# Outcomes -----------------------------------------------------------------------------------------


def _read_outcomes(table: Table, columns: Columns, kinds: _Kinds) -> tuple[Outcomes, Columns]:
    """The outcomes; and the columns, where the levels of `outcome_type` name the outcomes."""
    where = dict.fromkeys(columns.outcome, kinds.measured)
    if columns.outcome_type is not None:
        where, columns = _levels(table, columns, kinds.measured)
    outcomes = Outcomes({}, {}, {}, {}, np.zeros(len(table.frame), bool))
    wide = len(set(columns.outcome.values())) > 1
    read: dict[str, np.ndarray] = {}
    for name, column in columns.outcome.items():
        if column not in read:
            read[column] = _read_outcome(table, column, kinds, needed=not wide)
        observed = where[name] & np.isfinite(read[column])
        outcomes.values[name], outcomes.observed[name] = read[column], observed
        written = where[name] & (table.frame[column].notna().to_numpy(bool) | (not wide))
        outcomes.written[written] = True
        if not written.any():
            table.findings.append(f"expected a value of outcome {name!r}; got none in the table")
        if name in columns.censored:
            _read_censoring(table, columns, name, outcomes)
    return outcomes, columns


def _read_outcome(table: Table, column: str, kinds: _Kinds, needed: bool) -> np.ndarray:
    advice = ". Drop the row, or mark it by 1 in a column missing=... (MDV)"
    values = table.numbers(column, kinds.measured & needed, advice)
    stray = ~kinds.measured & ~kinds.silent & (np.nan_to_num(values) != 0)
    expected = f"no {column!r} on a row that is not a measurement"
    table.refuse(stray, expected, values, ". Give it a row of its own")
    return values


def _read_censoring(table: Table, columns: Columns, name: str, outcomes: Outcomes) -> None:
    """Reads which values of an outcome are censored, and the other ends of their intervals.

    Where no value is censored the outcome counts as one without such columns.
    """
    column, observed = columns.censored[name], outcomes.observed[name]
    censored = table.numbers(column, observed)
    unknown = observed & ~np.isin(censored, (-1, 0, 1)) & np.isfinite(censored)
    table.refuse(unknown, f"{column} in {{-1, 0, 1}}", censored)
    censored = np.where(observed, np.nan_to_num(censored), 0).astype(np.int32)
    if np.any(censored):
        outcomes.censored[name] = censored
    if name not in columns.limit:
        return
    other, value = columns.limit[name], outcomes.values[name]
    limit = np.where(observed, table.numbers(other), np.nan)
    stray = np.isfinite(limit) & (censored == 0) & ~unknown
    table.refuse(stray, f"no {other} where {column} is 0", limit, ". Leave the cell empty")
    for code, side in ((1, "below"), (-1, "above")):
        for row in np.flatnonzero((censored == code) & (code * (value - limit) <= 0)).tolist():
            expected = f"{other} {side} the value {value[row]:g} where {column} is {code}"
            table.found(row, expected, f"{limit[row]:g}")
    if np.isfinite(limit).any():
        outcomes.limit[name] = limit


def _levels(
    table: Table, columns: Columns, measured: np.ndarray
) -> tuple[dict[str, np.ndarray], Columns]:
    """Where each level of `outcome_type` is measured, and the columns with outcomes so named."""
    cells = table.frame[columns.outcome_type]
    empty = cells.isna().to_numpy(bool)
    table.refuse(measured & empty, f"an outcome in column {columns.outcome_type!r}")
    # A column of whole numbers with an empty cell is float in pandas: 1.0 is still level "1".
    names = np.array(
        [str(int(c)) if isinstance(c, float) and c.is_integer() else str(c) for c in cells]
    )
    levels = dict.fromkeys(names[measured & ~empty].tolist())
    ((name, column),) = columns.outcome.items()
    if name != column:
        if len(levels) > 1:
            table.findings.append(
                f"expected one outcome to be named {name!r}; got {list(levels)} in column "
                f"{columns.outcome_type!r}. Write outcome={column!r}"
            )
        return {name: measured & ~empty}, columns
    censored, limit = columns.censored.get(column), columns.limit.get(column)
    return {level: measured & ~empty & (names == level) for level in levels}, columns._replace(
        outcome=dict.fromkeys(levels, column),
        censored=dict.fromkeys(levels, censored) if censored is not None else {},
        limit=dict.fromkeys(levels, limit) if limit is not None else {},
    )


def _refuse_duplicates(
    table: Table, name: str, code: np.ndarray, time: np.ndarray, observed: np.ndarray
) -> None:
    first: dict[tuple[int, float], int] = {}
    for row in np.flatnonzero(observed & np.isfinite(time) & (code >= 0)).tolist():
        before = first.setdefault((code[row], time[row]), row)
        if before != row:
            expected = f"one value of {name!r} at time {time[row]:g}"
            advice = ". If both were measured, write replicates=True"
            table.found(row, expected, f"another in {table.name(before)}{advice}")
