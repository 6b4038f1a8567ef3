"""A function of small arrays for many rows at once, written out element by element, rows last.

`jax.vmap` puts rows first and keeps small arrays whole: `[row, state]`, of which a compiled
program gathers and scatters pieces. Written out, each element is an array `[row]` of its own and
each operation a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

__all__ = ["written_out"]

_MANY = 256  # elements of an array that are written out; beyond, a program gets long
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg not or pow rem round "
    "rsqrt select_n sign sin sinh sqrt square sub tan tanh xor".split()
)
_CALLS = {
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
}


def written_out(size: int, function: Callable, *axes: Any) -> Callable:
    """`jax.vmap(function, axes, out_axes=-1, axis_size=size)`, without derivatives.

    Args:
        size: rows.
        function: of small arrays, to one array.
        axes: a tree like the arguments, or a prefix of it: -1 where an argument has rows, last;
            None where all rows share it.
    """

    @jax.jit  # its text is there once, however often it is called
    def rows(*args: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(args)
        is_axis = partial(jax.tree.map, is_leaf=lambda x: x is None)
        spread: list[Any] = []
        is_axis(lambda axis, part: spread.extend([axis] * len(jax.tree.leaves(part))), axes, args)
        one = [
            jax.ShapeDtypeStruct(x.shape if axis is None else x.shape[:-1], x.dtype)
            for x, axis in zip(leaves, spread, strict=True)
        ]
        program = jax.make_jaxpr(function)(*jax.tree.unflatten(tree, one))
        least, most = _sizes(program.jaxpr)
        if least == 0 or most > _MANY:
            return jax.vmap(function, axes, out_axes=-1, axis_size=size)(*args)
        given = [_elements(x, shape.shape) for x, shape in zip(leaves, one, strict=True)]
        (found,) = _run(program.jaxpr, program.consts, given)
        (out,) = program.out_avals
        each = [jnp.broadcast_to(jnp.asarray(x, out.dtype), (size,)) for x in found.ravel()]
        return jnp.stack(each).reshape(*found.shape, size)

    return rows


def _sizes(jaxpr: Jaxpr) -> tuple[int, int]:
    """Elements of the smallest and of the largest array of a program."""
    variables: list[Any] = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    sizes = [int(np.prod(v.aval.shape)) for v in variables]
    return min(sizes, default=0), max(sizes, default=0)


def _elements(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The elements of `x`, an array of objects: numbers, or arrays `[row]`."""
    found = np.empty(shape, object)
    for place in np.ndindex(*shape):
        found[place] = x[place] if shape else x
    return found


def _boxed(x: Any) -> np.ndarray:
    """An array of objects, also where it holds a single one."""
    if isinstance(x, np.ndarray) and x.dtype == object:
        return x
    found = np.empty((), object)
    found[()] = x
    return found


def _whole(elements: np.ndarray, aval: Any) -> jax.Array:
    """The array `[..., row]` or `[...]` of its elements."""
    parts = jnp.broadcast_arrays(*[jnp.asarray(x, aval.dtype) for x in elements.ravel()])
    return jnp.stack(parts).reshape(*elements.shape, *parts[0].shape)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A program, applied to elements."""
    known = dict(zip(jaxpr.invars, args, strict=True))
    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        known[variable] = _elements(value, np.shape(value))

    def read(atom: Any) -> np.ndarray:
        if isinstance(atom, Literal):
            dtype: Any = atom.aval.dtype  # type: ignore[attr-defined]
            return _elements(np.asarray(atom.val, dtype)[()], ())
        return known[atom]

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in _ELEMENTWISE:
            found = [_each(partial(_apply, eqn), values)]
        elif name in _STRUCTURES:
            found = _STRUCTURES[name](values, eqn)
        elif name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            found = _run(inner.jaxpr, inner.consts, values)
        else:
            found = _kept_whole(jaxpr, eqn, values)
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _each(apply: Callable, values: Sequence[np.ndarray]) -> np.ndarray:
    """`apply` to the elements of arrays, broadcast against each other."""
    values = np.broadcast_arrays(*values)
    found = np.empty(values[0].shape, object)
    for place in np.ndindex(*found.shape):
        found[place] = apply(*(x[place] for x in values))
    return found


def _is(x: Any, number: float) -> bool:
    return isinstance(x, np.generic | float | int) and x == number


def _apply(eqn: Any, *values: Any) -> Any:
    """One operation on one element; none where a term is 0 or a factor 1."""
    name = eqn.primitive.name
    if name in ("add", "add_any"):
        return _plus(*values)
    if name == "sub" and _is(values[1], 0):
        return values[0]
    if name == "mul":
        for x, y in (values, values[::-1]):
            if _is(x, 1):
                return y
    alike = jnp.broadcast_arrays(*values) if len(values) > 1 else values
    return eqn.primitive.bind(*alike, **eqn.params)


def _plus(x: Any, y: Any) -> Any:
    if _is(x, 0):
        return y
    return x if _is(y, 0) else jax.lax.add(*jnp.broadcast_arrays(x, y))


def _kept_whole(jaxpr: Jaxpr, eqn: Any, values: list[np.ndarray]) -> list[np.ndarray]:
    """An operation of a program that is not written out: of arrays, rows last."""
    pairs = [
        (atom, x) for atom, x in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, Literal)
    ]  # fmt: skip
    arrays = [_whole(x, atom.aval) for atom, x in pairs]
    alone = jaxpr.replace(
        constvars=[], invars=[atom for atom, _ in pairs], outvars=eqn.outvars, eqns=[eqn]
    )
    run = jaxpr_as_fun(ClosedJaxpr(alone, ()))
    axes = [
        -1 if x.ndim > len(atom.aval.shape) else None
        for (atom, _), x in zip(pairs, arrays, strict=True)
    ]
    if any(axes):
        run = jax.vmap(run, axes, out_axes=-1)
    return [_elements(x, v.aval.shape) for x, v in zip(run(*arrays), eqn.outvars, strict=True)]


def _sum(values: list[np.ndarray], eqn: Any) -> list[np.ndarray]:
    (x,), axes, zero = values, eqn.params["axes"], eqn.outvars[0].aval.dtype.type(0)
    rest = np.moveaxis(x, axes, range(len(axes))).reshape(-1, *eqn.outvars[0].aval.shape)
    return [_each(lambda *terms: reduce(_plus, terms, zero), [_boxed(part) for part in rest])]


def _placed(values: list[np.ndarray], eqn: Any) -> list[np.ndarray]:
    """broadcast_in_dim"""
    x, shape = values[0], eqn.params["shape"]
    wide = np.ones(len(shape), int)
    wide[list(eqn.params["broadcast_dimensions"])] = x.shape
    return [np.broadcast_to(x.reshape(wide), shape)]


def _reshaped(x: np.ndarray, eqn: Any) -> np.ndarray:
    order = eqn.params["dimensions"]  # in which the axes are read
    x = x if order is None else np.transpose(x, order)
    return x.reshape(eqn.params["new_sizes"])


def _sliced(values: list[np.ndarray], eqn: Any) -> list[np.ndarray]:
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(start)
    return [values[0][tuple(slice(*at) for at in zip(start, stop, steps, strict=True))]]


def _divided(values: list[np.ndarray], eqn: Any) -> list[np.ndarray]:
    cuts = np.cumsum(eqn.params["sizes"])[:-1]
    return np.split(values[0], cuts, axis=eqn.params["axis"])


_STRUCTURES: dict[str, Callable[[list[np.ndarray], Any], list[np.ndarray]]] = {
    "broadcast_in_dim": _placed,
    "concatenate": lambda x, eqn: [np.concatenate(x, axis=eqn.params["dimension"])],
    "reduce_sum": _sum,
    "reshape": lambda x, eqn: [_reshaped(x[0], eqn)],
    "rev": lambda x, eqn: [np.flip(x[0], eqn.params["dimensions"])],
    "slice": _sliced,
    "split": _divided,
    "stack": lambda x, eqn: [np.stack(x, axis=eqn.params["axis"])],
    "squeeze": lambda x, eqn: [np.squeeze(x[0], tuple(eqn.params["dimensions"]))],
    "transpose": lambda x, eqn: [np.transpose(x[0], eqn.params["permutation"])],
    "unstack": lambda x, eqn: [_boxed(part) for part in np.moveaxis(x[0], eqn.params["axis"], 0)],
}
