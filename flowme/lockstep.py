"""Many rows of one system (subjects, nodes, chains) in one loop, each row with its own steps.

Rows are the last axis of every array, so that the inner loops of the compiled program run over
them, and the state's elements are taken apart, so that they are not gathered and scattered. The
method is diffrax's Tsit5; diffrax's own loop under `vmap` gives the same values in about twice the
time (benchmarks/ode.py), for it puts rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from flowme.accelerator import on_accelerator
from flowme.written_out import written_out

__all__ = ["lockstep"]

# Rows in one loop, which runs as long as the slowest of them takes in all: on a CPU its time grows
# with the rows; on a GPU or TPU it is that of its steps, whatever the rows (benchmarks/ode.py).
_CHUNK, _CHUNK_OF_ACCELERATOR = 256, 2**17
_LANES = 32  # chunks are whole numbers of these, for vector instructions
_PATIENCE = 1  # steps go on until more than so many rows wait for each that does not
_FEW = 48  # elements of a state that are taken apart; beyond, compiling takes too long
_TABLE = diffrax.Tsit5.tableau


def lockstep(system: Any, args: Any, max_steps: int) -> Array:
    """State after each event, `[event, ..., state]`, NaN from a failure on.

    Args:
        system: a `flowme.integrate.System`.
        args: theta, fixed, data, (rtol, atol), of one row; `jax.vmap` makes rows of them.
        max_steps: most steps of a row between two events.
    """
    leaves, structure = jax.tree.flatten(args)
    run = partial(_integrate, system, structure, max_steps=max_steps)
    return _of_rows(run, (False,) * len(leaves))(*leaves)


def _of_rows(run: Callable, rowed: Sequence[bool]) -> Callable:
    """`run(axes, leaves)` in chunks of the rows that the first axis of the `rowed` leaves is; a
    further `vmap` makes more rows."""

    @custom_vmap
    def many(*leaves: Array) -> Array:
        if not any(rowed):
            return run([-1] * len(leaves), [x[..., None] for x in leaves])[..., 0]
        rows = next(len(x) for x, row in zip(leaves, rowed, strict=True) if row)
        chunks = -(-rows // (_CHUNK_OF_ACCELERATOR if on_accelerator() else _CHUNK))
        size = -(-rows // chunks)
        size = -(-size // _LANES) * _LANES if chunks > 1 else rows
        last = np.minimum(np.arange(chunks * size), rows - 1)  # the last row fills up its chunk

        def cut(x: Array) -> Array:
            whole = x if len(last) == rows else x[last]
            return jnp.moveaxis(whole.reshape(chunks, size, *x.shape[1:]), 1, -1)

        axes = [-1 if row else None for row in rowed]
        parts = [cut(x) for x, row in zip(leaves, rowed, strict=True) if row]

        def one(parts: list[Array]) -> Array:
            part = iter(parts)
            return run(axes, [next(part) if r else x for x, r in zip(leaves, rowed, strict=True)])

        found = jax.lax.map(one, parts) if chunks > 1 else one([x[0] for x in parts])[None]
        return jnp.moveaxis(found, -1, 1).reshape(-1, *found.shape[1:-1])[:rows]

    @many.def_vmap
    def _(size: int, batched: Sequence[bool], *leaves: Array) -> tuple[Array, bool]:
        now = tuple(old or new for old, new in zip(rowed, batched, strict=True))
        if not any(rowed):
            return _of_rows(run, now)(*leaves), True
        rows = next(
            x.shape[int(b)] for x, row, b in zip(leaves, rowed, batched, strict=True) if row
        )

        def flat(x: Array, row: bool, batch: bool) -> Array:
            if not (row or batch):
                return x
            own = x.shape[int(row) + int(batch) :]
            x = x if batch else x[None]
            x = x if row else x[:, None]
            return jnp.broadcast_to(x, (size, rows, *own)).reshape(size * rows, *own)

        found = _of_rows(run, now)(*map(flat, leaves, rowed, batched))
        return found.reshape(size, rows, *found.shape[1:]), True

    return many


class _Place(NamedTuple):
    """Where each row stands: in the interval after which event, and in what state."""

    event: Array  # [row]
    stride: Array  # length of the last step in time, 0 before the first
    s: Array  # place in the interval, from 0 to 1
    h: Array  # next step
    y: Array  # [..., state, row]
    k: Array  # dy/ds over the stretch
    attempts: Array  # steps tried in this interval


def _integrate(system, structure, axes: list, leaves: list[Array], max_steps: int) -> Array:
    """`lockstep` of rows, the last axis of those leaves whose entry in `axes` is -1.

    In each turn of the loop rows take steps until a good part of them have come to the end of their
    intervals; these have their events and enter the next ones. So a row waits neither for others to
    end an interval that is easier for it, nor they for it.
    """
    theta, fixed, data, (rtol, atol) = jax.tree.unflatten(structure, leaves)
    of_theta, of_fixed, of_data, _ = jax.tree.unflatten(structure, axes)
    size = next(x.shape[-1] for x, axis in zip(leaves, axes, strict=True) if axis == -1)

    def rows(function: Callable, *which: Any) -> Callable:
        return jax.vmap(function, in_axes=which, out_axes=-1, axis_size=size)

    start = rows(system.start, of_theta)(theta)
    moving = rows(system.moving, of_theta, of_data)(theta, data)
    events = rows(lambda x: x, of_fixed)(fixed), moving
    if np.prod(start.shape[:-1]) <= _FEW:
        rows = partial(written_out, size)
    slope = rows(system.field, -1, -1, -1, -1, of_theta)
    update = rows(system.update, -1, -1, -1, of_theta)
    movable = "dt" in _innermost(moving)
    count = len(jax.tree.leaves(fixed)[0])
    number = jnp.arange(count)[:, None]
    long = (system.length(*events) > 0) | movable
    # The last event of each row before which time passes or at which something happens.
    final = jnp.max(
        jnp.maximum(number * _acts(events), jnp.minimum(number + 1, count - 1) * long), 0
    )

    def of(event: Array) -> Any:
        """The data of these events, one of each row."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, _like(event, x), 0)[0], events)

    def going(at: _Place) -> Array:
        return (at.s < 1) & (at.attempts < max_steps)

    def leave(at: _Place, before: Any, after: Any) -> tuple[_Place, Array]:
        """After the event that ends each row's interval, from whose beginning nothing follows if
        the row has failed; and the state there, NaN of those."""
        y = update(*after, at.y, theta)
        alive = (at.s >= 1) & jnp.isfinite(_primal(y)).all(axis=0)
        dt = system.length(*before)
        stride = jnp.where(dt > 0, at.h * dt, at.stride)
        event = jnp.where(alive, at.event + 1, final)
        at = at._replace(event=event, stride=stride, y=jnp.where(alive, y, at.y))
        return at, jnp.where(alive, y, jnp.nan)

    def enter(at: _Place, now: Any) -> _Place:
        """At the beginning of the interval after each row's event."""
        dt = system.length(*now)
        # An empty interval (two rows at one time, padding) takes no step, but where its length has
        # a derivative: that of the state is then this times the slope.
        ahead = (at.event < final) & ((dt > 0) | movable)
        s = jnp.where(ahead, 0.0, 1.0).astype(at.y.dtype)
        h = jnp.where(at.stride > 0, jnp.minimum(at.stride / jnp.where(dt > 0, dt, 1), 1), 1)
        k = slope(*now, jnp.zeros_like(s), at.y, theta)
        attempts = jnp.zeros_like(at.attempts)
        return at._replace(s=s, h=h.astype(s.dtype), k=k, attempts=attempts)

    def turn(state: tuple[_Place, Array]) -> tuple[_Place, Array]:
        at, found = state
        now, after = of(at.event), of(at.event + 1)
        stretch = system.stretch(*now)

        def field(s: Array, y: Array) -> Array:
            return slope(*now, s, y, theta)

        wait = jnp.where(at.event < final, -1, 0).astype(jnp.int32)

        def few_wait(at: _Place) -> Array:
            return jnp.sum(jnp.where(going(at), _PATIENCE, wait), dtype=jnp.int32) > 0

        def step(at: _Place) -> _Place:
            return _attempt(field, stretch, rtol, atol, going(at), at)

        at = jax.lax.while_loop(few_wait, step, at)
        ended = (at.event < final) & ~going(at)
        left, y = leave(at, now, after)
        # A row that goes on writes nowhere.
        place = jnp.where(ended, at.event + 1, count) * size + jnp.arange(size)
        found = found.at[place].set(y.reshape(-1, size).T, mode="drop", unique_indices=True)
        return jax.tree.map(partial(jnp.where, ended), enter(left, after), at), found

    # Before the first event, as if at the end of an interval.
    before, zero = jnp.full(size, -1), jnp.zeros(size, start.dtype)
    none = jnp.zeros(size, jnp.int32)
    at = _Place(before, zero, zero + 1, zero, start, jnp.zeros_like(start), none)
    begin = at, jnp.full((count * size, start[..., 0].size), jnp.nan, start.dtype)
    _, found = jax.lax.while_loop(lambda state: jnp.any(state[0].event < final), turn, begin)
    found = found[jnp.minimum(number, final) * size + jnp.arange(size)]  # [event, row, ...]
    return jnp.moveaxis(found.reshape(count, size, *start.shape[:-1]), 1, -1)


def _acts(events: Any) -> Array:
    """Whether something enters or resets the state at an event, `[event, row]`."""
    named, _ = jax.tree_util.tree_flatten_with_path(events)
    acts = [x for path, x in named if getattr(path[-1], "key", "") in ("jump", "reset")]
    return sum((jnp.any(x != 0, tuple(range(1, x.ndim - 1))) for x in acts), jnp.zeros((), bool))


def _like(event: Array, x: Array) -> Array:
    """`event` `[row]` as indices of the first axis of x `[event, ..., row]`."""
    return event.reshape(1, *[1] * (x.ndim - 2), -1)


def _innermost(moving: Any) -> Any:
    """The events that depend on parameters, without those of the sensitivities."""
    return _innermost(moving[0]) if isinstance(moving, tuple) else moving


def _attempt(
    field: Callable, stretch: Array, rtol: Array, atol: Array, on: Array, at: _Place
) -> _Place:
    """A step of the rows that are `on`, kept where it is good enough."""
    last = at.h >= 1 - at.s
    ds = jnp.where(last, 1 - at.s, at.h)
    new, error, k = _step(field, stretch, at.s, ds, at.y, at.k)
    scale = atol + rtol * jnp.maximum(jnp.abs(_primal(at.y)), jnp.abs(_primal(new)))
    square = jnp.mean((_primal(error) / scale) ** 2, axis=0)
    square = jnp.where(jnp.isnan(square), jnp.inf, square)
    good = square < 1
    wanted = ds * _factor(square, good)
    wanted = jnp.where(good & last, jnp.maximum(at.h, wanted), wanted)
    keep = good & on
    return at._replace(
        s=jnp.where(keep, jnp.where(last, 1.0, at.s + ds), at.s),
        h=jnp.where(on, wanted, at.h),
        y=jnp.where(keep, new, at.y),
        k=jnp.where(keep, k, at.k),
        attempts=at.attempts + on,
    )


def _step(field: Callable, stretch: Array, s: Array, ds: Array, y: Array, k: Array) -> tuple:
    """One step of Tsit5 from y with its slope k: the new y, the error, and the slope there."""
    slopes, stride = [k], stretch * ds
    for row, c in zip(_TABLE.a_lower, _TABLE.c, strict=True):
        new = y + stride * sum(float(a) * k for a, k in zip(row, slopes, strict=True))
        slopes.append(field(s + float(c) * ds, new))
    error = stride * sum(float(b) * k for b, k in zip(_TABLE.b_error, slopes, strict=True))
    return new, error, slopes[-1]


def _factor(square: Array, good: Array) -> Array:
    """By how much the next step is longer: .9 e^(-3/16), e² being `square`, within 1 to 10 after a
    good step and .2 to .9 after a bad one. Square roots, for a power takes as long as a stage."""
    eighth = jnp.sqrt(jnp.sqrt(jnp.sqrt(jnp.sqrt(square))))  # e^(1/8)
    factor = 0.9 / (eighth * jnp.sqrt(eighth))
    return jnp.clip(factor, jnp.where(good, 1.0, 0.2), jnp.where(good, 10.0, 0.9))


def _primal(y: Array) -> Array:
    """The states themselves among states and sensitivities, `[state, row]`."""
    return y[(0,) * (y.ndim - 2)]
