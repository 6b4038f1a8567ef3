"""The reactions a search may choose from, as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from .reaction import Reaction, check_names


class Library:
    """Candidate reactions r = 1..L on S species.

    Attributes:
        species: the S names, in the order of the columns.
        reactions: the L reactions, in the order of the rows.
        consumed: y, molecules consumed, integers [L, S].
        produced: y', molecules produced, integers [L, S].
        net: y' - y, [L, S].
    """

    def __init__(self, species: Sequence[str], reactions: Iterable[Reaction | str]):
        if isinstance(reactions, str):
            raise ValueError(f"expected a list of reactions; got {reactions!r}: [{reactions!r}]?")
        self.species = tuple(species)
        check_names(self.species)
        self.reactions = tuple(Reaction.parse(r) if isinstance(r, str) else r for r in reactions)
        if not self.reactions:
            raise ValueError("expected a library of at least one reaction; got an empty one")
        if len(set(self.species)) != len(self.species):
            raise ValueError(f"expected species named once; got {list(self.species)}")
        twice = sorted({str(r) for r in self.reactions if self.reactions.count(r) > 1})
        if twice:
            raise ValueError(f"expected each reaction once; got twice: {'; '.join(twice)}")
        for r in self.reactions:
            unknown = set(r.species) - set(self.species)
            if unknown:
                raise ValueError(
                    f"expected reactions between {', '.join(self.species)}; got {r}, "
                    f"where {', '.join(sorted(unknown))} is none of them"
                )
        self.consumed = self._molecules("reactants")
        self.produced = self._molecules("products")
        self.net = self.produced - self.consumed

    def _molecules(self, side: str) -> np.ndarray:
        counts = [dict(getattr(r, side)) for r in self.reactions]
        return np.array([[c.get(s, 0) for s in self.species] for c in counts], int)

    def __len__(self) -> int:
        return len(self.reactions)

    def index(self, reaction: Reaction | str) -> int:
        """Row of a reaction. Raises ValueError when the library has no such reaction."""
        wanted = Reaction.parse(reaction) if isinstance(reaction, str) else reaction
        try:
            return self.reactions.index(wanted)
        except ValueError:
            raise ValueError(f"expected a reaction of the library; got {wanted}") from None


def up_to_second_order(species: Sequence[str]) -> Library:
    """All reactions y → y' with at most two molecules on each side and y ≠ y'.

    With S species there are C = (S + 1)(S + 2) / 2 complexes and C (C - 1) reactions:
    30, 90, 210, 420 for S = 2 to 5.
    """
    complexes = [
        dict((s, pair.count(s)) for s in pair)
        for size in range(3)
        for pair in itertools.combinations_with_replacement(tuple(species), size)
    ]
    pairs = itertools.permutations(complexes, 2)
    return Library(species, (Reaction(tuple(y.items()), tuple(z.items())) for y, z in pairs))
