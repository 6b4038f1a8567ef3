"""Time courses of concentrations, from a study, as the dense and scaled arrays of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import flowme as fm

from .library import Library
from .reaction import Reaction

_RANGE = 1e6  # of one species' concentrations, beyond which an additive error sees the largest only


@dataclass(frozen=True)
class TimeCourses:
    """Concentrations of S species in C conditions (the subjects of a study) at T times.

    Everything is scaled: a concentration of species s is in units of `scale[s]`, its largest, and
    time runs from each condition's first record in units of `duration`. `rate_unit` gives the unit
    of a rate constant.

    Attributes:
        conditions: C identifiers of the subjects.
        species: S names; those that no outcome measures are hidden.
        time: [condition, time], from 0; padded by the last.
        values: [condition, time, species], 0 where not measured.
        observed: [condition, time, species], True where measured.
        initial: [condition, species], the state at the first record; a first guess where unknown.
        known: [condition, species], whether `initial` is given and not to be estimated.
        scale: [species], in the outcomes' units.
        duration: of the longest condition, in the study's unit of time.
        start: [condition], time of the first record, in the study's unit.
        units: of species, and "time".
    """

    conditions: tuple[Any, ...]
    species: tuple[str, ...]
    time: np.ndarray
    values: np.ndarray
    observed: np.ndarray
    initial: np.ndarray
    known: np.ndarray
    scale: np.ndarray
    duration: float
    start: np.ndarray
    units: dict[str, str]

    @property
    def hidden(self) -> tuple[str, ...]:
        """Species that no outcome measures."""
        return tuple(s for s, n in zip(self.species, self.count, strict=True) if n == 0)

    @property
    def count(self) -> np.ndarray:
        """Measurements of each species, [species]."""
        return self.observed.sum((0, 1))

    def rate_unit(self, library: Library) -> np.ndarray:
        """What a rate constant of 1 in scaled units is in the study's units, [L].

        With z_s = x_s / c_s and τ = t / T, ż_s = Σ_r κ_r (u_r / c_s) N_rs z^(y_r) where
        κ_r = k_r T c^(y_r) / u_r and u_r is the geometric mean of the c_s that r changes.
        """
        return self._amount(library) / (self.duration * np.prod(self.scale**library.consumed, 1))

    def unit(self, reaction: Reaction) -> str:
        """Unit of a rate constant, such as "1/(mM h)"; empty where a unit is not stated, or the
        species have several."""
        of = {self.units.get(s, "") for s in reaction.species}
        time, order = self.units.get("time", ""), sum(n for _, n in reaction.reactants)
        if not time or (order != 1 and (len(of) != 1 or "" in of)):
            return ""
        unit = next(iter(of), "")
        power = unit if order <= 2 else f"{unit}^{order - 1}"
        return {0: f"{unit}/{time}", 1: f"1/{time}"}.get(order, f"1/({power} {time})")

    def net(self, library: Library) -> np.ndarray:
        """(u_r / c_s) N_rs, the change of the scaled species by each reaction, [L, S]."""
        return library.net * self._amount(library)[:, None] / self.scale

    def _amount(self, library: Library) -> np.ndarray:
        changed = library.net != 0
        logs = np.where(changed, np.log(self.scale), 0.0).sum(1)
        return np.exp(logs / np.maximum(changed.sum(1), 1))


def time_courses(
    study: fm.Study,
    species: Mapping[str, str | None] | Sequence[str],
    initial: Mapping[str, Any] | None = None,
) -> TimeCourses:
    """The measurements of a study as concentrations of species.

    Args:
        study: each subject is one condition: one initial state of the same reactions.
        species: the outcome that measures each species, {"A": "conc_A"}, None for a species that
            is hidden; or names that are outcomes.
        initial: known states at each subject's first record, by species: a number, [subject], or
            the name of a constant covariate. Those of other species are estimated.

    Raises:
        ValueError: for what cannot be a time course of concentrations, naming species and subject.
    """
    named = dict(species) if isinstance(species, Mapping) else {s: s for s in species}
    _check_names(study, named)
    observed = np.stack([_cells(study, o, study.observed) for o in named.values()], -1)
    values = np.stack([_cells(study, o, study.values) for o in named.values()], -1)
    _check_cells(study, tuple(named), np.where(observed, values, 0.0), observed)
    scale = _scale(values, observed)
    start = np.asarray(study.time[:, 0])
    duration = float((study.time - start[:, None]).max())
    values = np.where(observed, values / scale, 0.0)
    given = _known(study, tuple(named), initial or {})
    known = np.isfinite(given)
    guess = np.where(known, given / scale, _first(values, observed))
    units = {s: study.units.get(o, "") for s, o in named.items() if o is not None}
    return TimeCourses(
        study.ids,
        tuple(named),
        (study.time - start[:, None]) / duration,
        values,
        observed,
        guess,
        known,
        scale,
        duration,
        start,
        {**units, "time": study.units.get("time", "")},
    )


def _cells(study: fm.Study, outcome: str | None, cells: Mapping[str, Any]) -> np.ndarray:
    blank = np.zeros(study.time.shape, next(iter(cells.values())).dtype)
    return blank if outcome is None else np.asarray(cells[outcome])


def _scale(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The largest concentration of each species; of a hidden one the others' geometric mean."""
    largest = np.where(observed, np.abs(values), 0.0).max((0, 1))
    typical = np.exp(np.mean(np.log(largest[largest > 0])))
    return np.where(largest > 0, largest, typical)


def _first(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The first measurement of each species in each condition, at least 0; 0.1 where none is."""
    at = observed.argmax(1)
    first = np.take_along_axis(values, at[:, None, :], 1)[:, 0]
    return np.where(observed.any(1), np.maximum(first, 0.0), 0.1)


def _known(study: fm.Study, species: tuple[str, ...], initial: Mapping[str, Any]) -> np.ndarray:
    """Given initial values, [condition, species], NaN where there are none."""
    unknown = sorted(set(initial) - set(species))
    if unknown:
        raise ValueError(f"expected initial values of {list(species)}; got some of {unknown}")
    given = np.full((len(study.ids), len(species)), np.nan)
    for name, value in initial.items():
        if isinstance(value, str):
            if value not in study.covariates or np.ndim(study.covariates[value]) != 1:
                raise ValueError(
                    f"expected the initial value of {name} to be a constant covariate of the "
                    f"study, one of {list(study.covariates)}; got {value!r}"
                )
            if value in study.levels:
                raise ValueError(
                    f"expected the initial value of {name} to be a covariate of numbers; got "
                    f"{value!r}, which is categorical: {list(study.levels[value])}"
                )
            value = study.covariates[value]
        given[:, species.index(name)] = _of_subjects(study, name, value)
    return given


def _of_subjects(study: fm.Study, name: str, value: Any) -> np.ndarray:
    """An initial value, a number or [subject], checked."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.shape not in ((), (len(study.ids),)):
        raise ValueError(
            f"expected the initial value of {name} to be a number, one for each of the "
            f"{len(study.ids)} subjects, or a covariate's name; got {value!r}"
        )
    found = np.broadcast_to(array, len(study.ids))
    wrong = np.flatnonzero(~((found >= 0) & np.isfinite(found)))
    if wrong.size:
        raise ValueError(
            f"expected initial values of {name} of at least 0, finite; got {found[wrong[0]]:g} for "
            f"subject {study.ids[wrong[0]]!r}"
        )
    return found


def _check_names(study: fm.Study, named: Mapping[str, str | None]) -> None:
    if not named:
        raise ValueError("expected at least one species; got none. Try species={'A': 'outcome'}.")
    absent = {s: o for s, o in named.items() if o is not None and o not in study.outcomes}
    if absent:
        raise ValueError(
            f"expected outcomes among {list(study.outcomes)}; got {absent}. A species that no "
            "outcome measures is hidden: give it None."
        )
    if all(o is None for o in named.values()):
        raise ValueError(f"expected at least one species to be measured; got none of {list(named)}")
    if len({o for o in named.values() if o}) < sum(o is not None for o in named.values()):
        raise ValueError(f"expected an outcome to measure one species; got {dict(named)}")
    censored = [o for o in named.values() if o in study.censored and np.any(study.censored[o])]
    if censored:
        raise ValueError(
            f"expected exact measurements; got censored ones of {', '.join(censored)}, which would "
            "pass for values at the limit. Leave those rows out, or mark them as missing."
        )
    if study.doses.amount.size:
        raise ValueError(
            "expected a study without doses: what is found is the reactions between species that "
            "start from an initial state; got a study with doses. Begin each record at the dose."
        )


def _check_cells(
    study: fm.Study, species: tuple[str, ...], values: np.ndarray, observed: np.ndarray
) -> None:
    for i, who in enumerate(study.ids):
        times = np.unique(study.time[i][observed[i].any(-1)])
        if times.size < 2:
            raise ValueError(
                f"subject {who!r}: expected measurements at two times or more; got {times.size}. "
                "Leave it out with study.subset."
            )
    for s, name in enumerate(species):
        _check_species(study, name, values[..., s], observed[..., s])


def _check_species(study: fm.Study, name: str, x: np.ndarray, seen: np.ndarray) -> None:
    if not seen.any():
        return
    largest = np.abs(x[seen]).max()
    spread = x[seen].std()
    # Noise about 0 may be negative; what lies further below is no concentration.
    wrong = np.argwhere(seen & (x < -max(0.2 * largest, 0.5 * spread)))
    if wrong.size:
        i, j = wrong[0]
        raise ValueError(
            f"expected concentrations of {name}, 0 or more but for noise; got {x[i, j]:g} for "
            f"subject {study.ids[i]!r} at time {study.time[i, j]:g}. If it is a logarithm or a "
            "difference, give the concentration itself."
        )
    if largest == 0:
        raise ValueError(f"expected some {name}; got 0 everywhere. Leave the species out.")
    tops = np.array([np.abs(a[b]).max() for a, b in zip(x, seen, strict=True) if b.any()])
    if (tops > 0).all() and tops.max() > _RANGE * tops.min():
        raise ValueError(
            f"expected concentrations of {name} within a factor of {_RANGE:g} between subjects; "
            f"got largest values from {tops.min():g} to {tops.max():g}. Check their units."
        )
