"""Networks that are the same ODE are recognised, and the simplest of them is found."""

import itertools

import numpy as np
import pytest

from flowme.discovery import (
    Library,
    ReactionNetwork,
    canonical,
    class_key,
    recovers,
    same_ode,
    sparsest,
    up_to_second_order,
)

HIV = {
    "0 -> T": 0.5,
    "T -> 0": 0.1,
    "T + V -> I + V": 0.4,
    "I -> 0": 0.6,
    "I -> I + V": 2.0,
    "V -> 0": 1.5,
}
# What stepwise search returned for it, an identical ODE.
FOUND = {
    "0 -> 2T": 0.25,
    "T -> 0": 0.1,
    "I -> I + V": 0.8,
    "I -> 2V": 0.6,
    "V -> 0": 1.5,
    "T + V -> I + V": 0.4,
}
LIBRARY = up_to_second_order("TIV")

# name: structures, and whether they reach the same ODEs over all rates
PAIRS = {
    "inflow of one or two": (["0 -> T"], ["0 -> 2T"], True),
    "order of writing": (["T -> 0", "0 -> T"], ["0 -> T", "T -> 0"], True),
    "a reaction between two others": (
        ["T -> I", "T -> V"],
        ["T -> I", "T -> V", "T -> I + V"],
        False,  # T -> I + V makes two of one
    ),
    "inside the cone": (["I -> 0", "I -> I + V"], ["I -> 0", "I -> I + V", "I -> V"], True),
    "narrower cone": (["I -> 0", "I -> I + V"], ["I -> 2V", "I -> I + V"], False),
    "a line, spanned in two ways": (
        ["T -> 0", "T -> 2T", "T -> T + V"],
        ["T -> 0", "T -> 2T", "T -> V"],
        True,
    ),
    "a half-line": (["T -> 0", "T -> 2T"], ["T -> 0"], False),
    "same change of another source": (["T -> 0"], ["2T -> T"], False),
    "rate law": (["T -> 0"], ["T -> 0 (michaelis-menten)"], False),
    "saturating, one or two": (["T -> V (hill)"], ["T -> V (hill)", "T -> 2V (hill)"], False),
    "saturating, two constants": (
        ["V -> V + T (michaelis-menten)"],
        ["V -> V + T (michaelis-menten)", "V -> V + 2T (michaelis-menten)"],
        False,
    ),
    "saturating, one direction": (["V -> V + T (hill)"], ["V -> V + 2T (hill)"], True),
}


def rows(library, reactions):
    return [library.index(r) for r in reactions]


def key_of(reactions):
    return class_key(Library("ITV", reactions), range(len(reactions)))


@pytest.mark.parametrize("name", PAIRS)
def test_class_key(name):
    a, b, same = PAIRS[name]
    assert (key_of(a) == key_of(b)) is same


def test_key_of_rows_mask_or_another_library():
    mask = np.zeros(len(LIBRARY), bool)
    mask[rows(LIBRARY, HIV)] = True
    key = class_key(LIBRARY, mask)
    assert key == class_key(LIBRARY, rows(LIBRARY, HIV)) == key_of(list(HIV))
    assert key == "0: +T; I: -I, +V; T + V: +I -T; T: -T; V: -V"


def reached(library, structure, rng):
    """Net vectors by source that random rates of a structure give."""
    return ReactionNetwork([library.reactions[r] for r in structure], rng.exponential(size=9)[:3])


def test_equal_keys_are_mutual_recovery():
    """The key says what least squares say: each of two structures reaches what the other does."""
    library = up_to_second_order("A")
    rng = np.random.default_rng(0)
    structures = list(itertools.combinations(range(len(library)), 3))
    networks = {s: [reached(library, s, rng) for _ in range(8)] for s in structures}
    seen = {True: 0, False: 0}
    for a, b in itertools.combinations(structures, 2):
        both = all(
            recovers(networks[x][0], truth, every=True)
            for x, y in ((a, b), (b, a))
            for truth in networks[y]
        )
        assert both == (class_key(library, a) == class_key(library, b))
        seen[both] += 1
    assert min(seen.values()) > 5


def test_same_ode_with_rates():
    truth, found = ReactionNetwork(HIV), ReactionNetwork(FOUND)
    assert same_ode(truth, found) and truth != found
    assert not same_ode(truth, found.replace(k1=0.26))
    x = np.array([0.7, 2.0, 1.1])
    np.testing.assert_allclose(truth(0.0, x), found(0.0, x), rtol=1e-12)


def test_hill_with_exponent_one_is_michaelis_menten():
    hill = ReactionNetwork({"S -> P (hill)": (2.0, 0.5, 1.0)})
    assert same_ode(hill, ReactionNetwork({"S -> P (michaelis-menten)": (2.0, 0.5)}))
    assert not same_ode(hill, hill.replace(n1=2.0))


def test_recovery_is_of_the_true_rates():
    truth = ReactionNetwork(HIV)
    assert recovers(FOUND, truth) and recovers(FOUND, truth, every=True)
    # Too little V for I -> 2V: I would have to be made.
    assert not recovers(FOUND, truth.replace(k5=1.0))
    assert recovers([*FOUND, "I -> T"], truth)
    assert not recovers([*FOUND, "I -> T"], truth, every=True)  # idle
    assert not recovers([*FOUND, "2T -> T"], truth)  # another source
    assert not recovers(list(FOUND)[1:], truth)


def test_saturating_laws_of_one_source_have_one_constant_each():
    truth = ReactionNetwork(
        {"S -> P (michaelis-menten)": (1.0, 0.5), "S -> Q (michaelis-menten)": (1.0, 5.0)}
    )
    assert recovers(["S -> P (michaelis-menten)", "S -> Q (michaelis-menten)"], truth)
    merged = ["S -> P (michaelis-menten)", "S -> P + Q (michaelis-menten)"]
    assert not recovers(merged, truth)
    assert not recovers(["S -> P", "S -> Q"], truth)


def test_representative_with_rates():
    truth, found = ReactionNetwork(HIV), ReactionNetwork(FOUND)
    simplest = sparsest(found)
    assert simplest == truth == sparsest(truth) and same_ode(simplest, truth)
    one = sparsest(ReactionNetwork({"A -> B": 1.0, "A -> A + B": 1.0}))
    assert str(one) == "A -> 2B  k1 = 1"
    none = sparsest(ReactionNetwork({"T -> 0": 0.3, "T -> 2T": 0.3, "0 -> T": 1.0}))
    assert none == ReactionNetwork({"0 -> T": 1.0})


def test_representative_prefers_what_the_user_finds_plausible():
    found = ReactionNetwork({"0 -> T": 1.0})
    assert sparsest(found, plausibility=lambda r: float(str(r) == "0 -> 2T")).rates == (0.5,)


def test_canonical_structure():
    parallel = rows(LIBRARY, ["0 -> 2T", "0 -> T", "T -> 0", "I -> 0", "I -> V", "I -> I + V"])
    simplest = canonical(LIBRARY, parallel)
    expected = ["0 -> T", "T -> 0", "I -> 0", "I -> I + V"]
    assert simplest == tuple(sorted(rows(LIBRARY, expected)))
    assert class_key(LIBRARY, simplest) == class_key(LIBRARY, parallel)


def test_canonical_is_one_structure_of_each_class():
    rng = np.random.default_rng(1)
    by_key = {}
    for _ in range(300):
        structure = rng.choice(len(LIBRARY), 5, replace=False)
        simplest = canonical(LIBRARY, structure)
        assert len(simplest) <= 5 and canonical(LIBRARY, simplest) == simplest
        assert by_key.setdefault(class_key(LIBRARY, structure), simplest) == simplest
    from_one = canonical(LIBRARY, rows(LIBRARY, ["T -> I", "T -> 2T", "T -> 0"]))
    assert class_key(LIBRARY, from_one) == "T: ±(+T), +I" and len(from_one) == 3
