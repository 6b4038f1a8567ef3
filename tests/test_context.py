"""Conditional flows: the distribution of the random effects depends on covariates."""

import dataclasses
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from cases import bent_weights

import flowme as fm
from flowme import flows
from flowme.flow_effect import FlowRandomEffect
from flowme.predict import conditional_nodes, population_draws
from flowme.study import Study

X = np.array([[0.0, 0.0], [1.0, 0.0], [-0.5, 2.0]])  # [subject, covariate]


def _bent(flow, names) -> FlowRandomEffect:
    """A law far from the Gaussian, another one for each x."""
    law = FlowRandomEffect(names, flow, omega=np.linspace(0.4, 0.8, len(names)), context=X)
    size = len(names)
    tril = np.linalg.cholesky(0.4 * np.ones((size, size)) + 0.6 * np.eye(size))
    return law.with_parameters(
        weights=bent_weights(law.flow, size, by=0.3), corr_cholesky=jnp.asarray(tril)
    )


LAWS = {
    "one effect": (_bent(None, ["ka"]), 2e-3),
    "two, coupled": (_bent(flows.SplineCoupling(width=4), ["ka", "V"]), 0.05),
}
laws = pytest.mark.parametrize(("law", "off"), LAWS.values(), ids=LAWS.keys())


@jax.jit
def _look(law, z):
    eta = law.from_base(z)
    return eta, law.log_prob(eta), law.to_base(eta)


@laws
def test_a_law_for_each_subject(law, off):
    """Its density is that of what it samples, and it is centred and scaled at every x."""
    size = len(law.names)
    assert law.batch_shape == (3,) and law.event_shape == (size,)
    z = np.asarray(jax.random.normal(jax.random.key(0), (8192, 1, size)))
    z = np.broadcast_to(z, (8192, 3, size))
    eta, log_prob, back = map(np.asarray, _look(law, z))
    np.testing.assert_allclose(back, z, atol=1e-8)
    step = 1e-5 * np.eye(size)
    slopes = [(_look(law, z + e)[0] - _look(law, z - e)[0]) / 2e-5 for e in step]
    log_det = np.linalg.slogdet(np.stack(slopes, -1))[1]
    normal = -0.5 * np.sum(z**2 + np.log(2 * np.pi), -1)
    np.testing.assert_allclose(log_prob, normal - log_det, atol=1e-4)
    scale, covariance = np.asarray(law.scale_tril), np.asarray(law.covariance_matrix)
    assert scale.shape == (3, size, size) and np.ptp(scale[:, 0, 0]) > 0.05
    np.testing.assert_allclose(covariance, scale @ np.swapaxes(scale, 1, 2), atol=1e-12)
    sd = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    assert np.all(np.abs(eta.mean(0) / sd) < 4 / np.sqrt(8192) + off)
    assert np.all(np.abs(eta.std(0) / sd - 1) < 0.04 + off)
    # Not the scale alone differs by x.
    quantiles = np.quantile(eta[..., 0] / sd[:, 0], [0.1, 0.3, 0.5, 0.7, 0.9], axis=0)
    assert np.ptp(quantiles, axis=1).max() > 0.1


@laws
def test_at_the_start_it_is_gaussian_for_every_x(law, off):
    start = law.flow.init(jax.random.key(3), len(law.names))
    z = np.random.default_rng(0).normal(size=(8192, 3, len(law.names)))
    eta, log_prob, _ = _look(law.with_parameters(weights=start), z)
    gaussian = fm.GaussianRandomEffect(law.names, omega=law.omega, full=True)
    gaussian = gaussian.with_parameters(corr_cholesky=law.corr_cholesky)
    np.testing.assert_allclose(eta, gaussian.from_base(z), atol=1e-9)
    np.testing.assert_allclose(log_prob, gaussian.log_prob(eta), atol=1e-9)
    assert law.typical().batch_shape == () and law.batch_shape == (3,)


def test_what_cannot_be_read_is_refused():
    weight = np.array([[70.0], [55.0]])
    with pytest.raises(ValueError, match=r"column 0 from 55 to 70. Write \(x - reference\)"):
        FlowRandomEffect(["ka"], context=weight)
    with pytest.raises(ValueError, match=r"\[subject, covariate\].*got shape \[2\]"):
        FlowRandomEffect(["ka"], context=weight[:, 0] / 70)
    with pytest.raises(ValueError, match="can read covariates; got MonotoneSpline"):
        FlowRandomEffect(["ka"], flows.MonotoneSpline(), context=weight / 70)
    with pytest.raises(ValueError, match="expected no covariates .*got shape"):
        flows.MarginalMixture().bijector(jnp.zeros(9), 1, X)
    study = _study(4, 0)
    swapped = fm.replace_effect(model, eta=FlowRandomEffect(["mu"], context=X))
    with pytest.raises(ValueError, match="4 subjects; got batch shape .3.*not in replace_effect"):
        fm.VariationalEM(swapped).run(jax.random.key(0), study, progress=False)


# Fits ---------------------------------------------------------------------------------------------


def _study(subjects, seed, depends=True, told=True) -> Study:
    """Two arms: in a, η ~ N(0, .4²); in b it has the modes ±1. Or the latter in both. The flow is
    told the arm by x, or nothing."""
    rng = np.random.default_rng(seed)
    arm = np.arange(subjects) % 2
    modes = np.where(rng.random(subjects) < 0.5, -1.0, 1.0) + 0.3 * rng.normal(size=subjects)
    one = 0.4 * rng.normal(size=subjects)
    level = 2 + 0.5 * arm + np.where((arm == 0) & depends, one, modes)
    rows = [
        (i, float(t), level[i] + 0.3 * rng.normal(), "ab"[arm[i]], told * arm[i])
        for i in range(subjects)
        for t in range(3)
    ]
    frame = pd.DataFrame(rows, columns=["id", "t", "y", "arm", "x"])
    levels = {"arm": ["a", "b"]}
    return Study.from_frame(frame, "id", "t", "y", covariates="x", categorical=levels)


def model(study):
    mu = fm.population("mu", dist.Normal(0.0, 10.0))
    gamma = fm.population("gamma", dist.Normal(0.0, 1.0))
    a = fm.population("a", dist.HalfNormal(1.0))
    law = FlowRandomEffect(["mu"], context=study.covariates["x"][:, None])
    eta = fm.random_effect("eta", law, study.subjects)
    f = mu + fm.covariate.by_level(study, "arm", gamma) + eta.mu
    fm.observe("y", fm.residual.constant(f[:, None] + 0.0 * study.time, a), study)


VEM = fm.VariationalEM(model, starts=1, folds=2, flow_updates=10)


@cache
def _fit(depends, told):
    """Of a flow that is told x = 0 of every subject: it is the unconditional one, by the same
    program."""
    return VEM.run(jax.random.key(0), _study(120, 0, depends, told), progress=False)


def _gain(depends):
    """-2 log p of new subjects under the unconditional flow over that under the conditional one,
    and its standard error."""
    plain, given = (
        fm.marginal_log_likelihood(
            jax.random.key(1), _fit(depends, told), _study(120, 1, depends, told)
        ).log_likelihood
        for told in (False, True)
    )
    gain = 2 * (given - plain)
    return gain.sum(), gain.std(ddof=1) * np.sqrt(len(gain))


def test_new_subjects_prefer_it_where_the_law_depends_on_the_covariate():
    gain, error = _gain(depends=True)
    assert gain > 5 * error > 0
    assert "flow weights" in str(fm.summary(_fit(True, True)))


def test_it_costs_new_subjects_little_where_the_law_does_not_depend():
    gain, error = _gain(depends=False)
    assert _fit(False, True).selected > 0  # the Gaussian is not the reason
    assert gain > -2 * error - 4


def test_simulated_subjects_have_the_law_of_their_covariates():
    fit, new = _fit(True, True), _study(50, 2)
    y = fm.simulate(jax.random.key(0), fit, new, replicates=200)["y"].mean(2)
    arm = np.asarray(new.covariates["arm"])
    for k, centre in enumerate((2.0, 2.5)):
        away = np.abs(y[:, arm == k] - np.mean(y[:, arm == k]))
        assert abs(np.mean(y[:, arm == k]) - centre) < 0.35
        # In a mode at ±1 few are near the middle; in arm a, nearly half.
        assert (np.mean(away < 0.4) < 0.2) == (k == 1), k
    eta, _ = population_draws(jax.random.key(1), fit, 8000)
    assert eta.shape == (8000, 1) and abs(eta.mean()) < 0.04
    normal, _ = population_draws(jax.random.key(1), fit, 8000, gaussian=True)
    assert abs(eta.std() / normal.std() - 1) < 0.06


def test_nuts_draws_from_it():
    """Its means of the subjects' levels are those of importance sampling at the fit."""
    fit, few = _fit(True, True), np.arange(16)
    part = jax.tree.map(lambda x: x[few], fit.conditional)
    gentle = {name: 0.5 * w for name, w in fit.weights.items()}  # modes apart take long to cross
    fit = dataclasses.replace(
        fit, study=fit.study.subset(few), conditional=part, weights=gentle, information=None
    )
    with warnings.catch_warnings():  # that it is short
        warnings.simplefilter("ignore")
        mcmc = fm.nuts(
            model, fit.study, jax.random.key(0), fit=fit,
            num_warmup=50, num_samples=100, num_chains=1, progress=False,
        )  # fmt: skip
    draws = mcmc.get_samples()
    assert draws["eta"].shape == (100, 16, 1)
    arm = np.asarray(fit.study.covariates["arm"])
    level = draws["mu"][:, None] + draws["gamma"][:, None] * arm + draws["eta"][..., 0]
    nodes, log_share = conditional_nodes(jax.random.key(1), fit)
    eta = np.sum(np.asarray(nodes)[..., 0] * np.exp(log_share), 0)
    expected = fit.params["mu"] + fit.params["gamma"] * arm + eta
    assert np.abs(level.mean(0) - expected).max() < 0.15
    assert level.std(0).min() > 0.05
