"""`where` is `jnp.where`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from flowme.where import where

CHOICES = [0, 1.5, np.float32(2), np.arange(3), jnp.ones((2, 1)), jnp.ones(3, "float32"), True]


def test_is_that_of_jax():
    conditions = (
        jnp.array([[True, False, True], [False, False, True]]),
        np.array([True, False, True]),
    )
    for condition, x, y in itertools.product(conditions, CHOICES, CHOICES):
        expected, found = jnp.where(condition, x, y), where(condition, x, y)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_has_its_derivatives():
    x = jnp.array([-1.0, 0.5, 2.0])

    def of(choose):
        return lambda x: choose(x > 0, x**3, -x).sum()

    for transform in (jax.grad, jax.hessian, lambda f: jax.vmap(jax.grad(f))):
        at = x if transform in (jax.grad, jax.hessian) else jnp.stack([x, 2 * x])
        np.testing.assert_array_equal(transform(of(where))(at), transform(of(jnp.where))(at))
