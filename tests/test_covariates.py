"""Covariates: levels, empty cells, between records, and what they do to individual parameters."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest

import flowme as fm
from flowme.infer.joint import Joint
from flowme.infer.references import find
from flowme.study import Study, StudyError, StudyWarning

nan = np.nan
NAMES = dict(subject="id", time="t", outcome="y")


def _frame(**columns) -> pd.DataFrame:
    plain = {"id": [1, 1, 1, 2, 2], "t": [0.0, 1.0, 2.5, 0.5, 1.5], "y": [1.0, 2.0, 3.0, 4.0, 5.0]}
    return pd.DataFrame(plain | columns)


def _read(frame, **arguments) -> Study:
    return Study.from_frame(frame, **NAMES, **arguments)


# Levels -------------------------------------------------------------------------------------------

SEXES = {
    "text, sorted": (list("MMMFF"), "sex", ("F", "M"), [1, 0]),
    "text, as declared": (list("MMMFF"), {"sex": ["M", "F", "X"]}, ("M", "F", "X"), [0, 1]),
    "numbers": ([2, 2, 2, 1, 1], "sex", (1, 2), [1, 0]),
    "numbers beside an empty cell": ([2, 2, nan, 1, 1], {"sex": None}, (1, 2), [1, 0]),
    "categories, unasked": (
        pd.Categorical(list("MMMFF"), categories=["M", "other", "F"]), (),
        ("M", "other", "F"), [0, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEXES)
@pytest.mark.filterwarnings("ignore:Covariate 'sex' is empty:flowme.study.StudyWarning")
def test_levels_are_codes_and_come_back(name):
    cells, categorical, levels, codes = SEXES[name]
    frame = _frame(sex=cells)
    rule = {"sex": "carried"} if "empty" in name else None
    study = _read(frame, covariates="sex", categorical=categorical, missing_covariates=rule)
    assert study.levels == {"sex": levels} and f"sex ({', '.join(map(str, levels))})" in repr(study)
    assert study.covariates["sex"].dtype == np.int32
    np.testing.assert_array_equal(study.covariates["sex"], codes)
    pd.testing.assert_frame_equal(study.to_frame(), frame)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(study)).to_frame(), frame)
    swapped = study.with_levels({"sex": levels[::-1]})
    np.testing.assert_array_equal(swapped.covariates["sex"], len(levels) - 1 - np.array(codes))
    pd.testing.assert_frame_equal(swapped.to_frame(), frame)
    dense = study.subset([1]).at([0.0, 9.0])
    assert dense.to_frame()["sex"].tolist() == [levels[codes[1]]] * 2


def test_levels_may_change_in_time():
    frame = _frame(arm=list("abbca"))
    study = _read(frame, time_varying="arm", categorical="arm")
    np.testing.assert_array_equal(study.covariates["arm"], [[0, 1, 1], [2, 0, 0]])
    np.testing.assert_array_equal(study.at([0.9, 1.0]).covariates["arm"], [[0, 1], [2, 2]])
    other = study.with_levels({"arm": "cba"}).to_frame()
    pd.testing.assert_frame_equal(other, frame)


def test_studies_of_other_levels_do_not_recompile():
    traced = []

    @jax.jit
    def total(study):
        traced.append(1)
        return study.covariates["sex"].sum()

    assert total(_read(_frame(sex=list("MMMFF")), categorical="sex")) == 1
    assert total(_read(_frame(sex=list("CCCBB")), categorical={"sex": list("ABC")})) == 3
    assert len(traced) == 1


def test_a_level_that_the_fit_does_not_know_is_refused():
    study = _read(_frame(sex=["x", "x", "x", "M", "M"]), categorical="sex")
    with pytest.raises(ValueError, match=r"row 0, subject 1: .*'sex'.*\['F', 'M'\]; got 'x'"):
        study.with_levels({"sex": ("F", "M")})
    np.testing.assert_array_equal(
        study.subset([1]).with_levels({"sex": ("F", "M")}).covariates["sex"], [1]
    )
    with pytest.raises(ValueError, match="expected 'sex' to be categorical.*got numbers"):
        _read(_frame(sex=[1, 1, 1, 0, 0]), covariates="sex").with_levels({"sex": ("F", "M")})


# Empty cells --------------------------------------------------------------------------------------

# name -> (cells of x, how they are read, what the arrays hold, what the warning says)
EMPTY = {
    "median over subjects, of one that changes": (
        [nan, 4.0, 6.0, 9.0, nan],
        dict(time_varying="x", missing_covariates={"x": "median"}),
        [[7, 4, 6], [9, 7, 7]],
        "2 rows of 2 of 2 subjects (1, 2). Filled in: the median over subjects, 7.",
    ),
    "the subject's own median is its other rows": (
        [nan, 4.0, 4.0, nan, nan],
        dict(covariates="x", missing_covariates={"x": "median"}),
        [4, 4],
        "the subject's own value or, where there is none, the median over subjects, 4.",
    ),
    "carried forward, and back": (
        [nan, 4.0, nan, nan, 8.0],
        dict(time_varying="x", missing_covariates={"x": "carried"}),
        [[4, 4, 4], [8, 8, 8]],
        "3 rows of 2 of 2 subjects (1, 2). Filled in: the subject's last value",
    ),
    "carried, of one that is constant": (
        [nan, 4.0, nan, 8.0, 8.0],
        dict(covariates="x", missing_covariates={"x": "carried"}),
        [4, 8],
        "2 rows of 1 of 2 subjects (1). Filled in: the subject's own value. Study.to_frame",
    ),
    "a number": (
        [5.0, 5.0, 5.0, nan, nan],
        dict(covariates="x", missing_covariates={"x": 70}),
        [5, 70],
        "2 rows of 1 of 2 subjects (2). Filled in: the subject's own value or, where there is "
        "none, 70.",
    ),
    "a level": (
        ["b", "b", "b", None, " "],
        dict(categorical={"x": ["a", "b"]}, missing_covariates={"x": "a"}),
        [1, 0],
        "where there is none, 'a'.",
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_cells_are_filled_by_the_rule_that_was_stated(name):
    cells, arguments, expected, words = EMPTY[name]
    frame = _frame(x=cells)
    with pytest.warns(StudyWarning) as said:
        study = _read(frame, **arguments)
    assert len(said) == 1 and words in str(said[0].message)
    np.testing.assert_array_equal(study.covariates["x"], expected)
    pd.testing.assert_frame_equal(study.to_frame(), frame)
    pd.testing.assert_frame_equal(study.subset([1]).to_frame(), frame.iloc[3:])
    assert study.at([0.0, 1.0]).to_frame()["x"].notna().all()  # no cells of the table: a new one


def test_carried_goes_by_time_not_by_row():
    frame = _frame(x=[nan, 4.0, 6.0, 9.0, nan]).iloc[[2, 0, 1, 3, 4]]
    with pytest.warns(StudyWarning):
        study = _read(frame, time_varying="x", missing_covariates={"x": "carried"})
    np.testing.assert_array_equal(study.covariates["x"], [[4, 4, 6], [9, 9, 9]])


# name -> (columns, arguments, words of the findings)
BAD = {
    "text undeclared": (
        dict(x=list("mmmff")),
        dict(covariates="x"),
        ["1 finding.", "row 0, subject 1: expected a number in column 'x'", "categorical='x'"],
    ),
    "a level not declared": (
        dict(x=list("MMMFX")),
        dict(categorical={"x": ["F", "M"]}, time_varying="x"),
        ["1 finding.", "row 4, subject 2: expected a level of 'x', one of ['F', 'M']; got 'X'"],
    ),
    "a level twice": (
        dict(x=list("MMMFF")),
        dict(categorical={"x": ["F", "M", "F"]}),
        ["one or more different levels of 'x', none of them empty; got ['F', 'M', 'F']"],
    ),
    "levels that change": (
        dict(x=list("MMFFF")),
        dict(categorical="x"),
        ["row 2, subject 1: expected covariate 'x' constant", "got 'F' here and 'M' in row 0"],
    ),
    "linear levels": (
        dict(x=list("MMMFF")),
        dict(categorical="x", time_varying={"x": "linear"}),
        ["expected a number to be linear between records; got the levels of 'x'"],
    ),
    "no such way between records": (
        dict(x=1.0),
        dict(time_varying={"x": "spline"}),
        ["expected time_varying={'x': 'carried'} or 'linear'; got 'spline'"],
    ),
    "nothing to carry": (
        dict(x=[1.0, 1.0, 1.0, nan, nan]),
        dict(covariates="x", missing_covariates={"x": "carried"}),
        ["1 finding.", "row 3, subject 2: expected a value of 'x' in some row of this subject"],
    ),
    "no median": (
        dict(x=nan),
        dict(covariates="x", missing_covariates={"x": "median"}),
        ["expected a value of 'x' in some row; got none in the table"],
    ),
    "all at once": (
        dict(w=[nan, 70.0, 70.0, 60.0, 60.0], x=["b", None, "b", "c", "c"], z=[1, nan, 2, 3, nan]),
        dict(
            covariates="w",
            categorical={"x": ["a", "b"]},
            time_varying="z",
            missing_covariates={"z": "mean", "v": 1.0},
        ),
        [
            "row 0, subject 1: expected a finite number in column 'w'; got nan. Or state a rule: "
            "missing_covariates={'w': ...}",
            "row 1, subject 1: expected a level in column 'x'; got an empty cell. Or state",
            "row 3, subject 2: expected a level of 'x', one of ['a', 'b']; got 'c'",
            "missing_covariates={'z': ...} to be 'median', 'carried' or a number; got 'mean'",
            "expected missing_covariates to name covariates, of ['w', 'x', 'z']; got 'v'",
        ],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_covariates_are_told_together(name):
    columns, arguments, words = BAD[name]
    with pytest.raises(StudyError) as error:
        _read(_frame(**columns), **arguments)
    for part in words:
        assert part in str(error.value)


# Between records ----------------------------------------------------------------------------------


def test_between_records_a_covariate_is_carried_or_linear():
    frame = _frame(wt=[60.0, 70.0, 73.0, 50.0, 54.0], temp=[60.0, 70.0, 73.0, 50.0, 54.0])
    study = _read(frame, time_varying={"wt": "linear", "temp": "carried"})
    dense = study.at([-1.0, 0.5, 1.0, 2.0, 9.0])
    carried = [[60, 60, 70, 70, 73], [50, 50, 50, 54, 54]]
    np.testing.assert_array_equal(dense.covariates["temp"], carried)
    linear = [[60, 65, 70, 72, 73], [50, 50, 52, 54, 54]]
    np.testing.assert_allclose(dense.covariates["wt"], linear)
    again = dense.at([0.75]).covariates["wt"]  # a grid of a grid keeps the rule
    np.testing.assert_allclose(again, [[67.5], [51.0]])


def test_of_two_records_at_one_time_the_later_row_holds():
    frame = _frame(t=[0.0, 1.0, 1.0, 0.5, 1.5], y=[1, nan, 2, 3, 4], wt=[60.0, 70, 80, 50, 54])
    frame["z"] = [nan, 1.0, nan, nan, 1.0]
    study = Study.from_frame(frame, "id", "t", ["y", "z"], time_varying={"wt": "linear"})
    np.testing.assert_allclose(study.at([0.5, 1.0]).covariates["wt"], [[65, 80], [50, 52]])


# Effects ------------------------------------------------------------------------------------------


def test_effects_are_what_they_say():
    x = np.array([35.0, 70.0, 140.0])
    np.testing.assert_allclose(fm.covariate.power(x, 0.5, 70.0), [2**-0.5, 1.0, 2**0.5])
    np.testing.assert_allclose(fm.covariate.exponential(x, 0.01, 70.0), np.exp([-0.35, 0.0, 0.7]))
    np.testing.assert_allclose(fm.covariate.additive(x, 2.0, 70.0), [-70.0, 0.0, 140.0])
    study = _read(_frame(arm=list("abbca")), time_varying="arm", categorical="arm")
    terms = fm.covariate.by_level(study, "arm", [0.5, -1.0])
    np.testing.assert_allclose(terms, [[0.0, 0.5, 0.5], [-1.0, 0.0, 0.0]])
    more = study.with_levels({"arm": "xyabc"})  # codes without a beta: not those of another one
    held = jax.jit(lambda study: fm.covariate.by_level(study, "arm", [0.5, -1.0]))
    np.testing.assert_allclose(held(study), terms)
    assert np.isnan(held(more)[1, 0])


def test_nonsense_is_refused():
    study = _read(_frame(sex=list("MMMFF"), wt=[70.0] * 3 + [60.0] * 2), covariates="wt",
                  categorical="sex")  # fmt: skip
    with pytest.raises(ValueError, match=r"x of a power positive; got 0\. Use"):
        fm.covariate.power(np.array([70.0, 0.0]), 0.75, 70.0)
    with pytest.raises(ValueError, match="reference of a power positive; got -70"):
        fm.covariate.power(study.covariates["wt"], 0.75, -70.0)
    with pytest.raises(ValueError, match="x of a covariate effect finite"):
        fm.covariate.exponential(np.array([70.0, nan]), 0.75, 70.0)
    with pytest.raises(ValueError, match=r"1 betas for 'sex', .*\['F', 'M'\]; got shape \[2\]"):
        fm.covariate.by_level(study, "sex", [0.1, 0.2])
    with pytest.raises(ValueError, match=r"one of \['sex'\]; got 'wt'"):
        fm.covariate.by_level(study, "wt", [0.1])


def _allometry(study):
    P = fm.population("P", dist.LogNormal(1.0, 1.0))
    beta = fm.population("beta", dist.Normal(0.0, 1.0))
    gamma = fm.population("gamma", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    a = fm.population("a", dist.HalfNormal(1.0))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["P"]), study.subjects)
    by_weight = fm.covariate.power(study.covariates["WT"], beta, 70.0)
    by_race = fm.covariate.by_level(study, "RACE", gamma)
    psi = fm.individual(study.subjects, P=P * by_weight * jnp.exp(by_race + eta.P))
    fm.observe("y", fm.residual.constant(psi.P[:, None] + 0.0 * study.time, a), study)


TRUTH = dict(P=5.0, beta=0.75, gamma=np.array([0.3, -0.4]), a=0.3, eta_omega=np.array([0.2]))


def _simulated(subjects=90, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    weight, race = rng.uniform(45, 110, subjects), rng.integers(0, 3, subjects)
    typical = 5.0 * (weight / 70) ** 0.75 * np.exp(np.array([0.0, 0.3, -0.4])[race])
    P = typical * np.exp(0.2 * rng.normal(size=subjects))
    rows = [
        (i, float(t), P[i] + 0.3 * rng.normal(), weight[i], "ABC"[race[i]])
        for i in range(subjects)
        for t in range(3)
    ]
    return pd.DataFrame(rows, columns=["id", "t", "y", "WT", "RACE"])


def test_a_fit_finds_the_effects_and_predicts_for_other_levels():
    frame = _simulated()
    study = _read(frame, covariates="WT", categorical="RACE")
    joint = Joint.of(_allometry, study)
    assert find(joint, joint.unconstrain({}), {}, study).sites == {"P"}
    fit = fm.VariationalEM(_allometry, starts=1).run(jax.random.key(0), study, progress=False)
    errors = fit.standard_errors()
    for name, truth in TRUTH.items():
        assert np.all(np.abs(fit.params[name] - truth) < 3 * errors[name]), name
    assert errors["beta"] < 0.15 and np.all(errors["gamma"] < 0.1)
    # Another study: fewer levels, hence other codes, read as those of the fit.
    some = frame[frame["RACE"] != "A"]
    other = _read(some, covariates="WT", categorical="RACE")
    assert other.covariates["RACE"].max() == 1 and study.covariates["RACE"].max() == 2
    whole = fm.predict(fit, population=True)["y"][study.covariates["RACE"] > 0]
    np.testing.assert_allclose(fm.predict(fit, other, population=True)["y"], whole)
    key = jax.random.key(1)
    own = np.asarray(study.covariates["RACE"]) > 0
    likelihood = fm.marginal_log_likelihood(key, fit, other).log_likelihood
    np.testing.assert_allclose(likelihood, fit.log_likelihood[own], atol=0.05)
    stranger = _read(
        some.assign(RACE=some["RACE"].replace("C", "D")), covariates="WT", categorical="RACE"
    )
    for use in (
        lambda s: fm.predict(fit, s, population=True),
        lambda s: fm.simulate(key, fit, s, replicates=1),
        lambda s: fm.marginal_log_likelihood(key, fit, s),
    ):
        with pytest.raises(ValueError, match=r"subject \d+: .*\['A', 'B', 'C'\]; got 'D'"):
            use(stranger)
