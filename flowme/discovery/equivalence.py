"""Networks that are the same ODE, and the simplest of them.

By mass action the ODE is Σ_y x^y v_y with v_y = Σ_{r : y_r = y} k_r (y'_r - y_r), and the monomials
x^y are independent functions: data tell the net vector v_y of each source complex y and nothing
else. Reactions of one source whose net vectors are conically dependent exchange their rates
without a trace: 0 -> T and 0 -> 2T are one ODE, and so are {I -> 0, I -> I + V} and
{I -> 2V, I -> I + V} where V is made fast enough. Sources of other rate laws are kept apart; and a
saturating law with other constants K, n is another function.

Reference: Craciun & Pantea, J Math Chem 44 (2008) 244: identifiability of reaction networks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from scipy.optimize import nnls

from .cone import Cone, Vector, cone, contains, shortest
from .library import Library, up_to_second_order
from .network import ReactionNetwork
from .reaction import Reaction, written


def class_key(library: Library, rows: Any) -> str:
    """The equivalence class of a structure: two structures reach the same ODEs, over all positive
    rates, if and only if their keys are equal.

    For every source complex it has the cone of the net vectors, by its extreme rays and the lines
    that lie in it. Keys of different libraries compare too.

    Args:
        library: candidate reactions.
        rows: the structure: rows of the library, or a mask [L].

    Returns:
        Text such as "A: +A; A + B: -A +B; B: ±(+B)", where ±(...) is a line.
    """
    keys = [_source_key(library, group) for group in _by_source(library, rows)]
    return "; ".join(sorted(filter(None, keys)))


def canonical(library: Library, rows: Any) -> tuple[int, ...]:
    """The simplest structure of the class: of each source complex the fewest reactions of the
    library that span the same cone; of those the fewest molecules; of those the first by name.

    Args:
        library: candidate reactions.
        rows: the structure: rows of the library, or a mask [L].

    Returns:
        Rows of the library, sorted.
    """
    simplest = (_simplest(library, group) for group in _by_source(library, rows))
    return tuple(sorted(itertools.chain(*simplest)))


def molecules(reaction: Reaction) -> int:
    """Molecules on both sides: the fewer, the more plausible a reaction."""
    return sum(n for _, n in reaction.reactants + reaction.products)


def same_ode(a: ReactionNetwork, b: ReactionNetwork, rtol: float = 1e-9) -> bool:
    """Whether two networks, with their rates, have the same right-hand side."""
    species = sorted({*a.species, *b.species})
    first, second = (_functions(_net_vectors(n, species)) for n in (a, b))
    if first.keys() != second.keys():
        return False
    sizes = {y: np.abs(v).max() for y, v in first.items()}
    return all(np.abs(second[y] - first[y]).max() <= rtol * sizes[y] for y in first)


def recovers(
    candidate: ReactionNetwork | Iterable[Reaction | str],
    truth: ReactionNetwork,
    *,
    every: bool = False,
) -> bool:
    """Whether some rates of the candidate's reactions give the true ODE.

    Of each true source complex, the net vector with the true rates must lie in the cone of the
    candidate's; and the candidate may have no other source.

    Args:
        candidate: a structure; its rates do not count.
        truth: the true network, with its rates.
        every: whether all reactions of the candidate must have rates above 0, so that a true
            network with idle reactions added does not recover it.
    """
    reactions = list(candidate.reactions if isinstance(candidate, ReactionNetwork) else candidate)
    parsed = [Reaction.parse(r) if isinstance(r, str) else r for r in reactions]
    species = sorted({*truth.species, *(s for r in parsed for s in r.species)})
    targets: dict[Any, list[np.ndarray]] = defaultdict(list)
    for (source, _), v in _net_vectors(truth, species).items():
        targets[source].append(v)
    vectors: dict[Any, list[list[int]]] = defaultdict(list)
    for r in parsed:
        vectors[r.source].append([r.net.get(s, 0) for s in species])
    return all(
        _reaches(vectors.get(source, []), targets.get(source, []), every or source not in targets)
        for source in {*targets, *vectors}
    )


def sparsest(
    network: ReactionNetwork,
    library: Library | None = None,
    plausibility: Callable[[Reaction], float] | None = None,
) -> ReactionNetwork:
    """The canonical representative of a network with its rates: of all networks with the same ODE
    that with the fewest reactions; of those the most plausible; of those the first by name.

    Args:
        network: a network with its rates.
        library: reactions to choose from, beside the network's own; if None, all up to second
            order between its species. Two networks of these with the same ODE have the same
            representative.
        plausibility: of a reaction, larger is better, summed over those of a source complex;
            if None, minus its molecules.

    Returns:
        The representative, with its rates, reactions sorted by name.
    """
    species = tuple(sorted(network.species))
    candidates = (up_to_second_order(species) if library is None else library).reactions
    better = plausibility or (lambda r: -molecules(r))
    chosen: dict[Reaction, Any] = {}
    for (source, constants), v in _net_vectors(network, species).items():
        own = [
            r
            for i, r in enumerate(network.reactions)
            if r.source == source and network.constants(i) == constants
        ]
        pool = sorted({*own, *(r for r in candidates if r.source == source and not constants)})
        for r, k in _fewest(pool, v, species, better, len(own)).items():
            chosen[r] = (k, *constants)
    ordered = sorted(chosen, key=str)
    return ReactionNetwork({r: chosen[r] for r in ordered}, species=network.species)


def _fewest(
    pool: Sequence[Reaction],
    v: np.ndarray,
    species: Sequence[str],
    better: Callable[[Reaction], float],
    most: int,
) -> dict[Reaction, float]:
    """The fewest, then most plausible reactions whose rates, found too, give the net vector v."""
    length = float(np.abs(v).max())
    v = v / length
    for size in range(1, most + 1):
        sets = itertools.combinations(pool, size)
        fitting = [s for s in sets if contains([_vector(r, species) for r in s], v.tolist())]
        if fitting:
            best = min(fitting, key=lambda s: (-sum(map(better, s)), sorted(map(str, s))))
            vectors = np.array([_vector(r, species) for r in best], float)
            rates, _ = nnls(vectors.T, v)
            return dict(zip(best, (rates * length).tolist(), strict=True))
    raise AssertionError("a network has its own net vectors")


def _net_vectors(network: ReactionNetwork, species: Sequence[str]) -> dict[Any, np.ndarray]:
    """Σ_r k_r (y'_r - y_r) by (source, constants K and n); those that cancel are left out."""
    total: dict[Any, Any] = defaultdict(float)
    size: dict[Any, float] = defaultdict(float)
    for i, (r, k) in enumerate(zip(network.reactions, network.rates, strict=True)):
        change = float(k) * np.array(_vector(r, species), float)
        total[r.source, network.constants(i)] += change
        size[r.source, network.constants(i)] += np.abs(change).max(initial=0.0)
    return {y: v for y, v in total.items() if np.abs(v).max(initial=0.0) > 1e-12 * size[y]}


def _functions(net_vectors: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """The same by rate function: Hill's law with n = 1 is that of Michaelis and Menten."""
    total: dict[Any, Any] = defaultdict(float)
    for ((complex_, law), constants), v in net_vectors.items():
        if law == "hill" and constants[1] == 1:
            law, constants = "michaelis-menten", constants[:1]
        total[complex_, law, constants] += v
    return {y: v for y, v in total.items() if np.any(v)}


def _vector(reaction: Reaction, species: Sequence[str]) -> list[int]:
    return [reaction.net.get(s, 0) for s in species]


def _reaches(vectors: list, targets: list, every: bool) -> bool:
    """Whether the vectors of one source, with some rates, give its net vectors.

    By mass action there is at most one target. Of a saturating rate law there is one for each
    value of the constants, and a reaction has one value: each way to share them out is tried.
    """
    if not targets:
        return not every or _all_positive(vectors, None)
    for owners in itertools.product(range(len(targets)), repeat=len(vectors)):
        shares = [
            [v for v, o in zip(vectors, owners, strict=True) if o == i] for i in range(len(targets))
        ]
        if all(
            contains(share, target) and (not every or _all_positive(share, target))
            for share, target in zip(shares, targets, strict=True)
        ):
            return True
    return False


def _all_positive(vectors: list, target: np.ndarray | None) -> bool:
    """Whether a target in the cone (None: 0) is reached with every rate above 0: if what is left
    of some multiple of it after one unit of any vector is still in the cone."""
    rest = [*vectors] if target is None else [*vectors, -target]
    return all(contains(rest, [-x for x in v]) for v in vectors)


def _by_source(library: Library, rows: Any) -> list[tuple[int, ...]]:
    """The rows of a structure, by source complex."""
    rows = np.asarray(rows)
    if rows.dtype == bool:
        rows = np.flatnonzero(rows)
    sources = _sources(library)
    groups: dict[int, list[int]] = {}
    for r in sorted(rows.tolist()):
        groups.setdefault(sources[r], []).append(r)
    return [tuple(group) for group in groups.values()]


@lru_cache(maxsize=64)
def _sources(library: Library) -> tuple[int, ...]:
    """The number of each row's source complex."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(r.source, len(numbers)) for r in library.reactions)


@lru_cache(maxsize=2**18)
def _source_key(library: Library, rows: tuple[int, ...]) -> str:
    """Text of the cone of reactions of one source; empty if they change nothing."""
    species = sorted(library.species)
    vectors = tuple(tuple(_vector(library.reactions[r], species)) for r in rows)
    lines, rays = cone(vectors) if _exchange(library, rows) else _apart(vectors)
    generators = [f"±({_signed(v, species)})" for v in lines]
    generators += [_signed(v, species) for v in rays]
    consumed, law = library.reactions[rows[0]].source
    where = written(consumed) + ("" if law == "mass action" else f" ({law})")
    return f"{where}: {', '.join(generators)}" if generators else ""


@lru_cache(maxsize=2**18)
def _simplest(library: Library, rows: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of one source, the fewest and simplest with the cone of those given."""
    vectors = [tuple(int(x) for x in v) for v in library.net]
    given = tuple(vectors[r] for r in rows)
    span = cone if _exchange(library, rows) else _apart
    wanted = span(given)
    source = _sources(library)[rows[0]]
    pool = [r for r, y in enumerate(_sources(library)) if y == source and any(vectors[r])]
    if wanted.lines:
        pool = [r for r in pool if contains(given, vectors[r])]
    else:
        pool = [r for r in pool if shortest(vectors[r]) in wanted.rays]
    for size in range(len(rows) + 1):
        sets = itertools.combinations(pool, size)
        same = [s for s in sets if span(tuple(vectors[r] for r in s)) == wanted]
        if same:
            return min(same, key=partial(_preference, library))
    raise AssertionError("the rows given span their own cone")


def _exchange(library: Library, rows: tuple[int, ...]) -> bool:
    """Whether reactions of one source can take over each other's rates: by mass action. Those of
    a saturating law have constants of their own, and so are different functions."""
    return library.reactions[rows[0]].law == "mass action"


def _apart(vectors: tuple[Vector, ...]) -> Cone:
    """In place of a cone: each direction, as often as it comes."""
    return Cone((), tuple(sorted(shortest(v) for v in vectors if any(v))))


def _preference(library: Library, rows: tuple[int, ...]) -> tuple[int, list[str]]:
    chosen = [library.reactions[r] for r in rows]
    return sum(map(molecules, chosen)), sorted(map(str, chosen))


def _signed(vector: Sequence[int], species: Sequence[str]) -> str:
    """-A +2B"""
    terms = [(n, s) for n, s in zip(vector, species, strict=True) if n]
    return " ".join(
        ("-" if n < 0 else "+") + (str(abs(n)) if abs(n) > 1 else "") + s for n, s in terms
    )
