"""The marginal log-likelihood of a study with its gradient and Hessian, some subjects at a time.

With nodes η_ik and weights v_ik held at what they are at θ₀ (`flowme.infer.conditional`),

    ℓ_i(θ) = log Σ_k v_ik p(y_i | η_ik; θ) p(η_ik; θ)

has the value, gradient and Hessian of log p(y_i; θ) at θ₀ (Fisher's and Louis's identities):
with π_ik the normalised terms and g_ik, H_ik the derivatives of log p(y_i | η_ik) p(η_ik),

    ∇ℓ_i = Σ_k π_ik g_ik,      ∇²ℓ_i = Σ_k π_ik (H_ik + g_ik g_ikᵀ) - ∇ℓ_i ∇ℓ_iᵀ.

When a population parameter enters only by its sum with a random effect (log ka + η_ka), the nodes
move with it: ψ, and hence p(y_i | ψ), stay as they are and only p(η; θ) is differentiated. So an
ODE is solved once per node, whatever the number of parameters (`flowme.infer.references`).

One program serves every chunk of every study of the same model, with any number of nodes: both are
arguments. (It is compiled with as much care as it is worth: `flowme.quick`.) Memory does not grow
with the number of subjects.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.conditional import (
    SCOUTS,
    Conditional,
    gauss_hermite,
    gaussian_law,
    importance,
    locate,
    log_det,
    log_mean,
    population_law,
)
from flowme.infer.joint import Joint, Weights
from flowme.infer.parallel import by_chunk
from flowme.infer.quadratic import features, in_z, quadratic_form, second_order
from flowme.infer.references import References
from flowme.quick import soon, tiers
from flowme.study import Study
from flowme.where import where

CHUNK = 256  # subjects in one call of the compiled program
LARGEST = {1: 31, 2: 15, 3: 9, 4: 7}  # nodes per effect the program has room for
_BLOCK = 32  # nodes evaluated together


def next_order(effects: int, order: int) -> int:
    """The next finer rule, or the finest there is room for."""
    return min(order + 2, LARGEST[effects])


class Engine(NamedTuple):
    """What an evaluation is compiled for.

    Attributes:
        joint: the model.
        references: what `references.find` found.
        points: importance nodes per subject; 0 for adaptive Gauss-Hermite quadrature.
        tier: with how much care it is compiled (`flowme.quick`).
    """

    joint: Joint
    references: References
    points: int
    tier: int = 2


class Evaluation(NamedTuple):
    """log p(y_i; θ) of all subjects and the derivatives of their sum; NumPy arrays from
    `evaluate`, JAX ones inside its program."""

    conditional: Conditional  # mode and curvature of each p(η_i | y_i; θ)
    mean: Any  # E(η_i | y_i; θ), [subject, effect]
    covariance: Any  # Cov(η_i | y_i; θ), [subject, effect, effect]
    log_likelihood: Any  # [subject]
    gradient: Any  # [parameter]
    hessian: Any  # [parameter, parameter]
    outer: Any  # Σ_i c_i ∇ℓ_i ∇ℓ_iᵀ, [parameter, parameter]


def evaluate(
    engine: Engine,
    key: jax.Array,
    theta: np.ndarray,
    weights: Weights,
    study: Study,
    start: np.ndarray | None = None,
    *,
    order: int = 0,
    steps: int = 2,
    chunk: int = CHUNK,
    counts: np.ndarray | None = None,
    around: Conditional | None = None,
) -> Evaluation:
    """The marginal log-likelihood at θ with its derivatives, those of Σ_i c_i log p(y_i; θ).

    Args:
        engine: the model, and what is known of it.
        key: random key of the importance nodes; is consumed.
        theta: θ, `[parameter]`.
        weights: weights of the flows.
        study: the study.
        start: where modes are looked for, `[subject, effect]`; None: at η = 0 and at `SCOUTS`
            points of the population (of a study of two chunks or more, a quarter of them).
        order: Gauss-Hermite nodes per effect.
        steps: Newton steps towards the modes.
        chunk: subjects in one call of the compiled program.
        counts: how often each subject counts, c_i, `[subject]`; once by default.
        around: where nodes are placed; by default, and where it is not finite, around the modes.
    """
    counts = np.ones(study.subjects.size) if counts is None else np.asarray(counts, float)
    many = study.subjects.size >= 2 * chunk
    scouts = 0 if start is not None else SCOUTS // 4 if many else SCOUTS
    rule: Any = np.zeros((0, _BLOCK, 0)), np.zeros((0, _BLOCK)), 0
    law: Any = ()
    if order:
        rule = _rule(engine.joint.effect_size, order)
        some = jax.tree.map(lambda x: x[:chunk], study)
        of = engine.joint, engine.references
        law = quadratic_form(of, theta, weights, some)
    size = engine.joint.effect_size
    modes = np.zeros((len(counts), size)) if start is None else start
    given = around or Conditional(modes, np.full((len(counts), size, size), np.nan))
    shared = key, theta, weights, scouts, steps, rule, law
    program, static = _PROGRAMS[engine.tier], engine._replace(tier=0)
    each, sums = by_chunk(program, static, shared, (study, modes, counts, given), chunk)
    return Evaluation(*each, *sums)


@cache
def _rule(size: int, order: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Gauss-Hermite nodes and log weights in blocks, and how many blocks count."""
    most = -(-(LARGEST[size] ** size) // _BLOCK)
    grid, log_weight = gauss_hermite(size, order)
    points, logs = np.zeros((most * _BLOCK, size)), np.full(most * _BLOCK, -np.inf)
    points[: len(grid)], logs[: len(grid)] = grid, log_weight
    shape = (most, _BLOCK)
    return points.reshape(*shape, size), logs.reshape(shape), -(-len(grid) // _BLOCK)


class _Sums(NamedTuple):
    """Means over a subject's nodes under π_ik; derivatives by the two parts of θ."""

    log_likelihood: jax.Array  # [subject]
    first: jax.Array  # ∇ℓ_i, [subject, part]
    second: jax.Array  # Σ_i c_i Σ_k π_ik (H_ik + g_ik g_ikᵀ), [part, part]
    away: jax.Array  # E η_i - m_i, m_i the centre of the nodes, [subject, effect]
    spread: jax.Array  # E (η_i - m_i)(η_i - m_i)ᵀ, [subject, effect, effect]


def _of_chunk(engine, shared, chunk) -> tuple[tuple, tuple]:
    """`evaluate` for one chunk: what is of each subject, and the sums."""
    key, theta, weights, scouts, steps, rule, law = shared
    number, real, (study, start, counts, given) = chunk
    counts = real * counts
    conditional = locate(engine.joint, theta, weights, study, start, scouts, steps)
    usable = jnp.all(jnp.isfinite(given.scale_tril), (1, 2)) & jnp.all(jnp.isfinite(given.mean), 1)
    placed = Conditional(
        where(usable[:, None], given.mean, conditional.mean),
        where(usable[:, None, None], given.scale_tril, conditional.scale_tril),
    )
    if engine.points:
        key = jax.random.fold_in(key, number)
        found = _by_importance(engine, key, theta, weights, study, placed, counts)
    else:
        found = _by_quadrature(engine, theta, weights, study, placed, counts, rule, law)
    covariance = found.spread - found.away[:, :, None] * found.away[:, None, :]
    into = _places(engine)
    score = where(counts[:, None] > 0, found.first @ into, 0.0)
    outer = score.T @ (counts[:, None] * score)
    each = conditional, placed.mean + found.away, covariance, found.log_likelihood
    return each, (counts @ score, into.T @ found.second @ into - outer, outer)


_PROGRAMS = tiers(_of_chunk, static_argnums=0)
_ODE = 20  # how much longer an ODE takes than a closed form


def work(engine: Engine, study: Study, nodes: float) -> float:
    """How many predictions of a record, by a closed form with one dose and derivatives by one
    parameter, those at so many nodes of every subject take as long as."""
    records = sum(np.size(mask) for mask in study.observed.values())
    free = engine.references.of_likelihood(engine.joint).size
    derivatives = (1 + 1.5 * free * (free + 1)) / 4  # three for each pair of parameters
    doses = max(1, study.doses.amount.shape[1])
    return nodes * records * derivatives * doses * (_ODE if engine.references.loops else 1)


def _places(engine: Engine) -> np.ndarray:
    """1 where an element of the two parts of θ, that of the likelihood and that of the density of
    the random effects, is parameter a, `[part, parameter]`."""
    joint, references = engine.joint, engine.references
    parts = [references.of_likelihood(joint), references.of_density(joint)]
    return np.eye(joint.size)[np.concatenate(parts)]


def _by_quadrature(engine, theta, weights, study, conditional, counts, rule, law) -> _Sums:
    """Nodes η_ik = m_i + L_i z_k; for Gaussian effects.

    Their log density is q(θ)ᵀ T(u_ik) with u the effects whitened and T(u) = (1, u, u uᵀ), and
    c_iᵀ T(z_k): its derivatives need those of q and the means of T Tᵀ alone, and no node's own.
    """
    joint, references = engine.joint, engine.references
    mean, tril = conditional
    subjects, d = mean.shape
    points, log_weight, blocks = rule
    likelihood, _ = shifted(joint, references, theta, weights, study)
    white, (quadratic, q1, q2) = law
    into = in_z(mean @ white.T, white @ tril)
    c = into @ quadratic
    free = theta[references.of_likelihood(joint)]

    def add(number, sums):
        top, squares, cross, own = sums
        z, T = points[number], features(points[number])
        eta = mean + jnp.einsum("sde,ke->ksd", tril, z)
        f, f1, f2 = second_order(lambda part: likelihood(part, eta), free)
        value = f + T @ c.T + log_weight[number][:, None]
        new, fade, w = _weigh(top, value)
        f1 = where(w[..., None] > 0, f1, 0.0)
        f2 = where(w[..., None, None] > 0, f2, 0.0)
        weighted = w[..., None] * f1
        squared = w.T @ (T[:, :, None] * T[:, None, :]).reshape(len(T), -1)
        return (
            new,
            fade[:, None] * squares + squared,
            fade[:, None, None] * cross + jnp.einsum("ksp,kt->spt", weighted, T),
            fade[:, None, None] * own
            + jnp.einsum("ksp,ksq->spq", weighted, f1) + jnp.einsum("ks,kspq->spq", w, f2),
        )  # fmt: skip

    t, q = c.shape[1], free.size
    shapes = [(t * t,), (q, t), (q, q)]
    empty = (jnp.full(subjects, -jnp.inf), *(jnp.zeros((subjects, *shape)) for shape in shapes))
    top, squares, cross, own = jax.lax.fori_loop(0, blocks, add, empty)
    total = squares[:, 0]
    squares = (squares / total[:, None]).reshape(subjects, t, t)
    cross, own = cross / total[:, None, None], own / total[:, None, None]
    once = jnp.einsum("st,stu->su", squares[:, 0], into)  # means of T(u), of its square
    twice = _total(counts, jnp.swapaxes(into, 1, 2) @ squares @ into)
    side = _total(counts, cross @ into) @ q1
    both = jnp.einsum("u,upq->pq", _total(counts, once), q2) + q1.T @ twice @ q1
    return _Sums(
        top + jnp.log(total) + log_det(tril),
        jnp.concatenate([cross[:, :, 0], once @ q1], 1),
        jnp.block([[_total(counts, own), side], [side.T, both]]),
        jnp.einsum("sde,se->sd", tril, squares[:, 0, 1 : 1 + d]),
        jnp.einsum("sde,sef,sgf->sdg", tril, squares[:, 1 : 1 + d, 1 : 1 + d], tril),
    )


def _by_importance(engine, key, theta, weights, study, conditional, counts) -> _Sums:
    """Importance nodes; for any law."""
    joint, references = engine.joint, engine.references
    mean = conditional.mean
    subjects, effects = mean.shape
    moments = joint.effect_moments(jax.random.key(0), theta, weights, study)
    broad = gaussian_law(moments[0], moments[1], subjects)
    nodes, _ = importance(key, conditional, broad, engine.points)
    likelihood, density = shifted(joint, references, theta, weights, study)
    free, own = (theta[x] for x in (references.of_likelihood(joint), references.of_density(joint)))

    def add(number, sums):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=number * _BLOCK, slice_size=_BLOCK)
        eta, away = cut(nodes.eta), cut(nodes.eta) - mean
        f, f1, f2 = second_order(lambda part: likelihood(part, eta), free)
        g, g1, g2 = second_order(lambda part: density(part, eta), own)
        new, fade, w = _weigh(sums[0], f + g + cut(nodes.log_weight))
        gradient = where(w[..., None] > 0, jnp.concatenate([f1, g1], -1), 0.0)
        curved = [
            jnp.einsum("ks,kspq->spq", w, where(w[..., None, None] > 0, h, 0.0)) for h in (f2, g2)
        ]
        added = (
            w.sum(0),
            jnp.einsum("ks,ksp->sp", w, gradient),
            jnp.einsum("ksp,ksq->spq", w[..., None] * gradient, gradient)
            + jax.vmap(jax.scipy.linalg.block_diag)(*curved),
            jnp.einsum("ks,ksd->sd", w, away),
            jnp.einsum("ksd,kse->sde", w[..., None] * away, away),
        )
        return new, *(_wide(fade, a) * a + b for a, b in zip(sums[1:], added, strict=True))

    p = free.size + own.size
    shapes = [(), (p,), (p, p), (effects,), (effects, effects)]
    empty = (jnp.full(subjects, -jnp.inf), *(jnp.zeros((subjects, *shape)) for shape in shapes))
    top, total, *sums = jax.lax.fori_loop(0, engine.points // _BLOCK, add, empty)
    first, second, away, spread = (x / _wide(total, x) for x in sums)
    return _Sums(top + jnp.log(total), first, _total(counts, second), away, spread)


def _total(counts: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_i c_i x_i; a subject that counts 0 times may be one that the model cannot predict."""
    return jnp.tensordot(counts, where(_wide(counts, x) > 0, x, 0.0), 1)


@partial(soon, static_argnums=0)
def scores(engine: Engine, key, theta, weights, study, conditional) -> jax.Array:
    """∇ log p(y_i; θ) of every subject, `[subject, parameter]`, the weights of flows held."""
    joint, references = engine.joint, engine.references
    broad = population_law(joint, theta, weights, study)
    nodes, _ = importance(key, conditional, broad, engine.points)
    likelihood, density = shifted(joint, references, theta, weights, study)
    free, own = references.of_likelihood(joint), references.of_density(joint)

    def marginal(theta):
        f = likelihood(theta[free], nodes.eta)
        return log_mean(f, density(theta[own], nodes.eta), nodes.log_weight)

    return jax.jacfwd(marginal)(theta)


def _weigh(top, value):
    """The largest value so far, what older weights are to be multiplied by, and the weights
    exp(value - largest); a node at which the model is not finite is impossible."""
    value = where(jnp.isfinite(value), value, -jnp.inf)
    new = jnp.maximum(top, value.max(0))
    safe = where(jnp.isfinite(new), new, 0.0)
    return new, jnp.exp(top - safe), jnp.exp(value - safe)


def shifted(joint: Joint, references: References, theta0, weights, study):
    """log p(y_i | η_ik) as a function of the elements `of_likelihood` of θ and of nodes, and
    log p(η_ik) as one of those `of_density` and of nodes, both `[node, subject]`; the nodes η_ik
    `[node, subject, effect]` are those at θ₀ and move with referenced parameters: ψ stays."""
    matrix, own = references.matrix(joint), references.of_density(joint)
    of_likelihood, of_density = references.likelihood_sites(joint), references.density_sites(joint)
    held = joint.constrain(theta0)

    def likelihood(part, eta):
        # Only these carry derivatives: nothing else may seem to depend on them.
        values = {**held, **joint.constrain(part, of_likelihood)}
        return jax.vmap(lambda e: joint.likelihood(values, weights, e, study))(eta)

    def density(part, eta):
        values = {**held, **joint.constrain(part, of_density)}
        shift = matrix[:, own] @ (part - theta0[own])
        return jax.vmap(lambda e: joint.effect_density(values, weights, e, study))(eta - shift)

    return likelihood, density


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """x `[subject]` with axes added until it goes with `like`."""
    return x.reshape(-1, *[1] * (like.ndim - 1))
