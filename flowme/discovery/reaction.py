"""One biochemical reaction: what it consumes, what it produces, and its rate law."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

LAWS = ("mass action", "michaelis-menten", "hill")

Complex = tuple[tuple[str, int], ...]

_ARROW = re.compile(r"\s*(?:->|→)\s*")
_TERM = re.compile(r"(\d*)\s*\*?\s*([^\W\d]\w*[*']*)")
_NOTHING = ("", "0", "∅")


@dataclasses.dataclass(frozen=True, order=True)
class Reaction:
    """A reaction y → y' between complexes of species.

    `reactants` and `products` are sorted tuples of (species, molecules). The rate of "A + B -> C"
    is k A B by mass action; "michaelis-menten" is k A / (K + A) times its other reactants and
    "hill" k Aⁿ / (Kⁿ + Aⁿ) times its other reactants, A being the first reactant by name.
    Two reactions are equal when they are the same chemistry, whatever the order of writing.
    """

    reactants: Complex
    products: Complex
    law: str = "mass action"

    def __post_init__(self):
        for side in ("reactants", "products"):
            value = getattr(self, side)
            items = value.items() if isinstance(value, Mapping) else value
            object.__setattr__(self, side, tuple(sorted((str(s), int(n)) for s, n in items if n)))
            if any(n < 0 for _, n in getattr(self, side)):
                raise ValueError(f"expected molecules >= 0 in {side}; got {value}")
        if self.law not in LAWS:
            raise ValueError(f"expected a rate law among {', '.join(LAWS)}; got {self.law!r}")
        if self.law != "mass action" and not self.reactants:
            raise ValueError(f"expected a reactant for the rate law {self.law!r}; got {self}")

    @classmethod
    def parse(cls, text: str, law: str = "mass action") -> Reaction:
        """The reaction a chemist writes: "2A -> B", "T + V -> I + V", "0 -> T".

        Raises:
            ValueError: no arrow, or a term that is no count followed by a species' name.
        """
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

    def __str__(self) -> str:
        law = "" if self.law == "mass action" else f" ({self.law})"
        return f"{_written(self.reactants)} -> {_written(self.products)}{law}"


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
    return tuple(sorted(counts.items()))


def _written(complex_: Complex) -> str:
    return " + ".join(s if n == 1 else f"{n}{s}" for s, n in complex_) or "0"
