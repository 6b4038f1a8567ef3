"""Laws of flows: invertible, right log-determinants, identity at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLOWS, bent_weights

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
