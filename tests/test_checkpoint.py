"""Estimations that are broken off and taken up again end as if they had not been."""

import shutil

import jax
import numpy as np
import optax
import pytest
from cases import line_model, normal_study, one_level

import flowme as fm
from flowme import quick
from flowme.infer.checkpoint import Checkpoint
from flowme.infer.newton import Newton

MODEL = one_level()  # one function, hence compiled once
OPTIONS = {"chunk": 8, "starts": 2}


class Killed(BaseException):
    """Nothing in flowme catches it."""


def estimate(study, model=None, key=0, init=None, checkpoint=None, **options):
    vem = fm.VariationalEM(model or MODEL, **{**OPTIONS, **options})
    return vem.run(jax.random.key(key), study, init=init, progress=False, checkpoint=checkpoint)


def break_off(monkeypatch, target, name, number, what):
    """Raise `what` after call `number` of a method; returns the list of the calls."""
    method, calls = getattr(target, name), []

    def wrapped(self, *args):
        calls.append(args[0])
        result = method(self, *args)
        if len(calls) - 1 == number:
            raise what
        return result

    monkeypatch.setattr(target, name, wrapped)
    return calls


def assert_equal(found, expected):
    """The same fit to the last bit."""
    for field in ("theta", "log_likelihood", "log_likelihood_se", "history", "information"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_array_equal(found.conditional.mean, expected.conditional.mean)
    assert (found.converged, found.messages) == (expected.converged, expected.messages)


@pytest.fixture(autouse=True)
def _one_program(monkeypatch):
    """However many fits have been made, all are computed by the same program."""
    monkeypatch.setattr(quick, "_WORTH", (np.inf, np.inf))


@pytest.fixture(scope="module")
def study():
    return normal_study(1.0, subjects=40, times=2)


@pytest.fixture(scope="module")
def kept(study, tmp_path_factory):
    """The fit of an uninterrupted run, and its checkpoint."""
    folder = tmp_path_factory.mktemp("kept")
    return estimate(study, checkpoint=folder), folder


def test_a_checkpoint_changes_nothing(study, kept, monkeypatch):
    """Nor is anything climbed again once all is done."""
    fit, folder = kept
    assert_equal(estimate(study), fit)
    calls = break_off(monkeypatch, Newton, "step", -1, None)
    assert_equal(estimate(study, checkpoint=folder), fit)
    assert not calls


@pytest.mark.parametrize("what", [Killed, KeyboardInterrupt])
def test_broken_off_anywhere_the_result_is_the_same(study, kept, tmp_path, monkeypatch, what):
    """On some subjects, from the first start or from the second; killed after a state is written,
    interrupted before."""
    fit, _ = kept
    target, name = (Checkpoint, "write") if what is Killed else (Newton, "step")
    with monkeypatch.context() as patch:
        stages = break_off(patch, target, name, -1, None)
        estimate(study, checkpoint=tmp_path / "whole")
    if what is Killed:
        assert set(stages) == {"climb-care", "climb-subjects-8", "climb-start-0", "climb-start-1"}
    for number in range(1, len(stages), 3):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            break_off(patch, target, name, number, what)
            if what is Killed:
                with pytest.raises(Killed):
                    estimate(study, checkpoint=folder)
            else:
                estimate(study, checkpoint=folder)
        with monkeypatch.context() as patch:
            left = break_off(patch, target, name, -1, None)
            assert_equal(estimate(study, checkpoint=folder), fit)
        assert len(left) == len(stages) - number - (what is Killed)


def test_a_flow_is_learned_on(study, tmp_path, monkeypatch):
    """Ctrl-C in the second block of updates."""
    effect = fm.FlowRandomEffect(["level"])
    monkeypatch.setattr(fm.VariationalEM, "_finish", lambda self, key, course, study, clock: course)
    options = {"model": one_level(effect=effect), "flow_updates": 10, "folds": 0, "starts": 1}
    whole = estimate(study, **options)
    with monkeypatch.context() as patch:
        calls = break_off(patch, Checkpoint, "write", -1, None)
        estimate(study, checkpoint=tmp_path / "a", **options)
    number = calls.index("flow")
    with monkeypatch.context() as patch:
        break_off(patch, Checkpoint, "write", number, KeyboardInterrupt)
        half = estimate(study, checkpoint=tmp_path / "b", **options)
    assert not half.converged and "while learning the flow" in half.why
    again = estimate(study, checkpoint=tmp_path / "b", **options)
    assert len(whole.history) > len(half.history)
    for found, expected in zip(
        jax.tree.leaves((again.theta, again.weights, again.history, again.conditional)),
        jax.tree.leaves((whole.theta, whole.weights, whole.history, whole.conditional)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="with the same optimizer"):
        estimate(study, checkpoint=tmp_path / "b", optimizer=optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"key": 1}, "key"),
        ({"tolerance": 1e-4}, "tolerance"),
        ({"init": {"a": 2.0}}, "init"),
        ({"model": line_model()}, "parameters"),
        ({"model": one_level(effect=fm.StudentTRandomEffect(["level"]))}, "parameters"),
        ({"model": one_level(effect=fm.GaussianRandomEffect(["level"], omega=2.0))}, "starting"),
        ({"study": normal_study(2.0, subjects=40, times=2)}, "data"),
        ({"study": normal_study(1.0, subjects=39, times=2)}, "subjects"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(study, kept, change, what):
    with pytest.raises(ValueError, match=f"expected .* with the same {what}.*; got .* Name anoth"):
        estimate(change.pop("study", study), checkpoint=kept[1], **change)


def test_another_model_with_the_same_parameters_is_refused(study, kept):
    """A function has no name that says what it does: its densities are compared."""

    def halved(study):
        return MODEL(study.with_values(y=study.values["y"] / 2))

    with pytest.raises(ValueError, match="with the same model"):
        estimate(study, model=halved, checkpoint=kept[1])


def test_a_file_half_written_is_not_read(study, kept, tmp_path):
    fit, folder = kept
    folder = shutil.copytree(folder, tmp_path / "copy")
    (folder / "climb-start-1.npz").unlink()
    (folder / "climb-start-1.half").write_bytes(b"PK")
    assert_equal(estimate(study, checkpoint=folder), fit)
