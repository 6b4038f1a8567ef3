"""Linear systems with doses, exactly: by the matrix exponential between events."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flowme.exponential import exponentials
from flowme.integrate import event_step
from flowme.schedule import Dosing, cycle, moving_events, schedule
from flowme.structural import check_compartments, check_dosing, check_psi
from flowme.study import Study

__all__ = ["solve_linear"]


def solve_linear(
    matrix: Callable[[Any], Any],
    psi: Any,
    study: Study,
    *,
    initial: Any = None,
    lag: Any = None,
    bioavailability: Any = None,
) -> Array:
    r"""State of each subject's linear system at each of its times, with its doses.

    Solves, exactly and whatever its stiffness,

    .. math:: \frac{dA_i}{dt} = K(\psi_i) A_i + r_i(t), \qquad A_i(t_d^+) = A_i(t_d^-) + D_d,

    with boluses :math:`D_d` and infusions :math:`r_i`, from event to event by

    .. math:: \begin{pmatrix} A(t + h) \\ 1 \end{pmatrix} = \exp\left( h
        \begin{pmatrix} K & r \\ 0 & 0 \end{pmatrix} \right)
        \begin{pmatrix} A(t) \\ 1 \end{pmatrix}.

    The steady state (SS = 1) solves A = M A + b, where M and b are those of one interval of
    dosing. Records, doses and resets are as in `fm.solve`. Any transformation of JAX applies.

    Args:
        matrix: `matrix(psi_i) -> K` of one subject, `[state, state]` (1/time), the leaves of
            `psi_i` being scalars; an array, or rows of scalars.
        psi: individual parameters, a pytree (named tuple) of arrays `[subject]`; or
            `[subject, time]`, in force from each record to the next.
        study: the `Study`; doses into compartment c are added to state c - 1.
        initial: state at the first row of each subject, `[state]` or `[subject, state]`; zeros if
            None.
        lag: as in `fm.solve`.
        bioavailability: as in `fm.solve`.

    Returns:
        Amounts, `[subject, time, state]`. NaN where the entries of K times an interval exceed
        about 4e5: then something happens at once, and belongs out of the model.

    Raises:
        ValueError: if `matrix` is not square, or `psi`, `initial` or a dose do not fit it.

    References:
        Moler and Van Loan, Nineteen dubious ways to compute the exponential of a matrix,
        SIAM Review 45 (2003); `flowme.exponential` has the one taken.
    """
    psi = jax.tree.map(jnp.asarray, psi)
    check_psi(psi, study, changing=True)
    dtype = jnp.result_type(float)
    changes = any(leaf.ndim == 2 for leaf in jax.tree.leaves(psi))
    times = study.time.shape[1] if changes else 1
    rows = [jnp.broadcast_to(x.reshape(len(x), -1), (len(x), times)) for x in jax.tree.leaves(psi)]
    each = jax.tree.unflatten(jax.tree.structure(psi), rows)
    rates = jax.vmap(jax.vmap(lambda now: _as_matrix(matrix(now), dtype)))(each)
    states, subjects = _square(rates), study.time.shape[0]
    check_compartments("solve_linear", study, states)
    initial = jnp.zeros(states, dtype) if initial is None else jnp.asarray(initial, dtype)
    if initial.shape not in ((states,), (subjects, states)):
        raise ValueError(
            f"solve_linear: expected `initial` of shape [state] = ({states},) or [subject, state] "
            f"= ({subjects}, {states}), as the matrix has {states} rows; got {initial.shape}."
        )
    start = jnp.broadcast_to(initial, (subjects, states))
    dosing = check_dosing(lag, bioavailability, study, states)
    which = jnp.broadcast_to(jnp.arange(study.time.shape[1]) if changes else 0, study.time.shape)
    timing, record = schedule(study, dosing, states, dtype, which)
    fed = bool(study.doses.infusions.shape[1])
    amounts = jax.vmap(partial(_trajectory, fed))(rates, dosing, start, timing)
    return jnp.take_along_axis(amounts, record[:, :, None], axis=1)


def _trajectory(fed: bool, rates: Array, dosing: Dosing, start: Array, timing: Any) -> Array:
    """State after each event of one subject, `[event, state]`; `fed` if there are infusions."""
    fixed, data = timing
    states = start.size

    def steady(at: tuple[Any, Array]) -> Array:
        """The solution of A = M A + b, of one interval of dosing."""
        given, dose = at
        events = cycle(dosing, given, dose, states)
        events["which"] = jnp.broadcast_to(given.which[given.first[dose]], 4)
        M, b = jnp.eye(states, dtype=rates.dtype), jnp.zeros(states, rates.dtype)
        moves, gains = _propagators(fed, rates, events)
        for move, gain, jump in zip(moves[:-1], gains[:-1], events["jump"][1:], strict=True):
            M, b = move @ M, move @ b + gain + jump
        return jnp.linalg.solve(jnp.eye(states) - M, b)

    events = fixed | moving_events(dosing, data, start, steady)
    moves, gains = _propagators(fed, rates, events)

    def step(state: Array, row: tuple[Array, Array, Any]) -> tuple[Array, Array]:
        move, gain, event = row
        state = event_step(event, move @ state + gain, start)
        return state, state

    first = event_step(jax.tree.map(lambda x: x[0], events), start, start)
    rest = (moves[:-1], gains[:-1], jax.tree.map(lambda x: x[1:], events))
    return jnp.concatenate([first[None], jax.lax.scan(step, first, rest)[1]])


def _propagators(fed: bool, rates: Array, events: dict[str, Array]) -> tuple[Array, Array]:
    """From each event to the next, A(t + h) = M A(t) + b: M `[event, state, state]`, and b, of the
    infusions in force, `[event, state]`."""
    matrices, states = rates[events["which"]], rates.shape[-1]
    if fed:  # one more row and column
        matrices = jnp.pad(matrices, ((0, 0), (0, 1), (0, 1)))
        matrices = matrices.at[:, :states, states].set(events["inflow"])
    found = exponentials(events["dt"][:, None, None] * matrices)[:, :states]
    return found[..., :states], found[..., states:].sum(-1)


def _as_matrix(rates: Any, dtype: Any) -> Array:
    if isinstance(rates, tuple | list):
        rows = [jnp.stack([jnp.asarray(x, dtype) for x in row]) for row in rates]
        rates = jnp.stack(rows)
    return jnp.asarray(rates, dtype)


def _square(rates: Array) -> int:
    """The number of states; `rates` are [subject, time, state, state]."""
    if rates.ndim != 4 or rates.shape[2] != rates.shape[3]:
        raise ValueError(
            "solve_linear: expected a matrix [state, state] of one subject; got shape "
            f"{rates.shape[2:]}."
        )
    return rates.shape[2]
