"""Networks as SBML, the format of systems biology, and back. Needs `pip install flowme[sbml]`.

Reference: Keating et al., Mol Syst Biol 16 (2020) e9110: SBML level 3.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import libsbml
except ImportError as error:
    raise ImportError(
        "SBML needs python-libsbml, which is not installed: pip install 'flowme[sbml]'"
    ) from error

from .network import ReactionNetwork
from .reaction import Reaction, is_name
from .sbml_formula import formula, names_in, parse, recognise

_UNSUPPORTED = {
    "events": "getNumEvents",
    "rules": "getNumRules",
    "constraints": "getNumConstraints",
    "initial assignments that depend on others": "getNumInitialAssignments",
}
_WORKED_OUT = ("expandFunctionDefinitions", "promoteLocalParameters", "expandInitialAssignments")


class SBMLModel(NamedTuple):
    """A network and the initial concentrations of its species, [state]."""

    network: ReactionNetwork
    initial: np.ndarray


def to_sbml(network: ReactionNetwork, initial: Sequence[float] | None = None) -> str:
    """The network as SBML (level 3, version 2), in one compartment of volume 1.

    Names that are no identifiers of SBML, such as "K3*", are written as names beside them.

    Args:
        network: what to write.
        initial: concentrations of the species at time 0, [state]; 0 if None.

    Returns:
        The text of the file: `Path("network.xml").write_text(to_sbml(network))`.

    Raises:
        ValueError: not one initial concentration of each species, finite and at least 0.
    """
    document = libsbml.SBMLDocument(3, 2)
    model = document.createModel()
    ids = _identifiers(network)
    cell = ids["compartment", ""]
    _set(model.createCompartment(), Id=cell, Constant=True, Size=1.0, SpatialDimensions=3.0)
    start = [0.0] * len(network.species) if initial is None else list(initial)
    for name, x in zip(network.species, _concentrations(start, network.species), strict=True):
        _set(
            model.createSpecies(), Id=ids["species", name], Name=name, Compartment=cell,
            InitialConcentration=x, HasOnlySubstanceUnits=False, BoundaryCondition=False,
            Constant=False,
        )  # fmt: skip
    for name, value in network.parameters.items():
        parameter = model.createParameter()
        _set(parameter, Id=ids["parameter", name], Name=name, Value=float(value), Constant=True)
    for i, reaction in enumerate(network.reactions):
        written = model.createReaction()
        _set(written, Id=ids["reaction", str(i)], Name=str(reaction), Reversible=False)
        _write_sides(written, reaction, ids)
        own = [ids["parameter", name] for name in network.names_of(i)]
        law = formula(reaction, own, {s: ids["species", s] for s in reaction.species})
        written.createKineticLaw().setMath(parse(f"{cell} * {law}", model))
    return libsbml.writeSBMLToString(document)


def from_sbml(source: str | Path) -> SBMLModel:
    """Reads a network from SBML.

    A law is recognised by what it computes, however it is written, if that is mass action,
    Michaelis-Menten or Hill in the reactants. Local parameters, function definitions and initial
    assignments are worked out. A modifier becomes a catalyst, on both sides of its reaction.
    Species have the names of the file, or its identifiers where a name cannot stand in the text
    of a reaction. A rate has the name of a parameter that is it; k1, k2, ... where none is. A file
    without reactions is a network without reactions.

    Args:
        source: path of a file, or its text.

    Raises:
        ValueError: no such file, not valid SBML, or what a `ReactionNetwork` cannot say: events,
            rules, several compartments, species held constant, other laws. The message names the
            element.
    """
    text = str(source)
    is_text = text.lstrip().startswith("<")
    if not is_text and not os.path.isfile(text):
        raise ValueError(
            f"expected the path of an SBML file, or its text, which begins with '<'; got "
            f"{text[:80]!r}, and there is no such file"
        )
    document = libsbml.readSBMLFromString(text) if is_text else libsbml.readSBMLFromFile(text)
    if document.getNumErrors(libsbml.LIBSBML_SEV_ERROR) or document.getModel() is None:
        problem = document.getError(0).getMessage() if document.getNumErrors() else "no model"
        where = "" if is_text else f" in {text!r}"
        raise ValueError(f"expected a valid SBML model{where}; got: {' '.join(problem.split())}")
    for conversion in _WORKED_OUT:
        properties = libsbml.ConversionProperties()
        properties.addOption(conversion, True)
        document.convert(properties)
    model = document.getModel()
    _check_supported(model)
    return _network(model)


def _network(model: Any) -> SBMLModel:
    """The network of a model that `_check_supported` let pass."""
    species = list(model.getListOfSpecies())
    names = {s.getId(): s.getName() or s.getId() for s in species}
    if len(set(names.values())) < len(names) or not all(map(is_name, names.values())):
        names = {identifier: identifier for identifier in names}
    volume = model.getCompartment(0).getSize() if model.getNumCompartments() else 1.0
    parameters = list(model.getListOfParameters())
    values = {p.getId(): p.getValue() if p.isSetValue() else np.nan for p in parameters}
    sizes = {c.getId(): c.getSize() for c in model.getListOfCompartments()}
    found: dict[Reaction, tuple[float, ...]] = {}
    rates = []
    for written in model.getListOfReactions():
        reaction, constants, factors = _reaction(written, names, values, sizes)
        if reaction in found:
            raise ValueError(f"expected each reaction once; got {reaction} twice in the SBML")
        # A law is an amount per time, in SBML; here it is a concentration per time.
        k = constants[0] / volume
        rate = next((name for name in factors if abs(values[name] - k) <= 1e-9 * k), None)
        # A parameter's value is without the rounding of the products.
        found[reaction] = (k if rate is None else values[rate], *constants[1:])
        rates.append(rate)
    called = {p.getId(): p.getName() or p.getId() for p in parameters}
    reserved = {f"{c}{i + 1}" for i, own in enumerate(found.values()) for c in "Kn"[: len(own) - 1]}
    initial = [_initial(s, volume) for s in species]
    return SBMLModel(
        ReactionNetwork(
            found, species=list(names.values()), names=_rate_names(rates, called, reserved)
        ),
        np.array(_concentrations(initial, list(names.values()))),
    )


def _rate_names(
    rates: Sequence[str | None], called: Mapping[str, str], reserved: set[str]
) -> list[str]:
    """Names of the rates: of the parameter that is the rate of one reaction, and of it alone, but
    those of constants; otherwise k1, k2, ..., with _ if the file has another parameter so named."""
    own = [None if name is None else called[name] for name in rates]
    twice = {name for name in own if own.count(name) > 1}
    names: list[str] = []
    for i, name in enumerate(own):
        if name is None or name in twice or name in reserved:
            name = f"k{i + 1}"
            while name in called.values() or name in names:
                name += "_"
        names.append(name)
    return names


def _reaction(
    written: Any,
    names: Mapping[str, str],
    values: Mapping[str, float],
    sizes: Mapping[str, float],
) -> tuple[Reaction, tuple[float, ...], list[str]]:
    """What `recognise` finds in a reaction of the file."""
    reactants, products = Counter[str](), Counter[str]()
    for side, references in (
        (reactants, written.getListOfReactants()),
        (products, written.getListOfProducts()),
    ):
        for reference in references:
            side[names[reference.getSpecies()]] += _molecules(written, reference)
    for modifier in written.getListOfModifiers():
        catalyst = names[modifier.getSpecies()]
        if catalyst not in reactants:
            reactants[catalyst] += 1
            products[catalyst] += 1
    law = written.getKineticLaw().getMath()
    ids = {name: identifier for identifier, name in names.items()}
    found = recognise(law, reactants, products, ids, values, sizes)
    if found is None:
        raise ValueError(_unrecognised(written.getId(), law, values))
    return found


def _unrecognised(reaction: str, law: Any, values: Mapping[str, float]) -> str:
    """Why a law is none of those that a network has."""
    text = libsbml.formulaToL3String(law)
    for name in sorted(names_in(law) & values.keys()):
        if not values[name] >= 0:
            got = "no value" if np.isnan(values[name]) else f"{values[name]:g}"
            return (
                f"expected parameters of at least 0 in the law of reaction {reaction!r}, {text}; "
                f"got {got} of {name}"
            )
    return (
        "expected a rate by mass action, Michaelis-Menten or Hill in the reactants of reaction "
        f"{reaction!r}; got {text}. A reversible reaction must be written as two"
    )


def _molecules(written: Any, reference: Any) -> int:
    n = reference.getStoichiometry()
    n = 1.0 if np.isnan(n) else n  # level 3 has no default
    if n != int(n) or n < 1:
        raise ValueError(
            f"expected whole molecules in reaction {written.getId()!r}; got {n} of "
            f"{reference.getSpecies()}"
        )
    return int(n)


def _initial(species: Any, volume: float) -> float:
    """Concentration at time 0; 0 where the file says none."""
    if species.isSetInitialConcentration():
        return float(species.getInitialConcentration())
    return float(species.getInitialAmount()) / volume if species.isSetInitialAmount() else 0.0


def _concentrations(initial: Sequence[Any], species: Sequence[str]) -> list[float]:
    """Initial concentrations [state], checked."""
    names = ", ".join(species)
    if len(initial) != len(species):
        raise ValueError(
            f"expected initial concentrations of {len(species)} species ({names}); got "
            f"{len(initial)}: {list(initial)}"
        )
    values = [float(x) for x in initial]
    for name, x in zip(species, values, strict=True):
        if not 0 <= x < np.inf:
            raise ValueError(f"expected initial concentrations of at least 0; got {x:g} of {name}")
    return values


def _check_supported(model: Any) -> None:
    for what, count in _UNSUPPORTED.items():
        if getattr(model, count)():
            raise ValueError(f"expected SBML without {what}; got {getattr(model, count)()}")
    if model.getNumCompartments() > 1:
        names = ", ".join(c.getId() for c in model.getListOfCompartments())
        raise ValueError(f"expected SBML of one compartment; got {names}")
    volume = model.getCompartment(0).getSize() if model.getNumCompartments() else 1.0
    if not volume > 0:
        raise ValueError(f"expected a compartment with a size above 0; got {volume}")
    for s in model.getListOfSpecies():
        if s.getConstant() or s.getBoundaryCondition():
            raise ValueError(f"expected species that reactions change; got {s.getId()} held fixed")
        if s.getHasOnlySubstanceUnits() and volume != 1:
            raise ValueError(f"expected concentrations in laws; got amounts of {s.getId()}")
    for r in model.getListOfReactions():
        if r.getKineticLaw() is None or r.getKineticLaw().getMath() is None:
            raise ValueError(f"expected a kinetic law of each reaction; got none of {r.getId()!r}")


def _write_sides(written: Any, reaction: Reaction, ids: Mapping[tuple[str, str], str]) -> None:
    for create, side in (
        (written.createReactant, reaction.reactants),
        (written.createProduct, reaction.products),
    ):
        for s, n in side:
            _set(create(), Species=ids["species", s], Stoichiometry=float(n), Constant=True)


def _identifiers(network: ReactionNetwork) -> dict[tuple[str, str], str]:
    """An SBML identifier, letters, digits and _, of everything by its kind and name."""
    wanted = [
        *(("species", s) for s in network.species),
        *(("parameter", name) for name in network.parameters),
        *(("reaction", str(i)) for i in range(len(network.reactions))),
        ("compartment", ""),
    ]
    ids: dict[tuple[str, str], str] = {}
    for kind, name in wanted:
        text = re.sub(r"\W", "_", name.replace("*", "_star").replace("'", "_prime"), flags=re.A)
        text = text if re.match(r"[A-Za-z_]", text) else f"{kind}{text}"
        while text in ids.values():
            text += "_"
        ids[kind, name] = text
    return ids


def _set(element: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        if getattr(element, f"set{name}")(value) != libsbml.LIBSBML_OPERATION_SUCCESS:
            raise ValueError(f"expected {name} that SBML takes; got {value!r}")
