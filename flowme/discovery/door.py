"""What `discover` is given, checked before anything is done with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

import flowme as fm

from .library import Library
from .reaction import check_names
from .reward import Weights


def check(study: Any, species: Any, **options: Any) -> None:
    """Refuses what `discover` cannot go by, before the data are looked at.

    The data, and what the laws and lists leave of the library, are checked where they are read.

    Args:
        study: as in `discover`.
        species: as in `discover`.
        options: its other arguments, by name.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if not isinstance(study, fm.Study):
        raise TypeError(
            f"expected a fm.Study; got a {type(study).__name__}. A table becomes one with "
            "fm.Study.from_frame."
        )
    check_species(species)
    for name, least in (("most_reactions", 1), ("leaders", 1), ("seed", 0)):
        check_whole(name, options[name], least)
    for name in ("evaluations", "patience"):
        if options[name] is not None:
            check_whole(name, options[name], 1, or_else=", or None for no limit")
    seconds = options["seconds"]
    if not _is_real(seconds) or not seconds > 0:
        raise ValueError(f"expected seconds above 0, a number; got {seconds!r}")
    _check_weights(options["weights"])
    for name, (is_it, what) in {**_KINDS, **_FUNCTIONS}.items():
        absent = options[name] is None and name in _KINDS
        if not absent and not is_it(options[name]):
            raise TypeError(f"expected {name} to be {what}; got {_said(options[name])}")


def check_species(species: Any) -> None:
    """Refuses what is neither names nor outcomes by name."""
    if isinstance(species, str) or not isinstance(species, Collection):
        raise TypeError(
            "expected species as names, ['A', 'B'], or the outcome of each, {'A': 'conc_A', 'C': "
            f"None}}; got {species!r}"
        )
    check_names(species)
    if len(set(species)) != len(species):
        raise ValueError(f"expected each species once; got {list(species)}")


def check_whole(
    name: str, value: Any, least: int, most: float = math.inf, or_else: str = ""
) -> None:
    """Refuses what is no whole number from `least` to `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"expected {name} of {limits}, a whole number{or_else}; got {value!r}")


def _is_real(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool)


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, Weights):
        raise TypeError(
            "expected weights=Weights(prediction=..., complexity=..., robustness=...); got "
            f"{weights!r}"
        )
    for part, value in weights._asdict().items():
        if not _is_real(value) or not 0 <= value < math.inf:
            raise ValueError(f"expected weights of at least 0, finite; got {part}={value!r}")
    if not weights.prediction > 0:
        raise ValueError(
            f"expected weights with prediction above 0, or the data would not count; got {weights}"
        )


def _is_arm(value: Any) -> bool:
    """Of a union, all of them."""
    own = callable(getattr(value, "propose", None)) and callable(getattr(value, "update", None))
    return own and not isinstance(value, type) and all(map(_is_arm, getattr(value, "arms", ())))


def _is_fit(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


# Of arguments that may be None: whether a value is what it should be, and what that is.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "initial": (
        lambda x: isinstance(x, Mapping),
        "known states by species, {'A': 1.0, 'B': 'B0'}",
    ),
    "library": (
        lambda x: isinstance(x, Library),
        "a Library, such as Library(['A', 'B'], ['A -> B', 'B -> 0'])",
    ),
    "arm": (
        _is_arm,
        "an arm, such as Stepwise() or Union((Stepwise(), GeneticLocal()))",
    ),
    "fit": (_is_fit, "an inner fit, such as LevenbergMarquardt()"),
    "checkpoint": (lambda x: isinstance(x, str | os.PathLike), "the path of a folder"),
}


_FUNCTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prior": (callable, "a function of a reaction, its log weight"),
    "clock": (callable, "a function, such as time.process_time"),
}


def _said(value: Any) -> str:
    """Its value; of a class, that it is one and would have to be called."""
    if isinstance(value, type):
        return f"the class {value.__name__}: {value.__name__}() is one"
    return repr(value)
