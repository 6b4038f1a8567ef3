"""`discover`: known networks found again, nothing of the truth let in, nothing lost."""

import inspect
import time
import warnings
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from networks import LOTKA_VOLTERRA, MICHAELIS_MENTEN, SIR, observed

import flowme as fm
from flowme import discovery
from flowme.discovery import data, discover, fit, memory, problem, search


def found(case, **options):
    study = observed(case)
    species = list(case[0].species)
    initial = {s: f"{s}0" for s in species}
    return discover(study, species, initial=initial, progress=False, **options), study


@pytest.fixture(scope="module")
def lotka_volterra():
    begun = time.process_time()
    result, study = found(LOTKA_VOLTERRA, evaluations=200, patience=4)
    return result, study, time.process_time() - begun


def test_lotka_volterra_is_found(lotka_volterra):
    result, _, seconds = lotka_volterra
    assert result.best == LOTKA_VOLTERRA[0] and seconds < 20
    truth = {str(r): k for r, k in zip(LOTKA_VOLTERRA[0].reactions, (1.0, 0.5, 0.8), strict=True)}
    for reaction, row in result.rates.loc[1].iterrows():
        assert abs(row["rate"] - truth[reaction]) < 4 * row["se"] < 0.05 * truth[reaction]
    assert (result.inclusion.iloc[:3] > 0.9).all()
    assert set(result.inclusion.index[:3]) == set(truth)


def test_sir_is_found():
    begun = time.process_time()
    result, _ = found(SIR, evaluations=64, leaders=2)
    assert result.best == SIR[0] and time.process_time() - begun < 20


def test_leaderboard_says_what_each_part_is(lotka_volterra):
    result, _, _ = lotka_volterra
    board = result.leaderboard
    np.testing.assert_allclose(board["reward"], board["prediction"] + board["complexity"])
    n = sum(result.memory.problem.courses.count)
    np.testing.assert_allclose(board["BIC"], -2 * n * board["prediction"])
    assert board["reward"].is_monotonic_decreasing and board["dBIC"].iloc[0] == 0
    assert board["class"].is_unique and board["network"].is_unique
    assert 0.99 < board["probability"].sum() <= 1 + 1e-9
    assert "Probability that a reaction is there" in str(result)


def test_best_goes_into_solve(lotka_volterra):
    result, study, _ = lotka_volterra
    x = fm.solve(result.best, (), study, initial=result.initial[0])
    error = (x[..., 0] - study.values["A"]) / study.values["A"].std()
    assert 0.04 < np.sqrt(np.mean(error**2)) < 0.06


def test_plot_and_tables(lotka_volterra):
    result, _, _ = lotka_volterra
    figure = result.plot(networks=2)
    assert [ax.get_xlabel() for ax in figure.axes[-4:]] == ["time (h)"] * 4
    assert figure.axes[0].get_ylabel() == "A (mM)"
    assert len(figure.axes[0].get_lines()) == 3  # two networks and the data
    plt.close(figure)
    draws = result.to_arviz(draws=400)
    included = draws.posterior["included"].mean(("chain", "draw")).to_series()
    assert (included[result.best.reactions[0].__str__()]) > 0.9
    rate = draws.posterior["rate"].sel(reaction="A -> 2A").where(lambda k: k > 0)
    assert abs(float(rate.mean()) - 1.0) < 0.02
    assert draws.observed_data["B"].shape == (4, 40)


def test_judge_sets_a_hypothesis_beside_the_best(lotka_volterra):
    result, _, _ = lotka_volterra
    same = result.judge(LOTKA_VOLTERRA[0])
    assert abs(same["dBIC"]) < 0.1 and abs(same["nats"]) < 0.1
    poor = result.judge(discovery.ReactionNetwork({"A -> 2A": 1.0, "B -> 0": 0.8}))
    assert poor["dBIC"] > 100 and poor["nats"] > 50


def test_same_seed_same_search_and_an_interrupted_one_goes_on(tmp_path, monkeypatch):
    """Stopped by Ctrl-C in its second round and taken up again, it ends as if it had not been."""
    whole, _ = found(LOTKA_VOLTERRA, evaluations=64, leaders=1, seed=7)
    real, calls = search.advance, []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(search, "advance", interrupted)
    options = {"evaluations": 64, "leaders": 1, "seed": 7, "checkpoint": tmp_path / "search"}
    part, _ = found(LOTKA_VOLTERRA, **options)
    assert part.course.why == "interrupted" and part.course.evaluations == 32
    rest, _ = found(LOTKA_VOLTERRA, **options)
    assert rest.course.evaluations == 64 and len(calls) == 3
    assert list(rest.memory.scored) == list(whole.memory.scored)
    np.testing.assert_array_equal(rest.leaderboard["BIC"], whole.leaderboard["BIC"])
    with pytest.raises(ValueError, match="a search with the same seed"):
        found(LOTKA_VOLTERRA, **{**options, "seed": 8})


def leaks(case):
    """Whether the truth is among the structures fitted to data that know nothing of it: all its
    rates are near 0. A search that sees the data alone comes to it by chance at most (64 of some
    4000 structures); one whose cache, prior or arm was given the truth has it all the same."""
    network, starts, end = case
    still = network.replace(**{name: 1e-9 for name in network.names})
    result, _ = found((still, starts, end), evaluations=64, leaders=1, seed=1)
    library = result.memory.problem.library
    truth = tuple(sorted(library.index(r) for r in network.reactions))
    return result.memory.key(truth) in result.memory.scored


def test_truth_does_not_leak_and_a_planted_one_is_caught(monkeypatch):
    assert not leaks(LOTKA_VOLTERRA)
    honest = memory.Memory.__init__

    def planted(self, problem, *args):
        honest(self, problem, *args)
        rows = [problem.library.index(r) for r in LOTKA_VOLTERRA[0].reactions]
        self.add(discovery.LevenbergMarquardt()(problem, [self.key(sorted(rows))], [np.ones(3)]))

    monkeypatch.setattr(memory.Memory, "__init__", planted)
    assert leaks(LOTKA_VOLTERRA)


def test_no_door_for_the_truth():
    """What a search is given has no place for it."""
    names = set(inspect.signature(discover).parameters) | set(
        inspect.signature(memory.Memory.__init__).parameters
    )
    assert not {n for n in names if "truth" in n or "true" in n or "target" in n}


def test_hare_and_lynx_are_lotka_and_volterra():
    begun = time.process_time()
    study = fm.datasets.hare_lynx()
    result = discover(study, {"H": "hare", "L": "lynx"}, evaluations=200, progress=False, leaders=3)
    assert {str(r) for r in result.best.reactions} == {"H -> 2H", "H + L -> 2L", "L -> 0"}
    assert (result.inclusion[["H -> 2H", "H + L -> 2L", "L -> 0"]] > 0.9).all()
    assert time.process_time() - begun < 60
    rates = dict(zip(map(str, result.best.reactions), result.best.rates, strict=True))
    assert rates["H -> 2H"] == pytest.approx(0.51, abs=0.05)  # per year


def test_hidden_complex_is_found_with_its_conservation_laws():
    """Michaelis and Menten's complex C, that nothing measures."""
    study = observed(MICHAELIS_MENTEN, noise=0.02)
    result = discover(
        study, {"S": "S", "E": "E", "C": None, "P": "P"},
        initial={"S": "S0", "E": "E0", "C": 0.0, "P": "P0"},
        conserved=[{"E": 1, "C": 1}, {"S": 1, "C": 1, "P": 1}],
        evaluations=64, leaders=1, progress=False,
    )  # fmt: skip
    assert result.memory.problem.courses.hidden == ("C",)
    assert result.best == MICHAELIS_MENTEN[0]
    rates = dict(zip(map(str, result.best.reactions), result.best.rates, strict=True))
    assert rates["C -> E + P"] == pytest.approx(0.7, rel=0.05)


def test_steps_are_halved_until_it_does_not_matter():
    """Records far apart, without noise: one step between them is too long."""
    study = observed(LOTKA_VOLTERRA, noise=0.0, points=9)
    courses = data.time_courses(study, ["A", "B"], {"A": "A0", "B": "B0"})
    coarse = problem.Problem.of(courses, discovery.up_to_second_order(["A", "B"])).with_substeps(1)
    known = memory.Memory(coarse, np.zeros(30), discovery.Weights())
    rows = tuple(sorted(coarse.library.index(r) for r in LOTKA_VOLTERRA[0].reactions))
    fit = discovery.LevenbergMarquardt()
    known.add(fit(coarse, [rows], [np.array([10.0, 8.0, 20.0])]))
    for _ in range(8):
        known.precise = None
        search.refine(known, fit)
    assert 4 <= known.problem.substeps <= 32
    rates = np.exp(known.best()[0].fit.log_rates) * courses.rate_unit(coarse.library)[list(rows)]
    np.testing.assert_allclose(np.sort(rates), [0.5, 0.8, 1.0], rtol=1e-3)


def test_single_precision_finds_it_too():
    """What users run who have not asked for float64."""
    jax.config.update("jax_enable_x64", False)
    try:
        result, _ = found(LOTKA_VOLTERRA, evaluations=64, leaders=1)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert result.best == LOTKA_VOLTERRA[0]


BAD = {
    "budget": ({"seconds": 0}, "seconds above 0"),
    "library": ({"library": discovery.up_to_second_order(["A", "Q"])}, "library between the"),
    "laws": ({"conserved": [{"A": 1}, {"B": 1}]}, "hold every species constant"),
    "order": ({"library": discovery.Library(["A", "B"], ["3A -> B"])}, "at most two molecules"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    options, words = case
    with pytest.raises(ValueError, match=words):
        found(LOTKA_VOLTERRA, **options)


# name: arguments of `discover`, and the words that refuse them
REFUSED = {
    "a table": ({"study": pd.DataFrame()}, "expected a fm.Study; got a DataFrame"),
    "species twice": ({"species": ["A", "A"]}, "expected each species once"),
    "species as text": ({"species": "AB"}, "expected species as names"),
    "no name": ({"species": {"2b": "A"}}, "expected names of species .* got '2b'"),
    "initial inf": ({"initial": {"A": np.inf}}, "initial values of A .* got inf for subject 0"),
    "initial yes": ({"initial": {"A": True}}, "initial value of A to be a number.* got True"),
    "initial too few": ({"initial": {"A": [1, 2]}}, r"one for each of the 4 .*; got \[1, 2\]"),
    "initial of nobody": ({"initial": [1, 2]}, "expected initial to be known states"),
    "library": ({"library": ["A -> B"]}, "expected library to be a Library.* got"),
    "no reactions": ({"most_reactions": 0}, "expected most_reactions of 1 or more.* got 0"),
    "half a reaction": ({"most_reactions": 1.5}, "expected most_reactions of 1 .* got 1.5"),
    "arm": ({"arm": "genetic"}, "expected arm to be an arm.* got 'genetic'"),
    "class of arms": ({"arm": discovery.Stepwise}, r"got the class Stepwise: Stepwise\(\) is one"),
    "class in a union": (
        {"arm": discovery.Union((discovery.Stepwise,))},
        "expected arm to be an arm.* got Union",
    ),
    "fit": ({"fit": "lm"}, "expected fit to be an inner fit.* got 'lm'"),
    "prior nan": ({"prior": lambda r: np.nan}, "prior with finite log weights; got nan of 0 -> A"),
    "prior": ({"prior": None}, "expected prior to be a function"),
    "weights of no kind": ({"weights": (1, 1, 0)}, "expected weights=Weights"),
    "weights nan": ({"weights": discovery.Weights(np.nan)}, "weights of at least 0.*=nan"),
    "weights below 0": ({"weights": discovery.Weights(1.0, -1.0)}, "at least 0.*complexity=-1"),
    "weights 0": ({"weights": discovery.Weights(0.0, 0.0)}, "weights with prediction above 0"),
    "seconds": ({"seconds": "60"}, "expected seconds above 0, a number; got '60'"),
    "evaluations": ({"evaluations": True}, "expected evaluations of 1 or more.* got True"),
    "patience": ({"patience": 0}, "expected patience of 1 or more.*None for no limit; got 0"),
    "no leaders": ({"leaders": 0}, "expected leaders of 1 or more.* got 0"),
    "fewer leaders": ({"leaders": -1}, "expected leaders of 1 or more.* got -1"),
    "seed": ({"seed": 1.5}, "expected seed of 0 or more, a whole number; got 1.5"),
    "checkpoint": ({"checkpoint": 3}, "expected checkpoint to be the path of a folder; got 3"),
}


@pytest.fixture(scope="module")
def study():
    return observed(LOTKA_VOLTERRA)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_arguments_are_checked_at_the_door(case, study):
    options, words = case
    given = {"study": study, "species": ["A", "B"], "evaluations": 1, "progress": False, **options}
    with pytest.raises((TypeError, ValueError), match=words):
        discover(**given)


def test_codes_of_levels_are_no_initial_state():
    frame = pd.DataFrame({"ID": [1, 1, 2, 2], "TIME": [0, 1] * 2, "A": [3.0, 2.0, 3.0, 1.0]})
    frame["ARM"] = ["x", "x", "y", "y"]
    study = fm.Study.from_frame(frame, outcome="A", categorical=["ARM"])
    with pytest.raises(ValueError, match="covariate of numbers; got 'ARM', which is categorical"):
        data.time_courses(study, ["A"], {"A": "ARM"})


BAD_ARMS = {
    "expected a tuple of one arm or more": lambda: discovery.Union(()),
    "expected steps of 1 to 100": lambda: discovery.Stepwise(steps=0),
    "expected generations of 1 to 100, .* got 0": lambda: discovery.Genetic(generations=0),
    "expected generations of 1 to 100, .* got 3000": lambda: discovery.Genetic(generations=3000),
    "expected parents of 1 or more": lambda: discovery.GeneticLocal(parents=0),
}


@pytest.mark.parametrize("message", BAD_ARMS)
def test_arms_that_propose_nothing(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_ARMS[message]()


def test_errors_are_those_of_the_rates_reported(lotka_volterra):
    """Whatever the fit of the search weighed its residuals with in its last step."""
    result, _, _ = lotka_volterra
    kept = result.memory.scored[result.fits[0].rows].fit
    stale = kept._replace(information=100.0 * kept.information)
    own = fit.informed(result.memory.problem, [stale])[0].information
    expected = np.sqrt(np.diag(np.linalg.inv(own)))
    np.testing.assert_allclose(result.rates.loc[1, "log_se"], expected, rtol=1e-6)


def test_censored_measurements_are_refused():
    """They would pass for values at the limit, and a plateau for an inflow."""
    frame = pd.DataFrame(
        {"ID": 1, "TIME": range(4), "A": [3.0, 1.0, 0.3, 0.3], "CENS": [0, 0, 1, 1]}
    )
    study = fm.Study.from_frame(frame, outcome="A", censored="CENS")
    with pytest.raises(ValueError, match="expected exact measurements; got censored ones of A"):
        discover(study, ["A"], evaluations=1, progress=False)


def test_a_checkpoint_is_of_one_question(tmp_path):
    """The same measurements with other known states are another search."""
    study = observed(LOTKA_VOLTERRA)
    options = dict(evaluations=4, leaders=1, progress=False, checkpoint=tmp_path)
    discover(study, ["A", "B"], initial={"A": "A0", "B": "B0"}, **options)
    with pytest.raises(ValueError, match="same data and known states"):
        discover(study, ["A", "B"], **options)


def test_a_hypothesis_is_of_the_size_searched(lotka_volterra):
    result, _, _ = lotka_volterra
    library = discovery.up_to_second_order(["A", "B"])
    large = discovery.ReactionNetwork({str(r): 1.0 for r in library.reactions[:9]})
    with pytest.raises(ValueError, match="at most 8 reactions"):
        result.judge(large)


def test_a_search_ends_when_there_is_nothing_left():
    study = observed(LOTKA_VOLTERRA)
    few = discovery.Library(["A", "B"], ["A -> 2A", "B -> 0"])
    result = discover(
        study, ["A", "B"], library=few, patience=None, evaluations=50, leaders=1, progress=False
    )
    assert "nothing new to fit" in str(result)


def test_a_search_cut_short_within_a_round_goes_on_before_it(lotka_volterra, tmp_path):
    """With 40, then 70, then 200 fits: what 200 at once find, each structure and its fit."""
    whole, _, _ = lotka_volterra
    options = {"patience": 4, "leaders": 1, "checkpoint": tmp_path}
    for evaluations in (40, 70, 200):
        result, _ = found(LOTKA_VOLTERRA, evaluations=evaluations, **options)
    assert result.course.evaluations == whole.course.evaluations
    fitted = list(whole.memory.scored)[: whole.course.evaluations]
    assert list(result.memory.scored)[: len(fitted)] == fitted
    for rows in fitted:
        assert result.memory.scored[rows].fit.deviance == whole.memory.scored[rows].fit.deviance


def test_a_checkpoint_is_of_one_way_to_search(tmp_path):
    options = {"evaluations": 4, "leaders": 1, "checkpoint": tmp_path}
    found(LOTKA_VOLTERRA, **options)
    others = {
        "weights": discovery.Weights(complexity=0.5),
        "prior": lambda r: 0.0,
        "arm": discovery.Random(),
        "fit": discovery.LevenbergMarquardt(iterations=3),
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"same {name}"):
            found(LOTKA_VOLTERRA, **options, **{name: value})
    (tmp_path / "search.npz").write_text("not a journal")
    with pytest.raises(ValueError, match="journal of a search; it cannot be read"):
        found(LOTKA_VOLTERRA, **options)


def test_arms_of_a_union_keep_what_they_learned():
    class Counter:
        def __init__(self):
            self.count = np.array(0)

        def state(self):
            return {"count": self.count}

        def restore(self, arrays):
            self.count = arrays["count"]

    before = discovery.Union((discovery.Stepwise(), Counter(), Counter()))
    before.arms[1].count, before.arms[2].count = np.array(3), np.array(4)
    after = discovery.Union((discovery.Stepwise(), Counter(), Counter()))
    after.restore(before.state())
    assert after.arms[1].count == 3 and after.arms[2].count == 4


def rescaled(case, factor, hours=1.0):
    """The study of a case, species A in another unit, and so is time."""
    frame = observed(case).to_frame()
    frame[["A", "A0"]] *= factor
    frame["TIME"] *= hours
    return fm.Study.from_frame(
        frame, outcome=["A", "B"], covariates=["A0", "B0"], units={"time": "h", "A": "mM"}
    )


def test_scales_a_milliard_apart_do_not_change_the_best(lotka_volterra):
    """B gains a milliardth of what A loses, in these units: it counts as much."""
    whole, _, _ = lotka_volterra
    study = rescaled(LOTKA_VOLTERRA, 1e9)
    initial = {"A": "A0", "B": "B0"}
    result = discover(
        study, ["A", "B"], initial=initial, evaluations=200, patience=4, leaders=1, progress=False
    )
    best = {str(r) for r in result.best.reactions}
    assert best == {"A -> 2A", "B -> 0", "A + B -> B", "A + B -> 2B"}
    squares = whole.fits[0].squares
    np.testing.assert_allclose(result.fits[0].squares, squares, rtol=1e-2)


def test_a_hypothesis_is_judged_wherever_its_rates_start():
    study = rescaled(LOTKA_VOLTERRA, 1e-3, 86400.0)
    initial = {"A": "A0", "B": "B0"}
    result = discover(study, ["A", "B"], initial=initial, evaluations=96, leaders=1, progress=False)
    for rates in (1e-12, 1.0, 1e6):
        hypothesis = discovery.ReactionNetwork({str(r): rates for r in result.best.reactions})
        assert abs(result.judge(hypothesis)["dBIC"]) < 0.1
    with pytest.raises(TypeError, match="expected a hypothesis such as"):
        result.judge("A -> 2A")


def test_draws_of_rates_near_0_are_of_their_size(lotka_volterra):
    """An idle reaction has a log rate without a lower end, and a rate with a standard error."""
    result, _, _ = lotka_volterra
    wide = result.rates[result.rates["log_se"] > 10]
    assert len(wide)  # else this is no test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = result.to_arviz(draws=4000).posterior["rate"]
    for (_, reaction), row in wide.iterrows():
        drawn = draws.sel(reaction=reaction).values
        assert np.nanmax(drawn) < max(result.rates["rate"].max(), 6 * row["se"])


@pytest.mark.parametrize("allowed", [["B -> 0"], ["A -> 2A"], ["A -> 2A", "B -> 0"]])
def test_a_small_library_is_fitted_as_a_whole(allowed):
    result, _ = found(LOTKA_VOLTERRA, whitelist=allowed, evaluations=40, patience=None, leaders=1)
    assert len(result.memory.scored) == 2 ** len(allowed) - 1


def test_rates_have_units(lotka_volterra):
    result, _, _ = lotka_volterra  # units of time and of A are stated, B's is not
    units = result.rates.loc[1, "unit"].to_dict()
    assert units == {"A -> 2A": "1/h", "B -> 0": "1/h", "A + B -> 2B": ""}
    assert result.to_arviz(draws=4).posterior.attrs["unit of A -> 2A"] == "1/h"
    courses = replace(result.memory.problem.courses, units={"A": "mM", "B": "mM", "time": "h"})
    expected = {"0 -> A": "mM/h", "A -> B": "1/h", "A + B -> 2B": "1/(mM h)"}
    for reaction, unit in expected.items():
        assert courses.unit(discovery.Reaction.parse(reaction)) == unit
