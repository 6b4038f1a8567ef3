"""A longitudinal study as a JAX pytree, read from a table and written back to it without loss."""

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

__all__ = ["Doses", "Events", "Study", "StudyError", "StudyWarning", "Subjects"]

Array = Any  # a NumPy array on the host, a tracer under jit


class StudyError(ValueError):
    """A table that cannot be a `Study`. `findings` holds everything that is wrong with it."""

    def __init__(self, findings: Sequence[str], shown: int = 20):
        self.findings = tuple(findings)
        lines = [f"  {finding}" for finding in self.findings[:shown]]
        if len(self.findings) > shown:
            lines.append(f"  and {len(self.findings) - shown} more")
        count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        super().__init__("\n".join([f"This table cannot be a Study: {count}.", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return StudyError, (self.findings,)


class StudyWarning(UserWarning):
    """The table was read, but not in the order in which it is written."""


class Subjects(NamedTuple):
    """The subjects of a study: how many there are (`size`), and their identifiers (`ids`)."""

    size: int
    ids: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Doses:
    """Doses, [subject, dose]; the last axis is padded, and its length is 0 without doses.

    Attributes:
        time: When the dose is given or its infusion begins; padded by the subject's last time.
        amount: Amount of the dose; 0 where padded.
        rate: Amount per time of an infusion; 0 for a bolus.
        compartment: The compartment that receives it, counted from 1 as in NONMEM.
        given: True for a dose, False for padding.
    """

    time: Array
    amount: Array
    rate: Array
    compartment: Array
    given: Array


@dataclass(frozen=True, eq=False)
class Events:
    """Records, doses and ends of infusions in one sequence, as an ODE solver walks through it.

    Sorted by (time, row of the table). The end of an infusion that lies after the last row of
    its subject changes no record and is left out.

    Attributes:
        time: [subject, event], padded by the subject's last event.
        jump: [subject, event, compartment], amount added to each dosed compartment at the event.
        inflow: [subject, event, compartment], rate of infusion in force *after* the event.
        record: [subject, time], the event that each record is. Its state is the one after the
            event: a record that stands before a dose of the same time does not see that dose.
    """

    time: Array
    jump: Array
    inflow: Array
    record: Array


@dataclass(frozen=True, eq=False, repr=False)
class _Labels:
    """What a study knows beyond numbers: names, and the table that it came from."""

    ids: tuple[Any, ...]
    frame: pd.DataFrame
    columns: "_Columns"
    units: dict[str, str]
    rows: np.ndarray  # [subject, time] position in `frame`; padding repeats the last
    dose_rows: np.ndarray  # [subject, dose] likewise
    measured: dict[str, np.ndarray]  # outcome -> [subject, time], as in `frame`

    # Labels are static data of the pytree, hence part of every jit cache key. Any two count as
    # equal, so that another study of the same shape does not recompile. The price: a Study that
    # a jitted function *returns* carries the labels of the study first traced.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Labels)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:  # JAX prints static data in its error messages
        return "labels"

    def subset(self, subjects: np.ndarray) -> "_Labels":
        kept = np.unique(self.rows[subjects])
        return replace(
            self,
            ids=tuple(self.ids[i] for i in subjects),
            frame=self.frame.iloc[kept].copy(),
            rows=np.searchsorted(kept, self.rows[subjects]),
            dose_rows=np.searchsorted(kept, self.dose_rows[subjects]),
            measured={name: mask[subjects] for name, mask in self.measured.items()},
        )


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """A longitudinal study: who was measured when, what was found, and the doses they took.

    Every row of the table is a record, dose rows included. Subjects stand in the order of their
    first appearance, records in the order of time. A study is a pytree whose leaves all begin
    with the axis `subject`; they are float64, bool and int32 NumPy arrays on the host. Make one
    with `Study.from_frame` or `Study.from_csv`. A jitted function should take a study and return
    arrays: identifiers and column names do not pass through jit.

    Attributes:
        time: [subject, time], padded by the subject's last time.
        recorded: [subject, time], True where a row of the table stands, False for padding.
        values: Outcome -> [subject, time], 0 where not observed. Empty in `unobserved()`.
        observed: Outcome -> [subject, time], True where that outcome was measured.
        censored: Outcome -> [subject, time], 0 for a measurement, 1 for one that is known to lie
            below `values`, -1 for one above; only for outcomes that have such a column.
        covariates: Name -> [subject], or [subject, time] if changing in time (padded by the last).
        doses: The doses, [subject, dose].
        events: Records, doses and ends of infusions as one sequence, [subject, event].
        compartments: The dosed compartments, counted from 1: the last axis of `events.jump`.
    """

    time: Array
    recorded: Array
    values: dict[str, Array]
    observed: dict[str, Array]
    censored: dict[str, Array]
    covariates: dict[str, Array]
    doses: Doses
    events: Events
    compartments: tuple[int, ...]
    labels: _Labels = field(repr=False)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        subject: str | None = None,
        time: str | None = None,
        outcome: str | Sequence[str] | Mapping[str, str] | None = None,
        *,
        covariates: str | Iterable[str] = (),
        time_varying: str | Iterable[str] = (),
        amount: str | None = None,
        event: str | None = None,
        missing: str | None = None,
        compartment: str | None = None,
        rate: str | None = None,
        censored: str | Mapping[str, str] | None = None,
        outcome_type: str | None = None,
        keep_unobserved: bool = False,
        units: Mapping[str, str] | None = None,
    ) -> "Study":
        """Reads a table with one row per measurement or dose.

        An argument left out is found by its NONMEM name (upper case) if the table has it: ID,
        TIME, DV, AMT, EVID, MDV, CMT, RATE, CENS, DVID.

        Args:
            frame: The table. It is not changed.
            subject: Column that identifies the subject: numbers or text.
            time: Column of times.
            outcome: Column of measurements; `{"conc": "DV"}` to give it another name; or several
                columns, where an empty cell means "not measured in this row".
            covariates: Columns that are constant within a subject.
            time_varying: Columns of covariates that may change in time.
            amount: Column of dose amounts.
            event: Column saying what a row is: 0 a measurement, 1 a dose, 2 neither. Without it,
                a row with a positive amount is a dose and every other row a measurement.
            missing: Column that is 1 where the row holds no measurement, whatever is written.
            compartment: Column of the compartment dosed, from 1. Without it all doses enter 1.
            rate: Column of infusion rates; an infusion lasts amount / rate, a bolus has rate 0.
            censored: Column of -1, 0, 1 (see `Study.censored`); or outcome -> column.
            outcome_type: Column that says which outcome a row measures; outcomes are then named
                by its levels.
            keep_unobserved: Whether to keep subjects without any measurement; else refused.
            units: Units by name of outcome or covariate, "time" and "amount".

        Returns:
            The study.

        Raises:
            StudyError: With everything that is wrong, each finding with its row and subject.

        Warns:
            StudyWarning: If rows had to be sorted by time, or those of a subject gathered.
        """
        named = {
            "subject": subject,
            "time": time,
            "outcome": outcome,
            "amount": amount,
            "event": event,
            "missing": missing,
            "compartment": compartment,
            "rate": rate,
            "censored": censored,
            "outcome_type": outcome_type,
        }
        columns = _find_columns(frame, named, _tuple(covariates), _tuple(time_varying))
        return _read(frame, columns, dict(units or {}), keep_unobserved)

    @classmethod
    def from_csv(cls, path: str | Path, *args: Any, **kwargs: Any) -> "Study":
        """Reads a comma-separated file: `Study.from_frame`, with line numbers in its findings.

        Args:
            path: The file, with a header. Empty cells and NONMEM's "." are missing values.
            *args: As in `Study.from_frame`, after `frame`.
            **kwargs: Likewise.

        Returns:
            The study. The index of its table, see `to_frame`, is the line in the file.

        Raises:
            StudyError: As `Study.from_frame`, and for a line with too many or too few cells.
        """
        return cls.from_frame(_read_csv(path), *args, **kwargs)

    @property
    def subjects(self) -> Subjects:
        """How many subjects there are, and who."""
        return Subjects(self.time.shape[0], self.labels.ids)

    @property
    def ids(self) -> tuple[Any, ...]:
        """Identifiers of the subjects, in order of first appearance."""
        return self.labels.ids

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Names of the outcomes."""
        return tuple(self.observed)

    @property
    def units(self) -> dict[str, str]:
        """Units by name, as given."""
        return dict(self.labels.units)

    def to_frame(self) -> pd.DataFrame:
        """The table again: same columns, dtypes, row order and index, with the study's numbers.

        Times, measurements, doses and covariates come from the arrays, so that changed values
        show; identifiers and unused columns are as they were. A cell that is no longer observed
        becomes NaN.
        """
        frame = self.labels.frame.copy()
        columns, rows, recorded = self.labels.columns, self.labels.rows, np.asarray(self.recorded)
        _write(frame, columns.time, rows[recorded], np.asarray(self.time)[recorded])
        for name, column in columns.outcome.items():
            observed = np.asarray(self.observed[name])
            values = np.asarray(self.values.get(name, np.nan))
            cells = observed | self.labels.measured[name]
            _write(frame, column, rows[cells], np.where(observed, values, np.nan)[cells])
            if name in columns.censored:
                censored = np.asarray(self.censored[name])[observed]
                _write(frame, columns.censored[name], rows[observed], censored)
        for name, covariate in self.covariates.items():
            covariate = np.asarray(covariate)
            covariate = covariate[:, None] if covariate.ndim == 1 else covariate
            cells = np.broadcast_to(covariate, recorded.shape)[recorded]
            _write(frame, name, rows[recorded], cells)
        given = np.asarray(self.doses.given)
        for role in ("amount", "rate", "compartment"):
            named, dose = getattr(columns, role), np.asarray(getattr(self.doses, role))
            if named is not None:
                _write(frame, named, self.labels.dose_rows[given], dose[given])
        return frame

    def subset(
        self, indices: Iterable[int] | Array | None = None, *, ids: Iterable[Any] | None = None
    ) -> "Study":
        """The study of some subjects, in the order asked for, padded as before.

        Args:
            indices: Positions in `study.ids`, or a boolean mask over them.
            ids: Identifiers, instead of positions.

        Returns:
            The smaller study.

        Raises:
            ValueError: If a subject is unknown or asked for twice, or none is asked for.
        """
        chosen = self._positions(indices, ids)
        arrays = jax.tree.map(lambda leaf: leaf[chosen], self)
        return replace(arrays, labels=self.labels.subset(chosen))

    def unobserved(self) -> "Study":
        """The study without its measurements: `values` is empty, so that a model samples them.

        The masks stay, so that what is sampled has the pattern of what was measured.
        """
        return replace(self, values={})

    def with_values(self, **values: Array) -> "Study":
        """The study with other measurements, for instance simulated ones.

        Args:
            **values: Outcome = [subject, time]; cells that are not observed are ignored.

        Returns:
            The study with these outcomes replaced and the others as they were.

        Raises:
            ValueError: For an unknown outcome, another shape, or a non-finite observed value.
        """
        unknown = [name for name in values if name not in self.observed]
        if unknown:
            raise ValueError(f"expected outcomes among {list(self.outcomes)}; got {unknown}.")
        filled = {name: self._filled(name, value) for name, value in values.items()}
        return replace(self, values={**self.values, **filled})

    def _filled(self, name: str, value: Array) -> Array:
        observed = self.observed[name]
        if np.shape(value) != np.shape(observed):
            raise ValueError(
                f"expected {name!r} of shape [subject, time] = {np.shape(observed)}; "
                f"got {np.shape(value)}."
            )
        if isinstance(value, jax.core.Tracer) or isinstance(observed, jax.core.Tracer):
            return jnp.where(observed, value, 0.0)
        cells = np.where(observed, np.asarray(value, dtype=np.float64), 0.0)
        wrong = np.argwhere(~np.isfinite(cells))
        if wrong.size:
            i, t = wrong[0]
            raise ValueError(
                f"expected finite values of {name!r}; got {cells[i, t]} for subject "
                f"{self.ids[i]!r} at time {self.time[i, t]}."
            )
        return cells

    def _positions(self, indices: Any, ids: Any) -> np.ndarray:
        if (indices is None) == (ids is None):
            raise ValueError("expected either indices or ids; got both or neither.")
        if ids is not None:
            place = {name: i for i, name in enumerate(self.ids)}
            ids = list(ids)
            unknown = [name for name in ids if name not in place]
            if unknown:
                raise ValueError(f"expected ids of this study; got {unknown[:5]}.")
            indices = [place[name] for name in ids]
        chosen = np.atleast_1d(np.asarray(indices if ids is not None else _as_indices(indices)))
        if chosen.dtype == bool and chosen.shape == (len(self.ids),):
            chosen = np.flatnonzero(chosen)
        if chosen.size == 0:
            raise ValueError("expected at least one subject; got none.")
        if not np.issubdtype(chosen.dtype, np.integer) or chosen.ndim != 1:
            raise ValueError(
                f"expected positions or a mask of length {len(self.ids)}; got {chosen!r}. "
                "Use ids= for identifiers."
            )
        if chosen.min() < 0 or chosen.max() >= len(self.ids):
            raise ValueError(f"expected positions in 0..{len(self.ids) - 1}; got {chosen}.")
        if np.unique(chosen).size < chosen.size:
            raise ValueError(f"expected each subject once; got {chosen}.")
        return chosen

    def __repr__(self) -> str:
        if not isinstance(self.time, np.ndarray):
            return f"Study(outcomes={list(self.outcomes)}, time={self.time})"

        def named(name: str) -> str:
            return f"{name} ({self.units[name]})" if name in self.units else name

        def counted(name: str) -> str:
            text = f"{self.observed[name].sum()} of {named(name)}"
            if name in self.censored:
                text += f" ({np.count_nonzero(self.censored[name])} censored)"
            return text if name in self.values else text + " (to be sampled)"

        times = self.time[self.recorded]
        unit = f" {self.units['time']}" if "time" in self.units else ""
        parts = [
            f"Study of {self.subjects.size} subjects, {self.recorded.sum()} records",
            f"time {times.min():g} to {times.max():g}{unit}",
            "observed: " + ", ".join(map(counted, self.observed)),
            f"{self.doses.given.sum()} doses" if self.doses.given.any() else "no doses",
        ]
        if self.covariates:
            parts.append("covariates: " + ", ".join(named(name) for name in self.covariates))
        return "; ".join(parts) + "."


for _cls, _static in ((Doses, ()), (Events, ()), (Study, ("compartments", "labels"))):
    _leaves = [name for name in _cls.__dataclass_fields__ if name not in _static]
    jax.tree_util.register_dataclass(_cls, _leaves, list(_static))


# Reading: which column is what ------------------------------------------------------------------

_NONMEM = {
    "subject": "ID",
    "time": "TIME",
    "outcome": "DV",
    "amount": "AMT",
    "event": "EVID",
    "missing": "MDV",
    "compartment": "CMT",
    "rate": "RATE",
    "censored": "CENS",
    "outcome_type": "DVID",
}


class _Columns(NamedTuple):
    """The column of each role; `outcome` and `censored` map the outcome to its column."""

    subject: str
    time: str
    outcome: dict[str, str]
    covariates: tuple[str, ...]
    time_varying: tuple[str, ...]
    amount: str | None
    event: str | None
    missing: str | None
    compartment: str | None
    rate: str | None
    censored: dict[str, str]
    outcome_type: str | None


def _find_columns(
    frame: pd.DataFrame,
    named: Mapping[str, Any],
    covariates: tuple[str, ...],
    time_varying: tuple[str, ...],
) -> _Columns:
    """The columns as named by the user or, where left out, by their NONMEM names."""
    if not isinstance(frame, pd.DataFrame):
        raise StudyError([f"expected a pandas DataFrame; got {type(frame).__name__}"])
    given = dict(named)
    for role, name in _NONMEM.items():
        if given[role] is None and name in frame.columns:
            given[role] = name
        if given[role] is None and role in ("subject", "time", "outcome"):
            present = ", ".join(map(str, frame.columns))
            raise StudyError(
                [f"expected a column for {role}; got none. Name it: {role}=... (of: {present})"]
            )
    outcome = _named(given.pop("outcome"))
    if named["outcome_type"] is None and list(outcome.values()) != ["DV"]:
        given["outcome_type"] = None  # DVID tells the kinds of DV apart, not of another column
    censored = given.pop("censored")
    if censored is None:
        censored = {}
    elif isinstance(censored, str):
        censored = dict.fromkeys(outcome, censored)
    columns = _Columns(
        outcome=outcome,
        covariates=tuple(name for name in covariates if name not in time_varying),
        time_varying=time_varying,
        censored=dict(censored),
        **given,
    )
    findings = _column_findings(frame, columns)
    if findings:
        raise StudyError(findings)
    return columns


def _column_findings(frame: pd.DataFrame, columns: _Columns) -> list[str]:
    """What is wrong with the columns themselves, before any row is looked at."""
    used: list[Any] = []
    for role in columns:
        used += role.values() if isinstance(role, dict) else _tuple(role)
    present = ", ".join(map(str, frame.columns))
    findings = [
        f"expected column {name!r}; got a table without it. Its columns are: {present}"
        for name in dict.fromkeys(used)
        if name not in frame.columns
    ]
    if not frame.columns.is_unique:
        twice = sorted(set(map(str, frame.columns[frame.columns.duplicated()])))
        findings.append(f"expected distinct column names; got {', '.join(twice)} more than once")
    if not columns.outcome:
        findings.append("expected at least one outcome; got none")
    if columns.outcome_type is not None and len(columns.outcome) != 1:
        findings.append(
            f"expected one outcome column beside outcome_type; got {list(columns.outcome)}"
        )
    if len(set(columns.outcome.values())) < len(columns.outcome):
        findings.append(
            f"expected a column of its own for each outcome; got {columns.outcome}. "
            "Use outcome_type= for the column that tells them apart"
        )
    if len(columns.outcome) > 1 and len(set(columns.censored.values())) < len(columns.censored):
        findings.append(
            "expected a column of censoring for each outcome; got "
            f"{sorted(set(columns.censored.values()))}. Write censored={{outcome: column}}"
        )
    for name in columns.censored:
        if name not in columns.outcome:
            findings.append(
                f"expected censored to name outcomes of {list(columns.outcome)}; got {name!r}"
            )
    return findings


def _named(outcome: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(outcome, Mapping):
        return dict(outcome)
    return {name: name for name in _tuple(outcome)}


def _tuple(names: Any) -> tuple[Any, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _as_indices(indices: Any) -> Any:
    return indices if hasattr(indices, "dtype") or np.isscalar(indices) else list(indices)


# Reading: what each row is ------------------------------------------------------------------------


class _Table:
    """A table under inspection: its columns as numbers, and all that is found wrong with it."""

    def __init__(self, frame: pd.DataFrame, subject: str):
        self.frame = frame
        self.rows = frame.index.tolist()
        self.ids = frame[subject].tolist()
        self.findings: list[str] = []

    def name(self, row: int) -> str:
        word = self.frame.index.name  # `Study.from_csv` names its index "line"
        return f"{word if isinstance(word, str) else 'row'} {self.rows[row]!r}"

    def refuse(self, wrong: np.ndarray, why: str | Callable[[int], str]) -> None:
        """One finding for each row where `wrong` is True."""
        for row in np.flatnonzero(wrong).tolist():
            text = why if isinstance(why, str) else why(row)
            self.findings.append(f"{self.name(row)}, subject {self.ids[row]!r}: {text}")

    def numbers(
        self, column: str, required: np.ndarray | bool = False, advice: str = ""
    ) -> np.ndarray:
        """A column as float64, NaN where empty; text, infinity and lacking values are findings."""
        cells = self.frame[column]
        values, text = _floats(cells)
        if text.any() and np.isnan(values).all():
            # Nothing in the column is a number: one finding says so better than one for each row.
            told = text & (np.cumsum(text) == 1)
            hint = f"Encode it as numbers, e.g. frame[{column!r}].map({{...}})"
        elif not text.any() and any(isinstance(cell, str) for cell in cells):
            told = np.arange(len(cells)) == 0
            hint = f"Convert the column: pd.to_numeric(frame[{column!r}])"
        else:
            told = text
            hint = "Write a number, or leave the cell empty where none is needed"
        self.refuse(
            told,
            lambda r: (
                f"expected a number in column {column!r}; got the text {str(cells.iloc[r])!r}. "
                f"{hint}"
            ),
        )
        lacking = np.isinf(values) | (np.isnan(values) & np.broadcast_to(required, values.shape))
        self.refuse(
            lacking & ~text,
            lambda r: f"expected a finite number in column {column!r}; got {values[r]}{advice}",
        )
        return values


def _floats(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64, and where it holds something else than numbers."""
    if pd.api.types.is_numeric_dtype(column) and column.dtype.kind != "c":
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.zeros(values.shape, bool)
    cells = column.astype(object)
    legible = np.array([isinstance(c, str | Real | np.bool_) for c in cells], bool)
    values = pd.to_numeric(cells.where(legible), errors="coerce").to_numpy(np.float64)
    return values, np.isnan(values) & ~cells.isna().to_numpy(bool)


class _Kinds(NamedTuple):
    """What each row is, [row]; `measured` rows may hold observations."""

    dose: np.ndarray
    measured: np.ndarray
    silent: np.ndarray  # MDV = 1: whatever is written as the outcome does not count
    amount: np.ndarray
    rate: np.ndarray
    compartment: np.ndarray


def _kinds(table: _Table, columns: _Columns) -> _Kinds:
    """Tells doses from measurements, and reads the doses."""
    zeros = np.zeros(len(table.frame))
    event = None if columns.event is None else _events_column(table, columns.event)
    amount = zeros
    if columns.amount is not None:
        needed = False if event is None else event == 1
        amount = np.nan_to_num(table.numbers(columns.amount, needed, " on a dose row"))
        table.refuse(amount < 0, lambda r: f"expected an amount of 0 or more; got {amount[r]}")
    dose = amount > 0 if event is None else event == 1
    if event is not None:
        table.refuse(
            (amount > 0) & np.isin(event, (0, 2)),
            lambda r: f"expected {columns.event} 1 on a row with an amount; got {event[r]:g}",
        )
        if columns.amount is None:
            table.refuse(
                dose,
                f"expected an amount for a dose ({columns.event} 1); got no column. "
                "Name it: amount=...",
            )
    silent = zeros
    if columns.missing is not None:
        silent = table.numbers(columns.missing, True)
        table.refuse(
            ~np.isin(silent, (0, 1)) & np.isfinite(silent),
            lambda r: f"expected {columns.missing} in {{0, 1}}; got {silent[r]:g}",
        )
    measured = (~dose if event is None else event == 0) & (silent != 1)
    rate, compartment = _dose_columns(table, columns, dose)
    return _Kinds(dose, measured, silent == 1, amount, rate, compartment)


def _events_column(table: _Table, column: str) -> np.ndarray:
    event = table.numbers(column, True)
    table.refuse(
        np.isin(event, (3, 4)),
        lambda r: (
            f"expected {column} in {{0, 1, 2}}; got {event[r]:g}: resets are not supported yet"
        ),
    )
    rxode = ". That is an RxODE code: write 1 for a dose"
    table.refuse(
        ~np.isin(event, (0, 1, 2, 3, 4)) & np.isfinite(event),
        lambda r: (
            f"expected {column} in {{0, 1, 2}}; got {event[r]:g}"
            + (rxode if event[r] > 100 else "")
        ),
    )
    return event


def _dose_columns(
    table: _Table, columns: _Columns, dose: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rate and compartment of each row; refuses what doses cannot say yet."""
    rate = np.zeros(dose.shape)
    if columns.rate is not None:
        rate = np.nan_to_num(table.numbers(columns.rate))
        table.refuse(
            rate < 0,
            lambda r: (
                f"expected a rate of 0 (bolus) or more; got {rate[r]:g}: a rate or duration "
                "that is estimated is not supported yet"
            ),
        )
        table.refuse(
            (rate > 0) & ~dose, lambda r: f"expected a rate on dose rows only; got {rate[r]:g}"
        )
    compartment = np.ones(dose.shape)
    if columns.compartment is not None:
        compartment = table.numbers(columns.compartment, dose, " on a dose row")
        table.refuse(
            dose & ((compartment < 1) | (compartment % 1 != 0)) & np.isfinite(compartment),
            lambda r: f"expected a compartment counted from 1; got {compartment[r]:g}",
        )
    for name in ("ADDL", "II", "SS"):
        if columns.amount is not None and name in table.frame.columns:
            _refuse_repeats(table, name)
    return rate, np.where(dose, np.nan_to_num(compartment), 1).astype(np.int32)


def _refuse_repeats(table: _Table, name: str) -> None:
    repeats = table.numbers(name)
    table.refuse(
        np.nan_to_num(repeats) != 0,
        lambda r: (
            f"expected no {name}; got {repeats[r]:g}: not supported yet. Expand the doses into rows"
        ),
    )


class _Outcomes(NamedTuple):
    """Each outcome over the rows of the table: outcome -> [row]."""

    values: dict[str, np.ndarray]
    observed: dict[str, np.ndarray]
    censored: dict[str, np.ndarray]
    written: np.ndarray  # [row] True where an observation stands, legible or not


def _read_outcomes(table: _Table, columns: _Columns, kinds: _Kinds) -> tuple[_Outcomes, _Columns]:
    """The outcomes; and the columns, where the levels of `outcome_type` name the outcomes."""
    where = dict.fromkeys(columns.outcome, kinds.measured)
    if columns.outcome_type is not None:
        where, columns = _levels(table, columns, kinds.measured)
    outcomes = _Outcomes({}, {}, {}, np.zeros(len(table.frame), bool))
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
            outcomes.censored[name] = _read_censored(table, columns.censored[name], observed)
    return outcomes, columns


def _read_outcome(table: _Table, column: str, kinds: _Kinds, needed: bool) -> np.ndarray:
    advice = ". Drop the row, or mark it by 1 in a column missing=... (MDV)"
    values = table.numbers(column, kinds.measured & needed, advice)
    table.refuse(
        ~kinds.measured & ~kinds.silent & (np.nan_to_num(values) != 0),
        lambda r: (
            f"expected no {column!r} on a row that is not a measurement; got {values[r]:g}. "
            "Give it a row of its own"
        ),
    )
    return values


def _read_censored(table: _Table, column: str, observed: np.ndarray) -> np.ndarray:
    censored = table.numbers(column, observed)
    table.refuse(
        observed & ~np.isin(censored, (-1, 0, 1)) & np.isfinite(censored),
        lambda r: f"expected {column} in {{-1, 0, 1}}; got {censored[r]:g}",
    )
    return np.where(observed, np.nan_to_num(censored), 0).astype(np.int32)


def _levels(
    table: _Table, columns: _Columns, measured: np.ndarray
) -> tuple[dict[str, np.ndarray], _Columns]:
    """Where each level of `outcome_type` is measured, and the columns with outcomes so named."""
    cells = table.frame[columns.outcome_type]
    empty = cells.isna().to_numpy(bool)
    table.refuse(
        measured & empty, f"expected an outcome in column {columns.outcome_type!r}; got none"
    )
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
    censored = columns.censored.get(column)
    return {level: measured & ~empty & (names == level) for level in levels}, columns._replace(
        outcome=dict.fromkeys(levels, column),
        censored=dict.fromkeys(levels, censored) if censored is not None else {},
    )


def _read_covariates(table: _Table, columns: _Columns, code: np.ndarray) -> dict[str, np.ndarray]:
    """Covariates over the rows of the table: name -> [row]."""
    covariates = {}
    for name in columns.covariates + columns.time_varying:
        covariates[name] = table.numbers(name, True)
        if name in columns.covariates:
            _refuse_changes(table, name, code, covariates[name])
    return covariates


def _refuse_changes(table: _Table, name: str, code: np.ndarray, values: np.ndarray) -> None:
    """One finding for each subject whose covariate changes: the first row that differs."""
    first: dict[int, int] = {}
    changed: dict[int, int] = {}
    for row in np.flatnonzero(np.isfinite(values) & (code >= 0)).tolist():
        if values[row] != values[first.setdefault(code[row], row)]:
            changed.setdefault(code[row], row)
    table.refuse(
        np.isin(np.arange(code.size), list(changed.values())),
        lambda r: (
            f"expected covariate {name!r} constant within a subject; got {values[r]:g} here and "
            f"{values[first[code[r]]]:g} in {table.name(first[code[r]])}. "
            "Name it in time_varying=... if it changes"
        ),
    )


def _refuse_duplicates(
    table: _Table, name: str, code: np.ndarray, time: np.ndarray, observed: np.ndarray
) -> None:
    first: dict[tuple[int, float], int] = {}
    twice = np.zeros(code.shape, bool)
    for row in np.flatnonzero(observed & np.isfinite(time) & (code >= 0)).tolist():
        twice[row] = first.setdefault((code[row], time[row]), row) != row
    table.refuse(
        twice,
        lambda r: (
            f"expected one value of {name!r} at time {time[r]:g}; got another in "
            f"{table.name(first[code[r], time[r]])}"
        ),
    )


# Reading: from rows to arrays ---------------------------------------------------------------------


def _read_csv(path: str | Path) -> pd.DataFrame:
    """A file as a table whose index is the line on which each row ends."""
    text = Path(path).read_text(encoding="utf-8-sig")
    reader = csv.reader(io.StringIO(text))
    lines = [
        (reader.line_num, len(cells)) for cells in reader if "".join(cells).strip() or cells[1:]
    ]
    if not lines:
        raise StudyError([f"expected a header and rows in {str(path)!r}; got an empty file"])
    (_, width), *rows = lines
    # pandas would fill a short line with empty cells, and shift a long one.
    ragged = [
        f"line {line}: expected {width} cells, as in the header; got {cells}"
        for line, cells in rows
        if cells != width
    ]
    if ragged:
        raise StudyError(ragged)
    frame = pd.read_csv(io.StringIO(text), na_values=["."])
    frame.index = pd.Index([line for line, _ in rows], name="line")
    return frame


def _read(
    frame: pd.DataFrame, columns: _Columns, units: dict[str, str], keep_unobserved: bool
) -> Study:
    """Reads all rows, refuses the table if anything is wrong with it, and pads it to arrays."""
    if frame.empty:
        raise StudyError(["expected at least one row; got an empty table"])
    table = _Table(frame, columns.subject)
    code, ids = pd.factorize(frame[columns.subject])
    table.refuse(code < 0, f"expected an identifier in column {columns.subject!r}; got none")
    time = table.numbers(columns.time, True)
    kinds = _kinds(table, columns)
    outcomes, columns = _read_outcomes(table, columns, kinds)
    covariates = _read_covariates(table, columns, code)
    for name, observed in outcomes.observed.items():
        _refuse_duplicates(table, name, code, time, observed)
    _refuse_units(table, units, ["time", "amount", *outcomes.values, *covariates])
    if not keep_unobserved:
        seen = np.isin(code, code[outcomes.written])
        first = np.isin(np.arange(len(code)), np.unique(code, return_index=True)[1])
        table.refuse(
            first & ~seen & (code >= 0),
            "expected an observation of this subject; got none. Leave the subject out, or write "
            "keep_unobserved=True",
        )
    if table.findings:
        raise StudyError(table.findings)
    _warn_of_order(code, time, ids.tolist())
    names = (tuple(ids.tolist()), frame.copy(), columns, units)
    return _arrange(code, time, kinds, outcomes, covariates, names)


def _refuse_units(table: _Table, units: dict[str, str], nameable: list[str]) -> None:
    table.findings += [
        f"expected units of {', '.join(nameable)}; got {name!r}"
        for name in units
        if name not in nameable
    ]


def _warn_of_order(code: np.ndarray, time: np.ndarray, ids: list[Any]) -> None:
    order = np.argsort(code, kind="stable")
    back = (np.diff(time[order]) < 0) & (np.diff(code[order]) == 0)
    unsorted = np.unique(code[order][1:][back])
    starts = code[np.insert(np.diff(code) != 0, 0, True)]
    apart = np.flatnonzero(np.bincount(starts) > 1)
    for subjects, what in ((unsorted, "sorted by time"), (apart, "gathered from several places")):
        if subjects.size:
            warnings.warn(
                f"The rows of {subjects.size} of {len(ids)} subjects were {what}, subject "
                f"{ids[subjects[0]]!r} first; Study.to_frame gives them back as they were.",
                StudyWarning,
                stacklevel=4,
            )


class _Grid(NamedTuple):
    """Items of a long list laid out as [subject, slot]; padding repeats the subject's last item."""

    items: np.ndarray  # [subject, slot] position in the list
    filled: np.ndarray  # [subject, slot] True where an item stands

    @staticmethod
    def of(order: np.ndarray, code: np.ndarray, subjects: int) -> "_Grid":
        """Lays out the items `order`, already sorted by their subject `code`."""
        counts = np.bincount(code, minlength=subjects)[:, None]
        slot = np.arange(counts.max(initial=0))[None]
        last = np.cumsum(counts)[:, None] - 1
        return _Grid(order[np.minimum(last - counts + 1 + slot, last)], slot < counts)


def _arrange(
    code: np.ndarray,
    time: np.ndarray,
    kinds: _Kinds,
    outcomes: _Outcomes,
    covariates: dict[str, np.ndarray],
    names: tuple[tuple[Any, ...], pd.DataFrame, _Columns, dict[str, str]],
) -> Study:
    """Pads the rows of each subject to arrays [subject, time]."""
    ids, frame, columns, units = names
    subjects = len(ids)
    order = np.lexsort((time, code))  # stable: rows of one time keep their order
    rows, recorded = _Grid.of(order, code[order], subjects)
    observed = {name: mask[rows] & recorded for name, mask in outcomes.observed.items()}
    doses, dose_rows = _arrange_doses(code, time, kinds, order, rows)
    compartments = tuple(np.unique(kinds.compartment[kinds.dose]).tolist())
    return Study(
        time=time[rows],
        recorded=recorded,
        values={n: np.where(observed[n], v[rows], 0.0) for n, v in outcomes.values.items()},
        observed=observed,
        censored={
            n: np.where(recorded, v[rows], 0).astype(np.int32) for n, v in outcomes.censored.items()
        },
        covariates={
            n: v[rows] if n in columns.time_varying else v[rows[:, 0]]
            for n, v in covariates.items()
        },
        doses=doses,
        events=_arrange_events(code, time, kinds, order, rows, compartments),
        compartments=compartments,
        labels=_Labels(ids, frame, columns, units, rows, dose_rows, dict(observed)),
    )


def _arrange_doses(
    code: np.ndarray, time: np.ndarray, kinds: _Kinds, order: np.ndarray, rows: np.ndarray
) -> tuple[Doses, np.ndarray]:
    """The doses, [subject, dose], and the row of each."""
    dosed = order[kinds.dose[order]]
    items, given = _Grid.of(dosed, code[dosed], rows.shape[0])
    items = np.where(given, items, rows[:, -1:])  # a padded dose comes with the last record
    doses = Doses(
        time=time[items],
        amount=np.where(given, kinds.amount[items], 0.0),
        rate=np.where(given, kinds.rate[items], 0.0),
        compartment=np.where(given, kinds.compartment[items], 1).astype(np.int32),
        given=given,
    )
    return doses, items


def _arrange_events(
    code: np.ndarray,
    time: np.ndarray,
    kinds: _Kinds,
    order: np.ndarray,
    rows: np.ndarray,
    compartments: tuple[int, ...],
) -> Events:
    """Rows and ends of infusions in one sequence, [subject, event]."""
    infused = np.flatnonzero(kinds.dose & (kinds.rate > 0))
    ends = time[infused] + kinds.amount[infused] / kinds.rate[infused]
    # An infusion too short for the clock (end == time) is a bolus.
    lasting = ends > time[infused]
    infused, ends = infused[lasting], ends[lasting]
    kept = ends <= time[rows[code[infused], -1]]
    # The list of events: all rows in order, then the ends of infusions, which come before rows
    # of the same time.
    event_code = np.concatenate([code[order], code[infused[kept]]])
    event_time = np.concatenate([time[order], ends[kept]])
    rank = np.concatenate([np.arange(order.size), np.full(kept.sum(), -1)])
    sequence = np.lexsort((rank, event_time, event_code))
    items, filled = _Grid.of(sequence, event_code[sequence], rows.shape[0])
    slot = np.empty(event_code.size, np.int32)  # where in its subject's sequence an event stands
    slot[items[filled]] = np.nonzero(filled)[1]
    row_slot = np.empty(order.size, np.int32)
    row_slot[order] = slot[: order.size]
    end_slot = np.full(infused.size, items.shape[1])
    end_slot[kept] = slot[order.size :]

    jump = np.zeros((*items.shape, len(compartments)))
    inflow = np.zeros_like(jump)
    bolus = np.setdiff1d(np.flatnonzero(kinds.dose), infused)
    axis = np.searchsorted(compartments, kinds.compartment)
    jump[code[bolus], row_slot[bolus], axis[bolus]] = kinds.amount[bolus]
    for row, end in zip(infused, end_slot, strict=True):
        # Added over the slots in force, not added and taken away again: the rate returns to
        # zero exactly.
        inflow[code[row], row_slot[row] : end, axis[row]] += kinds.rate[row]
    return Events(event_time[items], jump, inflow, row_slot[rows])


def _write(frame: pd.DataFrame, column: str, rows: np.ndarray, cells: np.ndarray) -> None:
    """Writes numbers into rows of a column; the column keeps its dtype if that can hold them."""
    old = frame[column]
    values, _ = _floats(old)
    if np.array_equal(values[rows], cells, equal_nan=True):
        return  # float64 cannot say all that a column can (large integers, kinds of NA)
    values = values.copy()  # pandas lends its own memory
    values[rows] = cells
    new = pd.Series(values)
    try:
        same = new.astype(old.dtype)
        if np.array_equal(_floats(same)[0], values, equal_nan=True):
            new = same
    except (TypeError, ValueError):  # NaN in a column of integers
        pass
    frame[column] = new.array
