"""When what enters an ODE: the events of a study, moved by lag times and bioavailability."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowme.study import Study

__all__ = ["Dosing", "cycle", "dosing_of", "moving_events", "schedule"]

_ALL = 0  # the key of a lag or a bioavailability of every compartment


class Dosing(NamedTuple):
    """Individual parameters of doses, compartment -> value; compartment 0 stands for all."""

    lag: dict[int, Any]
    bioavailability: dict[int, Any]


class Given(NamedTuple):
    """The records and doses of one subject; with a leading axis, of all. See `Doses`, `Events`."""

    record: Array  # [time] their times
    time: Array  # [dose]
    amount: Array
    rate: Array
    duration: Array
    interval: Array
    compartment: Array
    first: Array  # [dose] the first record that sees the dose
    infusions: Array
    resets: Array
    steady: Array
    which: Array  # [time], the individual parameters in force from each record on


class Plan(NamedTuple):
    """In which order records, resets, arrivals of doses and ends of infusions come: integers."""

    order: Array  # [event], position in the list `_listed`
    record: Array  # [time], the event that each record is
    reset: Array  # [event], as `Events.reset`
    arrival: Array  # [dose], the event at which each dose arrives
    felt: Array  # [dose], False for a dose that a reset undoes before it arrives
    infused: Array  # [event, infusion], True where in force after the event
    lingering: Array  # [event, steady], likewise of the infusion before one at steady state


def dosing_of(lag: Any, bioavailability: Any) -> Dosing:
    """Reads `[subject]` or `[subject, time]`, for all compartments or by compartment, or None."""

    def named(value: Any) -> dict[int, Any]:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {int(c): jnp.asarray(v) for c, v in value.items()}
        return {_ALL: jnp.asarray(value)}

    return Dosing(named(lag), named(bioavailability))


def schedule(
    study: Study, dosing: Dosing, states: int, dtype: Any, which: Array
) -> tuple[Any, Array]:
    """When what happens to whom; `which` individual parameters are in force at each record,
    `[subject, time]`.

    Returns:
        The events that do not depend on `dosing`, [subject, event], with what `moving_events`
        needs of the others; and the event that each record is, [subject, time].
    """
    if study.doses.time.shape[1] and (dosing.lag or dosing.bioavailability):
        given = given_doses(study, dtype, which)
        plans = jax.vmap(plan)(dosing, given)
        fixed = {"reset": plans.reset} if study.doses.resets.shape[1] else {}
        fixed["which"] = _after(plans.record, which, plans.order.shape[1])
        return (fixed, _Moving(given, plans, plans.reset)), plans.record
    fixed = still(study, states, dtype)
    fixed["which"] = _after(jnp.asarray(study.events.record), which, study.events.time.shape[1])
    moving = None
    if study.doses.steady.shape[1]:
        moving = _Moving(given_doses(study, dtype, which), None, fixed["reset"])
    return (fixed, moving), jnp.asarray(study.events.record)


def _after(record: Array, which: Array, events: int) -> Array:
    """Of each event, `which` of the last record at or before it: [subject, event]."""
    past = (record[:, None] <= jnp.arange(events)[:, None]).sum(axis=-1)
    return jnp.take_along_axis(which, jnp.maximum(past - 1, 0), axis=1)


class _Moving(NamedTuple):
    """What the events of one subject that depend on parameters are made of."""

    given: Given
    plan: Plan | None  # None where no dose is delayed
    reset: Array


def moving_events(
    dosing: Dosing, data: _Moving | None, start: Array, steady: Callable[[Any], Array]
) -> dict[str, Array]:
    """The events of one subject that depend on parameters, [event].

    `steady` gives the steady state of (given doses, dose), and `start` is the initial state.
    """
    if data is None:
        return {}
    given, states = data.given, start.size
    moving = {} if data.plan is None else moved(dosing, given, data.plan, states)
    if given.steady.size:
        found = jax.vmap(lambda dose: steady((given, dose)))(given.steady)
        at_steady = (data.reset > 1)[:, None]
        moving["base"] = jnp.where(at_steady, found[jnp.maximum(data.reset - 2, 0)], start)
    return moving


def given_doses(study: Study, dtype: Any, which: Array) -> Given:
    """The records and doses of all subjects."""
    doses = study.doses
    floats = (study.time, doses.time, doses.amount, doses.rate, doses.duration, doses.interval)
    numbers = (doses.compartment, study.events.dose, doses.infusions, doses.resets, doses.steady)
    whole = [jnp.asarray(x) for x in (*numbers, which)]
    return Given(*(jnp.asarray(x, dtype) for x in floats), *whole)


def still(study: Study, states: int, dtype: Any) -> dict[str, Array]:
    """The events where no dose is delayed, [subject, event]: one column for each state."""
    events, column = study.events, np.asarray(study.compartments, int) - 1
    time = jnp.asarray(events.time, dtype)
    empty = jnp.zeros((*time.shape, states), dtype)
    path = dict(
        time=time,
        dt=jnp.diff(time, axis=1, append=time[:, -1:]),
        jump=empty.at[..., column].set(jnp.asarray(events.jump, dtype)),
        inflow=empty.at[..., column].set(jnp.asarray(events.inflow, dtype)),
    )
    if study.doses.resets.shape[1]:
        path["reset"] = jnp.asarray(events.reset)
    return path


def plan(dosing: Dosing, given: Given) -> Plan:
    """The order of one subject's events. It does not change under small changes of `dosing`."""
    dosing = jax.lax.stop_gradient(dosing)
    times, count, dose = given.record.size, given.time.size, jnp.arange(given.time.size)
    resets = given.resets
    # At one time: ends of infusions first; then each dose before the first record that sees it,
    # its reset before its arrival.
    seen = 2 * given.first
    ends = jnp.full(given.infusions.size + _lingering(given).size, -1)
    group = jnp.concatenate([2 * jnp.arange(times) + 1, seen[resets], seen, ends])
    within = jnp.concatenate([jnp.zeros(times, int), 2 * resets, 2 * dose + 1, ends])
    order = jnp.lexsort((within, group, _listed(dosing, given)))
    place = jnp.argsort(order)
    record, place = place[:times], place[times:]
    begin, place = place[: resets.size], place[resets.size :]
    arrival, place = place[:count], place[count:]
    end, end_lingering = place[: given.infusions.size], place[given.infusions.size :]

    at_steady = (given.steady == resets[:, None]) & (resets >= 0)[:, None]
    target = jnp.where(at_steady.any(axis=1), 2 + _first_true(at_steady), 1)
    reset = jnp.zeros(order.size, jnp.int32)
    reset = reset.at[begin].max(jnp.where(resets >= 0, target, 0).astype(jnp.int32))
    period = (reset > 0).cumsum()
    own = ((resets >= 0) & (resets <= dose[:, None])).sum(axis=1)

    def in_force(which: Array, start: Array, stop: Array) -> Array:
        event = jnp.arange(order.size)[:, None]
        felt = (which >= 0) & (period[:, None] == own[which])
        return felt & (start <= event) & (event < stop)

    linger = _lingering(given)
    of_reset = _first_true((resets == linger[:, None]) & (linger >= 0)[:, None])
    return Plan(
        order=order,
        record=record,
        reset=reset,
        arrival=arrival,
        felt=period[arrival] == own,
        infused=in_force(given.infusions, arrival[given.infusions], end),
        lingering=in_force(linger, begin[of_reset], end_lingering),
    )


def _first_true(mask: Array) -> Array:
    """Where each row is True first, 0 if nowhere."""
    return jnp.argmax(mask, axis=1) if mask.shape[1] else jnp.zeros(mask.shape[0], int)


def moved(dosing: Dosing, given: Given, plan: Plan, states: int) -> dict[str, Array]:
    """The events of one subject in their order, [event]: differentiable in `dosing`."""
    arrival, amount, length = _doses(dosing, given)
    listed = jnp.minimum(_listed(dosing, given), given.record[-1])  # the rest changes no record
    time = jnp.where(jnp.isfinite(arrival).all(), listed[plan.order], jnp.nan)
    enters = jax.nn.one_hot(given.compartment - 1, states, dtype=amount.dtype)
    flow = amount / jnp.where(length > 0, length, 1)
    jump = jnp.where(plan.felt & (length == 0), amount, 0)[:, None] * enters
    inflow = jnp.zeros((plan.order.size, states), amount.dtype)
    for which, on in ((given.infusions, plan.infused), (_lingering(given), plan.lingering)):
        inflow = inflow + (on[:, :, None] * (flow[:, None] * enters)[which]).sum(axis=1)
    return dict(
        time=time,
        dt=jnp.diff(time, append=time[-1:]),
        jump=jnp.zeros_like(inflow).at[plan.arrival].add(jump),
        inflow=inflow,
    )


def cycle(dosing: Dosing, given: Given, dose: Array, states: int) -> dict[str, Array]:
    """The interval before a dose at steady state, with the dose before it, [event = 4].

    It begins when that dose is recorded; the dose arrives after its lag. If its infusion outlasts
    the interval, it is still in force at the beginning. NaN if the lag, or the infusion, is
    longer than the interval.
    """
    arrival, amount, length = (x[dose] for x in _doses(dosing, given))
    start, interval = given.time[dose], given.interval[dose]
    begin = arrival - start
    end = begin + length
    wraps = end > interval
    inner = jnp.where(wraps, end - interval, begin), jnp.where(wraps, begin, end)
    phase = jnp.stack([0 * begin, *inner, interval])
    phase = jnp.where((begin <= interval) & (length <= interval), phase, jnp.nan)
    enters = jax.nn.one_hot(given.compartment[dose] - 1, states, dtype=amount.dtype)
    on = jnp.stack([wraps, ~wraps, wraps, wraps])[:, None]
    jump = jnp.zeros((4, states), amount.dtype).at[1].set(jnp.where(length > 0, 0, amount) * enters)
    return dict(
        time=start - interval + phase,
        dt=jnp.diff(phase, append=phase[-1:]),
        jump=jump,
        inflow=jnp.where(on, jnp.where(length > 0, amount / jnp.where(length > 0, length, 1), 0), 0)
        * enters,
    )


def _doses(dosing: Dosing, given: Given) -> tuple[Array, Array, Array]:
    """When each dose arrives, how much of it, and over what time: 0 for a bolus."""
    lag, part = jnp.zeros_like(given.time), jnp.ones_like(given.time)
    # The record in force; an additional dose has none of its own.
    at = jnp.maximum(given.first - (given.record[given.first] > given.time), 0)

    def of_dose(value: Array) -> Array:
        return value[at] if value.ndim else value

    for place, value in dosing.lag.items():
        lag = lag + jnp.where((given.compartment == place) | (place == _ALL), of_dose(value), 0)
    for place, value in dosing.bioavailability.items():
        part = part * jnp.where((given.compartment == place) | (place == _ALL), of_dose(value), 1)
    amount, rate = given.amount * part, given.rate
    length = jnp.where(rate > 0, amount / jnp.where(rate > 0, rate, 1), given.duration)
    return given.time + lag, amount, length


def _listed(dosing: Dosing, given: Given) -> Array:
    """Times of records, resets, arrivals, ends of infusions, and of those before steady state."""
    arrival, _, length = _doses(dosing, given)
    resets = jnp.where(given.resets >= 0, given.time[given.resets], jnp.inf)
    linger = _lingering(given)
    ends = (arrival + length)[given.infusions]
    last = (arrival + length - given.interval)[linger]
    return jnp.concatenate([given.record, resets, arrival, ends, last])


def _lingering(given: Given) -> Array:
    """The doses at steady state of which the last infusion before may still be in force."""
    return given.steady if given.infusions.size else given.steady[:0]
