"""An ODE through its events, with derivatives of any order from its sensitivity equations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from flowme.lockstep import lockstep

__all__ = ["System", "differentiable", "event_step", "system_of"]

Theta = list[Array]
_FEW = 8  # directions written out one by one


class System(NamedTuple):
    """An initial value problem with events, whose parameters are a list of arrays.

    `fixed` are the events, [event]: their `time`, the time `dt` to the next, the `jump`, the
    `inflow` that then begins and, where there are any, the `reset`s and the `base`, the state to
    which they lead. Those that depend on parameters are in `moving` instead.

    In each interval the place s runs from 0 to 1, and the state by `field` times `stretch`: time is
    stretched to the interval's length, so that subjects with different times share one loop.
    """

    start: Callable[[Theta], Array]  # theta -> [..., state]
    moving: Callable[[Theta, Any], Any]  # theta, data -> pytree of [event, ...], maybe empty
    field: Callable[..., Array]  # fixed, moving (of one event), s, [..., state], theta
    update: Callable[..., Array]  # fixed, moving, [..., state], theta -> state after the event
    length: Callable[[Any, Any], Array]  # fixed, moving -> time to the next event
    stretch: Callable[[Any, Any], Array]  # the same, or 1 where `field` is by s already


def system_of(
    field: Callable[[Any, Array, Array, Theta], Array], moving: Callable[[Theta, Any], Any]
) -> System:
    """The system of dA/dt = field(event, t, A, theta) after an event, which starts at theta[0]."""

    def start(theta: Theta) -> Array:
        return theta[0]

    def slope(fixed: Any, moving: Any, s: Any, y: Array, theta: Theta) -> Array:
        event = fixed | moving
        dt = event["dt"]
        dy = field(fixed, event["time"] + s * dt, y, theta) + event["inflow"]
        if "dt" not in moving:
            return dy
        # A length that depends on parameters has derivatives, also that of an empty interval; but a
        # field that is not finite does not matter there.
        return dt * jnp.where((dt > 0) | jnp.isfinite(dy), dy, 0)

    def update(fixed: Any, moving: Any, y: Array, theta: Theta) -> Array:
        return event_step(fixed | moving, y, start(theta))

    def length(fixed: Any, moving: Any) -> Array:
        return (fixed | moving)["dt"]

    def stretch(fixed: Any, moving: Any) -> Array:
        return jnp.ones(()) if "dt" in moving else fixed["dt"]

    return System(start, moving, slope, update, length, stretch)


def event_step(event: dict[str, Array], y: Array, start: Array) -> Array:
    """The state after an event."""
    if "reset" in event:
        y = jnp.where(event["reset"] > 0, event.get("base", start), y)
    return y + event["jump"]


def differentiable(
    system: System, solver: diffrax.AbstractSolver | None, max_steps: int
) -> Callable:
    """State after each event of one subject, `[event, ..., state]`, NaN from a failure on, with
    derivatives, in `theta`, from the system's own sensitivity equations.

    The rule solves the augmented system by this same function, so it has derivatives of any order,
    and it is linear in the tangents, so JAX can transpose it: nothing ever differentiates the
    solver's loop.
    """

    @jax.custom_jvp
    def integrate(theta: Theta, given: Any) -> Array:
        (fixed, data), tolerance = given
        if solver is None:
            return lockstep(system, (theta, fixed, data, tolerance), max_steps)
        return _by_diffrax(system, theta, fixed, data, tolerance, solver, max_steps)

    # Symbolic zeros say which parameters are differentiated; the others cost nothing.
    @partial(integrate.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        theta, given = primals
        _refuse_derivatives(tangents[1])
        active = [not isinstance(x, SymbolicZero) for x in tangents[0]]
        if not any(active):
            value = integrate(theta, given)
            return value, jnp.zeros_like(value)
        augmented = _with_sensitivities(system, active)
        both = differentiable(augmented, solver, max_steps)(theta, given)
        value, slope = both[:, 0], both[:, 1:]  # [event, ..., state], [event, direction, ...]
        # Masked before and after the product, so that neither NaN * 0 nor a NaN cotangent of a
        # failed subject gets into the gradient of a parameter that all subjects share.
        ok = jnp.isfinite(both).all(axis=tuple(range(1, both.ndim)), keepdims=True)
        direction, _ = ravel_pytree([x for x, on in zip(tangents[0], active, strict=True) if on])
        change = jnp.tensordot(jnp.where(ok, slope, 0), direction.astype(value.dtype), axes=(1, 0))
        return value, jnp.where(ok[:, 0], change, 0)

    return integrate


def _refuse_derivatives(tangents: Any) -> None:
    if not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(tangents)):
        raise ValueError(
            "solve: expected a study and tolerances that are not differentiated; got "
            "derivatives with respect to them. Use jax.lax.stop_gradient on them, or pass what is "
            "differentiated as lag=... or bioavailability=..., or in psi."
        )


def _with_sensitivities(system: System, active: Sequence[bool]) -> System:
    """The system with one more row of states for each scalar among the active parameters.

    Row 0 is the system itself; row j is its derivative with respect to the j-th scalar.
    """

    def start(theta: Theta) -> Array:
        y, slopes = _directions(lambda _, theta: system.start(theta), theta, active)
        return jnp.concatenate([y[None], slopes])

    def moving(theta: Theta, data: Any) -> Any:
        rows, slopes = _directions(lambda _, theta: system.moving(theta, data), theta, active)
        return rows, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), slopes)  # [event, direction]

    def derivative(change: Callable, moving: Any, y: Array, theta: Theta) -> Array:
        """`change(moving, y, theta)` and its derivatives in every direction."""
        row, rows = moving
        value, slopes = _directions(
            lambda given, theta: change(*given, theta), theta, active, (row, y[0]), (rows, y[1:])
        )
        return jnp.concatenate([value[None], slopes])

    def field(fixed: Any, moving: Any, s: Any, y: Array, theta: Theta) -> Array:
        return derivative(lambda m, y, th: system.field(fixed, m, s, y, th), moving, y, theta)

    def update(fixed: Any, moving: Any, y: Array, theta: Theta) -> Array:
        return derivative(lambda m, y, th: system.update(fixed, m, y, th), moving, y, theta)

    def length(fixed: Any, moving: Any) -> Array:
        return system.length(fixed, moving[0])

    def stretch(fixed: Any, moving: Any) -> Array:
        return system.stretch(fixed, moving[0])

    return System(start, moving, field, update, length, stretch)


def _directions(
    function: Callable, theta: Theta, active: Sequence[bool], given: Any = (), change: Any = ()
) -> tuple[Any, Any]:
    """`function(given, theta)`, and its derivative along each scalar of the active parameters,
    along which `given` changes by `change`, `[direction, ...]`: `[direction, ...]`."""
    places = [(a, e) for a, on in enumerate(active) if on for e in np.ndindex(theta[a].shape)]

    def along(a: int, e: Any, j: Any) -> tuple[Any, Any]:
        # The other parameters stand outside, so that nothing is computed with zeros.
        def moved(given: Any, x: Array) -> Any:
            return function(given, [*theta[:a], x, *theta[a + 1 :]])

        one = np.zeros(theta[a].shape, theta[a].dtype)
        one[e] = 1
        return jax.jvp(moved, (given, theta[a]), (_at(change, j), one))

    if len(places) <= _FEW:
        values, slopes = zip(*(along(*place, j) for j, place in enumerate(places)), strict=True)
        return values[0], jax.tree.map(lambda *x: jnp.stack(x), *slopes)
    chosen = [x for x, on in zip(theta, active, strict=True) if on]
    flat, unravel = ravel_pytree(chosen)

    def all_moved(given: Any, flat: Array) -> Any:
        replacement = iter(unravel(flat))
        both = zip(theta, active, strict=True)
        return function(given, [next(replacement) if on else x for x, on in both])

    value, push = jax.linearize(all_moved, given, flat)
    return value, jax.vmap(push)(change, jnp.eye(flat.size, dtype=flat.dtype))


def _at(tree: Any, j: Any) -> Any:
    return jax.tree.map(lambda x: x[j], tree)


def _by_diffrax(
    system: System,
    theta: Theta,
    fixed: Any,
    data: Any,
    tolerance: tuple[Array, Array],
    solver: diffrax.AbstractSolver,
    max_steps: int,
) -> Array:
    """`lockstep` with any solver, one subject after another's steps."""
    rtol, atol = tolerance
    controller = diffrax.PIDController(rtol, atol, norm=_primal_norm)

    def interval(carry: tuple[Array, Array], row: tuple) -> tuple[tuple[Array, Array], Array]:
        y, alive = carry
        before, after = row

        # An empty interval (two rows at one time, padding, or after a failure) takes one step.
        def field(s: Any, y: Array, args: tuple) -> Array:
            alive, event, theta = args
            stretch = system.stretch(*event)
            slope = stretch * system.field(*event, s, y, theta)
            return jnp.where(alive & (stretch > 0), slope, 0)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            # Python numbers: known when tracing, else diffrax checks t0 < t1 by a host callback,
            # which would keep the program out of the persistent compilation cache.
            t0=0,
            t1=1,
            dt0=1,
            y0=y,
            args=(alive, before, theta),
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),  # the plain loop; never differentiated, see above
            max_steps=max_steps,
            throw=False,
        )
        end = system.update(*after, solution.ys[0], theta)
        alive &= (solution.result == diffrax.RESULTS.successful) & jnp.isfinite(_primal(end)).all()
        return (jnp.where(alive, end, y), alive), jnp.where(alive, end, jnp.nan)

    events = (fixed, system.moving(theta, data))
    first = system.update(*jax.tree.map(lambda x: x[0], events), system.start(theta), theta)
    alive = jnp.isfinite(_primal(first)).all()
    rows = (jax.tree.map(lambda x: x[:-1], events), jax.tree.map(lambda x: x[1:], events))
    _, rest = jax.lax.scan(interval, (jnp.where(alive, first, 0), alive), rows)
    return jnp.concatenate([jnp.where(alive, first, jnp.nan)[None], rest])


def _primal(y: Array) -> Array:
    """The states themselves among states and sensitivities: row 0 of every leading axis."""
    return y[(0,) * (y.ndim - 1)]


def _primal_norm(scaled_error: Array) -> Array:
    """Root mean square over the states only: a value does not depend on what is differentiated."""
    norm = jnp.sqrt(jnp.mean(_primal(scaled_error) ** 2))
    return jnp.where(jnp.isnan(norm), jnp.inf, norm)  # a step out of the domain is tried smaller
