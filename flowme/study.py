"""A longitudinal study as a JAX pytree, read from a table and written back to it without loss."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from flowme.covariate_table import state, write_levels
from flowme.events import Doses, Events, arrange_doses, arrange_events, events_at, lay_out
from flowme.occasions import Occasions, arrange_occasions
from flowme.rows import Rows, read_rows
from flowme.table import Columns, StudyError, StudyWarning, find_columns, read_csv, write_column

__all__ = ["Doses", "Events", "Occasions", "Study", "StudyError", "StudyWarning", "Subjects"]

Array = Any  # a NumPy array on the host, a tracer under jit


class Subjects(NamedTuple):
    """The subjects of a study: how many there are (`size`), and their identifiers (`ids`)."""

    size: int
    ids: tuple[Any, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Labels:
    """What a study knows beyond numbers: names, and the table that it came from."""

    ids: tuple[Any, ...]
    frame: pd.DataFrame
    columns: Columns
    units: dict[str, str]
    rows: np.ndarray  # [subject, time] position in `frame`; padding repeats the last
    dose_rows: np.ndarray  # [subject, dose] likewise
    written: np.ndarray  # [subject, dose] where a dose is written in its row: no additional one
    measured: dict[str, np.ndarray]  # outcome -> [subject, time], as in `frame`
    levels: dict[str, tuple[Any, ...]]  # of categorical covariates
    filled: dict[str, np.ndarray]  # covariate -> [subject, time], where its cell is empty
    linear: tuple[str, ...]  # covariates that are linear between records

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
            written=self.written[subjects],
            measured={name: mask[subjects] for name, mask in self.measured.items()},
            filled={name: mask[subjects] for name, mask in self.filled.items()},
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
            below `values`, -1 for one above; only for outcomes of which some are censored.
        limit: Outcome -> [subject, time], the other end of the interval in which a censored
            measurement lies: [limit, value] for 1, [value, limit] for -1; NaN where there is
            none; only for outcomes that have limits.
        covariates: Name -> [subject], or [subject, time] if changing in time (padded by the last);
            of a categorical one the codes 0, 1, ... of its `levels`.
        occasions: Name -> `Occasions`, from coarse to fine.
        doses: The doses, [subject, dose].
        events: Records, doses and ends of infusions as one sequence, [subject, event].
        compartments: The dosed compartments, counted from 1: the last axis of `events.jump`.
    """

    time: Array
    recorded: Array
    values: dict[str, Array]
    observed: dict[str, Array]
    censored: dict[str, Array]
    limit: dict[str, Array]
    covariates: dict[str, Array]
    occasions: dict[str, Occasions]
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
        time_varying: str | Iterable[str] | Mapping[str, str] = (),
        categorical: str | Iterable[str] | Mapping[str, Iterable[Any] | None] = (),
        missing_covariates: Mapping[str, Any] | None = None,
        amount: str | None = None,
        event: str | None = None,
        missing: str | None = None,
        compartment: str | None = None,
        rate: str | None = None,
        duration: str | None = None,
        additional: str | None = None,
        interval: str | None = None,
        steady_state: str | None = None,
        censored: str | Mapping[str, str] | None = None,
        limit: str | Mapping[str, str] | None = None,
        outcome_type: str | None = None,
        occasions: str | Sequence[str] | None = None,
        keep_unobserved: bool = False,
        units: Mapping[str, str] | None = None,
    ) -> "Study":
        """Reads a table with one row per measurement or dose.

        An argument left out is found by its NONMEM name (upper case) if the table has it: ID,
        TIME, DV, AMT, EVID, MDV, CMT, RATE, DUR, ADDL, II, SS, CENS, LIMIT,
        DVID, OCC.

        Args:
            frame: The table. It is not changed.
            subject: Column that identifies the subject: numbers or text.
            time: Column of times.
            outcome: Column of measurements; `{"conc": "DV"}` to give it another name; or several
                columns, where an empty cell means "not measured in this row".
            covariates: Columns that are constant within a subject.
            time_varying: Columns of covariates that may change in time. Between two records a
                covariate keeps the value of the earlier one; with `{"WT": "linear"}` in place of
                `{"WT": "carried"}` it runs linearly from one to the other. Before the first
                record and after the last it has their values. (Only `Study.at` looks between
                records.)
            categorical: Covariates that have levels instead of numbers: columns of text, or of
                numbers that only name something. `{"SEX": ["F", "M"]}` gives the levels in order,
                and any other is refused; `"SEX"` or `{"SEX": None}` takes those that occur,
                sorted. A column of pandas' dtype "category" is categorical unasked, its levels in
                the order of its categories. A name that is not in `time_varying` is constant
                within a subject.
            missing_covariates: What stands in for empty cells of a covariate, which are refused
                without it: a number or level, `{"WT": 70.0}`; `"median"` over subjects (of the
                median of each one's values); or `"carried"`, the last value of the same subject,
                and its first one before that. Of a covariate that is constant within a subject, a
                value in any of the subject's rows comes first.
            amount: Column of dose amounts.
            event: Column saying what a row is: 0 a measurement, 1 a dose, 2 neither, 3 a reset, 4 a
                reset and a dose. Without it, a row with a positive amount is a dose and every
                other row a measurement. A reset returns the system to its initial state; it ends
                infusions and cancels doses still to come (delayed by a lag, or additional).
            missing: Column that is 1 where the row holds no measurement, whatever is written.
            compartment: Column of the compartment dosed, from 1. Without it all doses enter 1.
            rate: Column of infusion rates; an infusion lasts amount / rate, a bolus has rate 0.
            duration: Column of the durations of infusions instead, 0 for a bolus.
            additional: Column of the number of doses that follow this one, each after `interval`.
                They act before the rows of their time.
            interval: Column of the time between doses.
            steady_state: Column that is 1 where a dose has been repeated after `interval` for so
                long that the state no longer changes from one to the next. It replaces all that
                was given before, as a reset does.
            censored: Column of -1, 0, 1 (see `Study.censored`); or outcome -> column.
            limit: Column of the other ends of the intervals of censored measurements (see
                `Study.limit`), as in Monolix; or outcome -> column.
            outcome_type: Column that says which outcome a row measures; outcomes are then named
                by its levels.
            occasions: Column that says to which occasion a row belongs, by any names that differ;
                or several, from coarse to fine, each nested in those before it. An occasion does
                not come back once another has begun.
            keep_unobserved: Whether to keep subjects without any measurement; else refused.
            units: Units by name of outcome or covariate, "time" and "amount".

        Returns:
            The study.

        Raises:
            StudyError: With everything that is wrong, each finding with its row and subject. A
                dose is refused that lies before the first row of its subject and stands below it:
                most often the time is wrong.

        Warns:
            StudyWarning: If rows had to be sorted by time, or those of a subject gathered; and
                what was filled in for empty cells of covariates, and of whom.
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
            "duration": duration,
            "additional": additional,
            "interval": interval,
            "steady_state": steady_state,
            "censored": censored,
            "limit": limit,
            "outcome_type": outcome_type,
            "occasions": occasions,
        }
        units = dict(units or {})
        names, stated = state(covariates, time_varying, categorical, missing_covariates)
        columns = find_columns(frame, named, names, tuple(stated.between))
        rows = read_rows(frame, columns, stated, units, keep_unobserved)
        linear = tuple(name for name, rule in stated.between.items() if rule == "linear")
        return _arrange(rows, frame.copy(), units, linear)

    @classmethod
    def from_csv(cls, path: str | Path, *args: Any, **kwargs: Any) -> "Study":
        """Reads a comma-separated file: `Study.from_frame`, with line numbers in its findings.

        Args:
            path: The file, with a header. Empty cells and NONMEM's "." are missing values;
                identifiers such as 007 stay as they are written.
            *args: As in `Study.from_frame`, after `frame`.
            **kwargs: Likewise.

        Returns:
            The study. The index of its table, see `to_frame`, is the line in the file.

        Raises:
            StudyError: As `Study.from_frame`, and for a line with too many or too few cells.
        """
        subject = args[0] if args else kwargs.get("subject")
        return cls.from_frame(read_csv(path, subject or "ID"), *args, **kwargs)

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
    def levels(self) -> dict[str, tuple[Any, ...]]:
        """Levels of the categorical covariates by name: that of code 0, of code 1, ... A program
        compiled for one study serves others of its shape, so it must not depend on them."""
        return dict(self.labels.levels)

    @property
    def units(self) -> dict[str, str]:
        """Units by name, as given."""
        return dict(self.labels.units)

    def to_frame(self) -> pd.DataFrame:
        """The table again: same columns, dtypes, row order and index, with the study's numbers.

        Times, measurements, doses and covariates come from the arrays, so that changed values
        show; identifiers and unused columns are as they were. A cell that is no longer observed
        becomes NaN; one of a covariate that was empty stays so.
        """
        frame = self.labels.frame.copy()
        columns, rows, recorded = self.labels.columns, self.labels.rows, np.asarray(self.recorded)
        write_column(frame, columns.time, rows[recorded], np.asarray(self.time)[recorded])
        for name, column in columns.outcome.items():
            observed = np.asarray(self.observed[name])
            values = np.asarray(self.values.get(name, np.nan))
            cells = observed | self.labels.measured[name]
            write_column(frame, column, rows[cells], np.where(observed, values, np.nan)[cells])
            for role in ("censored", "limit"):
                if name in getattr(self, role):
                    cells = np.asarray(getattr(self, role)[name])[observed]
                    write_column(frame, getattr(columns, role)[name], rows[observed], cells)
        for name, covariate in self.covariates.items():
            covariate = np.asarray(covariate)
            covariate = covariate[:, None] if covariate.ndim == 1 else covariate
            read = recorded & ~self.labels.filled.get(name, np.zeros_like(recorded))
            cells = np.broadcast_to(covariate, recorded.shape)[read]
            if name in self.levels:
                write_levels(frame, name, rows[read], self.levels[name], cells)
            else:
                write_column(frame, name, rows[read], cells)
        for role in ("amount", "rate", "duration", "compartment"):
            named, dose = getattr(columns, role), np.asarray(getattr(self.doses, role))
            if named is not None:
                written = self.labels.written
                write_column(frame, named, self.labels.dose_rows[written], dose[written])
        return frame

    def row_of_dose(self, compartment: int) -> str:
        """Where the table first gives a dose into a compartment, in words, for messages."""
        labels, column = self.labels, self.labels.columns.compartment
        for subject, dose in np.argwhere(labels.written) if column is not None else ():
            row = labels.dose_rows[subject, dose]
            if labels.frame[column].iloc[row] == compartment:
                return f" ({self._row_name(row)}, subject {self.ids[subject]!r})"
        return ""

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

    def at(self, times: Array) -> "Study":
        """The same subjects at other times, with nothing measured: for predictions on a grid.

        Doses and constant covariates stay. A covariate that changes in time is carried forward
        from the last record or, where so stated (`time_varying={"WT": "linear"}`), linear between
        two; before the first record it is that record's, after the last likewise. An occasion is
        carried forward. Every outcome is to be sampled at every time. A record at the time of a
        dose sees the state after it. An ODE starts where it did, at a subject's first record, or
        at the first of `times` if earlier.

        Args:
            times: The new times, increasing: [time], the same for all, or [subject, time].

        Returns:
            The study. Its table (`to_frame`) has a row for each subject and time, and no doses.

        Raises:
            ValueError: If `times` has another shape, is empty, not finite or not increasing.
        """
        time = self._checked(times)
        last = np.maximum((self.time[:, None, :] <= time[:, :, None]).sum(-1) - 1, 0)
        blank = replace(
            self,
            time=time,
            recorded=np.ones(time.shape, bool),
            values={},
            observed={name: np.ones(time.shape, bool) for name in self.outcomes},
            censored={},
            limit={},
            covariates={
                name: self._between(name, time, last) if value.ndim == 2 else value
                for name, value in self.covariates.items()
            },
            occasions={
                name: value._replace(index=np.take_along_axis(value.index, last, 1))
                for name, value in self.occasions.items()
            },
            events=events_at(time, self.time[:, 0], self.doses, self.compartments),
        )
        return replace(blank, labels=_dense_labels(blank))

    def _between(self, name: str, time: np.ndarray, last: np.ndarray) -> np.ndarray:
        """A covariate that changes in time at other times, `last` being the record before each."""
        value = self.covariates[name]
        before = np.take_along_axis(value, last, 1)
        if name not in self.labels.linear:
            return before
        after = np.minimum(last + 1, value.shape[1] - 1)
        start, end = (np.take_along_axis(self.time, where, 1) for where in (last, after))
        share = np.clip(time - start, 0, None) / np.where(end > start, end - start, np.inf)
        return before + share * (np.take_along_axis(value, after, 1) - before)

    def with_levels(self, levels: Mapping[str, Sequence[Any]]) -> "Study":
        """The study with its categorical covariates coded by other levels.

        What a fit predicts for another study it reads in the levels of its own
        (`study.with_levels(fit.study.levels)`): the same name is then the same code, whichever
        levels occur and in whatever order.

        Args:
            levels: Name -> levels, in the order of their codes; of covariates that the study has.

        Returns:
            The study with these codes.

        Raises:
            ValueError: If a subject has a level that is not among them, or if a covariate is not
                categorical here.
        """
        labels, covariates = self.labels, dict(self.covariates)
        for name in [name for name in levels if name in covariates]:
            known = tuple(levels[name])
            if name not in labels.levels:
                raise ValueError(
                    f"expected {name!r} to be categorical, with levels {list(known)}; got numbers. "
                    f"Read it with categorical={{{name!r}: {list(known)}}}."
                )
            place = {level: code for code, level in enumerate(known)}
            codes = np.array([place.get(level, -1) for level in labels.levels[name]], np.int32)
            recoded = codes[covariates[name]]
            if (recoded < 0).any():
                self._refuse_level(name, np.argwhere(recoded < 0)[0], known)
            covariates[name] = recoded
        kept = {n: tuple(levels.get(n, own)) for n, own in labels.levels.items()}
        return replace(self, covariates=covariates, labels=replace(labels, levels=kept))

    def _refuse_level(self, name: str, where: np.ndarray, known: tuple[Any, ...]) -> None:
        subject, record = where[0], where[1] if len(where) > 1 else 0
        code = self.covariates[name][tuple(where)]
        row = self._row_name(self.labels.rows[subject, record])
        raise ValueError(
            f"{row}, subject {self.ids[subject]!r}: expected a level of {name!r} that the model "
            f"was fitted with, one of {list(known)}; got {self.labels.levels[name][code]!r}."
        )

    def _row_name(self, row: int) -> str:
        word = self.labels.frame.index.name
        return f"{word if isinstance(word, str) else 'row'} {self.labels.frame.index[row]!r}"

    def _checked(self, times: Array) -> np.ndarray:
        time = np.asarray(times, np.float64)
        subjects = self.time.shape[0]
        if time.size == 0 or not (time.ndim == 1 or (time.ndim == 2 and len(time) == subjects)):
            raise ValueError(
                f"expected times of shape [time], or [subject, time] with {subjects} subjects; "
                f"got {time.shape}."
            )
        if not np.isfinite(time).all() or (np.diff(time) <= 0).any():
            raise ValueError(f"expected times that are finite and increase; got {times}.")
        return np.broadcast_to(time, (subjects, time.shape[-1])).copy()

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

        def told(name: str) -> str:
            levels = self.levels.get(name)
            return f"{name} ({', '.join(map(str, levels))})" if levels else named(name)

        times = self.time[self.recorded]
        unit = f" {self.units['time']}" if "time" in self.units else ""
        parts = [
            f"Study of {self.subjects.size} subjects, {self.recorded.sum()} records",
            f"time {times.min():g} to {times.max():g}{unit}",
            "observed: " + ", ".join(map(counted, self.observed)),
            f"{np.count_nonzero(self.doses.amount)} doses"
            if self.doses.amount.any()
            else "no doses",
        ]
        if self.covariates:
            parts.append("covariates: " + ", ".join(map(told, self.covariates)))
        for name, value in self.occasions.items():
            parts.append(f"up to {value.most} occasions ({name})")
        return "; ".join(parts) + "."


_leaves = [name for name in Study.__dataclass_fields__ if name not in ("compartments", "labels")]
jax.tree_util.register_dataclass(Study, _leaves, ["compartments", "labels"])


def _as_indices(indices: Any) -> Any:
    return indices if hasattr(indices, "dtype") or np.isscalar(indices) else list(indices)


def _arrange(
    table: Rows, frame: pd.DataFrame, units: dict[str, str], linear: tuple[str, ...]
) -> Study:
    """Pads the rows of each subject to arrays [subject, time]."""
    line, outcomes, columns = table.line, table.outcomes, table.columns
    order = line.order()
    order = order[order < len(frame)]  # the items that are rows
    rows, recorded = lay_out(order, line.subject[order], len(table.ids))
    observed = {name: mask[rows] & recorded for name, mask in outcomes.observed.items()}
    doses, items = arrange_doses(line, rows)
    compartments = tuple(np.unique(line.compartment[line.amount > 0]).tolist())
    return Study(
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
        labels=_Labels(
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


def _dense_labels(study: Study) -> _Labels:
    """Labels with a table of its own: a row for each record, its numbers left to `to_frame`."""
    old, shape = study.labels, study.time.shape
    columns = Columns(
        subject=old.columns.subject,
        time=old.columns.time,
        outcome={name: name for name in study.outcomes},
        covariates=tuple(name for name, value in study.covariates.items() if value.ndim == 1),
        time_varying=tuple(name for name, value in study.covariates.items() if value.ndim == 2),
        censored={},
        limit={},
    )
    who = old.frame[columns.subject].iloc[old.rows[:, 0].repeat(shape[1])]
    frame = who.reset_index(drop=True).to_frame()
    for name in (columns.time, *study.outcomes, *study.covariates):
        frame[name] = np.nan
    rows = np.arange(study.time.size).reshape(shape)
    no_rows = np.broadcast_to(rows[:, :1], study.doses.time.shape)  # doses stand in no row
    written = np.zeros(no_rows.shape, bool)
    return replace(
        old,
        frame=frame,
        columns=columns,
        rows=rows,
        dose_rows=no_rows,
        written=written,
        measured=dict(study.observed),
        filled={},
    )
