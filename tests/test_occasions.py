"""Occasions: read from a table, parameters that change between them, random effects κ."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from scipy import stats
from scipy.linalg import expm
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

import flowme as fm
from flowme import residual
from flowme.infer.course import failed
from flowme.infer.joint import Joint
from flowme.predict import population_draws, predict
from flowme.study import Study, StudyError, StudyWarning


def table(**columns):
    frame = pd.DataFrame({"id": [1, 1, 1, 1, 2, 2], "t": [0.0, 1, 2, 3, 0, 1], "y": 1.0})
    return frame.assign(**columns)


def test_occasions_are_numbered_in_time_within_the_level_above():
    frame = table(period=["a", "a", "b", "b", "b", "b"], visit=[1, 2, 1, 1, 7, 8])
    with pytest.warns(StudyWarning, match="sorted by time"):
        study = Study.from_frame(frame[::-1], "id", "t", "y", occasions=["period", "visit"])
    study = study.subset(ids=[1, 2])
    period, visit = study.occasions.values()
    np.testing.assert_array_equal(period.index, [[0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(visit.index, [[0, 1, 2, 2], [0, 1, 1, 1]])
    np.testing.assert_array_equal(visit.present, [[True] * 3, [True, True, False]])
    later = study.at([-1.0, 0.5, 2.5]).occasions["visit"]
    np.testing.assert_array_equal(later.index, [[0, 0, 2], [0, 0, 1]])


def test_the_column_of_nonmem_is_found_and_can_be_left():
    frame = table(OCC=1)
    assert list(Study.from_frame(frame, "id", "t", "y").occasions) == ["OCC"]
    assert not Study.from_frame(frame, "id", "t", "y", occasions=()).occasions


@pytest.mark.parametrize(
    ("occasions", "message"),
    [
        (
            [1, 2, 1, 1, 1, 1],
            r"row 2, subject 1: .*is over when another has begun; got 1.* again",
        ),
        (
            ["1", "1", " ", "2", "1", "1"],
            r"row 2, subject 1: expected an occasion in column 'occ'; got none",
        ),
        (
            [1, 1, None, 2, 1, 1],
            r"row 2, subject 1: expected an occasion in column 'occ'; got none",
        ),
    ],
)
def test_bad_occasions_are_refused(occasions, message):
    with pytest.raises(StudyError, match=message):
        Study.from_frame(table(occ=occasions), "id", "t", "y", occasions="occ")


# Parameters that change in time.

TIMES = np.array([0.0, 2, 5, 12, 12, 15, 30])
KA, K = np.array([1.2, 0.7]), np.array([0.1, 0.25])  # on the two occasions


def changing_study():
    rows = [
        {"id": i, "t": t, "amt": amount, "cmt": cmt, "dur": length, "y": np.nan, "occ": t >= 12}
        for i in (0, 1)
        for t, amount, cmt, length in zip(
            TIMES, [100, 0, 0, 0, 80 + i, 0, 0], [1, 1, 1, 1, 2, 1, 1], [0, 0, 0, 0, 6, 0, 0],
            strict=True,
        )
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.loc[frame.amt == 0, "y"] = 1.0
    names = {"amount": "amt", "compartment": "cmt", "duration": "dur", "occasions": "occ"}
    return Study.from_frame(frame, "id", "t", "y", **names)


def changing(study, ka, k):
    index = study.occasions["occ"].index
    psi = fm.individual(study.subjects, ka=ka[index], k=jnp.asarray(k)[index])
    return psi


def rhs(t, A, psi):
    return -psi.ka * A[0], psi.ka * A[0] - psi.k * A[1]


def by_hand():
    """Interval by interval with SciPy's matrix exponential, the infusion being in force 12-18."""
    found = []
    for i in (0, 1):
        state, states = np.array([100.0, 0, 1]), []
        steps = [(0, 2), (2, 5), (5, 12), (12, 12), (12, 15), (15, 18), (18, 30)]
        states.append(state[:2])
        for a, b in steps:
            on = int(a >= 12 and b > 12)
            rate = (80 + i) / 6 if 12 <= a < 18 and b > 12 else 0.0
            matrix = np.array([[-KA[on], 0, 0], [KA[on], -K[on], rate], [0, 0, 0]])
            state = expm((b - a) * matrix) @ state
            if b != 18:
                states.append(state[:2])
        found.append(states)
    return np.array(found)


@pytest.mark.parametrize("occasions", [False, True], ids=["by record", "by occasion"])
def test_an_ode_whose_parameters_change_between_occasions(occasions):
    study = changing_study()

    def solve(ka):
        psi = changing(study, ka, K)
        chosen = study.occasions["occ"] if occasions else None
        return fm.solve(rhs, psi, study, rtol=1e-10, atol=1e-10, occasions=chosen)

    def linear(ka):
        psi = changing(study, ka, K)
        return fm.solve_linear(lambda p: [[-p.ka, 0.0], [p.ka, -p.k]], psi, study)

    np.testing.assert_allclose(linear(KA), by_hand(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(solve(KA), by_hand(), rtol=1e-8, atol=1e-8)
    slopes = [jax.jacfwd(f)(jnp.asarray(KA)) for f in (solve, linear)]
    second = np.asarray(slopes[0])[..., 1]  # to ka on the second occasion, from its fifth record
    assert np.all(second[:, :5] == 0) and np.all(second[:, 5:] != 0)
    np.testing.assert_allclose(*slopes, rtol=1e-6, atol=1e-6)


def test_a_change_within_an_occasion_is_not_overlooked():
    study = changing_study()
    k = np.full((2, 7), 0.1)
    k[1, 2] = 0.2
    psi = fm.individual(study.subjects, ka=1.0, k=k)
    found = fm.solve(rhs, psi, study, occasions=study.occasions["occ"])
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).any()
    with pytest.raises(
        ValueError, match="fm.solve and fm.solve_linear take parameters that change"
    ):
        fm.oral_one_compartment(fm.individual(study.subjects, ka=1.0, CL=k, V=1.0), study)


def test_a_covariate_that_changes_in_time_enters_the_right_hand_side():
    """As a leaf of psi by itself: the rate constants are then those of the occasions."""
    study = changing_study()
    growth = jnp.asarray(K / K[0])[study.occasions["occ"].index]  # [subject, time]
    ka = jnp.asarray(KA)[study.occasions["occ"].index]
    psi = fm.individual(study.subjects, ka=ka, k=K[0], growth=growth)

    def growing(t, A, psi):
        return -psi.ka * A[0], psi.ka * A[0] - psi.k * psi.growth * A[1]

    np.testing.assert_allclose(fm.solve(growing, psi, study), by_hand(), rtol=1e-7, atol=1e-7)


def test_bioavailability_of_each_dose():
    """Half of the first dose and all of the second are as if half had been given."""
    study = changing_study()
    psi = changing(study, KA, K)
    part = jnp.where(study.occasions["occ"].index == 0, 0.5, 1.0)
    matrix = lambda p: [[-p.ka, 0.0], [p.ka, -p.k]]  # noqa: E731
    whole = fm.solve_linear(matrix, psi, study)
    first = fm.solve_linear(matrix, psi, study, bioavailability={1: jnp.full(2, 0.5)})
    found = fm.solve_linear(matrix, psi, study, bioavailability=part)
    np.testing.assert_allclose(found, first, rtol=1e-12)
    assert not np.allclose(found, whole)


# Random effects between occasions.


def line(law=None):
    def model(study):
        mu = fm.population("mu", dist.Normal(0, 10), init=4.0)
        a = fm.population("a", dist.HalfNormal(1.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["mu"]), study.subjects)
        kappa = fm.random_effect(
            "kappa", law or fm.GaussianRandomEffect(["mu"]), study.occasions["occ"]
        )
        psi = fm.individual(study.subjects, mu=mu + eta.mu[:, None] + kappa.mu)
        fm.observe("y", residual.constant(psi.mu, a), study)

    return model


def simulated(subjects=30, seed=0):
    """Two or three occasions of two measurements each; SD 1 between subjects, .6 between
    occasions, .3 of the error."""
    rng = np.random.default_rng(seed)
    i, k, j = (x.ravel() for x in np.meshgrid(*map(np.arange, (subjects, 3, 2)), indexing="ij"))
    y = 5 + rng.normal(0, 1, subjects)[i] + rng.normal(0, 0.6, (subjects, 3))[i, k]
    frame = pd.DataFrame({"id": i, "t": 10.0 * k + j, "occ": k + 1, "y": y})
    frame["y"] += rng.normal(0, 0.3, len(frame))
    return frame[(k < 2) | (i % 3 > 0)]


def exact(frame, mu, omega, gamma, a):
    """-2 log-likelihood: the y of a subject are multivariate normal."""
    total = 0.0
    for _, rows in frame.groupby("id"):
        same = rows.occ.to_numpy()[:, None] == rows.occ.to_numpy()
        covariance = omega**2 + gamma**2 * same + a**2 * np.eye(len(rows))
        total -= 2 * multivariate_normal.logpdf(rows.y, np.full(len(rows), mu), covariance)
    return total


@pytest.fixture(scope="module")
def fitted():
    study = Study.from_frame(simulated(), "id", "t", "y", occasions="occ")
    return fm.VariationalEM(line()).run(jax.random.key(0), study, progress=False)


def test_the_fit_is_at_the_maximum_of_the_exact_likelihood(fitted):
    names = ("mu", "eta_omega", "kappa_omega", "a")
    values = fitted.joint.constrain(fitted.theta)
    at = np.array([float(np.ravel(values[name])[0]) for name in names])
    assert fitted.converged and not fitted.messages
    found = exact(simulated(), *at)
    np.testing.assert_allclose(fitted.minus_two_ll, found, rtol=1e-8)
    for direction in np.eye(4):
        for step in (-0.01, 0.01):
            assert exact(simulated(), *(at + step * direction)) > found


def test_it_is_reported_once_for_all_occasions(fitted):
    report = fm.summary(fitted)
    assert list(report.effects.index) == ["eta_mu", "kappa_mu"]
    assert "omega of kappa(mu)" in report.frame.index
    drawn = fm.to_arviz(fitted, jax.random.key(1), draws=8)
    kappa = drawn.posterior["kappa"]
    assert kappa.dims == ("chain", "draw", "subject", "occasion", "kappa_effect")
    absent = ~fitted.study.occasions["occ"].present
    np.testing.assert_array_equal(np.isnan(kappa.values[0, 0, :, :, 0]), absent)
    assert drawn.posterior["psi"].dims == ("chain", "draw", "subject", "time", "parameter")
    eta, psi = population_draws(jax.random.key(2), fitted, 20_000)
    between = np.cov(eta.T)
    expected = np.diag([0.0, 0, 0, 0])
    expected[0, 0] = fitted.joint.constrain(fitted.theta)["eta_omega"][0] ** 2
    expected[1:, 1:] = np.eye(3) * fitted.joint.constrain(fitted.theta)["kappa_omega"][0] ** 2
    np.testing.assert_allclose(between, expected, atol=0.03)
    assert psi["psi"].shape == (20_000, 1)


def test_individual_predictions_are_the_best_linear_ones(fitted):
    """E(mu + η_i + κ_ik | y_i) of a Gaussian model, by its formula; within four Monte-Carlo errors
    of 256 weighted nodes that are worth half as many."""
    values = {n: float(np.ravel(v)[0]) for n, v in fitted.joint.constrain(fitted.theta).items()}
    found = predict(fitted)["y"]
    for i, (_, rows) in enumerate(simulated().groupby("id")):
        same = rows.occ.to_numpy()[:, None] == rows.occ.to_numpy()
        signal = values["eta_omega"] ** 2 + values["kappa_omega"] ** 2 * same
        gain = signal @ np.linalg.inv(signal + values["a"] ** 2 * np.eye(len(rows)))
        expected = values["mu"] + gain @ (rows.y.to_numpy() - values["mu"])
        error = np.sqrt(np.diag(signal - gain @ signal) / 128)
        np.testing.assert_array_less(np.abs(found[i, : len(rows)] - expected) / error, 4.0)


def test_new_subjects_may_have_other_occasions(fitted):
    """One occasion instead of three: predictions, likelihood by its formula, and simulations whose
    variance is that of all levels together."""
    frame = simulated(200, seed=1).query("occ == 1")
    study = Study.from_frame(frame, "id", "t", "y", occasions="occ")
    values = {n: float(np.ravel(v)[0]) for n, v in fitted.joint.constrain(fitted.theta).items()}
    found = fm.marginal_log_likelihood(jax.random.key(5), fitted, study)
    expected = exact(frame, *(values[n] for n in ("mu", "eta_omega", "kappa_omega", "a")))
    assert abs(-2 * found.total - expected) < 8 * found.total_se + 1e-6
    drawn = fm.simulate(jax.random.key(6), fitted, study, replicates=100)["y"]
    total = values["eta_omega"] ** 2 + values["kappa_omega"] ** 2 + values["a"] ** 2
    np.testing.assert_allclose(drawn[..., 0].var(), total, rtol=4 * np.sqrt(2 / 20_000))
    np.testing.assert_allclose(predict(fitted, study, population=True)["y"], values["mu"])
    with pytest.raises(ValueError, match="expected as many occasions as in the study fitted"):
        predict(fitted, study.subset(ids=[0, 1]))


@pytest.mark.parametrize(
    "law",
    [fm.StudentTRandomEffect(["mu"]), fm.FlowRandomEffect(["mu"])],
    ids=["t", "flow"],
)
def test_other_laws_take_its_place(law):
    """Each occasion's κ has the density of the law, and the whole density is their product."""
    study = Study.from_frame(simulated(6), "id", "t", "y", occasions="occ")
    joint = Joint.of(line(law), study)
    weights = {name: jnp.asarray(w) for name, w in joint.roles.weights.items()}
    values = joint.constrain(joint.unconstrain({}))
    eta = jax.random.normal(jax.random.key(0), (6, 4))
    _, density = joint.terms(values, weights, eta, study)
    inner = joint.laws(joint.unconstrain({}), weights, study)[1].base_dist.law
    expected = dist.Normal(0, values["eta_omega"][0]).log_prob(eta[:, 0])
    expected += sum(inner.log_prob(eta[:, [k]]) for k in (1, 2, 3))
    np.testing.assert_allclose(density, expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:(R-hat|effective sample size):UserWarning")
def test_nuts_has_the_density_of_the_model(fitted):
    """Its chains start and move; the posterior mean of κ's SD is near the estimate."""
    run = fm.nuts(
        line(), fitted.study, jax.random.key(3), fit=fitted,
        num_warmup=100, num_samples=200, num_chains=2, progress=False,
    )  # fmt: skip
    draws = np.asarray(run.get_samples()["kappa_omega"])[:, 0]
    estimate = float(fitted.joint.constrain(fitted.theta)["kappa_omega"][0])
    assert not np.asarray(run.get_extra_fields()["diverging"]).any()
    assert abs(draws.mean() - estimate) < 0.1 and 0.05 < draws.std() < 0.15


def test_plain_laws_are_refused():
    study = Study.from_frame(simulated(6), "id", "t", "y", occasions="occ")
    with pytest.raises(TypeError, match="expected one of flowme's distributions .* 'kappa'"):
        Joint.of(line(dist.Normal(0, 1).expand([1]).to_event(1)), study)


def test_a_subject_that_cannot_be_predicted_is_named_with_its_parameters(fitted):
    """Those that change in time, from where to where."""
    bad = np.where(np.arange(len(fitted.log_likelihood)) == 4, np.nan, fitted.log_likelihood)
    (message,) = failed(bad, fitted, fitted.study)
    psi = fitted.joint.individual(
        fitted.theta, fitted.weights, fitted.conditional.mean, fitted.study
    )["psi"][4, :, 0]
    assert f"1 subject(s): {fitted.study.subjects.ids[4]} (the first at psi = mu " in message
    assert f"{psi.min():.3g} to {psi.max():.3g})" in message


def test_two_levels_of_occasions_are_integrated_around_their_modes():
    """Seven effects on one rate, which far from a mode is wrong by many residual errors: -2LL of
    the climb, and of the report, is that of the four rates, integrated by SciPy's means."""
    rng, since = np.random.default_rng(7), np.array([2.0, 6, 12, 24])
    shapes = {"eta": (1, 1, 1), "period": (2, 1, 1), "visit": (2, 2, 1)}
    omega = {"eta": 0.3, "period": 0.25, "visit": 0.2}
    change = sum(omega[n] * rng.normal(size=(30, *shape)) for n, shape in shapes.items())
    y = 10 * np.exp(-0.1 * np.exp(change) * since) * (1 + 0.1 * rng.normal(size=(30, 2, 2, 4)))
    i, period, visit, j = np.indices(y.shape).reshape(4, -1)
    columns = {"id": i, "t": 2000 * period + 1000 * visit + since[j], "y": y.ravel()}
    frame = pd.DataFrame(columns | {"period": period, "visit": visit, "since": since[j]})
    study = Study.from_frame(
        frame, "id", "t", "y", occasions=["period", "visit"], time_varying="since"
    )

    def model(study):
        k = fm.population("k", dist.LogNormal(-2.0, 1.0))
        change = 0.0
        for name, whose in (("eta", study.subjects), *study.occasions.items()):
            kappa = fm.random_effect(name, fm.GaussianRandomEffect(["k"]), whose).k
            change = change + (kappa[:, None] if name == "eta" else kappa)
        f = 10 * jnp.exp(-k * jnp.exp(change) * study.covariates["since"])
        fm.observe("y", residual.proportional(f, 0.1), study)

    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    found = {name: float(np.squeeze(value)) for name, value in fit.params.items()}

    def joint(u, y, precision, log_det):
        f = 10 * np.exp(-found["k"] * np.exp(u)[..., None] * since)
        inside = stats.norm.logpdf(y, f, 0.1 * f).sum((-1, -2))
        return inside - 0.5 * (np.einsum("...a,ab,...b", u, precision, u) + log_det)

    share = np.kron(np.eye(2), np.ones((2, 2)))
    parts = (np.ones((4, 4)), share, np.eye(4))
    sigma = sum(found[f"{n}_omega"] ** 2 * part for n, part in zip(omega, parts, strict=True))
    prior = np.linalg.inv(sigma), np.linalg.slogdet(2 * np.pi * sigma)[1]
    z, total = rng.standard_t(8, size=(4000, 4)), 0.0
    for own, start in zip(y.reshape(30, 4, 4), change.reshape(30, 4), strict=True):
        best = minimize(lambda u: -joint(u, own, *prior), start)  # noqa: B023
        tril = np.linalg.cholesky(best.hess_inv)
        log_q = stats.t(8).logpdf(z).sum(-1) - np.log(np.diag(tril)).sum()
        total += np.logaddexp.reduce(joint(best.x + z @ tril.T, own, *prior) - log_q) - np.log(4000)
    assert fit.converged and not fit.messages
    assert abs(fit.minus_two_ll + 2 * total) < 1.0
    assert abs(-2 * fit.history[-1] + 2 * total) < 3.0
