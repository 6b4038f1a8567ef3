"""Structural models as ODEs: individual parameters and doses to states, with derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from flowme.integrate import differentiable, system_of
from flowme.schedule import Dosing, cycle, dosing_of, moving_events, schedule
from flowme.steady import fixed_point
from flowme.study import Occasions, Study

__all__ = ["solve"]

_MOST_STATES = 20


def solve(
    rhs: Callable[[Array, Array, Any], Any],
    psi: Any,
    study: Study,
    *,
    initial: Any = None,
    states: int | None = None,
    lag: Any = None,
    bioavailability: Any = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: Any = None,
    atol: Any = None,
    max_steps: int = 256,
    occasions: Occasions | None = None,
) -> Array:
    r"""State of each subject's ODE at each of its times, with its doses.

    Solves, subject by subject and with that subject's own steps,

    .. math:: \frac{dA_i}{dt} = f(t, A_i, \psi_i) + r_i(t), \qquad
        A_i(t_d^+) = A_i(t_d^-) + D_d,

    where :math:`D_d` are boluses and :math:`r_i` the infusions in force. The solver lands on every
    record and dose. A record before a dose row of the same time sees the state before the dose.
    A reset (EVID 3, 4) returns to the initial state. A dose at steady state (SS = 1) begins at
    the state A that an interval of dosing returns to, found by Newton's method to the tolerance
    of the solver, in one step if f is linear.

    Derivatives of any order, forward or reverse, with respect to `psi`, `initial`, `lag`,
    `bioavailability` and anything `rhs` closes over, come from the sensitivity equations, solved
    in the same steps: :math:`\dot S = (\partial f/\partial A) S + \partial f/\partial \psi`. An
    event that moves by :math:`dt_d` adds :math:`(f^- - f^+)\,dt_d`: this comes from the lengths
    of the intervals, which are parameters like the others. Where a moving dose meets a record,
    the derivative is that of the order in the table. `study` is data and has no derivatives.

    Parameters that change in time, :math:`\psi_i(t)`, hold from each record to the next (last
    value carried forward; a steady state is that of the parameters at its dose). They have a
    sensitivity equation for every record, which is dear: where they change between occasions
    only, say so by `occasions`; and let covariates that change in time be leaves of `psi` by
    themselves, for what is not differentiated costs nothing.

    A subject whose solve fails (`max_steps` reached, a non-finite state, no steady state, or an
    infusion or lag longer than the interval of its steady state) is NaN from the failing interval
    on, and those NaN add nothing to a gradient; the other subjects are untouched.

    Args:
        rhs: `rhs(t, amount, psi_i) -> d amount / dt` of one subject, `amount` being `[state]` and
            the leaves of `psi_i` scalars; returns an array, or a tuple or list of scalars.
        psi: individual parameters, a pytree (named tuple) of arrays `[subject]`, or
            `[subject, time]`.
        study: the `Study`; doses into compartment c are added to state c - 1.
        initial: state at the first row of each subject, `[state]` or `[subject, state]`; zeros if
            None.
        states: number of states; if None, the smallest with which `rhs` returns as many
            derivatives.
        lag: time by which doses come later, 0 or more: `[subject]`, or `[subject, time]`, of which
            a dose has that of its record; or a mapping from compartment to these, for the doses
            into it. At steady state at most the interval.
        bioavailability: part of each dose that arrives, 0 or more: likewise. An infusion whose
            rate is known keeps its rate, for another time; one whose duration is known keeps that.
        solver: a diffrax solver; Tsitouras' 5(4) if None, `diffrax.Kvaerno5()` when stiff.
        rtol: relative tolerance of a step; 1e-8 if None, or 1e-5 without `jax_enable_x64`.
        atol: absolute tolerance (amount); 1e-10 if None, or 1e-6 without `jax_enable_x64`.
        max_steps: most steps of the solver between two consecutive rows.
        occasions: of `study.occasions` those between which alone `psi` changes; a subject whose
            parameters change within one is NaN.

    Returns:
        Amounts, `[subject, time, state]`.

    Raises:
        ValueError: if `psi`, `initial` or `states` do not fit `rhs` and `study`.

    References:
        Hindmarsh et al., SUNDIALS (2005), section 3.2: forward sensitivity analysis.
    """
    psi = jax.tree.map(jnp.asarray, psi)
    check_psi(psi, study, changing=True)
    initial = None if initial is None else jnp.asarray(initial)
    dtype = jnp.result_type(float)  # jax_enable_x64 decides, as it does for diffrax
    individual = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), psi)
    stacked = partial(_stacked_rhs, rhs, dtype)
    states = _count_states(stacked, individual, study, initial, states, dtype)
    # Everything rhs closes over becomes an argument, so that it is differentiated (and batched)
    # as psi is; custom_jvp would not see it otherwise.
    time, amount = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((), (states,)))
    closed, static = eqx.partition(
        eqx.filter_closure_convert(stacked, time, amount, individual), eqx.is_array
    )
    double = dtype == jnp.float64
    tolerance = (
        jnp.asarray((1e-8 if double else 1e-5) if rtol is None else rtol, dtype),
        jnp.asarray((1e-10 if double else 1e-6) if atol is None else atol, dtype),
    )
    if initial is None:
        initial = jnp.zeros(states, dtype)
    start = jnp.broadcast_to(initial.astype(dtype), (study.time.shape[0], states))
    dosing = check_dosing(lag, bioavailability, study, states)
    psi, which = in_force(psi, study, occasions)

    def trajectory(psi_i: Any, dosing_i: Dosing, start_i: Array, timing: Any) -> Array:
        theta, structure = jax.tree.flatten((start_i, dosing_i, psi_i, closed))

        def field(event: Any, t: Array, y: Array, theta: list[Array]) -> Array:
            _, _, psi_i, closed = jax.tree.unflatten(structure, theta)
            now = jax.tree.map(lambda x: x[event["which"]] if x.ndim else x, psi_i)
            return eqx.combine(closed, static)(t, y, now)

        def dosing_of_theta(theta: list[Array]) -> Dosing:
            return jax.tree.unflatten(structure, theta)[1]

        run = partial(differentiable, solver=solver, max_steps=max_steps)

        def after_interval(state: Array, theta: list[Array], data: Any) -> Array:
            """The state an interval of dosing later, for the steady state."""

            def repeated(theta: list[Array], data: Any) -> dict[str, Array]:
                given, dose = data
                return cycle(dosing_of_theta(theta), given, dose, states)

            given, dose = data
            always = {"which": jnp.broadcast_to(given.which[given.first[dose]], 4)}
            system = system_of(field, repeated)
            return run(system)([state, *theta[1:]], ((always, data), tolerance))[-1]

        def moving(theta: list[Array], data: Any) -> dict[str, Array]:
            def steady(dose: Any) -> Array:
                within = jnp.maximum(100 * tolerance[0], 1e-6)
                return fixed_point(after_interval, states, within)(theta, dose)

            return moving_events(dosing_of_theta(theta), data, theta[0], steady)

        return run(system_of(field, moving))(theta, (timing, tolerance))

    timing, record = schedule(study, dosing, states, dtype, which)
    amounts = jax.vmap(trajectory)(psi, dosing, start, timing)
    return jnp.take_along_axis(amounts, record[:, :, None], axis=1)


def _stacked_rhs(rhs: Callable, dtype: Any, t: Array, amount: Array, psi: Any) -> Array:
    derivative = rhs(t, amount, psi)
    if isinstance(derivative, tuple | list):
        derivative = jnp.stack([jnp.asarray(x) for x in derivative])
    return jnp.asarray(derivative, dtype)


def check_psi(psi: Any, study: Study, changing: bool = False) -> None:
    """Refuses individual parameters that are not `[subject]`, nor `[subject, time]` if that may
    be."""
    subjects, times = study.time.shape
    allowed = [(subjects,), (subjects, times)] if changing else [(subjects,)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(psi):
        if jnp.shape(leaf) not in allowed:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shapes = f"[subject] = ({subjects},)"
            shapes += f" or [subject, time] = ({subjects}, {times})" if changing else ""
            advice = "fm.individual(study.subjects, ...) gives one value to each subject"
            if not changing and jnp.shape(leaf) == (subjects, times):
                advice = "fm.solve and fm.solve_linear take parameters that change in time"
            raise ValueError(
                f"expected each individual parameter of shape {shapes}; got "
                f"{jnp.shape(leaf)} for {name!r}. {advice}."
            )


def in_force(psi: Any, study: Study, occasions: Occasions | None) -> tuple[Any, Array]:
    """Individual parameters that change in time, by occasion or record, and which of them are in
    force at each record, `[subject, time]`."""
    size = study.time.shape
    if occasions is None:
        return psi, jnp.broadcast_to(jnp.arange(size[1]), size)
    if jnp.shape(occasions.index) != size:
        raise ValueError(
            f"expected occasions of this study, [subject, time] = {size}; got "
            f"{jnp.shape(occasions.index)}."
        )
    index = jnp.asarray(occasions.index)
    begin = jnp.argmax(index[:, None] == jnp.arange(occasions.most)[:, None], axis=-1)

    def by_occasion(leaf: Array) -> Array:
        if leaf.ndim == 1:
            return leaf
        first = jnp.take_along_axis(leaf, begin, axis=1)
        same = jnp.all(jnp.take_along_axis(first, index, axis=1) == leaf, axis=1, keepdims=True)
        return jnp.where(same, first, jnp.nan)

    return jax.tree.map(by_occasion, psi), index


def check_dosing(lag: Any, bioavailability: Any, study: Study, states: int) -> Dosing:
    """Refuses lags and bioavailabilities of another shape, or of no compartment."""
    dosing = dosing_of(lag, bioavailability)
    for name, values in dosing._asdict().items():
        for compartment, value in values.items():
            check_psi({name: value}, study, changing=True)
            if compartment not in range(states + 1):
                raise ValueError(
                    f"solve: expected {name} of compartments 1 to {states}; got {compartment}."
                )
    return dosing


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
    check_compartments("solve", study, count)
    return count


def check_compartments(verb: str, study: Study, states: int) -> None:
    """Refuses doses into a compartment that is no state."""
    beyond = [c for c in study.compartments if c > states]
    if beyond:
        raise ValueError(
            f"{verb}: expected doses into compartments 1 to {states}, the states of the model; "
            f"got a dose into compartment {beyond[0]}{study.row_of_dose(beyond[0])}. Number the "
            "compartments as the states, or pass states=... if there are more."
        )
