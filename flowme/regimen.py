"""The doses of a table: what its columns say about each, and repeated doses written out."""

from typing import NamedTuple

import numpy as np

from flowme.columns import Columns
from flowme.events import Timeline
from flowme.table import Table

__all__ = ["Regimen", "read_regimen", "write_out"]


class Regimen(NamedTuple):
    """What the rows of a table give and undo, [row]."""

    dose: np.ndarray  # EVID 1 and 4
    reset: np.ndarray  # EVID 3 and 4, and SS 1
    amount: np.ndarray
    rate: np.ndarray
    duration: np.ndarray
    interval: np.ndarray  # II
    additional: np.ndarray  # ADDL
    steady: np.ndarray  # SS 1
    compartment: np.ndarray


def read_regimen(table: Table, columns: Columns, event: np.ndarray | None) -> Regimen:
    """Reads the doses; what cannot be is a finding. `event` is EVID, if the table has it."""
    amount = np.zeros(len(table.frame))
    if columns.amount is not None:
        needed = False if event is None else np.isin(event, (1, 4))
        amount = np.nan_to_num(table.numbers(columns.amount, needed, " on a dose row"))
        table.refuse(amount < 0, "an amount of 0 or more", amount)
    dose = amount > 0 if event is None else np.isin(event, (1, 4))
    if event is not None:
        stray = (amount > 0) & np.isin(event, (0, 2, 3))
        table.refuse(stray, f"{columns.event} 1 on a row with an amount", event)
        if columns.amount is None:
            expected = f"an amount for a dose ({columns.event} 1)"
            for row in np.flatnonzero(dose).tolist():
                table.found(row, expected, "no column. Name it: amount=...")
    rate, duration = _read_infusions(table, columns, dose, amount)
    additional, interval, steady = _read_repeats(table, columns, dose)
    length = np.where(rate > 0, amount / np.where(rate > 0, rate, 1), duration)
    table.refuse(
        steady & (interval > 0) & (length > interval),
        "an infusion at steady state that ends before the next begins",
        length,
        f" for its duration. Write several doses into rows, or a longer {columns.interval}",
    )
    return Regimen(
        dose=dose,
        reset=steady if event is None else steady | np.isin(event, (3, 4)),
        amount=np.where(dose, amount, 0.0),
        rate=rate,
        duration=duration,
        interval=interval,
        additional=additional,
        steady=steady,
        compartment=_read_compartment(table, columns, dose),
    )


def _read_infusions(
    table: Table, columns: Columns, dose: np.ndarray, amount: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rate of each row, and its duration: one of them is 0, and both are for a bolus."""
    read = {}
    for word, name in (("rate", columns.rate), ("duration", columns.duration)):
        values = np.zeros(dose.shape)
        if name is not None:
            values = np.nan_to_num(table.numbers(name))
            advice = (
                ": a rate or duration that is estimated is not supported yet. Give the duration "
                "in a column duration=... (DUR), or write the input into the right-hand side"
            )
            table.refuse(values < 0, f"a {word} of 0 (bolus) or more", values, advice)
            stray = (values > 0) & ~dose
            advice = ". A dose has an amount above 0, or EVID 1"
            table.refuse(stray, f"a {word} on dose rows only", values, advice)
            empty = (values > 0) & dose & (amount == 0)
            advice = f" with {name} above 0. An infusion needs the amount that it delivers"
            table.refuse(empty, f"an amount above 0 with a {word}", amount, advice)
        read[word] = np.maximum(values, 0)
    rate, duration = read["rate"], read["duration"]
    both = (rate > 0) & (duration > 0)
    table.refuse(both, "a rate or a duration, not both", duration, f" in {columns.duration}")
    return rate, duration


def _read_repeats(
    table: Table, columns: Columns, dose: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Additional doses, their interval, and whether there is a steady state."""
    zero = np.zeros(dose.shape)

    def numbers(name: str | None) -> np.ndarray:
        if name is None:
            return zero
        values = np.nan_to_num(table.numbers(name))
        table.refuse((values != 0) & ~dose, f"{name} on dose rows only", values)
        return np.where(dose, values, 0.0)

    additional, interval = numbers(columns.additional), numbers(columns.interval)
    steady = numbers(columns.steady_state)
    broken = (additional < 0) | (additional % 1 != 0)
    table.refuse(broken, f"a whole number of additional doses in {columns.additional}", additional)
    table.refuse(interval < 0, f"an interval of 0 or more in {columns.interval}", interval)
    advice = ". Steady states add up only in linear models: write such doses into rows"
    unknown = ~np.isin(steady, (0, 1))
    table.refuse(unknown, f"{columns.steady_state} in {{0, 1}}", steady, advice)
    named = columns.interval or "II (interval=...)"
    for name, on in ((columns.additional, additional > 0), (columns.steady_state, steady == 1)):
        lacking = on & (interval == 0)
        table.refuse(lacking, f"the time between doses in {named} with {name}", interval)
    alone = (interval > 0) & (additional == 0) & (steady == 0)
    wanted = f"{columns.additional or 'ADDL'} or {columns.steady_state or 'SS'}"
    advice = f". Say what is repeated, or write {columns.interval} 0"
    table.refuse(alone, f"{wanted} above 0 with {columns.interval}", advice=advice)
    return np.maximum(additional, 0), np.maximum(interval, 0), steady == 1


def _read_compartment(table: Table, columns: Columns, dose: np.ndarray) -> np.ndarray:
    if columns.compartment is None:
        return np.ones(dose.shape, np.int32)
    compartment = table.numbers(columns.compartment, dose, " on a dose row")
    wrong = dose & ((compartment < 1) | (compartment % 1 != 0)) & np.isfinite(compartment)
    table.refuse(wrong, "a compartment counted from 1", compartment)
    return np.where(dose, np.nan_to_num(compartment), 1).astype(np.int32)


def write_out(regimen: Regimen, code: np.ndarray, time: np.ndarray) -> tuple[Timeline, np.ndarray]:
    """The rows and, after them in the list, the additional doses; and the row of each item.

    An additional dose acts before the rows of its time. A reset cancels those still to come.
    """
    rows = np.arange(code.size)
    order = np.lexsort((rows, time, code))
    resets = order[regimen.reset[order]]
    sources, numbers = [rows], [np.zeros(code.size)]
    for row in np.flatnonzero(regimen.additional > 0).tolist():
        later = resets[(code[resets] == code[row]) & (resets != row)]
        later = later[(time[later] > time[row]) | ((time[later] == time[row]) & (later > row))]
        count = np.arange(1, regimen.additional[row] + 1)
        if later.size:
            count = count[time[row] + count * regimen.interval[row] < time[later[0]]]
        sources.append(np.full(count.size, row))
        numbers.append(count)
    origin, ordinal = np.concatenate(sources), np.concatenate(numbers)
    first = ordinal == 0
    line = Timeline(
        subject=code[origin],
        time=time[origin] + ordinal * regimen.interval[origin],
        place=np.where(first, origin, -1),
        dose=(regimen.dose | regimen.reset)[origin],
        reset=regimen.reset[origin] & first,
        amount=regimen.amount[origin],
        rate=regimen.rate[origin],
        duration=regimen.duration[origin],
        interval=np.where(regimen.steady[origin] & first, regimen.interval[origin], 0.0),
        compartment=regimen.compartment[origin],
    )
    return line, origin
