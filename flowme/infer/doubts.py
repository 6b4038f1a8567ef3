"""What is doubtful about a fit, in words with advice: what the study does not support."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from numpyro.distributions import constraints

from flowme.effects import RandomEffect
from flowme.infer.errors import base_support, correlation, parameter_names, weak_directions
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.per_occasion import PerOccasion
from flowme.quick import quick

_FLAT = 5.0  # standard error of an unconstrained bounded parameter that says it is at its bound:
# that of a logarithm, a factor of 150 either way
_RANK = 1e-3  # smallest eigenvalue of the correlation matrix of Ω that counts as positive
_SHRINKAGE = 0.9
_CONDITION = 1000.0


def doubts(fit: Fit, means: np.ndarray, gradient: np.ndarray) -> tuple[str, ...]:
    """Messages on what the study does not support.

    Args:
        fit: the fit, without these messages.
        means: E(η_i | y_i; θ), `[subject, effect]`.
        gradient: of the objective at θ, `[parameter]`: it points to the bound that is near.
    """
    known = fit.information is not None and bool(np.all(np.isfinite(fit.information)))
    flat = _flat(fit) if known else np.zeros(fit.joint.size, bool)
    vanished, bounds = _at_bounds(fit, flat, gradient)
    own, covariance = _covariances(fit.joint, fit.theta, fit.weights, fit.study)
    variance = np.diag(covariance)
    found = [*_degenerate(fit, flat, own), *bounds]
    found += _not_identified(fit, means, variance, vanished)
    return (*found, *(_undetermined(fit) if known else ()))


def _flat(fit: Fit) -> np.ndarray:
    """The bounded parameters along which the likelihood is flat, `[parameter]`."""
    free = np.zeros(fit.joint.size, bool)
    for name, site in fit.joint.roles.population.items():
        free[fit.joint.slices[name]] = base_support(site.support) is constraints.real
    assert fit.information is not None
    return ~free & (np.abs(np.diag(fit.information)) < _FLAT**-2)


@partial(quick, static_argnums=0)
def _covariances(joint: Joint, theta, weights, study) -> tuple[dict[str, Any], Any]:
    """Ω of each site whose law is one of flowme's (of one occasion, and the mean over subjects),
    and the covariance of all effects."""
    own = {}
    for site, law in zip(joint.roles.effects, joint.laws(theta, weights, study), strict=True):
        law = getattr(law, "base_dist", law)
        law = law.law if isinstance(law, PerOccasion) else law
        if isinstance(law, RandomEffect):
            matrix = law.covariance_matrix
            own[site] = matrix.mean(0) if matrix.ndim > 2 else matrix
    return own, joint.effect_moments(jax.random.key(0), theta, weights, study)[1]


def _degenerate(fit: Fit, flat: np.ndarray, own: dict[str, Any]) -> list[str]:
    """A message for each Ω whose correlation matrix is singular or runs there."""
    found, joint = [], fit.joint
    for site, matrix in own.items():
        names, covariance = joint.roles.components(site), np.asarray(matrix)
        if len(names) == 1 or not np.all(np.diag(covariance) > 0):
            continue
        scale = np.sqrt(np.diag(covariance))
        R = covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(R)
        one = hasattr(joint.roles.laws.get(site), "scale_tril")  # not several, as of a mixture
        where = joint.slices.get(f"{site}_corr_cholesky") if one else None
        running = where is not None and bool(np.any(flat[where]))
        if not running and values[0] >= _RANK:
            continue
        some = np.flatnonzero(vectors[:, 0] ** 2 > 0.1)
        pairs = [(i, j) for k, i in enumerate(some) for j in some[k + 1 :]]
        numbers = ", ".join(f"corr({names[i]}, {names[j]}) {R[i, j]:.3f}" for i, j in pairs)
        rank = np.sum(values > max(_RANK, 3 * values[0]))
        found.append(
            f"Ω of {', '.join(names)} is degenerate, of rank {rank} of {len(names)}: {numbers} "
            f"(smallest eigenvalue of the correlations {values[0]:.1e}). The likelihood is highest "
            "on the boundary, and standard errors hold the estimate there. Take full=False, or "
            "one random effect less among these."
        )
    return found


def _at_bounds(fit: Fit, flat: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The effects whose ω runs to 0, `[effect]`, and a message for each parameter that runs to a
    bound."""
    joint, found = fit.joint, []
    names, theta = parameter_names(joint), np.asarray(fit.theta)
    vanished = np.zeros(joint.effect_size, bool)
    for site, where in joint.slices.items():
        role = joint.roles.population[site]
        if base_support(role.support) is constraints.corr_cholesky:
            continue
        for element in where.start + np.flatnonzero(flat[where]):
            end = theta.copy()
            end[element] += 60.0 * (np.sign(gradient[element]) or np.sign(theta[element]))
            now, to = (_element(joint, site, at, element) for at in (theta, end))
            advice = "leave it out of the model, or fix it there"
            gone = site == f"{role.effect}_omega" and to < 1e-9
            if gone and len(role.shape) > 1:  # of a mixture, [component, effect]
                advice = "a component has shrunk to a point, take one component less"
            elif gone:
                vanished[_columns(joint, role.effect)[:, element - where.start]] = True
                advice = "the study shows no such variation, leave this random effect out"
            limit = "infinity" if to > 1e9 else "0" if to < 1e-9 else f"{to:.3g}"
            found.append(f"{names[element]} runs to its bound {limit} (now {now:.2g}): {advice}.")
    return vanished, found


def _columns(joint: Joint, site: str) -> np.ndarray:
    """Where the effects of a site stand among all, `[occasion, component]`."""
    sites = list(joint.roles.effects)
    first = sum(len(joint.roles.effects[other]) for other in sites[: sites.index(site)])
    columns = first + np.arange(len(joint.roles.effects[site]))
    return columns.reshape(-1, len(joint.roles.components(site)))


def _element(joint: Joint, site: str, theta: np.ndarray, element: int) -> float:
    """An element of a population parameter on its own scale; of one whose elements depend on each
    other, the one that stands in its place."""
    values = np.ravel(joint.constrain(jax.numpy.asarray(theta))[site])
    return float(values[element - joint.slices[site].start])


def _not_identified(
    fit: Fit, means: np.ndarray, variance: np.ndarray, vanished: np.ndarray
) -> list[str]:
    """A message for each effect whose conditional means are all alike."""
    found = shrinkage(fit.joint, means, variance)
    gone = [vanished[columns[0]] for _, columns, _ in fit.joint.roles.reported()]
    return [
        f"the random effect {name} is not identified (shrinkage {100 * s:.0f} %): remove it, or "
        "fix its omega at a value known from elsewhere."
        for (name, s), gone in zip(found.items(), gone, strict=True)
        if s > _SHRINKAGE and not gone
    ]


def shrinkage(joint: Joint, means: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """1 - Var(m_i)/Var(η) of each random effect, by name.

    Args:
        joint: the model.
        means: m_i, means of the conditional distributions, `[subject, effect]`.
        variance: Var(η), `[effect]`.
    """
    found = {}
    with np.errstate(all="ignore"):
        for name, columns, present in joint.roles.reported():
            own = means[:, columns]
            known = np.var(own if present is None else own[present], ddof=1)
            found[name] = float(1 - known / variance[columns[0]])
    return found


def _undetermined(fit: Fit) -> list[str]:
    """Messages on directions in which the likelihood does not determine the estimate."""
    names = parameter_names(fit.joint)
    assert fit.information is not None
    if weak := weak_directions(fit.information, names):
        return [
            f"the information matrix is not positive definite along {', '.join(some)}: the study "
            "does not determine them together. Fix one of them, or simplify the model; if the fit "
            "has not converged, it has not reached a maximum."
            for some in weak
        ]
    covariance = fit.covariance()
    if covariance is None:
        return []
    found = correlation(covariance, names)
    if found.condition_number < _CONDITION:
        return []
    vector = np.linalg.eigh(found.matrix.to_numpy())[1][:, -1]
    some = [name for name, v in zip(names, vector, strict=True) if v**2 > 0.1]
    return [
        f"the estimates of {', '.join(some)} are nearly collinear (condition number "
        f"{found.condition_number:.0f}): fix one of them, or centre covariates."
    ]
