"""The inner fit: time courses, kernels, screens, rates, rewards."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from networks import LOTKA_VOLTERRA, observed, path
from scipy.optimize import nnls

import flowme as fm
from flowme.discovery import (
    DifferentialEvolution,
    LevenbergMarquardt,
    Library,
    ReactionNetwork,
    Weights,
    robustness,
    up_to_second_order,
)
from flowme.discovery.arms import as_rows, mask, neighbours
from flowme.discovery.data import time_courses
from flowme.discovery.fit import covariance, evaluate, informed
from flowme.discovery.memory import Memory
from flowme.discovery.problem import Problem
from flowme.discovery.reward import FLOOR, log_prior
from flowme.discovery.robustness import held_out
from flowme.discovery.screen import integral_screen, non_negative, tangent_screen
from flowme.discovery.smooth import Smooth, smoothed

TRUTH, STARTS, END = LOTKA_VOLTERRA


@pytest.fixture(scope="module")
def problem():
    courses = time_courses(observed(LOTKA_VOLTERRA), ["A", "B"], {"A": "A0", "B": "B0"})
    return Problem.of(courses, up_to_second_order(["A", "B"]))


@pytest.fixture(scope="module")
def true_rows(problem):
    return tuple(sorted(problem.library.index(r) for r in TRUTH.reactions))


def scaled(problem, rows, network=TRUTH):
    """The network's rates in scaled units, in the order of the rows."""
    k = {problem.library.index(r): v for r, v in zip(network.reactions, network.rates, strict=True)}
    return np.array([k[r] / problem.courses.rate_unit(problem.library)[r] for r in rows])


@pytest.fixture(scope="module")
def fitted(problem, true_rows):
    return LevenbergMarquardt()(problem, [true_rows], [1.2 * scaled(problem, true_rows)])[0]


def test_scaled_trajectories_are_those_of_the_network(problem, true_rows):
    log_rates = np.log(scaled(problem, true_rows))
    fine = problem.with_substeps(16)
    x, slope = fine.path(true_rows, log_rates, problem.courses.initial)
    times = np.linspace(0, END, 40)
    expected = np.array([path(TRUTH, start, times) for start in STARTS])
    np.testing.assert_allclose(x * problem.courses.scale, expected, rtol=1e-6, atol=1e-7)
    per_time = slope * problem.courses.scale / problem.courses.duration
    field = np.array([[TRUTH(0.0, y) for y in condition[:2]] for condition in expected])
    np.testing.assert_allclose(per_time[:, :2], field, rtol=1e-5)


def test_gradient_is_that_of_the_sum_of_squares(problem, true_rows):
    """Of log rates and of initial states, by central differences."""
    courses = replace(problem.courses, known=np.zeros_like(problem.courses.known))
    free = Problem.of(courses, problem.library)
    rows = np.repeat(free.rows([true_rows]), free.batch, 0)
    log_rates = np.zeros((free.batch, free.slots))
    log_rates[:, :3] = np.log(1.3 * scaled(problem, true_rows))
    states = np.tile(courses.initial, (free.batch, 1, 1))
    h = 1e-5
    for r in range(3):  # one structure of the batch for each perturbed parameter
        log_rates[2 * r, r] += h
        log_rates[2 * r + 1, r] -= h
    states[6, 1, 0] += h
    states[7, 1, 0] -= h
    ones = np.ones((free.batch, 2)), np.ones((free.batch, 4))
    squares, (gradient, _) = evaluate(free, rows, log_rates, states, *ones)
    total = squares.sum(1)
    found = np.append(gradient[-1, :, :3].sum(0), gradient[-1, 1, free.slots])
    np.testing.assert_allclose(found, -(total[:8:2] - total[1:8:2]) / (4 * h), rtol=1e-6)


def test_rates_are_recovered_within_their_standard_errors(problem, true_rows, fitted):
    error = fitted.log_rates - np.log(scaled(problem, true_rows))
    se = np.sqrt(np.diag(np.linalg.inv(fitted.information)))
    assert np.all(np.abs(error) < 4 * se) and np.all(se < 0.01)
    sd = np.sqrt(problem.variance(fitted.squares)) / problem.courses.values.std((0, 1))
    np.testing.assert_allclose(sd, 0.05, rtol=0.15)  # 160 measurements: 6 % each


def test_evolution_finds_rates_from_where_the_gradient_does_not(problem, true_rows, fitted):
    """From rates of a tenth, Levenberg and Marquardt end in another minimum."""
    start = [0.1 * scaled(problem, true_rows)]
    stuck = LevenbergMarquardt()(problem, [true_rows], start)[0]
    free = DifferentialEvolution()(problem, [true_rows], start)[0]
    assert stuck.deviance > fitted.deviance + 100
    assert free.deviance == pytest.approx(fitted.deviance, abs=0.1)


def test_batch_and_order_change_nothing(problem, true_rows, fitted):
    others = [(0,), (3, 7), tuple(range(8))]
    start = 1.2 * scaled(problem, true_rows)
    starts = [np.ones(len(o)) for o in others]
    again = LevenbergMarquardt()(problem, [*others, true_rows], [*starts, start])
    assert [f.rows for f in again] == [*others, true_rows]
    np.testing.assert_allclose(again[-1].log_rates, fitted.log_rates, rtol=1e-6)
    assert again[-1].deviance == pytest.approx(fitted.deviance, abs=1e-6)


def test_a_failing_structure_gets_the_floor(problem):
    """2A -> 3A alone explodes before the last record, at any rate that the start allows."""
    library = Library(["A", "B"], ["2A -> 3A", "2B -> 3B", "A -> 0"])
    exploding = replace(Problem.of(problem.courses, library, 3))
    fit = LevenbergMarquardt()(exploding, [(0, 1)], [np.array([1e6, 1e6])])[0]
    assert fit.deviance == np.inf
    memory = Memory(exploding, log_prior(library), Weights())
    memory.add([fit])
    assert memory.best()[0].prediction == FLOOR and np.isfinite(memory.best()[0].reward)
    assert memory.tangents() == []


@pytest.mark.parametrize("seed", range(3))
def test_non_negative_least_squares(seed):
    rng = np.random.default_rng(seed)
    columns, y = rng.normal(size=(40, 20, 6)), rng.normal(size=(40, 20))
    found = non_negative(columns.mT @ columns, np.einsum("nir,ni->nr", columns, y))
    expected = [nnls(A, b)[0] for A, b in zip(columns, y, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert (found == 0).any()


def test_smoothing_spline_of_a_line_is_the_line():
    t = np.sort(np.random.default_rng(0).uniform(size=30))
    noise = 0.1 * np.random.default_rng(1).normal(size=30)
    np.testing.assert_allclose(smoothed(t, 3 - 2 * t, np.ones(30))[0], 3 - 2 * t, atol=1e-8)
    fit, used = smoothed(t, np.sin(6 * t) + noise, np.ones(30))
    assert np.abs(fit - np.sin(6 * t)).mean() < np.abs(noise).mean() and 3 < used < 15


def test_integral_screen_is_exact_for_exact_trajectories(problem, true_rows):
    x = np.array([path(TRUTH, start, np.linspace(0, END, 40)) for start in STARTS])
    exact = replace(problem.courses, values=x / problem.courses.scale)
    screen = integral_screen(Problem.of(exact, problem.library), Smooth(exact))
    _, rates = screen(problem.rows([true_rows]))
    np.testing.assert_allclose(rates[0, :3], scaled(problem, true_rows), rtol=0.01)


def test_tangent_screen_predicts_fits_of_neighbours(problem, true_rows, fitted):
    """At the fit it is the fit; of a reaction added, near it, it predicts the gain."""
    screen = tangent_screen(problem, fitted)
    deviance, rates = screen(problem.rows([true_rows]))
    assert deviance[0] == pytest.approx(fitted.deviance, abs=0.1)
    np.testing.assert_allclose(np.log(rates[0, :3]), fitted.log_rates, atol=0.002)
    around = as_rows(neighbours(mask(30, true_rows), 8), 8)
    larger = around[(around < 30).sum(1) == 4]
    predicted, rates = screen(larger)
    chosen = predicted.argsort()[:8]
    structures = [tuple(int(r) for r in row if r < 30) for row in larger[chosen]]
    starts = [np.maximum(k[:4], 1e-3) for k in rates[chosen]]
    found = LevenbergMarquardt()(problem, structures, starts)
    np.testing.assert_allclose([f.deviance for f in found], predicted[chosen], atol=1.0)


def test_conditions_left_out(problem, true_rows, fitted):
    """Of conditions alike, what is lost is about p/2 nats in all; much more if one is odd."""
    values = problem.courses.values.copy()
    values[3] = values[3, ::-1]
    odd = Problem.of(replace(problem.courses, values=values), problem.library)
    fit, n = LevenbergMarquardt(), problem.courses.count.sum()
    unlike = fit(odd, [true_rows], [np.exp(fitted.log_rates)])
    assert -15 < n * held_out(problem, [fitted], fit)[0] < -0.5
    assert n * held_out(odd, unlike, fit)[0] < -30


def test_stability_falls_with_the_size_of_the_band(problem, fitted, monkeypatch):
    def share(band):
        monkeypatch.setattr(robustness, "_BAND", band)
        return robustness.stable(problem, fitted, np.random.default_rng(0))

    shares = [share(band) for band in (1e-6, 0.1, 0.25, 100.0)]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert 0 < shares[1] < 1


def table(**columns):
    rows = {"ID": [1, 1, 1], "TIME": [0.0, 1.0, 2.0], "A": [1.0, 0.5, 0.2], "B": [0.1, 0.5, 0.8]}
    frame = pd.DataFrame({**rows, **columns})
    extra = {"covariates": "Z"} if "Z" in columns else {}
    return fm.Study.from_frame(frame, outcome=["A", "B"], **extra)


BAD = {
    "one time": (table(A=[1.0, np.nan, np.nan]), ["A"], None, "two times or more; got 1"),
    "negative": (table(A=[-3.0, 1.0, 2.0]), ["A"], None, "concentrations of A, 0 or more"),
    "nowhere": (table(A=[0.0, 0.0, 0.0]), ["A"], None, "expected some A; got 0 everywhere"),
    "unknown": (table(), ["A", "C"], None, "no outcome measures is hidden: give it None"),
    "all hidden": (table(), {"C": None}, None, "at least one species to be measured"),
    "none": (table(), {}, None, "at least one species; got none"),
    "twice": (table(), {"A": "A", "C": "A"}, None, "an outcome to measure one species"),
    "initial of whom": (table(), ["A"], {"Q": 1.0}, "initial values of"),
    "initial where": (table(), ["A"], {"A": "Z"}, "constant covariate"),
    "initial sign": (table(), ["A"], {"A": -1.0}, "of at least 0"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    study, species, initial, words = case
    with pytest.raises(ValueError, match=words):
        time_courses(study, species, initial)


def test_scales_that_differ_by_1e9_are_the_same_problem(problem):
    """A makes B, of which there is 1e9 times as much in the second study."""
    network = ReactionNetwork({"A -> 0": 0.3, "A -> A + B": 2.0, "B -> 0": 0.8})
    study = observed((network, STARTS, END))
    large = study.with_values(B=1e9 * study.values["B"])
    initial = {"A": "A0", "B": STARTS[:, 1]}, {"A": "A0", "B": 1e9 * STARTS[:, 1]}
    found = []
    for one, known in zip((study, large), initial, strict=True):
        here = Problem.of(time_courses(one, ["A", "B"], known), problem.library)
        rows = tuple(sorted(here.library.index(r) for r in network.reactions))
        fit = LevenbergMarquardt()(here, [rows], [np.ones(3)])[0]
        unit = here.courses.rate_unit(here.library)[list(rows)]
        found.append((fit.deviance, np.exp(fit.log_rates) * unit))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    makes = [str(here.library.reactions[r]) for r in rows].index("A -> A + B")
    factor = np.where(np.arange(3) == makes, 1e9, 1.0)
    np.testing.assert_allclose(found[1][1], factor * found[0][1], rtol=1e-6)
    between = table(A=[1e9, 1e8, 1e7])
    frame = pd.concat([between.to_frame(), table(ID=[2, 2, 2]).to_frame()])
    with pytest.raises(ValueError, match="within a factor of 1e\\+06 between subjects"):
        time_courses(fm.Study.from_frame(frame, outcome=["A", "B"]), ["A", "B"])


def test_errors_do_not_depend_on_where_the_fit_began(problem, fitted, true_rows):
    """A refit from the optimum accepts no step, and weighs with the variance it began with."""
    start, initial = [np.exp(fitted.log_rates)], [fitted.initial]
    again = LevenbergMarquardt()(problem, [true_rows], start, initial=initial)[0]
    one, other = informed(problem, [fitted, again])
    np.testing.assert_allclose(one.information, other.information, rtol=1e-2)


def test_what_the_data_do_not_determine_has_no_error():
    np.testing.assert_allclose(covariance(np.diag([1e4, 4.0])), np.diag([1e-4, 0.25]))
    found = covariance(np.array([[1e4, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]]))
    np.testing.assert_allclose(np.diag(found), [1e-4, np.inf, np.inf])
