"""Variational EM: maximum marginal likelihood of population parameters and flow weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from flowme.garbage import set_aside
from flowme.infer.asked import asked
from flowme.infer.checkpoint import Checkpoint
from flowme.infer.climb import Climb, evaluations
from flowme.infer.clock import Clock
from flowme.infer.course import Course, best, failed, ridges
from flowme.infer.doubts import doubts
from flowme.infer.evaluate import CHUNK, Engine, Evaluation, evaluate, next_order, scores
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.infer.learn import Learn, LearnState, side_by_side
from flowme.infer.marginal import (
    MarginalLikelihood,
    around_means,
    by_quadrature,
    estimate_marginal,
)
from flowme.infer.newton import MEANS, NEAR, ORDER, Newton, NewtonState, integrable, newton_of
from flowme.infer.plan import FIRM, Learned, Plan
from flowme.infer.references import References
from flowme.infer.starts import from_gaussian, gaussians, needs_start
from flowme.primitives import replace_effect
from flowme.quick import begun, quick, soon
from flowme.study import Study

_BLOCK = 5  # updates of a flow in one compiled call, between two moves of the progress bar
_INNER = 20  # optimiser steps per update


class VEMState(NamedTuple):
    """Where an estimation stands, and which of the two iterations moves it."""

    key: jax.Array
    weights: dict[str, jax.Array]  # those the Newton iteration holds
    engine: Newton | Learn
    inner: NewtonState | LearnState


class VariationalEM:
    """Estimate a population model by maximum marginal likelihood (or MAP).

    Every iteration places a full-covariance Gaussian around the conditional distribution of each
    subject's random effects (mode and curvature; mean and covariance where those do not serve, and
    a message says so), integrates over it by nodes, and takes a trust-region Newton step of the
    population parameters on the marginal likelihood (`flowme.infer.newton`). Laws other than the
    Gaussian are started from the Gaussian fit; a flow is then learned by stochastic EM and stopped
    on held-out subjects (`flowme.infer.learn`).

    Args:
        model: a function of a study, written with flowme's and NumPyro's statements.
        use_priors: maximise log p(y; θ) + log p(θ) (MAP). By default priors only give supports
            and starting values. A flow's weights are kept small by early stopping in both cases.
        tolerance: the iteration has converged when a full step is expected to add less than this
            to the log-likelihood; where the likelihood is not smooth, and no step raises it any
            more, when its roughness is less than five times this, and a message says so.
        max_iterations: of the Newton iteration.
        starts: how many starting values are tried: the model's, and others a factor of 5 away from
            where that one ends, so spread that any two parameters are moved in all four directions
            (`flowme.infer.around`); by default, for a study of at most `chunk` subjects that is
            integrated by quadrature, as many as that takes (5 for three parameters, 7 for five to
            ten), else 1. Where several maxima are found, that is said, with the estimates at each,
            and the one reported is that of the highest likelihood times prior
            (`flowme.infer.course.best`).
        points: importance points per subject (a multiple of 32), where quadrature does not serve:
            laws that are not Gaussian, more than four effects.
        flow_updates: at most so many updates of a flow.
        folds: folds over subjects that choose when to stop a flow; 0: never stop early. The best
            held-out gain is a maximum over updates and penalties, hence a little optimistic.
        chunk: subjects evaluated together, on one device: memory grows with it, not with the
            study. Further devices and processes take further chunks (`flowme.infer.parallel`).
        optimizer: optax optimiser of the flow's weights; by default Adam whose rate falls from
            .0025 along a cosine.

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
            optimizer = optax.adam(optax.cosine_decay_schedule(2.5e-3, _INNER * flow_updates, 0.05))
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
            learned = program(key_update, state.inner, everyone, FIRM, study)
            state = state._replace(key=key, inner=learned)
        return state, self.evaluate(state)

    def evaluate(self, state: VEMState, study: Study | None = None) -> jax.Array:
        """Minus the objective at the state (for a flow: before its last update)."""
        del study
        if isinstance(state.inner, NewtonState):
            return jnp.asarray(-state.inner.objective)
        return -jnp.sum(state.inner.log_likelihood)

    @set_aside()
    def run(
        self,
        key: jax.Array,
        study: Study,
        *,
        init: dict[str, Any] | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> Fit:
        """Estimate the model on `study`.

        Args:
            key: random key; is consumed.
            study: the study.
            init: starting values of population parameters by name, in place of the model's.
            progress: show a progress bar. Interrupting (Ctrl-C) ends the iteration under way and
                returns the fit as far as it got, marked as not converged.
            checkpoint: a folder, made if it is not there, to which the state is written after
                every Newton step and every few updates of a flow. The same call takes up from
                there after an interruption, however hard, and ends with the same result; after
                the end, it has the result again without the steps.

        Raises:
            ValueError: the model or the starting values do not fit the study, or the checkpoint is
                of another model, study, key or choice of arguments.
        """
        clock = Clock()
        joint, progress = Joint.of(self.model, study), progress and jax.process_index() == 0
        _refuse_groups(joint)
        _refuse_scaled(joint, study)
        kept = Checkpoint()
        if checkpoint is not None:
            kept = Checkpoint.open(checkpoint, asked(self, key, joint, study, init or {}))
        laws = {name: law for name, law in joint.roles.laws.items() if needs_start(law)}
        random = laws or not integrable(joint)
        key_climb, key_start, key_law, *keys_end = _five(key) if random else [key] * 5
        if not laws:
            course = self._climb(key_climb, joint, init or {}, study, progress, (kept, "climb"))
            return self._finish(keys_end, course, study, clock)
        gaussian = Joint.of(replace_effect(self.model, **gaussians(laws)), study)
        known = {k: v for k, v in (init or {}).items() if k in gaussian.roles.population}
        first = self._climb(key_climb, gaussian, known, study, progress, (kept, "gaussian"))
        said = tuple(f"Gaussian random effects: {x}" for x in (first.why, *first.messages) if x)
        if first.interrupted:
            return self._finish(keys_end, first, study, clock)
        start_from = partial(from_gaussian, key_start, joint, laws, init or {})
        values, weights = start_from(first)
        if weights:
            course = self._learn_flow(key_law, joint, start_from, first, study, progress, kept)
        else:
            course = self._climb(key_law, joint, values, study, progress, (kept, "law"))
        course = course._replace(messages=(*said, *course.messages))
        return self._finish(keys_end, course, study, clock)

    # The Newton iteration.

    def _newton(self, joint: Joint, theta, weights, study: Study) -> Newton:
        return newton_of(
            joint, theta, weights, study,
            use_priors=self.use_priors, points=self.points, chunk=self.chunk,
        )  # fmt: skip

    def _climb(
        self, key, joint: Joint, values, study: Study, progress: bool, kept: tuple[Checkpoint, str]
    ) -> Course:
        """Newton steps to the maximum, from as many starts as the study asks for."""
        theta, weights = joint.unconstrain(values), start_weights(joint)
        newton = self._newton(joint, theta, weights, study)
        # What goes on is computed by the program that it began with.
        checkpoint, prefix = kept
        care = checkpoint.read(f"{prefix}-care", (0, 0))
        if care is None:
            care = newton.engine.tier, newton.serves
            checkpoint.write(f"{prefix}-care", care)
        newton = newton._replace(engine=newton.engine._replace(tier=care[0]), serves=care[1])
        title = "VariationalEM, " + ", ".join(type(v).__name__ for v in joint.roles.laws.values())
        with tqdm(total=None, desc=title, disable=not progress) as bar:
            climb = Climb(newton, key, weights, self.tolerance, self.max_iterations, kept, bar)
            ascents = climb.run(np.asarray(theta), study, self.starts)
            done = evaluations(ascents)
            newton = newton.after(done, study)
            begun(joint, newton.engine[1:-1], newton.work(done, study))  # so the next fit knows
            courses = [Course.of(joint, weights, newton, ascent) for ascent in ascents]
        return best(courses, study, self.use_priors)

    # The flow.

    def _learn(self, joint: Joint, found: References) -> Learn:
        return Learn(joint, found, self.optimizer, 64, 4, _INNER, 2.0, self.use_priors)

    def _learn_flow(self, key, joint: Joint, start_from, first: Course, study, progress, kept):
        """Updates of the flow from the Gaussian fit, as many as held-out subjects ask for.

        For every penalty on dependence, the folds and the fit to all subjects run side by side;
        the latter is read off where the former are best. Number 0 is the Gaussian itself, of each
        fold its own: subjects held out have had no part in where its learning starts.
        """
        learn = self._learn(joint, first.newton.engine.references)
        key_fold, key_run = jax.random.split(key)
        plan = Plan.of(key_fold, learn, study.subjects.size, self.folds)
        own = plan.per_penalty([self._without(mask, first, study) for mask in plan.sets])
        states = []
        for course, mask in zip(own, plan.masks, strict=True):
            values, weights = start_from(course, np.flatnonzero(mask))
            states.append(learn.start(joint.unconstrain(values), weights, course.conditional))
        # Number 0 is the law as it is before anything is learned: the Gaussian.
        begin = states[plan.everyone[0]]._replace(weights=start_weights(joint))
        each = [course.state.evaluation.log_likelihood for course in own]
        learned = Learned(
            jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *states),
            plan.gaussian(begin, np.stack(each)),
        )
        learned = self._update_flows(key_run, learn, plan, learned, study, progress, kept)
        if not learned.blocks:
            return first._replace(why=learned.why, converged=False)
        path = learned.path
        update, candidate, selection = plan.choose(path)
        theta, weights = jax.tree.map(
            lambda x: jnp.asarray(x[update, candidate]), (path.theta, path.weights)
        )
        moved = jnp.asarray(learn.references.matrix(joint)) @ (theta - begin.theta)
        conditional = begin.conditional._replace(mean=begin.conditional.mean - moved)
        climbed = path.log_likelihood[: update + 1, plan.everyone[candidate]].sum(1)
        why = learned.why or plan.cut_short(path, update, learned.ended, _BLOCK)
        return first._replace(
            joint=joint, theta=theta, weights=weights, conditional=conditional,
            history=[*first.history, *climbed], converged=first.converged and not why, why=why,
            newton=first.newton if update == 0
            else Newton(Engine(joint, learn.references, 64), self.use_priors, self.chunk),
            selection=selection, selected=update, messages=(),
            dependence=float(plan.dependence[plan.everyone[candidate]]),
        )  # fmt: skip

    def _without(self, mask, first: Course, study: Study) -> Course:
        """The Gaussian fit to the subjects whose `mask` is 1, from the fit to all."""
        if np.all(mask > 0):
            return first
        newton, key = first.newton._replace(counts=mask), jax.random.key(0)
        state = newton.near(key, first.theta, first.weights, study, first.conditional.mean)
        state, _ = newton.finish(key, state, first.weights, study)
        return first._replace(
            theta=state.theta, conditional=state.evaluation.conditional, state=state
        )

    def _update_flows(self, key, learn: Learn, plan: Plan, begun: Learned, study, progress, kept):
        """Blocks of updates, until no penalty has improved for a while."""
        program = self._program(
            (learn, "side by side", len(plan.masks)),
            lambda: partial(side_by_side, learn, _BLOCK),
        )
        now: Learned = kept.read("flow", begun) or begun
        keys = jax.random.split(key, -(-self.flow_updates // _BLOCK))
        done, total = _BLOCK * now.blocks, self.flow_updates
        with tqdm(total=total, initial=done, desc=plan.title, disable=not progress) as bar:
            try:
                while now.blocks < len(keys) and not now.ended:
                    states, block = program(
                        keys[now.blocks], now.states, plan.masks, plan.dependence, plan.everyone,
                        study,
                    )  # fmt: skip
                    path = jax.tree.map(lambda *x: np.concatenate(x), now.path, block)
                    now = Learned(states, path, now.blocks + 1, plan.past_the_best(path))
                    kept.write("flow", now)
                    bar.update(_BLOCK)
                    bar.set_postfix_str(plan.report(path))
            except KeyboardInterrupt:
                kept.stop()
                now = now._replace(why="stopped by the user while learning the flow")
        return now

    # The end.

    def _finish(self, keys, course: Course, study: Study, clock: Clock) -> Fit:
        key_marginal, key_information = keys
        joint, theta, weights = course.joint, course.theta, course.weights
        finer = self._finer(course, study)
        marginal = self._marginal(key_marginal, course, study, finer)
        information, outer = self._information(key_information, course, study, finer)
        messages = [course.why] if course.why else []
        messages += [*course.messages, *ridges(course, study)]
        messages += failed(marginal.log_likelihood, course, study)
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
            dependence=course.dependence,
            outer=outer,
            method=marginal.method,
        )
        means, gradient = course.state.evaluation.mean, course.state.gradient
        if course.selected:  # the Newton iteration ended at the Gaussian
            means, gradient = np.asarray(course.conditional.mean), np.zeros(joint.size)
        doubtful = doubts(fit, means, gradient)
        return dataclasses.replace(fit, messages=(*messages, *doubtful), seconds=clock.read())

    def _finer(self, course: Course, study: Study) -> Evaluation | None:
        """The likelihood by quadrature of a higher order than θ was found with, unless there is no
        quadrature or none higher, or the study is large."""
        engine, state = course.newton.engine, course.state
        highest = engine.points or course.selected or state.rule == MEANS
        if highest or study.subjects.size > 4 * self.chunk:
            return None
        order = next_order(course.joint.effect_size, self._order(course))
        start = state.evaluation.conditional.mean
        return evaluate(engine, jax.random.key(0), state.theta, {}, study, start,
                        order=order, chunk=self.chunk)  # fmt: skip

    def _order(self, course: Course) -> int:
        return ORDER[course.joint.effect_size][course.state.rule]

    def _marginal(self, key, course: Course, study: Study, finer) -> MarginalLikelihood:
        """The likelihood to report: by quadrature of higher order where there is quadrature."""
        if course.newton.engine.points or course.selected:
            return estimate_marginal(key, course.joint, course.theta, course.weights, study)
        if course.state.rule == MEANS:
            order = ORDER[course.joint.effect_size][NEAR]
            return around_means(
                course.newton.engine, np.asarray(course.theta), study, course.state.evaluation,
                order, chunk=self.chunk,
            )  # fmt: skip
        return by_quadrature(
            course.newton.engine, np.asarray(course.theta), study, course.state.evaluation,
            self._order(course), finer, chunk=self.chunk,
        )  # fmt: skip

    def _information(self, key, course: Course, study: Study, finer):
        """Observed information of θ and the outer product of the subjects' scores; for a learned
        flow the latter alone, in both places."""
        if not course.selected:
            coarse = course.state.evaluation
            fine = finer or coarse
            return coarse.hessian - fine.hessian - course.state.hessian, fine.outer
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
            self._programs[name] = soon(make())
        return self._programs[name]


@quick
def _five(key: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.random.split(key, 5))


def _refuse_scaled(joint: Joint, study: Study) -> None:
    """A random effect whose density is raised to a power has no marginal likelihood."""
    scales: list[tuple[str, Any]] = []

    def look(theta):
        sites = joint.effect_sites(theta, start_weights(joint), study)
        scales.extend((site["name"], site["scale"]) for site in sites)

    jax.eval_shape(look, jax.ShapeDtypeStruct((joint.size,), jnp.result_type(float)))
    for name, scale in scales:
        if scale is not None:
            raise ValueError(
                f"expected random effect {name!r} outside of numpyro.handlers.scale; got a scale "
                f"of {scale}: p(η) to a power is no distribution to integrate over. Scale outcomes "
                "alone, or leave subjects out."
            )


def _refuse_groups(joint: Joint) -> None:
    """Effects of groups have a joint density without a maximum, and priors that likelihood
    ignores."""
    for name, others in joint.roles.groups.items():
        raise ValueError(
            f"expected priors of population parameters that do not depend on others; got that of "
            f"{name!r}, which depends on {', '.join(map(repr, others))}: a random effect of "
            "groups, over which VariationalEM does not integrate. Draw from the posterior by "
            f"fm.nuts(model, study, key); or give {name!r} a prior of numbers, to estimate the "
            "groups as fixed effects."
        )
