"""Variational EM: maximum marginal likelihood of population parameters and flow weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from tqdm.auto import tqdm

from flowme.effects import GaussianRandomEffect, MixtureRandomEffect, RandomEffect
from flowme.infer.clock import Clock
from flowme.infer.conditional import Conditional
from flowme.infer.doubts import doubts
from flowme.infer.evaluate import CHUNK, LARGEST, Engine, evaluate, scores
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.infer.learn import Block, Learn, LearnState, side_by_side
from flowme.infer.marginal import MarginalLikelihood, by_quadrature, estimate_marginal, spread
from flowme.infer.newton import ORDER, Newton, NewtonState, newton_of
from flowme.infer.references import References
from flowme.primitives import replace_effect
from flowme.study import Study

_BLOCK = 5  # updates of a flow in one compiled call, between two moves of the progress bar
_INNER = 10  # optimiser steps per update
_DEPENDENCE = (8.0, 16.0)  # penalties on dependence between coordinates, chosen by held-out fit
_PATIENCE = 8  # updates without a better held-out likelihood after which a flow is stopped


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
        starts: how many starting values are tried: the model's and others about a factor of 2
            away; by default 3 for a study of at most `chunk` subjects that is integrated by
            quadrature, else 1. The best end is reported, and so is disagreement.
        points: importance points per subject (a multiple of 32), where quadrature does not serve:
            laws that are not Gaussian, more than four effects.
        flow_updates: at most so many updates of a flow.
        folds: folds over subjects that choose when to stop a flow; 0: never stop early. The best
            held-out gain is a maximum over updates and penalties, hence a little optimistic.
        chunk: subjects evaluated together: memory grows with it, not with the study.
        optimizer: optax optimiser of the flow's weights; by default Adam whose rate falls from
            .005 along a cosine.

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
        starts: int | None = None,
        points: int = 256,
        flow_updates: int = 20,
        folds: int = 4,
        chunk: int = CHUNK,
        optimizer: optax.GradientTransformation | None = None,
    ):
        if points < 32 or points % 32:
            raise ValueError(f"expected points to be a multiple of 32; got {points}.")
        if not callable(model):
            raise TypeError(f"expected a model, a function of a study; got {model!r}.")
        if folds == 1 or folds < 0:
            raise ValueError(f"expected folds to be 0 (none) or at least 2; got {folds}.")
        self.model = model
        self.use_priors = use_priors
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.starts = starts
        self.points = points
        self.flow_updates = flow_updates
        self.folds = folds
        self.chunk = chunk
        if optimizer is None:
            optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, _INNER * flow_updates, 0.05))
        self.optimizer = optimizer
        self._programs: dict[Any, Any] = {}  # compiled programs, for studies of the same shape

    def init(self, key: jax.Array, study: Study, init: dict[str, Any] | None = None) -> VEMState:
        """The state at the starting values of the model, or at those of `init`, by name."""
        joint = Joint.of(self.model, study)
        theta, weights = joint.unconstrain(init or {}), start_weights(joint)
        newton = self._newton(joint, theta, weights, study)
        state = newton.start(key, theta, weights, study)
        if not weights:
            return VEMState(key, weights, newton, state)
        learn = self._learn(joint, newton.engine.references)
        start = learn.start(theta, weights, state.evaluation.conditional)
        return VEMState(key, weights, learn, start)

    def update(self, state: VEMState, study: Study) -> tuple[VEMState, jax.Array]:
        """One iteration: a Newton step or, for a flow, an EM update; and minus the objective."""
        if isinstance(state.engine, Newton) and isinstance(state.inner, NewtonState):
            inner = state.engine.step(state.key, state.inner, state.weights, study)
            state = state._replace(inner=inner)
        elif isinstance(state.engine, Learn):
            learn, (key, key_update) = state.engine, jax.random.split(state.key)
            everyone = jnp.ones(study.subjects.size)
            program = self._program((state.engine, "update"), lambda: learn.update)
            learned = program(key_update, state.inner, everyone, _DEPENDENCE[0], study)
            state = state._replace(key=key, inner=learned)
        return state, self.evaluate(state)

    def evaluate(self, state: VEMState, study: Study | None = None) -> jax.Array:
        """Minus the objective at the state (for a flow: before its last update)."""
        del study
        if isinstance(state.inner, NewtonState):
            return jnp.asarray(-state.inner.objective)
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
        clock = Clock()
        joint = Joint.of(self.model, study)
        laws = {name: law for name, law in joint.roles.laws.items() if _needs_start(law)}
        keys = jax.random.split(key, 4)
        if not laws:
            course = self._climb(keys[0], joint, init or {}, study, progress)
        else:
            gaussian = Joint.of(replace_effect(self.model, **_gaussians(laws)), study)
            known = {k: v for k, v in (init or {}).items() if k in gaussian.roles.population}
            first = self._climb(keys[0], gaussian, known, study, progress)
            start = partial(_start, keys[1], joint, laws, first, init or {})
            values, weights = start()
            if weights:
                course = self._learn_flow(keys[2], joint, start, first, study, progress)
            else:
                course = self._climb(keys[2], joint, values, study, progress)
        fit = self._finish(keys[3], course, study)
        return dataclasses.replace(fit, seconds=clock.read())

    # The Newton iteration.

    def _newton(self, joint: Joint, theta, weights, study: Study) -> Newton:
        return newton_of(
            joint, theta, weights, study,
            use_priors=self.use_priors, points=self.points, chunk=self.chunk,
        )  # fmt: skip

    def _climb(self, key, joint: Joint, values, study: Study, progress: bool) -> _Course:
        """Newton steps to the maximum: from several starts where the study is small, and first on
        some of the subjects where it is large."""
        theta, weights = joint.unconstrain(values), start_weights(joint)
        newton = self._newton(joint, theta, weights, study)
        title = "VariationalEM, " + ", ".join(type(v).__name__ for v in joint.roles.laws.values())
        history: list[float] = []
        courses: list[_Course] = []
        with tqdm(total=None, desc=title, disable=not progress) as bar:
            count = self.chunk
            while study.subjects.size >= 2 * count:
                some = study.subset(spread(study.subjects.size, count))
                state, *_ = self._ascend(key, newton, theta, weights, some, history, bar)
                theta, count = state.theta, 16 * count
            for start in self._starts(key, newton, np.asarray(theta), study):
                history = []
                state, converged, why = self._ascend(
                    key, newton, start, weights, study, history, bar
                )
                courses.append(
                    _Course(joint, jnp.asarray(state.theta), weights, state.evaluation.conditional,
                            history, converged, why, newton, state)
                )  # fmt: skip
                if "user" in why:
                    break
        best = max(courses, key=lambda c: np.nan_to_num(c.history[-1], nan=-np.inf))
        return best._replace(messages=_disagreement(best, courses, self.tolerance))

    def _starts(self, key, newton: Newton, theta: np.ndarray, study: Study) -> list[np.ndarray]:
        """The start, and others a factor of 2 or so away from it."""
        small = study.subjects.size <= self.chunk and newton.engine.points == 0
        count = self.starts if self.starts is not None else (3 if small else 1)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return [theta, *(theta + 0.7 * rng.normal(size=(count - 1, theta.size)))]

    def _ascend(self, key, newton, theta, weights, study, history, bar):
        """Newton steps from θ until a full one is expected to add less than the tolerance."""
        state = newton.start(key, theta, weights, study)
        history.append(state.objective)
        why = f"not converged after {self.max_iterations} iterations: raise max_iterations"
        looked_again = study.subjects.size > 4 * self.chunk
        try:
            for _ in range(self.max_iterations):
                done = state.near and state.gain < self.tolerance
                if done and study.subjects.size > 4 * self.chunk:
                    return state, True, ""
                state = newton.step(key, state, weights, study)  # squares what was left
                history.append(state.objective)
                bar.update()
                bar.set_postfix_str(f"-2LL {-2 * history[-1]:.3f}, gain {state.gain:.1e}")
                if done and not looked_again:
                    # Modes were followed from where θ began: some may have been left behind.
                    state, looked_again = newton.again(key, state, weights, study), True
                    history.append(state.objective)
                    done = state.gain < self.tolerance
                if done:
                    return state, True, ""
                if state.radius < 1e-9:
                    return state, False, "stopped: no step raises the likelihood any more"
                if not np.isfinite(history[-1]) and len(history) > 5:
                    return state, False, "stopped: the marginal likelihood is not finite"
        except KeyboardInterrupt:
            why = f"stopped by the user after {len(history) - 1} iterations"
        return state, False, why

    # The flow.

    def _learn(self, joint: Joint, found: References) -> Learn:
        return Learn(joint, found, self.optimizer, 64, 4, _INNER, 2.0, self.use_priors)

    def _learn_flow(self, key, joint: Joint, start_from, first: _Course, study, progress):
        """Updates of the flow from the Gaussian fit, as many as held-out subjects ask for.

        For every penalty on dependence, the folds and the fit to all subjects run side by side;
        the latter is read off where the former are best. Number 0 is the Gaussian itself.
        """
        values, _ = start_from()
        learn = self._learn(joint, first.newton.engine.references)
        start = learn.start(joint.unconstrain(values), start_weights(joint), first.conditional)
        key_fold, key_run = jax.random.split(key)
        plan = _Plan.of(key_fold, learn, study.subjects.size, self.folds)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(plan.masks), *x.shape)), start)
        own = [start_from(np.flatnonzero(mask))[1] for mask in plan.masks]
        states = states._replace(weights=jax.tree.map(lambda *w: jnp.stack(w), *own))
        program = self._program(
            (learn, "side by side", len(plan.masks)),
            lambda: partial(side_by_side, learn, _BLOCK),
        )
        blocks = [plan.gaussian(start, first.state.evaluation.log_likelihood)]
        why, converged = "", first.converged
        ended = False
        with tqdm(total=self.flow_updates, desc=plan.title, disable=not progress) as bar:
            try:
                for k in jax.random.split(key_run, -(-self.flow_updates // _BLOCK)):
                    states, block = program(
                        k, states, plan.masks, plan.dependence, plan.everyone, study
                    )
                    blocks.append(jax.tree.map(np.asarray, block))
                    path = jax.tree.map(lambda *x: np.concatenate(x), *blocks)
                    bar.update(_BLOCK)
                    bar.set_postfix_str(plan.report(path))
                    if ended := plan.past_the_best(path):
                        break
            except KeyboardInterrupt:
                why, converged = "stopped by the user while learning the flow", False
        if len(blocks) == 1:
            return first._replace(why=why, converged=False)
        update, candidate, selection = plan.choose(path)
        if not why and not ended and update >= len(path.theta) - _BLOCK:
            converged = False
            why = (
                f"the flow was still improving after {len(path.theta)} updates: raise flow_updates"
                if plan.fold_count
                else "the flow was stopped by flow_updates, not by held-out subjects (folds=0)"
            )
        theta, weights = jax.tree.map(
            lambda x: jnp.asarray(x[update, candidate]), (path.theta, path.weights)
        )
        moved = jnp.asarray(learn.references.matrix(joint)) @ (theta - start.theta)
        conditional = start.conditional._replace(mean=start.conditional.mean - moved)
        climbed = path.log_likelihood[: update + 1, plan.everyone[candidate]].sum(1)
        return _Course(
            joint, theta, weights, conditional, [*first.history, *climbed], converged, why,
            first.newton if update == 0
            else Newton(Engine(joint, learn.references, 64), self.use_priors, self.chunk),
            first.state, selection, update,
        )  # fmt: skip

    # The end.

    def _finish(self, key, course: _Course, study: Study) -> Fit:
        key_marginal, key_information = jax.random.split(key)
        joint, theta, weights = course.joint, course.theta, course.weights
        marginal = self._marginal(key_marginal, course, study)
        information, outer = self._information(key_information, course, study)
        messages = [course.why] if course.why else []
        messages += course.messages
        messages += _failed(marginal.log_likelihood, joint, course, study)
        fit = Fit(
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
            selected=course.selected,
            outer=outer,
            method=marginal.method,
        )
        means, gradient = course.state.evaluation.mean, course.state.gradient
        if course.selected:  # the Newton iteration ended at the Gaussian
            means, gradient = np.asarray(course.conditional.mean), np.zeros(joint.size)
        doubtful = doubts(fit, means, gradient)
        return dataclasses.replace(fit, messages=(*messages, *doubtful))

    def _marginal(self, key, course: _Course, study: Study) -> MarginalLikelihood:
        """The likelihood to report: by quadrature of higher order where there is quadrature."""
        if course.newton.engine.points or course.selected:
            return estimate_marginal(key, course.joint, course.theta, course.weights, study)
        return by_quadrature(
            course.newton.engine, np.asarray(course.theta), study, course.state.evaluation,
            ORDER[course.joint.effect_size][course.state.near], chunk=self.chunk,
        )  # fmt: skip

    def _information(self, key, course: _Course, study: Study):
        """Observed information of θ and the outer product of the subjects' scores; for a learned
        flow the latter alone, in both places. By quadrature of a higher order than θ was found
        with, unless the study is large."""
        engine, state = course.newton.engine, course.state
        if not course.selected:
            coarse = fine = state.evaluation
            if not engine.points and study.subjects.size <= 4 * self.chunk:
                size = course.joint.effect_size
                order = min(ORDER[size][state.near] + 2, LARGEST[size])
                fine = evaluate(engine, key, state.theta, {}, study, coarse.conditional.mean,
                                order=order, chunk=self.chunk)  # fmt: skip
            return coarse.hessian - fine.hessian - state.hessian, fine.outer
        found = np.asarray(
            scores(course.newton.engine, key, course.theta, course.weights, study,
                   course.conditional)
        )  # fmt: skip
        return found.T @ found, found.T @ found

    def _program(self, key: tuple, make: Callable) -> Callable:
        """The compiled program of an engine, kept for studies of the same shape."""
        engine, *rest = key
        name = (type(engine), engine.joint, engine.references, *rest)
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
    state: NewtonState  # where the Newton iteration ended
    selection: np.ndarray | None = None
    selected: int | None = None
    messages: tuple[str, ...] = ()


def _disagreement(best: _Course, courses: list[_Course], tolerance: float) -> tuple[str, ...]:
    """A message when other starts ended elsewhere."""
    ends = np.array([c.history[-1] for c in courses if c.converged])
    lower = best.history[-1] - ends > 10 * tolerance
    if len(courses) == 1 or not np.any(lower):
        return ()
    return (
        f"{np.sum(lower)} of {len(courses)} starts ended in a lower maximum (-2LL higher by "
        f"{', '.join(f'{2 * (best.history[-1] - e):.2f}' for e in ends[lower])}); the best one is "
        "reported. The likelihood has several maxima: check the starting values.",
    )


def _needs_start(law: dist.Distribution) -> bool:
    return isinstance(law, RandomEffect) and not isinstance(law, GaussianRandomEffect)


def _gaussians(laws: dict[str, RandomEffect]) -> dict[str, GaussianRandomEffect]:
    """The Gaussian that each law is started from, with what they have in common."""
    shared = ("omega", "omega_prior")
    return {
        name: GaussianRandomEffect(
            law.names,
            full=getattr(law, "full", False),
            **(
                {"omega": 0.5 * law.spread}
                if isinstance(law, MixtureRandomEffect)
                else {k: getattr(law, k) for k in shared if hasattr(law, k)}
            ),
        )
        for name, law in laws.items()
    }


def _start(key, joint: Joint, laws, first: _Course, init, chosen=slice(None)):
    """Values and weights to start `joint` from, given the Gaussian fit to the chosen subjects."""
    values = {k: np.asarray(v) for k, v in first.joint.constrain(first.theta).items()}
    values = {k: v for k, v in values.items() if k in joint.roles.population}
    weights = start_weights(joint)
    keys = jax.random.split(key, len(laws) + 1)
    noise = jax.random.normal(keys[0], (8, *first.conditional.mean.shape))
    draws = first.conditional.mean + jnp.einsum("sde,kse->ksd", first.conditional.scale_tril, noise)
    draws = draws[:, chosen]
    gaussian = first.joint.constrain(first.theta)
    for k, (name, law) in zip(keys[1:], laws.items(), strict=True):
        eta = np.asarray(first.joint.split(draws.reshape(-1, draws.shape[-1]))[name])
        parameters = {
            parameter.removeprefix(f"{name}_"): value
            for parameter, value in gaussian.items()
            if first.joint.roles.population[parameter].effect == name
        }
        covariance = first.joint.roles.laws[name].with_parameters(**parameters).covariance_matrix
        for parameter, value in law.start(k, np.asarray(covariance), eta, draws.shape[1]).items():
            target = weights if parameter == "weights" else values
            target[f"{name}_{parameter}"] = value
    # Where the Gaussian fit ended is a better start than where it began; but what was asked of
    # parameters that it does not have is done.
    asked = {k: v for k, v in init.items() if k not in first.joint.roles.population}
    return {**values, **asked}, weights


class _Plan(NamedTuple):
    """Which flows are learned side by side, and how held-out subjects choose among them."""

    folds: np.ndarray  # the fold that leaves out each subject, [subject]
    fold_count: int  # folds; 0 for none
    masks: np.ndarray  # [state, subject]
    dependence: np.ndarray  # penalty of each state, [state]
    everyone: np.ndarray  # the state of each penalty that sees all subjects, [penalty]

    @classmethod
    def of(cls, key, learn: Learn, size: int, count: int) -> _Plan:
        laws = [law for law in learn.joint.roles.laws.values() if getattr(law, "network", False)]
        depends = any(law.flow.groups(len(law.names))[1].any() for law in laws)
        penalties = _DEPENDENCE if depends and count else _DEPENDENCE[:1]
        count = min(count, size)
        folds = np.asarray(jax.random.permutation(key, np.arange(size) % max(count, 1)))
        masks = np.concatenate([folds != np.arange(count)[:, None], np.ones((1, size), bool)])
        return cls(
            folds,
            count,
            np.tile(masks, (len(penalties), 1)).astype(float),
            np.repeat(penalties, count + 1),
            (count + 1) * np.arange(1, len(penalties) + 1) - 1,
        )

    def gaussian(self, start: LearnState, log_likelihood: np.ndarray) -> Block:
        """The first of the path: the Gaussian fit."""
        shape = (1, len(self.everyone))
        theta, weights = jax.tree.map(
            lambda x: np.broadcast_to(x, (*shape, *x.shape)), (start.theta, start.weights)
        )
        each: Any = np.broadcast_to(log_likelihood, (1, *self.masks.shape))
        return Block(each, theta, weights)

    @property
    def title(self) -> str:
        if not self.fold_count:
            return "Flow"
        return f"Flow, {self.fold_count} folds, {len(self.everyone)} penalties"

    def held_out(self, path: Block) -> np.ndarray:
        """log p(y_i) by the fold that does not see i, over that of the Gaussian,
        `[update, penalty, subject]`."""
        shape = (len(path.theta), -1, self.fold_count + 1, len(self.folds))
        values = np.asarray(path.log_likelihood).reshape(shape)
        found = np.take_along_axis(values, self.folds[None, None, None], axis=2)[:, :, 0]
        gain = found - found[:1]
        return np.where(np.isfinite(gain), gain, 0.0)  # such subjects are named at the end

    def report(self, path: Block) -> str:
        if not self.fold_count:
            return f"-2LL {-2 * path.log_likelihood[-1, -1].sum():.1f}"
        gain = self._smooth(path)
        return f"held-out -2LL {-2 * gain.max():+.1f} against the Gaussian"

    def past_the_best(self, path: Block) -> bool:
        """Whether no penalty has improved its held-out likelihood for a while."""
        if not self.fold_count:
            return False
        gain = self._smooth(path)
        return bool(np.all(np.argmax(gain, axis=0) < len(gain) - _PATIENCE))

    def choose(self, path: Block) -> tuple[int, int, np.ndarray | None]:
        """The update and penalty with the best held-out likelihood, and its curve; no update at
        all, the Gaussian, unless it is better by more than a standard error of the difference."""
        if not self.fold_count:
            return len(path.theta) - 1, 0, None
        smooth, gain = self._smooth(path), self.held_out(path)
        update, penalty = map(int, np.unravel_index(np.argmax(smooth), smooth.shape))
        error = np.sqrt(gain.shape[2]) * gain[update, penalty].std(ddof=1)
        if smooth[update, penalty] <= error:
            update = 0
        return update, penalty, gain[:, penalty].sum(1)

    def _smooth(self, path: Block) -> np.ndarray:
        """Total gain `[update, penalty]`, a running mean of five: each update draws fresh nodes,
        so the curve is noisy."""
        total = np.pad(self.held_out(path).sum(2), ((2, 2), (0, 0)), mode="edge")
        return np.mean([total[k : len(total) - 4 + k] for k in range(5)], axis=0)


def _failed(log_likelihood: np.ndarray, joint: Joint, course: _Course, study: Study) -> list[str]:
    """One message for the subjects whose likelihood is not finite."""
    bad = np.flatnonzero(~np.isfinite(log_likelihood))
    if not bad.size:
        return []
    psi = joint.individual(course.theta, course.weights, course.conditional.mean, study)
    where = "; ".join(
        f"{name} = "
        + ", ".join(
            f"{p} {v:.3g}" for p, v in zip(joint.roles.individual[name], x[bad[0]], strict=True)
        )
        for name, x in psi.items()
    )
    names = ", ".join(str(study.subjects.ids[i]) for i in bad[:5])
    return [
        f"the model is not finite for {bad.size} subject(s): {names}"
        f"{', ...' if bad.size > 5 else ''} (the first at {where}). If it is an ODE, its solver "
        "failed: raise max_steps, loosen rtol, use a stiff solver, or start from other values."
    ]
