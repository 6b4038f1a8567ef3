"""How long XLA works on a program: on one that runs for a moment, as briefly as it can.

For a processor XLA has a program of two hundred kernels ready in three seconds; in one, if it
writes them all into one module; in three tenths, if it leaves them as they are. They then run half
as long again, or four times as long. Most fits take less than their own compilation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import jax

from flowme.accelerator import on_accelerator

_ONE_MODULE = {
    "xla_cpu_use_fusion_emitters": False,  # each writes a module of its own
    "xla_cpu_parallel_codegen_split_count": 1,
}
AT_ONCE: dict[str, Any] = {**_ONE_MODULE, "xla_backend_optimization_level": 0}
SOON: dict[str, Any] = {**_ONE_MODULE, "xla_backend_optimization_level": 1}
_WORTH = 3e7, 3e8  # predictions of a record from which on more optimisation pays
_unknown: set[str] = set()  # options that this XLA does not have
_done: WeakKeyDictionary[Any, dict[Hashable, float]] = WeakKeyDictionary()


def quick(
    function: Callable,
    static_argnums: int | Sequence[int] = (),
    options: dict[str, Any] = AT_ONCE,
) -> Callable:
    """`jax.jit` of a function that takes longer to compile than to run, on a processor."""
    plain = jax.jit(function, static_argnums=static_argnums)

    @cache
    def hurried(unknown: frozenset[str]) -> Callable:
        known = {name: value for name, value in options.items() if name not in unknown}
        return jax.jit(function, static_argnums=static_argnums, compiler_options=known)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
        if inside or on_accelerator():
            return plain(*arguments)
        try:
            return hurried(frozenset(_unknown))(*arguments)
        except ValueError as error:
            if "top-level" not in str(error):
                raise
            return plain(*arguments)  # inside another program, which has none of its arguments
        except jax.errors.JaxRuntimeError as error:
            name = re.search("No such compile option: '(.*?)'", str(error))
            if name is None or name[1] in _unknown:
                raise
            _unknown.add(name[1])
            return call(*arguments)

    return call


soon = partial(quick, options=SOON)


def tiers(function: Callable, static_argnums: int | Sequence[int] = ()) -> tuple[Callable, ...]:
    """The function compiled with ever more care, for `tier` to choose from."""
    optimised = jax.jit(function, static_argnums=static_argnums)
    return quick(function, static_argnums), soon(function, static_argnums), optimised


def begun(model: Any, program: Hashable, work: float) -> float:
    """How much a program of a model had to do in this process, what is about to begin included;
    forgotten with the model."""
    done = _done.setdefault(model, {})
    done[program] = done.get(program, 0.0) + work
    return done[program]


def serves() -> int:
    """How often a program will be used: more than once where JAX keeps it on a disk."""
    return 10 if jax.config.jax_compilation_cache_dir else 1  # type: ignore[attr-defined]


def tier(work: float) -> int:
    """With how much care to compile a program that predicts so many records: 0, 1, or 2."""
    return 2 if on_accelerator() else sum(work > worth for worth in _WORTH)
