"""Rate laws in SBML: written as formulas, and recognised by what they compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def parse(text: str) -> Any:
    """The syntax tree of an infix formula."""
    return libsbml.parseL3Formula(text)


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
) -> tuple[Reaction, tuple[float, ...], str | None] | None:
    """The reaction whose law, as `formula` writes it, is what a syntax tree computes.

    The tree must be proportional to it at random concentrations, with the law's constants among
    the numbers and parameters in the tree.

    Args:
        tree: a kinetic law.
        reactants: molecules consumed, by species; catalysts are on both sides.
        products: molecules produced.
        ids: the identifier of each species.
        parameters: their values by identifier.
        sizes: those of compartments.

    Returns:
        The reaction, its k, K, n, and the name that stands for k, if one does; None if there
        is no such law.
    """
    named = sorted(_names(tree) & parameters.keys())
    candidates = sorted({1.0, *(parameters[name] for name in named), *_numbers(tree)})
    points = dict(zip(ids.values(), _points(len(ids), candidates), strict=True))

    def rates_with(**changed: float) -> np.ndarray:
        return evaluate(tree, {**sizes, **parameters, **changed, **points})

    for law in LAWS if reactants else LAWS[:1]:
        reaction = Reaction(tuple(reactants.items()), tuple(products.items()), law)
        unit = parse(formula(reaction, ("1", "_K", "_n")[: 1 + LAWS.index(law)], ids))
        for constants in _constants(law, candidates):
            given = dict(zip(("_K", "_n"), constants, strict=False))
            with np.errstate(all="ignore"):  # what is no number is no match
                ratio = rates_with() / evaluate(unit, {**points, **given})
            k = np.mean(ratio)
            if k >= 0 and np.ptp(ratio) <= _ROUNDING * k:
                return reaction, (float(k), *constants), _factor(named, parameters, rates_with)
    return None


def _factor(
    named: Sequence[str], parameters: Mapping[str, float], rates_with: Callable[..., np.ndarray]
) -> str | None:
    """The parameter that doubles the rate where it is doubled."""
    for name in named:
        doubled = rates_with(**{name: 2 * parameters[name]})
        if np.allclose(doubled, 2 * rates_with(), rtol=_ROUNDING, atol=0):
            return name
    return None


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


def _names(tree: Any) -> set[str]:
    own = {tree.getName()} if tree.getType() == libsbml.AST_NAME else set()
    return own.union(*(_names(tree.getChild(i)) for i in range(tree.getNumChildren())))


def _numbers(tree: Any) -> set[float]:
    own = {float(tree.getValue())} if tree.isNumber() else set()
    return own.union(*(_numbers(tree.getChild(i)) for i in range(tree.getNumChildren())))
