"""Variational EM: maximum marginal likelihood of population parameters and flow weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from tqdm.auto import tqdm

from flowme.effects import GaussianRandomEffect, RandomEffect
from flowme.infer.conditional import Conditional
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.infer.learn import Learn, LearnState, side_by_side
from flowme.infer.marginal import marginal_log_likelihood
from flowme.infer.newton import Newton, NewtonState, References, references
from flowme.primitives import replace_effect
from flowme.study import Study

# Gauss-Hermite nodes per effect, by number of effects; beyond, importance sampling.
_ORDER = {1: 15, 2: 9, 3: 5, 4: 4}

_BLOCK = 5  # updates of a flow in one compiled call, between two moves of the progress bar
_PATIENCE = 15  # updates without a better held-out likelihood after which a flow is stopped


class VEMState(NamedTuple):
    """Where an estimation stands, and which of the two iterations moves it."""

    key: jax.Array
    weights: dict[str, jax.Array]  # those the Newton iteration holds
    engine: Newton | Learn
    inner: NewtonState | LearnState


class VariationalEM:
    """Estimate a population model by maximum marginal likelihood (or MAP).

    Every iteration places a full-covariance Gaussian around the conditional distribution of each
    subject's random effects (mode and curvature), integrates over it by nodes, and takes a
    trust-region Newton step of the population parameters on the marginal likelihood
    (`flowme.infer.newton`). Laws other than the Gaussian are started from the Gaussian fit; a flow
    is then learned by stochastic EM and stopped on held-out subjects (`flowme.infer.learn`).

    Args:
        model: a function of a study, written with flowme's and NumPyro's statements.
        use_priors: maximise log p(y; θ) + log p(θ) (MAP). By default priors only give supports
            and starting values. A flow's weights are kept small by early stopping in both cases.
        tolerance: the iteration has converged when a full step is expected to add less than this
            to the log-likelihood.
        max_iterations: of the Newton iteration.
        points: importance points per subject, where quadrature does not serve (laws that are not
            Gaussian, more than four effects).
        flow_updates: at most so many updates of a flow.
        folds: folds over subjects that choose when to stop a flow; 0: never stop early.
        optimizer: optax optimiser of the flow's weights.

    Example:
        >>> fit = VariationalEM(model).run(jax.random.key(0), study)  # doctest: +SKIP
        >>> fit.params["ka"], fit.minus_two_ll, fit.converged  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Callable,
        *,
        use_priors: bool = False,
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        points: int = 256,
        flow_updates: int = 60,
        folds: int = 5,
        optimizer: optax.GradientTransformation | None = None,
    ):
        if not callable(model):
            raise TypeError(f"expected a model, a function of a study; got {model!r}.")
        if folds == 1 or folds < 0:
            raise ValueError(f"expected folds to be 0 (none) or at least 2; got {folds}.")
        self.model = model
        self.use_priors = use_priors
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.points = points
        self.flow_updates = flow_updates
        self.folds = folds
        self.optimizer = optax.adam(1e-2) if optimizer is None else optimizer
        self._programs: dict[Any, Any] = {}  # compiled programs, for studies of the same shape

    def init(self, key: jax.Array, study: Study, init: dict[str, Any] | None = None) -> VEMState:
        """The state at the starting values of the model, or at those of `init`, by name."""
        joint = Joint.of(self.model, study)
        theta, weights = joint.unconstrain(init or {}), start_weights(joint)
        newton = self._newton(joint, theta, weights, study)
        state = self._run(newton, "start")(key, theta, weights, study)
        if not weights:
            return VEMState(key, weights, newton, state)
        learn = self._learn(joint, newton.references)
        return VEMState(key, weights, learn, learn.start(theta, weights, state.conditional))

    def update(self, state: VEMState, study: Study) -> tuple[VEMState, jax.Array]:
        """One iteration: a Newton step or, for a flow, an EM update; and minus the objective."""
        if isinstance(state.engine, Newton):
            inner = self._run(state.engine, "step")(state.key, state.inner, state.weights, study)
            state = state._replace(inner=inner)
        else:
            key, key_update = jax.random.split(state.key)
            everyone = jnp.ones(study.subjects.size)
            inner = self._run(state.engine, "update")(key_update, state.inner, everyone, study)
            state = state._replace(key=key, inner=inner)
        return state, self.evaluate(state)

    def evaluate(self, state: VEMState, study: Study | None = None) -> jax.Array:
        """Minus the objective at the state (for a flow: before its last update)."""
        del study
        if isinstance(state.inner, NewtonState):
            return -state.inner.objective
        return -jnp.sum(state.inner.log_likelihood)

    def run(
        self,
        key: jax.Array,
        study: Study,
        *,
        init: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> Fit:
        """Estimate the model on `study`.

        Args:
            key: random key; is consumed.
            study: the study.
            init: starting values of population parameters by name, in place of the model's.
            progress: show a progress bar. Interrupting (Ctrl-C) ends the iteration under way and
                returns the fit as far as it got, marked as not converged.

        Raises:
            ValueError: the model or the starting values do not fit the study.
        """
        joint = Joint.of(self.model, study)
        laws = {name: law for name, law in joint.roles.laws.items() if _needs_start(law)}
        keys = jax.random.split(key, 4)
        if not laws:
            course = self._climb(keys[0], joint, init or {}, study, progress)
        else:
            gaussian = Joint.of(replace_effect(self.model, **_gaussians(laws)), study)
            known = {k: v for k, v in (init or {}).items() if k in gaussian.roles.population}
            first = self._climb(keys[0], gaussian, known, study, progress)
            values, weights = _start(keys[1], joint, laws, first, init or {})
            if weights:
                course = self._learn_flow(keys[2], joint, values, weights, first, study, progress)
            else:
                course = self._climb(keys[2], joint, values, study, progress)
        return self._finish(keys[3], course, study)

    # The Newton iteration.

    def _newton(self, joint: Joint, theta, weights, study: Study) -> Newton:
        order = 0
        if all(_is_gaussian(law) for law in joint.roles.laws.values()) and joint.roles.laws:
            order = _ORDER.get(joint.effect_size, 0)
        found = references(joint, theta, weights, study)
        return Newton(joint, found, order, self.points, self.use_priors)

    def _climb(self, key, joint: Joint, values, study: Study, progress: bool) -> _Course:
        """Newton steps to the maximum."""
        theta, weights = joint.unconstrain(values), start_weights(joint)
        newton = self._newton(joint, theta, weights, study)
        state = self._run(newton, "start")(key, theta, weights, study)
        step, history, converged = self._run(newton, "step"), [float(state.objective)], False
        why = f"not converged after {self.max_iterations} iterations: raise max_iterations"
        title = "VariationalEM, " + ", ".join(type(v).__name__ for v in joint.roles.laws.values())
        with tqdm(total=None, desc=title, disable=not progress) as bar:
            try:
                for _ in range(self.max_iterations):
                    state = step(key, state, weights, study)
                    history.append(float(state.objective))
                    bar.update()
                    bar.set_postfix_str(f"-2LL {-2 * history[-1]:.3f}, gain {state.gain:.1e}")
                    if bool(state.accepted) and float(state.gain) < self.tolerance:
                        converged, why = True, ""
                        break
                    if not np.isfinite(history[-1]) and len(history) > 5:
                        why = "stopped: the marginal likelihood is not finite"
                        break
            except KeyboardInterrupt:
                why = f"stopped by the user after {len(history) - 1} iterations"
        return _Course(
            joint, state.theta, weights, state.conditional, history, converged, why, newton
        )

    # The flow.

    def _learn(self, joint: Joint, found: References) -> Learn:
        return Learn(joint, found, self.optimizer, 64, 8, 10, self.use_priors)

    def _learn_flow(self, key, joint: Joint, values, weights, first: _Course, study, progress):
        """Updates of the flow from the Gaussian fit, as many as held-out subjects ask for.

        The folds and the fit to all subjects run side by side; the latter is read off where the
        former are best.
        """
        learn = self._learn(joint, first.newton.references)
        start = learn.start(joint.unconstrain(values), weights, first.conditional)
        key_fold, key_run = jax.random.split(key)
        count = min(self.folds, study.subjects.size)
        folds = jax.random.permutation(key_fold, jnp.arange(study.subjects.size) % max(count, 1))
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (count + 1, *jnp.shape(x))), start)
        program = self._program(
            (learn, "folds", count),
            lambda: lambda *arguments: side_by_side(learn, *arguments, updates=_BLOCK),
        )
        blocks: list[Any] = []
        why, converged = "", first.converged
        title = f"Flow, {count} folds side by side" if count else "Flow"
        with tqdm(total=self.flow_updates, desc=title, disable=not progress) as bar:
            try:
                for k in jax.random.split(key_run, -(-self.flow_updates // _BLOCK)):
                    states, block = program(k, states, folds, study)
                    blocks.append(jax.tree.map(np.asarray, block))
                    bar.update(_BLOCK)
                    path = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
                    gain = -2 * (path.held_out - path.held_out[0]).sum(1)
                    bar.set_postfix_str(
                        f"held-out -2LL {gain[-_BLOCK:].mean():+.1f} against the Gaussian"
                        if count
                        else f"-2LL {-2 * path.log_likelihood[-1]:.1f}"
                    )
                    if count and np.argmin(_smooth(gain)) < len(gain) - _PATIENCE:
                        break
            except KeyboardInterrupt:
                why, converged = "stopped by the user while learning the flow", False
        if not blocks:
            return first._replace(why=why, converged=False)
        selection = (path.held_out - path.held_out[0]).sum(1) if count else None
        best = _stopping_time(path.held_out) if count else len(path.theta) - 1
        theta, weights = jax.tree.map(lambda x: jnp.asarray(x[best]), (path.theta, path.weights))
        moved = jnp.asarray(learn.references.matrix(joint)) @ (theta - start.theta)
        conditional = start.conditional._replace(mean=start.conditional.mean - moved)
        history = [*first.history, *path.log_likelihood[: best + 1]]
        newton = Newton(joint, learn.references, 0, self.points, self.use_priors)
        return _Course(
            joint, theta, weights, conditional, history, converged, why, newton, selection
        )

    # The end.

    def _finish(self, key, course: _Course, study: Study) -> Fit:
        key_marginal, key_information = jax.random.split(key)
        joint, theta, weights = course.joint, course.theta, course.weights
        marginal = marginal_log_likelihood(key_marginal, joint, theta, weights, study)
        information = self._information(key_information, course, study)
        messages = [course.why] if course.why else []
        messages += _failed(marginal.log_likelihood, joint, course, study)
        return Fit(
            joint=joint,
            study=study,
            theta=theta,
            weights=weights,
            conditional=course.conditional,
            log_likelihood=marginal.log_likelihood,
            log_likelihood_se=marginal.standard_error,
            information=information,
            history=np.asarray(course.history),
            converged=course.converged,
            messages=tuple(messages),
            use_priors=self.use_priors,
            selection=course.selection,
        )

    def _information(self, key, course: _Course, study: Study) -> np.ndarray:
        """Observed information of θ; with a flow, the outer product of the subjects' scores."""
        state = NewtonState(course.theta, course.conditional, *([jnp.zeros(())] * 5))
        if course.weights:  # second derivatives through the flow cost more than they tell
            newton = course.newton._replace(count=64)
            scores = np.asarray(self._run(newton, "scores")(key, state, course.weights, study))
            return scores.T @ scores
        program = self._run(course.newton, "derivatives")
        return -np.asarray(program(key, state, course.weights, study)[1])

    def _run(self, engine: Newton | Learn, method: str) -> Callable:
        return self._program((engine, method), lambda: getattr(engine, method))

    def _program(self, key: tuple, make: Callable) -> Callable:
        """The compiled program of an engine, kept for studies of the same shape."""
        engine, *rest = key
        name = (type(engine), engine.joint.signature, engine.references, *rest)
        if name not in self._programs:
            self._programs[name] = jax.jit(make())
        return self._programs[name]


class _Course(NamedTuple):
    """How an estimation went."""

    joint: Joint
    theta: jax.Array
    weights: dict[str, jax.Array]
    conditional: Conditional
    history: list[float]
    converged: bool
    why: str
    newton: Newton
    selection: np.ndarray | None = None


def _is_gaussian(law: dist.Distribution) -> bool:
    if isinstance(law, dist.Independent):
        return _is_gaussian(law.base_dist)
    return isinstance(law, GaussianRandomEffect | dist.Normal | dist.MultivariateNormal)


def _needs_start(law: dist.Distribution) -> bool:
    return isinstance(law, RandomEffect) and not isinstance(law, GaussianRandomEffect)


def _gaussians(laws: dict[str, RandomEffect]) -> dict[str, GaussianRandomEffect]:
    """The Gaussian that each law is started from, with the same freedom of correlation."""
    return {
        name: GaussianRandomEffect(law.names, full=getattr(law, "full", False))
        for name, law in laws.items()
    }


def _start(key, joint: Joint, laws, first: _Course, init):
    """Values and weights to start `joint` from, given the Gaussian fit."""
    values = {k: np.asarray(v) for k, v in first.joint.constrain(first.theta).items()}
    values = {k: v for k, v in values.items() if k in joint.roles.population}
    weights = start_weights(joint)
    keys = jax.random.split(key, len(laws) + 1)
    noise = jax.random.normal(keys[0], (8, *first.conditional.mean.shape))
    draws = first.conditional.mean + jnp.einsum(
        "sde,kse->ksd", first.conditional.scale_tril, noise
    )
    gaussian = first.joint.constrain(first.theta)
    for k, (name, law) in zip(keys[1:], laws.items(), strict=True):
        eta = np.asarray(first.joint.split(draws.reshape(-1, draws.shape[-1]))[name])
        parameters = {
            parameter.removeprefix(f"{name}_"): value
            for parameter, value in gaussian.items()
            if first.joint.roles.population[parameter].effect == name
        }
        covariance = first.joint.roles.laws[name].with_parameters(**parameters).covariance_matrix
        for parameter, value in law.start(k, np.asarray(covariance), eta).items():
            target = weights if parameter == "weights" else values
            target[f"{name}_{parameter}"] = value
    # Where the Gaussian fit ended is a better start than where it began.
    return {**init, **values}, weights


def _stopping_time(held_out: np.ndarray) -> int:
    """The number of updates with the best held-out likelihood; 0, the Gaussian, unless it is
    better by more than one standard error of the difference.

    Args:
        held_out: log p(y_i) by the fold that does not see subject i, `[update, subject]`.
    """
    gain = held_out - held_out[0]
    total = _smooth(gain.sum(1))
    best = int(np.argmax(total))
    error = np.sqrt(held_out.shape[1]) * gain[best].std(ddof=1)
    return best if total[best] > error else 0


def _smooth(curve: np.ndarray) -> np.ndarray:
    """A running mean of five: each update draws fresh nodes, so the curve is noisy."""
    return np.convolve(np.pad(curve, 2, mode="edge"), np.ones(5) / 5, mode="valid")


def _failed(log_likelihood: np.ndarray, joint: Joint, course: _Course, study: Study) -> list[str]:
    """One message for the subjects whose likelihood is not finite."""
    bad = np.flatnonzero(~np.isfinite(log_likelihood))
    if not bad.size:
        return []
    psi = joint.individual(course.theta, course.weights, course.conditional.mean, study)
    where = "; ".join(
        f"{name} = "
        + ", ".join(f"{p} {v:.3g}" for p, v in zip(joint.roles.individual[name], x[bad[0]]))
        for name, x in psi.items()
    )
    names = ", ".join(str(study.subjects.ids[i]) for i in bad[:5])
    return [
        f"the model is not finite for {bad.size} subject(s): {names}"
        f"{', ...' if bad.size > 5 else ''} (the first at {where}). If it is an ODE, its solver "
        "failed: raise max_steps, loosen rtol, use a stiff solver, or start from other values."
    ]
