"""NUTS: its density is the model's, its draws are the posterior, and it says what went wrong."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from cases import line_model, line_study
from fits import rough_fit
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import biject_to
from numpyro.infer.util import log_density

import flowme as fm
from flowme.effects import GaussianRandomEffect
from flowme.infer import nuts as module
from flowme.infer.chains import doubts
from flowme.infer.conditional import Conditional
from flowme.infer.coordinates import Coordinates
from flowme.infer.joint import Joint
from flowme.infer.whiten import whiten
from flowme.mixture_effect import MixtureRandomEffect

NAMES = ["level", "slope"]


def two_sites(study):
    """A law of NumPyro whose parameters are statements, beside one of flowme."""
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    slope = fm.population("slope", dist.Normal(0.0, 10.0))
    eta = fm.random_effect(
        "eta", dist.Normal(slope, sd).expand([1]).to_event(1), study.subjects, names=["slope"]
    )
    with numpyro.plate("subject", study.subjects.size):
        bend = numpyro.sample("bend", dist.StudentT(3.0, 0.0, sd))
    kappa = fm.random_effect("kappa", GaussianRandomEffect(["level"]), study.subjects)
    f = kappa.level[:, None] + eta.slope[:, None] * study.time + bend[:, None] * study.time**2
    fm.observe("y", fm.residual.constant(f, 1.0), study)


MODELS = {
    "gaussian, full": (line_model(), False),
    "mixture": (line_model(MixtureRandomEffect(NAMES)), False),
    "flow, sampled": (line_model(fm.FlowRandomEffect(NAMES)), True),
    "laws of NumPyro": (two_sites, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_density_is_that_of_the_model_and_the_jacobian(name):
    model, sample_flow = MODELS[name]
    study = line_study(4)
    joint = Joint.of(model, study)
    coordinates = Coordinates(joint, sample_flow)
    fit = rough_fit(joint, study)
    map = whiten(coordinates, fit, study)
    sampled = module._sampled_model(joint, map.weights, sample_flow)

    def unknowns(x):
        point = coordinates.point(x, map, study)
        parts = [point.theta, *(point.weights.values() if sample_flow else ()), point.eta.ravel()]
        return jnp.concatenate(parts)

    def constrained(theta):
        total = 0.0
        for site_name, site in joint.roles.population.items():
            to = biject_to(site.support)
            part = theta[joint.slices[site_name]].reshape(to.inverse_shape(site.shape))
            total += jnp.sum(to.log_abs_det_jacobian(part, to(part)))
        return total

    @jax.jit
    def both(x):
        values = coordinates.values(x, map, study)
        values = {k: v for k, v in values.items() if k not in joint.roles.individual}
        log_p = log_density(sampled, (study,), {}, values)[0]
        log_p += constrained(coordinates.point(x, map, study).theta)
        log_det = jnp.linalg.slogdet(jax.jacfwd(unknowns)(x))[1]
        return -coordinates.potential(x, map, study), log_p + log_det

    for seed in range(2):
        x = jax.random.normal(jax.random.key(seed), (coordinates.size(study),))
        ours, theirs = both(x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def intercepts(study):
    level = fm.population("level", dist.Normal(0.0, 10.0))
    eta = fm.random_effect("eta", GaussianRandomEffect(["level"]), study.subjects)
    f = jnp.broadcast_to((level + eta.level)[:, None], study.time.shape)
    fm.observe("y", fm.residual.constant(f, 1.0), study)


def intercepts_study():
    """Twelve subjects, poor and rich: 1 to 6 observations, ω near the noise."""
    rng = np.random.default_rng(4)
    rows = [
        (i, float(t), 1.0 + effect + rng.normal())
        for i, effect in enumerate(0.7 * rng.normal(size=12))
        for t in range(1 + i // 2)
    ]
    frame = pd.DataFrame(rows, columns=["id", "t", "y"])
    return fm.Study.from_frame(frame, subject="id", time="t", outcome="y")


def intercepts_exact(study):
    """Means of level, ω and η_0, η_11 by quadrature over (level, ω)."""
    level, omega = np.meshgrid(np.linspace(-4, 6, 401), np.linspace(1e-3, 5, 800), indexing="ij")
    log_p = -0.5 * (level / 10) ** 2 - 0.5 * omega**2
    means = []
    for i in range(study.subjects.size):
        y = study.values["y"][i, study.observed["y"][i]]
        n, variance = len(y), omega**2 + 1 / len(y)
        log_p += -0.5 * np.log(variance) - 0.5 * (y.mean() - level) ** 2 / variance
        means.append(omega**2 / variance * (y.mean() - level) * np.ones_like(level) + 0 * n)
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    return [np.sum(weight * value) for value in (level, omega, omega**2, means[0], means[11])]


def intercepts_fit(study, omega=0.7):
    """Conditional distributions N(m_i, C_i), C_i = 1/(1/ω² + n_i), at level 1."""
    joint = Joint.of(intercepts, study)
    n = np.sum(study.observed["y"], 1)
    total = np.sum(np.where(study.observed["y"], study.values["y"] - 1.0, 0.0), 1)
    precision = 1 / omega**2 + n
    conditional = Conditional(
        jnp.asarray(total / precision)[:, None], jnp.asarray(precision**-0.5)[:, None, None]
    )
    theta = joint.unconstrain({"level": 1.0, "eta_omega": [omega]})
    return dataclasses.replace(
        rough_fit(joint, study), theta=theta, conditional=conditional, information=np.diag([15, 5])
    )


@pytest.fixture(scope="module")
def run():
    study = intercepts_study()
    fit = intercepts_fit(study)
    return fm.nuts(
        intercepts, study, jax.random.key(0), fit=fit, num_samples=2000, progress=False,
        target_accept_prob=0.9,
    )  # fmt: skip


def test_draws_are_those_of_the_exact_posterior(run):
    """Poor data: the variance of the effects may be 0."""
    exact = intercepts_exact(intercepts_study())
    found = run.get_samples(group_by_chain=True)
    omega, eta = np.asarray(found["eta_omega"][..., 0]), np.asarray(found["eta"][..., 0])
    draws = [np.asarray(found["level"]), omega, omega**2, eta[..., 0], eta[..., 11]]
    for value, expected in zip(draws, exact, strict=True):
        error = value.std() / np.sqrt(effective_sample_size(value))
        assert error < 0.05
        assert abs(value.mean() - expected) < 4.5 * error
    assert int(run.get_extra_fields()["diverging"].sum()) == 0
    assert run.messages == ()


def test_a_run_is_an_mcmc_of_numpyro(run, capsys):
    assert isinstance(run, numpyro.infer.MCMC)
    assert set(run.get_samples()) == {"level", "eta_omega", "eta"}
    assert run.get_samples()["eta"].shape == (8000, 12, 1)
    assert run.get_extra_fields(group_by_chain=True)["num_steps"].shape == (4, 2000)
    run.print_summary()
    assert "eta_omega[0]" in capsys.readouterr().out


def test_a_second_run_compiles_nothing(run):
    study = intercepts_study()
    fit = intercepts_fit(study, omega=0.5)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
    )
    again = {"fit": fit, "num_samples": 2000, "target_accept_prob": 0.9, "progress": False}
    fm.nuts(intercepts, study, jax.random.key(7), **again)
    assert compiled == []


def test_interrupted_runs_keep_their_draws(run, monkeypatch):
    study = intercepts_study()
    fit = intercepts_fit(study)
    advance, calls = module.Sampler.advance, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(module.Sampler, "advance", interrupted)
    options = {"fit": fit, "num_samples": 2000, "target_accept_prob": 0.9, "progress": False}
    stop = 20
    with pytest.warns(UserWarning, match="stopped by the user"):
        short = fm.nuts(intercepts, study, jax.random.key(0), **options)
    assert short.num_samples == 800
    np.testing.assert_array_equal(
        short.get_samples(group_by_chain=True)["level"],
        run.get_samples(group_by_chain=True)["level"][:, :800],
    )
    calls.clear()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        fm.nuts(intercepts, study, jax.random.key(0), **options)


def test_doubts_name_the_worst_parameter_and_what_to_do():
    study = line_study(3)
    joint = Joint.of(line_model(GaussianRandomEffect(NAMES)), study)
    rng = np.random.default_rng(0)
    samples = {
        name: rng.normal(size=(4, 500, *site.shape))
        for name, site in joint.roles.population.items()
    }
    samples["eta"] = rng.normal(size=(4, 500, 3, 2))
    fields = {"diverging": np.zeros((4, 500), bool)}
    mcmc = types.SimpleNamespace(
        get_samples=lambda group_by_chain: samples, get_extra_fields=lambda group_by_chain: fields
    )
    assert doubts(mcmc, joint, study) == ()
    samples["eta_omega"][0, :, 1] += 3.0
    samples["eta"][..., 2, 0] = np.cumsum(samples["eta"][..., 2, 0], 1)
    fields["diverging"][1, 3] = True
    diverging, r_hat, size = doubts(mcmc, joint, study)
    assert diverging.startswith("1 divergent transition:") and "target_accept_prob" in diverging
    assert "for eta_omega[slope]" in r_hat or "eta.level of subject s2" in r_hat
    assert "(below 400)" in size and "num_samples" in size


@pytest.mark.filterwarnings("ignore:(R-hat|effective sample size|[0-9]+ divergent):UserWarning")
def test_a_sampled_flow_is_judged_by_its_density():
    study = intercepts_study()
    model = fm.replace_effect(intercepts, eta=fm.FlowRandomEffect(["level"]))
    fit = rough_fit(Joint.of(model, study), study)
    short = {"num_warmup": 40, "num_samples": 10, "num_chains": 2, "progress": False}
    with pytest.warns(UserWarning, match="posterior of the flow is not to be believed"):
        mcmc = fm.nuts(model, study, jax.random.key(0), fit=fit, sample_flow=True, **short)
    samples = mcmc.get_samples()
    assert samples["eta_weights"].shape == (20, fit.weights["eta_weights"].size)
    with pytest.raises(ValueError, match="expected a fit of this model, to hold the weights"):
        fm.nuts(model, study, jax.random.key(0))


def test_wrong_arguments():
    study = intercepts_study()
    fit = rough_fit(Joint.of(intercepts, study), study)
    with pytest.raises(ValueError, match="expected num_chains to be an integer, at least 1; got 0"):
        fm.nuts(intercepts, study, jax.random.key(0), fit=fit, num_chains=0)
    with pytest.raises(ValueError, match="target_accept_prob between 0 and 1; got 1"):
        fm.nuts(intercepts, study, jax.random.key(0), fit=fit, target_accept_prob=1)
    with pytest.raises(ValueError, match="with 12 subjects .* got one with 11"):
        fm.nuts(
            intercepts, study, jax.random.key(0), fit=rough_fit(fit.joint, study.subset(range(11)))
        )
