"""The subjects of a study at other times, with nothing measured: what predictions are made for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd

from flowme.columns import Columns
from flowme.events import events_at
from flowme.labels import Labels
from flowme.table import counted

if TYPE_CHECKING:
    from flowme.study import Study

__all__ = ["at_times"]


def at_times(study: Study, times: Any) -> Study:
    """The study at other times; see `Study.at`."""
    time = _checked(times, study.subjects.size)
    last = np.maximum((study.time[:, None, :] <= time[:, :, None]).sum(-1) - 1, 0)
    blank = replace(
        study,
        time=time,
        recorded=np.ones(time.shape, bool),
        values={},
        observed={name: np.ones(time.shape, bool) for name in study.outcomes},
        censored={},
        limit={},
        covariates={
            name: _between(study, name, time, last) if value.ndim == 2 else value
            for name, value in study.covariates.items()
        },
        occasions={
            name: value._replace(index=np.take_along_axis(value.index, last, 1))
            for name, value in study.occasions.items()
        },
        events=events_at(time, study.time[:, 0], study.doses, study.compartments),
    )
    return replace(blank, labels=_labels(blank, np.take_along_axis(study.labels.rows, last, 1)))


def _checked(times: Any, subjects: int) -> np.ndarray:
    if isinstance(times, jax.core.Tracer):
        raise TypeError("expected times that are known; got a tracer. Call Study.at outside of jit")
    try:
        time = np.asarray(times, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"expected times that are numbers; got {times!r}.") from None
    if time.size == 0 or not (time.ndim == 1 or (time.ndim == 2 and len(time) == subjects)):
        raise ValueError(
            f"expected times of shape [time], or [subject, time] with "
            f"{counted(subjects, 'subject')}; got {time.shape}."
        )
    if not np.isfinite(time).all() or (np.diff(time) <= 0).any():
        raise ValueError(f"expected times that are finite and increase; got {times}.")
    return np.broadcast_to(time, (subjects, time.shape[-1])).copy()


def _between(study: Study, name: str, time: np.ndarray, last: np.ndarray) -> np.ndarray:
    """A covariate that changes in time at other times, `last` being the record before each."""
    value = study.covariates[name]
    before = np.take_along_axis(value, last, 1)
    if name not in study.labels.linear:
        return before
    after = np.minimum(last + 1, value.shape[1] - 1)
    start, end = (np.take_along_axis(study.time, where, 1) for where in (last, after))
    share = np.clip(time - start, 0, None) / np.where(end > start, end - start, np.inf)
    return before + share * (np.take_along_axis(value, after, 1) - before)


def _labels(study: Study, before: np.ndarray) -> Labels:
    """Labels with a table of its own: a row for each record, its numbers left to `to_frame`.

    A covariate with levels becomes a column of categories, so that reading the table again gives
    the same codes; occasions have the cells of the row before, `before[subject, time]`.
    """
    old, shape = study.labels, study.time.shape
    columns = Columns(
        subject=old.columns.subject,
        time=old.columns.time,
        outcome={name: name for name in study.outcomes},
        covariates=tuple(name for name, value in study.covariates.items() if value.ndim == 1),
        time_varying=tuple(name for name, value in study.covariates.items() if value.ndim == 2),
        censored={},
        limit={},
        occasions=old.columns.occasions,
    )
    who = old.frame[columns.subject].iloc[old.rows[:, 0].repeat(shape[1])]
    frame = who.reset_index(drop=True).to_frame()
    for name in (columns.time, *study.outcomes):
        frame[name] = np.nan
    for name in study.covariates:
        levels = study.levels.get(name)
        frame[name] = np.nan if levels is None else pd.Categorical([None] * len(frame), levels)
    for name in columns.occasions:
        if name not in study.covariates:
            frame[name] = old.frame[name].iloc[before.ravel()].array
    rows = np.arange(study.time.size).reshape(shape)
    no_rows = np.broadcast_to(rows[:, :1], study.doses.time.shape)  # doses stand in no row
    return replace(
        old,
        frame=frame,
        columns=columns,
        rows=rows,
        dose_rows=no_rows,
        written=np.zeros(no_rows.shape, bool),
        measured=dict(study.observed),
        filled={},
    )
