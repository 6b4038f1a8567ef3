"""How long something took, and how much of that went to compilation."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.monitoring

# Lowering and compilation (or reading back from the persistent cache); tracing events nest and
# would be counted twice.
_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_spent = [0.0]  # seconds this process has compiled


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in _COMPILING:
        _spent[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class Seconds(NamedTuple):
    """Wall-clock seconds.

    Attributes:
        total: from beginning to end.
        compilation: of these, XLA's.
    """

    total: float
    compilation: float

    def __str__(self) -> str:
        return f"{self.total:.1f} s, of which {self.compilation:.1f} s compilation"


class Clock:
    """Runs from when it is made: `Clock().read()`."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), _spent[0]

    def read(self) -> Seconds:
        return Seconds(time.perf_counter() - self._begun[0], _spent[0] - self._begun[1])
