"""Many rows of one system (subjects, nodes, chains) in one loop, each row with its own steps.

Rows are the last axis of every array, so that the inner loops of the compiled program run over
them, and the state's elements are taken apart, so that they are not gathered and scattered. The
method is diffrax's Tsit5; diffrax's own loop under `vmap` gives the same values in about twice the
time (benchmarks/ode.py), for it puts rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from flowme.accelerator import on_accelerator
from flowme.written_out import written_out

__all__ = ["lockstep"]

# Rows in one loop, which runs as long as the slowest of them needs: on a CPU its time grows with
# the rows; on a GPU or TPU it is that of its steps, whatever the rows (benchmarks/ode.py).
_CHUNK, _CHUNK_OF_ACCELERATOR = 128, 2**17
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
        size = min(rows, _CHUNK_OF_ACCELERATOR if on_accelerator() else _CHUNK)
        chunks = -(-rows // size)
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


def _integrate(system, structure, axes: list, leaves: list[Array], max_steps: int) -> Array:
    """`lockstep` of rows, the last axis of those leaves whose entry in `axes` is -1."""
    theta, fixed, data, (rtol, atol) = jax.tree.unflatten(structure, leaves)
    of_theta, of_fixed, of_data, _ = jax.tree.unflatten(structure, axes)
    size = next(x.shape[-1] for x, axis in zip(leaves, axes, strict=True) if axis == -1)

    def rows(function: Callable, *which: Any) -> Callable:
        return jax.vmap(function, in_axes=which, out_axes=-1, axis_size=size)

    start = rows(system.start, of_theta)(theta)
    moving = rows(system.moving, of_theta, of_data)(theta, data)
    if np.prod(start.shape[:-1]) <= _FEW:
        rows = partial(written_out, size)
    slope = rows(system.field, of_fixed, -1, -1, -1, of_theta)
    update = rows(system.update, of_fixed, -1, -1, of_theta)
    movable = "dt" in _innermost(moving)

    def interval(carry: tuple, row: tuple) -> tuple[tuple, Array]:
        y, alive, length = carry
        (before, moving), after = row
        dt = jnp.broadcast_to(system.length(before, moving), alive.shape)
        stretch = system.stretch(before, moving)

        def field(s: Array, y: Array) -> Array:
            return slope(before, moving, s, y, theta)

        def unfinished(state: tuple) -> Array:
            s, *_, steps = state
            return jnp.any(s < 1) & (steps < max_steps)

        def step(state: tuple) -> tuple:
            return _attempt(field, stretch, rtol, atol, state)

        # An empty interval (two rows at one time, padding, or after a failure) takes no step, but
        # where its length has a derivative: that of the state is then this times the slope.
        s = jnp.where(alive & ((dt > 0) | movable), 0.0, 1.0).astype(y.dtype)
        first = jnp.where(length > 0, jnp.minimum(length / jnp.where(dt > 0, dt, 1), 1), 1)
        begin = (s, first.astype(y.dtype), y, field(jnp.zeros_like(s), y), 0)
        s, h, y_end, *_ = jax.lax.while_loop(unfinished, step, begin)
        end = update(*after, y_end, theta)
        alive &= (s >= 1) & jnp.isfinite(_primal(end)).all(axis=0)
        length = jnp.where(dt > 0, h * dt, length)
        return (jnp.where(alive, end, y), alive, length), jnp.where(alive, end, jnp.nan)

    events = (fixed, moving)
    first = update(*jax.tree.map(lambda x: x[0], events), start, theta)
    alive = jnp.isfinite(_primal(first)).all(axis=0)
    pairs = (jax.tree.map(lambda x: x[:-1], events), jax.tree.map(lambda x: x[1:], events))
    begin = (jnp.where(alive, first, 0), alive, jnp.zeros(alive.shape, first.dtype))
    _, rest = jax.lax.scan(interval, begin, pairs)
    return jnp.concatenate([jnp.where(alive, first, jnp.nan)[None], rest])


def _innermost(moving: Any) -> Any:
    """The events that depend on parameters, without those of the sensitivities."""
    return _innermost(moving[0]) if isinstance(moving, tuple) else moving


def _attempt(field: Callable, stretch: Array, rtol: Array, atol: Array, state: tuple) -> tuple:
    """A step of every row that is not at the end of its interval, kept where it is good enough:
    place s, next step h, state y, slope k there, and how many attempts so far."""
    s, h, y, k, attempts = state
    last = h >= 1 - s
    ds = jnp.where(last, 1 - s, h)
    new, error, k_new = _step(field, stretch, s, ds, y, k)
    scale = atol + rtol * jnp.maximum(jnp.abs(_primal(y)), jnp.abs(_primal(new)))
    square = jnp.mean((_primal(error) / scale) ** 2, axis=0)
    square = jnp.where(jnp.isnan(square), jnp.inf, square)
    good, on = square < 1, s < 1
    wanted = ds * _factor(square, good)
    wanted = jnp.where(good & last, jnp.maximum(h, wanted), wanted)
    keep = good & on
    s = jnp.where(keep, jnp.where(last, 1.0, s + ds), s)
    y, k = jnp.where(keep, new, y), jnp.where(keep, k_new, k)
    return s, jnp.where(on, wanted, h), y, k, attempts + 1


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
