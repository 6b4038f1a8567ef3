"""Residuals: what they are by formula; N(0, 1) under a model that is right, and not otherwise."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from cases import line_model, line_study
from fits import theophylline, theophylline_nuts
from scipy import stats
from scipy.special import ndtri_exp

import flowme as fm
from flowme.infer.conditional import find
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.npde import _decorrelated, _normal_score, _of_count
from flowme.residual import autocorrelated


def at(model, study, **values):
    """A fit that has ended at these values."""
    joint = Joint.of(model, study)
    theta, zero = joint.unconstrain(values), np.zeros(study.subjects.size)
    conditional = find(joint, theta, {}, study)
    return Fit(joint, study, theta, {}, conditional, zero, zero, np.eye(joint.size), zero, True)


def is_standard_normal(values):
    """Mean, variance and distribution, to four standard errors."""
    size = len(values)
    assert np.all(np.isfinite(values)) and abs(np.mean(values)) < 4 / np.sqrt(size)
    assert abs(np.var(values) - 1) < 4 * np.sqrt(2 / size)
    return stats.kstest(values, "norm").pvalue > 1e-3


def test_individual_residuals_of_normal_errors_are_standardised():
    fit = theophylline()
    table = fm.npde(fit, replicates=100)
    assert list(table["subject"].unique()) == list(fit.study.ids)
    assert len(table) == fit.study.observed["conc"].sum()
    expected = (table["value"] - table["ipred"]) / float(fit.params["a"])
    np.testing.assert_allclose(table["iwres"], expected, rtol=1e-8, atol=1e-10)


LINE = {"level": 2.0, "slope": -1.0, "a": 0.5}
OMEGA = np.array([[1.0, 0.3], [0.3, 0.4]])
SHAPE = {
    "eta_omega": np.sqrt(np.diag(OMEGA)),
    "eta_corr_cholesky": np.linalg.cholesky(OMEGA / np.sqrt(np.outer(*[np.diag(OMEGA)] * 2))),
}


@pytest.fixture(scope="module")
def line():
    study = line_study(subjects=150)
    return study, fm.npde(at(line_model(), study, **LINE, **SHAPE), replicates=4000)


def test_errors_of_prediction_are_those_of_the_exact_law(line):
    """Of a linear mixed model y_i is multivariate normal."""
    study, table = line
    for i in range(20):
        own = table[table["subject"] == study.ids[i]]
        t = own["time"].to_numpy()
        Z = np.stack([np.ones_like(t), t], 1)
        V = Z @ OMEGA @ Z.T + 0.25 * np.eye(len(t))
        error = own["value"] - 2.0 + t
        exact = {
            "npd": error / np.sqrt(np.diag(V)),
            "npde": np.linalg.solve(np.linalg.cholesky(V), error),
        }
        for name, z in exact.items():
            share = stats.norm.cdf(z)  # of 4000 simulations; V is known from these too
            sd = np.sqrt(share * (1 - share) / 4000) / stats.norm.pdf(z) + 0.02 * (1 + np.abs(z))
            assert np.all(np.abs(own[name] - z)[np.abs(z) < 2.5] < 4 * sd[np.abs(z) < 2.5])


def test_under_the_model_they_are_standard_normal_and_only_npde_independent(line):
    study, table = line
    assert is_standard_normal(table["npde"])
    first = table.groupby("subject").nth([0, 1])
    pairs = {n: first[n].to_numpy().reshape(-1, 2).T for n in ("npd", "npde")}
    assert abs(np.corrcoef(pairs["npde"])[0, 1]) < 4 / np.sqrt(study.subjects.size)
    assert np.corrcoef(pairs["npd"])[0, 1] > 0.4


def test_a_wrong_law_of_random_effects_shows_in_them(line):
    """Half the standard deviation between subjects, and the same residual error."""
    study, _ = line
    narrow = SHAPE | {"eta_omega": 0.5 * SHAPE["eta_omega"]}
    table = fm.npde(at(line_model(), study, **LINE, **narrow), replicates=1000)
    assert table["npde"].var() > 1.5


def test_censored_observations_lie_where_they_are_known_to():
    """Below 1, or in [0, 1], or above 3, of a third of the records."""
    frame = line_study(subjects=150, seed=1).to_frame()
    frame = frame[frame["y"].notna()]
    side = np.where(frame["y"] < 0.5, 1, np.where(frame["y"] > 3.0, -1, 0))
    frame["CENS"], frame["LIMIT"] = side, np.where((side > 0) & (frame["t"] > 4), -3.0, np.nan)
    frame = frame[~((side > 0) & (frame["t"] > 4) & (frame["y"] < -3.0))]
    frame["y"] = frame["y"].clip(0.5, 3.0)
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome="y")
    known = fm.npde(at(line_model(), study, **LINE, **SHAPE), replicates=1000)
    assert (known["censored"] != 0).mean() > 0.3
    bound = (known["value"] - known["ipred"]) / LINE["a"]
    below, above = known["censored"] == 1, known["censored"] == -1
    assert np.all(known["iwres"][below] < bound[below])
    assert np.all(known["iwres"][above] > bound[above])
    assert np.all(np.isfinite(known[["iwres", "npd", "npde"]]))
    limit = (-3.0 - known["ipred"]) / LINE["a"]
    assert np.all(known["iwres"][below & (known["time"] > 4)] > limit[below & (known["time"] > 4)])
    # What is below -3 late was left out; before, nothing was, and they are standard normal.
    assert is_standard_normal(known["npd"][known["time"] <= 1].iloc[::2])


COUNTS = {
    "Poisson": (dist.Poisson(2.5), stats.poisson(2.5)),
    "negative binomial": (dist.NegativeBinomial2(2.0, 3.0), stats.nbinom(3, 0.6)),
    "binomial": (dist.Binomial(12, probs=0.3), stats.binom(12, 0.3)),
    "beta-binomial": (dist.BetaBinomial(2.0, 3.0, 12), stats.betabinom(12, 2.0, 3.0)),
    "ordered": (
        dist.OrderedLogistic(0.3, jnp.array([-1.0, 0.5])),
        stats.rv_discrete(values=([0, 1, 2], np.diff([0, *1 / (1 + np.exp([1.3, -0.2])), 1]))),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_lie_between_the_shares_of_their_law(name):
    law, exact = COUNTS[name]
    values = np.arange(3)
    (low, _), (high, above) = _of_count(law, jnp.asarray(values), 12)
    # As exact as NumPyro's densities, of which the beta-binomial's is so to 1e-7.
    np.testing.assert_allclose(np.exp(low), exact.cdf(values - 1), rtol=1e-6)
    np.testing.assert_allclose(np.exp(high), exact.cdf(values), rtol=1e-6)
    np.testing.assert_allclose(np.exp(above), exact.sf(values), rtol=1e-6, atol=1e-12)
    drawn = exact.rvs(size=4000, random_state=0)
    at = [np.log(np.stack([exact.cdf(drawn - k), exact.sf(drawn - k)]) + 1e-300) for k in (1, 0)]
    assert is_standard_normal(_normal_score(np.random.default_rng(0), *at))


def test_a_count_that_is_an_outlier_has_a_residual():
    """y = 40 at a rate of 2, and 0 at a rate of 926: far beyond where 1 - P rounds to 0."""
    value = jnp.array([40, 0, 3])
    low, high = _of_count(dist.Poisson(jnp.array([2.0, 926.0, 2.0])), value, 40)
    found = _normal_score(np.random.default_rng(0), *map(np.asarray, (low, high)))
    exact = stats.poisson([2.0, 926.0, 2.0])
    low_end, high_end = (-ndtri_exp(exact.logsf(np.array(value) - k)) for k in (1, 0))
    assert low_end[0] < found[0] < high_end[0] and found[0] > 12
    assert abs(found[1] - ndtri_exp(-926.0)) < 1.5 and low_end[2] < found[2] < high_end[2]


@pytest.mark.parametrize("spread", [0.0, 60.0])
def test_constant_values_and_heavy_tails_spoil_nothing(spread):
    """Simulated values that are all 0 at the first time, or as large as e^60 there, beside two
    correlated normal ones: those have the residuals that they have alone."""
    rng = np.random.default_rng(0)
    eta = rng.normal(size=(2000, 40, 1))
    drawn = eta + 0.5 * rng.normal(size=(2000, 40, 3))
    drawn[..., 0] = np.exp(spread * drawn[..., 0]) * (spread > 0)
    seen, npd = np.ones((40, 3), bool), rng.normal(size=(40, 3))
    found = _decorrelated(np.random.default_rng(1), seen, npd, drawn)
    assert np.all(np.isfinite(found))
    correlation = 1 / 1.25 * np.ones((3, 3)) + 0.25 / 1.25 * np.eye(3)
    if spread == 0.0:
        correlation[0, 1:] = correlation[1:, 0] = 0.0
    exact = np.linalg.solve(np.linalg.cholesky(correlation), npd.T).T
    inside = np.abs(exact) < 2.0
    # Four Monte-Carlo errors of a share of 2000 at 2 standard deviations.
    assert np.max(np.abs(found - exact)[inside]) < 0.25


def test_more_records_than_replicates_can_tell_apart_are_refused():
    frame = pd.DataFrame({"id": 1, "t": np.arange(60.0), "y": 0.0})
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome="y")
    with pytest.raises(ValueError, match="expected at least 120 replicates; got 110"):
        fm.npde(at(line_model(), study, **LINE, **SHAPE), replicates=110)


def test_many_records_of_a_subject_do_not_seem_more_spread_than_they_are():
    """60 of 300 replicates: the covariance of these fits them better than what is new."""
    rng = np.random.default_rng(0)
    found = _decorrelated(
        rng, np.ones((50, 60), bool), rng.normal(size=(50, 60)), rng.normal(size=(300, 50, 60))
    )
    assert is_standard_normal(found.ravel())


def test_far_in_the_tails_nothing_is_rounded():
    z = np.array([-30.0, -9.0, 0.0, 9.0, 30.0])
    share = stats.norm.logcdf(z), stats.norm.logsf(z)
    found = _normal_score(np.random.default_rng(0), share, share)
    np.testing.assert_allclose(found, z, rtol=1e-9, atol=1e-12)


def test_of_autocorrelated_errors_the_new_part_counts():
    """Errors (1, .6, 0) at times 0, 1, 3: each less what is left of the one before."""
    frame = pd.DataFrame({"id": 1, "t": [0.0, 1.0, 3.0], "y": [1.0, 0.6, 0.0]})
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome="y")

    def model(study):
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["m"], omega=1e-6), study.subjects)
        f = eta.m[:, None] + 0.0 * study.time
        fm.observe("y", autocorrelated(fm.residual.constant(f, 1.0), 2.0, study, "y"), study)

    table = fm.npde(at(model, study), replicates=100)
    decay = np.exp([-0.5, -1.0])
    new = (np.array([0.6, 0.0]) - decay * [1.0, 0.6]) / np.sqrt(1 - decay**2)
    np.testing.assert_allclose(table["iwres"], [1.0, *new], atol=1e-5)


def test_the_figure_says_what_it_shows():
    figure = fm.plots.residuals(theophylline_nuts(), replicates=100)
    over_time, over_pred, ordered, individual = figure.axes
    assert over_time.get_xlabel() == "time (h)" and over_time.get_ylabel() == "NPDE"
    assert over_pred.get_xlabel() == "population prediction (mg/L)"
    assert individual.get_ylabel() == "IWRES" and "N(0, 1)" in ordered.get_xlabel()
    assert "conc: mean of NPDE" in figure.get_suptitle() and "p = " in figure.get_suptitle()
    plt.close(figure)
    with pytest.raises(ValueError, match="expected at least 100 replicates; got 10"):
        fm.npde(theophylline(), replicates=10)
