"""Covariates from the columns of a table: numbers or levels, and what stands in empty cells."""

import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowme.columns import Columns, by_name, names_in
from flowme.levels import level_of, read_levels, wrong_levels
from flowme.table import StudyError, StudyWarning, Table, counted, is_empty

__all__ = ["Covariates", "Stated", "read_covariates", "state"]


class Stated(NamedTuple):
    """What the user states about covariates, by name."""

    between: dict[str, str]  # of those that change in time: "carried" or "linear"
    levels: dict[str, tuple[Any, ...] | None]  # of categorical ones; None: as the table has them
    missing: dict[str, Any]  # "median", "carried", or what to fill in


class Covariates(NamedTuple):
    """The covariates over the rows of the table."""

    values: dict[str, np.ndarray]  # name -> [row], float64; int32 codes of a categorical one
    levels: dict[str, tuple[Any, ...]]  # of categorical ones, in the order of their codes
    filled: dict[str, np.ndarray]  # name -> [row], True where the cell is empty; only if some are
    remarks: tuple[str, ...]  # what was filled in, in words


def state(
    covariates: str | Iterable[str],
    time_varying: str | Iterable[str] | Mapping[str, str],
    categorical: str | Iterable[str] | Mapping[str, Iterable[Any] | None],
    missing: Mapping[str, Any] | None,
) -> tuple[tuple[str, ...], Stated]:
    """The names of all covariates, and what is stated about them."""
    between = by_name("time_varying", time_varying, "carried")
    chosen = by_name("categorical", categorical, None)
    levels = {
        name: None if given is None else tuple(map(level_of, names_in("categorical", given)))
        for name, given in chosen.items()
    }
    if missing is not None and not isinstance(missing, Mapping):
        advice = f"Write missing_covariates={{name: {missing!r}}}"
        raise StudyError(
            [f"expected missing_covariates= to have a rule by name; got {missing!r}. {advice}"]
        )
    names = tuple(dict.fromkeys([*names_in("covariates", covariates), *between, *levels]))
    return names, Stated(between, levels, dict(missing or {}))


def read_covariates(
    table: Table, columns: Columns, stated: Stated, code: np.ndarray, time: np.ndarray
) -> Covariates:
    """Reads all covariates; what is wrong goes to the findings of the table.

    Args:
        table: the table under inspection.
        columns: its columns.
        stated: what the user states about covariates.
        code: number of the subject of each row, `[row]`.
        time: `[row]`.
    """
    names = columns.covariates + columns.time_varying
    _check_stated(table, stated, names)
    found = Covariates({}, {}, {}, ())
    remarks = []
    for name in names:
        categorical = name in stated.levels or table.frame[name].dtype == "category"
        if categorical:
            values, levels = read_levels(table, name, stated.levels.get(name))
            found.levels[name] = levels
        else:
            other = f", or declare the covariate: categorical={name!r}"
            values, levels = table.numbers(name, or_text=other), ()
        empty = np.array([is_empty(cell) for cell in table.frame[name]])
        if name not in stated.missing:
            kind = "a level" if categorical else "a finite number"
            what = f"{kind} in column {name!r}"
            advice = f". Or state a rule: missing_covariates={{{name!r}: ...}}"
            table.refuse_empty(empty, name, what, advice)
        elif empty.any():
            constant = name in columns.covariates
            rule = stated.missing[name]
            values, how = _fill(table, name, values, rule, levels, code, time, constant)
            found.filled[name] = empty
            remarks.append(_remark(table, name, empty, code, how))
        if name in columns.covariates:
            _refuse_changes(table, name, code, values, levels)
        found.values[name] = np.nan_to_num(values).astype(np.int32) if categorical else values
    return found._replace(remarks=tuple(remarks))


def remark(covariates: Covariates) -> None:
    """Warns of what was filled in."""
    for text in covariates.remarks:
        warnings.warn(text, StudyWarning, stacklevel=4)


def _check_stated(table: Table, stated: Stated, names: tuple[str, ...]) -> None:
    table.findings += [
        f"expected missing_covariates to name covariates, of {list(names)}; got {name!r}"
        for name in stated.missing
        if name not in names
    ]
    for name, rule in stated.between.items():
        if rule not in ("carried", "linear"):
            table.findings.append(
                f"expected time_varying={{{name!r}: 'carried'}} or 'linear'; got {rule!r}"
            )
        categorical = name in stated.levels or table.frame[name].dtype == "category"
        if rule == "linear" and categorical:
            table.findings.append(
                f"expected a number to be linear between records; got the levels of {name!r}. "
                f"Write time_varying={{{name!r}: 'carried'}}"
            )
    for name, levels in stated.levels.items():
        if levels is not None and wrong_levels(levels):
            table.findings.append(
                f"expected one or more different levels of {name!r}, none of them empty; got "
                f"{list(levels)}"
            )


def _fill(
    table: Table,
    name: str,
    values: np.ndarray,
    rule: Any,
    levels: tuple[Any, ...],
    code: np.ndarray,
    time: np.ndarray,
    constant: bool,
) -> tuple[np.ndarray, str]:
    """The values `[row]` with the empty cells filled by the rule, and how, in words."""
    column = pd.Series(values)
    if constant:  # what stands in another row of the subject holds in all
        column = column.fillna(column.groupby(code).transform("first"))
    own = "the subject's own value" if constant else ""
    if isinstance(rule, str) and rule == "carried":
        how = own or "the subject's last value, its first one before that"
        return _carried(table, name, column, code, time), how
    if levels:
        rest, shown = _code(table, name, rule, levels), repr(rule)
    elif isinstance(rule, str) and rule == "median":
        rest = _median(table, name, column, code)
        shown = f"the median over subjects, {rest:g}"
    else:
        rest, shown = _finite(table, name, rule), f"{rule}"
    if not own:
        how = shown
    else:
        how = f"{own} or, where there is none, {shown}" if column.isna().any() else own
    return column.fillna(rest).to_numpy(), how


def _carried(
    table: Table, name: str, column: pd.Series, code: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """The last value of the same subject; its first one before that."""
    order = np.lexsort((time, code))
    forward = column.iloc[order].groupby(code[order]).ffill()
    values = forward.groupby(code[order]).bfill().sort_index().to_numpy()
    nothing = np.isnan(values)
    first = nothing & ~pd.Series(np.where(nothing, code, -1)).duplicated().to_numpy()
    expected = f"a value of {name!r} in some row of this subject, to carry"
    table.refuse(first, expected, advice=". Leave the subject out, or state another rule")
    return values


def _finite(table: Table, name: str, rule: Any) -> float:
    """The number to fill in; True or False of a covariate that has no other values."""
    cells = [cell for cell in table.frame[name] if not is_empty(cell)]
    if cells and all(isinstance(cell, bool | np.bool_) for cell in cells):
        if isinstance(rule, Real) and rule in (0, 1):
            return float(rule)
        expected = f"missing_covariates={{{name!r}: ...}} to be 'carried', True or False"
        table.findings.append(f"expected {expected}; got {rule!r}")
        return np.nan
    if isinstance(rule, Real) and not isinstance(rule, bool) and np.isfinite(float(rule)):
        return float(rule)
    expected = f"missing_covariates={{{name!r}: ...}} to be 'median', 'carried' or a number"
    table.findings.append(f"expected {expected}; got {rule!r}")
    return np.nan


def _code(table: Table, name: str, rule: Any, levels: tuple[Any, ...]) -> float:
    """The code of a level to fill in."""
    if level_of(rule) in levels:
        return float(levels.index(level_of(rule)))
    expected = f"missing_covariates={{{name!r}: ...}} to be 'carried' or one of {list(levels)}"
    table.findings.append(f"expected {expected}; got {rule!r}")
    return np.nan


def _median(table: Table, name: str, column: pd.Series, code: np.ndarray) -> float:
    """The median over subjects of the median of each."""
    found = column.groupby(code).median().median()
    if np.isnan(found):
        table.findings.append(f"expected a value of {name!r} in some row; got none in the table")
    return found


def _remark(table: Table, name: str, empty: np.ndarray, code: np.ndarray, how: str) -> str:
    subjects = list(dict.fromkeys(table.ids[row] for row in np.flatnonzero(empty)))
    shown = ", ".join(map(repr, subjects[:10])) + (", ..." if len(subjects) > 10 else "")
    return (
        f"Covariate {name!r} is empty in {counted(empty.sum(), 'row')} of {len(subjects)} of "
        f"{counted(code.max() + 1, 'subject')} ({shown}). Filled in: {how}. "
        "Study.to_frame leaves the cells empty."
    )


def _refuse_changes(
    table: Table, name: str, code: np.ndarray, values: np.ndarray, levels: tuple[Any, ...]
) -> None:
    """One finding for each subject whose covariate changes: the first row that differs."""

    def shown(row: int) -> str:
        return repr(levels[int(values[row])]) if levels else f"{values[row]:g}"

    first: dict[int, int] = {}
    told: set[int] = set()
    for row in np.flatnonzero(np.isfinite(values) & (code >= 0)).tolist():
        before = first.setdefault(code[row], row)
        if values[row] != values[before] and code[row] not in told:
            told.add(code[row])
            table.found(
                row,
                f"covariate {name!r} constant within a subject",
                f"{shown(row)} here and {shown(before)} in {table.name(before)}. "
                "Name it in time_varying=... if it changes",
            )
