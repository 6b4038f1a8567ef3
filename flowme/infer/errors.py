"""Errors of estimates: from the observed information to covariances, correlations and doubts.

With ℓ_i(θ) = log p(y_i; θ), scores s_i = ∇ℓ_i and θ̂ the estimate, all on the unconstrained scale,

    I = -Σ_i ∇²ℓ_i(θ̂),      J = Σ_i s_i s_iᵀ,      Cov θ̂ = I⁻¹      or, robust,      I⁻¹ J I⁻¹

(Huber 1967; White 1982): the latter also holds where the model is wrong, if subjects are many.
Matrices are judged and inverted after scaling their diagonal to 1, so that neither units nor a
parameter that runs away to its bound, whose information vanishes, spoil the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpyro.distributions import constraints

from flowme.infer.joint import Joint

_SINGULAR = 1e-10  # smallest eigenvalue of the scaled information, below which it has no inverse


class Correlation(NamedTuple):
    """Correlations of the estimates of θ (unconstrained; of a positive parameter, its logarithm).

    Attributes:
        matrix: a row and a column for each element of θ, named as in `parameter_names`.
        condition_number: ratio of its largest to its smallest eigenvalue, as NONMEM prints it;
            beyond 1000 the study hardly tells some parameters apart.
    """

    matrix: pd.DataFrame
    condition_number: float


def parameter_names(joint: Joint) -> tuple[str, ...]:
    """A name for each element of θ, `[parameter]`: "ka", "omega(ka)", "corr(ka, V)", ...

    With three effects or more, corr(V, CL) of θ is the *partial* correlation, given the effects
    before V: what θ holds is its inverse hyperbolic tangent (Lewandowski, Kurowicka & Joe 2009).
    """
    found: list[str] = []
    for name, where in joint.slices.items():
        found += site_names(joint, name, where.stop - where.start)
    return tuple(found)


def site_names(joint: Joint, name: str, size: int) -> list[str]:
    """Names of the `size` numbers of a population parameter, on its own scale or unconstrained;
    of a correlation matrix, those below the diagonal."""
    site = joint.roles.population[name]
    effects = joint.roles.components(site.effect)
    stem = site.label or name
    if site.effect and len(joint.roles.effects) == 1:
        stem = name.removeprefix(f"{site.effect}_")
    pairs = [(effects[j], effects[i]) for i in range(len(effects)) for j in range(i)]
    if base_support(site.support) is constraints.corr_cholesky and size == len(pairs):
        return [f"{stem.removesuffix('_cholesky')}({a}, {b})" for a, b in pairs]
    if site.effect and site.shape == (len(effects),) and size == len(effects):
        return [f"{stem}({effect})" for effect in effects]
    return [f"{stem}[{k}]" for k in range(size)] if site.shape else [stem]


def base_support(support: constraints.Constraint) -> constraints.Constraint:
    """The support of a parameter, without the wrapping that says which axes belong together."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def invert(information: np.ndarray | None) -> np.ndarray | None:
    """I⁻¹, or None where I is not known or not positive definite."""
    if information is None or _weak(information):
        return None
    scale = np.sqrt(np.diag(information))
    return np.linalg.inv(information / np.outer(scale, scale)) / np.outer(scale, scale)


def sandwich(information: np.ndarray | None, outer: np.ndarray | None) -> np.ndarray | None:
    """I⁻¹ J I⁻¹, or None where one of them is not known."""
    inverse = invert(information)
    return None if inverse is None or outer is None else inverse @ outer @ inverse


def weak_directions(information: np.ndarray, names: tuple[str, ...]) -> list[list[str]]:
    """The parameters in each direction in which I is not positive: the large elements of the
    eigenvectors of the scaled I."""
    return [
        [name for name, v in zip(names, vector, strict=True) if v**2 > 0.1]
        for vector in _weak(information)
    ]


def correlation(covariance: np.ndarray, names: tuple[str, ...]) -> Correlation:
    """The correlations of a covariance, and their condition number."""
    scale = np.sqrt(np.diag(covariance))
    matrix = covariance / np.outer(scale, scale)
    values = np.linalg.eigvalsh(matrix)
    if not values.size:  # no parameter to be estimated
        values = np.ones(1)
    condition = float(values[-1] / values[0]) if values[0] > 0 else np.inf
    return Correlation(pd.DataFrame(matrix, index=names, columns=names), condition)


def _weak(information: np.ndarray) -> list[np.ndarray]:
    """Unit vectors along which the scaled information is not positive."""
    if not np.all(np.isfinite(information)):
        return list(np.eye(len(information)))
    scale = np.sqrt(np.maximum(np.abs(np.diag(information)), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    return list(vectors.T[values < _SINGULAR])
