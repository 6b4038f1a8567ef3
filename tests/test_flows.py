"""Laws of flows: invertible, right log-determinants, identity at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLOWS, bent_weights
from scipy.stats import norm

from flowme import flows

cases = pytest.mark.parametrize(("flow", "dim"), FLOWS.values(), ids=FLOWS.keys())


@cases
def test_inverse_undoes_forward(flow, dim):

    @jax.jit
    def there_and_back(weights, z):
        u, log_det = flow.bijector(weights, dim).forward_and_log_det(z)
        return u, log_det, *flow.bijector(weights, dim).inverse_and_log_det(u)

    z = 2 * jax.random.normal(jax.random.key(0), (200, dim))  # some beyond the splines' range
    u, log_det, back, log_det_back = there_and_back(bent_weights(flow, dim), z)
    assert np.all(np.max(np.abs(u - z), axis=0) > 0.05)  # every coordinate is moved
    np.testing.assert_allclose(back, z, atol=1e-9)
    np.testing.assert_allclose(log_det, -log_det_back, atol=1e-9)


@cases
def test_log_det_is_that_of_the_jacobian(flow, dim):
    weights = bent_weights(flow, dim)

    def forward(z):
        return flow.bijector(weights, dim).forward_and_log_det(z)

    z = jax.random.normal(jax.random.key(0), (20, dim))
    jacobian, log_det = jax.jit(jax.vmap(jax.jacfwd(lambda z: forward(z), has_aux=True)))(z)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobian)[1], atol=1e-9)


@cases
def test_starts_at_the_identity(flow, dim):
    z = 3 * jax.random.normal(jax.random.key(0), (50, dim))
    start = jax.jit(lambda key: flow.bijector(flow.init(key, dim), dim).forward(z))
    for seed in range(3):
        np.testing.assert_allclose(start(jax.random.key(seed)), z, atol=1e-12)


@cases
def test_size_counts_the_weights(flow, dim):
    assert flow.init(jax.random.key(0), dim).shape == (flow.size(dim),)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: flows.SplineCoupling(layers=0), "expected layers to be a positive integer; got 0"),
        (lambda: flows.SplineCoupling(bins=2.5), "expected bins to be a positive integer"),
        (lambda: flows.SplineCoupling(layers=1), "expected at least 2 layers"),
        (lambda: flows.SplineCoupling().init(jax.random.key(0), 1), "at least 2 dimensions"),
        (lambda: flows.MonotoneSpline().bijector(jnp.zeros(3), 1), "expected 13 weights"),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises(ValueError, match=words):
        bad()


def test_marginals_are_the_mixture_that_the_draws_come_from():
    """Two modes are found, a Gaussian coordinate is left at the identity, and the density is that
    of the standardised mixture."""
    rng = np.random.default_rng(0)
    two = np.where(rng.random(4000) < 0.4, -1.0 + 0.2 * rng.normal(size=4000), 1.0)
    two = two + 0.3 * rng.normal(size=4000)
    z = np.stack([(two - two.mean()) / two.std(), rng.normal(size=4000)], 1)
    flow = flows.MarginalMixture(components=2)
    weights = flow.start(jax.random.key(0), z, 500)
    share, loc, log_scale = np.asarray(weights).reshape(2, 3, 2)[0]
    np.testing.assert_array_equal(weights.reshape(2, 3, 2)[1], 0.0)
    assert loc.min() < -1 and loc.max() > 0.5
    share, scale = np.exp(share), np.exp(log_scale)
    mean = share @ loc / share.sum()
    sd = np.sqrt(share @ (scale**2 + (loc - mean) ** 2) / share.sum())
    u = np.linspace(-2, 2, 9)
    density = [share / share.sum() @ norm.pdf(x, (loc - mean) / sd, scale / sd) for x in u]
    at = jnp.stack([u, 0 * u], 1)
    inverse, log_det = flow.bijector(weights, 2).inverse_and_log_det(at)
    found = jnp.exp(jnp.sum(-0.5 * inverse**2, 1) + log_det) / (2 * np.pi) / norm.pdf(0.0)
    np.testing.assert_allclose(found, density, rtol=1e-10)


def test_far_tails_are_finite():
    flow = flows.MarginalMixture()
    weights = bent_weights(flow, 1)
    for far in (-25.0, 25.0):
        z, log_det = flow.bijector(weights, 1).inverse_and_log_det(jnp.array([far]))
        assert np.all(np.isfinite(z)) and np.isfinite(log_det) and np.sign(z[0]) == np.sign(far)
