"""Disposition of a drug by 1 to 3 compartments, as a sum of exponentials."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flowme.where import where

__all__ = ["Mode", "modes"]


class Mode(NamedTuple):
    """One exponential of the amount in the central compartment after a unit bolus into it."""

    weight: Array
    rate: Array


def modes(k10: Array, exchange: Sequence[tuple[Array, Array]]) -> list[Mode]:
    r"""The amount after a unit bolus, :math:`A_1(t) = \sum_m w_m e^{-\lambda_m t}`.

    The central compartment 1 eliminates at rate k10 and exchanges with peripheral compartments j
    at rates (k1j, kj1). The weights are positive and add up to 1.

    Args:
        k10: rate of elimination (1/time), of any shape.
        exchange: (k1j, kj1) for each of 0 to 2 peripheral compartments, of that shape.

    Returns:
        The modes, as many as compartments.

    References:
        Gibaldi and Perrier, Pharmacokinetics (1982), chapter 2 and appendix B.
    """
    k10 = jnp.asarray(k10)
    if not exchange:
        return [Mode(jnp.ones_like(k10), k10)]
    return (_two if len(exchange) == 1 else _three)(k10, *exchange)


def _two(k10: Array, exchange: tuple[Array, Array]) -> list[Mode]:
    k12, k21 = exchange
    total, difference = k10 + k12 + k21, k10 + k12 - k21
    root = jnp.sqrt(difference**2 + 4 * k12 * k21)
    fast = (total + root) / 2
    slow = k10 * k21 / fast
    # (fast - k21) (k21 - slow) = k12 k21: the smaller of them from the larger, without a
    # difference of numbers that are nearly equal.
    central = difference > 0
    large = (where(central, difference, -difference) + root) / 2
    small = k12 * k21 / large
    return [
        Mode(where(central, large, small) / root, fast),
        Mode(where(central, small, large) / root, slow),
    ]


def _three(k10: Array, second: tuple[Array, Array], third: tuple[Array, Array]) -> list[Mode]:
    (k12, k21), (k13, k31) = second, third
    rates = _cubic_roots(
        k10 + k12 + k13 + k21 + k31,
        k10 * (k21 + k31) + k21 * k31 + k13 * k21 + k12 * k31,
        k10 * k21 * k31,
    )
    found = []
    for i, rate in enumerate(rates):
        other, another = (r for j, r in enumerate(rates) if j != i)
        weight = (k21 - rate) / (other - rate) * ((k31 - rate) / (another - rate))
        found.append(Mode(weight, rate))
    return found


def _cubic_roots(a2: Array, a1: Array, a0: Array) -> list[Array]:
    """The roots of x^3 - a2 x^2 + a1 x - a0, all real and positive, the largest first.

    Newton's method rises to the smallest root from 0 and falls to the largest from a2, whatever
    the roots. Two more steps, of all roots, carry the derivatives, which are therefore exact to
    the third order.
    """

    def newton(x: Array, a2: Array, a1: Array, a0: Array) -> Array:
        value = ((x - a2) * x + a1) * x - a0
        slope = (3 * x - 2 * a2) * x + a1
        return x - value / where(slope == 0, 1, slope)

    held = jax.lax.stop_gradient((a2, a1, a0))
    ends = (jnp.zeros_like(a2), held[0] + jnp.zeros_like(a2))
    small, large = jax.lax.fori_loop(
        0, 40, lambda _, ends: tuple(newton(x, *held) for x in ends), ends
    )
    # a1 - small large = middle (large + small): at least half of a1, so nothing cancels.
    middle = (held[1] - small * large) / (large + small)
    return [newton(newton(x, a2, a1, a0), a2, a1, a0) for x in (large, middle, small)]
