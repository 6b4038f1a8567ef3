"""Population parameters by trust-region Newton steps on the marginal log-likelihood.

A step of Newton's method on ℓ(θ) at fixed nodes (`flowme.infer.evaluate`), after which the nodes
are placed anew, is one on the likelihood itself: an EM iteration with the missing information
taken off the curvature, and quadratic instead of linear convergence.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from flowme.effects import GaussianRandomEffect
from flowme.infer.evaluate import CHUNK, Engine, Evaluation, evaluate, work
from flowme.infer.joint import Joint, Weights
from flowme.infer.moments import by_moments
from flowme.infer.references import find
from flowme.quick import begun, serves, soon, tier
from flowme.study import Study

# Gauss-Hermite nodes per effect while climbing, by number of effects: far from the maximum, near
# it, and around means where modes do not serve (the most there is room for); for more effects,
# importance sampling.
ORDER = {1: (7, 15, 31), 2: (5, 9, 15), 3: (3, 5, 9), 4: (3, 4, 7)}
FAR, NEAR, MEANS = range(3)
_MORE = 10  # times as many steps towards modes, with importance sampling
_AGAIN = 50  # steps when modes are looked for anew: on a ridge ten did not get to all of them
_PROMISE = 5.0  # log-likelihood that a step promises near the maximum
_EASY = 20  # evaluations of a fit that has no difficulties, near and far from the maximum
STUCK = 1e-2  # a radius of the trust region that says that the nodes are at fault, not the step


class NewtonState(NamedTuple):
    """Where the iteration stands."""

    theta: np.ndarray  # [parameter], unconstrained
    evaluation: Evaluation  # at θ
    objective: float  # log p(y; θ), plus log p(θ) for MAP
    gradient: np.ndarray  # of the objective
    hessian: np.ndarray
    radius: float  # of the trust region, in the unit of θ
    rule: int  # by which it is integrated: FAR or NEAR around modes, MEANS around means
    gain: float  # what a full Newton step promises to add to the objective


class Newton(NamedTuple):
    """The iteration for one model.

    Attributes:
        engine: what is evaluated.
        use_priors: maximise log p(y; θ) + log p(θ).
        chunk: subjects in one call of the compiled program.
        counts: how often each subject counts, `[subject]`; None: once.
        held: places in θ that stay as they are.
        serves: how often its program will be used (`flowme.quick`).
    """

    engine: Engine
    use_priors: bool = False
    chunk: int = CHUNK
    counts: np.ndarray | None = None
    held: tuple[int, ...] = ()
    serves: int = 1

    def work(self, evaluations: int, study: Study) -> float:
        """How much so many evaluations are, in predictions of a record (`flowme.quick`)."""
        size = self.engine.joint.effect_size
        nodes = self.engine.points or ORDER[size][NEAR] ** size
        return work(self.engine, study, evaluations * nodes)

    def after(self, evaluations: int, study: Study) -> Newton:
        """The same, compiled with the care that is due after so many evaluations."""
        care = max(self.engine.tier, tier(self.serves * self.work(evaluations, study)))
        return self._replace(engine=self.engine._replace(tier=care))

    def start(self, key, theta, weights, study) -> NewtonState:
        """The state at θ, the modes found by ten steps from the best of some points."""
        rule = NEAR if led(study, self.chunk) else FAR
        return self._at(key, np.asarray(theta), weights, study, None, 10, 1.0, rule)

    def near(self, key, theta, weights, study, modes) -> NewtonState:
        """The state at θ close to a maximum, the modes known but for two steps."""
        return self._at(key, np.asarray(theta), weights, study, np.asarray(modes), 2, 1.0, NEAR)

    def again(self, key, state: NewtonState, weights, study) -> NewtonState:
        """The state at the same θ, the modes looked for anew."""
        rule, steps = min(state.rule, NEAR), 10 if self.engine.points else _AGAIN
        new = self._at(key, state.theta, weights, study, None, steps, state.radius, rule)
        return self.finer(key, new, weights, study) if state.rule == MEANS else new

    def finer(self, key, state: NewtonState, weights, study) -> NewtonState:
        """The state at the same θ by the next rule."""
        still, radius = np.zeros_like(state.theta), max(state.radius, 0.1)
        return self._moved(key, state, weights, study, still, radius, state.rule + 1)

    def seen_by_means(self, key, state: NewtonState, weights, study) -> NewtonState:
        """The state at the same θ, by as many nodes around means."""
        found = state.evaluation
        return self._at(
            key, state.theta, weights, study, found.conditional.mean, 0, state.radius, state.rule,
            by_moments(found.mean, found.covariance),
        )  # fmt: skip

    def step(self, key, state: NewtonState, weights, study) -> NewtonState:
        """One trust-region step: accepted if it adds a tenth of what it promised."""
        if state.rule == FAR and (state.gain < _PROMISE or state.radius < STUCK):
            return self.finer(key, state, weights, study)
        move, promised, _ = trust_region(state.gradient, state.hessian, state.radius)
        new = self._moved(key, state, weights, study, move, state.radius, state.rule)
        noise = 1e-9 * (1 + abs(state.objective))
        ratio = (new.objective - state.objective + noise) / (promised + noise)
        length = float(np.linalg.norm(move))
        if not ratio > 0.1:  # worse, or not a number
            return state._replace(radius=0.3 * min(length, state.radius))
        return new._replace(radius=max(state.radius, 2.5 * length) if ratio > 0.7 else state.radius)

    def added(self, key, state: NewtonState, weights, study) -> float:
        """What a full step, whose promise is `gain`, adds to the objective."""
        move, *_ = trust_region(state.gradient, state.hessian, np.inf)
        new = self._moved(key, state, weights, study, move, state.radius, state.rule)
        return new.objective - state.objective

    def finish(self, key, state, weights, study, tolerance=1e-3, most=50):
        """Steps until a full one is expected to add less than the tolerance, and that one, which
        squares what was left; whether it came to this."""
        for _ in range(most):
            if state.gain < tolerance or not np.isfinite(state.objective):
                break
            state = self.step(key, state, weights, study)
        if done := bool(state.gain < tolerance):
            state = self.step(key, state, weights, study)
        return state, done

    def _moved(self, key, state: NewtonState, weights, study, move, radius, rule) -> NewtonState:
        """The state at θ + move, its nodes where those of the state lead."""
        found, shift = state.evaluation, self.engine.references.matrix(self.engine.joint) @ move
        modes = found.conditional.mean - shift
        around = by_moments(found.mean - shift, found.covariance) if rule == MEANS else None
        theta = state.theta + move
        return self._at(key, theta, weights, study, modes, 2, radius, rule, around)

    def _at(
        self, key, theta, weights, study, modes, steps, radius, rule, around=None
    ) -> NewtonState:
        order = 0 if self.engine.points else ORDER[self.engine.joint.effect_size][rule]
        if self.engine.points:  # around what is no mode, they see nothing; a step costs few nodes
            steps *= _MORE
        found = evaluate(
            self.engine, key, theta, weights, study, modes,
            order=order, steps=steps, chunk=self.chunk, counts=self.counts, around=around,
        )  # fmt: skip
        values = [_total(found.log_likelihood, self.counts), found.gradient, found.hessian]
        if self.use_priors:
            prior = _log_prior(self.engine.joint, theta, jax.tree.map(lambda x: x[:1], study))
            values = [a + np.asarray(b) for a, b in zip(values, prior, strict=True)]
        objective, gradient, hessian = values
        if self.held:
            gradient, hessian = _hold(self.held, gradient, hessian)
        *_, gain = trust_region(gradient, hessian, np.inf)
        return NewtonState(theta, found, float(objective), gradient, hessian, radius, rule, gain)


def led(study: Study, count: int) -> bool:
    """Whether `count` subjects of the study lead the others, so that θ begins near the maximum."""
    return study.subjects.size >= 2 * count


def integrable(joint: Joint) -> bool:
    """Whether a model is integrated by quadrature: its effects are Gaussian, and at most four."""
    laws = joint.roles.laws
    gaussian = all(isinstance(laws.get(n), GaussianRandomEffect) for n in joint.roles.effects)
    return gaussian and joint.effect_size in ORDER


def newton_of(
    joint: Joint,
    theta,
    weights: Weights,
    study: Study,
    *,
    use_priors: bool,
    points: int = 256,
    chunk: int = CHUNK,
    fits: float = 0.0,
) -> Newton:
    """The iteration for a model: by quadrature if that serves, else by `points` importance nodes
    per subject. It is compiled as is worth it for so many fits, by default for one more than there
    were before."""
    points = 0 if integrable(joint) else points
    engine = Engine(joint, find(joint, theta, weights, study), points)
    newton = Newton(engine, use_priors, chunk, serves=serves())
    once = newton.work(_EASY, study)
    care = tier(newton.serves * (fits * once if fits else begun(joint, engine[1:-1], once)))
    return newton._replace(engine=engine._replace(tier=care))


def _total(log_likelihood: np.ndarray, counts: np.ndarray | None) -> float:
    """Σ_i c_i log p(y_i), whatever the subjects that do not count."""
    if counts is None:
        return log_likelihood.sum()
    return float(np.sum(np.where(counts > 0, counts * log_likelihood, 0.0)))


def _hold(held: tuple[int, ...], gradient: np.ndarray, hessian: np.ndarray):
    """Gradient and Hessian of an objective that gains nothing from moving these places."""
    gradient, hessian = gradient.copy(), hessian.copy()
    gradient[list(held)] = 0.0
    hessian[list(held)], hessian[:, list(held)] = 0.0, 0.0
    hessian[held, held] = -1.0
    return gradient, hessian


@partial(soon, static_argnums=0)
def _log_prior(joint: Joint, theta, study: Study):
    def value(theta):
        return joint.log_prior(theta, study)

    return value(theta), jax.grad(value)(theta), jax.hessian(value)(theta)


def trust_region(gradient: np.ndarray, hessian: np.ndarray, radius: float):
    """The step that maximises gᵀs - sᵀ|H|s/2 within ‖s‖ <= radius, that maximum, and the maximum
    over all steps.

    |H| has the absolute eigenvalues of the Hessian: where the likelihood is not concave the step
    still goes up.
    """
    if not (np.all(np.isfinite(gradient)) and np.all(np.isfinite(hessian))):
        return np.zeros_like(gradient), 0.0, np.inf
    values, vectors = np.linalg.eigh(-0.5 * (hessian + hessian.T))
    values = np.maximum(np.abs(values), 1e-9 * np.max(np.abs(values), initial=1e-300))
    slope = vectors.T @ gradient
    low, high = 0.0, float(np.linalg.norm(slope)) / radius
    if np.linalg.norm(slope / values) <= radius:
        high = 0.0
    for _ in range(60):  # bisection for the damping at which the step is as long as the radius
        middle = 0.5 * (low + high)
        too_long = np.linalg.norm(slope / (values + middle)) > radius
        low, high = (middle, high) if too_long else (low, middle)
    move = slope / (values + high)
    promised = slope @ move - 0.5 * move @ (values * move)
    return vectors @ move, float(promised), 0.5 * float(np.sum(slope**2 / values))
