"""Counts, categories and times to an event, in one model: against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit

import flowme as fm
from flowme.censoring import Censored
from flowme.infer.joint import Joint

TIMES = np.arange(4.0)
CUTS = np.array([-0.5, 1.0])


def weibull(t, scale, shape):
    return (t / scale) ** shape


def everything(study):
    """One random effect drives outcomes of nine kinds."""
    rate = fm.population("rate", dist.LogNormal(0.0, 1.0))
    over = fm.population("over", dist.LogNormal(0.5, 1.0))
    gate = fm.population("gate", dist.Beta(1.0, 1.0))
    shape = fm.population("shape", dist.LogNormal(0.0, 0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
    x = eta.level[:, None] + 0.2 * study.time
    mean, p, scale = rate * jnp.exp(x), jax.nn.sigmoid(x), 5.0 * jnp.exp(-x)
    fm.observe("poisson", dist.Poisson(mean), study)
    fm.observe("negative", dist.NegativeBinomial2(mean, over), study)
    fm.observe("binomial", dist.Binomial(6, p), study)
    fm.observe("beta", dist.BetaBinomial(over * p, over * (1 - p), 6), study)
    fm.observe("inflated", dist.ZeroInflatedPoisson(gate, mean), study)
    fm.observe("binary", dist.Bernoulli(logits=x), study)
    fm.observe("ordered", dist.OrderedLogistic(x, CUTS), study)
    fm.observe("death", dist.Weibull(scale, shape), study)
    fm.observe("relapse", fm.outcomes.time_to_event(weibull, scale, shape), study)


def table_of(subjects, seed=0):
    """rate 1.5, over 2, gate .3, shape 1.4, ω .6; deaths until 12, relapses at visits every 3."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(subjects):
        x = 0.6 * rng.normal() + 0.2 * TIMES
        mean, p = 1.5 * np.exp(x), expit(x)
        share = rng.beta(2 * p, 2 * (1 - p))
        drawn = {
            "poisson": rng.poisson(mean),
            "negative": rng.poisson(mean * rng.gamma(2.0, 0.5, 4)),
            "binomial": rng.binomial(6, p),
            "beta": rng.binomial(6, share),
            "inflated": rng.poisson(mean) * (rng.uniform(size=4) > 0.3),
            "binary": rng.uniform(size=4) < p,
            "ordered": (x[:, None] + rng.logistic(size=(4, 1)) > CUTS).sum(1),
        }
        rows += [(i, t, n, v[j], 0, np.nan) for n, v in drawn.items() for j, t in enumerate(TIMES)]
        death, relapse = 5 * np.exp(-x[0]) * rng.weibull(1.4, 2)
        rows.append((i, 0.0, "death", min(death, 12.0), -int(death > 12), np.nan))
        end = 3 * np.ceil(relapse / 3)
        rows.append((i, 0.0, "relapse", end, 1, end - 3 if end > 3 else np.nan))
    table = pd.DataFrame(rows, columns=["ID", "TIME", "DVID", "DV", "CENS", "LIMIT"])
    return table.sort_values(["ID", "TIME"], kind="stable", ignore_index=True)


def conditional(row, x, rate, over, gate, shape):
    """log p(y | x) of a row by SciPy."""
    mean, p, y = rate * np.exp(x), expit(x), row.DV
    time = stats.weibull_min(shape, scale=5 * np.exp(-x))
    start = np.nan_to_num(row.LIMIT)
    edges = np.array([-np.inf, *CUTS, np.inf])
    with np.errstate(divide="ignore"):
        return {
            "poisson": lambda: stats.poisson(mean).logpmf(y),
            "negative": lambda: stats.nbinom(over, over / (over + mean)).logpmf(y),
            "binomial": lambda: stats.binom(6, p).logpmf(y),
            "beta": lambda: stats.betabinom(6, over * p, over * (1 - p)).logpmf(y),
            "inflated": lambda: np.log(gate * (y == 0) + (1 - gate) * stats.poisson(mean).pmf(y)),
            "binary": lambda: stats.bernoulli(p).logpmf(y),
            "ordered": lambda: np.log(
                expit(edges[int(y) + 1] - x) - expit(edges[int(y)] - x),
            ),
            "death": lambda: time.logsf(y) if row.CENS else time.logpdf(y),
            "relapse": lambda: np.log(time.sf(start) - time.sf(y)),
        }[row.DVID]()


VALUES = {"rate": 1.5, "over": 2.0, "gate": 0.3, "shape": 1.4, "eta_omega": np.array([0.6])}


def test_the_likelihood_of_every_outcome_is_scipys():
    """Σ log p(y_ij | η_i), each subject at another η; and its gradient, which is finite."""
    table = table_of(16)
    study = fm.Study.from_frame(table)
    joint = Joint.of(everything, study)
    eta = np.linspace(-2, 2, 16)[:, None]

    @jax.jit
    def terms(eta):
        def total(e):
            return jnp.sum(joint.terms(VALUES, {}, e, study)[0])

        return joint.terms(VALUES, {}, eta, study)[0], jax.grad(total)(eta)

    found, slope = terms(eta)
    expected, aside = np.zeros(16), np.zeros(16)
    known = [VALUES[n] for n in ("rate", "over", "gate", "shape")]
    for row in table.itertuples():
        x = eta[row.ID, 0] + 0.2 * row.TIME
        low, here, high = (conditional(row, x + h, *known) for h in (-1e-5, 0, 1e-5))
        expected[row.ID] += here
        aside[row.ID] += (high - low) / 2e-5
    assert {"death", "relapse"} == set(study.censored)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    np.testing.assert_allclose(slope[:, 0], aside, rtol=1e-5, atol=1e-5)


def some(study):
    """Counts, categories and two times to an event, of which many are 0 or censored."""
    rate = fm.population("rate", dist.LogNormal(0.0, 1.0))
    shape = fm.population("shape", dist.LogNormal(0.0, 0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
    x = eta.level[:, None] + 0.2 * study.time
    scale = 5.0 * jnp.exp(-x)
    fm.observe("poisson", dist.Poisson(rate * jnp.exp(x)), study)
    fm.observe("ordered", dist.OrderedLogistic(x, CUTS), study)
    fm.observe("death", dist.Weibull(scale, shape), study)
    fm.observe("relapse", fm.outcomes.time_to_event(weibull, scale, shape), study)


def test_counts_categories_and_events_are_fitted():
    """-2LL at the estimate is that of SciPy's densities integrated on a fine grid."""
    table = table_of(30)
    fit = fm.VariationalEM(some).run(jax.random.key(0), fm.Study.from_frame(table), progress=False)
    assert fit.converged and not fit.messages
    rate, shape, omega = (float(np.squeeze(fit.params[n])) for n in ("rate", "shape", "eta_omega"))
    eta = np.linspace(-8 * omega, 8 * omega, 1601)
    log_p = np.tile(stats.norm(0, omega).logpdf(eta), (30, 1))
    for row in table.itertuples():
        if row.DVID in ("poisson", "ordered", "death", "relapse"):
            log_p[row.ID] += conditional(row, eta + 0.2 * row.TIME, rate, 2.0, 0.3, shape)
    expected = -2 * np.sum(np.logaddexp.reduce(log_p, axis=1) + np.log(eta[1] - eta[0]))
    assert abs(fit.minus_two_ll - expected) < 1e-3


HAZARDS = {
    "weibull": (dist.Weibull(2.0, 1.5), weibull, (2.0, 1.5)),
    "exponential": (dist.Exponential(0.4), lambda t, k: k * t, (0.4,)),
    "gompertz": (dist.Gompertz(0.3, 0.5), lambda t, c, r: c * jnp.expm1(r * t), (0.3, 0.5)),
}


@pytest.mark.parametrize(("law", "hazard", "parameters"), HAZARDS.values(), ids=HAZARDS.keys())
def test_a_law_by_its_hazard_is_numpyros(law, hazard, parameters):
    own, t = fm.outcomes.time_to_event(hazard, *parameters), np.array([0.1, 1.0, 4.0])
    np.testing.assert_allclose(own.log_prob(t), law.log_prob(t), rtol=1e-12)
    np.testing.assert_allclose(own.cdf(t), law.cdf(t), rtol=1e-12)
    np.testing.assert_allclose(own.mean, law.mean, rtol=1e-3)
    for code, limit in ((1, np.nan), (-1, np.nan), (1, 0.05), (-1, 5.0)):
        same = [Censored(x, np.full(3, code), np.full(3, limit)).log_prob(t) for x in (own, law)]
        np.testing.assert_allclose(*same, rtol=1e-12)
    far = Censored(law, -1).log_prob(200.0)  # P(T > t) is 0 in floating point
    assert -np.inf < far < -50
    draws = own.sample(jax.random.key(0), (2000,))
    assert stats.kstest(draws, lambda t: np.asarray(law.cdf(t))).pvalue > 0.01
