"""Laws of random effects judged on held-out subjects; how far importance sampling is believed."""

import dataclasses

import arviz
import jax
import numpy as np
import pytest

import flowme as fm
from flowme.infer.compare import Comparison
from flowme.infer.joint import Joint
from flowme.infer.marginal import estimate_marginal
from flowme.infer.pareto import pareto_k
from flowme.infer.rivals import default_laws
from tests.cases import line_exact, line_model, line_study

NAMES = ["level", "slope"]
LAWS = {
    "Gaussian": fm.GaussianRandomEffect(NAMES, full=True),
    "diagonal": fm.GaussianRandomEffect(NAMES),
}
KEY = jax.random.key(0)


def run(study, **more):
    more = {"folds": 2, "starts": 1, "progress": False, **more}
    return fm.compare(line_model(), study, KEY, more.pop("laws", LAWS), **more)


@pytest.fixture(scope="module")
def study():
    return line_study(41)


@pytest.fixture(scope="module")
def comparison(study):
    return run(study)


def test_held_out_values_are_those_by_hand(study, comparison):
    assert sorted(np.bincount(comparison.fold)) == [20, 21]
    for law, effect in enumerate(LAWS.values()):
        for number in range(2):
            out = np.flatnonzero(comparison.fold == number)
            others = np.flatnonzero(comparison.fold != number)
            if len(others) == 21:  # 20 in both folds
                others = np.delete(others, number)
            vem = fm.VariationalEM(line_model(effect), starts=1)
            fit = vem.run(jax.random.key(9), study.subset(others), progress=False)
            p = {name: np.asarray(value) for name, value in fit.params.items()}
            tril = p["eta_omega"][:, None] * p.get("eta_corr_cholesky", np.eye(2))
            exact, *_ = line_exact(study.subset(out), p["level"], p["slope"], p["a"], tril @ tril.T)
            found = comparison.log_likelihood[law, out]
            error = 5 * comparison.standard_error[law, out] + 2e-3
            assert np.all(np.abs(found - exact) < error)


def test_table_is_paired_over_subjects(comparison):
    table, log_p = comparison.table, comparison.log_likelihood
    d = -2 * (log_p[1] - log_p[0])
    assert table.loc["diagonal", "difference"] == pytest.approx(d.sum())
    assert table.loc["diagonal", "SE"] == pytest.approx(np.sqrt(41) * d.std(ddof=1))
    assert table["held-out -2LL"].to_numpy() == pytest.approx(-2 * log_p.sum(1))
    assert list(table.loc["Gaussian", ["difference", "SE"]]) == [0, 0]
    assert np.all(table["MC error"] < 0.2) and np.all(table["CPU s"] > 0)
    assert comparison.answer in str(comparison) and "held-out -2LL" in repr(comparison)


def test_a_fold_later_compiles_nothing(comparison):
    first, second = comparison.cpu_seconds.T
    assert np.all(second < 0.5 * first + 0.5)


@pytest.fixture
def interrupted(monkeypatch):
    """`estimate_marginal` as compare sees it, broken off when it is called the fourth time."""
    calls = []

    def broken(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return estimate_marginal(*args)

    monkeypatch.setattr("flowme.infer.rivals.estimate_marginal", broken)
    return calls


def test_interrupted_it_returns_what_is_done_and_goes_on(study, comparison, interrupted, tmp_path):
    part = run(study, path=tmp_path / "run.1")
    first = comparison.fold == 0
    assert np.array_equal(part.judged, first)
    assert "Interrupted" in str(part) and np.isnan(part.cpu_seconds).sum() == 1
    whole = run(study, path=tmp_path / "run.1")
    assert len(interrupted) == 5  # only what was missing
    assert np.array_equal(whole.log_likelihood, comparison.log_likelihood)
    assert whole.messages == comparison.messages
    assert [path.name for path in tmp_path.iterdir()] == ["run.1.npz"]
    with pytest.raises(ValueError, match="the same key"):
        fm.compare(
            line_model(), study, jax.random.key(1), LAWS, folds=2, starts=1, path=tmp_path / "run.1"
        )
    with pytest.raises(ValueError, match="the same data"):
        run(line_study(41, seed=1), path=tmp_path / "run.1")


def test_a_law_built_from_the_fit_of_the_fold(study):
    seen = []

    def inflated(key, fit):
        seen.append(fit.study.subjects.size)
        return dataclasses.replace(fit, theta=fit.theta + 0.5, messages=("moved",))

    laws = {"Gaussian": {"eta": LAWS["Gaussian"]}, "moved": inflated}
    found = run(study, laws=laws)
    assert seen == [20, 20]
    assert found.messages == {"moved": ("fold 1: moved", "fold 2: moved")}
    assert "not shown to need more than the Gaussian" in found.answer
    assert found.table.loc["moved", "difference"] > 0


def test_the_answer_needs_two_standard_errors():
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=100)
    for gain, text in ((0.3, "needs more than the A: B improves"), (0.001, "is not shown")):
        log_likelihood = np.stack([np.zeros(100), gain + noise - noise.mean()])
        one = np.ones((2, 5))
        found = Comparison(
            ("A", "B"), log_likelihood, 0 * log_likelihood, np.arange(100) % 5, one, one > 0, {}
        )
        assert text in found.answer


def test_default_laws_start_from_the_scale_of_the_model(study):
    model = line_model(fm.GaussianRandomEffect(NAMES, omega=[3.0, 0.2]))
    laws = default_laws(model, study)
    assert list(laws)[0] == "Gaussian" and len(laws) == 7
    assert laws["flow"].omega == pytest.approx([3.0, 0.2])
    assert laws["mixture of 4"].spread == pytest.approx([6.0, 0.4])


def test_what_cannot_be_compared_is_refused(study):
    with pytest.raises(ValueError, match="2 to 40 folds"):
        run(study, folds=1)
    with pytest.raises(ValueError, match="at least two laws"):
        run(study, laws={"Gaussian": LAWS["Gaussian"]})
    with pytest.raises(TypeError, match="but for the first"):
        run(study, laws={"function": lambda key, fit: fit, **LAWS})
    with pytest.raises(ValueError, match="name random_effect statements"):
        run(study, laws={**LAWS, "other": {"kappa": LAWS["Gaussian"]}})


def test_the_same_law_put_in_twice_is_the_same_model(study):
    model = line_model()

    def put(effect):
        return Joint.of(fm.replace_effect(model, eta=effect), study)

    one, two = put(fm.MixtureRandomEffect(NAMES)), put(fm.MixtureRandomEffect(NAMES))
    assert one == two and hash(one) == hash(two)
    assert one != put(fm.MixtureRandomEffect(NAMES, 3)) and one != put(LAWS["Gaussian"])
    assert put(LAWS["Gaussian"]) != put(fm.GaussianRandomEffect(NAMES, full=True, omega=0.4))


# Importance sampling.


def test_pareto_k_is_that_of_arviz():
    psislw = getattr(arviz, "psislw", None)
    if psislw is None:
        pytest.skip("this ArviZ has no psislw")
    rng = np.random.default_rng(0)
    cases = [np.log(rng.pareto(1 / k, size=(1000, 20))) for k in (0.2, 0.6, 1.0)]
    cases += [3 * rng.normal(size=(150, 20)), np.log(rng.uniform(size=(2560, 20)))]
    for log_weights in cases:
        expected = [float(psislw(w.copy())[1]) for w in log_weights.T]
        assert pareto_k(log_weights) == pytest.approx(np.array(expected), abs=1e-9)


def test_pareto_k_at_the_ends():
    log_weights = np.full((100, 4), -np.inf)
    log_weights[:, 0] = 7.0  # all equal
    log_weights[0, 2] = 0.0  # one takes all
    log_weights[:, 3] = np.random.default_rng(0).normal(size=100)
    log_weights[:50, 3] = np.nan  # impossible
    found = pareto_k(log_weights)
    assert found[0] == -np.inf and found[1] == np.inf and found[2] > 0.7 and found[3] < 0.7
    with pytest.raises(ValueError, match="at least 25"):
        pareto_k(log_weights[:20])


def exact_line(study):
    """θ of the line model, and its exact log p(y_i)."""
    values = {"level": 2.0, "slope": -1.0, "a": 0.5, "eta_omega": np.array([1.0, 0.6])}
    joint = Joint.of(line_model(LAWS["diagonal"]), study)
    exact, *_ = line_exact(study, 2.0, -1.0, 0.5, np.diag([1.0, 0.36]))
    return joint, joint.unconstrain(values), exact


def test_monte_carlo_errors_cover(study):
    joint, theta, exact = exact_line(study)
    z = []
    for seed in range(40):
        found = estimate_marginal(jax.random.key(seed), joint, theta, {}, study, points=40)
        z.append((found.total - exact.sum()) / found.total_se)
        assert found.pareto_k.shape == (41,) and found.messages == ()
    assert 0.7 < np.std(z) < 1.4 and abs(np.mean(z)) < 0.6


def test_subjects_not_to_be_believed_are_named(study, monkeypatch):
    monkeypatch.setattr("flowme.infer.marginal.TOO_HEAVY", -5.0)
    joint, theta, _ = exact_line(study)
    found = estimate_marginal(KEY, joint, theta, {}, study, points=40)
    worst = study.subjects.ids[int(np.argmax(found.pareto_k))]
    (message,) = found.messages
    assert f"41 subject(s): {worst} (" in message and "raise points (now 40)" in message
