"""Whether a program is being written for a processor or for an accelerator."""

from typing import Any

import jax

__all__ = ["on_accelerator"]


def on_accelerator() -> bool:
    """Whether programs traced now will run on a GPU or TPU: on `jax.default_device`, or where JAX
    runs by itself."""
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() != "cpu"
    return (device if isinstance(device, str) else device.platform) != "cpu"
