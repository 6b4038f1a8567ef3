"""How long XLA works on a program: on one that runs for a moment, as briefly as it can.

For a processor XLA has a program of two hundred kernels ready in three seconds; in one, if it
writes them all into one module; in three tenths, if it leaves them as they are. They then run half
as long again, or four times as long. Most fits take less than their own compilation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import wraps
from typing import Any

import jax

from flowme.accelerator import on_accelerator

_ONE_MODULE = {
    "xla_cpu_use_fusion_emitters": False,  # each writes a module of its own
    "xla_cpu_parallel_codegen_split_count": 1,
}
AT_ONCE = {**_ONE_MODULE, "xla_backend_optimization_level": 0}  # for programs that run once
SOON = {**_ONE_MODULE, "xla_backend_optimization_level": 1}  # that run for a few seconds at most
_PAYS = 2e8  # predictions of a record that take as much longer as optimised code is to write
_done: defaultdict[Hashable, float] = defaultdict(float)


def quick(
    function: Callable,
    static_argnums: int | Sequence[int] = (),
    options: Mapping[str, Any] = AT_ONCE,
) -> Callable:
    """`jax.jit` of a function that takes longer to compile than to run, on a processor."""
    plain = jax.jit(function, static_argnums=static_argnums)
    hurried = jax.jit(function, static_argnums=static_argnums, compiler_options=dict(options))

    @wraps(function)
    def call(*arguments: Any) -> Any:
        inside = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
        if inside or on_accelerator():
            return plain(*arguments)
        try:
            return hurried(*arguments)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return plain(*arguments)  # another XLA, which has other options

    return call


def pays(program: Hashable, now: float, ahead: float) -> bool:
    """Whether a program has run for so long, or will, that it is worth optimising.

    It depends on all that was asked about the program, and on no clock: the same fits, in the same
    order, are computed by the same programs.

    Args:
        program: which one.
        now: what it is to do now, in predictions of a record.
        ahead: what it will probably have to do then.
    """
    _done[program] += now
    return on_accelerator() or _done[program] + ahead > _PAYS
