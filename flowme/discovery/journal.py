"""A search kept in a folder, so that one that was stopped goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data import TimeCourses
from .fit import Estimate
from .memory import Memory

_EVERY = 5.0  # seconds between two writings


class Course(NamedTuple):
    """How far a search has come.

    Attributes:
        rounds: finished.
        evaluations: ODE fits.
        seconds: by the clock of the budget.
        stale: rounds since the best structure changed.
        idle: rounds since there was a structure to fit.
        why: why it ended.
    """

    rounds: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    stale: int = 0
    idle: int = 0
    why: str = ""

    def after(self, evaluations: int, seconds: float, better: bool) -> Course:
        """One round later."""
        stale = 0 if better else self.stale + 1
        idle = 0 if evaluations else self.idle + 1
        return Course(self.rounds + 1, self.evaluations + evaluations, seconds, stale, idle)


class Journal:
    """The state of a search after its last finished round: numbers and words, never code.

    Attributes:
        file: where; None: nowhere.
        asked: what the search depends on.
    """

    def __init__(self, file: Path | None, asked: dict[str, Any]):
        self.file, self.asked = file, asked
        self._written = time.perf_counter()
        self._last: Any = None

    @classmethod
    def open(
        cls, folder: str | Path | None, memory: Memory, seed: int, arm: Any, fit: Any
    ) -> Journal:
        """The journal in a folder, which is made if it is not there."""
        problem = memory.problem
        asked = {
            "seed": seed,
            "reactions": [str(r) for r in problem.library.reactions],
            "data and known states": _digest(problem.courses),
            "most reactions": problem.slots,
            "prior": np.round(memory.prior, 9).tolist(),
            "weights": [float(w) for w in memory.weights],
            "arm": _settings(arm),
            "fit": _settings(fit),
        }
        if folder is None:
            return cls(None, asked)
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"expected a folder for the checkpoint; got the file {folder}")
        Path(folder).mkdir(parents=True, exist_ok=True)
        return cls(Path(folder) / "search.npz", asked)

    def restore(self, memory: Memory, rng: np.random.Generator, arm: Any) -> Course:
        """Puts what was kept into memory, generator and arm; returns how far the search was."""
        if self.file is None or not self.file.exists():
            return Course()
        try:
            with np.load(self.file, allow_pickle=False) as kept:
                arrays = dict(kept)
            words = json.loads(str(arrays.pop("words")))
            before = words["asked"]
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"expected {self.file} to be the journal of a search; it cannot be read ({error}). "
                "Name another folder, or delete this one to begin anew."
            ) from error
        for what, value in self.asked.items():
            if before.get(what) != value:
                raise ValueError(
                    f"expected {self.file.parent} to be of a search with the same {what}; got "
                    f"another. Name another folder, or delete this one to begin anew."
                )
        memory.problem = memory.problem.with_substeps(words["substeps"])
        memory.precise = None if words["precise"] is None else tuple(words["precise"])
        memory.add(_unstacked(arrays))
        rng.bit_generator.state = words["rng"]
        if hasattr(arm, "restore"):
            arm.restore({k[4:]: v for k, v in arrays.items() if k.startswith("arm/")})
        return Course(**words["course"])

    def keep(self, memory: Memory, rng: np.random.Generator, arm: Any, course: Course) -> None:
        """Remember the end of a round; write it if the last writing is some time ago."""
        if self.file is None:
            return
        words = {
            "asked": self.asked,
            "course": course._asdict(),
            "rng": rng.bit_generator.state,
            "substeps": memory.problem.substeps,
            "precise": memory.precise,
        }
        own = arm.state() if hasattr(arm, "state") else {}
        arrays = {f"arm/{name}": np.asarray(value) for name, value in own.items()}
        self._last = json.dumps(words), arrays, [s.fit for s in memory.scored.values()]
        if time.perf_counter() - self._written > _EVERY:
            self.close()

    def close(self) -> None:
        """Write the end of the last round."""
        if self.file is None or self._last is None:
            return
        words, arrays, fits = self._last
        half = self.file.with_suffix(".half")  # a file half written is never read
        with open(half, "wb") as file:
            np.savez(file, **{"words": np.array(words), **arrays, **_stacked(fits)})  # type: ignore
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, self.file)
        self._written, self._last = time.perf_counter(), None


def _settings(of: Any) -> str:
    """An arm or a fit with its settings; by its type alone where it does not print them."""
    printed = repr(of)
    return type(of).__qualname__ if " at 0x" in printed else printed


def _digest(courses: TimeCourses) -> str:
    """What tells these measurements from others."""
    arrays = (courses.time, courses.values, courses.observed, courses.initial, courses.known)
    digest = hashlib.sha256()
    for array in (*arrays, courses.scale, np.array(courses.duration)):
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _stacked(fits: list[Estimate]) -> dict[str, np.ndarray]:
    """Fits of structures of different size as arrays, one after the other."""
    if not fits:
        return {}
    flat = {
        "rows": [np.array(f.rows) for f in fits],
        "log_rates": [f.log_rates for f in fits],
        "information": [f.information.ravel() for f in fits],
    }
    return {
        "size": np.array([len(f.rows) for f in fits]),
        "initial": np.stack([f.initial for f in fits]),
        "squares": np.stack([f.squares for f in fits]),
        "deviance": np.array([f.deviance for f in fits]),
        **{name: np.concatenate(values) for name, values in flat.items()},
    }


def _unstacked(arrays: dict[str, np.ndarray]) -> list[Estimate]:
    if "size" not in arrays:
        return []
    size = arrays["size"]
    cuts, squares = np.cumsum(size)[:-1], np.cumsum(size**2)[:-1]
    rows = np.split(arrays["rows"], cuts)
    log_rates = np.split(arrays["log_rates"], cuts)
    information = np.split(arrays["information"], squares)
    return [
        Estimate(
            tuple(int(r) for r in rows[i]),
            log_rates[i],
            arrays["initial"][i],
            arrays["squares"][i],
            float(arrays["deviance"][i]),
            information[i].reshape(n, n),
        )
        for i, n in enumerate(size)
    ]
