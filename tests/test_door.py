"""What a table and its options must be to become a study, told in words and never a traceback."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from cases import line_model

from flowme.infer.fit import identity
from flowme.infer.joint import Joint
from flowme.levels import same_levels
from flowme.study import Study, StudyError, StudyWarning

nan = np.nan
NAMES = dict(subject="id", time="t", outcome="y")


def _frame(**columns) -> pd.DataFrame:
    plain = {"id": [1, 1, 1, 2, 2], "t": [0.0, 1.0, 2.5, 0.5, 1.5], "y": [1.0, 2.0, 3.0, 4.0, 5.0]}
    return pd.DataFrame(plain | columns)


def _read(frame, **arguments) -> Study:
    return Study.from_frame(frame, **NAMES | arguments)


# Options ------------------------------------------------------------------------------------------

# name -> (columns, arguments, words of the findings)
BAD = {
    "occasions that are the outcome": (
        {}, dict(occasions="y"),
        ["1 finding.", "one role for column 'y'; got outcome and occasions", "under another name"],
    ),
    "a covariate that is the subject": (
        {}, dict(covariates="id"), ["one role for column 'id'; got subject and covariates"]
    ),
    "a column found by its name, and another role": (
        dict(CENS=[0, 1, 0, 0, 0]), dict(covariates="CENS"),
        ["one role for column 'CENS'; got covariates and censored"],
    ),
    "two levels of occasions in one column": (
        dict(v=1), dict(occasions=["v", "v"]), ["different columns of occasions; got ['v', 'v']"]
    ),
    "a rule for nobody": (
        dict(x=1.0), dict(covariates="x", missing_covariates="median"),
        ["missing_covariates= to have a rule by name; got 'median'", "{name: 'median'}"],
    ),
    "a number for a column": ({}, dict(occasions=3), ["expected column 3; got a table without it"]),
    "several for one": ({}, dict(time=["t"]), ["expected time= to name a column; got ['t']"]),
    "covariates with values": (
        dict(x=1.0), dict(covariates={"x": "median"}), ["covariates= to be a name or several"]
    ),
    "no names": ({}, dict(covariates=[["x"]]), ["expected names in covariates=; got ['x']"]),
    "units of what": ({}, dict(units="h"), ["expected units={'time': 'h'}; got 'h'"]),
    "subjects that are lists": (
        dict(id=[[1], [1], [1], [2], [2]]), {},
        ["5 findings", "row 0, subject [1]: expected a number or text in column 'id'; got a list"],
    ),
    "levels that are lists": (
        dict(x=["a", "a", ["a"], "b", "b"]), dict(categorical="x"),
        ["row 2, subject 1: expected a number or text in column 'x'; got a list"],
    ),
    "occasions that are lists": (
        dict(v=[1, 1, [1], 1, 1]), dict(occasions="v"), ["number or text in column 'v'; got a list"]
    ),
    "a level that is nothing": (
        dict(x=list("aaabb")), dict(categorical={"x": ["a", "b", None]}),
        ["different levels of 'x', none of them empty; got ['a', 'b', None]"],
    ),
    "a level of blanks": (
        dict(x=list("aaabb")), dict(categorical={"x": ["a", "b", " "]}), ["none of them empty"]
    ),
    "True beside 1": (
        dict(x=[True, True, True, 1, 1]), dict(categorical="x"),
        ["row 3, subject 2: expected levels of 'x' to be all True and False, or none of them; got "
         "1 here and True in row 0"],
    ),
    "a number for True": (
        dict(x=pd.array([True, True, True, None, None], dtype="boolean")),
        dict(covariates="x", missing_covariates={"x": 70.0}),
        ["{'x': ...} to be 'carried', True or False; got 70.0"],
    ),
    "an empty cell among text": (
        dict(x=["a", "a", "", "b", "b"]), dict(categorical="x"),
        ["1 finding.", "row 2, subject 1: expected a level in column 'x'; got an empty cell. Or"],
    ),
    "an empty cell among numbers": (
        dict(y=[1.0, "", 2.0, 3.0, 4.0]), {},
        ["1 finding.", "row 1, subject 1: expected a finite number in column 'y'; got an empty"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_options_and_cells_of_another_kind_are_refused(name):
    columns, arguments, words = BAD[name]
    frame = _frame().assign(**{n: pd.Series(c) if isinstance(c, list) else c
                               for n, c in columns.items()})  # fmt: skip
    with pytest.raises(StudyError) as error:
        _read(frame, **arguments)
    for word in words:
        assert word in str(error.value)


def test_a_column_may_be_a_period_and_its_effect():
    study = _read(_frame(period=[1, 1, 2, 1, 1]), occasions="period", time_varying="period")
    np.testing.assert_array_equal(study.occasions["period"].index, [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(study.covariates["period"], [[1, 1, 2], [1, 1, 1]])


def test_true_fills_what_is_true_or_false():
    smoker = pd.array([True, True, True, None, None], dtype="boolean")
    with pytest.warns(StudyWarning, match="empty in 2 rows of 1 of 2 subjects .* none, True"):
        study = _read(_frame(x=smoker), covariates="x", missing_covariates={"x": True})
    np.testing.assert_array_equal(study.covariates["x"], [1, 1])


def test_bad_calls_are_refused_in_words():
    study = _read(_frame())
    for call, words in (
        (lambda: study.subset(ids=1), "a list of identifiers; got 1. Write ids=[1]"),
        (lambda: study.subset(ids="ab"), "a list of identifiers; got 'ab'"),
        (lambda: study.subset(ids=[[1]]), "ids of this study; got [[1]]"),
        (lambda: study.subset("a"), "Use ids= for identifiers"),
        (lambda: study.at("a"), "times that are numbers; got 'a'"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)


# Levels -------------------------------------------------------------------------------------------


def test_other_levels_are_checked_and_may_come_from_an_iterator():
    study = _read(_frame(x=list("aaabb")), categorical="x")
    recoded = study.with_levels({"x": iter("ba")})
    np.testing.assert_array_equal(recoded.covariates["x"], [1, 0])
    assert recoded.levels == {"x": ("b", "a")}
    for levels, words in (
        ({"x": "aba"}, "different levels of 'x'"),
        ({"x": ["a", "b", None]}, "none of them empty"),
        ({"z": "ab"}, r"covariates of the study, \['x'\]; got 'z'"),
    ):
        with pytest.raises(ValueError, match=words):
            study.with_levels(levels)


def test_a_fit_on_numbers_does_not_take_levels_for_them():
    numbers = _read(_frame(x=[2, 2, 2, 1, 1]), covariates="x")
    levels = _read(_frame(x=[2, 2, 2, 1, 1]), categorical="x")
    with pytest.raises(ValueError, match="'x' to be numbers, as in the study .* covariates='x'"):
        same_levels(levels, numbers)
    assert same_levels(numbers.subset([0]), numbers).levels == {}


def test_what_is_written_at_other_times_reads_as_the_same_study():
    frame = _frame(sex=list("MMMFF"), arm=pd.Categorical(list("bbbaa"), list("cba")), p=1, v=1)
    frame.loc[2, "v"] = 2
    study = _read(frame, categorical={"sex": ["X", "M", "F"]}, covariates="arm",
                  occasions=["p", "v"])  # fmt: skip
    assert study.levels == {"sex": ("X", "M", "F"), "arm": ("c", "b", "a")}
    dense = study.at([0.0, 0.6, 3.0])
    filled = dense.with_values(y=dense.time)
    again = _read(filled.to_frame(), covariates=["sex", "arm"], occasions=["p", "v"])
    assert again.levels == study.levels
    for kind in ("time", "values", "observed", "covariates", "occasions"):
        jax.tree.map(np.testing.assert_array_equal, getattr(again, kind), getattr(filled, kind))
    assert filled.to_frame()["v"].dtype == frame["v"].dtype
    assert _read(filled.subset([1]).to_frame(), covariates="sex").covariates["sex"] == [2]


def test_a_file_of_other_levels_is_refused(tmp_path):
    read = partial(_read, covariates="x")
    some = read(_frame(x=list("aaabb")), categorical="x")
    same, other = (read(_frame(x=list(x)), categorical="x") for x in ("aaabb", "cccdd"))
    joint = Joint.of(line_model(), some)
    assert identity(joint, some) == identity(joint, same)
    differ = {k for k, value in identity(joint, some).items() if identity(joint, other)[k] != value}
    assert differ == {"levels"}


# In words -----------------------------------------------------------------------------------------


def test_repr_counts_in_words_and_stands_whatever_the_leaves_are():
    study = _read(_frame(v=1).iloc[:1], occasions="v")
    assert repr(study).startswith("Study of 1 subject, 1 record; time 0 to 0; observed: 1 of y")
    assert repr(study).endswith("no doses; up to 1 occasion (v).")
    assert repr(jax.tree.map(jnp.asarray, study)) == repr(study)
    for change in (np.shape, lambda x: None, lambda x: x[:0], lambda x: x.mean(0), np.float64,
                   lambda x: np.zeros(3), str):  # fmt: skip
        changed = jax.tree.map(change, study)
        assert repr(changed).startswith("Study(outcomes=['y'], time=")
