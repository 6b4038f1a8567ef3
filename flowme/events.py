"""Doses, and the one sequence of records and doses that an ODE solver walks through."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["Doses", "Events", "Timeline", "arrange_doses", "arrange_events", "events_at", "lay_out"]

Array = Any  # a NumPy array on the host, a tracer under jit


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

    Sorted by (time, row of the table). The end of an infusion that lies after the last record of
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


for _cls in (Doses, Events):
    jax.tree_util.register_dataclass(_cls, list(_cls.__dataclass_fields__), [])


class Timeline(NamedTuple):
    """What happens to whom and when, [row]. Rows of one time act in the order of the list."""

    subject: np.ndarray  # position among the subjects
    time: np.ndarray
    dose: np.ndarray  # True where something is given; amount, rate and compartment tell what
    amount: np.ndarray
    rate: np.ndarray
    compartment: np.ndarray

    def order(self) -> np.ndarray:
        """The rows sorted by (subject, time, place in the list)."""
        return np.lexsort((self.time, self.subject))


def lay_out(items: np.ndarray, code: np.ndarray, subjects: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays out items of a list, sorted by their subject `code`, as [subject, slot].

    Returns:
        The item in each slot, padded by the subject's last; and where a slot is filled.
    """
    counts = np.bincount(code, minlength=subjects)[:, None]
    slot = np.arange(counts.max(initial=0))[None]
    last = np.cumsum(counts)[:, None] - 1
    return items[np.minimum(last - counts + 1 + slot, last)], slot < counts


def arrange_doses(line: Timeline, records: np.ndarray) -> tuple[Doses, np.ndarray]:
    """The doses, and the row of each, [subject, dose]; `records` are rows, [subject, time]."""
    order = line.order()
    dosed = order[line.dose[order]]
    rows, given = lay_out(dosed, line.subject[dosed], records.shape[0])
    rows = np.where(given, rows, records[:, -1:])  # a padded dose comes with the last record
    doses = Doses(
        time=line.time[rows],
        amount=np.where(given, line.amount[rows], 0.0),
        rate=np.where(given, line.rate[rows], 0.0),
        compartment=np.where(given, line.compartment[rows], 1).astype(np.int32),
        given=given,
    )
    return doses, rows


def arrange_events(line: Timeline, records: np.ndarray, compartments: tuple[int, ...]) -> Events:
    """Rows and ends of infusions in one sequence; `records` are rows, [subject, time]."""
    infused = np.flatnonzero(line.dose & (line.rate > 0))
    ends = line.time[infused] + line.amount[infused] / line.rate[infused]
    # An infusion too short for the clock (end == time) is a bolus.
    lasting = ends > line.time[infused]
    infused, ends = infused[lasting], ends[lasting]
    kept = ends <= line.time[records[line.subject[infused], -1]]
    # The list of events: all rows in order, then the ends of infusions, which come before rows
    # of the same time.
    order = line.order()
    code = np.concatenate([line.subject[order], line.subject[infused[kept]]])
    time = np.concatenate([line.time[order], ends[kept]])
    rank = np.concatenate([np.arange(order.size), np.full(kept.sum(), -1)])
    sequence = np.lexsort((rank, time, code))
    items, filled = lay_out(sequence, code[sequence], records.shape[0])
    slot = np.empty(code.size, np.int32)  # where in its subject's sequence an event stands
    slot[items[filled]] = np.nonzero(filled)[1]
    row_slot = np.empty(order.size, np.int32)
    row_slot[order] = slot[: order.size]
    end_slot = np.full(infused.size, items.shape[1])
    end_slot[kept] = slot[order.size :]

    jump = np.zeros((*items.shape, len(compartments)))
    inflow = np.zeros_like(jump)
    bolus = np.setdiff1d(np.flatnonzero(line.dose), infused)
    axis = np.searchsorted(compartments, line.compartment)
    jump[line.subject[bolus], row_slot[bolus], axis[bolus]] = line.amount[bolus]
    for row, end in zip(infused, end_slot, strict=True):
        # Added over the slots in force, not added and taken away again: the rate returns to
        # zero exactly.
        inflow[line.subject[row], row_slot[row] : end, axis[row]] += line.rate[row]
    return Events(time[items], jump, inflow, row_slot[records])


def events_at(
    time: np.ndarray, start: np.ndarray, doses: Doses, compartments: tuple[int, ...]
) -> Events:
    """Events of records at `time` [subject, time], after an initial state at `start` [subject]."""
    given = doses.given & (doses.time <= time[:, -1:])  # a later dose changes no record
    # The list: where an initial state holds, the doses, and the records, which therefore see a
    # dose of their own time.
    subjects = np.arange(len(time))
    size = subjects.size + given.sum() + time.size
    dose = slice(subjects.size, size - time.size)
    line = Timeline(
        subject=np.concatenate([subjects, given.nonzero()[0], subjects.repeat(time.shape[1])]),
        time=np.concatenate([start, doses.time[given], time.ravel()]),
        dose=np.zeros(size, bool),
        amount=np.zeros(size),
        rate=np.zeros(size),
        compartment=np.ones(size, np.int32),
    )
    line.dose[dose] = True
    for name in ("amount", "rate", "compartment"):
        getattr(line, name)[dose] = getattr(doses, name)[given]
    records = np.arange(dose.stop, size).reshape(time.shape)
    return arrange_events(line, records, compartments)
