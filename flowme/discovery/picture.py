"""Data against the trajectories of networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .data import TimeCourses

_INK, _DATA = "#22313a", "#c8553d"
_LINES = ("#1b7f6b", "#5a7bbf", "#b08a2e", "#8a5aa6", "#6b6b6b")


def against_data(
    courses: TimeCourses,
    curves: Sequence[Mapping[tuple[int, int], Any]],
    names: Sequence[str],
    subjects: int,
) -> Figure:
    """A panel for each species (rows) and condition (columns): points and one line per network.

    Args:
        courses: the data.
        curves: of each network, splines in scaled units by (condition, species).
        names: of the networks, for the legend.
        subjects: most conditions shown.
    """
    C, S = min(subjects, len(courses.conditions)), len(courses.species)
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            S, C, figsize=(2.5 * C + 1, 1.7 * S + 0.6), squeeze=False, sharex="col", sharey="row",
            layout="constrained",
        )  # fmt: skip
    for s, name in enumerate(courses.species):
        for c in range(C):
            _panel(axes[s, c], courses, curves, names, c, s)
        axes[s, 0].set_ylabel(_with_unit(name, courses.units.get(name, "")), color=_INK)
    for c in range(C):
        axes[0, c].set_title(str(courses.conditions[c]), fontsize=10, color=_INK)
        axes[-1, c].set_xlabel(_with_unit("time", courses.units["time"]), color=_INK)
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure


def _panel(
    ax: Any, courses: TimeCourses, curves: Sequence[Any], names: Sequence[str], c: int, s: int
) -> None:
    seen, scale = courses.observed[c, :, s], courses.scale[s]
    time = courses.start[c] + courses.time[c] * courses.duration
    grid = np.linspace(0, courses.time[c].max(), 300)
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        ax.plot(
            courses.start[c] + grid * courses.duration, scale * curve[c, s](grid),
            color=_LINES[i % len(_LINES)], lw=1.8 if i == 0 else 1.1,
            ls="-" if i == 0 else (0, (4, 2)), label=name,
        )  # fmt: skip
    ax.plot(time[seen], scale * courses.values[c, seen, s], "o", ms=3, color=_DATA, mew=0)


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name
