"""The likelihood of censored observations: probabilities of intervals, with their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats
from scipy.special import erfcx, log_ndtr

from flowme import residual
from flowme.censoring import Censored
from flowme.normal_tail import log_normal_cdf

nan = np.nan
F = np.array([0.5, 2.0, 10.0, 3.0])
LAWS = {
    "constant": (residual.constant(F, 0.3), stats.norm(F, 0.3)),
    "proportional": (residual.proportional(F, 0.2), stats.norm(F, 0.2 * F)),
    "combined1": (residual.combined1(F, 0.3, 0.2), stats.norm(F, 0.3 + 0.2 * F)),
    "combined2": (residual.combined2(F, 0.3, 0.2), stats.norm(F, np.hypot(0.3, 0.2 * F))),
    "exponential": (residual.exponential(F, 0.3), stats.lognorm(0.3, scale=F)),
    "laplace": (dist.Laplace(F, 0.3), stats.laplace(F, 0.3)),
    "weibull": (dist.Weibull(F, 1.5), stats.weibull_min(1.5, scale=F)),
    "mirrored": (
        dist.TransformedDistribution(dist.Normal(-F, 0.3), dist.transforms.AffineTransform(0, -1)),
        stats.norm(F, 0.3),
    ),
}


@pytest.mark.parametrize(("law", "exact"), LAWS.values(), ids=LAWS.keys())
def test_every_kind_of_censoring_is_the_probability_of_its_interval(law, exact):
    value = np.array([0.7, 1.5, 11.0, 2.5])
    limit = np.array([0.4, 2.2, 9.0, 3.5])
    below, above, no = np.array([1, 1, 1, 1]), -np.array([1, 1, 1, 1]), np.full(4, nan)
    low, high = np.minimum(value, limit), np.maximum(value, limit)
    between = np.log(exact.cdf(high) - exact.cdf(low))
    for side, end, expected in (
        (0 * below, no, exact.logpdf(value)),
        (below, no, exact.logcdf(value)),
        (above, no, exact.logsf(value)),
        (np.where(limit < value, 1, -1), limit, between),
    ):
        found = Censored(law, side, end).log_prob(value)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_limit_at_the_bound_of_the_support_is_none():
    law = residual.exponential(F, 0.3)
    found = Censored(law, np.ones(4, int), np.zeros(4)).log_prob(F)
    np.testing.assert_allclose(found, np.log(0.5) * np.ones(4), rtol=1e-12)


def test_an_interval_from_the_bound_of_a_truncated_law_has_derivatives():
    """Beal's M4: P(0 < y < LLOQ | y > 0), and its two derivatives by the prediction."""

    def m4(f):
        law = dist.TruncatedNormal(f, 0.3, low=0.0)
        return Censored(law, np.ones(len(f), int), np.zeros(len(f))).log_prob(0.7 + 0 * f)

    def exact(f):
        return np.log(stats.truncnorm(-f / 0.3, np.inf, f, 0.3).cdf(0.7))

    f, h = np.array([0.1, 0.5, 0.8, 1.2]), 1e-4
    np.testing.assert_allclose(m4(f), exact(f), rtol=1e-12)
    slope = jax.vmap(jax.grad(lambda x: m4(x[None])[0]))(f)
    curvature = jax.vmap(jax.hessian(lambda x: m4(x[None])[0]))(f)
    np.testing.assert_allclose(slope, (exact(f + h) - exact(f - h)) / (2 * h), rtol=1e-6)
    second = (exact(f + h) - 2 * exact(f) + exact(f - h)) / h**2
    np.testing.assert_allclose(curvature, second, rtol=1e-5)


@jax.jit
def derivatives(z):
    one = jax.grad(log_normal_cdf)
    return log_normal_cdf(z), one(z), jax.grad(one)(z), jax.grad(jax.grad(one))(z)


@pytest.mark.parametrize("z", [-1e6, -1e4, -300.0, -30.0, -6.01, -5.99, -1.0, 0.0, 2.0, 8.0, 50.0])
def test_log_normal_cdf_has_right_derivatives_far_out(z):
    """(log Φ)' = h, (log Φ)'' = -h (z + h), and far out h = x + 1/x - 2/x³, x = -z."""
    value, slope, bend, third = derivatives(z)
    h = np.sqrt(2 / np.pi) / erfcx(-z / np.sqrt(2))
    np.testing.assert_allclose(value, log_ndtr(z), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, h, rtol=1e-11, atol=1e-13)
    expected = -h * (z + h) if z > -100 else -1 + 1 / z**2
    np.testing.assert_allclose(bend, expected, rtol=1e-9, atol=1e-13)
    assert np.isfinite(third) and -1 <= bend <= 0


@partial(jax.jit, static_argnums=0)
def expanded(law, f, side, limit):
    """Gradient and curvature of Σ log p in the predictions, and gradient in the error."""

    def total(f, b):
        return jnp.sum(Censored(law(f, b), side, limit).log_prob(jnp.full(f.shape, 2.0)))

    slope, by_error = jax.grad(total, (0, 1))(f, 0.3)
    return slope, by_error, jax.jvp(lambda x: jax.grad(total)(x, 0.3), (f,), (jnp.ones_like(f),))[1]


@pytest.mark.parametrize("law", [residual.constant, residual.proportional])
@pytest.mark.parametrize(("side", "limit"), [(1, nan), (-1, nan), (1, 1.5), (-1, 2.5)])
def test_derivatives_are_finite_wherever_the_prediction_is(law, side, limit):
    """Far on either side; and at 0 under a proportional error where that has a probability."""
    f = np.array([0.0, 1e-300, 1e-8, 1.0, 1e3, 1e8])
    if law is residual.proportional and not (side == 1 and np.isnan(limit)):
        f[:3] = 1.5  # an error of 0 does not reach the interval
    found = expanded(law, f, np.full(6, side), np.full(6, limit))
    assert all(np.all(np.isfinite(x)) for x in found)


def test_a_measured_neighbour_of_a_prediction_of_0_keeps_its_gradient():
    f, side, no = np.array([0.0] * 5 + [1.5]), np.array([1] * 5 + [0]), np.full(6, nan)
    slope, by_error, _ = expanded(residual.proportional, f, side, no)
    z, sd = (2.0 - 1.5) / 0.45, 0.45
    np.testing.assert_allclose(slope, [0] * 5 + [(z + 0.3 * (z**2 - 1)) / sd], rtol=1e-12)
    np.testing.assert_allclose(by_error, (z**2 - 1) / 0.3, rtol=1e-12)


@pytest.mark.parametrize("f", [3.0, 50.0, 1e3, 1e5])
def test_tails_keep_their_curvature_in_single_precision(f):
    bend = derivatives(jnp.float32(-f))[2]
    assert bend.dtype == jnp.float32 and -1.01 < bend < -0.9


@pytest.mark.parametrize("law", [dist.Poisson(F), dist.StudentT(4.0, F, 0.3), dist.Gamma(F, 1.0)])
def test_laws_without_a_cdf_to_differentiate_are_refused(law):
    with pytest.raises(TypeError, match="expected a continuous law with a cdf.*; got"):
        Censored(law, np.zeros(4, int))
