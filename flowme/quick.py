"""How long XLA works on a program: on one that runs for a moment, as briefly as it can.

For a processor XLA has a program of two hundred kernels ready in three seconds; in one, if it
writes them all into one module; in three tenths, if it leaves them as they are. They then run half
as long again, or four times as long. Most fits take less than their own compilation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cache, wraps
from typing import Any

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
_done: defaultdict[Hashable, float] = defaultdict(float)


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
        except jax.errors.JaxRuntimeError as error:
            name = re.search("No such compile option: '(.*?)'", str(error))
            if name is None or name[1] in _unknown:
                raise
            _unknown.add(name[1])
            return call(*arguments)

    return call


def tiers(function: Callable, static_argnums: int | Sequence[int] = ()) -> tuple[Callable, ...]:
    """The function compiled with ever more care, for `tier` to choose from."""
    hurried = (quick(function, static_argnums, options) for options in (AT_ONCE, SOON))
    return *hurried, jax.jit(function, static_argnums=static_argnums)


def tier(program: Hashable, now: float, ahead: float) -> int:
    """With how much care to compile a program: 0, 1, or 2, by what it has to do.

    It depends on all that was asked about the program, and on no clock: the same fits, in the same
    order, are computed by the same programs.

    Args:
        program: which one.
        now: what it is to do now, in predictions of a record.
        ahead: what a whole fit takes, probably.
    """
    if on_accelerator():
        return 2
    _done[program] += now
    expected = max(_done[program], ahead)
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        expected *= 10  # what is compiled is kept, and will serve again
    return sum(expected > worth for worth in _WORTH)
