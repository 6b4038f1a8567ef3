"""The marginal log-likelihood by importance sampling: its Monte-Carlo error, and its doubts."""

from __future__ import annotations

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from flowme.garbage import set_aside
from flowme.infer.conditional import (
    Conditional,
    find,
    importance,
    likelihood_at,
    population_law,
)
from flowme.infer.evaluate import CHUNK, LARGEST, Engine, Evaluation, evaluate, next_order
from flowme.infer.fit import Fit, total_error
from flowme.infer.joint import Joint, Weights
from flowme.infer.moments import by_moments
from flowme.infer.parallel import by_chunk
from flowme.infer.pareto import TOO_HEAVY, pareto_k
from flowme.levels import same_levels
from flowme.quick import soon
from flowme.study import Study

POINTS = 320  # per subject and replicate: of these 256, a whole Sobol net, near the mode
REPLICATES = 8
_ENOUGH = 20  # effective nodes from which a mean and a covariance are taken


class MarginalLikelihood(NamedTuple):
    """log p(y_i; θ) of every subject, and how far it is to be believed.

    Attributes:
        log_likelihood: log p(y_i; θ), `[subject]`.
        standard_error: of each, `[subject]`: Monte-Carlo, or by quadrature the difference to
            another rule.
        method: how it was found.
        pareto_k: k̂ of each subject's importance weights (`flowme.infer.pareto`), `[subject]`;
            above .7 the value and its standard error are not to be believed. None by quadrature.
        messages: what the user should know: the subjects whose k̂ is above .7.
    """

    log_likelihood: np.ndarray
    standard_error: np.ndarray
    method: str = "importance sampling"
    pareto_k: np.ndarray | None = None
    messages: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """log p(y; θ)."""
        return float(np.sum(self.log_likelihood))

    @property
    def total_se(self) -> float:
        """Error of `total`."""
        return total_error(self.standard_error, self.method)


@set_aside()
def marginal_log_likelihood(
    key: jax.Array,
    fit: Fit,
    study: Study | None = None,
    *,
    points: int = POINTS,
    replicates: int = REPLICATES,
) -> MarginalLikelihood:
    """log p(y_i; θ) = log ∫ p(y_i | η; θ) p(η; θ) dη for every subject of `study`.

    Importance sampling from the mixture of a Gaussian with the moments of p(η_i | y_i; θ) and of
    the law of the random effects (`flowme.infer.conditional.importance`), in independent randomised
    quasi-Monte-Carlo replicates whose spread gives the standard error. (One more replicate, which
    does not count, finds the moments.) The study need not be the
    one the model was fitted to: this is how held-out subjects are judged, whatever their law.
    Errors of different subjects are independent.

    Args:
        key: random key; is consumed.
        fit: a fitted model.
        study: the subjects; by default those of the fit.
        points: points per subject and replicate.
        replicates: independent replicates, at least 2.

    Warns:
        UserWarning: subjects with a Pareto k̂ above .7 (also in `messages`).
    """
    study = fit.study if study is None else same_levels(study, fit.study)
    found = estimate_marginal(
        key, fit.joint.on(study), fit.theta, fit.weights, study,
        points=points, replicates=replicates,
    )  # fmt: skip
    for message in found.messages:
        warnings.warn(message, stacklevel=2)
    return found


def estimate_marginal(
    key: jax.Array,
    joint: Joint,
    theta: jax.Array,
    weights: Weights,
    study: Study,
    *,
    points: int = POINTS,
    replicates: int = REPLICATES,
) -> MarginalLikelihood:
    """`marginal_log_likelihood` of `joint` at θ and these flow weights."""
    if replicates < 2:
        raise ValueError(f"expected at least 2 replicates for a standard error; got {replicates}.")
    static, shared = (joint, points, replicates), (key, theta, weights)
    (mean, error, heavy), _ = by_chunk(_replicates, static, shared, study, CHUNK, _summarise)
    messages = _doubts(heavy, study, points)
    return MarginalLikelihood(mean, error, pareto_k=heavy, messages=messages)


def _summarise(found: tuple[np.ndarray, tuple]) -> tuple[tuple[np.ndarray, ...], tuple]:
    """log p(y_i), its standard error and k̂, from log v_ik p(y_i | η_ik) p(η_ik)
    `[replicate, point, subject]`."""
    terms, nothing = found
    replicates = len(terms)
    values = logsumexp(terms, axis=1)
    mean = logsumexp(values, axis=0) - np.log(replicates)
    with np.errstate(invalid="ignore"):  # a subject that is impossible at all nodes
        error = np.std(np.exp(values - mean), axis=0, ddof=1) / np.sqrt(replicates)
    return (mean, error, pareto_k(terms.reshape(-1, terms.shape[2]))), nothing


def _doubts(heavy: np.ndarray, study: Study, points: int) -> tuple[str, ...]:
    """A message naming the subjects whose k̂ is above .7."""
    worst = np.argsort(-heavy)[: np.sum(heavy > TOO_HEAVY)]
    if not worst.size:
        return ()
    named = ", ".join(f"{study.subjects.ids[i]} ({heavy[i]:.2f})" for i in worst[:5])
    return (
        f"importance sampling: expected Pareto k below {TOO_HEAVY}; got more for {worst.size} "
        f"subject(s): {named}{', ...' if worst.size > 5 else ''}. Their log p(y) and its standard "
        f"error are not to be believed: raise points (now {points}), and see whether it changes.",
    )


def by_quadrature(
    engine: Engine,
    theta: np.ndarray,
    study: Study,
    found: Evaluation,
    order: int,
    finer: Evaluation | None = None,
    *,
    tolerance: float = 5e-3,
    chunk: int = CHUNK,
) -> MarginalLikelihood:
    """log p(y_i; θ) by adaptive Gauss-Hermite quadrature (Pinheiro & Bates 1995).

    From the rule of `order`, with which `found` was evaluated, to the next one (`finer`, if that
    was done already). Nodes are placed by mode and curvature of the conditional distributions up to
    here, and for the value reported by their mean and covariance (Naylor & Smith 1982), which sees
    more with fewer nodes, above all where those are far from Gaussian: a ridge. The error is the
    difference of the two. While its total is above `tolerance`, or above 1e-4 per subject, orders
    rise by two, as far as the engine has room; the error is then the larger difference to the two
    values before, for they may come close to the truth in waves. Of a study beyond four chunks the
    values stay those of `order`, and the error is their mean difference to the better ones of one
    chunk of subjects, spread over it, and the standard error of that mean.
    """
    at = partial(evaluate, engine, jax.random.key(0), theta, {}, chunk=chunk)
    most, size = LARGEST[engine.joint.effect_size], study.subjects.size
    modes = found.conditional.mean
    text = "adaptive Gauss-Hermite quadrature, {} nodes per effect"
    if size > 4 * chunk:
        some = spread(size, chunk)
        by_mode = at(study.subset(some), modes[some], order=most)
        around = by_moments(by_mode.mean, by_mode.covariance)
        best = at(study.subset(some), modes[some], order=most, around=around).log_likelihood
        change = best - found.log_likelihood[some]
        change = change[np.isfinite(change)]  # `failed` names the others
        off = np.inf
        if change.size:
            off = abs(np.mean(change)) + np.std(change) / np.sqrt(change.size)
        return MarginalLikelihood(found.log_likelihood, np.full(size, off), text.format(order))
    fine = found
    if order < most:
        order = next_order(engine.joint.effect_size, order)
        fine = at(study, modes, order=order) if finer is None else finer
    if not _finite(fine):
        return MarginalLikelihood(fine.log_likelihood, np.full(size, np.inf), text.format(order))

    before, least = [fine.log_likelihood], np.abs(fine.log_likelihood - found.log_likelihood)
    while True:
        around = by_moments(fine.mean, fine.covariance)
        fine = at(study, modes, order=order, around=around)
        known = np.isfinite(fine.log_likelihood)
        value = np.where(known, fine.log_likelihood, before[-1])
        error = np.max([np.abs(value - other) for other in before], axis=0)
        error = np.where(known, error, np.maximum(error, least))
        if order == most or error.sum() < min(tolerance, 1e-4 * size):
            return MarginalLikelihood(value, error, text.format(order))
        order = next_order(engine.joint.effect_size, order)
        before = [before[-1], value]


def around_means(
    engine: Engine,
    theta: np.ndarray,
    study: Study,
    found: Evaluation,
    order: int,
    *,
    chunk: int = CHUNK,
) -> MarginalLikelihood:
    """log p(y_i; θ) where the climb has ended with nodes around means, those of `found`; the error
    is the difference to `order` nodes per effect around them."""
    most, around = LARGEST[engine.joint.effect_size], by_moments(found.mean, found.covariance)
    coarse = evaluate(
        engine, jax.random.key(0), theta, {}, study, found.conditional.mean,
        order=order, steps=0, chunk=chunk, around=around,
    )  # fmt: skip
    error = np.abs(found.log_likelihood - coarse.log_likelihood)
    text = f"adaptive Gauss-Hermite quadrature around means, {most} nodes per effect"
    return MarginalLikelihood(found.log_likelihood, error, text)


def _finite(found: Evaluation) -> bool:
    return bool(np.all(np.isfinite(found.log_likelihood)))


def spread(size: int, count: int) -> np.ndarray:
    """`count` of `size` subjects, spread evenly over them."""
    return np.unique(np.linspace(0, size - 1, count).astype(int))


@partial(soon, static_argnums=0)
def _replicates(static: tuple[Joint, int, int], shared, chunk) -> tuple[jax.Array, tuple]:
    """log v_ik p(y_i | η_ik) p(η_ik) of a chunk, `[replicate, point, subject]`.

    One replicate goes before: it is placed by mode and curvature, the others, which count, by the
    means and covariances that it finds. Those see all modes of p(η_i | y_i), and its tails.
    """
    joint, points, replicates = static
    key, theta, weights = shared
    number, _, study = chunk
    broad = population_law(joint, theta, weights, study)

    def replicate(carry, key):
        proposal, first = carry
        nodes, effect = importance(key, proposal, broad, points)
        terms = likelihood_at(joint, theta, weights, nodes, study) + effect + nodes.log_weight
        terms = jnp.where(jnp.isnan(terms), -jnp.inf, terms)
        seen = _seen(nodes.eta, terms, proposal)
        proposal = jax.tree.map(lambda new, old: jnp.where(first, new, old), seen, proposal)
        return (proposal, jnp.zeros((), bool)), terms

    keys = jax.random.split(jax.random.fold_in(key, number), 1 + replicates)
    begin = find(joint, theta, weights, study), jnp.ones((), bool)
    _, terms = jax.lax.scan(replicate, begin, keys)
    return terms[1:], ()


def _seen(eta: jax.Array, terms: jax.Array, proposal: Conditional) -> Conditional:
    """Means and covariances of weighted nodes; of a subject for whom fewer than `_ENOUGH` count,
    the proposal as it is."""
    share = jax.nn.softmax(terms, axis=0)
    mean = jnp.einsum("ks,ksd->sd", share, eta)
    away = eta - mean
    tril = jnp.linalg.cholesky(jnp.einsum("ks,ksd,kse->sde", share, away, away))
    enough = 1 > _ENOUGH * jnp.sum(share**2, 0)
    usable = (enough & jnp.all(jnp.isfinite(tril), (1, 2)))[:, None]
    mean = jnp.where(usable, mean, proposal.mean)
    return Conditional(mean, jnp.where(usable[..., None], tril, proposal.scale_tril))
