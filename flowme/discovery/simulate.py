r"""Trajectories of many structures at once, with sensitivities: fixed steps, batch last.

A structure with rates κ is the quadratic ODE

.. math:: \dot x = f(x) = a + B x + x^\top C x, \qquad
    J = B + 2 C x, \quad f = a + \tfrac12 (B + J) x,

whose coefficients are formed once for all steps. Its sensitivities to the logarithms of the rates
and to the initial state obey :math:`\dot S = J S + \partial f / \partial \log κ`. Both are solved
by Runge and Kutta's fourth order scheme with the same steps for all structures. The batch is the
last axis of every array, so that a sum over species is a few operations on long vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .data import TimeCourses
from .library import Library


class Reactions(NamedTuple):
    """Reactions as the arrays of a kernel; in a batch, of R slots in each of B structures.

    Attributes:
        first: first molecule consumed, one-hot over (nothing, species), [1 + S, R, B].
        second: the second, likewise.
        net: change of each scaled species, [S, R, B]; 0 in an empty slot.
    """

    first: Any
    second: Any
    net: Any


class Design(NamedTuple):
    """When and what was measured, in scaled units.

    Attributes:
        step: time since the record before, [T, C]; 0 for the first.
        values: [T, S, C].
        observed: 1.0 where measured, [T, S, C].
        own: derivative of the initial state by its estimated parameters, [S, O, C]; O is S, or 0
            where all initial states are known.
    """

    step: Any
    values: Any
    observed: Any
    own: Any


class Normal(NamedTuple):
    """Least squares of a batch around its parameters: Q of them are shared by all conditions (log
    rates), then O of each condition's own (initial state).

    Attributes:
        squares: Σ residual² of each species, [S, C, B].
        gradient: Σ S w² residual, [Q + O, C, B].
        hessian: Σ S w² Sᵀ, [Q + O, Q + O, C, B].
    """

    squares: Any
    gradient: Any
    hessian: Any


def library_arrays(library: Library, courses: TimeCourses) -> Reactions:
    """All reactions of a library in scaled units, [1 + S, L + 1]; the last is an empty slot."""
    L, S = library.consumed.shape
    first, second = np.zeros((2, L + 1, 1 + S))
    for r, consumed in enumerate(library.consumed):
        molecules = np.repeat(np.arange(1, S + 1), consumed)
        if molecules.size > 2 or library.reactions[r].law != "mass action":
            raise ValueError(
                "expected reactions of mass action that consume at most two molecules; got "
                f"{library.reactions[r]}. Write the others as several steps."
            )
        slots = [*molecules, 0, 0]
        first[r, slots[0]] = second[r, slots[1]] = 1.0
    first[L, 0] = second[L, 0] = 1.0
    net = np.vstack([courses.net(library), np.zeros((1, S))])
    return Reactions(first.T, second.T, net.T)


def design(courses: TimeCourses) -> Design:
    """The arrays of the kernels from time courses."""
    step = np.diff(courses.time, axis=1, prepend=0.0).T
    values = courses.values.transpose(1, 2, 0)
    observed = courses.observed.transpose(1, 2, 0).astype(float)
    S = len(courses.species)
    own = np.eye(S)[:, :, None] * ~courses.known.T
    return Design(step, values, observed, own[:, : 0 if courses.known.all() else S])


def _polynomial(reactions: Reactions, rates: Array) -> tuple[Array, Array, Array]:
    """a [S, B], B [S, S, B] and 2C [S, S, S, B] of the ODE."""
    whole = jnp.einsum("irb,jrb,srb,rb->sijb", *reactions[:2], reactions.net, rates)
    whole = whole + jnp.swapaxes(whole, 1, 2)
    return 0.5 * whole[:, 0, 0], whole[:, 0, 1:], whole[:, 1:, 1:]


def _field(ode: tuple[Array, Array, Array], x: Array) -> tuple[Array, Array]:
    """f [S, C, B] and J [S, S, C, B] at x [S, C, B]."""
    a, b, c = ode
    species = range(x.shape[0])
    jacobian = b[:, :, None] + sum(c[:, :, i, None] * x[i] for i in species)
    flow = sum((b[:, i, None] + jacobian[:, i]) * x[i] for i in species)
    return a[:, None] + 0.5 * flow, jacobian


def _speed(reactions: Reactions, x: Array) -> Array:
    """x^y of each reaction, [R, C, B]."""
    one = reactions.first[0][:, None], reactions.second[0][:, None]
    first, second = (
        rest + sum(h[i + 1][:, None] * x[i] for i in range(x.shape[0]))
        for rest, h in zip(one, reactions[:2], strict=True)
    )
    return first * second


def _runge_kutta(field: Any, state: Any, h: Array) -> Any:
    def moved(by: Any, slope: Any) -> Any:
        return jax.tree.map(lambda s, k: s + by * k, state, slope)

    one = field(state)
    two = field(moved(h / 2, one))
    three = field(moved(h / 2, two))
    four = field(moved(h, three))
    return jax.tree.map(
        lambda s, a, b, c, d: s + h / 6 * (a + 2 * (b + c) + d), state, one, two, three, four
    )


def _augmented(ode: Any, forced: Reactions, change: Array, own: int) -> Any:
    """The field of (x [S, C, B], S [S, Q + O, C, B]): Ṡ = J S + change x^y of `forced`."""

    def field(state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, s = state
        flow, jacobian = _field(ode, x)
        forcing = change * _speed(forced, x)
        if own:
            none = jnp.zeros((x.shape[0], own, *s.shape[2:]), x.dtype)
            forcing = jnp.concatenate([jnp.broadcast_to(forcing, s[:, own:].shape), none], 1)
        return flow, forcing + sum(jacobian[:, None, i] * s[i] for i in range(x.shape[0]))

    return field


def _start(initial: Array, Q: int, own: Array) -> tuple[Array, Array]:
    """(x, S) at the first record."""
    S, C, B = initial.shape
    own = jnp.broadcast_to(own[..., None], (*own.shape, B)).astype(initial.dtype)
    return initial, jnp.concatenate([jnp.zeros((S, Q, C, B), initial.dtype), own], 1)


def _advance(field: Any, state: Any, step: Array, substeps: int) -> Any:
    h = (step / substeps)[:, None]
    return jax.lax.fori_loop(0, substeps, lambda _, y: _runge_kutta(field, y, h), state)


@jax.jit
def normal(
    reactions: Reactions,
    log_rates: Array,
    initial: Array,
    weight: Array,
    design: Design,
    substeps: int,
) -> Normal:
    """Residuals and Gauss-Newton's normal equations of every structure of a batch.

    Args:
        reactions: the structures, [.., R, B].
        log_rates: [R, B]; to them are the sensitivities, Q = R.
        initial: [S, C, B].
        weight: 1 / σ of each species in each condition, [S, C, B]; 0 leaves a condition out.
        design: what was measured.
        substeps: steps between two records.
    """
    rates = jnp.exp(log_rates)
    (S, C, B), own = initial.shape, design.own.shape[1]
    change = (reactions.net * rates)[:, :, None]
    field = _augmented(_polynomial(reactions, rates), reactions, change, own)

    def interval(carry: Any, record: Any) -> tuple[Any, None]:
        state, total = carry
        step, values, observed = record
        x, s = state = _advance(field, state, step, substeps)
        residual = (values[..., None] - x) * observed[..., None]
        scaled = s * (weight * observed[..., None])[:, None]
        more = Normal(
            residual**2,
            (scaled * (weight * residual)[:, None]).sum(0),
            sum(scaled[i][:, None] * scaled[i] for i in range(S)),
        )
        return (state, jax.tree.map(jnp.add, total, more)), None

    Q = log_rates.shape[0] + own
    zero = Normal(*(jnp.zeros((*n, C, B), initial.dtype) for n in ((S,), (Q,), (Q, Q))))
    begin = _start(initial, Q - own, design.own), zero
    records = (design.step, design.values, design.observed)
    return jax.lax.scan(interval, begin, records)[0][1]


@jax.jit
def sensitivities(
    reactions: Reactions,
    log_rates: Array,
    initial: Array,
    design: Design,
    substeps: int,
    along: Reactions,
) -> tuple[Array, Array]:
    """Trajectories of one structure and their derivatives by the rates κ of a whole library.

    Args:
        reactions: the structure, [.., R, 1].
        log_rates: [R, 1].
        initial: [S, C, 1].
        design: the records.
        substeps: steps between two records.
        along: the library, [.., L, 1].

    Returns:
        x at the records, [T, S, C], and its derivatives by κ and by the estimated initial
        states, [T, S, L + O, C].
    """
    ode = _polynomial(reactions, jnp.exp(log_rates))
    field = _augmented(ode, along, along.net[:, :, None], design.own.shape[1])

    def interval(state: Any, step: Array) -> tuple[Any, Any]:
        state = _advance(field, state, step, substeps)
        return state, state

    begin = _start(initial, along.net.shape[1], design.own)
    x, s = jax.lax.scan(interval, begin, design.step)[1]
    return x[..., 0], s[..., 0]
