"""The summary says what the fit says."""

import dataclasses

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from cases import normal_study
from fits import theophylline, theophylline_nuts
from scipy.stats import multivariate_normal

import flowme as fm
from flowme.predict import estimate
from flowme.report import summary


def test_rows_are_the_parameters_as_reported():
    frame = summary(theophylline()).frame
    labels = ["ka", "volume", "CL", "a", "omega(ka)", "omega(CL)", "corr(ka, CL)"]
    assert list(frame.index) == labels
    assert list(frame.columns) == ["estimate", "SE", "RSE (%)", "unit"]
    assert list(frame["unit"]) == ["1/h", "L", "L/h", "mg/L", "", "", ""]


def test_estimates_and_errors_are_those_of_the_fit():
    fit = theophylline()
    frame, error = summary(fit).frame, fit.standard_errors()
    for label, name in {"ka": "ka", "volume": "V", "CL": "CL", "a": "a"}.items():
        np.testing.assert_allclose(frame.loc[label, "estimate"], fit.params[name], rtol=1e-12)
        np.testing.assert_allclose(frame.loc[label, "SE"], error[name], rtol=1e-9)
    np.testing.assert_allclose(frame["estimate"].iloc[4:6], fit.params["eta_omega"], rtol=1e-12)
    # For two effects the correlation is the corner of the Cholesky factor.
    corner = fit.params["eta_corr_cholesky"][1, 0]
    np.testing.assert_allclose(frame.loc["corr(ka, CL)", "estimate"], corner, rtol=1e-9)
    np.testing.assert_allclose(
        frame.loc["corr(ka, CL)", "SE"], error["eta_corr_cholesky"][1, 0], rtol=1e-6
    )
    relative = 100 * frame["SE"] / frame["estimate"].abs()
    np.testing.assert_allclose(frame["RSE (%)"], relative, rtol=1e-12)


def test_effects_have_the_moments_of_a_gaussian_and_its_shrinkage():
    fit = theophylline()
    effects = summary(fit).effects
    assert list(effects.index) == ["ka", "CL"]
    omega = np.asarray(fit.params["eta_omega"])
    np.testing.assert_allclose(effects["SD"], omega, rtol=1e-12)
    np.testing.assert_array_equal(effects["mean"], 0.0)
    # Standard errors of the moments of 50 000 draws: √(6/n) and √(24/n).
    assert np.all(np.abs(effects["skewness"]) < 4 * np.sqrt(6 / 50_000))
    assert np.all(np.abs(effects["excess kurtosis"]) < 4 * np.sqrt(24 / 50_000))
    known = np.var(np.asarray(estimate(fit).eta), axis=0, ddof=1)
    np.testing.assert_allclose(effects["shrinkage (%)"], 100 * (1 - known / omega**2), rtol=1e-9)


def test_the_text_is_aligned_and_says_how_it_ended():
    fit = theophylline()
    text = str(summary(fit))
    table = text.split("\n\n")[0].splitlines()
    column = table[0].index("estimate") + len("estimate")
    assert all(line[column - 1] != " " and line[column] == " " for line in table[2:])
    assert f"-2 log-likelihood {fit.minus_two_ll:.2f}" in text
    assert "12 subjects, 120 observations; 7 estimated parameters" in text
    assert f"converged ({fit.seconds})." in text and "NOT CONVERGED" not in text
    assert fit.seconds is not None and 0 < fit.seconds.compilation < fit.seconds.total


def test_what_went_wrong_is_said():
    fit = dataclasses.replace(
        theophylline(), information=None, converged=False, messages=("stopped by the user",),
        selection=np.linspace(0.0, 10.0, 30), selected=29,
    )  # fmt: skip
    result = summary(fit)
    assert np.isnan(result.frame["SE"]).all()
    assert "  -" in str(result)
    text = "\n".join(result.footer)
    assert "NOT CONVERGED" in text and "No standard errors" in text
    assert "stopped by the user" in text and "by -19." in text


def test_a_run_is_summarised_by_its_draws():
    mcmc = theophylline_nuts()
    result, samples = summary(mcmc), mcmc.get_samples()
    frame = result.frame
    assert list(frame.columns) == ["mean", "SD", "5 %", "95 %", "ESS", "R-hat", "unit"]
    np.testing.assert_allclose(frame.loc["volume", "mean"], samples["V"].mean(), rtol=1e-9)
    np.testing.assert_allclose(
        frame.loc["omega(CL)", "95 %"], np.quantile(samples["eta_omega"][:, 1], 0.95), rtol=1e-9
    )
    assert "2 chains of 100 draws" in str(result) and "divergent" in str(result)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="expected a Fit"):
        summary({"ka": 1.0})


def test_nothing_to_estimate_is_a_likelihood():
    """y ~ N(3, 1 + .25 I), all of it known."""
    study = normal_study(1.0, subjects=20, times=2)

    def model(study):
        law = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
        eta = fm.random_effect("eta", law, study.subjects, names=["level"])
        psi = fm.individual(study.subjects, level=3.0 + eta.level)
        fm.observe("y", fm.residual.constant(psi.level[:, None] + 0 * study.time, 0.5), study)

    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    covariance = np.ones((2, 2)) + 0.25 * np.eye(2)
    exact = multivariate_normal([3.0, 3.0], covariance).logpdf(study.values["y"]).sum()
    assert fit.converged and not fit.messages and not fit.params
    assert abs(fit.minus_two_ll + 2 * exact) < 4 * fit.minus_two_ll_se + 1e-3
    assert len(summary(fit).frame) == 0 and "0 estimated parameters" in str(summary(fit))
