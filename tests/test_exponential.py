"""Exponentials of many small matrices, against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm, expm_frechet

from flowme.exponential import exponentials


def compartments(scale, states, rows=7):
    """Rates between compartments, and out of them."""
    rates = scale * np.random.default_rng(states).uniform(0.1, 1, (rows, states, states))
    rates[:, np.arange(states), np.arange(states)] *= -states
    return rates


@pytest.mark.parametrize("states", [1, 2, 4, 6])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
def test_they_are_those_of_scipy(states, scale):
    rates = compartments(scale, states)
    expected = np.stack([expm(x) for x in rates])
    error = np.abs(exponentials(jnp.asarray(rates)) - expected).max()
    assert error < 1e-12 * np.abs(expected).max()


def test_rows_of_different_size_are_each_as_if_alone():
    """Also under vmap, where one number of squarings serves all."""
    rates = jnp.asarray(np.stack([compartments(s, 3) for s in (1e-3, 3.0, 500.0)]))
    together = jax.jit(jax.vmap(exponentials))(rates)
    alone = np.stack([exponentials(x) for x in rates])
    np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-300)


def test_equal_eigenvalues():
    block = np.array([[[-2.0, 1.0], [0.0, -2.0]]])
    expected = np.exp(-2) * np.array([[1, 1], [0, 1]])
    np.testing.assert_allclose(exponentials(jnp.asarray(block))[0], expected, rtol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 0.1, 20.0])
def test_derivatives(scale):
    rates, along = compartments(scale, 3), compartments(1.0, 3)
    expected = np.stack([expm_frechet(x, e)[1] for x, e in zip(rates, along, strict=True)])
    _, forward = jax.jvp(exponentials, (jnp.asarray(rates),), (jnp.asarray(along),))
    np.testing.assert_allclose(forward, expected, rtol=1e-10, atol=1e-13)
    weights = np.random.default_rng(1).normal(size=rates.shape)
    reverse = jax.jit(jax.grad(lambda x: jnp.sum(weights * exponentials(x))))(jnp.asarray(rates))
    np.testing.assert_allclose(np.sum(reverse * along), np.sum(weights * expected), rtol=1e-10)


def test_second_derivatives_both_ways():
    """exp(x A) has d²/dx² = A² exp(x A), mapped or not."""
    rates = compartments(2.0, 2, rows=1)

    def value(x):
        return exponentials(x * rates)[0]

    expected = np.stack([rates[0] @ rates[0] @ expm(x * rates[0]) for x in (0.3, 9.0)])
    for twice in (jax.jacfwd(jax.jacfwd(value)), jax.jacfwd(jax.jacrev(value))):
        found = jax.vmap(twice)(jnp.array([0.3, 9.0]))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


def test_single_precision():
    rates = compartments(3.0, 3).astype(np.float32)
    expected = np.stack([expm(x.astype(float)) for x in rates])
    found = exponentials(jnp.asarray(rates))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [-1e6, np.nan, -np.inf])
def test_a_row_that_fails_leaves_the_others_alone(bad):
    rates = np.array([[[bad]], [[-9.0]]])
    found = exponentials(jnp.asarray(rates))[:, 0, 0]
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1], np.exp(-9), rtol=1e-13)
    slope = jax.grad(lambda x: exponentials(x * jnp.asarray(rates))[1].sum())(1.0)
    if np.isfinite(bad):  # else the product itself has no derivative
        np.testing.assert_allclose(slope, -9 * np.exp(-9), rtol=1e-12)


def test_rates_up_to_the_limit_that_is_stated():
    """Absorption within no time, and elimination."""
    rates = np.array([[[-4e5, 0.0], [4e5, -0.1]], [[-9e5, 0.0], [9e5, -0.1]]])
    found = exponentials(jnp.asarray(rates))
    expected = np.array([[0.0, 0.0], [np.exp(-0.1) * 4e5 / (4e5 - 0.1), np.exp(-0.1)]])
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)
    assert np.isnan(found[1]).all()
