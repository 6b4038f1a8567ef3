"""Rate laws in SBML: written as formulas, and recognised by what they compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import libsbml
import numpy as np

from .reaction import LAWS, Reaction

_POINTS = 6
_ROUNDING = 1e-9


def formula(reaction: Reaction, parameters: Sequence[str], ids: Mapping[str, str]) -> str:
    """The rate of a reaction, infix.

    Args:
        reaction: the reaction with its rate law.
        parameters: identifiers of k, K, n, as many as the law has.
        ids: identifiers of its species.
    """
    rate, *constants = parameters
    factors = [rate]
    for s, n in reaction.reactants:
        x = ids[s]
        if not constants or s != reaction.substrate:
            factors.append(x if n == 1 else f"{x}^{n}")
        elif len(constants) == 1:
            factors.append(f"{x} / ({constants[0]} + {x})")
        else:
            K, exponent = constants
            factors.append(f"{x}^{exponent} / ({K}^{exponent} + {x}^{exponent})")
    return " * ".join(factors)


def parse(text: str, model: Any = None) -> Any:
    """The syntax tree of an infix formula. What the model names is that, though it be called
    `time` or `pi`."""
    return libsbml.parseL3FormulaWithModel(text, model)


def evaluate(tree: Any, values: Mapping[str, Any]) -> Any:
    """The values of a syntax tree, given those of its names, numbers or arrays.

    Raises:
        ValueError: a function that no rate law here has, such as piecewise, or an unknown name.
    """
    kind = tree.getType()
    if tree.isNumber():
        return np.float64(tree.getValue())
    if kind == libsbml.AST_NAME and tree.getName() in values:
        return np.asarray(values[tree.getName()], float)
    children = [evaluate(tree.getChild(i), values) for i in range(tree.getNumChildren())]
    if kind == libsbml.AST_PLUS:
        return sum(children)
    if kind == libsbml.AST_TIMES:
        return math.prod(children)
    if kind == libsbml.AST_MINUS:
        return -children[0] if len(children) == 1 else children[0] - children[1]
    if kind == libsbml.AST_DIVIDE:
        return children[0] / children[1]
    if kind in (libsbml.AST_POWER, libsbml.AST_FUNCTION_POWER):
        return children[0] ** children[1]
    raise ValueError(
        "expected formulas of numbers, names, +, -, *, / and powers; got "
        f"{libsbml.formulaToL3String(tree)}"
    )


def recognise(
    tree: Any,
    reactants: Mapping[str, int],
    products: Mapping[str, int],
    ids: Mapping[str, str],
    parameters: Mapping[str, float],
    sizes: Mapping[str, float],
) -> tuple[Reaction, tuple[float, ...], list[str]] | None:
    """The reaction whose law, as `formula` writes it, is what a syntax tree computes.

    The tree must be proportional to it at random concentrations, with the law's constants among
    the numbers and parameters in the tree. With a rate of 0 or Hill's n = 1 laws are alike: that
    is taken which the tree has when the parameter of this value has another.

    Args:
        tree: a kinetic law.
        reactants: molecules consumed, by species; catalysts are on both sides.
        products: molecules produced.
        ids: the identifier of each species.
        parameters: their values by identifier.
        sizes: those of compartments.

    Returns:
        The reaction, its k, K, n, and the names of the parameters to which the rate is
        proportional; None if there is no such law.
    """

    named = sorted(names_in(tree) & parameters.keys())

    def law_at(**changed: float) -> tuple[Reaction, tuple[float, ...]] | None:
        now = {**parameters, **changed}
        candidates = sorted({1.0, *(now[name] for name in named), *_numbers(tree)})
        return _matching(tree, reactants, products, ids, {**sizes, **now}, candidates)

    found = law_at()
    if found is None:
        return None
    reaction, (k, *constants) = found
    shown = {name: 1.0 for name in named if k == 0 == parameters[name]}
    positive = law_at(**shown)
    if positive:
        reaction, (_, *constants) = positive
    for name in [name for name in named if parameters[name] == 1]:
        steeper = law_at(**{**shown, name: 2.0})
        if steeper and steeper[1][1:] == (*constants, 2.0):
            reaction, constants = steeper[0], [*constants, 1.0]
    factors = _factors(tree, named, ids, {**sizes, **parameters, **shown})
    return reaction, (k, *constants), factors


def _matching(
    tree: Any,
    reactants: Mapping[str, int],
    products: Mapping[str, int],
    ids: Mapping[str, str],
    values: Mapping[str, float],
    candidates: Sequence[float],
) -> tuple[Reaction, tuple[float, ...]] | None:
    """The first law that a tree is proportional to, and its k, K, n; K and n of the candidates."""
    points = _points(len(ids), candidates)
    rates = evaluate(tree, {**values, **dict(zip(ids.values(), points, strict=True))})
    x = {s: f"_x{i}" for i, s in enumerate(ids)}
    for law in LAWS if reactants else LAWS[:1]:
        reaction = Reaction(tuple(reactants.items()), tuple(products.items()), law)
        unit = parse(formula(reaction, ("1", "_K", "_n")[: 1 + LAWS.index(law)], x))
        for constants in _constants(law, candidates):
            given = dict(zip((*x.values(), "_K", "_n"), (*points, *constants), strict=False))
            with np.errstate(all="ignore"):  # what is no number is no match
                ratio = rates / evaluate(unit, given)
            k = np.mean(ratio)
            if k >= 0 and np.ptp(ratio) <= _ROUNDING * k:
                return reaction, (float(k), *constants)
    return None


def _factors(
    tree: Any, named: Sequence[str], ids: Mapping[str, str], values: Mapping[str, float]
) -> list[str]:
    """The parameters that double the rate where they are doubled."""
    points = dict(zip(ids.values(), _points(len(ids), [1.0]), strict=True))
    rates = evaluate(tree, {**values, **points})
    return [
        name
        for name in named
        if np.allclose(
            evaluate(tree, {**values, **points, name: 2 * values[name]}),
            2 * rates,
            rtol=_ROUNDING,
            atol=0,
        )
    ]


def _points(species: int, scales: Sequence[float]) -> np.ndarray:
    """Random concentrations [species, point] about each constant: where a law saturates is seen
    there."""
    rng = np.random.default_rng(0)
    about = np.repeat([x for x in scales if x > 0], _POINTS)
    return about * np.exp(rng.normal(size=(species, len(about))))


def _constants(law: str, candidates: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """What K, or K and n, may be; Kⁿ may stand in the tree as one number."""
    positive = [x for x in candidates if x > 0]
    if law == "mass action":
        yield ()
    elif law == "michaelis-menten":
        yield from ((K,) for K in positive)
    else:
        for K, n in itertools.product(positive, positive):
            yield K, n
            yield K ** (1 / n), n


def names_in(tree: Any) -> set[str]:
    """Names in a syntax tree, but those of functions."""
    own = {tree.getName()} if tree.getType() == libsbml.AST_NAME else set()
    return own.union(*(names_in(tree.getChild(i)) for i in range(tree.getNumChildren())))


def _numbers(tree: Any) -> set[float]:
    own = {float(tree.getValue())} if tree.isNumber() else set()
    return own.union(*(_numbers(tree.getChild(i)) for i in range(tree.getNumChildren())))
