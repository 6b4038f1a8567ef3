"""A study reads a table, gives it back, passes through JAX, and refuses what is wrong with it."""

import pickle
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from flowme.study import Study, StudyError, StudyWarning, Subjects

nan = np.nan


def _plain() -> pd.DataFrame:
    return pd.DataFrame(
        {"id": [1, 1, 1, 2, 2], "t": [0.0, 1.0, 2.5, 0.5, 1.5], "y": [1.0, 2.0, 3.0, 4.0, 5.0]}
    )


def _dosed() -> pd.DataFrame:
    """NONMEM names: a measurement before a dose of the same time, an infusion, an other row."""
    return pd.DataFrame(
        {
            "ID": [7, 7, 7, 7, 7, 3, 3, 3, 3],
            "TIME": [0.0, 1.0, 1.0, 2.0, 4.0, 0.0, 0.5, 3.0, 9.0],
            "DV": [0.0, 5.0, nan, 6.0, 7.0, 0.0, 3.0, 99.0, 1.0],
            "AMT": [100.0, 0.0, 50.0, 0.0, 0.0, 10.0, nan, nan, nan],
            "EVID": [1, 0, 1, 0, 0, 1, 0, 2, 0],
            "MDV": [1, 0, 1, 0, 0, 1, 0, 1, 0],
            "CMT": [1, 2, 3, 2, 2, 1, 2, 2, 2],
            "RATE": [0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0],
            "WT": [70, 70, 70, 70, 70, 55, 55, 55, 55],
        }
    )


def _regimen() -> pd.DataFrame:
    """Additional doses, a reset and a dose, a reset alone, a steady state of infusions."""
    return pd.DataFrame(
        {
            "ID": [1, 1, 1, 1, 1, 1, 2, 2, 2],
            "TIME": [0.0, 4.0, 5.0, 9.0, 11.0, 12.0, 0.0, 1.0, 20.0],
            "DV": [nan, 1.0, nan, 2.0, nan, 3.0, nan, 4.0, 5.0],
            "AMT": [100.0, 0, 50.0, 0, 0, 0, 30.0, 0, 0],
            "EVID": [1, 0, 4, 0, 3, 0, 1, 0, 0],
            "CMT": [1, 2, 2, 2, 1, 2, 1, 2, 2],
            "DUR": [0.0, 0, 0, 0, 0, 0, 3.0, 0, 0],
            "ADDL": [3, 0, 2, 0, 0, 0, 1, 0, 0],
            "II": [2.0, 0, 4.0, 0, 0, 0, 8.0, 0, 0],
            "SS": [0, 0, 0, 0, 0, 0, 1, 0, 0],
        }
    )


# name -> (table, arguments, whether its order is remarked on)
TABLES = {
    "plain": (_plain(), dict(subject="id", time="t", outcome="y"), False),
    "renamed outcome": (_plain(), dict(subject="id", time="t", outcome={"height": "y"}), False),
    "doses under NONMEM names": (_dosed(), dict(covariates="WT"), False),
    "repeated doses, resets, steady state": (_regimen(), {}, False),
    "text ids, text index, unused columns": (
        _plain()
        .assign(
            id=["b", "b", "b", "a", "a"], note=["x", None, "z", "", "w"], when=pd.Timestamp("2020")
        )
        .set_index(pd.Index(list("pqrst"))),
        dict(subject="id", time="t", outcome="y"),
        False,
    ),
    "rows not sorted by time": (
        _plain().iloc[[2, 0, 1, 4, 3]],
        dict(subject="id", time="t", outcome="y"),
        True,
    ),
    "subjects interleaved": (
        _plain().iloc[[3, 0, 4, 1, 2]],
        dict(subject="id", time="t", outcome="y"),
        True,
    ),
    "integers, float32, booleans, nullable": (
        pd.DataFrame(
            {
                "id": pd.array([1, 1, 2], dtype="Int64"),
                "t": np.array([0, 1, 0], np.int8),
                "y": np.array([0.1, 0.2, 0.3], np.float32),
                "treated": [True, True, False],
                "dose": pd.array([1.5, 1.5, 2.5], dtype="Float64"),
                "big": [2**60 + 1, 2**60 + 1, 2**60 + 3],
            }
        ),
        dict(subject="id", time="t", outcome="y", covariates=["treated", "dose", "big"]),
        False,
    ),
    "two outcomes in columns": (
        _plain().assign(z=[nan, 10.0, nan, 30.0, nan]),
        dict(subject="id", time="t", outcome=["y", "z"]),
        False,
    ),
    "two outcomes in rows": (
        pd.DataFrame(
            {
                "id": [1, 1, 1, 1, 2],
                "t": [0.0, 1.0, 1.0, 2.0, 1.0],
                "v": [0.0, 2.0, 80.0, 1.0, 70.0],
                "kind": [None, "cp", "pca", "cp", "pca"],
                "mg": [100.0, 0.0, 0.0, 0.0, 0.0],
            }
        ),
        dict(subject="id", time="t", outcome="v", outcome_type="kind", amount="mg"),
        False,
    ),
    "time-varying covariate, censored values": (
        _plain().assign(temp=[20, 21, 22, 18, 19], CENS=[0, 1, -1, 0, 0], sex=[1, 1, 1, 0, 0]),
        dict(subject="id", time="t", outcome="y", covariates=["sex", "temp"], time_varying="temp"),
        False,
    ),
    "censored in intervals": (
        _plain().assign(CENS=[0, 1, -1, 0, 1], LIMIT=[nan, 0.0, 9.0, nan, nan]),
        dict(subject="id", time="t", outcome="y"),
        False,
    ),
    "two outcomes in rows, one censored": (
        pd.DataFrame(
            {
                "id": [1, 1, 1, 2],
                "t": [1.0, 1.0, 2.0, 1.0],
                "v": [2.0, 80.0, 1.0, 70.0],
                "kind": ["cp", "pca", "cp", "pca"],
                "below": [0, 0, 1, 0],
            }
        ).assign(end=[nan, nan, 0.5, nan]),
        dict(
            subject="id", time="t", outcome="v", outcome_type="kind", censored="below", limit="end"
        ),
        False,
    ),
}


def _read(name: str) -> Study:
    frame, arguments, remarked = TABLES[name]
    if not remarked:
        return Study.from_frame(frame, **arguments)
    with pytest.warns(StudyWarning):
        return Study.from_frame(frame, **arguments)


table = pytest.mark.parametrize("name", TABLES)


# The table and back -------------------------------------------------------------------------------


@table
def test_table_returns_without_loss(name):
    frame, before = TABLES[name][0], TABLES[name][0].copy()
    pd.testing.assert_frame_equal(_read(name).to_frame(), frame, check_exact=True)
    pd.testing.assert_frame_equal(frame, before, check_exact=True)


@table
def test_every_number_of_the_table_comes_from_the_arrays(name):
    """Shifting the leaves shifts exactly the cells that they stand for."""
    study = _read(name)
    columns = study.labels.columns
    shifted = replace(
        study,
        time=study.time + 0.5,
        values={n: v + 0.25 for n, v in study.values.items()},
        covariates={n: c + 1.0 for n, c in study.covariates.items()},
        doses=replace(study.doses, amount=study.doses.amount + 2.0),
    )
    old, new = study.to_frame(), shifted.to_frame()
    np.testing.assert_array_equal(new[columns.time], old[columns.time] + 0.5)
    for n in study.covariates:
        np.testing.assert_array_equal(new[n].astype(float), old[n].astype(float).to_numpy() + 1.0)
    for n, column in columns.outcome.items():
        rows = study.labels.rows[study.observed[n]]
        assert rows.size
        old32 = old[column].to_numpy(np.float64)[rows]
        np.testing.assert_array_equal(new[column].to_numpy(np.float64)[rows], old32 + 0.25)
    if columns.amount:
        dosed = old[columns.amount].to_numpy() > 0
        moved = (new[columns.amount] - old[columns.amount]).to_numpy()
        np.testing.assert_array_equal(moved[dosed], 2.0)
        np.testing.assert_array_equal(np.nan_to_num(moved[~dosed]), 0.0)
    for n in set(old) - {
        columns.time,
        columns.amount,
        *columns.outcome.values(),
        *study.covariates,
    }:
        pd.testing.assert_series_equal(new[n], old[n])


@table
def test_rows_in_another_order_make_the_same_arrays(name):
    """Every subject's records are found by time, whatever the order of the table.

    Rows of one time keep their order, and a dose may not stand below the rows that follow it in
    time, so only tables without such rows can be reversed.
    """
    frame, arguments, _ = TABLES[name]
    study = _read(name)
    tied = np.any((np.diff(study.time) == 0) & study.recorded[:, 1:])
    if tied or study.doses.given.any():
        frame = frame.sort_values(arguments.get("time", "TIME"), kind="stable")
    else:
        frame = frame.iloc[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StudyWarning)
        other = Study.from_frame(frame, **arguments)
    other = other.subset(ids=study.ids)
    jax.tree.map(np.testing.assert_array_equal, other, study)


def test_arrays_of_a_plain_table():
    study = _read("plain")
    assert study.ids == (1, 2) and study.subjects == Subjects(2, (1, 2))
    np.testing.assert_array_equal(study.time, [[0.0, 1.0, 2.5], [0.5, 1.5, 1.5]])
    np.testing.assert_array_equal(study.recorded, [[True, True, True], [True, True, False]])
    np.testing.assert_array_equal(study.values["y"], [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    np.testing.assert_array_equal(study.observed["y"], study.recorded)
    assert study.compartments == () and study.doses.time.shape == (2, 0)
    assert study.events.jump.shape == (2, 3, 0)


def test_covariates_are_padded_and_censoring_is_kept():
    study = _read("time-varying covariate, censored values")
    np.testing.assert_array_equal(study.covariates["temp"], [[20, 21, 22], [18, 19, 19]])
    np.testing.assert_array_equal(study.covariates["sex"], [1.0, 0.0])
    np.testing.assert_array_equal(study.censored["y"], [[0, 1, -1], [0, 0, 0]])
    study = _read("censored in intervals")
    np.testing.assert_array_equal(study.limit["y"], [[nan, 0.0, 9.0], [nan, nan, nan]])
    np.testing.assert_array_equal(study.censored["y"], [[0, 1, -1], [0, 1, 0]])
    two = _read("two outcomes in rows, one censored")
    assert two.outcomes == ("cp", "pca")
    assert list(two.censored) == list(two.limit) == ["cp"]
    assert not study.at([1.0, 2.0]).censored and not study.at([1.0, 2.0]).limit


def test_a_column_of_no_censoring_is_none():
    frame = _plain().assign(CENS=0, LIMIT=nan)
    study = Study.from_frame(frame, **NAMES)
    assert study.censored == {} and study.limit == {}
    pd.testing.assert_frame_equal(study.to_frame(), frame)


def test_long_and_wide_tables_of_two_outcomes_agree():
    wide = pd.DataFrame({"ID": [1, 1], "TIME": [0.0, 1.0], "a": [1.0, 2.0], "b": [nan, 3.0]})
    long = pd.DataFrame(
        {"ID": [1, 1, 1], "TIME": [0.0, 1.0, 1.0], "DV": [1.0, 2.0, 3.0], "DVID": [1, 1, 2]}
    )
    wide_study = Study.from_frame(wide, outcome=["a", "b"])
    long_study = Study.from_frame(long)
    assert wide_study.outcomes == ("a", "b") and long_study.outcomes == ("1", "2")
    for a, b in (("a", "1"), ("b", "2")):
        for kind in ("values", "time"):
            cells = [
                (getattr(s, kind)[n] if kind == "values" else s.time)[s.observed[n]]
                for s, n in ((wide_study, a), (long_study, b))
            ]
            np.testing.assert_array_equal(*cells)


def test_without_event_column_an_amount_makes_a_dose():
    frame = _dosed()
    plain = frame.drop(columns="EVID")
    jax.tree.map(np.testing.assert_array_equal, Study.from_frame(plain), Study.from_frame(frame))


# Doses and events ---------------------------------------------------------------------------------


def test_doses_and_events():
    study = _read("doses under NONMEM names")
    assert study.compartments == (1, 3)
    np.testing.assert_array_equal(study.doses.given, [[True, True], [True, False]])
    np.testing.assert_array_equal(study.doses.time, [[0.0, 1.0], [0.0, 9.0]])
    np.testing.assert_array_equal(study.doses.amount, [[100.0, 50.0], [10.0, 0.0]])
    np.testing.assert_array_equal(study.doses.rate, [[0.0, 0.0], [5.0, 0.0]])
    np.testing.assert_array_equal(study.doses.compartment, [[1, 3], [1, 1]])
    events = study.events
    # The infusion of subject 3 ends at 10 / 5 = 2 h, which is an event of its own.
    np.testing.assert_array_equal(events.time, [[0, 1, 1, 2, 4], [0, 0.5, 2, 3, 9]])
    np.testing.assert_array_equal(events.record, [[0, 1, 2, 3, 4], [0, 1, 3, 4, 4]])
    np.testing.assert_array_equal(events.jump[0, :, 0], [100, 0, 0, 0, 0])
    np.testing.assert_array_equal(events.jump[0, :, 1], [0, 0, 50, 0, 0])  # after its measurement
    np.testing.assert_array_equal(events.jump[1], 0.0)
    np.testing.assert_array_equal(events.inflow[1, :, 0], [5, 5, 0, 0, 0])
    np.testing.assert_array_equal(events.inflow[0], 0.0)
    np.testing.assert_array_equal(
        study.observed["DV"], [[False, True, False, True, True], [False, True, False, True, False]]
    )


def test_repeated_doses_resets_and_steady_states():
    study = _read("repeated doses, resets, steady state")
    doses, events = study.doses, study.events
    # The reset at 5 cancels the additional dose at 6, the one at 11 that at 13.
    np.testing.assert_array_equal(doses.given.sum(1), [6, 2])
    np.testing.assert_array_equal(doses.time[0], [0, 2, 4, 5, 9, 11])
    np.testing.assert_array_equal(doses.amount[0], [100, 100, 100, 50, 50, 0])
    np.testing.assert_array_equal(doses.time[1, :2], [0, 8])
    np.testing.assert_array_equal(doses.interval[1, :2], [8, 0])  # the second only follows
    np.testing.assert_array_equal(doses.resets, [[3, 5], [0, -1]])
    np.testing.assert_array_equal(doses.steady, [[-1], [0]])
    np.testing.assert_array_equal(doses.infusions, [[-1, -1], [0, 1]])
    # An additional dose comes before the record of its time.
    np.testing.assert_array_equal(events.dose[0], [0, 1, 1, 2, 3, 4])
    np.testing.assert_array_equal(events.time[0], [0, 2, 4, 4, 5, 9, 9, 11, 12])
    np.testing.assert_array_equal(events.record, [[0, 3, 4, 6, 7, 8], [0, 1, 5, 5, 5, 5]])
    np.testing.assert_array_equal(events.jump[0, :, 0], [100, 100, 100, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(events.jump[0, :, 1], [0, 0, 0, 0, 50, 50, 0, 0, 0])
    np.testing.assert_array_equal(events.reset[0], [0, 0, 0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(events.reset[1], [2, 0, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(events.time[1, :6], [0, 1, 3, 8, 11, 20])
    np.testing.assert_array_equal(events.inflow[1, :6, 0], [10, 10, 0, 10, 0, 0])


def test_a_reset_ends_an_infusion():
    frame = _regimen().iloc[6:].assign(TIME=[0.0, 1.0, 4.0], SS=0, ADDL=0, II=0, EVID=[1, 3, 0])
    frame.loc[7, "DV"] = nan
    events = Study.from_frame(frame).events
    np.testing.assert_array_equal(events.time, [[0, 1, 3, 4]])
    np.testing.assert_array_equal(events.inflow[0, :, 0], [10, 0, 0, 0])


INFUSIONS = {
    "one after another": ([0.0, 4.0], [10.0, 10.0], [5.0, 5.0]),
    "overlapping, rates that do not cancel in floating point": ([0, 1.0], [0.6, 0.6], [0.1, 0.2]),
    "lasting beyond the last record": ([0.0], [100.0], [1.0]),
    "too short for the clock": ([1.0], [10.0], [1e20]),
    "ending at a record": ([0.0], [10.0], [5.0]),
}


@pytest.mark.parametrize("name", INFUSIONS)
def test_amount_that_enters_is_the_amount_given(name):
    """Jumps and inflow over time deliver what was infused until each event, never less than 0."""
    start, amount, rate = map(np.asarray, INFUSIONS[name])
    doses = pd.DataFrame({"TIME": start, "AMT": amount, "RATE": rate, "DV": nan})
    seen = pd.DataFrame({"TIME": [0.5, 2.0, 3.0, 9.0], "AMT": 0.0, "RATE": 0.0, "DV": 1.0})
    frame = pd.concat([doses, seen], ignore_index=True).sort_values("TIME", kind="stable")
    study = Study.from_frame(frame.assign(ID=1))
    events = jax.tree.map(lambda x: x[0], study.events)
    flow = np.diff(events.time) * events.inflow[:-1, 0]
    entered = np.cumsum(events.jump[:, 0]) + np.insert(np.cumsum(flow), 0, 0.0)
    since = np.maximum(events.time[:, None] - start, 0.0)
    bolus = start + amount / rate == start
    infused = np.where(bolus, amount * (events.time[:, None] >= start), since * rate)
    np.testing.assert_allclose(entered, np.minimum(infused, amount).sum(1), rtol=1e-12)
    if name == "lasting beyond the last record":
        assert events.time.size == len(frame)  # its end changes no record and is left out
    else:
        assert events.inflow[-1, 0] == 0.0  # exactly


# JAX ----------------------------------------------------------------------------------------------


@table
def test_is_a_pytree_of_numpy_leaves_with_the_axis_subject_first(name):
    study = _read(name)
    leaves, structure = jax.tree.flatten(study)
    kinds = {np.dtype("float64"), np.dtype("int32"), np.dtype("bool")}
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype in kinds for leaf in leaves)
    assert all(leaf.shape[0] == study.subjects.size for leaf in leaves)
    finite = jax.tree.leaves(replace(study, limit={}))  # where none is, a limit is NaN
    assert all(np.all(np.isfinite(leaf)) for leaf in finite)
    again = jax.tree.unflatten(structure, leaves)
    pd.testing.assert_frame_equal(again.to_frame(), study.to_frame())
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(study)).to_frame(), study.to_frame())


def _total(study: Study) -> jax.Array:
    assert study.subjects.size == study.time.shape[0]
    repr(study)  # must not fail on tracers
    return sum(jnp.sum(jnp.where(study.observed[n], v, 0.0)) for n, v in study.values.items())


@table
def test_passes_through_jit_and_vmap(name):
    study = _read(name)
    expected = sum(v[study.observed[n]].sum() for n, v in study.values.items())
    np.testing.assert_allclose(jax.jit(_total)(study), expected, rtol=1e-12)
    twice = study.with_values(**{n: 2 * v for n, v in study.values.items()})
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), study, twice)
    np.testing.assert_allclose(jax.vmap(_total)(stacked), [expected, 2 * expected], rtol=1e-12)


def test_another_study_of_the_same_shape_does_not_recompile():
    traces = 0

    @jax.jit
    def total(study):
        nonlocal traces
        traces += 1
        return _total(study)

    arguments = dict(subject="id", time="t", outcome="y")
    other = _plain().assign(id=["u", "u", "u", "v", "v"], y=[5.0, 4.0, 3.0, 2.0, 2.0], extra=1)
    assert total(Study.from_frame(_plain(), **arguments)) == 15.0
    assert total(Study.from_frame(other, **arguments)) == 16.0
    assert traces == 1
    total(Study.from_frame(other.iloc[:4], **arguments).subset([0]))
    assert traces == 2


# Other studies from a study -----------------------------------------------------------------------


@table
def test_subset_is_the_study_of_those_rows(name):
    frame, arguments, _ = TABLES[name]
    study = _read(name)
    chosen = study.ids[1]
    rows = frame[frame[arguments.get("subject", "ID")] == chosen]
    for part in (
        study.subset([1]),
        study.subset(ids=[chosen]),
        study.subset(np.arange(study.subjects.size) == 1),
    ):
        assert part.ids == (chosen,)
        pd.testing.assert_frame_equal(part.to_frame(), rows)
        assert part.time.shape == (1, study.time.shape[1])  # as wide as before
    back = study.subset([1, 0]).subset([1, 0])
    jax.tree.map(np.testing.assert_array_equal, back, study)
    pd.testing.assert_frame_equal(
        back.to_frame().sort_index(), study.subset([0, 1]).to_frame().sort_index()
    )


def test_unobserved_keeps_the_masks_and_empties_the_cells():
    study = _read("plain")
    blank = study.unobserved()
    assert blank.values == {} and blank.outcomes == ("y",)
    np.testing.assert_array_equal(blank.observed["y"], study.observed["y"])
    assert blank.to_frame()["y"].isna().all()
    assert "to be sampled" in repr(blank)
    filled = blank.with_values(y=study.values["y"])
    pd.testing.assert_frame_equal(filled.to_frame(), study.to_frame())


def test_a_cell_that_is_no_longer_observed_becomes_empty():
    study = _read("plain")
    held_out = study.observed["y"] & (study.time < 2.0)
    again = replace(study, observed={"y": held_out}).to_frame()
    np.testing.assert_array_equal(again["y"], [1.0, 2.0, nan, 4.0, 5.0])


def test_with_values_ignores_padding_and_works_under_jit():
    study = _read("plain")
    new = np.array([[9.0, 8.0, 7.0], [6.0, 5.0, nan]])
    expected = [[9.0, 8.0, 7.0], [6.0, 5.0, 0.0]]
    np.testing.assert_array_equal(study.with_values(y=new).values["y"], expected)
    np.testing.assert_array_equal(
        jax.jit(lambda s, y: s.with_values(y=y).values["y"])(study, new), expected
    )
    np.testing.assert_array_equal(study.with_values(y=new).to_frame()["y"], [9, 8, 7, 6, 5])


def test_at_other_times_doses_act_and_covariates_are_carried_forward():
    study = Study.from_frame(
        _dosed().assign(temp=[1.0, 2, 3, 4, 5, 6, 7, 8, 9]),
        covariates="WT",
        time_varying="temp",
        units={"time": "h"},
    )
    times = np.array([1.0, 2.5, 3.0])
    dense = study.at(times)
    assert dense.ids == study.ids and dense.units == study.units and dense.values == {}
    np.testing.assert_array_equal(dense.time, [times, times])
    assert dense.recorded.all() and dense.observed["DV"].all() and dense.time.shape == (2, 3)
    np.testing.assert_array_equal(dense.covariates["WT"], study.covariates["WT"])
    np.testing.assert_array_equal(dense.covariates["temp"], [[3, 4, 4], [7, 7, 8]])
    jax.tree.map(np.testing.assert_array_equal, dense.doses, study.doses)
    events = dense.events
    # Where the study begins, its doses, the end of the infusion (subject 3), the new times.
    np.testing.assert_array_equal(events.time, [[0, 0, 1, 1, 2.5, 3], [0, 0, 1, 2, 2.5, 3]])
    np.testing.assert_array_equal(events.record, [[3, 4, 5], [2, 4, 5]])
    np.testing.assert_array_equal(events.jump[0, :, 1], [0, 0, 50, 0, 0, 0])
    np.testing.assert_array_equal(events.inflow[1, :, 0], [0, 5, 5, 0, 0, 0])
    early = study.at([[-1.0], [0.2]])  # before the first record, and before the second dose
    np.testing.assert_array_equal(early.covariates["temp"], [[1], [6]])
    np.testing.assert_array_equal(early.events.jump[0], 0.0)


@table
def test_at_other_times_is_a_study_like_any_other(name):
    """It keeps its structure under JAX, and its table says who, when and with what covariates."""
    study = _read(name)
    dense = study.at([0.25, 7.0])
    assert jax.tree.leaves(dense)[0].dtype == np.float64 and "to be sampled" in repr(dense)
    frame, subject = dense.to_frame(), study.labels.columns.subject
    assert list(frame[subject]) == [name for name in study.ids for _ in range(2)]
    np.testing.assert_array_equal(frame[study.labels.columns.time], [0.25, 7.0] * len(study.ids))
    assert frame[list(study.outcomes)].isna().all(axis=None)
    filled = dense.with_values(**{n: dense.time + 1.0 for n in study.outcomes})
    plain = Study.from_frame(
        filled.to_frame(),
        subject,
        study.labels.columns.time,
        list(study.outcomes),
        covariates=[n for n, v in study.covariates.items() if v.ndim == 1],
        time_varying=[n for n, v in study.covariates.items() if v.ndim == 2],
    )
    for kind in ("time", "values", "observed", "covariates"):
        jax.tree.map(np.testing.assert_array_equal, getattr(plain, kind), getattr(filled, kind))
    pd.testing.assert_frame_equal(
        dense.subset([1]).to_frame(), frame[frame[subject] == study.ids[1]]
    )


BAD_CALLS = {
    "times of nobody": (lambda s: s.at(np.ones((3, 4))), "2 subjects; got (3, 4)"),
    "one time": (lambda s: s.at(1.0), "shape [time], or [subject, time]"),
    "no times": (lambda s: s.at([]), "got (0,)"),
    "times that fall": (lambda s: s.at([0.0, 2.0, 1.0]), "finite and increase; got [0.0, 2.0"),
    "times that are not": (lambda s: s.at([0.0, nan]), "finite and increase"),
    "unknown outcome": (lambda s: s.with_values(z=s.time), "expected outcomes among ['y']"),
    "wrong shape": (lambda s: s.with_values(y=s.time[0]), "[subject, time] = (2, 3); got (3,)"),
    "not finite": (lambda s: s.with_values(y=s.time * nan), "got nan for subject 1 at time 0.0"),
    "nobody": (lambda s: s.subset([]), "at least one subject"),
    "twice": (lambda s: s.subset([0, 0]), "each subject once"),
    "beyond": (lambda s: s.subset([2]), "positions in 0..1; got [2]"),
    "negative": (lambda s: s.subset([-1]), "positions in 0..1"),
    "identifiers as positions": (lambda s: s.subset(["a"]), "Use ids= for identifiers"),
    "unknown identifier": (lambda s: s.subset(ids=[1, 9]), "ids of this study; got [9]"),
    "neither": (lambda s: s.subset(), "either indices or ids"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    call, words = BAD_CALLS[name]
    with pytest.raises(ValueError) as error:
        call(_read("plain"))
    assert words in str(error.value)


def test_repr_is_a_short_paragraph():
    study = Study.from_frame(_dosed(), covariates="WT", units={"time": "h", "DV": "mg/L"})
    assert study.units == {"time": "h", "DV": "mg/L"}
    assert repr(study) == (
        "Study of 2 subjects, 9 records; time 0 to 9 h; observed: 5 of DV (mg/L); 3 doses; "
        "covariates: WT."
    )


# What is refused, and in which words --------------------------------------------------------------


def _plain_with(**cells: tuple[int, object]) -> pd.DataFrame:
    frame = _plain().astype(object)
    for column, (row, value) in cells.items():
        frame.loc[row, column] = value
    return frame


def _dosed_with(**cells: tuple[int, object]) -> pd.DataFrame:
    frame = _dosed()
    for column, (row, value) in cells.items():
        if column not in frame:
            frame[column] = 0
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        if not isinstance(value, str):
            frame[column] = pd.to_numeric(frame[column])
    return frame


NAMES = dict(subject="id", time="t", outcome="y")

BAD_TABLES = {
    "no rows": (_plain().iloc[:0], NAMES, ["expected at least one row; got an empty table"]),
    "not a table": (_plain().to_numpy(), NAMES, ["expected a pandas DataFrame; got ndarray"]),
    "missing column": (
        _plain(),
        NAMES | {"outcome": "conc"},
        ["expected column 'conc'; got a table without it. Its columns are: id, t, y"],
    ),
    "no name given": (
        _plain(),
        {"subject": "id", "time": "t"},
        ["expected a column for outcome; got none. Name it: outcome=... (of: id, t, y)"],
    ),
    "same column twice": (
        pd.concat([_plain(), _plain()[["y"]]], axis=1),
        NAMES,
        ["expected distinct column names; got y more than once"],
    ),
    "no outcome": (_plain(), NAMES | {"outcome": []}, ["expected at least one outcome; got none"]),
    "two outcomes in one column": (
        _plain(),
        NAMES | {"outcome": {"a": "y", "b": "y"}},
        ["expected a column of its own for each outcome", "outcome_type="],
    ),
    "NaN time": (
        _plain_with(t=(1, nan)),
        NAMES,
        ["row 1, subject 1", "number in column 't'; got nan"],
    ),
    "infinite time": (_plain_with(t=(3, np.inf)), NAMES, ["row 3, subject 2", "'t'; got inf"]),
    "NaN value": (
        _plain_with(y=(4, nan)),
        NAMES,
        ["row 4, subject 2", "'y'; got nan. Drop the row"],
    ),
    "infinite value": (_plain_with(y=(0, -np.inf)), NAMES, ["row 0, subject 1", "got -inf"]),
    "no subject": (
        _plain_with(id=(2, None)),
        NAMES,
        ["row 2", "expected an identifier in column 'id'"],
    ),
    "text among numbers": (
        _plain_with(y=(2, "BLQ")),
        NAMES,
        ["1 finding.", "row 2, subject 1: expected a number in column 'y'; got the text 'BLQ'"],
    ),
    "numbers written as text": (
        _plain().assign(y=_plain()["y"].astype(str)),
        NAMES,
        ["expected a number in column 'y'", "pd.to_numeric"],
    ),
    "covariate of text": (
        _plain().assign(sex=list("mmmff")),
        NAMES | {"covariates": ["sex"]},
        ["1 finding.", "row 0, subject 1", "column 'sex'; got the text 'm'", "frame['sex'].map("],
    ),
    "dates as time": (
        _plain().assign(t=pd.Timestamp("2020-01-01")),
        NAMES,
        ["1 finding.", "expected a number in column 't'; got the text '2020-01-01"],
    ),
    "duplicate": (
        _plain_with(t=(1, 0.0)),
        NAMES,
        ["row 1, subject 1: expected one value of 'y' at time 0; got another in row 0"],
    ),
    "covariate that changes": (
        _plain().assign(wt=[70, 70, 71, 60, 61]),
        NAMES | {"covariates": "wt"},
        ["2 findings", "row 2, subject 1", "got 71 here and 70 in row 0", "time_varying="],
    ),
    "covariate missing": (
        _plain().assign(wt=[70, nan, 70, 60, 60]),
        NAMES | {"covariates": "wt"},
        ["1 finding.", "row 1, subject 1: expected a finite number in column 'wt'; got nan"],
    ),
    "covariate that differs on a dose row": (
        _dosed_with(WT=(2, 71)),
        {"covariates": "WT"},
        ["row 2, subject 7", "got 71 here and 70 in row 0"],
    ),
    "subject without observations": (
        _dosed().assign(EVID=[1, 0, 1, 0, 0, 1, 2, 2, 2], MDV=[1, 0, 1, 0, 0, 1, 1, 1, 1]),
        {},
        ["row 5, subject 3: expected an observation of this subject", "keep_unobserved=True"],
    ),
    "outcome never measured": (
        _plain().assign(z=nan),
        NAMES | {"outcome": ["y", "z"]},
        ["expected a value of outcome 'z'; got none in the table"],
    ),
    "negative amount": (
        _dosed_with(AMT=(2, -50.0)),
        {},
        ["row 2, subject 7", "0 or more; got -50"],
    ),
    "dose without amount": (
        _dosed_with(AMT=(5, nan)),
        {},
        ["row 5, subject 3", "'AMT'; got nan on"],
    ),
    "doses without a column": (
        _dosed().drop(columns=["AMT", "RATE"]),
        {},
        ["row 0, subject 7: expected an amount for a dose (EVID 1); got no column"],
    ),
    "amount on a measurement": (
        _dosed_with(AMT=(3, 5.0)),
        {},
        ["row 3, subject 7: expected EVID 1 on a row with an amount; got 0"],
    ),
    "RxODE code": (
        _dosed_with(EVID=(0, 101)),
        {},
        ["row 0, subject 7: expected EVID in {0, 1, 2, 3, 4}; got 101", "write 1 for a dose"],
    ),
    "reset with an amount": (
        _dosed_with(EVID=(2, 3)),
        {},
        ["row 2, subject 7: expected EVID 1 on a row with an amount; got 3"],
    ),
    "unknown event": (_dosed_with(EVID=(7, 9)), {}, ["row 7, subject 3", "3, 4}; got 9"]),
    "MDV 2": (_dosed_with(MDV=(1, 2)), {}, ["row 1, subject 7: expected MDV in {0, 1}; got 2"]),
    "value on a dose row": (
        _dosed().drop(columns="MDV").assign(DV=[0, 5, 4.5, 6, 7, 0, 3, nan, 1]),
        {},
        ["1 finding.", "row 2, subject 7: expected no 'DV' on a row that is not a measurement"],
    ),
    "estimated rate": (_dosed_with(RATE=(5, -2.0)), {}, ["row 5, subject 3", "not supported yet"]),
    "rate without dose": (
        _dosed_with(RATE=(4, 2.0)),
        {},
        ["row 4, subject 7", "on dose rows only"],
    ),
    "compartment 0": (_dosed_with(CMT=(0, 0)), {}, ["row 0, subject 7", "counted from 1; got 0"]),
    "half a compartment": (_dosed_with(CMT=(0, 1.5)), {}, ["row 0, subject 7", "got 1.5"]),
    "rate without amount": (
        _dosed_with(AMT=(2, 0.0), RATE=(2, 3.0)),
        {},
        ["row 2, subject 7: expected an amount above 0 with a rate; got 0 with RATE above 0"],
    ),
    "rate and duration": (
        _dosed_with(DUR=(5, 2.0)),
        {},
        ["row 5, subject 3: expected a rate or a duration, not both; got 2 in DUR"],
    ),
    "negative duration": (
        _dosed_with(DUR=(0, -1)),
        {},
        ["a duration of 0 (bolus) or more; got -1"],
    ),
    "dose before the first record": (
        _dosed_with(TIME=(2, -1.0)),
        {},
        ["row 2, subject 7: expected a dose at or after time 0, when", "(row 0); got -1. If that"],
    ),
    "additional doses without interval": (
        _dosed_with(ADDL=(0, 3), II=(4, 0)),
        {},
        ["1 finding", "row 0, subject 7: expected the time between doses in II with ADDL; got 0"],
    ),
    "interval without repeats": (
        _dosed_with(II=(2, 12)),
        {},
        ["row 2, subject 7: expected ADDL or SS above 0 with II; got none. Say what is repeated"],
    ),
    "half an additional dose": (_dosed_with(ADDL=(0, 1.5), II=(0, 2)), {}, ["in ADDL; got 1.5"]),
    "negative interval": (_dosed_with(ADDL=(0, 1), II=(0, -2)), {}, ["0 or more in II; got -2"]),
    "additional doses on a measurement": (
        _dosed_with(ADDL=(1, 3), II=(1, 12)),
        {},
        ["2 findings", "row 1, subject 7: expected ADDL on dose rows only; got 3"],
    ),
    "steady state without interval": (
        _dosed_with(SS=(2, 1)),
        {},
        ["row 2, subject 7: expected the time between doses in II (interval=...) with SS; got 0"],
    ),
    "steady state added": (_dosed_with(SS=(2, 2), II=(2, 5)), {}, ["SS in {0, 1}; got 2"]),
    "infusion longer than its interval": (
        _dosed_with(SS=(5, 1), II=(5, 1.5)),
        {},
        ["row 5, subject 3: expected an infusion at steady state that ends before", "got 2 for"],
    ),
    "reset that goes back in time": (
        _regimen().assign(TIME=[0.0, 4.0, 1.0, 9.0, 11.0, 12.0, 0.0, 1.0, 20.0]),
        {},
        ["1 finding", "row 2, subject 1: expected a reset at or after", "time 1 after 4. Add 4 to"],
    ),
    "several doses wrong": (
        _dosed_with(RATE=(5, -2.0), CMT=(0, 0), SS=(2, 1)),
        {},
        ["3 findings", "row 0, subject 7", "row 2, subject 7", "row 5, subject 3"],
    ),
    "censoring code": (
        _plain().assign(CENS=[0, 2, 0, 0, 0]),
        NAMES,
        ["row 1, subject 1: expected CENS in {-1, 0, 1}; got 2"],
    ),
    "limits of censored values": (
        _plain().assign(CENS=[0, 1, -1, 0, 1], LIMIT=[0.5, 2.0, 2.5, nan, 0.0]),
        NAMES,
        [
            "3 findings",
            "row 0, subject 1: expected no LIMIT where CENS is 0; got 0.5. Leave the cell empty",
            "row 1, subject 1: expected LIMIT below the value 2 where CENS is 1; got 2",
            "row 2, subject 1: expected LIMIT above the value 3 where CENS is -1; got 2.5",
        ],
    ),
    "limits without censoring": (
        _plain().assign(LIMIT=0.0),
        NAMES,
        ["expected a column of -1, 0, 1 beside the limits in 'LIMIT'; got none", "censored=..."],
    ),
    "limits of which outcome": (
        _plain().assign(z=1.0, LIMIT=0.0),
        NAMES | {"outcome": ["y", "z"]},
        ["expected a column of limits for each outcome", "limit={outcome: column}"],
    ),
    "censoring of which outcome": (
        _plain().assign(z=1.0, CENS=0),
        NAMES | {"outcome": ["y", "z"]},
        ["expected a column of censoring for each outcome", "censored={outcome: column}"],
    ),
    "censoring of an unknown outcome": (
        _plain().assign(c=0),
        NAMES | {"censored": {"x": "c"}},
        ["expected censored to name outcomes of ['y']; got 'x'"],
    ),
    "which outcome": (
        _plain().assign(kind=["a", None, "a", "b", "b"]),
        NAMES | {"outcome_type": "kind"},
        ["row 1, subject 1: expected an outcome in column 'kind'; got none"],
    ),
    "two outcomes under one name": (
        _plain().assign(kind=list("aaabb")),
        NAMES | {"outcome": {"c": "y"}, "outcome_type": "kind"},
        ["expected one outcome to be named 'c'; got ['a', 'b'] in column 'kind'"],
    ),
    "units of nothing": (
        _plain(),
        NAMES | {"units": {"cnoc": "mg/L"}},
        ["expected units of time, amount, y; got 'cnoc'"],
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused(name):
    frame, arguments, words = BAD_TABLES[name]
    with pytest.raises(StudyError) as error:
        Study.from_frame(frame, **arguments)
    for word in words:
        assert word in str(error.value)


def test_all_findings_are_told_at_once_up_to_twenty():
    frame = pd.DataFrame({"id": range(30), "t": nan, "y": 1.0}).astype({"t": float})
    frame.loc[3, ["t", "y"]] = [0.0, nan]
    with pytest.raises(StudyError) as error:
        Study.from_frame(frame, **NAMES)
    assert len(error.value.findings) == 30
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and lines[0].endswith("30 findings.") and "and 10 more" in lines[-1]
    assert any("column 'y'" in finding for finding in error.value.findings)
    assert pickle.loads(pickle.dumps(error.value)).findings == error.value.findings


def test_subject_without_observations_is_kept_on_request():
    frame = _dosed().assign(EVID=[1, 0, 1, 0, 0, 1, 2, 2, 2], MDV=[1, 0, 1, 0, 0, 1, 1, 1, 1])
    study = Study.from_frame(frame, keep_unobserved=True)
    assert study.ids == (7, 3) and not study.observed["DV"][1].any()
    pd.testing.assert_frame_equal(study.to_frame(), frame)


def test_replicates_are_kept_on_request():
    frame = _plain().assign(t=[0.0, 0.0, 2.5, 0.5, 0.5])
    with pytest.raises(StudyError, match=r"2 findings(?s:.*)measured, write replicates=True"):
        Study.from_frame(frame, **NAMES)
    study = Study.from_frame(frame, **NAMES, replicates=True)
    np.testing.assert_array_equal(study.values["y"], [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    pd.testing.assert_frame_equal(study.to_frame(), frame)


def test_reordering_is_said():
    with pytest.warns(StudyWarning, match="1 of 2 subjects were sorted by time, subject 2 first"):
        Study.from_frame(_plain().iloc[[0, 1, 2, 4, 3]], **NAMES)
    with pytest.warns(StudyWarning, match="1 of 2 subjects were gathered .* subject 1 first"):
        Study.from_frame(_plain().iloc[[0, 3, 4, 1, 2]], **NAMES)


# Files --------------------------------------------------------------------------------------------


def test_file_reads_as_its_table(tmp_path):
    path = tmp_path / "study.csv"
    path.write_text("\ufeffID,TIME,DV,AMT,MDV\na,0,.,100,1\n\na,1,2.5,.,0\nb,0.5,3.5,,0\n")
    study = Study.from_csv(path)
    assert study.ids == ("a", "b")
    np.testing.assert_array_equal(study.values["DV"], [[0.0, 2.5], [3.5, 0.0]])
    frame = study.to_frame()
    assert frame.index.name == "line" and list(frame.index) == [2, 4, 5]
    frame.to_csv(tmp_path / "again.csv", index=False)
    again = Study.from_csv(tmp_path / "again.csv")
    jax.tree.map(np.testing.assert_array_equal, again, study)


BAD_FILES = {
    "blank lines are counted": (
        "ID,TIME,DV\n\n1,0,x\n1,1,2\n",
        "line 3, subject 1: expected a number",
    ),
    "short line": ("ID,TIME,DV\n1,0,1\n1,1\n", "line 3: expected 3 cells, as in the header; got 2"),
    "long line": ("ID,TIME,DV\n1,0,1,5\n", "line 2: expected 3 cells, as in the header; got 4"),
    "empty": ("", "expected a header and rows"),
    "header only": ("ID,TIME,DV\n", "expected at least one row"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_line(name, tmp_path):
    text, words = BAD_FILES[name]
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(StudyError) as error:
        Study.from_csv(tmp_path / "bad.csv")
    assert words in str(error.value)


def test_misspelt_argument_is_refused(tmp_path):
    (tmp_path / "study.csv").write_text("ID,TIME,DV\n1,0,1\n")
    with pytest.raises(TypeError, match="amuont"):
        Study.from_csv(tmp_path / "study.csv", amuont="AMT")


def test_identifiers_of_a_file_stay_as_written(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("who,t,y\n001,0,1.5\n1,0,2.5\n007,1,3.5\n")
    study = Study.from_csv(path, subject="who", time="t", outcome="y")
    assert study.ids == ("001", "1", "007")
    path.write_text("who,t,y\n1,0,1.5\n12,0,2.5\n")
    assert Study.from_csv(path, subject="who", time="t", outcome="y").ids == (1, 12)
