"""What an estimation has come to, kept in a folder so that an interrupted one can go on.

An estimation is a fixed sequence of stages (a climb on some subjects, one from each start, the
learning of a flow), each a sequence of steps that depend on nothing but the stage's state. So one
that is taken up again runs as it did before, but for this: a stage begins where its file says.
Files hold numbers and words, never code.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

State = TypeVar("State")


@dataclasses.dataclass
class Checkpoint:
    """A folder with one file per stage; or nowhere, where nothing is kept and nothing found.

    Attributes:
        folder: where; None: nowhere.
    """

    folder: Path | None = None

    @classmethod
    def open(cls, folder: str | Path, asked: dict[str, Any]) -> Checkpoint:
        """The checkpoint in a folder, which is made if it is not there.

        Args:
            folder: where.
            asked: what the estimation depends on, by name, as JSON can write it; numbers count as
                the same up to rounding.

        Raises:
            ValueError: the folder holds an estimation that depends on something else.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "estimation.npz"
        if about.exists():
            found = _read(about)[1]
            for what, value in json.loads(json.dumps(asked)).items():
                if not _same(value, found.get(what)):
                    raise ValueError(
                        f"expected {folder} to be of an estimation with the same {what}, "
                        f"{value!r:.200}; got {found.get(what)!r:.200}. Name another folder, or "
                        "delete this one to begin anew."
                    )
        elif jax.process_index() == 0:
            _write(about, {}, asked)
        return cls(folder)

    def read(self, stage: str, like: State) -> State | None:
        """The state of a stage after the last step that was kept; None before the first.

        Args:
            stage: its name.
            like: a state of the same structure, of any values.
        """
        if self.folder is None or not (path := self._path(stage)).exists():
            return None
        arrays, words = _read(path)
        leaves, structure = jax.tree.flatten(like)
        found = [words[k] if k in words else arrays[k] for k in map(str, range(len(leaves)))]
        return jax.tree.unflatten(structure, found)

    def write(self, stage: str, state: Any) -> None:
        """Put the state of a stage, a pytree of arrays, numbers and text, in place of its last.

        Of several processes, which all come to the same, the first one writes.
        """
        if self.folder is None or jax.process_index() > 0:
            return
        leaves = {str(k): leaf for k, leaf in enumerate(jax.tree.leaves(state))}
        words = {k: x for k, x in leaves.items() if isinstance(x, bool | int | float | str)}
        _write(self._path(stage), {k: x for k, x in leaves.items() if k not in words}, words)

    def stop(self) -> None:
        """Keep nothing from now on: after an interruption the estimation is rounded off from where
        it stands, which is not where it would have gone."""
        self.folder = None

    def _path(self, stage: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{stage}.npz"


def _write(path: Path, arrays: dict[str, Any], words: dict[str, Any]) -> None:
    half = path.with_suffix(".half")  # a file half written is never read
    with open(half, "wb") as file:
        np.savez(file, words=np.array(json.dumps(words)), **{k: x for k, x in arrays.items()})
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("words")))


def _same(asked: Any, found: Any) -> bool:
    """Whether two values that JSON can write agree; numbers up to rounding."""
    if isinstance(asked, float) and isinstance(found, float):
        return bool(np.isclose(asked, found, rtol=1e-5, atol=1e-10, equal_nan=True))
    if isinstance(asked, list) and isinstance(found, list):
        return len(asked) == len(found) and all(map(_same, asked, found))
    return bool(asked == found)
