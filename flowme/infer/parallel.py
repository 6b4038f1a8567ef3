"""Who evaluates which subjects: chunk by chunk, on several devices, in several processes.

Subjects are independent given θ. A chunk of them is one call of a compiled program; chunks are
numbered, and a chunk's random numbers depend on its number.

- Every local device has a chunk at a time: D chunks are one array `[chunk, subject, ...]`, sharded
  over a mesh (`jax.sharding`), and the program is mapped over it (`jax.shard_map`). Devices then
  exchange nothing. (Left to XLA, one chunk divided over two devices exchanged values at every
  node: it took twice as long as on one.)
- Of P processes (`jax.distributed`) each holds the study, evaluates every P-th chunk, and then
  receives what the others found.

Results are put together in the order of the chunks, so they do not depend on devices or processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SUBJECT = PartitionSpec("subject")


def by_chunk(
    program: Callable[[Any, Any, Any], tuple[Any, Any]],
    static: Any,
    shared: Any,
    subjects: Any,
    size: int,
    then: Callable[[Any], Any] = lambda found: found,
) -> tuple[Any, Any]:
    """Something of every subject and something in total, from `size` subjects at a time.

    Args:
        program: `(static, shared, (number, real, part))` -> `(each, total)`, pytrees of arrays;
            compiled, `static` being static. `part` is a chunk's part of `subjects`, filled up with
            its first ones to a length that is the same for all chunks; `real` is 1 for its own
            subjects, 0 for the filling.
        static: hashable.
        shared: a pytree, the same for all chunks.
        subjects: a pytree of arrays `[subject, ...]`: a study and what goes with it.
        size: subjects in a chunk.
        then: what a chunk's result is reduced to on the host; `each` is then `[subject, ...]`.

    Returns:
        `each` of all subjects, and the sum of `total` over the chunks; NumPy arrays.
    """
    subjects = jax.tree.map(np.asarray, subjects)
    count = len(jax.tree.leaves(subjects)[0])
    rows = [np.arange(first, min(first + size, count)) for first in range(0, count, size)]

    def chunk(number):
        own = np.resize(rows[number], min(size, count))
        real = (np.arange(len(own)) < len(rows[number])).astype(float)
        return np.asarray(number), real, jax.tree.map(lambda x: x[own], subjects)

    def run(numbers):
        devices, found = _devices(len(numbers)), []
        for first in range(0, len(numbers), len(devices)):
            chunks = [chunk(number) for number in numbers[first : first + len(devices)]]
            found += map(then, _at_once(devices, program, static, shared, chunks))
        return found

    def join(*parts):
        return np.concatenate([x[: len(own)] for own, x in zip(rows, parts, strict=True)])

    each, total = zip(*_exchange(len(rows), run), strict=True)
    return jax.tree.map(join, *each), jax.tree.map(lambda *x: np.sum(x, axis=0), *total)


def _devices(chunks: int) -> list[jax.Device]:
    """The devices that evaluate, at most one per chunk: all local ones, unless
    `jax.default_device` names one."""
    chosen = jax.config.jax_default_device is not None  # type: ignore[attr-defined]
    return jax.local_devices()[: 1 if chosen else chunks]


def _at_once(devices, program, static, shared, chunks: list) -> list:
    """The results of at most as many chunks as there are devices, on the host."""
    if len(devices) == 1:
        return [jax.tree.map(np.asarray, program(static, shared, chunks[0]))]
    # A device for which there is no chunk left does the first one once more.
    filled = chunks + chunks[:1] * (len(devices) - len(chunks))
    mesh = Mesh(np.array(devices), ("subject",))
    stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
    sharded = jax.device_put(stacked, NamedSharding(mesh, _SUBJECT))
    found = jax.tree.map(np.asarray, on_mesh(program, static, mesh, shared, sharded))
    return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(len(chunks))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def on_mesh(program: Callable, static: Any, mesh: Mesh, shared: Any, chunks: Any) -> Any:
    """The program for `chunks` `[chunk, ...]`, one on each device of the mesh."""

    def own(shared, chunks):
        found = program(static, shared, jax.tree.map(lambda x: x[0], chunks))
        return jax.tree.map(lambda x: x[None], found)

    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=(PartitionSpec(), _SUBJECT), out_specs=_SUBJECT, check_vma=False
    )
    return mapped(shared, chunks)


def _exchange(count: int, run: Callable[[list[int]], list]) -> list:
    """`run` of all numbers below `count`, shared out over the processes."""
    processes, own = jax.process_count(), jax.process_index()
    if processes == 1:
        return run(list(range(count)))
    # A process for which there is no chunk left does one of the others once more.
    turns = range(own, own + processes * -(-count // processes), processes)
    mine = run([number % count for number in turns])
    stacked = jax.tree.map(lambda *x: np.stack(x), *mine)
    found = jax.tree.map(np.asarray, multihost_utils.process_allgather(stacked))
    return [
        jax.tree.map(lambda x, n=n: x[n % processes, n // processes], found) for n in range(count)
    ]
