"""A study in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flowme.table import counted

if TYPE_CHECKING:
    from flowme.study import Study

__all__ = ["describe"]


def describe(study: Study) -> str:
    """Subjects, records, times, outcomes, doses, covariates and occasions, in one line."""
    if not _whole(study):
        return f"Study(outcomes={list(study.outcomes)}, time={type(study.time).__name__})"
    times = np.asarray(study.time)[np.asarray(study.recorded)]
    unit = f" {study.units['time']}" if "time" in study.units else ""
    doses = int(np.count_nonzero(study.doses.amount))
    parts = [
        f"Study of {counted(len(study.time), 'subject')}, {counted(times.size, 'record')}",
        f"time {times.min():g} to {times.max():g}{unit}",
        "observed: " + ", ".join(_outcome(study, name) for name in study.observed),
        counted(doses, "dose") if doses else "no doses",
    ]
    if study.covariates:
        parts.append("covariates: " + ", ".join(_covariate(study, n) for n in study.covariates))
    for name, value in study.occasions.items():
        parts.append(f"up to {counted(value.most, 'occasion')} ({name})")
    return "; ".join(parts) + "."


def _whole(study: Study) -> bool:
    """Whether the leaves are what a study holds: `jax.tree.map` may have put anything there."""

    def is_array(leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)

    leaves = jax.tree.leaves(study, is_leaf=lambda leaf: leaf is None)
    if not all(map(is_array, leaves)):
        return False
    grid = [study.time, study.recorded, *study.observed.values()]
    told = all(mask.dtype == bool for mask in grid[1:])
    occasions = all(value.present.ndim == 2 for value in study.occasions.values())
    alike = study.time.ndim == 2 and all(leaf.shape == study.time.shape for leaf in grid)
    return told and occasions and alike and bool(np.asarray(study.recorded).any())


def _named(study: Study, name: str) -> str:
    return f"{name} ({study.units[name]})" if name in study.units else name


def _outcome(study: Study, name: str) -> str:
    text = f"{int(np.sum(study.observed[name]))} of {_named(study, name)}"
    if name in study.censored:
        text += f" ({int(np.count_nonzero(study.censored[name]))} censored)"
    return text if name in study.values else text + " (to be sampled)"


def _covariate(study: Study, name: str) -> str:
    levels = study.levels.get(name)
    return f"{name} ({', '.join(map(str, levels))})" if levels else _named(study, name)
