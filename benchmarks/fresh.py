"""A benchmark in processes of its own: one that finds nothing compiled, and the next one."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


def fresh(*command: str, **environment: str) -> Any:
    """What `python *command` prints last, as JSON."""
    found = subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def cold_and_warm(*command: str) -> Iterator[Any]:
    """The same first with JAX's persistent cache empty, then with what that run has left there."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            yield fresh(
                *command,
                JAX_COMPILATION_CACHE_DIR=folder,
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
            )
