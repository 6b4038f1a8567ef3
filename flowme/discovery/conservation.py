"""Conservation laws: weights c of the species with Σ_s c_s x_s constant in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import numpy as np

from .cone import Vector, echelon, shortest
from .library import Library


def conserved(net: np.ndarray) -> tuple[Vector, ...]:
    """Integer basis of {c : Σ_s net_rs c_s = 0 for every reaction r}.

    It has the smallest non-negative laws, such as E + C and S + C + P, as far as they reach; what
    they do not span is completed by laws with negative weights.

    Args:
        net: y' - y, integers [R, S].

    Returns:
        Laws, each S shortest integers.
    """
    net = np.asarray(net, int)
    candidates = sorted(non_negative_laws(net), key=lambda c: (sum(c), tuple(-x for x in c)))
    basis: list[Vector] = []
    for law in [*candidates, *_null_space(net)]:
        if len(echelon([*basis, law])) > len(basis):
            basis.append(law)
    return tuple(basis)


def non_negative_laws(net: np.ndarray) -> list[Vector]:
    """Extreme rays of {c ≥ 0 : net c = 0}, by Farkas' algorithm.

    Reference: Schuster & Höfer, J Chem Soc Faraday Trans 87 (1991) 2561: conserved moieties.
    """
    reactions, species = net.shape
    # Each row is [net change in the reactions not yet done, weights]; sums of two rows of
    # opposite sign cancel one reaction at a time.
    rows = [(*net[:, s], *(int(s == j) for j in range(species))) for s in range(species)]
    rows = [tuple(int(x) for x in row) for row in rows]
    for r in range(reactions):
        kept = [row for row in rows if row[r] == 0]
        for a in (row for row in rows if row[r] > 0):
            for b in (row for row in rows if row[r] < 0):
                kept.append(shortest(-b[r] * x + a[r] * y for x, y in zip(a, b, strict=True)))
        rows = _of_least_support(kept, reactions)
    return [shortest(row[reactions:]) for row in rows]


def conserving(library: Library, given: Iterable[Mapping[str, float]]) -> np.ndarray:
    """Reactions of a library that obey all laws, bool [L].

    Args:
        library: candidate reactions.
        given: laws, weights c of Σ_s c_s x_s.

    Raises:
        ValueError: what is no list of laws, an unknown species, a law without weights or with
            one that is not finite, or laws that no reaction obeys.
    """
    laws = [given] if isinstance(given, str | Mapping) else list(given)
    if isinstance(given, str | Mapping) or not all(isinstance(law, Mapping) for law in laws):
        raise ValueError(
            "expected conserved as a list of laws, each the weights of species, "
            f"[{{'E': 1, 'C': 1}}]; got {given!r}"
        )
    obey = np.ones(len(library), bool)
    for i, law in enumerate(laws):
        check_known(law, library, "species in conservation laws")
        if not all(isinstance(c, Real) and math.isfinite(c) for c in law.values()):
            raise ValueError(f"expected finite weights in conservation laws; got {dict(law)}")
        if not any(law.values()):
            raise ValueError(f"expected a conservation law with some weight; got {dict(law)}")
        weights = np.array([law.get(s, 0.0) for s in library.species], float)
        size = np.abs(library.net) @ np.abs(weights)
        now = obey & (np.abs(library.net @ weights) <= 1e-9 * size)
        if not (now & library.net.any(axis=1)).any():
            before = f" beside {', '.join(str(dict(x)) for x in laws[:i])}" if i else ""
            raise ValueError(
                f"expected conservation laws that some reaction of the library obeys; got "
                f"{dict(law)}{before}, which together hold every species constant"
            )
        obey = now
    return obey


def check_known(given: Iterable[str], library: Library, what: str) -> None:
    """Refuses names that are no species of the library."""
    unknown = sorted(set(given) - set(library.species))
    if unknown:
        raise ValueError(
            f"expected {what} among {', '.join(library.species)}; got {', '.join(unknown)}"
        )


def _of_least_support(rows: list, first: int) -> list:
    """Rows whose weights are not a superset, in support, of another's."""
    supports = {row: frozenset(np.flatnonzero(row[first:])) for row in rows}
    return [a for a in supports if not any(supports[b] < supports[a] for b in supports)]


def _null_space(net: np.ndarray) -> list[Vector]:
    """Integer basis of the null space, from the reduced row echelon form."""
    rows = echelon([tuple(int(x) for x in row) for row in net])
    pivots = [next(i for i, x in enumerate(row) if x) for row in rows]
    basis = []
    for free in sorted(set(range(net.shape[1])) - set(pivots)):
        scale = int(np.lcm.reduce([row[p] for row, p in zip(rows, pivots, strict=True)] or [1]))
        law = [0] * net.shape[1]
        law[free] = scale
        for row, p in zip(rows, pivots, strict=True):
            law[p] = -row[free] * scale // row[p]
        basis.append(shortest(law))
    return basis
