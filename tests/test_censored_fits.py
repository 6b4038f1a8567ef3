"""Models of censored observations in every engine, against quadrature that shares nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from fits import rough_fit
from numpyro.diagnostics import effective_sample_size
from scipy import stats
from scipy.optimize import minimize
from scipy.special import log_ndtr, logsumexp, ndtr

import flowme as fm
from flowme import plots
from flowme.infer.conditional import Conditional
from flowme.infer.joint import Joint
from flowme.infer.marginal import estimate_marginal

LLOQ, ULOQ, TIMES = 0.5, 4.0, np.array([0.0, 1.0, 2.0, 4.0, 6.0, 8.0])


def washout(study):
    """y = exp(level + η - k t) with a combined error."""
    level = fm.population("level", dist.Normal(1.0, 1.0))
    k = fm.population("k", dist.LogNormal(-1.0, 0.5))
    a = fm.population("a", dist.HalfNormal(0.5))
    b = fm.population("b", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
    f = jnp.exp(level + eta.level[:, None] - k * study.time)
    fm.observe("y", fm.residual.combined1(f, a, b), study)


def washout_table(subjects, seed=0):
    """level 1, ω .5, k .3, a .1, b .15: about a third below .5 (half of these known to be above
    0), some above 4, the last of each subject, where above .5, known within ± .2 only."""
    rng = np.random.default_rng(seed)
    f = np.exp(1.0 + 0.5 * rng.normal(size=(subjects, 1)) - 0.3 * TIMES)
    y = f + (0.1 + 0.15 * f) * rng.normal(size=f.shape)
    table = pd.DataFrame(
        {"ID": np.repeat(np.arange(subjects), 6), "TIME": np.tile(TIMES, subjects), "DV": y.ravel()}
    )
    table["CENS"] = np.select([table.DV < LLOQ, table.DV > ULOQ, table.TIME == 8], [1, -1, 1])
    table["LIMIT"] = np.where((table.DV < LLOQ) & (table.ID % 2 == 0), 0.0, np.nan)
    coarse = (table.TIME == 8) & table.DV.between(LLOQ, ULOQ)
    table.loc[coarse, "LIMIT"] = table.DV - 0.2
    table["DV"] = np.where(coarse, table.DV + 0.2, table.DV.clip(LLOQ, ULOQ))
    return table


def exact(table, level, k, a, b, omega, nodes=101):
    """log p(y_i) by the trapezoidal rule over η, `[subject]`."""
    eta = omega * np.linspace(-8, 8, nodes)
    weight = stats.norm.logpdf(eta, 0, omega) + np.log(eta[1] - eta[0])
    return logsumexp(conditional(table, level + eta, k, a, b) + weight, axis=1)


def conditional(table, at, k, a, b):
    """log p(y_i | level + η = at), `[subject, node]`."""
    t, y = table.TIME.to_numpy()[:, None], table.DV.to_numpy()[:, None]
    side, limit = table.CENS.to_numpy()[:, None], table.LIMIT.to_numpy()[:, None]
    f = np.exp(at - k * t)
    sd = a + b * f
    z, start = (y - f) / sd, (np.where(np.isnan(limit), -np.inf, limit) - f) / sd
    with np.errstate(divide="ignore"):
        inside = np.log(ndtr(z) - ndtr(start))
    inside = np.where(np.isnan(limit), log_ndtr(z), inside)
    density = -0.5 * z**2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    terms = np.select([side == 0, side == 1], [density, inside], log_ndtr(-z))
    return np.add.reduceat(terms, np.flatnonzero(np.diff(table.ID, prepend=-1)))


@pytest.fixture(scope="module")
def table():
    return washout_table(120)


@pytest.fixture(scope="module")
def fit(table):
    study = fm.Study.from_frame(table, outcome={"y": "DV"})
    return fm.VariationalEM(washout).run(jax.random.key(0), study, progress=False)


def at(params):
    return [float(np.squeeze(params[n])) for n in ("level", "k", "a", "b", "eta_omega")]


def test_the_fit_is_at_the_maximum_of_the_exact_likelihood(fit, table):
    """A search from the estimate gains less than 1e-4; all kinds of censoring are in the study."""
    kinds = table.groupby(["CENS", table.LIMIT.notna()]).size()
    assert all(kinds[kind] > 5 for kind in [(-1, False), (0, False), (1, False), (1, True)])

    def minus_exact(x):
        return -np.sum(exact(table, x[0], *np.exp(x[1:])))

    here = at(fit.params)
    start = np.array([here[0], *np.log(here[1:])])
    assert fit.converged
    np.testing.assert_allclose(fit.minus_two_ll, 2 * minus_exact(start), atol=1e-4)
    assert minus_exact(start) - minimize(minus_exact, start, method="BFGS").fun < 1e-4


def test_m3_is_not_biased_where_dropping_censored_rows_is(fit, table):
    """`benchmarks/censoring.py` in short: one study, its standard error for Monte-Carlo errors."""
    left = table[table.CENS == 0]

    def minus_exact(x):
        return -np.sum(exact(left, x[0], *np.exp(x[1:])))

    here = at(fit.params)
    dropped = np.exp(minimize(minus_exact, [here[0], *np.log(here[1:])], method="BFGS").x[1])
    error = float(fit.standard_errors()["k"])
    assert abs(here[1] - 0.3) < 3 * error
    assert dropped - 0.3 < -4 * error


def test_nuts_has_the_gradient_it_climbs(fit):
    """d log p(y | η) / dη by reverse mode, at η far beyond the population too, against central
    differences."""
    joint, values = fit.joint, fit.joint.constrain(fit.theta)
    eta = np.linspace(-5, 3, fit.study.subjects.size)[:, None]

    @jax.jit
    def likelihood(eta):
        total = jax.grad(lambda e: jnp.sum(joint.terms(values, {}, e, fit.study)[0]))
        return joint.terms(values, {}, eta, fit.study)[0], total(eta)

    (value, slope), h = likelihood(eta), 1e-5
    rise = (likelihood(eta + h)[0] - likelihood(eta - h)[0]) / (2 * h)
    assert np.all(np.isfinite(value))
    np.testing.assert_allclose(slope[:, 0], rise, rtol=1e-6, atol=1e-6)


def test_vpc_censors_what_is_simulated_like_what_was_measured(fit):
    """Percentiles of both lie between the limits, and bands touch them where most is censored."""
    figure = plots.vpc(fit, replicates=20)
    ax = figure.axes[0]
    dotted = [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"]
    lower, upper = max(LLOQ, fit.study.values["y"][fit.study.censored["y"] == 1].max()), ULOQ
    assert dotted == [lower, upper]
    bands = [part.get_paths()[0].vertices[:, 1] for part in ax.collections]
    shown = np.concatenate(bands + [line.get_ydata() for line in ax.get_lines()[1:4]])
    assert lower == shown.min() and shown.max() <= upper


def test_individual_fits_show_censored_values_apart(fit):
    panel = plots.individual_fits(fit, subjects=4).axes[2]
    seen, side = fit.study.values["y"][2], fit.study.censored["y"][2]
    markers = {line.get_marker(): line.get_ydata() for line in panel.get_lines()[2:]}
    for code, marker in ((0, "o"), (1, "v"), (-1, "^")):
        np.testing.assert_array_equal(markers.get(marker, []), seen[side == code])
    assert "v" in markers


def test_predictions_and_simulations_are_of_what_is_there(fit):
    """Censoring does not enter them: about as much is simulated below the limit as was seen."""
    draws = fm.simulate(jax.random.key(3), fit, replicates=20)["y"]
    assert np.min(draws) < LLOQ < np.max(fm.predict(fit)["y"])
    seen = fit.study.values["y"] == LLOQ
    assert abs(np.mean(draws < LLOQ) - seen.mean()) < 0.07


# Other laws than the Gaussian, 20 subjects -------------------------------------------------------

KNOWN = {"k": 0.3, "a": 0.1, "b": 0.15}
NODES = np.linspace(-4.0, 6.0, 601)  # of level + η


def washout_of(effect):
    """`washout` with only the level and the law to be found."""

    def model(study):
        level = fm.population("level", dist.Normal(1.0, 1.0))
        k, a, b = (fm.population(n, dist.LogNormal(0, 1), fixed=x) for n, x in KNOWN.items())
        eta = fm.random_effect("eta", effect, study.subjects)
        f = jnp.exp(level + eta.level[:, None] - k * study.time)
        fm.observe("y", fm.residual.combined1(f, a, b), study)

    return model


@pytest.fixture(scope="module")
def few():
    table = washout_table(20, seed=4)
    return table, fm.Study.from_frame(table, outcome={"y": "DV"})


def by_quadrature(table, law, level):
    """log p(y_i, level + η) of a law of η, `[subject, node]`; its logsumexp is log p(y_i)."""
    weight = law.log_prob(jnp.asarray(NODES - level)[:, None]) + np.log(NODES[1] - NODES[0])
    return conditional(table, NODES, **KNOWN) + np.asarray(weight)


def test_marginal_likelihood_with_a_mixture(few):
    table, study = few
    law = fm.MixtureRandomEffect(["level"])
    joint = Joint.of(washout_of(law), study)
    start = {"eta_probs": [0.3, 0.7], "eta_locs": [[-0.5]], "eta_omega": [[0.2], [0.4]]}
    fit = rough_fit(joint, study, near=start)
    values = joint.constrain(fit.theta)
    parts = {k.removeprefix("eta_"): v for k, v in values.items() if "eta_" in k}
    terms = by_quadrature(table, law.with_parameters(**parts), float(values["level"]))
    found = estimate_marginal(jax.random.key(0), joint, fit.theta, {}, study)
    error = np.abs(found.log_likelihood - logsumexp(terms, axis=1))
    assert np.all(error < 4.5 * found.standard_error + 1e-4)
    assert np.max(found.standard_error) < 0.05


def test_nuts_with_a_flow(few):
    """Level, ω and η against quadrature over all of them, in Monte-Carlo errors."""
    table, study = few
    law = fm.FlowRandomEffect(["level"])
    model = washout_of(law)
    fit = rough_fit(Joint.of(model, study), study, near={"eta_omega": [0.5]})
    terms = by_quadrature(table, fm.GaussianRandomEffect(["level"], omega=0.5), level=1.0)
    share = np.exp(terms - logsumexp(terms, axis=1, keepdims=True))
    mean = share @ (NODES - 1.0)
    sd = np.sqrt(share @ (NODES - 1.0) ** 2 - mean**2)
    near = Conditional(jnp.asarray(mean[:, None]), jnp.asarray(sd[:, None, None]))
    fit = replace(fit, conditional=near)
    mcmc = fm.nuts(model, study, jax.random.key(1), fit=fit, num_warmup=300, num_samples=700,
                   num_chains=2, progress=False)  # fmt: skip
    levels, omegas = np.linspace(0.0, 2.0, 41), np.linspace(0.15, 1.4, 36)
    log_p, eta = np.zeros((41, 36)), np.zeros((41, 36, study.subjects.size))
    weights = fit.weights["eta_weights"]
    inside = jax.jit(lambda w, x: law.with_parameters(omega=w[None], weights=weights).log_prob(x))
    given = conditional(table, NODES, **KNOWN)
    for i, level in enumerate(levels):
        for j, omega in enumerate(omegas):
            terms = given + np.asarray(inside(omega, (NODES - level)[:, None]))
            each = logsumexp(terms, axis=1)
            eta[i, j] = np.exp(terms - each[:, None]) @ NODES - level
            log_p[i, j] = each.sum() + stats.norm.logpdf(level, 1) + stats.norm.logpdf(omega)
    share = np.exp(log_p - logsumexp(log_p))
    exact = [share.sum(1) @ levels, share.sum(0) @ omegas, *np.einsum("ij,ijk->k", share, eta)]
    draws = mcmc.get_samples(group_by_chain=True)
    names = ("level", "eta_omega", "eta")
    found = np.concatenate([np.asarray(draws[n]).reshape(2, 700, -1) for n in names], -1)
    error = found.std((0, 1)) / np.sqrt(effective_sample_size(found))
    assert np.max(np.abs(found.mean((0, 1)) - exact) / error) < 4.5
    assert share[0].sum() + share[-1].sum() + share[:, 0].sum() + share[:, -1].sum() < 1e-4
