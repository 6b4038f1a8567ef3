"""Rows of a table as the arrays of a study: each subject's padded to [subject, time]."""

from typing import Any

import numpy as np
import pandas as pd

from flowme.events import arrange_doses, arrange_events, lay_out
from flowme.labels import Labels
from flowme.occasions import arrange_occasions
from flowme.rows import Rows

__all__ = ["arrange"]


def arrange(
    table: Rows, frame: pd.DataFrame, units: dict[str, str], linear: tuple[str, ...]
) -> dict[str, Any]:
    """The attributes of the study of these rows, see `Study`.

    Args:
        table: the rows that were read.
        frame: the table that they come from.
        units: by name.
        linear: covariates that are linear between records.
    """
    line, outcomes, columns = table.line, table.outcomes, table.columns
    order = line.order()
    order = order[order < len(frame)]  # the items that are rows
    rows, recorded = lay_out(order, line.subject[order], len(table.ids))
    observed = {name: mask[rows] & recorded for name, mask in outcomes.observed.items()}
    doses, items = arrange_doses(line, rows)
    compartments = tuple(np.unique(line.compartment[line.amount > 0]).tolist())
    return dict(
        time=line.time[rows],
        recorded=recorded,
        values={n: np.where(observed[n], v[rows], 0.0) for n, v in outcomes.values.items()},
        observed=observed,
        censored={
            n: np.where(recorded, v[rows], 0).astype(np.int32) for n, v in outcomes.censored.items()
        },
        limit={n: np.where(recorded, v[rows], np.nan) for n, v in outcomes.limit.items()},
        covariates={
            n: v[rows] if n in columns.time_varying else v[rows[:, 0]]
            for n, v in table.covariates.values.items()
        },
        occasions={n: arrange_occasions(v, rows) for n, v in table.occasions.items()},
        doses=doses,
        events=arrange_events(line, rows, (items, doses.given), compartments),
        compartments=compartments,
        labels=Labels(
            ids=table.ids,
            frame=frame,
            columns=columns,
            units=units,
            rows=rows,
            dose_rows=table.row[items],
            written=doses.given & (items < len(frame)) & (line.amount > 0)[items],
            measured=dict(observed),
            levels=table.covariates.levels,
            filled={n: v[rows] & recorded for n, v in table.covariates.filled.items()},
            linear=linear,
        ),
    )
