"""Exponentials of many small matrices at once."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

__all__ = ["exponentials"]

_DEGREE = 16
_NORM = {8: 0.78, 4: 2.2}  # largest 1-norm at which it is exact, by the bytes of a number
_MOST = 20  # squarings
_FEW = 4  # states whose products are written out, which takes long to compile


def exponentials(matrices: Array) -> Array:
    """exp(A) of each matrix `[row, state, state]`, with derivatives of any order.

    By scaling and squaring, exp(A) = exp(A / 2^s)^(2^s), and Taylor's polynomial of degree 16 in
    six products, whose backward error is below rounding up to a norm of 0.78 (2.2 in single
    precision). Unlike Padé's approximation it solves nothing, and all rows are multiplied side by
    side: `jax.scipy.linalg.expm`, mapped, computes all of its approximations and 16 squarings for
    every row; here there are as many squarings as the row with the most needs. NaN where those are
    more than 20, from a 1-norm of 8e5 on.

    References:
        Moler and Van Loan, SIAM Review 45 (2003); Al-Mohy and Higham, SIAM J. Sci. Comput. 33
        (2011), table 3.1, for the norms; Paterson and Stockmeyer, SIAM J. Comput. 2 (1973), for
        the products.
    """
    A = jnp.moveaxis(matrices, 0, -1)
    size = jax.lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(A), 0), 0))
    squarings = jnp.maximum(jnp.ceil(jnp.log2(size / _NORM[A.dtype.itemsize])), 0)
    able = squarings <= _MOST  # nor of what is not a number
    squarings = jnp.where(able, squarings, 0)
    A = jnp.where(able, A, 0)  # so that no derivative of others is NaN
    most = jax.lax.stop_gradient(_largest(squarings))

    def square(X: Array, k: Array) -> tuple[Array, None]:
        squared = jax.lax.cond(
            k < most, lambda X: jnp.where(k < squarings, _product(X, X), X), lambda X: X, X
        )
        return squared, None

    X, _ = jax.lax.scan(square, _taylor(A * 2.0**-squarings), jnp.arange(_MOST))
    return jnp.moveaxis(jnp.where(able, X, jnp.nan), -1, 0)


@custom_vmap
def _largest(x: Array) -> Array:
    return jnp.max(x)


@_largest.def_vmap
def _(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    """One answer for all, so that what is decided by it stays a decision under `vmap`."""
    del size, batched
    return _largest(x), False


def _taylor(A: Array) -> Array:
    """Σ_k A^k / k!, k = 0 to 16, in powers of A⁴."""
    square = _product(A, A)
    powers = [jnp.eye(len(A), dtype=A.dtype)[..., None], A, square, _product(square, A)]
    fourth = _product(square, square)
    total = fourth / math.factorial(_DEGREE)
    for k in range(_DEGREE - 4, -1, -4):
        if k < _DEGREE - 4:
            total = _product(fourth, total)
        total = total + sum(p / math.factorial(k + j) for j, p in enumerate(powers))
    return total


def _product(A: Array, B: Array) -> Array:
    """Of matrices `[state, state, row]`: few and long operations, where `@` has many short ones."""
    if len(B) > _FEW:
        return jnp.sum(A[:, :, None] * B[None], 1)
    return sum((A[:, j, None] * B[None, j] for j in range(1, len(B))), A[:, 0, None] * B[None, 0])
