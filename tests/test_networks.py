"""Reaction networks: the ODE they stand for, their text and picture, and SBML."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.infer.util import log_density
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

import flowme as fm
from flowme.discovery import Reaction, ReactionNetwork, conserved, sparsest, up_to_second_order
from flowme.discovery.draw import bipartite_graph, draw

PREDATION = {"A -> 2A": 1.0, "A + B -> 2B": 0.5, "B -> 0": 0.8}
ENZYME = {"S + E -> C": 2.0, "C -> S + E": 0.3, "C -> E + P": 0.7}
SATURATING = {
    "0 -> A": 0.1,
    "A + E -> B + E (michaelis-menten)": (0.6, 0.4),
    "B -> B + E (hill)": (0.4, 0.7, 2.5),
    "2E -> A": 0.2,
}
NETWORKS = {"predation": PREDATION, "enzyme": ENZYME, "saturating": SATURATING}


def by_hand(name, x):
    if name == "predation":
        a, b = x
        return [a - 0.5 * a * b, 0.5 * a * b - 0.8 * b]
    if name == "enzyme":
        c, e, _, s = x
        on, off, cat = 2.0 * s * e, 0.3 * c, 0.7 * c
        return [on - off - cat, off + cat - on, cat, off - on]
    a, b, e = x
    turned, made, pair = 0.6 * e * a / (0.4 + a), 0.4 * b**2.5 / (0.7**2.5 + b**2.5), 0.2 * e**2
    return [0.1 - turned + pair, turned, made - 2 * pair]


@pytest.mark.parametrize("name", NETWORKS)
def test_right_hand_side(name):
    network = ReactionNetwork(NETWORKS[name])
    x = np.random.default_rng(0).exponential(size=len(network.species))
    np.testing.assert_allclose(network(0.0, x), by_hand(name, x), rtol=1e-12)


def test_hill_is_smooth_at_zero():
    network = ReactionNetwork({"B -> B + E (hill)": (0.4, 0.7, 2.5)})
    for x in (0.0, -1e-9):
        slope = jax.jacobian(lambda b: network(0.0, jnp.array([b, 0.0])))(x)
        np.testing.assert_array_equal(slope, 0.0)


def test_is_a_pytree_of_its_parameters():
    network = ReactionNetwork(SATURATING)
    doubled = jax.tree.map(lambda k: 2 * k, network)
    assert doubled.parameters["K2"] == 0.8 and doubled.reactions == network.reactions
    many = jax.vmap(lambda k: network.replace(k1=k)(0.0, jnp.ones(3))[0])(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(many[1] - many[0], 1.0)
    slopes = jax.grad(lambda n: n(0.0, jnp.array([2.0, 3.0]))[1])(ReactionNetwork(PREDATION))
    assert slopes.parameters == {"k1": 0.0, "k2": 6.0, "k3": -3.0}


def test_equal_whatever_the_order_and_the_rates():
    network = ReactionNetwork(PREDATION)
    same = ReactionNetwork(
        ["B -> 0", "B + A -> 2B", "A -> A + A"], [3.0, 1.0, 2.0], species=("B", "A")
    )
    assert network == same and hash(network) == hash(same)
    others = [
        ReactionNetwork({**PREDATION, "A -> 0": 0.0}),
        ReactionNetwork({"A -> 2A": 1, "A + B -> 2B": 1, "B -> 0 (michaelis-menten)": 1}),
    ]
    assert network not in others and len({network, same, *others}) == 3


def test_written_as_a_chemist_does():
    assert str(ReactionNetwork(SATURATING)).splitlines() == [
        "0 -> A                             k1 = 0.1",
        "A + E -> B + E (michaelis-menten)  k2 = 0.6, K2 = 0.4",
        "B -> B + E (hill)                  k3 = 0.4, K3 = 0.7, n3 = 2.5",
        "2E -> A                            k4 = 0.2",
    ]
    for r in ReactionNetwork(SATURATING).reactions:
        assert Reaction.parse(str(r)) == r


def test_molecules_given_twice_are_summed():
    assert Reaction((("A", 1), ("A", 1)), {"B": 2.0}) == Reaction.parse("2A -> 2B")


def test_names_that_can_be_read_back():
    reaction = Reaction({"α": 2, "A*": 1}, {"A'": 1, "_1": 3})
    assert Reaction.parse(str(reaction)) == reaction


def test_nothing_has_no_change():
    assert ReactionNetwork([])(0.0, jnp.zeros(0)).shape == (0,)


def test_sparsest_of_rates_of_any_size():
    """Whose squares are no numbers any more."""
    for k in (1e-320, 1e300):
        simple = sparsest(ReactionNetwork({"0 -> A": k, "0 -> 2A": k, "A + B -> 2B": k}))
        assert list(map(str, simple.reactions)) == ["0 -> A", "A + B -> 2B"]
        np.testing.assert_allclose(simple.rates, [3 * k, k], rtol=1e-3)


# name: reactions, conservation laws
CONSERVED = {
    "none": (PREDATION, []),
    "enzyme and substrate": (ENZYME, [{"C": 1, "E": 1}, {"C": 1, "P": 1, "S": 1}]),
    "two for one": ({"2A -> B": 1.0}, [{"A": 1, "B": 2}]),
    "a difference": ({"0 -> A + B": 1.0}, [{"A": -1, "B": 1}]),
    "nothing happens to C": ({"A -> B": 1.0, "A + C -> B + C": 1.0}, [{"A": 1, "B": 1}, {"C": 1}]),
    "shared": (
        {"A + B -> C + D": 1.0},
        [{"A": 1, "C": 1}, {"A": 1, "D": 1}, {"B": 1, "C": 1}],
    ),
}


@pytest.mark.parametrize("name", CONSERVED)
def test_conservation_laws(name):
    reactions, laws = CONSERVED[name]
    network = ReactionNetwork(reactions)
    found = network.conservation_laws
    assert sorted(map(str, found)) == sorted(map(str, laws))
    weights = np.array(conserved(network.net)).reshape(-1, len(network.species))
    assert not (network.net @ weights.T).any()
    assert len(weights) == len(network.species) - np.linalg.matrix_rank(network.net)


BAD = {
    "expected a rate of at least 0 of A -> 0; got -1.0": lambda: ReactionNetwork({"A -> 0": -1.0}),
    r"expected a rate and K of A -> 0 \(mich.* got \(1.0, 2.0, 3.0\)": lambda: ReactionNetwork(
        {"A -> 0 (michaelis-menten)": (1.0, 2.0, 3.0)}
    ),
    "expected n above 0": lambda: ReactionNetwork({"A -> 0 (hill)": (1.0, 2.0, 0.0)}),
    "expected each reaction once; got twice: A -> 0": lambda: ReactionNetwork(["A -> 0", "A->0"]),
    "expected all species once; .*without B": lambda: ReactionNetwork(["A -> B"], species="A"),
    "expected rates of 1 reactions; got 2": lambda: ReactionNetwork(["A -> B"], [1.0, 2.0]),
    "expected parameters named once": lambda: ReactionNetwork(
        {"A -> B": 1.0, "B -> A (hill)": 1.0}, names=["n2", "k"]
    ),
    "expected parameters among k1; got k2": lambda: ReactionNetwork(["A -> B"]).replace(k2=1.0),
    "expected psi to name some of k1; got only V": lambda: ReactionNetwork(["A -> B"])(
        0.0, jnp.ones(2), {"V": 1.0}
    ),
    "expected a rate law among": lambda: Reaction((("A", 1),), (), "unknown"),
    "expected a reactant for the rate law": lambda: ReactionNetwork(["0 -> A (hill)"]),
    "expected names of species .*; got 'my A'": lambda: Reaction((("my A", 1),), ()),
    "expected names of species .*; got '0'": lambda: ReactionNetwork([], species=["0"]),
    "expected names of species .*; got '2b'": lambda: up_to_second_order(["A", "2b"]),
    r"expected whole numbers of molecules.* in products; got \(\('B', 1.5\),\)": lambda: Reaction(
        (("A", 1),), (("B", 1.5),)
    ),
    "expected a list of reactions; got 'A -> B'": lambda: ReactionNetwork("A -> B"),
    "expected a network with species to draw": lambda: draw(ReactionNetwork([])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


# ---- as a structural model


def study_of(times, values):
    """values [subject, time]"""
    subjects = len(values)
    table = {
        "id": np.repeat(np.arange(subjects), len(times)),
        "time": np.tile(times, subjects),
        "y": np.ravel(values),
    }
    return fm.Study.from_frame(pd.DataFrame(table), subject="id", time="time", outcome="y")


@pytest.fixture(scope="module")
def decay():
    """A -> B of 12 subjects with their own k1, and B -> 0 of all: B as measured, and log k1."""
    rng = np.random.default_rng(0)
    times = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    log_k = np.log(0.5) + 0.4 * rng.normal(size=12)
    k, out = np.exp(log_k)[:, None], 0.3
    b = 2 * k / (k - out) * (np.exp(-out * times) - np.exp(-k * times))
    return study_of(times, b + 0.03 * rng.normal(size=b.shape)), log_k, b


def test_random_effect_on_one_rate(decay):
    """A NumPyro model with a rate that has a random effect, the other at the network's value,
    finds the individual rates (mode of the joint density, its variances held)."""
    study, log_k, b = decay
    network = ReactionNetwork({"A -> B": 1.0, "B -> 0": 0.3})

    def model(study):
        k1 = fm.population("k1", dist.LogNormal(-0.7, 1.0))
        with numpyro.plate("subject", 12):
            eta = numpyro.sample("eta", dist.Normal(0.0, 0.4))
        psi = fm.individual(study.subjects, k1=k1 * jnp.exp(eta))
        x = fm.solve(network, psi, study, initial=jnp.array([2.0, 0.0]))
        fm.observe("y", fm.residual.constant(x[..., 1], 0.03), study)

    @jax.jit
    @jax.value_and_grad
    def minus_log_density(theta):
        values = {"k1": jnp.exp(theta[0]), "eta": theta[1:]}
        return -log_density(model, (study,), {}, values)[0]

    mode = minimize(minus_log_density, np.zeros(13), jac=True, method="L-BFGS-B")
    assert mode.success
    # One k has an error of about 0.03: the residual error over the sensitivity of six records.
    np.testing.assert_allclose(mode.x[0] + mode.x[1:], log_k, atol=0.15)


def test_network_alone_is_solved(decay):
    """Without individual parameters; a psi that also names what is not the network's."""
    study = decay[0].subset([0, 1])
    network = ReactionNetwork(SATURATING, species=("E", "A", "B"))
    start = np.array([0.3, 2.0, 0.1])
    order = [1, 2, 0]

    def rhs(t, x):
        return np.array(by_hand("saturating", x[order]))[[2, 0, 1]]

    exact = solve_ivp(rhs, (0, 8), start, t_eval=study.time[0], rtol=1e-10, atol=1e-12).y.T
    alone = fm.solve(network, (), study, initial=start)
    np.testing.assert_allclose(alone[0], exact, atol=1e-6)
    np.testing.assert_array_equal(alone[0], alone[1])


# ---- the picture


def test_bipartite_graph():
    graph = bipartite_graph(ReactionNetwork({"A + B -> 2B": 0.5, "A + E -> E": 1.0}))
    edges = {(a, b): (e["molecules"], e["catalyst"]) for a, b, e in graph.edges(data=True)}
    first, second = ("reaction", 0), ("reaction", 1)
    a, b, e = (("species", s) for s in "ABE")
    assert edges == {
        (a, first): (1, False),
        (b, first): (1, False),
        (first, b): (2, False),
        (a, second): (1, False),
        (e, second): (1, True),
        (second, e): (1, True),
    }


def test_picture_names_everything_apart():
    network = ReactionNetwork(SATURATING, species=("A", "B", "E", "alone"))
    figure = draw(network)
    (ax,) = figure.axes
    shown = {t.get_text(): np.array(t.get_position()) for t in ax.texts if t.get_text()}
    assert {*network.species, *network.names, "0.6\nK2 = 0.4"} <= set(shown)
    nodes = np.array([shown[name] for name in (*network.species, *network.names)])
    apart = np.linalg.norm(nodes[:, None] - nodes[None], axis=-1) + 9 * np.eye(len(nodes))
    assert apart.min() > 0.7  # a node is 0.4 wide
    plt.close(figure)


# ---- SBML


@pytest.fixture
def sbml():
    pytest.importorskip("libsbml")
    from flowme.discovery import sbml

    return sbml


EVERYTHING = ReactionNetwork(
    {**SATURATING, "K3* + A -> A (michaelis-menten)": (0.3, 2e-4), "A -> 2A": 1.0},
    species=("E", "K3*", "A", "B"),
    names=["in", "turn", "make", "pair", "off", "A"],
)


def test_sbml_round_trip(sbml):
    text = sbml.to_sbml(EVERYTHING, [0.3, 1.0, 2.0, 0.0])
    back = sbml.from_sbml(text)
    assert back.network.reactions == EVERYTHING.reactions
    assert back.network.species == EVERYTHING.species and back.network.names == EVERYTHING.names
    assert back.network.parameters == EVERYTHING.parameters
    np.testing.assert_array_equal(back.initial, [0.3, 1.0, 2.0, 0.0])
    assert sbml.to_sbml(*back) == text


SYMBOLS = ReactionNetwork(
    {
        "time -> B": 0.7,
        "2inf + nan -> true + INF (hill)": (1.0, 2.0, 1.0),
        "pi + _K -> α' (michaelis-menten)": (0.0, 3.0),
        "avogadro -> compartment (hill)": (0.0, 1.0, 1.0),
    },
    names=["time", "sin", "n9", "e"],
)


def test_sbml_of_names_that_are_symbols_and_of_laws_that_look_alike(sbml):
    """A rate of 0 and Hill's n = 1, and species called as what formulas call a constant."""
    text = sbml.to_sbml(SYMBOLS)
    back = sbml.from_sbml(text).network
    assert not any(symbol in text for symbol in ("csymbol", "<pi/>", "<true/>", "<infinity/>"))
    assert back == SYMBOLS and back.species == SYMBOLS.species
    assert back.parameters == SYMBOLS.parameters


def test_sbml_without_reactions(sbml):
    network, initial = sbml.from_sbml(sbml.to_sbml(ReactionNetwork([], species=["A"]), [2.0]))
    assert not network.reactions and network.species == ("A",) and initial == [2.0]


def one_law(sbml, law, k='value="2"'):
    """A -> 0 with a kinetic law of k and K = 3."""
    import libsbml

    text = sbml.to_sbml(ReactionNetwork({"A -> 0": 1.0}, names=["k"]))
    math = libsbml.writeMathMLToString(libsbml.parseL3Formula(f"compartment * {law}"))
    text = text.replace('value="1"', k).replace(
        "</listOfParameters>", '<parameter id="K" value="3" constant="true"/></listOfParameters>'
    )
    head, tail = text.split("<kineticLaw>")[0], text.split("</kineticLaw>")[1]
    return sbml.from_sbml(f"{head}<kineticLaw>{math.split('?>')[1]}</kineticLaw>{tail}").network


def test_a_rate_has_the_name_of_what_it_is(sbml):
    written = {
        "k * A": "k = 2",
        "k * K * A": "k1 = 6",
        "k * A / K": "k1 = 0.6667",
        "k * K * A / (K + A)": "k1 = 6, K1 = 3",
        "K * A / (k + A)": "K = 3, K1 = 2",
    }
    assert {law: one_law(sbml, law).written_rate(0) for law in written} == written


BAD_SBML = {
    r"expected initial concentrations of 2 species \(A, B\); got 1": lambda sbml: sbml.to_sbml(
        ReactionNetwork(["A -> B"]), [1.0]
    ),
    "expected initial concentrations of at least 0; got nan of B": lambda sbml: sbml.to_sbml(
        ReactionNetwork(["A -> B"]), [1.0, np.nan]
    ),
    "expected the path of an SBML file, or its text.*'hello', and there is no": lambda sbml: (
        sbml.from_sbml("hello")
    ),
    "expected parameters of at least 0 .*'reaction0'.* got no value of k": lambda sbml: one_law(
        sbml, "k * A", ""
    ),
    "expected parameters of at least 0 .* got -1 of k": lambda sbml: one_law(
        sbml, "k * A", 'value="-1"'
    ),
}


@pytest.mark.parametrize("message", BAD_SBML)
def test_bad_sbml(sbml, message):
    with pytest.raises(ValueError, match=message):
        BAD_SBML[message](sbml)


def test_sbml_is_simulated_alike_elsewhere(sbml):
    roadrunner = pytest.importorskip("roadrunner")
    start = [0.3, 1.0, 2.0, 0.1]
    other = roadrunner.RoadRunner(sbml.to_sbml(EVERYTHING, start))
    other.integrator.relative_tolerance, other.integrator.absolute_tolerance = 1e-10, 1e-12
    other.selections = ["time", *(f"[{s}]" for s in other.model.getFloatingSpeciesIds())]
    table = np.array(other.simulate(0, 4, 9))
    rhs = jax.jit(EVERYTHING)
    ours = solve_ivp(rhs, (0, 4), start, t_eval=table[:, 0], rtol=1e-10, atol=1e-12).y.T
    np.testing.assert_allclose(table[:, 1:], ours, rtol=1e-6, atol=1e-8)


FOREIGN = """<sbml xmlns="http://www.sbml.org/sbml/level2/version4" level="2" version="4">
<model id="m"><listOfFunctionDefinitions><functionDefinition id="mm"><math
xmlns="http://www.w3.org/1998/Math/MathML"><lambda><bvar><ci>v</ci></bvar><bvar><ci>K</ci></bvar>
<bvar><ci>s</ci></bvar><apply><divide/><ci>v</ci><apply><plus/><cn>1</cn><apply><divide/><ci>K</ci>
<ci>s</ci></apply></apply></apply></lambda></math></functionDefinition></listOfFunctionDefinitions>
<listOfCompartments><compartment id="c" size="2"/></listOfCompartments>
<listOfSpecies><species id="S" compartment="c" initialAmount="3"/>
<species id="P" compartment="c" initialConcentration="0"/>
<species id="E" compartment="c" initialConcentration="0.5"/>@species@</listOfSpecies>
<listOfParameters><parameter id="kcat" value="4"/>
<parameter id="K" value="0.01"/></listOfParameters>@rule@
<listOfReactions><reaction id="turn" reversible="false">
<listOfReactants><speciesReference species="S"@count@/></listOfReactants>
<listOfProducts><speciesReference species="P"/></listOfProducts>
<listOfModifiers><modifierSpeciesReference species="E"/></listOfModifiers>
<kineticLaw><math xmlns="http://www.w3.org/1998/Math/MathML"><apply><@outer@/><ci>c</ci>
<ci>E</ci><apply><ci>mm</ci><ci>kcat</ci><ci>K</ci><ci>S</ci></apply></apply></math></kineticLaw>
</reaction></listOfReactions></model></sbml>"""


def foreign(**changes):
    text = FOREIGN
    for key, default in (("species", ""), ("rule", ""), ("count", ""), ("outer", "times")):
        text = text.replace(f"@{key}@", changes.get(key, default))
    return text


def test_sbml_of_others_is_understood(sbml):
    """A modifier, a function definition, a volume of 2, and Michaelis' law written his own way."""
    network, initial = sbml.from_sbml(foreign())
    expected = "E + S -> E + P (michaelis-menten)  kcat = 4, K1 = 0.01"
    assert str(network) == expected and network.species == ("S", "P", "E")
    np.testing.assert_array_equal(initial, [1.5, 0.0, 0.5])


RULE = (
    '<listOfRules><assignmentRule variable="K"><math xmlns="http://www.w3.org/1998/Math/MathML">'
    "<cn>1</cn></math></assignmentRule></listOfRules>"
)
UNSUPPORTED = {
    "expected SBML without rules; got 1": {"rule": RULE},
    "expected whole molecules in reaction 'turn'; got 1.5": {"count": ' stoichiometry="1.5"'},
    "expected a rate by mass action, .* of reaction 'turn'; got": {"outer": "plus"},
    "expected species that reactions change; got X": {
        "species": '<species id="X" compartment="c" boundaryCondition="true"/>'
    },
    "expected a valid SBML model": {"rule": "</model>"},
}


def test_other_functions_are_refused(sbml):
    from flowme.discovery.sbml_formula import evaluate, parse

    with pytest.raises(ValueError, match="expected formulas of numbers, names.*got exp"):
        evaluate(parse("2 * exp(A)"), {"A": 1.0})


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_sbml(sbml, message):
    with pytest.raises(ValueError, match=message):
        sbml.from_sbml(foreign(**UNSUPPORTED[message]))
