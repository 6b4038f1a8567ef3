"""Laws of the nonparametric estimates, on a normal location problem whose likelihood is known."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

import flowme as fm
from flowme.infer.conditional import Conditional
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.marginal import marginal_log_likelihood
from flowme.infer.mixing import mixing_weights
from flowme.infer.npmle import npmle
from flowme.infer.smoothed import smoothed_npmle
from flowme.kernel_mixture import KernelMixtureRandomEffect

ERROR, REPEATS = 0.6, 2


def location(study):
    """y_ij = η_i + a ε."""
    a = fm.population("a", dist.HalfNormal(1.0))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
    level = jnp.broadcast_to(eta.level[:, None], study.time.shape)
    fm.observe("y", fm.residual.constant(level, a), study)


def study_of(y) -> fm.Study:
    size = len(y)
    frame = pd.DataFrame(
        {
            "id": np.repeat(np.arange(size), REPEATS),
            "t": np.tile(np.arange(REPEATS, dtype=float), size),
            "y": np.ravel(y),
        }
    )
    return fm.Study.from_frame(frame, subject="id", time="t", outcome="y")


def draw(seed, size=60):
    """Two clusters, at -2 and 2."""
    rng = np.random.default_rng(seed)
    centre = np.where(rng.random(size) < 0.4, -2.0, 2.0) + 0.3 * rng.normal(size=size)
    return study_of(centre[:, None] + ERROR * rng.normal(size=(size, REPEATS)))


def log_p(study, eta):
    """log p(y_i | η_k) by scipy, `[subject, point]`."""
    y = np.asarray(study.values["y"])
    return norm.logpdf(y[:, :, None], np.asarray(eta)[None, None], ERROR).sum(1)


def gaussian_fit(study, omega=2.0) -> Fit:
    """The Gaussian fit, by formula."""
    joint = Joint.of(location, study)
    theta = joint.unconstrain({"a": ERROR, "eta_omega": np.array([omega])})
    y = np.asarray(study.values["y"]).mean(1)
    share = omega**2 / (omega**2 + ERROR**2 / REPEATS)
    tril = np.full((len(y), 1, 1), np.sqrt(share * ERROR**2 / REPEATS))
    none = np.zeros(len(y))
    return Fit(
        joint, study, theta, {}, Conditional(jnp.asarray(share * y[:, None]), jnp.asarray(tril)),
        none, none, None, none, True,
    )  # fmt: skip


@cache
def estimated():
    return npmle(gaussian_fit(draw(0)), candidates=200, ascents=32, tolerance=1e-4)


@cache
def smooth():
    """The smoothed law, and its likelihood on 300 new subjects by importance sampling."""
    found = smoothed_npmle(jax.random.key(0), gaussian_fit(draw(0)), bandwidths=(0.02, 0.15, 1.5))
    return found, marginal_log_likelihood(jax.random.key(0), found.fit, draw(8, 300))


def test_certificate_on_a_dense_grid():
    """D ≤ 0 everywhere, D = 0 on the support: the law is the maximum, and `gap` says so."""
    law, grid = estimated(), np.linspace(-6, 6, 20_001)
    f = np.exp(log_p(draw(0), law.support[:, 0])) @ law.weights
    slope = (np.exp(log_p(draw(0), grid)) / f[:, None]).sum(0) - len(f)
    assert law.converged and law.gap < 1e-4 and not law.messages
    assert slope.max() < 2e-4
    on_support = (np.exp(log_p(draw(0), law.support[:, 0])) / f[:, None]).sum(0) - len(f)
    np.testing.assert_allclose(on_support, 0, atol=1e-3)
    np.testing.assert_allclose(law.log_likelihood_at_fit, np.log(f), atol=1e-8)


def test_it_is_a_law_on_few_points():
    law = estimated()
    assert np.all(law.weights > 0)
    np.testing.assert_allclose(law.weights.sum(), 1, atol=1e-12)
    assert law.support.shape == (len(law.weights), 1) and len(law.weights) < 60
    draws = law.sample(jax.random.key(0), 20_000)
    np.testing.assert_allclose(draws.mean(0), law.mean, atol=0.06)
    np.testing.assert_allclose(np.cov(draws.T), law.covariance_matrix[0, 0], rtol=0.03)


def test_no_other_law_is_better():
    """Discrete laws of many kinds, among them the true clusters and that of the data."""
    law, study = estimated(), draw(0)
    rng = np.random.default_rng(1)
    best = law.log_likelihood_at_fit.sum()
    normal = norm.pdf(np.linspace(-4, 4, 300), 0, 2)
    others = [
        (np.array([-2.0, 2.0]), np.array([0.4, 0.6])),
        (np.asarray(study.values["y"]).mean(1), np.full(60, 1 / 60)),
        (np.linspace(-4, 4, 300), normal / normal.sum()),
    ]
    others += [(law.support[:, 0] + 0.05 * rng.normal(size=len(law.weights)), law.weights)]
    others += [(rng.normal(0, 2, 50), rng.dirichlet(np.ones(50))) for _ in range(20)]
    for eta, weights in others:
        assert logsumexp(log_p(study, eta) + np.log(weights), axis=1).sum() < best + law.gap


def test_without_error_it_is_the_empirical_law_of_two_atoms():
    """Subjects at two places far apart, nothing between: two points there, their shares."""
    y = np.repeat([-8.0, 8.0], [15, 25])[:, None] + np.zeros((40, REPEATS))
    law = npmle(gaussian_fit(study_of(y), omega=8.0), candidates=100, tolerance=1e-6)
    order = np.argsort(law.support[:, 0])
    np.testing.assert_allclose(law.support[order, 0], [-8, 8], atol=1e-4)
    np.testing.assert_allclose(law.weights[order], [15 / 40, 25 / 40], atol=1e-8)


def test_new_subjects():
    law, new = estimated(), draw(7, 25)
    exact = logsumexp(log_p(new, law.support[:, 0]) + np.log(law.weights), axis=1)
    np.testing.assert_allclose(law.log_likelihood(new), exact, atol=1e-8)


def test_another_study_than_that_of_the_fit():
    law = npmle(gaussian_fit(draw(7)), draw(0), candidates=200, tolerance=1e-3)
    difference = law.minus_two_ll - estimated().minus_two_ll
    assert abs(difference) < 2 * (law.gap + estimated().gap)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_mixing_weights_satisfy_the_conditions_of_a_maximum(shape):
    rng = np.random.default_rng(0)
    p = rng.normal(0, 3, shape)
    weights, log_f = mixing_weights(p)
    slope = np.exp(p - log_f[:, None]).sum(0) - shape[0]
    assert np.all(weights >= 0) and slope.max() < 1e-5 * shape[0]
    np.testing.assert_allclose(slope[weights > 0], 0, atol=1e-5 * shape[0])
    np.testing.assert_allclose(log_f, logsumexp(p, b=weights, axis=1), atol=1e-10)


def test_smoothed_law_has_the_likelihood_it_is_said_to_have():
    """Gaussian kernels and errors: f_i = Σ_k w_k N(ȳ_i; m_k, h² ω² + a²/n) Π ..., exactly."""
    (found, marginal), new = smooth(), draw(8, 300)
    law = found.law
    assert isinstance(law, KernelMixtureRandomEffect)
    np.testing.assert_allclose(law.scale_tril, found.bandwidth * 2.0)
    y = np.asarray(new.values["y"])
    wide = np.hypot(law.scale_tril[0, 0], ERROR / np.sqrt(REPEATS))
    mean = norm.logpdf(y.mean(1)[:, None], law.locs[:, 0], wide)
    spread = norm.logpdf(y, y.mean(1)[:, None], ERROR).sum(1) - norm.logpdf(
        0, 0, ERROR / np.sqrt(REPEATS)
    )
    exact = logsumexp(mean + np.log(law.probs), axis=1) + spread
    np.testing.assert_allclose(marginal.log_likelihood, exact, atol=0.15)
    assert abs(marginal.total - exact.sum()) < 5 * marginal.total_se + 1e-3


def test_smoothing_helps_new_subjects():
    """Far too wide a bandwidth is not chosen (the two narrow ones are alike here), and the law is
    better on new subjects than the discrete one and than the Gaussian."""
    (found, marginal), new = smooth(), draw(8, 300)
    total = found.held_out.sum(1)
    assert found.bandwidth == (0.02, 0.15, 1.5)[np.argmax(total)] < 1.5
    assert total[1] > total[2] + 20
    assert found.held_out.shape == (3, 60) and np.all(np.isfinite(found.held_out))
    cov = 4.0 * np.ones((REPEATS, REPEATS)) + ERROR**2 * np.eye(REPEATS)
    y = np.asarray(new.values["y"])
    gaussian = dist.MultivariateNormal(np.zeros(REPEATS), cov).log_prob(y).sum()
    assert marginal.total > estimated().log_likelihood(new).sum() + 2
    assert marginal.total > gaussian + 50


def test_kernel_mixture_against_scipy():
    rng = np.random.default_rng(0)
    locs, probs = rng.normal(size=(5, 2)) + 100, rng.dirichlet(np.ones(5))
    tril = np.array([[0.5, 0.0], [0.2, 0.3]])
    law = KernelMixtureRandomEffect(["ka", "V"], locs, probs, tril)
    draws = np.asarray(law.sample(jax.random.key(0), (20_000,)))
    np.testing.assert_allclose(draws.mean(0), law.mean, atol=0.05)
    np.testing.assert_allclose(np.cov(draws.T), law.covariance_matrix, atol=0.05)
    each = [dist.MultivariateNormal(m, scale_tril=tril).log_prob(draws[:20]) for m in locs]
    np.testing.assert_allclose(
        law.log_prob(draws[:20]), logsumexp(np.stack(each, -1) + np.log(probs), axis=-1), atol=1e-8
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda fit: npmle(fit, tolerance=0.0), "expected a positive tolerance"),
        (lambda fit: smoothed_npmle(jax.random.key(0), fit, bandwidths=()), "positive bandwidths"),
        (lambda fit: smoothed_npmle(jax.random.key(0), fit, folds=1), "expected 2 to 60 folds"),
        (lambda fit: KernelMixtureRandomEffect(["a"], [[0.0]], [0.5], [[1.0]]), "with sum 1"),
        (lambda fit: KernelMixtureRandomEffect(["a"], [0.0], [1.0], [[1.0]]), "got shapes"),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises(ValueError, match=words):
        bad(gaussian_fit(draw(0)))


def test_an_impossible_subject_is_named():
    study = draw(0)
    values = np.array(study.values["y"])
    values[3] = 1e200
    with pytest.raises(ValueError, match="for subject 3"):
        npmle(gaussian_fit(draw(0)), study.with_values(y=values), candidates=20)
