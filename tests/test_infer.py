"""Estimation against what is known exactly: a linear mixed model; and theophylline's references."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from cases import line_exact, line_model, line_study, theophylline_model
from scipy.optimize import minimize

import flowme as fm
from flowme.infer import quadratic
from flowme.infer.joint import Joint
from flowme.infer.newton import newton_of
from flowme.infer.references import find


def exact_of(study, params):
    """`line_exact` at fitted parameters."""
    chol = params["eta_omega"][:, None] * params["eta_corr_cholesky"]
    omega = np.asarray(chol @ chol.T)
    return line_exact(study, *(float(params[k]) for k in ("level", "slope", "a")), omega)


@pytest.fixture(scope="module")
def line_fit():
    study = line_study()
    return fm.VariationalEM(line_model()).run(jax.random.key(0), study, progress=False)


def test_line_is_at_the_exact_maximum(line_fit):
    """The exact marginal likelihood has no better point nearby: a quasi-Newton search from the
    estimate gains less than 1e-4."""
    joint, study = line_fit.joint, line_fit.study

    def minus_exact(theta):
        return -np.sum(exact_of(study, joint.constrain(jnp.asarray(theta)))[0])

    here = minus_exact(np.asarray(line_fit.theta))
    best = minimize(minus_exact, np.asarray(line_fit.theta), method="BFGS")
    assert line_fit.converged
    assert here - best.fun < 1e-4
    np.testing.assert_allclose(line_fit.history[-1], -here, atol=1e-6)


def test_line_conditional_distributions_are_exact(line_fit):
    _, means, covariances = exact_of(line_fit.study, line_fit.params)
    np.testing.assert_allclose(line_fit.conditional.mean, means, atol=1e-6)
    tril = line_fit.conditional.scale_tril
    np.testing.assert_allclose(tril @ np.swapaxes(tril, 1, 2), covariances, atol=1e-6)


def test_line_importance_sampling(line_fit):
    """Every seed's total within 4 of its Monte-Carlo errors of the exact one."""
    exact = exact_of(line_fit.study, line_fit.params)[0].sum()
    for seed in range(10):
        found = fm.marginal_log_likelihood(jax.random.key(seed), line_fit, points=128)
        assert found.total_se < 0.05
        assert abs(found.total - exact) < 4 * found.total_se


def test_line_standard_errors(line_fit):
    """Against the Hessian of the exact log-likelihood, by finite differences."""
    joint, study = line_fit.joint, line_fit.study
    theta, size, h = np.asarray(line_fit.theta), line_fit.theta.size, 1e-3

    def exact(t):
        return np.sum(exact_of(study, joint.constrain(jnp.asarray(t)))[0])

    eye = h * np.eye(size)
    hessian = np.array(
        [
            [
                exact(theta + a + b)
                - exact(theta + a - b)
                - exact(theta - a + b)
                + exact(theta - a - b)
                for b in eye
            ]
            for a in eye
        ]
    ) / (4 * h**2)
    np.testing.assert_allclose(line_fit.information, -hessian, rtol=2e-3, atol=1e-2)
    expected = np.sqrt(np.diag(np.linalg.inv(-hessian)))
    np.testing.assert_allclose(line_fit.standard_errors()["level"], expected[0], rtol=1e-3)


def test_line_nuts_finds_the_conditional_means():
    """Population parameters fixed: posterior means of η within 4.5 Monte-Carlo errors of exact."""
    values = {"level": 2.0, "slope": -1.0, "a": 0.5}
    omega = np.array([[1.0, 0.3], [0.3, 0.4]])
    study = line_study(10)
    law = dist.MultivariateNormal(jnp.zeros(2), omega)

    def model(study):
        eta = fm.random_effect("eta", law, study.subjects, names=["level", "slope"])
        f = (
            values["level"]
            + eta.level[:, None]
            + (values["slope"] + eta.slope[:, None]) * study.time
        )
        fm.observe("y", fm.residual.constant(f, values["a"]), study)

    mcmc = fm.nuts(model, study, jax.random.key(0), num_warmup=500, num_samples=1000,
                   num_chains=2, progress=False)  # fmt: skip
    eta = np.asarray(mcmc.get_samples(group_by_chain=True)["eta"])
    _, means, covariances = line_exact(study, *values.values(), omega)
    size = numpyro.diagnostics.effective_sample_size(eta)
    error = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2) / size)
    assert np.min(size) > 400
    assert np.max(np.abs(eta.mean((0, 1)) - means) / error) < 4.5


def test_oxboys_reference(shared):
    """Exact: it is linear. Estimates of nlme (Goldstein 1987)."""
    study = fm.Study.from_csv(
        shared / "data" / "oxboys.csv", subject="Subject", time="age", outcome={"y": "height"}
    )
    model = line_model(fm.GaussianRandomEffect(["level", "slope"], full=True, omega=5.0))
    fit = fm.VariationalEM(model).run(
        jax.random.key(0), study, init={"level": 150.0, "slope": 5.0, "a": 1.0}, progress=False
    )
    assert abs(-2 * fit.history[-1] - 725.9677) < 1e-3
    found = fit.params
    for name, value in {"level": 149.3718, "slope": 6.525467, "a": 0.65989}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    np.testing.assert_allclose(found["eta_omega"], [7.92403, 1.64672], rtol=1e-3)
    np.testing.assert_allclose(found["eta_corr_cholesky"][1, 0], 0.642, atol=2e-3)


REFERENCE = {
    "constant": (345.435, {"ka": 1.579, "V": 31.63, "CL": 2.748, "a": 0.738},
                 [0.395, 0.0179, 0.0708]),
    "combined1": (341.9774, {"ka": 1.5319, "V": 31.603, "CL": 2.7573, "a": 0.4285, "b": 0.0574},
                  [0.3931, 0.01665, 0.06902]),
}  # fmt: skip


@pytest.mark.parametrize("error", REFERENCE)
def test_theophylline_reference(error):
    """Exact maximum likelihood (adaptive quadrature): estimates within 1 %, -2LL within 0.3."""
    minus_two_ll, values, omega2 = REFERENCE[error]
    fit = fm.VariationalEM(theophylline_model(error=error)).run(
        jax.random.key(0),
        fm.datasets.theophylline(),
        init={"ka": 1.0, "V": 20.0, "CL": 0.5},
        progress=False,
    )
    assert fit.converged
    assert abs(fit.minus_two_ll - minus_two_ll) < 0.3
    assert fit.minus_two_ll_se < 0.1
    for name, value in values.items():
        np.testing.assert_allclose(fit.params[name], value, rtol=0.01)
    np.testing.assert_allclose(fit.params["eta_omega"] ** 2, omega2, rtol=0.01)


def test_order_and_padding_of_subjects_change_nothing(line_fit):
    study = line_fit.study
    order = np.random.default_rng(0).permutation(study.subjects.size)
    fit = fm.VariationalEM(line_model()).run(jax.random.key(0), study.subset(order), progress=False)
    np.testing.assert_allclose(fit.history[-1], line_fit.history[-1], atol=1e-8)
    np.testing.assert_allclose(fit.conditional.mean, line_fit.conditional.mean[order], atol=1e-6)


def test_another_study_of_the_same_shape_compiles_nothing(line_fit):
    vem = fm.VariationalEM(line_model())
    first = line_study(12, seed=1)
    vem.run(jax.random.key(0), first, progress=False)
    second = first.with_values(y=first.values["y"] + 1.0)
    fit = vem.run(jax.random.key(0), second, progress=False)
    assert fit.converged and fit.seconds.compilation == 0.0


def test_references_are_found_where_they_are():
    study = fm.datasets.theophylline()

    def model(study):
        ka = fm.population("ka", dist.LogNormal(0.5, 0.5))
        V = fm.population("V", dist.LogNormal(3.4, 0.5))
        k = fm.population("k", dist.LogNormal(-2.0, 0.5))
        slope = fm.population("slope", dist.Normal(0.0, 1.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["V", "k"]), study.subjects)
        V_i = V * jnp.exp(slope * (study.covariates["WT"] - 70) / 70 + eta.V)
        k_i = k + 0.01 * eta.k  # neither additive nor exponential on k's own scale
        psi = fm.individual(study.subjects, ka=ka, V=V_i, CL=k_i * V_i)
        fm.observe("conc", fm.residual.constant(fm.oral_one_compartment(psi, study), 0.7), study)

    joint = Joint.of(model, study)
    found = find(joint, joint.unconstrain({}), {}, study)
    assert found.pairs == ((0, "V", 0),)
    assert found.sites == {"V"}


@pytest.mark.parametrize("where", ["psi", "beside psi", "effect beside psi"])
def test_references_are_of_what_enters_through_psi_alone(where):
    """log V beside η_V in ψ is a reference; not if the error depends on V too, or on η_V."""

    def model(study):
        CL = fm.population("CL", dist.LogNormal(1.0, 0.5))
        V = fm.population("V", dist.LogNormal(3.4, 0.5))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL", "V"]), study.subjects)
        psi = fm.individual(study.subjects, ka=1.5, V=V * jnp.exp(eta.V), CL=CL * jnp.exp(eta.CL))
        size = {
            "psi": 0.7, "beside psi": 0.02 * V, "effect beside psi": 0.7 * jnp.exp(eta.V)[:, None]
        }[where]  # fmt: skip
        fm.observe("conc", fm.residual.constant(fm.oral_one_compartment(psi, study), size), study)

    study = fm.datasets.theophylline()
    joint = Joint.of(model, study)
    found = find(joint, joint.unconstrain({}), {}, study)
    assert set(found.pairs) == ({(0, "CL", 0), (1, "V", 0)} if where == "psi" else {(0, "CL", 0)})


def test_references_do_not_depend_on_units():
    """V enters a second parameter of about 1e-13, to which a threshold of 1e-12 would be blind."""

    def model(study):
        CL = fm.population("CL", dist.LogNormal(1.0, 0.5))
        V = fm.population("V", dist.LogNormal(3.4, 0.5))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL", "V"]), study.subjects)
        psi = fm.individual(
            study.subjects, ka=1.5, V=V * jnp.exp(eta.V), CL=CL * jnp.exp(eta.CL), s=3e-12 / V
        )
        f = fm.oral_one_compartment(psi, study) * 1e13 * psi.s[:, None]
        fm.observe("conc", fm.residual.constant(f, 0.7), study)

    study = fm.datasets.theophylline()
    joint = Joint.of(model, study)
    assert find(joint, joint.unconstrain({}), {}, study).pairs == ((0, "CL", 0),)


def test_references_are_of_every_subject():
    """Four of 600 subjects are not treated: in all others mu and beta are one parameter."""
    arm = np.ones(600)
    arm[[1, 2, 5, 6]] = 0.0

    def model(study):
        beta = fm.population("beta", dist.Normal(0.0, 1.0))
        mu = fm.population("mu", dist.Normal(0.0, 1.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["mu"]), study.subjects)
        treated = study.covariates["arm"]
        psi = fm.individual(study.subjects, level=mu + beta * treated + eta.mu)
        fm.observe("y", fm.residual.constant(psi.level[:, None] + 0.0 * study.time, 2.0), study)

    frame = pd.DataFrame({"ID": np.repeat(np.arange(600), 2), "TIME": np.tile([0.0, 1.0], 600)})
    frame["y"], frame["arm"] = np.sin(np.arange(1200)), np.repeat(arm, 2)
    study = fm.Study.from_frame(frame, outcome="y", covariates=["arm"])
    joint = Joint.of(model, study)
    assert find(joint, joint.unconstrain({}), {}, study).pairs == ((0, "mu", 0),)


def test_a_scaled_random_effect_is_refused():
    def model(study):
        level = fm.population("level", dist.Normal(0.0, 1.0))
        with numpyro.handlers.scale(scale=0.25):
            eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
        f = (level + eta.level)[:, None] + 0.0 * study.time
        fm.observe("y", fm.residual.constant(f, 2.0), study)

    with pytest.raises(ValueError, match="'eta' outside of numpyro.handlers.scale; got a scale of"):
        fm.VariationalEM(model).run(jax.random.key(0), line_study(12), progress=False)


def test_the_law_of_effects_is_whitened_where_it_is_differentiated():
    """Near a correlation of 1 Ω⁻¹ has elements of 1e6, whose products cancel: in single precision
    the Hessian had the wrong sign. Of W η at θ the precision is the identity."""
    study = line_study(12)
    joint = Joint.of(line_model(), study)
    corr = np.linalg.cholesky([[1.0, -0.999999], [-0.999999, 1.0]])
    omega = np.array([1.0, 1e-4])
    theta = joint.unconstrain({"eta_omega": omega, "eta_corr_cholesky": corr})
    engine = newton_of(joint, theta, {}, study, use_priors=False).engine
    white, (q, _, _) = quadratic.quadratic_form((joint, engine.references), theta, {}, study)
    np.testing.assert_allclose(white @ (omega[:, None] * corr), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(q[1:], [0, 0, -0.5, 0, -0.5], atol=1e-12)
    np.testing.assert_allclose(
        q[0], -np.log(2 * np.pi) - np.sum(np.log(omega * np.diag(corr))), rtol=1e-9
    )


def test_map_differs_from_maximum_likelihood_as_the_prior_says():
    """A tight prior far away pulls the level; the objective has the prior in it."""
    study = line_study(12)

    def model(study):
        level = fm.population("level", dist.Normal(8.0, 0.1))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
        f = (level + eta.level)[:, None] + 0.0 * study.time
        fm.observe("y", fm.residual.constant(f, 2.0), study)

    ml = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    posterior = fm.VariationalEM(model, use_priors=True).run(
        jax.random.key(0), study, progress=False
    )
    assert float(ml.params["level"]) < 2
    assert 7 < float(posterior.params["level"]) < 8


def test_a_subject_the_model_cannot_predict_is_named():
    study = line_study(6)

    def model(study):
        level = fm.population("level", dist.Normal(0.0, 10.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
        bad = jnp.where(jnp.arange(6) == 4, jnp.nan, 0.0)
        psi = fm.individual(study.subjects, level=level + eta.level + bad)
        fm.observe("y", fm.residual.constant(psi.level[:, None] + 0 * study.time, 1.0), study)

    numpyro.enable_validation(False)  # the NaN is meant
    try:
        fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    finally:
        numpyro.enable_validation(True)
    assert not fit.converged
    assert any("s4" in message and "1 subject" in message for message in fit.messages)


def test_interrupting_returns_the_fit_so_far(monkeypatch, line_fit):
    class Impatient:
        def __init__(self, *args, **options):
            self.count = 0

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

        def update(self, n=1):
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt

        def set_postfix_str(self, text):
            pass

    monkeypatch.setattr("flowme.infer.vem.tqdm", Impatient)
    fit = fm.VariationalEM(line_model()).run(jax.random.key(0), line_fit.study)
    assert not fit.converged
    assert "stopped by the user after 2 iterations" in fit.messages[0]
    # Taken up from there, it ends where the uninterrupted one did.
    monkeypatch.undo()
    again = fm.VariationalEM(line_model()).run(
        jax.random.key(0), line_fit.study, init=fit.params, progress=False
    )
    np.testing.assert_allclose(again.history[-1], line_fit.history[-1], atol=1e-3)


def test_save_and_load(tmp_path, line_fit):
    path = fm.save(line_fit, tmp_path / "fit")
    again = fm.load(path, line_model(), line_fit.study)
    for name, value in line_fit.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    assert again.minus_two_ll == line_fit.minus_two_ll
    assert again.converged and again.selection is None
    with pytest.raises(ValueError, match="expected a model and a study with the"):
        fm.load(path, line_model(), line_study(3))
    with pytest.raises(ValueError, match="the .* of fit.npz"):
        fm.load(path, line_model(fm.GaussianRandomEffect(["level", "slope"])), line_fit.study)


def test_init_update_evaluate_as_in_svi(line_fit):
    study, vem = line_fit.study, fm.VariationalEM(line_model())
    state = vem.init(jax.random.key(0), study)
    values = [float(vem.evaluate(state))]
    for _ in range(12):
        state, value = vem.update(state, study)
        values.append(float(value))
    assert np.all(np.diff(values) < 1e-9)
    np.testing.assert_allclose(-values[-1], line_fit.history[-1], atol=1e-3)


@pytest.mark.parametrize("law", ["t", "mixture"])
def test_other_laws_contain_the_gaussian(line_fit, law):
    """Started from the Gaussian fit, they do not end below it (beyond the Monte-Carlo error)."""
    names = ["level", "slope"]
    effect = {
        "t": fm.StudentTRandomEffect(names, full=True),
        "mixture": fm.MixtureRandomEffect(names, full=True),
    }[law]
    fit = fm.VariationalEM(line_model(effect)).run(
        jax.random.key(0), line_fit.study, progress=False
    )
    slack = 3 * np.hypot(fit.minus_two_ll_se, line_fit.minus_two_ll_se)
    assert fit.minus_two_ll < line_fit.minus_two_ll + 0.5 + slack


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: fm.VariationalEM("model"), TypeError, "expected a model"),
        (lambda s: fm.VariationalEM(line_model(), folds=1), ValueError, "expected folds"),
        (
            lambda s: fm.VariationalEM(line_model()).run(jax.random.key(0), s, init={"k": 1.0}),
            ValueError,
            r"expected population parameters among .*got \['k'\]",
        ),
        (
            lambda s: fm.VariationalEM(line_model()).run(jax.random.key(0), s, init={"a": -1.0}),
            ValueError,
            "expected 'a' of shape .* strictly within its support",
        ),
        (
            lambda s: fm.VariationalEM(lambda s: None).run(jax.random.key(0), s),
            ValueError,
            "expected a model with random effects",
        ),
    ],
)
def test_bad_input(line_fit, call, error, words):
    with pytest.raises(error, match=words):
        call(line_fit.study)


@pytest.mark.parametrize("order", [("mu", "beta"), ("beta", "mu")])
def test_an_effect_of_the_arm_is_not_taken_for_a_shift_of_all(order):
    """Subjects sorted by arm, treated first: the estimate is the exact one, whatever the order
    of the statements."""
    rng = np.random.default_rng(3)
    arm = np.repeat([1.0, 0.0], 20)
    level = 10 + 2.5 * arm + rng.normal(size=40)
    frame = pd.DataFrame(
        [(i, t, arm[i], level[i] + 0.5 * rng.normal()) for i in range(40) for t in range(4)],
        columns=["id", "t", "arm", "y"],
    )
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome="y", covariates=["arm"])

    def model(study):
        fixed = {name: fm.population(name, dist.Normal(0.0, 10.0)) for name in order}
        a = fm.population("a", dist.HalfNormal(2.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["mu"]), study.subjects)
        m = fixed["mu"] + fixed["beta"] * study.covariates["arm"] + eta.mu
        fm.observe("y", fm.residual.constant(m[:, None] + 0 * study.time, a), study)

    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    means = frame.groupby("arm")["y"].mean()  # balanced: maximum likelihood is the means
    assert fit.converged
    np.testing.assert_allclose(fit.params["mu"], means[0.0], atol=1e-4)
    np.testing.assert_allclose(fit.params["beta"], means[1.0] - means[0.0], atol=1e-4)
    assert fit.standard_errors() is not None


def test_nodes_where_the_model_is_not_finite_do_not_stop_the_fit():
    """Some nodes have a negative mean, whose logarithm is not a number."""
    rng = np.random.default_rng(0)
    level = 3 + rng.normal(size=30)
    frame = pd.DataFrame(
        [(i, t, abs(level[i]) * np.exp(0.3 * rng.normal())) for i in range(30) for t in range(2)],
        columns=["id", "t", "y"],
    )
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome="y")

    def model(study):
        mu = fm.population("mu", dist.LogNormal(1.0, 1.0))
        a = fm.population("a", dist.HalfNormal(1.0))
        law = fm.GaussianRandomEffect(["m"], omega=2.0)
        eta = fm.random_effect("eta", law, study.subjects)
        f = (mu + eta.m)[:, None] + 0 * study.time
        fm.observe("y", fm.residual.exponential(f, a), study)

    numpyro.enable_validation(False)  # a NaN is meant
    try:
        fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    finally:
        numpyro.enable_validation(True)
    assert fit.converged
    assert 2 < float(fit.params["mu"]) < 4 and float(fit.params["eta_omega"][0]) < 1.8


def test_a_plain_numpyro_random_effect_is_understood():
    """`numpyro.sample` in a plate "subject", no flowme statement for it; exact likelihood."""
    study = line_study(10)

    def model(study):
        level = fm.population("level", dist.Normal(0.0, 10.0))
        omega = fm.population("omega", dist.HalfNormal(2.0))
        with numpyro.plate("subject", study.subjects.size, dim=-1):
            eta = numpyro.sample("eta", dist.Normal(0.0, omega))
        f = (level + eta)[:, None] - study.time
        fm.observe("y", fm.residual.constant(f, 1.0), study)

    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    exact = line_exact(
        study, float(fit.params["level"]), -1.0, 1.0,
        np.diag([float(fit.params["omega"]) ** 2, 0.0]),
    )[0].sum()  # fmt: skip
    assert abs(-0.5 * fit.minus_two_ll - exact) < 4 * 0.5 * fit.minus_two_ll_se + 1e-6


def test_starting_values_of_a_law_are_used(monkeypatch, line_fit):
    seen = []
    climb = fm.VariationalEM._climb

    def spy(self, key, joint, values, *rest):
        seen.append((joint, dict(values)))
        return climb(self, key, joint, values, *rest)

    monkeypatch.setattr(fm.VariationalEM, "_climb", spy)
    effect = fm.StudentTRandomEffect(["level", "slope"], omega=2.0, df=4.0)
    fm.VariationalEM(line_model(effect), max_iterations=1).run(
        jax.random.key(0), line_fit.study, init={"eta_df": 6.0, "a": 0.9}, progress=False
    )
    (gaussian, first), (_, second) = seen
    np.testing.assert_array_equal(gaussian.roles.population["eta_omega"].init, [2.0, 2.0])
    assert first == {"a": 0.9}
    assert second["eta_df"] == 6.0


def test_saved_names_stay_apart(tmp_path, line_fit):
    one, two = (fm.save(line_fit, tmp_path / f"run.{k}") for k in (1, 2))
    assert one != two and fm.load(tmp_path / "run.1", line_model(), line_fit.study).converged
    other = line_fit.study.with_values(y=3 * line_fit.study.values["y"])
    with pytest.raises(ValueError, match="with the data of run.1.npz"):
        fm.load(one, line_model(), other)
