"""Functions written out element by element are those that jax.vmap makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowme.written_out import written_out

MATRIX = np.array([[0.5, -1.0, 0.2], [0.0, 2.0, -0.3], [1.0, 0.1, 0.7]])


def reactions(event, s, y, theta):
    k, v = theta
    flux = jnp.stack([k * y[0], v[0] * y[1] / (v[1] + y[1]), jnp.where(s > event["t"], y[2], 0.0)])
    return jnp.asarray(MATRIX) @ flux + jnp.exp(-y) * event["t"]


def structures(event, s, y, theta):
    k, v = theta
    first, *others = y
    wide = jnp.concatenate([y[::-1], v, jnp.array([first, *others])[None, 1:].sum(0)])
    turned = jnp.outer(wide, y).T.reshape(-1, 3)[::2]
    return turned.sum(axis=0) - jnp.zeros(3) + jnp.split(wide, [3, 5])[0] * k


def calls(event, s, y, theta):
    k, v = theta
    swish = jax.nn.silu(y) + jax.nn.relu(y - v[0]) + jax.nn.softplus(k * y)
    return swish + jnp.cumsum(y) + jnp.clip(y, -1.0, 1.0) + jnp.sort(v)[0] + jnp.max(y)


def loops(event, s, y, theta):
    k, v = theta
    y = jax.lax.fori_loop(0, 3, lambda i, y: y + k * jnp.sin(y) / (1 + i), y)
    y = jax.lax.cond(k > 0.5, lambda y: -y, lambda y: y * v[1], y)
    return y[jnp.argmin(v)] + jax.lax.scan(lambda c, x: (c + x, c * x), 0.0, y)[1]


def orders(event, s, y, theta):
    k, v = theta
    square = jnp.outer(y, v)
    total = jnp.sum(y) + jnp.mean(square) + jnp.linalg.norm(v) + jax.nn.logsumexp(y)
    return square.ravel(order="F")[:3] + total + jax.grad(lambda y: jnp.sum(y**2))(y)


def empty(event, s, y, theta):
    return y * theta[0] + jnp.sum(y[:0]) + jnp.concatenate([y[:0], y])


@pytest.mark.parametrize("function", [reactions, structures, calls, loops, orders, empty])
@pytest.mark.parametrize("shared", [False, True])
def test_of_rows(function, shared):
    rows, rng = 5, np.random.default_rng(0)
    k = jnp.asarray(rng.uniform(size=() if shared else (rows,)))
    event, of_event = ({"t": 0.4}, None) if shared else ({"t": rng.uniform(size=rows)}, -1)
    args = (
        event,
        rng.uniform(size=rows),
        rng.normal(size=(3, rows)),
        (k, rng.normal(size=(2, rows))),
    )
    axes = (of_event, -1, -1, (None if shared else -1, -1))
    found = written_out(rows, function, *axes)(*args)
    expected = jax.jit(jax.vmap(function, axes, out_axes=-1))(*args)
    assert found.shape == (3, rows) and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


def test_nothing_is_taken_for_zero_that_may_not_be():
    """0 √x is NaN for a negative x: that a parameter is out of its domain must be seen."""
    found = written_out(2, lambda x: jnp.stack([0 * jnp.sqrt(x), x + 0]), -1)(jnp.array([-1.0, 4]))
    np.testing.assert_array_equal(found, [[np.nan, 0.0], [-1.0, 4.0]])


def test_what_is_long_stays_whole():
    y = jnp.arange(2000.0).reshape(1000, 2)
    found = written_out(2, lambda y: jnp.cumsum(y)[::100], -1)(y)
    np.testing.assert_allclose(found, np.cumsum(y, axis=0)[::100], rtol=1e-13)
    text = str(jax.make_jaxpr(written_out(2, lambda y: 2 * y[::100], -1))(y))
    assert text.count("mul") == 1
