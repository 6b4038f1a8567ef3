"""A function as the primitives that it comes to: written once, replayed wherever it is asked for.

Each function of jax.numpy is a program of its own, and JAX differentiates and maps every one apart:
that takes longer than the model itself. Of what is recorded primitives alone are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal


def recorded(function: Callable, static_argnums: int | tuple[int, ...] = ()) -> Callable:
    """The same function, of some arguments to a tree of arrays and what follows from it:
    `x, then = function(*arguments)` and `then(x)`, for any x of that tree.

    JAX remembers what was recorded for arguments of one shape, as it does for `jax.jit`: nothing
    else may change what is computed.
    """

    def whole(*arguments: Any) -> Any:
        x, then = function(*arguments)
        x = jax.lax.optimization_barrier(x)  # the end of the first part
        return x, then(x)

    program = jax.jit(whole, static_argnums=static_argnums)
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)

    @wraps(function)
    def replay(*arguments: Any) -> tuple[Any, Callable]:
        given = jax.tree.leaves([x for i, x in enumerate(arguments) if i not in static])
        traced = program.trace(*arguments)
        tree, text = jax.tree.structure(traced.out_info), traced.jaxpr
        if len(text.in_avals) > len(given):  # with what it takes from a program around it
            around = jax.make_jaxpr(program, static_argnums)(*arguments)
            (call,) = around.jaxpr.eqns
            known = _known(around, given)
            text, given = call.params["jaxpr"], [_read(atom, known) for atom in call.invars]
        known = _known(text, given)
        first, end, second = _parts(text.jaxpr)
        _run(first, known)

        def then(x: Any) -> Any:
            now = known | dict(zip(end.outvars, jax.tree.leaves(x), strict=True))
            _run(second, now)
            return jax.tree.unflatten(tree, [_read(atom, now) for atom in text.jaxpr.outvars])[1]

        x = [_read(atom, known) for atom in end.invars]
        return jax.tree.unflatten(jax.tree.structure(traced.out_info[0]), x), then

    return replay


def _parts(program: Jaxpr) -> tuple[list[Any], Any, list[Any]]:
    """The steps before the end of the first part, or beside it; that end; and those after it."""
    (end,) = (step for step in program.eqns if program.outvars[0] in step.outvars)
    after, first, second = set(end.outvars), [], []
    for step in program.eqns:
        if any(atom in after for atom in step.invars if not isinstance(atom, Literal)):
            second.append(step)
            after.update(step.outvars)
        elif step is not end:
            first.append(step)
    return first, end, second


def _known(text: Any, arguments: Sequence[Any]) -> dict[Any, Any]:
    known = dict(zip(text.jaxpr.constvars, text.consts, strict=True))
    return known | dict(zip(text.jaxpr.invars, arguments, strict=True))


def _read(atom: Any, known: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else known[atom]


def _run(steps: Sequence[Any], known: dict[Any, Any]) -> None:
    """Adds what these steps come to, the programs that they call opened."""
    for step in steps:
        given = [_read(atom, known) for atom in step.invars]
        known |= zip(step.outvars, _step(step.primitive, step.params, given), strict=True)


def _step(primitive: Any, params: dict[str, Any], given: list[Any]) -> list[Any]:
    if primitive.name in ("jit", "pjit"):
        inner = params["jaxpr"]
        known = _known(inner, given)
        _run(inner.jaxpr.eqns, known)
        return [_read(atom, known) for atom in inner.jaxpr.outvars]
    bound = primitive.get_bind_params(params)
    first, bound = bound if isinstance(bound, tuple) else ((), bound)  # before JAX 0.10
    found = primitive.bind(*first, *given, **bound)
    return found if primitive.multiple_results else [found]
