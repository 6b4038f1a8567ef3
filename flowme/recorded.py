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
    """The same function. JAX remembers what was recorded for arrays of one shape, as it does for
    `jax.jit`: nothing but the arguments may change what is computed."""
    program = jax.jit(function, static_argnums=static_argnums)
    static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)

    @wraps(function)
    def replay(*arguments: Any) -> Any:
        leaves = jax.tree.leaves([x for i, x in enumerate(arguments) if i not in static])
        traced = program.trace(*arguments)
        text = traced.jaxpr
        if len(text.in_avals) > len(leaves):  # and what it takes from a program around it
            text = jax.make_jaxpr(program, static_argnums)(*arguments)
        found = _run(text.jaxpr, text.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), found)

    return replay


def _run(program: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """What a program comes to, those that it calls opened."""
    known = dict(zip(program.constvars, constants, strict=True))
    known |= zip(program.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for step in program.eqns:
        given = [read(x) for x in step.invars]
        known |= zip(step.outvars, _step(step.primitive, step.params, given), strict=True)
    return [read(x) for x in program.outvars]


def _step(primitive: Any, params: dict[str, Any], given: list[Any]) -> list[Any]:
    if primitive.name in ("jit", "pjit"):
        inner = params["jaxpr"]
        return _run(inner.jaxpr, inner.consts, given)
    bound = primitive.get_bind_params(params)
    first, bound = bound if isinstance(bound, tuple) else ((), bound)  # before JAX 0.10
    found = primitive.bind(*first, *given, **bound)
    return found if primitive.multiple_results else [found]
