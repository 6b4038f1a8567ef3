"""The climb to the maximum of the likelihood: Newton steps, how many, from where, on whom.

A small study is climbed from its start, then from others to see whether there are other maxima
(`flowme.infer.around`). A large one is climbed on some of its subjects first, spread over it: a
chunk of them, then sixteen times as many, ... and from there on all.

Nodes lie around modes. Where conditional distributions are ridges, those see a likelihood that is
neither right nor smooth: steps do not keep what they promise, or the climb ends beside the maximum.
From there it goes on with nodes around means (`flowme.infer.moments`).

Where p(y | η) has kinks (a lag that meets a record) the likelihood by nodes has them too, and no
rule has a gradient that is right across them. When the trust region has collapsed, a full step is
tried once more: what it promises, or misses of that if that is more, is the log-likelihood δ within
which the maximum is known, which is √(2 δ) standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from flowme.infer.around import around, log_prior
from flowme.infer.checkpoint import Checkpoint
from flowme.infer.conditional import Conditional
from flowme.infer.evaluate import Evaluation
from flowme.infer.joint import Weights
from flowme.infer.marginal import spread
from flowme.infer.newton import FAR, MEANS, NEAR, STUCK, Newton, NewtonState, led
from flowme.study import Study

LEAD = 1.0  # some subjects have led far enough when a full step is to add less than this
COLLAPSED = 1e-9  # a radius of the trust region at which no step raises the likelihood any more
ROUGH = 5.0  # tolerances within which a maximum counts as found where nothing is smooth
LOOK = 40  # steps in which an ascent that looks for other maxima has found one, or does not


class Ascent(NamedTuple):
    """Newton steps from one place: where they have led."""

    state: NewtonState
    history: np.ndarray  # the objective after each evaluation
    steps: int
    looked_again: bool  # whether modes were looked for anew
    ended: bool = False
    converged: bool = False
    interrupted: bool = False
    why: str = ""


_ANY: Any = 0
# Of the structure of one, for reading it back.
_LIKE = Ascent(NewtonState(_ANY, Evaluation(Conditional(0, 0), *[0] * 6), *[_ANY] * 6), *[_ANY] * 7)


def height(ascent: Ascent) -> float:
    """Where an ascent has ended; -inf if nowhere."""
    return float(np.nan_to_num(ascent.history[-1], nan=-np.inf))


def evaluations(ascents: Sequence[Ascent]) -> int:
    """How many there were in all."""
    return sum(len(ascent.history) for ascent in ascents)


class Climb(NamedTuple):
    """How a likelihood is climbed.

    Attributes:
        newton: the iteration.
        key: random key of its importance nodes.
        weights: of the flows, which stay as they are.
        tolerance: a full step is to promise less than this in the end.
        most: steps of one ascent.
        kept: where states are kept, and what their names begin with.
        bar: what shows the progress.
        last: whether a full step is still taken in the end, which squares what was left.
    """

    newton: Newton
    key: jax.Array
    weights: Weights
    tolerance: float
    most: int
    kept: tuple[Checkpoint, str]
    bar: tqdm
    last: bool = True

    def run(self, theta: np.ndarray, study: Study, starts: int | None) -> list[Ascent]:
        """The ascents on all subjects, one for each start; after an interruption no more."""
        count = self.newton.chunk
        lead = self._replace(tolerance=max(self.tolerance, LEAD), last=False)
        while led(study, count):
            some = study.subset(spread(study.subjects.size, count))
            # All will look for the modes anew.
            begin = partial(self._begin, theta, some, looked_again=True)
            ascent = lead.ascend(f"subjects-{count}", begin, some)
            theta, count = ascent.state.theta, 16 * count
            if ascent.interrupted:
                return [self._begin(theta, study)._replace(interrupted=True, why=ascent.why)]
        ascents = [self.ascend("start-0", partial(self._begin, theta, study), study)]
        look = self._replace(most=min(self.most, LOOK))
        for number, start in enumerate(self._others(np.asarray(theta), ascents[0], study, starts)):
            if ascents[-1].interrupted:
                return ascents
            ends, before = [a for a in ascents if a.converged], evaluations(ascents)
            begin = partial(self.after(before, study)._begin, start, study)
            ascents.append(look.ascend(f"start-{number + 1}", begin, study, ends, before))
        if ascents[-1].interrupted:
            return ascents
        return self.after(evaluations(ascents), study)._led_on(ascents, study)

    def ascend(
        self,
        stage: str,
        begin: Callable[[], Ascent],
        study: Study,
        ends: Sequence[Ascent] = (),
        before: int = 0,
    ) -> Ascent:
        """Newton steps from where `begin` says, until a full one is expected to add less than the
        tolerance, or one of these ends is there; after so many evaluations before."""
        kept, prefix = self.kept
        ascent = kept.read(f"{prefix}-{stage}", _LIKE) or begin()
        try:
            while not ascent.ended and not any(_at(end.state, ascent.state) for end in ends):
                ascent = self.after(before + len(ascent.history), study)._step(ascent, study)
                kept.write(f"{prefix}-{stage}", ascent)
                self.bar.update()
                state = ascent.state
                text = f"-2LL {-2 * ascent.history[-1]:.3f}, gain {state.gain:.1e}"
                self.bar.set_postfix_str(text)
        except KeyboardInterrupt:
            kept.stop()
            why = f"stopped by the user after {len(ascent.history) - 1} iterations"
            return ascent._replace(converged=False, interrupted=True, why=why)
        return ascent

    def after(self, evaluations: int, study: Study) -> Climb:
        """The same, after so many evaluations."""
        return self._replace(newton=self.newton.after(evaluations, study))

    def _led_on(self, ascents: list[Ascent], study: Study) -> list[Ascent]:
        """The ascents, led on by nodes around means if one had to go by them before its end, or if
        they see higher ground from the end of the best (likelihood times prior, as that of all
        ascents is chosen)."""
        joint = self.newton.engine.joint

        def density(ascent: Ascent) -> float:
            known = self.newton.use_priors  # then the prior is in the height already
            prior = 0.0 if known else log_prior(joint, ascent.state.theta, study)
            return height(ascent) + (prior if np.isfinite(prior) else 0.0)

        ends = [ascent for ascent in ascents if ascent.converged]
        best = ends[0] if len(ends) == 1 else max(ends, key=density, default=ascents[0])
        if all(a.state.rule < MEANS for a in ends) and not self._misled(best, study):
            return ascents
        found = list(ascents)
        for number, ascent in enumerate(ascents):
            if ascent.converged and ascent.state.rule == NEAR:
                before = evaluations(found)
                begin = partial(self.after(before, study)._finer, ascent._replace(steps=0), study)
                found[number] = self.ascend(f"means-{number}", begin, study, (), before)
                if found[number].interrupted:
                    found[number] = ascent._replace(interrupted=True)
                    break
        return found

    def _misled(self, ascent: Ascent, study: Study) -> bool:
        """Whether as many nodes around means promise more than the tolerance from here."""
        if not (ascent.converged and self._by_means(ascent.state)) or self._large(study):
            return False
        seen = self.newton.seen_by_means(self.key, ascent.state, self.weights, study)
        return bool(seen.gain > self.tolerance)

    def _others(
        self, theta: np.ndarray, first: Ascent, study: Study, count: int | None
    ) -> np.ndarray:
        """The other starts: around the end of the first one, if that is an end."""
        small = study.subjects.size <= self.newton.chunk and self.newton.engine.points == 0
        if count == 1 or (count is None and not small):
            return np.zeros((0, theta.size))
        end = first.state.theta if first.converged else theta
        return around(self.newton.engine.joint, study, theta, end, count and count - 1)

    def _large(self, study: Study) -> bool:
        """Whether an evaluation of all subjects is dear."""
        return study.subjects.size > 4 * self.newton.chunk

    def _begin(self, theta: np.ndarray, study: Study, looked_again: bool = False) -> Ascent:
        state = self.newton.start(self.key, theta, self.weights, study)
        # Where some subjects led, θ was near the end when the modes were looked for.
        looked_again |= led(study, self.newton.chunk)
        begun = Ascent(state, np.array([state.objective]), 0, looked_again)
        return begun if self.most > 0 else self._judged(begun, False)

    def _step(self, ascent: Ascent, study: Study) -> Ascent:
        """One Newton step; of a small study that has converged the last one."""
        state, history = ascent.state, ascent.history
        done = bool(state.rule > FAR and state.gain < self.tolerance)
        if done and (self._large(study) or not self.last):
            return ascent._replace(ended=True, converged=True)
        if not done and self._by_means(state) and state.radius < STUCK:
            return self._finer(ascent, study)
        state = self.newton.step(self.key, state, self.weights, study)  # squares what was left
        history = np.append(history, state.objective)
        if look_again := done and not ascent.looked_again:
            # Modes were followed from where θ began: some may have been left behind. What is found
            # then may lead far: the trust region of the last, short step says nothing of it.
            again = state._replace(radius=max(state.radius, 1.0))
            state = self.newton.again(self.key, again, self.weights, study)
            history = np.append(history, state.objective)
            done = bool(state.gain < self.tolerance)
        looked = ascent.looked_again or look_again
        judged = self._judged(Ascent(state, history, ascent.steps + 1, looked), done)
        rough = not judged.converged and state.radius < COLLAPSED and state.rule == MEANS
        return self._rough(judged, study) if rough else judged

    def _by_means(self, state: NewtonState) -> bool:
        """Whether nodes may go around means instead."""
        return state.rule == NEAR and not self.newton.engine.points

    def _finer(self, ascent: Ascent, study: Study) -> Ascent:
        """The ascent by the next rule."""
        state = self.newton.finer(self.key, ascent.state, self.weights, study)
        history = np.append(ascent.history, state.objective)
        return Ascent(state, history, ascent.steps, ascent.looked_again)

    def _judged(self, ascent: Ascent, done: bool) -> Ascent:
        """The ascent, ended if there is a reason."""
        why = ""
        if done:
            return ascent._replace(ended=True, converged=True)
        if ascent.state.radius < COLLAPSED:
            why = "stopped: no step raises the likelihood any more"
        elif not np.isfinite(ascent.history[-1]) and len(ascent.history) > 5:
            why = "stopped: the marginal likelihood is not finite"
        elif ascent.steps >= self.most:
            why = f"not converged after {self.most} iterations: raise max_iterations"
        return ascent._replace(ended=bool(why), why=why)

    def _rough(self, ascent: Ascent, study: Study) -> Ascent:
        """The ascent that no step leads on, converged if the likelihood's own roughness leaves its
        maximum within `ROUGH` tolerances, and a full step leads nowhere either."""
        state = ascent.state
        added = self.newton.added(self.key, state, self.weights, study)
        missed = abs(added - state.gain)
        lost = np.maximum(state.gain, missed)
        if not np.isfinite(lost):
            return ascent
        within = np.sqrt(2 * lost)
        close = bool(lost < ROUGH * self.tolerance and added < self.tolerance)
        why = (
            f"{'' if close else 'stopped: '}no step raises the likelihood any more, though a full "
            f"one promises {state.gain:.1e} and misses that by {missed:.1e}: the likelihood is not "
            "smooth (lag times among the records make it so), and its maximum is known within "
            f"about {within:.2g} standard errors."
        )
        return ascent._replace(converged=close, why=why)


def apart(end: NewtonState, state: NewtonState) -> float:
    """The likelihood that is lost from an end to a state by the curvature at the end: .5 at one
    standard error. Where it is flat, 1 counts as far."""
    if not np.all(np.isfinite(end.hessian)):
        return np.inf
    values, vectors = np.linalg.eigh(end.hessian)
    return 0.5 * float((np.abs(values) + 1.0) @ (vectors.T @ (state.theta - end.theta)) ** 2)


def _at(end: NewtonState, state: NewtonState) -> bool:
    """Whether a state is at an end that is known, and sees it."""
    return apart(end, state) < 0.1 and abs(end.objective - state.objective) < 0.5
