"""What is recorded computes what its function does, differentiated and mapped in any way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist

from flowme.recorded import recorded


@jax.custom_jvp
def doubled(x):
    return x * x


@doubled.defjvp
def _(x, v):
    return doubled(x[0]), 4 * x[0] * v[
        0
    ]  # twice the derivative, to see that it is this that counts


@jax.custom_vjp
def tripled(x):
    return x**3


tripled.defvjp(lambda x: (tripled(x), x), lambda x, g: (7 * x * g,))


def loop(x):
    return jax.lax.scan(lambda c, z: (c + jnp.where(z > 0, z, 0.1) ** 2, c), 0.0, x)[0]


def branch(x):
    return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)


FUNCTIONS = {
    "jnp": lambda x: jnp.clip(jnp.where(x > 0, x, jnp.exp(x)), 0.2, 3.0) @ jnp.eye(3),
    "custom_jvp": lambda x: doubled(jnp.sort(x)) + jax.nn.softplus(x),
    "custom_vjp": lambda x: jax.jit(lambda x: tripled(x) + 1)(x),
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.cumsum(x))),
    "scan": loop,
    "cond": branch,
    "constants": lambda x: {"same": x, "one": 1.0, "array": np.arange(3.0), "sum": x.sum()},
}


def in_two(function):
    """What the function comes to, and what follows from it, with a second use of the argument."""

    def parts(x):
        scale = jnp.where(x > 0, x, 2.0).sum()
        return function(x), lambda y: jax.tree.map(lambda a: scale * jnp.cos(a), y)

    return parts


@pytest.mark.parametrize("name", FUNCTIONS)
def test_computes_the_same(name):
    plain = in_two(FUNCTIONS[name])
    again = recorded(plain)
    x = jnp.array([0.3, -1.2, 2.0])

    def same(transformed):
        def both(parts, x):
            y, then = parts(x)
            return y, then(y)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-14),
            transformed(lambda x: both(plain, x)), transformed(lambda x: both(again, x)),
        )  # fmt: skip

    def total(f):
        return lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(f(x)))

    same(lambda f: f(x))
    same(lambda f: jax.jit(f)(x))
    same(lambda f: jax.vmap(f)(jnp.stack([x, 2 * x])))
    same(lambda f: jax.grad(total(f))(x))
    if name != "custom_vjp":
        same(lambda f: jax.jvp(f, (x,), (2 * x,)))
        same(lambda f: jax.vmap(jax.hessian(total(f)))(jnp.stack([x, -x])))


def test_the_second_part_takes_what_it_is_given():
    plain = in_two(jnp.sin)
    x, y = jnp.array([0.3, -1.2, 2.0]), jnp.array([1.0, 2.0, 3.0])
    _, then = recorded(plain)(x)
    np.testing.assert_allclose(then(y), plain(x)[1](y), 1e-15)
    np.testing.assert_allclose(jax.jacfwd(then)(y), jax.jacfwd(plain(x)[1])(y), 1e-15)


def test_only_primitives_are_left():
    parts = in_two(FUNCTIONS["jnp"])

    def names(parts):
        def both(x):
            y, then = parts(x)
            return then(y)

        return {step.primitive.name for step in jax.make_jaxpr(both)(jnp.ones(3)).eqns}

    assert names(parts) & {"jit", "pjit"}
    assert not names(recorded(parts)) & {"jit", "pjit"}


def test_is_written_once_for_arguments_of_one_shape():
    seen = []

    def function(power, x, law):
        seen.append(x.shape)
        return x**power, law.log_prob

    again = recorded(function, static_argnums=0)

    def log_prob(power, x, law):
        y, then = again(power, x, law)
        return then(y)

    law = dist.Normal(0.5, jnp.ones(3))
    for x in (jnp.ones(3), 2 * jnp.ones(3)):
        np.testing.assert_allclose(log_prob(2, x, law), law.log_prob(x**2), 1e-15)
    jax.vmap(jax.grad(lambda x: log_prob(2, x, law).sum()))(jnp.ones((4, 3)))
    assert seen == [(3,)]
    log_prob(3, jnp.ones(3), law)
    log_prob(2, jnp.ones(5), dist.Normal(0.5, jnp.ones(5)))
    assert seen == [(3,), (3,), (5,)]


def test_what_a_program_around_it_computes():
    def outer(a):
        y, then = recorded(lambda x: (a * jnp.sin(x), lambda y: jnp.sum(a * y)))(jnp.ones(3))
        return then(y)

    np.testing.assert_allclose(jax.grad(outer)(2.0), 12 * np.sin(1.0), 1e-15)
    np.testing.assert_allclose(jax.jit(outer)(2.0), 12 * np.sin(1.0), 1e-15)
    np.testing.assert_allclose(jax.vmap(outer)(jnp.ones(2)), 3 * np.sin(1.0), 1e-15)
