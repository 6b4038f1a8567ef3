"""The smoothed nonparametric estimate: a kernel in place of each point of a discrete law.

    g_h(η) = Σ_k w_k N(η; m_k, h² Ω),

with Ω of the Gaussian fit. Given the bandwidth h and the centres this is a discrete law seen
through a coarser likelihood, p_h(y_i | m_k) = ∫ p(y_i | η) N(η; m_k, h² Ω) dη, so its weights are
a nonparametric maximum-likelihood estimate too (convex; h = 0 is the NPMLE). h is the smoothing
parameter, chosen on held-out subjects: centres and weights of a fold come from the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from flowme.infer.conditional import gaussian_law, importance, likelihood_at
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.marginal import estimate_marginal
from flowme.infer.mixing import mixing_weights
from flowme.kernel_mixture import KernelMixtureRandomEffect
from flowme.primitives import replace_effect
from flowme.quick import soon

BANDWIDTHS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)


@dataclasses.dataclass(frozen=True, eq=False)
class SmoothedNPMLE:
    """A smoothed NPMLE and how its bandwidth was chosen.

    Attributes:
        fit: the model with this law in the place of the Gaussian: a `Fit` like others. Its `aic`
            and `bic` do not count the weights of the law: compare it on held-out subjects.
        law: the law of the random effects.
        bandwidth: h.
        bandwidths: those tried, `[bandwidth]`.
        held_out: log p(y_i) by the fold that does not see i, `[bandwidth, subject]`; to the
            Monte-Carlo error of the nodes, and for the best h a little optimistic.
    """

    fit: Fit
    law: KernelMixtureRandomEffect
    bandwidth: float
    bandwidths: np.ndarray
    held_out: np.ndarray


def smoothed_npmle(
    key: jax.Array,
    fit: Fit,
    *,
    bandwidths: Sequence[float] = BANDWIDTHS,
    folds: int = 5,
    centres: int = 1000,
    points: int = 256,
) -> SmoothedNPMLE:
    """The smoothed NPMLE of the law of η, at the other parameters of `fit`.

    Args:
        key: random key; is consumed.
        fit: a Gaussian fit with one `random_effect`.
        bandwidths: h to choose from, in units of the standard deviations of the Gaussian fit.
        folds: folds over subjects; not used for a single bandwidth.
        centres: at most so many candidates m_k, draws from subjects' conditional distributions.
        points: importance nodes per subject, the same for all kernels.

    Raises:
        ValueError: several random-effect statements, or no positive bandwidth.
    """
    tried = np.asarray(bandwidths, float)
    size = fit.study.subjects.size
    if tried.ndim != 1 or not tried.size or not np.all(tried > 0):
        raise ValueError(f"expected one or more positive bandwidths; got {tried}.")
    if not 2 <= folds <= size:
        raise ValueError(f"expected 2 to {size} folds, one subject each at least; got {folds}.")
    if len(fit.joint.roles.effects) != 1:
        raise ValueError(
            "expected a model with one random_effect statement, whose law the kernels replace; "
            f"got {list(fit.joint.roles.effects)}. Write them as one vector of effects."
        )
    keys = jax.random.split(key, 4)
    origin, m = _centres(keys[0], fit, centres)
    nodes, log_v, tril = _nodes(fit.joint, points, keys[1], fit)
    fold = np.asarray(jax.random.permutation(keys[2], np.arange(size) % folds))
    kernels = [np.asarray(_log_kernel(nodes, log_v, h * tril, m)) for h in tried]
    held_out = np.stack([_cross_validate(log_p, fold, origin) for log_p in kernels])
    best = int(np.argmax(held_out.sum(1)))
    weights, _ = mixing_weights(kernels[best])
    keep = weights > 0
    law = KernelMixtureRandomEffect(
        fit.joint.roles.effect_names, m[keep], weights[keep] / weights[keep].sum(),
        tried[best] * np.asarray(tril),
    )  # fmt: skip
    found = _with_law(keys[3], fit, law, tried, best, folds)
    return SmoothedNPMLE(found, law, float(tried[best]), tried, held_out)


def _centres(key, fit: Fit, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A draw from each subject's conditional distribution, and whose it is. Two from each where
    subjects are few."""
    mean, tril = (np.asarray(x) for x in fit.conditional)
    key_subject, key_normal = jax.random.split(key)
    order = np.asarray(jax.random.permutation(key_subject, len(mean)))
    origin = np.tile(order, 2)[:count]
    z = np.asarray(jax.random.normal(key_normal, (len(origin), mean.shape[1])))
    return origin, mean[origin] + np.einsum("kde,ke->kd", tril[origin], z)


@partial(soon, static_argnums=(0, 1))
def _weighted_nodes(joint: Joint, points: int, key, theta, weights, conditional, study):
    mean, covariance = joint.effect_moments(jax.random.key(0), theta, weights, study)
    broad = gaussian_law(mean, 1.5**2 * covariance, study.subjects.size)
    nodes, _ = importance(key, conditional, broad, points)
    likelihood = likelihood_at(joint, theta, weights, nodes, study)
    log_v = nodes.log_weight + jnp.where(jnp.isnan(likelihood), -jnp.inf, likelihood)
    return nodes.eta, log_v, jnp.linalg.cholesky(covariance)


def _nodes(joint: Joint, points: int, key, fit: Fit):
    """Nodes η_ij `[node, subject, effect]`, log v_ij p(y_i | η_ij), and the factor of Ω."""
    return _weighted_nodes(joint, points, key, fit.theta, fit.weights, fit.conditional, fit.study)


@soon
def _log_kernel(nodes, log_v, tril, centres):
    """log p_h(y_i | m_k) = log Σ_j v_ij p(y_i | η_ij) N(η_ij; m_k, tril trilᵀ),
    `[subject, centre]`, one subject after another."""
    inverse = jnp.linalg.inv(tril)
    size = tril.shape[0]
    constant = jnp.sum(jnp.log(jnp.diagonal(inverse))) - 0.5 * size * jnp.log(2 * jnp.pi)

    def subject(args):
        eta, log_v = args
        x, m = (eta - eta[0]) @ inverse.T, (centres - eta[0]) @ inverse.T
        distance = jnp.sum(x**2, 1) - 2 * m @ x.T + jnp.sum(m**2, 1)[:, None]
        return constant + logsumexp(log_v - 0.5 * distance, axis=1)

    return jax.lax.map(subject, (jnp.swapaxes(nodes, 0, 1), log_v.T))


def _cross_validate(log_p: np.ndarray, fold: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """log f_i by the weights, and on the centres, of the folds without i, `[subject]`."""
    held_out = np.empty(len(fold))
    for number in range(fold.max() + 1):
        out, other = fold == number, fold[origin] != number
        weights, _ = mixing_weights(log_p[~out][:, other])
        with np.errstate(divide="ignore"):
            held_out[out] = logsumexp(log_p[out][:, other] + np.log(weights), axis=1)
    return held_out


def _with_law(key, fit: Fit, law, bandwidths, best: int, folds: int) -> Fit:
    """The fit with this law, its other parameters as they were."""
    (site,) = fit.joint.roles.effects
    joint = Joint.of(replace_effect(fit.joint.model, **{site: law}), fit.study)
    values = {k: v for k, v in fit.params.items() if k in joint.roles.population}
    theta = joint.unconstrain(values)
    marginal = estimate_marginal(key, joint, theta, {}, fit.study)
    messages = [
        f"smoothed NPMLE: {len(law.probs)} kernels of bandwidth {bandwidths[best]:g}, chosen by "
        f"{folds} folds; the other parameters are held, so no standard errors are given"
    ]
    if len(bandwidths) > 1 and best in (0, len(bandwidths) - 1):
        messages.append(f"the chosen bandwidth is the last of {list(bandwidths)}: try others")
    return dataclasses.replace(
        fit, joint=joint, theta=theta, weights={}, log_likelihood=marginal.log_likelihood,
        log_likelihood_se=marginal.standard_error, information=None,
        history=np.array([marginal.total]), messages=tuple(messages),
        selection=None, selected=None,
    )  # fmt: skip
