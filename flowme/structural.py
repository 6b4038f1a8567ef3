"""Structural models as ODEs: individual parameters and doses to states, with derivatives."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from flowme.study import Study

__all__ = ["solve"]

_MOST_STATES = 20


def solve(
    rhs: Callable[[Array, Array, Any], Any],
    psi: Any,
    study: Study,
    *,
    initial: Any = None,
    states: int | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int = 256,
) -> Array:
    r"""State of each subject's ODE at each of its times, with its doses.

    Solves, subject by subject and with that subject's own steps,

    .. math:: \frac{dA_i}{dt} = f(t, A_i, \psi_i) + r_i(t), \qquad
        A_i(t_d^+) = A_i(t_d^-) + D_d,

    where :math:`D_d` are boluses and :math:`r_i` the infusions in force. The solver lands on every
    record and dose. A record before a dose row of the same time sees the state before the dose.

    Derivatives of any order, forward or reverse, with respect to `psi`, `initial` and anything
    `rhs` closes over, come from the sensitivity equations, solved in the same steps:
    :math:`\dot S = (\partial f/\partial A) S + \partial f/\partial \psi`. `study` is data and has
    no derivatives.

    A subject whose solve fails (`max_steps` reached, or a non-finite state) is NaN from the
    failing interval on, and those NaN add nothing to a gradient; the other subjects are untouched.

    Args:
        rhs: `rhs(t, amount, psi_i) -> d amount / dt` of one subject, `amount` being `[state]` and
            the leaves of `psi_i` scalars; returns an array, or a tuple or list of scalars.
        psi: individual parameters, a pytree (named tuple) of arrays `[subject]`.
        study: the `Study`; doses into compartment c are added to state c - 1.
        initial: state at the first row of each subject, `[state]` or `[subject, state]`; zeros if
            None.
        states: number of states; if None, the smallest with which `rhs` returns as many
            derivatives.
        solver: a diffrax solver; Tsitouras' 5(4) if None, `diffrax.Kvaerno5()` when stiff.
        rtol: relative tolerance of a step; 1e-8 if None, or 1e-5 without `jax_enable_x64`.
        atol: absolute tolerance (amount); 1e-10 if None, or 1e-6 without `jax_enable_x64`.
        max_steps: most steps of the solver between two consecutive rows.

    Returns:
        Amounts, `[subject, time, state]`.

    Raises:
        ValueError: if `psi`, `initial` or `states` do not fit `rhs` and `study`.

    References:
        Hindmarsh et al., SUNDIALS (2005), section 3.2: forward sensitivity analysis.
    """
    psi = jax.tree.map(jnp.asarray, psi)
    check_psi(psi, study)
    initial = None if initial is None else jnp.asarray(initial)
    dtype = jnp.result_type(float)  # jax_enable_x64 decides, as it does for diffrax
    individual = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), psi)
    stacked = partial(_stacked_rhs, rhs, dtype)
    states = _count_states(stacked, individual, study, initial, states, dtype)
    # Everything rhs closes over becomes an argument, so that it is differentiated (and batched)
    # as psi is; custom_jvp would not see it otherwise.
    time, amount = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((), (states,)))
    closed, static = eqx.partition(
        eqx.filter_closure_convert(stacked, time, amount, individual), eqx.is_array
    )
    double = dtype == jnp.float64
    path = _path(study, states, dtype)
    tolerance = (
        jnp.asarray((1e-8 if double else 1e-5) if rtol is None else rtol, dtype),
        jnp.asarray((1e-10 if double else 1e-6) if atol is None else atol, dtype),
    )
    if initial is None:
        initial = jnp.zeros(states, dtype)
    start = jnp.broadcast_to(initial.astype(dtype), (study.time.shape[0], states))

    def trajectory(psi_i: Any, start_i: Array, path_i: _Path) -> Array:
        theta, structure = jax.tree.flatten((start_i, psi_i, closed))

        def field(t: Array, y: Array, theta: list[Array]) -> Array:
            _, psi_i, closed = jax.tree.unflatten(structure, theta)
            return eqx.combine(closed, static)(t, y, psi_i)

        # The initial state is the first of theta.
        system = _System(lambda theta: theta[0], field)
        integrate = _differentiable(system, solver or _UnrolledTsit5(), max_steps)
        return integrate(theta, (path_i, tolerance))

    amounts = jax.vmap(trajectory)(psi, start, path)
    return jnp.take_along_axis(amounts, jnp.asarray(study.events.record)[:, :, None], axis=1)


class _Path(NamedTuple):
    """What happens to one subject (or, with a leading axis, to all of them) and when."""

    time: Array  # [event]
    jump: Array  # [event, state], added at the event
    inflow: Array  # [event, state], per time, in force after the event


class _System(NamedTuple):
    """An initial value problem whose parameters are a list of arrays."""

    start: Callable[[list[Array]], Array]  # theta -> [..., state]
    field: Callable[[Array, Array, list[Array]], Array]  # t, [..., state], theta -> [..., state]


def _differentiable(system: _System, solver: diffrax.AbstractSolver, max_steps: int) -> Callable:
    """`_integrate` with derivatives, in `theta`, from the system's own sensitivity equations.

    The rule solves the augmented system by this same function, so it has derivatives of any order,
    and it is linear in the tangents, so JAX can transpose it: nothing ever differentiates the
    solver's loop.
    """

    @jax.custom_jvp
    def integrate(theta: list[Array], given: Any) -> Array:
        path, tolerance = given
        return _integrate(system, theta, path, tolerance, solver, max_steps)

    # Symbolic zeros say which parameters are differentiated; the others cost nothing.
    @partial(integrate.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        theta, given = primals
        if not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(tangents[1])):
            raise ValueError(
                "solve: expected a study and tolerances that are not differentiated; got "
                "derivatives with respect to them. Use jax.lax.stop_gradient on them, or move what "
                "is differentiated (a lag, a bioavailability) into the right-hand side."
            )
        active = [not isinstance(x, SymbolicZero) for x in tangents[0]]
        if not any(active):
            value = integrate(theta, given)
            return value, jnp.zeros_like(value)
        augmented = _with_sensitivities(system, active)
        both = _differentiable(augmented, solver, max_steps)(theta, given)
        value, slope = both[:, 0], both[:, 1:]  # [event, ..., state], [event, direction, ...]
        # Masked before and after the product, so that neither NaN * 0 nor a NaN cotangent of a
        # failed subject gets into the gradient of a parameter that all subjects share.
        ok = jnp.isfinite(both).all(axis=tuple(range(1, both.ndim)), keepdims=True)
        direction, _ = ravel_pytree([x for x, on in zip(tangents[0], active, strict=True) if on])
        change = jnp.tensordot(jnp.where(ok, slope, 0), direction.astype(value.dtype), axes=(1, 0))
        return value, jnp.where(ok[:, 0], change, 0)

    return integrate


def _with_sensitivities(system: _System, active: Sequence[bool]) -> _System:
    """The system with one more row of states for each scalar among the active parameters.

    Row 0 is the system itself; row j is its derivative with respect to the j-th scalar.
    """

    def split(theta: list[Array]) -> tuple[list[Array], Callable, list[Array]]:
        chosen = [x for x, on in zip(theta, active, strict=True) if on]
        flat, unravel = ravel_pytree(chosen)

        def merge(chosen: list[Array]) -> list[Array]:
            replacement = iter(chosen)
            return [next(replacement) if on else x for x, on in zip(theta, active, strict=True)]

        return chosen, merge, jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))

    def start(theta: list[Array]) -> Array:
        chosen, merge, basis = split(theta)
        y, push = jax.linearize(lambda chosen: system.start(merge(chosen)), chosen)
        return jnp.concatenate([y[None], jax.vmap(push)(basis)])

    def field(t: Array, y: Array, theta: list[Array]) -> Array:
        chosen, merge, basis = split(theta)
        dy, push = jax.linearize(lambda y, c: system.field(t, y, merge(c)), y[0], chosen)
        return jnp.concatenate([dy[None], jax.vmap(push)(y[1:], basis)])

    return _System(start, field)


def _integrate(
    system: _System,
    theta: list[Array],
    path: _Path,
    tolerance: tuple[Array, Array],
    solver: diffrax.AbstractSolver,
    max_steps: int,
) -> Array:
    """State after each event of one subject, `[event, ..., state]`, NaN after a failure."""
    rtol, atol = tolerance
    controller = diffrax.PIDController(rtol, atol, norm=_primal_norm)

    def interval(carry: tuple[Array, Array], row: tuple) -> tuple[tuple[Array, Array], Array]:
        y, alive = carry
        t, dt, inflow, jump = row

        # Time runs from 0 to 1, so that subjects with different times share one loop; an empty
        # interval (two rows at one time, padding, or after a failure) takes one step.
        def field(tau: Any, y: Array, args: tuple) -> Array:
            t, dt, inflow, theta = args
            dy = _add_primal(system.field(t + tau * dt, y, theta), inflow)
            return jnp.where(dt > 0, dt * dy, 0)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            # Python numbers: known when tracing, else diffrax checks t0 < t1 by a host callback,
            # which would keep the program out of the persistent compilation cache.
            t0=0,
            t1=1,
            dt0=1,
            y0=y,
            args=(t, jnp.where(alive, dt, 0), inflow, theta),
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),  # the plain loop; never differentiated, see above
            max_steps=max_steps,
            throw=False,
        )
        end = _add_primal(solution.ys[0], jump)
        alive &= (solution.result == diffrax.RESULTS.successful) & jnp.isfinite(_primal(end)).all()
        return (jnp.where(alive, end, y), alive), jnp.where(alive, end, jnp.nan)

    first = _add_primal(system.start(theta), path.jump[0])
    alive = jnp.isfinite(_primal(first)).all()
    rows = (path.time[:-1], jnp.diff(path.time), path.inflow[:-1], path.jump[1:])
    _, rest = jax.lax.scan(interval, (jnp.where(alive, first, 0), alive), rows)
    return jnp.concatenate([jnp.where(alive, first, jnp.nan)[None], rest])


def _primal(y: Array) -> Array:
    """The states themselves among states and sensitivities: row 0 of every leading axis."""
    return y[(0,) * (y.ndim - 1)]


def _add_primal(y: Array, change: Array) -> Array:
    return y.at[(0,) * (y.ndim - 1)].add(change)


def _primal_norm(scaled_error: Array) -> Array:
    """Root mean square over the states only: a value does not depend on what is differentiated."""
    norm = jnp.sqrt(jnp.mean(_primal(scaled_error) ** 2))
    return jnp.where(jnp.isnan(norm), jnp.inf, norm)  # a step out of the domain is tried smaller


class _UnrolledTsit5(diffrax.Tsit5):
    """diffrax's Tsit5 with its seven stages written out: the same numbers, sooner.

    diffrax loops over the stages in many small kernels; this is 2 to 4 times as fast.
    """

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> Any:
        del t1
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        args: Any,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple:
        del made_jump  # none within an interval, so the last stage always is the next first one
        dt, table, slopes = t1 - t0, self.tableau, [solver_state]
        for row, c in zip(table.a_lower, table.c, strict=True):
            y1 = y0 + dt * sum(float(a) * k for a, k in zip(row, slopes, strict=True))
            slopes.append(terms.vf(t0 + float(c) * dt, y1, args))
        error = dt * sum(float(b) * k for b, k in zip(table.b_error, slopes, strict=True))
        dense = dict(y0=y0, y1=y1, k=dt * jnp.stack(slopes))
        return y1, error, dense, slopes[-1], diffrax.RESULTS.successful


def _path(study: Study, states: int, dtype: Any) -> _Path:
    """The events of the study with one column per state instead of one per dosed compartment."""
    events, column = study.events, np.asarray(study.compartments, int) - 1
    time = jnp.asarray(events.time, dtype)
    empty = jnp.zeros((*time.shape, states), dtype)
    return _Path(
        time,
        jump=empty.at[..., column].set(jnp.asarray(events.jump, dtype)),
        inflow=empty.at[..., column].set(jnp.asarray(events.inflow, dtype)),
    )


def _stacked_rhs(rhs: Callable, dtype: Any, t: Array, amount: Array, psi: Any) -> Array:
    derivative = rhs(t, amount, psi)
    if isinstance(derivative, tuple | list):
        derivative = jnp.stack([jnp.asarray(x) for x in derivative])
    return jnp.asarray(derivative, dtype)


def check_psi(psi: Any, study: Study) -> None:
    """Refuses individual parameters that are not `[subject]`."""
    subjects = study.time.shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(psi):
        if jnp.shape(leaf) != (subjects,):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"expected each individual parameter of shape [subject] = ({subjects},); got "
                f"{jnp.shape(leaf)} for {name!r}. fm.individual(study.subjects, ...) gives one "
                "value to each subject."
            )


def _count_states(
    rhs: Callable, psi: Any, study: Study, initial: Array | None, states: int | None, dtype: Any
) -> int:
    """The number of states of `rhs`: said by `states` or `initial`, or else found by trying."""
    subjects = study.time.shape[0]
    if initial is not None:
        shapes = {1: "[state]", 2: "[subject, state]"}
        if initial.ndim not in shapes or (initial.ndim == 2 and initial.shape[0] != subjects):
            raise ValueError(
                f"solve: expected `initial` of shape [state] or [subject, state] with {subjects} "
                f"subjects; got {initial.shape}."
            )
        if states not in (None, initial.shape[-1]):
            raise ValueError(
                f"solve: expected `initial` with {states} states, as `states` says; got "
                f"{initial.shape[-1]} in its last axis."
            )
        states = initial.shape[-1]
    candidates = range(1, _MOST_STATES + 1) if states is None else (states,)
    found: Any = None
    for count in candidates:
        amount = jax.ShapeDtypeStruct((count,), dtype)
        try:
            found = jax.eval_shape(rhs, jax.ShapeDtypeStruct((), dtype), amount, psi).shape
        except (ValueError, TypeError, IndexError) as error:  # wrong number of states for this rhs
            found = error
        if found == (count,):
            break
    else:
        sizes = f"{states}" if states is not None else f"any of 1 to {_MOST_STATES}"
        raise ValueError(
            f"solve: expected a right-hand side that returns one derivative per state, for {sizes} "
            f"states; got, with {count} states, {found!r}. Pass states=... if there are more, and "
            "check what the right-hand side returns."
        ) from (found if isinstance(found, Exception) else None)
    beyond = [c for c in study.compartments if c > count]
    if beyond:
        raise ValueError(
            f"solve: expected doses into compartments 1 to {count}, the states of the right-hand "
            f"side; got doses into compartment {beyond[0]}. Pass states=... if it has more states."
        )
    return count
