"""Residual errors correlated in time."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.handlers import seed, trace
from scipy.stats import multivariate_normal

import flowme as fm
from flowme.residual import autocorrelated, constant, exponential, proportional
from flowme.study import Study

TIMES = np.array([0.0, 0.4, 1.0, 1.0, 2.5, 4.0])


def study_of(values):
    """Two outcomes; "y" is not measured at the third record, nor, in subject 1, at the last."""
    rows = [
        {"id": i, "t": t, "y": values[i, j], "z": 1.0 if j == 2 else np.nan}
        for i in range(len(values))
        for j, t in enumerate(TIMES)
    ]
    frame = pd.DataFrame(rows)
    frame.loc[(frame.z == 1.0) | ((frame.id == 1) & (frame.t == 4.0)), "y"] = np.nan
    return Study.from_frame(frame, "id", "t", ["y", "z"])


@pytest.mark.parametrize("law", [constant, proportional, exponential])
def test_the_density_is_multivariate_normal(law):
    values = np.exp(0.3 * np.random.default_rng(0).normal(size=(2, 6)))
    study, f, tau = study_of(values), 1.0 + 0.1 * TIMES, 1.7

    def model(study):
        whole = law(jnp.broadcast_to(f, study.time.shape), 0.3)
        fm.observe("y", autocorrelated(whole, tau, study, "y"), study)

    site = trace(seed(model, jax.random.key(0))).get_trace(study)["y"]
    found = site["fn"].log_prob(site["value"])
    for i in (0, 1):
        kept = np.flatnonzero(np.asarray(study.observed["y"])[i])
        y, mean, sd = values[i, kept], f[kept], np.full(len(kept), 0.3)
        jacobian = 0.0
        if law is exponential:
            y, mean, jacobian = np.log(y), np.log(mean), -np.log(y).sum()
        if law is proportional:
            sd = 0.3 * mean
        t = TIMES[kept]
        covariance = np.outer(sd, sd) * np.exp(-np.abs(t[:, None] - t) / tau)
        expected = multivariate_normal.logpdf(y, mean, covariance) + jacobian
        np.testing.assert_allclose(found[i], expected, rtol=1e-10)


def test_samples_have_the_correlation():
    """Of 40 000 draws, within four standard errors."""
    study = study_of(np.ones((2, 6)))
    law = autocorrelated(constant(jnp.zeros(study.time.shape), 2.0), 1.7, study, "y")
    draws = np.asarray(law.sample(jax.random.key(0), (40_000,)))[:, 0] / 2.0
    expected = np.exp(-np.abs(TIMES[:, None] - TIMES) / 1.7)
    np.testing.assert_allclose(draws.T @ draws / 40_000, expected, atol=4 * np.sqrt(2 / 40_000))


def test_it_is_estimated():
    """From 60 subjects of 20 measurements, within three standard errors."""
    rng = np.random.default_rng(0)
    t = 0.5 * np.arange(20)
    shape = np.linalg.cholesky(np.exp(-np.abs(t[:, None] - t) / 2.0))
    y = 5 + rng.normal(0, 0.5, (60, 1)) + 0.8 * rng.normal(size=(60, 20)) @ shape.T
    frame = pd.DataFrame({"id": np.repeat(range(60), 20), "t": np.tile(t, 60), "y": y.ravel()})
    study = Study.from_frame(frame, "id", "t", "y")

    def model(study):
        mu = fm.population("mu", dist.Normal(0, 10), init=4.0)
        a = fm.population("a", dist.HalfNormal(1.0))
        tau = fm.population("tau", dist.LogNormal(0.0, 1.0), unit="h")
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["mu"]), study.subjects)
        f = jnp.broadcast_to((mu + eta.mu)[:, None], study.time.shape)
        fm.observe("y", autocorrelated(constant(f, a), tau, study, "y"), study)

    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    table = fm.summary(fit).frame
    assert fit.converged
    for name, truth in (("mu", 5.0), ("a", 0.8), ("tau", 2.0), ("omega(mu)", 0.5)):
        assert abs(table.loc[name, "estimate"] - truth) < 3 * table.loc[name, "SE"], name


def test_what_it_cannot_do_is_refused():
    study = study_of(np.ones((2, 6)))
    f = jnp.ones(study.time.shape)
    with pytest.raises(ValueError, match="one of .'y', 'z'.; got 'x'"):
        autocorrelated(constant(f, 1.0), 1.0, study, "x")
    with pytest.raises(ValueError, match="expected normal or lognormal errors"):
        autocorrelated(dist.Poisson(f), 1.0, study, "y")
