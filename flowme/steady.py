"""Steady states: the state that an interval of dosing returns to, with derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

__all__ = ["fixed_point"]

_MOST_STEPS = 30


def fixed_point(
    cycle: Callable[[Array, list[Array], Any], Array], states: int, within: Array
) -> Callable:
    r"""The state A with A = cycle(A, theta, given), as a function of (theta, given).

    By Newton's method from 0, which needs one step where the cycle is linear. It ends when a step
    changes A by less than `within` of it, so that the error left is of the order of the square of
    that, besides the cycle's own; `within` must be well above the cycle's own. NaN if it has not
    ended after 30 steps: there is no steady state, for instance where more is given than can be
    eliminated.

    Derivatives are those of the implicit equation,
    :math:`(I - \partial cycle / \partial A)\, dA = \partial cycle / \partial \theta\, d\theta`,
    of any order that `cycle` has, plus one evaluation of each.
    """

    @jax.custom_jvp
    def find(theta: list[Array], given: Any) -> Array:
        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            state, _, count = carry
            after, slope = _with_jacobian(lambda s: cycle(s, theta, given), state)
            change = jnp.linalg.solve(jnp.eye(states) - slope, after - state)
            size = jnp.abs(change).max() / jnp.maximum(jnp.abs(state + change).max(), tiny)
            return state + change, size, count + 1

        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            _, size, count = carry
            return (size > within) & (count < _MOST_STEPS)

        dtype = jnp.result_type(float)
        tiny = jnp.finfo(dtype).tiny
        begin = (jnp.zeros(states, dtype), jnp.asarray(jnp.inf, dtype), jnp.asarray(0))
        state, size, _ = jax.lax.while_loop(unfinished, step, begin)
        return jnp.where(size <= within, state, jnp.nan)

    @partial(find.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        theta, given = primals
        state = find(theta, given)
        active = [not isinstance(x, SymbolicZero) for x in tangents[0]]
        if not any(active):
            return state, jnp.zeros_like(state)

        def after(state: Array, chosen: list[Array]) -> Array:
            new = iter(chosen)
            merged = [next(new) if on else x for x, on in zip(theta, active, strict=True)]
            return cycle(state, merged, given)

        chosen = [x for x, on in zip(theta, active, strict=True) if on]
        along = [x for x, on in zip(tangents[0], active, strict=True) if on]
        _, push = jax.linearize(after, state, chosen)  # one solve for both derivatives
        none = jax.tree.map(jnp.zeros_like, chosen)
        slope = jax.vmap(lambda s: push(s, none), out_axes=1)(jnp.eye(states))
        change = push(jnp.zeros_like(state), along)
        return state, jnp.linalg.solve(jnp.eye(states) - slope, change)

    return find


def _with_jacobian(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    def twice(x: Array) -> tuple[Array, Array]:
        value = function(x)
        return value, value

    slope, value = jax.jacfwd(twice, has_aux=True)(x)
    return value, slope
