"""Who evaluates which subjects: chunk by chunk, on several devices, in several processes.

Subjects are independent given θ. A chunk of them is one call of a compiled program; chunks are
numbered, and a chunk's random numbers depend on its number.

- Every local device has a chunk at a time, a GPU or TPU as many as keep it busy: its program is
  then mapped over them (`jax.vmap`). On several devices all of these are one array
  `[chunk, subject, ...]`, sharded over a mesh (`jax.sharding`), and the program is mapped over it
  (`jax.shard_map`). Devices then exchange nothing. (Left to XLA, one chunk divided over two devices
  exchanged values at every node: it took twice as long as on one.)
- Of P processes (`jax.distributed`) each holds the study, evaluates every P-th chunk, and then
  receives what the others found.

Results are put together in the order of the chunks, so they do not depend on devices or processes
(but for rounding: for several chunks at once the program is compiled otherwise).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowme.accelerator import on_accelerator

_SUBJECT = PartitionSpec("subject")
_TOGETHER = 16_384  # subjects that an accelerator evaluates at once: enough to keep it busy


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
        devices = _devices(len(numbers))
        beside = _beside(-(-len(numbers) // len(devices)), size)
        found, many = [], beside * len(devices)
        for first in range(0, len(numbers), many):
            chunks = [chunk(number) for number in numbers[first : first + many]]
            found += map(then, _at_once(devices, beside, program, static, shared, chunks))
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


def _beside(most: int, size: int) -> int:
    """How many chunks of `size` subjects a device has at a time: a power of two, so that few
    programs are compiled, that is enough for `most`."""
    room = _TOGETHER // size if on_accelerator() else 1
    return 1 << (max(1, min(most, room)) - 1).bit_length()


def _at_once(devices, beside: int, program, static, shared, chunks: list) -> list:
    """The results of at most `beside` chunks for each of the devices, on the host."""
    if len(devices) * beside == 1:
        return [jax.tree.map(np.asarray, program(static, shared, chunks[0]))]
    # Where there is no chunk left, the first one is done once more.
    filled = chunks + chunks[:1] * (beside * len(devices) - len(chunks))
    stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
    program = program.__wrapped__  # type: ignore[attr-defined]  # however it was compiled
    if len(devices) == 1:
        found = side_by_side(program, static, shared, stacked)
    else:
        mesh = Mesh(np.array(devices), ("subject",))
        sharded = jax.device_put(stacked, NamedSharding(mesh, _SUBJECT))
        found = on_mesh(program, static, mesh, shared, sharded)
    found = jax.tree.map(np.asarray, found)
    return [jax.tree.map(lambda x, k=k: x[k], found) for k in range(len(chunks))]


@partial(jax.jit, static_argnums=(0, 1))
def side_by_side(program: Callable, static: Any, shared: Any, chunks: Any) -> Any:
    """The program for `chunks` `[chunk, ...]` at once."""
    if len(jax.tree.leaves(chunks)[0]) > 1:
        return jax.vmap(lambda chunk: program(static, shared, chunk))(chunks)
    found = program(static, shared, jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda x: x[None], found)


@partial(jax.jit, static_argnums=(0, 1, 2))
def on_mesh(program: Callable, static: Any, mesh: Mesh, shared: Any, chunks: Any) -> Any:
    """The program for `chunks` `[chunk, ...]`, as many on each device of the mesh."""
    mapped = jax.shard_map(
        partial(side_by_side, program, static),
        mesh=mesh, in_specs=(PartitionSpec(), _SUBJECT), out_specs=_SUBJECT, check_vma=False,
    )  # fmt: skip
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
