"""Cones {Σ_r k_r d_r : k_r ≥ 0} of integer vectors, in a form that two equal cones share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

Vector = tuple[int, ...]

_ROUNDING = 1e-9  # of a non-negative least squares residual, relative: the vectors are integers


class Cone(NamedTuple):
    """Lines that lie in the cone, as a basis in reduced row echelon form, and the extreme rays of
    what is orthogonal to them, sorted; all are shortest integer vectors."""

    lines: tuple[Vector, ...]
    rays: tuple[Vector, ...]


@lru_cache(maxsize=2**16)
def cone(vectors: tuple[Vector, ...]) -> Cone:
    """The cone spanned by integer vectors. Two sets of vectors span the same cone if and only if
    the results are equal."""
    rays = tuple(sorted({shortest(v) for v in vectors if any(v)}))
    if not rays:
        return Cone((), ())
    lines = echelon([v for v in rays if contains(rays, [-x for x in v])])
    beside = sorted({shortest(_orthogonal(v, lines)) for v in rays} - {(0,) * len(rays[0])})
    extreme = [v for v in beside if not contains([w for w in beside if w != v], v)]
    return Cone(lines, tuple(extreme))


def contains(vectors: Sequence[Sequence[float]], target: Sequence[float]) -> bool:
    """Whether target = Σ_r k_r v_r with k_r ≥ 0."""
    size = float(np.linalg.norm(target))
    if size == 0 or not len(vectors):
        return size == 0
    lengths = np.linalg.norm(vectors, axis=1)
    _, residual = nnls((np.asarray(vectors, float) / lengths[:, None]).T, np.array(target) / size)
    return bool(residual < _ROUNDING)


def shortest(vector: Iterable[int | Fraction]) -> Vector:
    """The shortest integer vector of the same direction."""
    fractions = [Fraction(x) for x in vector]
    scale = math.lcm(*(x.denominator for x in fractions))
    whole = [int(x * scale) for x in fractions]
    divisor = math.gcd(*whole) or 1
    return tuple(x // divisor for x in whole)


def echelon(vectors: Iterable[Sequence[int]]) -> tuple[Vector, ...]:
    """Basis of the span of integer vectors: reduced row echelon form, in shortest integers."""
    rows = [[Fraction(x) for x in v] for v in vectors]
    basis: list[list[Fraction]] = []
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((r for r in rows if r[column]), None)
        if pivot is None:
            continue
        rows.remove(pivot)
        pivot = [x / pivot[column] for x in pivot]
        rows = [_without(r, pivot, column) for r in rows]
        basis = [_without(b, pivot, column) for b in basis] + [pivot]
    return tuple(shortest(b) for b in basis)


def _without(row: list[Fraction], pivot: list[Fraction], column: int) -> list[Fraction]:
    return [x - row[column] * p for x, p in zip(row, pivot, strict=True)]


def _orthogonal(vector: Vector, lines: tuple[Vector, ...]) -> list[Fraction]:
    """The part of a vector that is orthogonal to the lines, exactly (Gram and Schmidt)."""
    rest = [Fraction(x) for x in vector]
    orthogonal: list[list[Fraction]] = []
    for line in [*lines, None]:
        v = rest if line is None else [Fraction(x) for x in line]
        for w in orthogonal:
            ratio = _dot(v, w) / _dot(w, w)
            v = [a - ratio * b for a, b in zip(v, w, strict=True)]
        orthogonal.append(v)
    return orthogonal[-1]


def _dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))
