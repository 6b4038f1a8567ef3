"""Regimens of every kind, one a subject, and what they lead to by SciPy's LSODA."""

from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.integrate import solve_ivp

from flowme.study import Study

COLUMNS = ["TIME", "DV", "EVID", "AMT", "CMT", "RATE", "DUR", "ADDL", "II", "SS"]


def give(time, amount=100.0, into=1, rate=0.0, duration=0.0, more=0, every=0.0, ss=0, event=1):
    return (time, np.nan, event, amount, into, rate, duration, more, every, ss)


def seen(*times):
    return [(time, 1.0, 0, 0.0, 2, 0.0, 0.0, 0, 0.0, 0) for time in times]


def reset(time):
    return (time, np.nan, 3, 0.0, 1, 0.0, 0.0, 0, 0.0, 0)


ORAL = {
    "single": [give(0.0), *seen(0.4, 2.0, 9.0, 30.0)],
    "additional": [give(0.0, more=3, every=6.0), *seen(1.0, 7.0, 19.5, 40.0)],
    "steady state": [give(0.0, ss=1, every=12.0, more=1), *seen(0.1, 3.0, 11.0, 13.0, 30.0)],
    "steady state, late": [
        give(0.0, 300.0),
        *seen(3.0),
        give(5.0, 50.0, ss=1, every=8.0),
        *seen(5.1, 8.0, 20.0),
    ],
    "reset": [give(0.0, more=5, every=4.0), *seen(5.0), reset(9.0), *seen(9.5, 14.0)],
    "reset and dose": [give(0.0), *seen(3.0), give(7.0, 40.0, event=4), *seen(7.1, 9.0, 20.0)],
    "by mouth and into the vein": [
        give(0.0),
        give(1.0, 30.0, into=2),
        *seen(2.0, 6.0),
        give(8.0, 80.0, into=2, rate=20.0),
        *seen(9.0, 25.0),
    ],
}
VEIN = {
    "bolus": [give(0.0, into=2), *seen(0.5, 4.0, 26.0)],
    "rate": [give(0.0, into=2, rate=50.0), *seen(1.0, 3.0, 24.0)],
    "duration": [give(0.0, into=2, duration=3.0), *seen(1.0, 5.0, 24.0)],
    "overlapping": [give(0.0, into=2, rate=20.0, more=2, every=3.5), *seen(2.0, 9.0, 14.0)],
    "steady bolus": [give(0.0, into=2, ss=1, every=8.0), *seen(0.1, 1.0, 7.5, 30.0)],
    "steady rate": [give(2.0, into=2, rate=25.0, ss=1, every=12.0), *seen(2.2, 4.0, 13.0, 30.0)],
    "steady duration": [
        give(0.0, into=2, duration=11.9, ss=1, every=12.0, more=1),
        *seen(0.05, 6.0, 13.0, 27.0),
    ],
    "reset while infused": [
        give(0.0, into=2, duration=9.0),
        reset(4.0),
        give(5.0, into=2),
        *seen(7.0),
    ],
}
CASES = ORAL | VEIN


def study_of(cases):
    rows = [(name, *row) for name, rows in cases.items() for row in rows]
    frame = pd.DataFrame(rows, columns=["ID", *COLUMNS])
    return Study.from_frame(frame, outcome={"conc": "DV"})


def by_lsoda(rhs, rows, states, lag=None, part=None, cycles=60):
    """States after each row, [row, state], by LSODA at 1e-10, restarted at every event.

    A steady state is `cycles` doses before; `lag` and `part` are by compartment.
    """
    lag, part = lag or {}, part or {}
    found, doses, y, now = [], [], np.zeros(states), rows[0][0]
    for time, _, event, amount, into, rate, duration, more, every, ss in rows:
        y, now = _advance(rhs, y, doses, now, time), time
        if event in (3, 4) or ss:
            doses, y = [], np.zeros(states)
        if event in (1, 4):
            given = amount * part.get(into, 1.0)
            length = given / rate if rate else duration
            begin = time + lag.get(into, 0.0)
            earlier = [(begin - n * every, given, length, into) for n in range(cycles, 0, -1)]
            own = [(begin + n * every, given, length, into) for n in range(more + 1)]
            earlier = earlier if ss else []
            if ss:
                y = _advance(
                    rhs, _taken(y, earlier[:1], earlier[0][0]), earlier, earlier[0][0], time
                )
            y = _taken(y, own, time)
            doses = doses + earlier + own
        found.append(y)
    return np.array(found)


def _advance(rhs, y, doses, begin, end):
    """The state at `end`, with the boluses after `begin` up to then."""
    ends = {at + length for at, _, length, _ in doses}
    stops = sorted(
        t for t in {begin, end, *ends, *(dose[0] for dose in doses)} if begin <= t <= end
    )
    for before, after in pairwise(stops):
        inflow = np.zeros(len(y))
        for at, amount, length, into in doses:
            if at <= before < at + length:
                inflow[into - 1] += amount / length

        def with_inflow(t, y, inflow=inflow):
            return rhs(t, y) + inflow

        span = (before, after)
        solved = solve_ivp(with_inflow, span, y, "LSODA", [after], rtol=1e-10, atol=1e-10)
        y = _taken(solved.y[:, -1], doses, after)
    return y


def _taken(y, doses, time):
    y = y.copy()
    for at, amount, length, into in doses:
        if at == time and length == 0:
            y[into - 1] += amount
    return y
