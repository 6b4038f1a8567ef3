"""What a comparison of laws has done so far, kept in a file so that it can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowme.infer.fit import Fit
from flowme.infer.marginal import MarginalLikelihood
from flowme.study import Study

_ARRAYS = ("log_likelihood", "standard_error", "cpu_seconds", "converged")


@dataclasses.dataclass(eq=False)
class Record:
    """Results of every (law, fold): those that are not there yet are NaN.

    Attributes:
        laws: names of the laws.
        asked: what the results are an answer to; a file that answers something else is refused.
        log_likelihood: ℓ_i, `[law, subject]`.
        standard_error: of each, `[law, subject]`.
        cpu_seconds: `[law, fold]`.
        converged: `[law, fold]`.
        messages: by law.
        path: where to keep them; None: nowhere.
    """

    laws: tuple[str, ...]
    asked: dict[str, Any]
    log_likelihood: np.ndarray
    standard_error: np.ndarray
    cpu_seconds: np.ndarray
    converged: np.ndarray
    messages: dict[str, tuple[str, ...]]
    path: Path | None

    @classmethod
    def open(
        cls, path: str | Path | None, study: Study, laws: dict[str, str], folds: int, asked: dict
    ) -> Record:
        """The record of the file, or an empty one.

        Args:
            path: the file; ".npz" is added where it is missing.
            study: the study.
            laws: name -> what each law is, in words.
            folds: how many.
            asked: what else the results depend on, as JSON can write it.

        Raises:
            ValueError: the file is of another comparison.
        """
        each, cell = (len(laws), study.subjects.size), (len(laws), folds)
        if path is not None:
            path = Path(path)
            path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        record = cls(
            laws=tuple(laws),
            asked={**asked, "laws": laws, "folds": folds, "data": _digest(study)},
            log_likelihood=np.full(each, np.nan),
            standard_error=np.full(each, np.nan),
            cpu_seconds=np.full(cell, np.nan),
            converged=np.zeros(cell, bool),
            messages={},
            path=path,
        )
        if path is not None and path.exists():
            record._read(path)
        return record

    def _read(self, path: Path) -> None:
        with np.load(path) as file:
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in _ARRAYS}
        for what, value in json.loads(json.dumps(self.asked)).items():
            if header["asked"].get(what) != value:
                raise ValueError(
                    f"expected {path} to be of a comparison with the same {what}, {value!r:.200}; "
                    f"got {header['asked'].get(what)!r:.200}. Give another path, or delete the "
                    "file to begin anew."
                )
        for name, array in arrays.items():
            setattr(self, name, array)
        self.messages = {law: tuple(some) for law, some in header["messages"].items()}

    def has(self, law: int, fold: int) -> bool:
        """Whether this one is done."""
        return not np.isnan(self.cpu_seconds[law, fold])

    @property
    def count(self) -> int:
        """How many are done."""
        return int(np.sum(~np.isnan(self.cpu_seconds)))

    def add(
        self,
        law: int,
        fold: int,
        subjects: np.ndarray,
        found: MarginalLikelihood,
        fit: Fit,
        seconds: float,
    ) -> None:
        """Take in the likelihood of a fold's subjects (the first ones of `found`), and save."""
        count, name = len(subjects), self.laws[law]
        self.log_likelihood[law, subjects] = found.log_likelihood[:count]
        self.standard_error[law, subjects] = found.standard_error[:count]
        self.cpu_seconds[law, fold], self.converged[law, fold] = seconds, fit.converged
        new = tuple(f"fold {fold + 1}: {text}" for text in (*fit.messages, *found.messages))
        if new:
            self.messages[name] = (*self.messages.get(name, ()), *new)
        if self.path is not None:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        header = json.dumps({"asked": self.asked, "messages": self.messages})
        half = path.with_suffix(".half.npz")  # a file half written is never read
        np.savez_compressed(
            half, header=np.array(header), **{name: getattr(self, name) for name in _ARRAYS}
        )
        os.replace(half, path)


def _digest(study: Study) -> str:
    """The study's numbers and identifiers, in short."""
    digest = hashlib.sha256(repr([str(i) for i in study.subjects.ids]).encode())
    for leaf in jax.tree.leaves(study):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
