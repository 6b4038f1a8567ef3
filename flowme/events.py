"""Doses, and the one sequence of records and doses that an ODE solver walks through."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["Doses", "Events", "Timeline", "arrange_doses", "arrange_events", "events_at", "lay_out"]

Array = Any  # a NumPy array on the host, a tracer under jit


@dataclass(frozen=True, eq=False)
class Doses:
    """Doses and resets, [subject, dose]; the last axis is padded, and of length 0 without any.

    Additional doses (ADDL) stand here as doses of their own. The last three arrays are positions
    along the axis `dose`, -1 where padded; their length 0 says, also under jit, that the study
    has no infusion, no reset or no steady state.

    Attributes:
        time: When the dose is given or its infusion begins; padded by the subject's last time.
        amount: Amount of the dose; 0 where padded, and for a reset without dose (EVID 3).
        rate: Amount per time of an infusion whose rate is known; else 0.
        duration: Duration of an infusion whose duration is known instead; else 0.
        interval: Time between the doses of a steady state (SS = 1), which this dose continues;
            else 0.
        compartment: The compartment that receives it, counted from 1 as in NONMEM.
        given: True for a dose or reset, False for padding.
        infusions: [subject, infusion], which doses are infusions.
        resets: [subject, reset], which undo all that was given before: EVID 3 and 4, and SS = 1.
        steady: [subject, steady], which begin at steady state.
    """

    time: Array
    amount: Array
    rate: Array
    duration: Array
    interval: Array
    compartment: Array
    given: Array
    infusions: Array
    resets: Array
    steady: Array


@dataclass(frozen=True, eq=False)
class Events:
    """Records, doses and ends of infusions in one sequence, as an ODE solver walks through it.

    Sorted by (time, row of the table); an additional dose comes before the rows of its time. What
    lies after the last record of its subject changes no record and is left out.

    Attributes:
        time: [subject, event], padded by the subject's last event.
        jump: [subject, event, compartment], amount added to each dosed compartment at the event.
        inflow: [subject, event, compartment], rate of infusion in force *after* the event.
        reset: [subject, event], 0 for none; 1 where the system returns to its initial state, and
            2 + s where it goes to the steady state of dose `Doses.steady[s]`, before the jump.
        record: [subject, time], the event that each record is. Its state is the one after the
            event: a record that stands before a dose of the same time does not see that dose.
        dose: [subject, dose], the first record that sees the dose (a position along the axis
            `time`) unless the dose is delayed by a lag.
    """

    time: Array
    jump: Array
    inflow: Array
    reset: Array
    record: Array
    dose: Array


for _cls in (Doses, Events):
    jax.tree_util.register_dataclass(_cls, list(_cls.__dataclass_fields__), [])


class Timeline(NamedTuple):
    """What happens to whom and when, [item]. Items of one time act in the order of `place`."""

    subject: np.ndarray  # position among the subjects
    time: np.ndarray
    place: np.ndarray
    dose: np.ndarray  # True where something is given or reset; the following tell what
    reset: np.ndarray
    amount: np.ndarray
    rate: np.ndarray
    duration: np.ndarray
    interval: np.ndarray
    compartment: np.ndarray

    def order(self) -> np.ndarray:
        """The items sorted by (subject, time, place)."""
        return np.lexsort((self.place, self.time, self.subject))

    def length(self) -> np.ndarray:
        """How long each item is infused, 0 for a bolus."""
        return np.where(
            self.rate > 0, self.amount / np.where(self.rate > 0, self.rate, 1.0), 0.0
        ) + (self.duration)


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
    """The doses, and the item of each, [subject, dose]; `records` are items, [subject, time]."""
    order = line.order()
    dosed = order[line.dose[order]]
    items, given = lay_out(dosed, line.subject[dosed], records.shape[0])
    items = np.where(given, items, records[:, -1:])  # a padded dose comes with the last record

    def laid(values: np.ndarray) -> np.ndarray:
        return np.where(given, values[items], 0.0)

    doses = Doses(
        time=line.time[items],
        amount=laid(line.amount),
        rate=laid(line.rate),
        duration=laid(line.duration),
        interval=laid(line.interval),
        compartment=np.where(given, line.compartment[items], 1).astype(np.int32),
        given=given,
        infusions=_positions(laid(line.length()) > 0),
        resets=_positions(laid(line.reset) > 0),
        steady=_positions(laid(line.interval) > 0),
    )
    return doses, items


def _positions(mask: np.ndarray) -> np.ndarray:
    """Where each row of a mask is True: [row, position], padded by -1."""
    counts = mask.sum(axis=1, keepdims=True)
    first = np.argsort(~mask, axis=1, kind="stable")[:, : counts.max(initial=0)]
    return np.where(np.arange(first.shape[1]) < counts, first, -1).astype(np.int32)


def arrange_events(
    line: Timeline,
    records: np.ndarray,
    doses: tuple[np.ndarray, np.ndarray],
    compartments: tuple[int, ...],
) -> Events:
    """Items and ends of infusions in one sequence.

    Args:
        line: The items.
        records: Items that are records, [subject, time].
        doses: Items that are doses, [subject, dose], and where there is one.
        compartments: The dosed compartments.
    """
    last = line.time[records[:, -1]]
    order = line.order()
    order = order[line.time[order] <= last[line.subject[order]]]
    infused = order[(line.dose & (line.length() > 0))[order]]
    ends = line.time[infused] + line.length()[infused]
    # An infusion too short for the clock (end == time) is a bolus.
    lasting = ends > line.time[infused]
    infused, ends = infused[lasting], ends[lasting]
    kept = ends <= last[line.subject[infused]]
    # The list of events: all items in order, then the ends of infusions, which come before items
    # of the same time.
    code = np.concatenate([line.subject[order], line.subject[infused[kept]]])
    time = np.concatenate([line.time[order], ends[kept]])
    rank = np.concatenate([np.arange(order.size), np.full(kept.sum(), -1)])
    sequence = np.lexsort((rank, time, code))
    items, filled = lay_out(sequence, code[sequence], records.shape[0])
    slot = np.empty(code.size, np.int32)  # where in its subject's sequence an event stands
    slot[items[filled]] = np.nonzero(filled)[1]
    at = np.full(line.time.size, items.shape[1], np.int32)  # the slot of an item
    at[order] = slot[: order.size]
    end = np.full(infused.size, items.shape[1])
    end[kept] = slot[order.size :]

    reset = np.zeros(items.shape, np.int32)
    again = order[line.reset[order]]
    reset[line.subject[again], at[again]] = _targets(line, again)
    period = (reset > 0).cumsum(axis=1)  # nothing given in one period is felt in the next
    jump = np.zeros((*items.shape, len(compartments)))
    inflow = np.zeros_like(jump)
    bolus = np.setdiff1d(order[line.amount[order] > 0], infused)
    axis = np.searchsorted(compartments, line.compartment)
    # Two additional doses may be one event, so they are added up.
    np.add.at(jump, (line.subject[bolus], at[bolus], axis[bolus]), line.amount[bolus])
    for item, begin, stop in zip(infused, at[infused], end, strict=True):
        # Added over the slots in force, not added and taken away again: the rate returns to
        # zero exactly.
        who, length = line.subject[item], line.length()[item]
        felt = period[who, begin:stop] == period[who, begin]
        inflow[who, begin:stop, axis[item]] += line.amount[item] / length * felt
    return Events(time[items], jump, inflow, reset, at[records], _first(line, records, *doses))


def _targets(line: Timeline, resets: np.ndarray) -> np.ndarray:
    """Where each reset leads, see `Events.reset`; `resets` are items sorted by subject."""
    steady = line.interval[resets] > 0
    count = steady.cumsum() - steady
    begins = np.searchsorted(line.subject[resets], line.subject[resets])
    return np.where(steady, 2 + count - count[begins], 1)


def _first(line: Timeline, records: np.ndarray, doses: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The first record that sees each dose, [subject, dose]; past the last for padding."""
    rank = np.empty(line.time.size, np.int64)
    rank[line.order()] = np.arange(line.time.size)
    before = (rank[records][:, None, :] < rank[doses][:, :, None]).sum(axis=-1)
    return np.where(given, before, records.shape[1]).astype(np.int32)


def events_at(
    time: np.ndarray, start: np.ndarray, doses: Doses, compartments: tuple[int, ...]
) -> Events:
    """Events of records at `time` [subject, time], after an initial state at `start` [subject]."""
    # The list: where an initial state holds, the doses, and the records, which therefore see a
    # dose of their own time.
    subjects, given = np.arange(len(time)), doses.given
    size = subjects.size + given.sum() + time.size
    dose = np.zeros(size, bool)
    dose[subjects.size : size - time.size] = True

    def listed(values: np.ndarray) -> np.ndarray:
        cells = np.zeros(size, values.dtype)
        cells[dose] = values[given]
        return cells

    line = Timeline(
        subject=np.concatenate([subjects, given.nonzero()[0], subjects.repeat(time.shape[1])]),
        time=np.concatenate([start, doses.time[given], time.ravel()]),
        place=np.arange(size),
        dose=dose,
        reset=listed((doses.resets[:, :, None] == np.arange(given.shape[1])).any(axis=1)),
        amount=listed(doses.amount),
        rate=listed(doses.rate),
        duration=listed(doses.duration),
        interval=listed(doses.interval),
        compartment=listed(doses.compartment),
    )
    records = np.arange(size - time.size, size).reshape(time.shape)
    items = np.zeros(given.shape, int)
    items[given] = np.flatnonzero(dose)
    return arrange_events(line, records, (items, given), compartments)
