"""A longitudinal study as a JAX pytree, read from a table and written back to it without loss."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from flowme.arrange import arrange
from flowme.columns import find_columns
from flowme.covariate_table import state
from flowme.description import describe
from flowme.events import Doses, Events
from flowme.labels import Labels, Subjects
from flowme.levels import recode
from flowme.occasions import Occasions
from flowme.other_times import at_times
from flowme.rows import read_rows
from flowme.selection import positions
from flowme.table import StudyError, StudyWarning, read_csv
from flowme.writing import write_frame

__all__ = ["Doses", "Events", "Occasions", "Study", "StudyError", "StudyWarning", "Subjects"]

Array = Any  # a NumPy array on the host, a tracer under jit


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
    labels: Labels = field(repr=False)

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
        replicates: bool = False,
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
            replicates: Whether an outcome may have been measured several times at one time (in as
                many rows); else refused, as it is most often a mistake.
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
        if units is not None and not isinstance(units, Mapping):
            raise StudyError([f"expected units={{'time': 'h'}}; got {units!r}"])
        units = dict(units or {})
        names, stated = state(covariates, time_varying, categorical, missing_covariates)
        columns = find_columns(frame, named, names, tuple(stated.between))
        rows = read_rows(frame, columns, stated, units, keep_unobserved, replicates)
        linear = tuple(name for name, rule in stated.between.items() if rule == "linear")
        return cls(**arrange(rows, frame.copy(), units, linear))

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
        return write_frame(self)

    def row_of_dose(self, compartment: int) -> str:
        """Where the table first gives a dose into a compartment, in words, for messages."""
        return self.labels.row_of_dose(compartment)

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
        chosen = positions(self.ids, indices, ids)
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
        return at_times(self, times)

    def with_levels(self, levels: Mapping[str, Iterable[Any]]) -> "Study":
        """The study with its categorical covariates coded by other levels.

        What a fit predicts for another study it reads in the levels of its own: the same name is
        then the same code, whichever levels occur and in whatever order.

        Args:
            levels: Name -> levels, in the order of their codes; of covariates that the study has.

        Returns:
            The study with these codes.

        Raises:
            ValueError: If a subject has a level that is not among them; if a covariate is unknown
                or not categorical here; or if the levels are not different, or one is empty.
        """
        return recode(self, levels)

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

    def __repr__(self) -> str:
        return describe(self)


_leaves = [name for name in Study.__dataclass_fields__ if name not in ("compartments", "labels")]
jax.tree_util.register_dataclass(Study, _leaves, ["compartments", "labels"])
