"""One biochemical reaction: what it consumes, what it produces, and its rate law."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

LAWS = ("mass action", "michaelis-menten", "hill")

Complex = tuple[tuple[str, int], ...]

_ARROW = re.compile(r"\s*(?:->|→)\s*")
_NAME = r"[^\W\d]\w*[*']*"
_TERM = re.compile(rf"(\d*)\s*\*?\s*({_NAME})")
_LAW = re.compile(rf"(.*?)\s*\((\s*(?:{'|'.join(LAWS)})\s*)\)\s*", re.IGNORECASE)
_NOTHING = ("", "0", "∅")


@dataclasses.dataclass(frozen=True, order=True)
class Reaction:
    """A reaction y → y' between complexes of species.

    `reactants` and `products` are sorted tuples of (species, molecules), each species once: what
    is given twice is summed. A species' name is a letter or _, then letters, digits and _, then
    any * and ', so that the text of a reaction can be read back: "A", "K3*", "α".

    The rate of "2A + B -> C" is k A² B by mass action. By "michaelis-menten" it is k A / (K + A)
    and by "hill" k Aⁿ / (Kⁿ + Aⁿ), times its other reactants as in mass action, A being its
    `substrate`.
    Two reactions are equal when they are the same chemistry, whatever the order of writing.
    """

    reactants: Complex
    products: Complex
    law: str = "mass action"

    def __post_init__(self):
        for side in ("reactants", "products"):
            object.__setattr__(self, side, _counted(getattr(self, side), side))
        if self.law not in LAWS:
            raise ValueError(f"expected a rate law among {', '.join(LAWS)}; got {self.law!r}")
        if self.law != "mass action" and not self.reactants:
            raise ValueError(f"expected a reactant for the rate law {self.law!r}; got {self}")

    @classmethod
    def parse(cls, text: str, law: str = "mass action") -> Reaction:
        """The reaction a chemist writes: "2A -> B", "T + V -> I + V", "0 -> T".

        A rate law other than `law` stands behind it: "S + E -> E + P (michaelis-menten)".

        Raises:
            ValueError: no arrow, or a term that is no count followed by a species' name.
        """
        declared = _LAW.fullmatch(text)
        if declared is not None:
            text, law = declared[1], declared[2].strip().lower()
        sides = _ARROW.split(text.strip())
        if len(sides) != 2:
            raise ValueError(f"expected 'reactants -> products' with one arrow; got {text!r}")
        return cls(_complex(sides[0], text), _complex(sides[1], text), law)

    @property
    def species(self) -> tuple[str, ...]:
        """Names of the species that take part, sorted."""
        return tuple(sorted({s for s, _ in self.reactants + self.products}))

    @property
    def order(self) -> int:
        """Molecules consumed: 0 for an inflow, 2 for an encounter."""
        return sum(n for _, n in self.reactants)

    @property
    def net(self) -> dict[str, int]:
        """y' - y, by species; those that only take part as catalysts are left out."""
        change = Counter(dict(self.products))
        change.subtract(dict(self.reactants))
        return {s: n for s, n in sorted(change.items()) if n}

    @property
    def substrate(self) -> str | None:
        """The reactant in which a saturating rate law saturates: the first by name that the
        reaction consumes, or else the first by name."""
        names = [s for s, _ in self.reactants]
        return next((s for s in names if self.net.get(s, 0) < 0), names[0] if names else None)

    @property
    def source(self) -> tuple[Complex, str]:
        """What its rate depends on: the complex consumed, and the rate law."""
        return self.reactants, self.law

    def __str__(self) -> str:
        law = "" if self.law == "mass action" else f" ({self.law})"
        return f"{written(self.reactants)} -> {written(self.products)}{law}"


def is_name(text: Any) -> bool:
    """Whether it can be the name of a species, which the text of a reaction gives back."""
    return isinstance(text, str) and re.fullmatch(_NAME, text) is not None


def check_names(species: Iterable[Any]) -> None:
    """Refuses names of species that could not be read back from the text of a reaction."""
    for name in species:
        if not is_name(name):
            raise ValueError(
                "expected names of species of letters, digits and _, not a digit first, with * or "
                f"' at the end if at all, such as 'A', 'my_A' or 'K3*'; got {name!r}"
            )


def _counted(side: Any, what: str) -> Complex:
    """Molecules by species, sorted; of a mapping or of pairs, checked."""
    counts: Counter[str] = Counter()
    for s, n in side.items() if isinstance(side, Mapping) else side:
        check_names([s])
        if not n >= 0 or n != n // 1:
            raise ValueError(
                f"expected whole numbers of molecules, 0 or more, in {what}; got {side}"
            )
        counts[s] += int(n)
    return tuple(sorted((s, n) for s, n in counts.items() if n))


def _complex(side: str, text: str) -> Complex:
    counts: Counter[str] = Counter()
    if side.strip() in _NOTHING:
        return ()
    for term in side.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(
                f"expected terms like '2A' or 'B' joined by '+', or 0 for nothing; "
                f"got {term.strip()!r} in {text!r}"
            )
        counts[match[2]] += int(match[1] or 1)
    return tuple(counts.items())


def written(complex_: Complex) -> str:
    """2A + B, or 0 for nothing."""
    return " + ".join(s if n == 1 else f"{n}{s}" for s, n in complex_) or "0"
