"""A benchmark in processes of its own: one that finds nothing compiled, and the next one."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


def cold_and_warm(*command: str) -> Iterator[Any]:
    """What `python *command` prints last, as JSON: first with JAX's persistent cache empty, then
    with what that run has left there."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for _ in range(2):
            found = subprocess.run(
                [sys.executable, *command],
                env=os.environ | cache, check=True, capture_output=True, text=True,
            )  # fmt: skip
            yield json.loads(found.stdout.splitlines()[-1])
