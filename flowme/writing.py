"""A study as a table again: its numbers in the cells that they were read from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from flowme.levels import level_of
from flowme.table import floats

if TYPE_CHECKING:
    from flowme.study import Study

__all__ = ["write_frame"]


def write_frame(study: Study) -> pd.DataFrame:
    """The table of a study, with the study's numbers."""
    labels = study.labels
    frame, columns = labels.frame.copy(), labels.columns
    rows, recorded = labels.rows, np.asarray(study.recorded)
    _write_numbers(frame, columns.time, rows[recorded], np.asarray(study.time)[recorded])
    for name in columns.outcome:
        _write_outcome(frame, study, name)
    for name, covariate in study.covariates.items():
        covariate = np.asarray(covariate)
        covariate = covariate[:, None] if covariate.ndim == 1 else covariate
        read = recorded & ~labels.filled.get(name, np.zeros_like(recorded))
        cells = np.broadcast_to(covariate, recorded.shape)[read]
        if name in labels.levels:
            _write_levels(frame, name, rows[read], labels.levels[name], cells)
        else:
            _write_numbers(frame, name, rows[read], cells)
    for role in ("amount", "rate", "duration", "compartment"):
        named, dose = getattr(columns, role), np.asarray(getattr(study.doses, role))
        if named is not None:
            written = labels.written
            _write_numbers(frame, named, labels.dose_rows[written], dose[written])
    return frame


def _write_outcome(frame: pd.DataFrame, study: Study, name: str) -> None:
    """An outcome and its censoring; what is no longer observed becomes empty."""
    labels, rows = study.labels, study.labels.rows
    observed = np.asarray(study.observed[name])
    values = np.asarray(study.values.get(name, np.nan))
    cells = observed | labels.measured[name]
    numbers = np.where(observed, values, np.nan)[cells]
    _write_numbers(frame, labels.columns.outcome[name], rows[cells], numbers)
    for role in ("censored", "limit"):
        if name in getattr(study, role):
            column = getattr(labels.columns, role)[name]
            told = np.asarray(getattr(study, role)[name])[observed]
            _write_numbers(frame, column, rows[observed], told)


def _write_numbers(frame: pd.DataFrame, column: str, rows: np.ndarray, cells: np.ndarray) -> None:
    """Writes numbers into rows of a column; the column keeps its dtype if that can hold them."""
    old = frame[column]
    values, _ = floats(old)
    if np.array_equal(values[rows], cells, equal_nan=True):
        return  # float64 cannot say all that a column can (large integers, kinds of NA)
    values = values.copy()  # pandas lends its own memory
    values[rows] = cells
    new = pd.Series(values)
    try:
        same = new.astype(old.dtype)
        if np.array_equal(floats(same)[0], values, equal_nan=True):
            new = same
    except (TypeError, ValueError):  # NaN in a column of integers
        pass
    frame[column] = new.array


def _write_levels(
    frame: pd.DataFrame, column: str, rows: np.ndarray, levels: tuple, codes: np.ndarray
) -> None:
    """Writes levels into rows of a column; the column keeps its dtype if that can hold them."""
    old = frame[column]
    cells = old.astype(object).to_numpy(copy=True)
    changed = False
    for row, code in zip(rows.tolist(), codes.tolist(), strict=True):
        if level_of(cells[row]) != levels[code]:
            cells[row], changed = levels[code], True
    if not changed:
        return
    new = pd.Series(cells, index=old.index, dtype=object)
    try:
        same = new.astype(old.dtype)
        new = same if same.isna().equals(new.isna()) else new
    except (TypeError, ValueError):  # text into a column of numbers
        pass
    frame[column] = new.array
