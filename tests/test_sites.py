"""Groupings that cross subjects: every record belongs to a subject and to a site."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.diagnostics import effective_sample_size
from scipy.stats import multivariate_normal

import flowme as fm
from flowme.infer.joint import Joint

SITES, SUBJECTS, TIMES, OMEGA, A = 5, 12, 6, 0.7, 0.5


def visits() -> fm.Study:
    """Each visit of a subject is at a site of its own: y = 2 + site + η + a ε."""
    rng = np.random.default_rng(3)
    site = rng.integers(0, SITES, (SUBJECTS, TIMES))
    eta = OMEGA * rng.normal(size=(SUBJECTS, 1))
    y = 2.0 + 0.9 * rng.normal(size=SITES)[site] + eta + A * rng.normal(size=site.shape)
    frame = pd.DataFrame(
        {"id": np.repeat(np.arange(SUBJECTS), TIMES), "t": np.tile(np.arange(6.0), SUBJECTS),
         "y": y.ravel(), "site": site.ravel()}
    )  # fmt: skip
    return fm.Study.from_frame(frame, "id", "t", "y", time_varying="site", categorical="site")


def crossed(prior):
    """`prior()` says what is known of the effect of a site."""

    def model(study):
        mu = fm.population("mu", dist.Normal(0.0, 5.0))
        law = prior()
        with numpyro.plate("site", SITES):
            site = numpyro.sample("effect", law)
        law = dist.Normal(0.0, OMEGA).expand([1]).to_event(1)
        eta = fm.random_effect("eta", law, study.subjects, names=["level"])
        f = mu + site[study.covariates["site"]] + eta.level[:, None]
        fm.observe("y", fm.residual.constant(f, A), study)

    return model


by_sd = crossed(lambda: dist.Normal(0.0, fm.population("sd", dist.HalfNormal(1.0))))
by_number = crossed(lambda: dist.Normal(0.0, 2.0))


def exact(study):
    """Mean and SD of the posterior of sd, μ, sites and η: Gaussian given sd, of which a grid."""
    y, site = study.values["y"].ravel(), study.covariates["site"].ravel()
    one, which = np.ones((y.size, 1)), np.eye(SITES)[site]
    X = np.hstack([one, which, np.repeat(np.eye(SUBJECTS), TIMES, axis=0)])
    grid, log_p, means, squares = np.linspace(0.02, 4.0, 300), [], [], []
    for sd in grid:
        prior = np.diag(np.r_[25.0, np.full(SITES, sd**2), np.full(SUBJECTS, OMEGA**2)])
        V = X @ prior @ X.T + A**2 * np.eye(y.size)
        gain = prior @ X.T @ np.linalg.inv(V)
        log_p.append(multivariate_normal(np.zeros(y.size), V).logpdf(y) - sd**2 / 2)
        means.append(np.r_[sd, gain @ y])
        squares.append(means[-1] ** 2 + np.r_[0.0, np.diag(prior - gain @ X @ prior)])
    share = np.exp(log_p - np.max(log_p))
    share /= share.sum()
    mean = share @ means
    return mean, np.sqrt(share @ squares - mean**2)


def test_nuts_draws_from_the_exact_posterior():
    study = visits()
    mcmc = fm.nuts(by_sd, study, jax.random.key(1), num_warmup=300, num_samples=700, num_chains=2,
                   progress=False)  # fmt: skip
    draws = mcmc.get_samples(group_by_chain=True)
    names = ("sd", "mu", "effect", "eta")
    found = np.concatenate([np.asarray(draws[n]).reshape(2, 700, -1) for n in names], -1)
    size, (mean, sd) = effective_sample_size(found), exact(study)
    assert np.min(size) > 300
    assert np.max(np.abs(found.mean((0, 1)) - mean) / (sd / np.sqrt(size))) < 4.5
    np.testing.assert_allclose(found.std((0, 1)), sd, rtol=0.2)


def test_variational_em_refuses_effects_of_groups_and_says_what_to_do():
    study = visits()
    with pytest.raises(ValueError, match=r"'effect', which depends on 'sd'.*fm\.nuts\(model"):
        fm.VariationalEM(by_sd).run(jax.random.key(0), study, progress=False)
    assert Joint.of(by_sd, study).roles.groups == {"effect": ("sd",)}
    assert Joint.of(by_number, study).roles.groups == {}  # fixed effects, as asked for
