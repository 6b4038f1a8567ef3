"""Some subjects of a study: their positions, as asked for by number, mask or identifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flowme.table import is_name

__all__ = ["positions"]


def positions(known: tuple[Any, ...], indices: Any, ids: Any) -> np.ndarray:
    """Positions `[chosen]` among the identifiers `known`; see `Study.subset`."""
    if (indices is None) == (ids is None):
        raise ValueError("expected either indices or ids; got both or neither.")
    chosen = _of_ids(known, ids) if indices is None else _of_indices(known, indices)
    if chosen.size == 0:
        raise ValueError("expected at least one subject; got none.")
    if chosen.min() < 0 or chosen.max() >= len(known):
        raise ValueError(f"expected positions in 0..{len(known) - 1}; got {chosen}.")
    if np.unique(chosen).size < chosen.size:
        raise ValueError(f"expected each subject once; got {chosen}.")
    return chosen


def _of_ids(known: tuple[Any, ...], ids: Any) -> np.ndarray:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"expected a list of identifiers; got {ids!r}. Write ids=[{ids!r}].")
    place = {name: i for i, name in enumerate(known)}
    ids = list(ids)
    unknown = [name for name in ids if not is_name(name) or name not in place]
    if unknown:
        raise ValueError(f"expected ids of this study; got {unknown[:5]}.")
    return np.array([place[name] for name in ids], int)


def _of_indices(known: tuple[Any, ...], indices: Any) -> np.ndarray:
    alone = hasattr(indices, "dtype") or isinstance(indices, str)
    if not alone and isinstance(indices, Iterable):
        indices = list(indices)
    chosen = np.atleast_1d(np.asarray(indices))
    if chosen.dtype == bool and chosen.shape == (len(known),):
        return np.flatnonzero(chosen)
    if chosen.size and (not np.issubdtype(chosen.dtype, np.integer) or chosen.ndim != 1):
        raise ValueError(
            f"expected positions or a mask of length {len(known)}; got {indices!r}. "
            "Use ids= for identifiers."
        )
    return chosen.astype(int)
