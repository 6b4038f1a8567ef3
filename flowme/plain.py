"""A few numbers by NumPy, before there is a program: JAX would compile one for each of them.

Every function has an answer for what models mostly consist of, and None for the rest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints, transforms
from scipy.special import logit, ndtri

_MEDIANS: dict[type, Any] = {
    dist.Normal: lambda law: law.loc,
    dist.LogNormal: lambda law: np.exp(law.loc),
    dist.HalfNormal: lambda law: law.scale * ndtri(0.75),
    dist.HalfCauchy: lambda law: law.scale,
    dist.Exponential: lambda law: np.log(2) / law.rate,
    dist.Uniform: lambda law: 0.5 * (law.low + law.high),
}
_INVERSES: dict[type, Any] = {
    transforms.IdentityTransform: lambda value: value,
    transforms.ExpTransform: np.log,
    transforms.SigmoidTransform: logit,
}


def ours(thing: Any) -> bool:
    """Whether it is a law or constraint of NumPyro's or flowme's: others may do what they like."""
    inner = getattr(thing, "base_dist", None)
    own = type(thing).__module__.split(".")[0] in ("numpyro", "flowme")
    return own and (inner is None or ours(inner))


def _known(thing: Any) -> bool:
    """Whether its numbers are there, and not yet to be computed."""
    tracers = (isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(thing))
    return ours(thing) and not any(tracers)


def _as_jax(values: Any) -> np.ndarray:
    """The numbers as JAX would have them, in single precision if that is its."""
    return np.asarray(values, jnp.result_type(float))


def median(law: dist.Distribution) -> np.ndarray | None:
    """The median of a law."""
    shape = law.shape()
    while isinstance(law, dist.ExpandedDistribution | dist.Independent):
        law = law.base_dist
    formula = _MEDIANS.get(type(law))
    if formula is None or not _known(law):
        return None
    return np.broadcast_to(np.asarray(formula(law), float), shape)


def outside(law: dist.Distribution, values: np.ndarray) -> np.ndarray | None:
    """Which values lie outside the support of a law of single ones."""
    if not (ours(law) and _known(support := law.support)):
        return None
    with np.errstate(invalid="ignore"):
        inside = np.asarray(support(_as_jax(values)), bool)
    return ~np.broadcast_to(inside, np.shape(values))


def unconstrained(support: constraints.Constraint, value: np.ndarray) -> np.ndarray | None:
    """Where a parameter is that is not constrained, flat; NaN outside its support."""
    to = biject_to(support)
    while isinstance(to, transforms.IndependentTransform):
        to = to.base_transform
    inverse = _INVERSES.get(type(to))
    if inverse is None or not _known(support):
        return None
    value = _as_jax(value)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.all(np.asarray(support(value)))
        return np.ravel(inverse(value)) if inside else np.full(np.size(value), np.nan)
