"""Where the support points of a nonparametric law may lie: candidates, and ascents of D."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from scipy.stats import norm, qmc

from flowme.infer.conditional import Conditional, find
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights
from flowme.infer.mixing import directional
from flowme.levels import same_levels
from flowme.quick import soon
from flowme.study import Study


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """Where support points may lie, for the subjects of one study."""

    likelihood: Likelihood
    conditional: Conditional
    mean: np.ndarray  # E η of the fit, [effect]
    scale_tril: np.ndarray  # of Cov η of the fit, [effect, effect]

    @classmethod
    def of(cls, fit: Fit, study: Study | None) -> Search:
        joint = fit.joint
        own = fit.study if study is None else same_levels(study, fit.study)
        mean, covariance = joint.effect_moments(jax.random.key(0), fit.theta, fit.weights, own)
        likelihood = Likelihood(joint, fit.theta, fit.weights, own)
        if study is None or study is fit.study:
            conditional = fit.conditional
        else:
            conditional = find(joint, fit.theta, fit.weights, own)
        tril = np.linalg.cholesky(np.asarray(covariance) + 1e-12 * np.eye(len(mean)))
        return cls(likelihood, conditional, np.asarray(mean), tril)

    def _whiten(self, eta: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.scale_tril, (eta - self.mean).T).T

    def points(self, number: int, count: int) -> np.ndarray:
        """Quasi-random η, half around subjects' conditional distributions, half of 1.5 times the
        population's spread; others for every `number`. `[point, effect]`."""
        centre, tril = (np.asarray(x) for x in self.conditional)
        near = count // 2
        sobol = qmc.Sobol(len(self.mean) + 1, seed=number).random(_power_of_two(count))[:count]
        z = norm.ppf(np.clip(sobol[:, 1:], 1e-9, 1 - 1e-9))
        if near >= len(centre):
            subject = np.arange(near) % len(centre)
        else:
            subject = (sobol[:near, 0] * len(centre)).astype(int)
        around = centre[subject] + np.einsum("kde,ke->kd", tril[subject], z[:near])
        return np.concatenate([around, self.mean + 1.5 * z[near:] @ self.scale_tril.T])

    def ascend(
        self,
        number: int,
        count: int,
        ascents: int,
        support: np.ndarray,
        log_f: np.ndarray,
        steps: int = 1,
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """New support points where D > 0, Newton steps up from the support and from the best of
        fresh candidates; their log p(y_i | η_k); and the largest D seen."""
        fresh = self.points(number, count)
        slope = directional(self.likelihood.matrix(fresh), log_f)
        new = np.concatenate([support, fresh[np.argsort(-slope)[:ascents]]])
        for _ in range(steps):
            new = self.likelihood.in_chunks(_newton, new, self.scale_tril, log_f)
        log_p = self.likelihood.matrix(new)
        slope_new = directional(log_p, log_f)
        _, first = np.unique(np.round(self._whiten(new), 4), axis=0, return_index=True)
        first = first[slope_new[first] > 0]
        return new[first], log_p[:, first], float(max(slope.max(), slope_new.max()))


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """η ↦ log p(y_i | η; θ) of all subjects of a study."""

    joint: Joint
    theta: jax.Array
    weights: Weights
    study: Study

    def matrix(self, eta: np.ndarray) -> np.ndarray:
        """log p(y_i | η_k), `[subject, point]`."""
        return self.in_chunks(_log_p, eta).T

    def in_chunks(self, program: Callable, eta: np.ndarray, *more) -> np.ndarray:
        """`program` at all η `[point, effect]`, so many at a time as memory allows."""
        size = max(1, min(128, 2**17 // self.study.subjects.size))
        padded = np.concatenate([eta, np.repeat(eta[-1:], -len(eta) % size, 0)])
        found = [
            np.asarray(program(self.joint, self.theta, self.weights, self.study, part, *more))
            for part in np.split(padded, len(padded) // size)
        ]
        return np.concatenate(found)[: len(eta)]


def _all_subjects(joint: Joint, theta, weights, study, eta):
    """log p(y_i | η) of every subject at one and the same η, `[subject]`; NaN is impossible."""
    everywhere = jnp.broadcast_to(eta, (study.subjects.size, eta.shape[0]))
    value = joint.likelihood(joint.constrain(theta), weights, everywhere, study)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


@partial(soon, static_argnums=0)
def _log_p(joint: Joint, theta, weights, study, eta):
    return jax.vmap(lambda e: _all_subjects(joint, theta, weights, study, e))(eta)


@partial(soon, static_argnums=0)
def _newton(joint: Joint, theta, weights, study, eta, scale_tril, log_f):
    """One damped Newton step up g = log Σ_i p(y_i | η) / f_i from each η, whitened."""
    fractions = jnp.array([1.0, 0.3, 0.05, 0.0])

    def step(start):
        def g(z):
            at = start + scale_tril @ z
            return logsumexp(_all_subjects(joint, theta, weights, study, at) - log_f)

        zero = jnp.zeros_like(start)
        slope = jax.grad(g)(zero)
        values, vectors = jnp.linalg.eigh(-jax.hessian(g)(zero))
        move = vectors @ (vectors.T @ slope / jnp.maximum(jnp.abs(values), 1e-3))
        move = jnp.where(jnp.all(jnp.isfinite(move)), move, 0.0)
        move = move / jnp.maximum(1.0, jnp.linalg.norm(move))
        tried = jax.vmap(g)(fractions[:, None] * move)
        return start + scale_tril @ (fractions[jnp.argmax(tried)] * move)

    return jax.vmap(step)(eta)


def _power_of_two(count: int) -> int:
    return 2 ** math.ceil(math.log2(count))
