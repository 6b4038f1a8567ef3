"""Levels of categorical covariates: what a cell stands for, codes, and codes by other levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flowme.table import Table, is_empty

if TYPE_CHECKING:
    from flowme.study import Study

__all__ = ["level_of", "read_levels", "recode", "same_levels", "wrong_levels"]


def level_of(cell: Any) -> Any:
    """The level that a cell stands for; None for an empty one. 1.0 is the level 1: a column of
    whole numbers with an empty cell is float in pandas."""
    if is_empty(cell):
        return None
    cell = cell.item() if isinstance(cell, np.generic) else cell
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def wrong_levels(levels: Sequence[Any]) -> bool:
    """Whether these cannot be levels: none at all, an empty one, or two that are equal."""
    return not levels or None in levels or len(set(levels)) < len(levels)


def read_levels(
    table: Table, name: str, declared: tuple[Any, ...] | None
) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Codes of the levels of a column, `[row]`, NaN where the cell is empty; and the levels: those
    declared, or the categories of the column, or else those that occur, sorted."""
    column = table.frame[name]
    cells = [level_of(cell) for cell in table.names(name)]
    present = {cell for cell in cells if cell is not None}
    _refuse_equals(table, name, cells)
    if declared is not None:
        levels = declared
    elif isinstance(column.dtype, pd.CategoricalDtype):
        levels = tuple(x for x in map(level_of, column.cat.categories) if x is not None)
    else:
        levels = tuple(sorted(present, key=_order))
    place = {level: number for number, level in enumerate(levels)}
    for row, cell in enumerate(cells):
        if cell is not None and cell not in place:
            table.found(row, f"a level of {name!r}, one of {list(levels)}", f"{cell!r}")
    return np.array([place.get(cell, np.nan) for cell in cells], np.float64), levels


def _order(level: Any) -> tuple[bool, str, Any]:
    """Numbers before text, and what is neither after both, each kind among itself."""
    number = isinstance(level, int | float)
    return (not number, "" if number or isinstance(level, str) else type(level).__name__, level)


def _refuse_equals(table: Table, name: str, cells: list[Any]) -> None:
    """True and 1 are equal to Python, and to whoever wrote both into one column they are not."""
    first: dict[Any, int] = {}
    for row, cell in enumerate(cells):
        before = first.setdefault(cell, row) if cell is not None else row
        if isinstance(cell, bool) != isinstance(cells[before], bool):
            expected = f"levels of {name!r} to be all True and False, or none of them"
            got = f"{cell!r} here and {cells[before]!r} in {table.name(before)}"
            table.found(row, expected, got)
            return


def recode(study: Study, levels: Mapping[str, Iterable[Any]]) -> Study:
    """The study with its categorical covariates coded by other levels; see `Study.with_levels`."""
    labels, covariates, kept = study.labels, dict(study.covariates), dict(study.labels.levels)
    for name, given in levels.items():
        known = tuple(level_of(level) for level in given)
        _check(study, name, known)
        place = {level: code for code, level in enumerate(known)}
        codes = np.array([place.get(level, -1) for level in labels.levels[name]], np.int32)
        recoded = codes[covariates[name]]
        if (recoded < 0).any():
            _refuse_level(study, name, np.argwhere(recoded < 0)[0], known)
        covariates[name], kept[name] = recoded, known
    return replace(study, covariates=covariates, labels=replace(labels, levels=kept))


def same_levels(study: Study, other: Study) -> Study:
    """The study coded by the levels of another, of those covariates that both have."""
    for name in study.levels:
        if name in other.covariates and name not in other.levels:
            raise ValueError(
                f"expected {name!r} to be numbers, as in the study that was fitted; got the levels "
                f"{list(study.levels[name])}. Read it with covariates={name!r}."
            )
    return recode(study, {n: own for n, own in other.levels.items() if n in study.covariates})


def _check(study: Study, name: str, known: tuple[Any, ...]) -> None:
    if name not in study.covariates:
        raise ValueError(
            f"expected levels of covariates of the study, {list(study.covariates)}; got {name!r}."
        )
    if name not in study.levels:
        raise ValueError(
            f"expected {name!r} to be categorical, with levels {list(known)}; got numbers. "
            f"Read it with categorical={{{name!r}: {list(known)}}}."
        )
    if wrong_levels(known):
        raise ValueError(
            f"expected one or more different levels of {name!r}, none of them empty; "
            f"got {list(known)}."
        )


def _refuse_level(study: Study, name: str, where: np.ndarray, known: tuple[Any, ...]) -> None:
    subject, record = where[0], where[1] if len(where) > 1 else 0
    row = study.labels.row_name(study.labels.rows[subject, record])
    level = study.levels[name][study.covariates[name][tuple(where)]]
    raise ValueError(
        f"{row}, subject {study.ids[subject]!r}: expected a level of {name!r} that the model "
        f"was fitted with, one of {list(known)}; got {level!r}."
    )
