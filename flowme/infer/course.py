"""How an estimation went, and what there is to say about it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from flowme.infer.around import log_prior
from flowme.infer.climb import Ascent, apart
from flowme.infer.conditional import Conditional
from flowme.infer.errors import base_support, site_names
from flowme.infer.joint import Joint
from flowme.infer.newton import MEANS, Newton, NewtonState
from flowme.study import Study

_LEVEL = 0.01  # log-likelihoods that are the same
_FAR = 10.0  # log-likelihood by which a lower maximum is out of the question


class Course(NamedTuple):
    """How an estimation went."""

    joint: Joint
    theta: jax.Array
    weights: dict[str, jax.Array]
    conditional: Conditional
    history: list[float]
    converged: bool
    why: str  # why it ended, if that is worth a word
    newton: Newton
    state: NewtonState  # where the Newton iteration ended
    selection: np.ndarray | None = None
    selected: int | None = None
    dependence: float | None = None
    messages: tuple[str, ...] = ()
    interrupted: bool = False

    @classmethod
    def of(cls, joint: Joint, weights: dict[str, jax.Array], newton: Newton, ascent: Ascent):
        """That of an ascent."""
        state, theta = ascent.state, jnp.asarray(ascent.state.theta)
        return cls(
            joint, theta, weights, state.evaluation.conditional, [*ascent.history],
            ascent.converged, ascent.why, newton, state, interrupted=ascent.interrupted,
        )  # fmt: skip


def best(courses: list[Course], study: Study, use_priors: bool) -> Course:
    """The course to report, with a message for every other maximum that counts.

    Where the likelihood has several maxima, its height does not say which is meant. Exchange ka and
    CL/V, and the model of theophylline is the same function of time: only the law of the random
    effects tells the two apart, by 6.6 in -2LL, in favour of a volume of 1.7 L; with a full Ω
    nothing does. And what theory says of maximum likelihood it says of the maximum close to the
    truth, not of the highest, which may lie on a boundary. Knowledge from elsewhere decides, and
    that is the prior: of the maxima found the one is reported at which likelihood times prior is
    highest, which is that of MAP estimation, and the same one wherever the climbs began. Under weak
    priors likelihood decides.
    """
    first, *others = courses
    ends = [first] + [course for course in others if course.converged]
    heights = np.nan_to_num([course.history[-1] for course in ends], nan=-np.inf)
    if len(ends) > 1 and not use_priors:
        priors = [log_prior(course.joint, course.state.theta, study) for course in ends]
        heights = heights + (priors if np.all(np.isfinite(priors)) else 0.0)
    chosen = ends[int(np.argmax(heights))]
    ends = [course for course in ends if course.converged]
    chosen = next((c for c in [chosen, *ends] if c.converged and _same(chosen, c)), chosen)
    rivals: list[Course] = []
    for course in sorted(ends, key=lambda course: -course.history[-1]):
        if not any(_same(other, course) for other in [chosen, *rivals]):
            rivals.append(course)
    rivals = [c for c in rivals if chosen.history[-1] - c.history[-1] < _FAR]
    messages = tuple(_named(rival, chosen) for rival in rivals)
    interrupted = any(course.interrupted for course in courses)
    if others and interrupted:
        messages = ("stopped by the user before all starts were tried", *messages)
    return chosen._replace(messages=messages, interrupted=interrupted)


def _same(one: Course, other: Course) -> bool:
    """Whether two ends are at one maximum: within a standard error or a twentieth, whatever their
    heights, which are by few nodes; or as high with the same typical values, for an ω that runs to
    0 may stop anywhere on its way."""
    population = one.joint.roles.population
    if apart(one.state, other.state) < 0.5 or not _beside(one, other, list(population)):
        return True
    typical = [name for name, site in population.items() if not site.effect]
    return abs(one.history[-1] - other.history[-1]) < _LEVEL and not _beside(one, other, typical)


def ridges(course: Course, study: Study) -> list[str]:
    """A message when modes did not serve to find θ, and do not see the same likelihood there
    either: on the way conditional distributions may be what they are not in the end."""
    state = course.state
    if state.rule < MEANS or course.selected:  # a learned flow's θ was found otherwise
        return []
    modes = state.evaluation.conditional.mean
    seen = course.newton.near(jax.random.key(0), state.theta, course.weights, study, modes)
    if abs(seen.objective - state.objective) < _LEVEL:
        return []
    return [
        "the conditional distributions of the random effects are far from Gaussian (ridges): "
        "nodes around their modes lead away from the maximum or nowhere, so that the estimates and "
        "-2LL are by nodes around their means and covariances."
    ]


def failed(log_likelihood: np.ndarray, course: Course, study: Study) -> list[str]:
    """One message for the subjects whose likelihood is not finite."""
    bad = np.flatnonzero(~np.isfinite(log_likelihood))
    if not bad.size:
        return []
    joint = course.joint
    psi = joint.individual(course.theta, course.weights, course.conditional.mean, study)
    first = {name: np.moveaxis(np.asarray(x[bad[0]]), -1, 0) for name, x in psi.items()}
    where = "; ".join(
        f"{name} = "
        + ", ".join(
            f"{p} {_written(v)}" for p, v in zip(joint.roles.individual[name], x, strict=True)
        )
        for name, x in first.items()
    )
    names = ", ".join(str(study.subjects.ids[i]) for i in bad[:5])
    return [
        f"the model is not finite for {bad.size} subject(s): {names}"
        f"{', ...' if bad.size > 5 else ''} (the first at {where}). If it is an ODE, its solver "
        "failed: raise max_steps, loosen rtol, use a stiff solver, or start from other values."
    ]


def _written(value: np.ndarray) -> str:
    """A number; of one that changes in time, from where to where it goes."""
    least, most = f"{value.min():.3g}", f"{value.max():.3g}"
    return least if least == most else f"{least} to {most}"


def _named(rival: Course, chosen: Course) -> str:
    """The message that there is another maximum."""
    gap = 2 * (rival.history[-1] - chosen.history[-1])
    level = abs(gap) < 2 * _LEVEL
    height = "as" if level else f"{abs(gap):.2f} {'lower' if gap > 0 else 'higher'} than"
    where = _beside(rival, chosen, list(rival.joint.roles.population))
    text = (
        f"the likelihood has another maximum, -2LL {-2 * rival.history[-1]:.1f} ({height} at the "
        f"one reported), at {', '.join(where[:8])}{', ...' if len(where) > 8 else ''}."
    )
    if gap < 0 and not level:
        return text
    return (
        f"{text} The priors speak for the one reported; VariationalEM(model, starts=1) with these "
        "values as init= ends at the other."
    )


def _beside(one: Course, other: Course, names: list[str]) -> list[str]:
    """The estimates of these parameters in which two ends differ by a twentieth or more, side by
    side."""
    joint, found = one.joint, []
    values = [joint.constrain(jnp.asarray(course.state.theta)) for course in (one, other)]
    for name in names:
        x, y = (np.ravel(value[name]) for value in values)
        if base_support(joint.roles.population[name].support) is constraints.corr_cholesky:
            continue  # no estimate one reads
        labels = site_names(joint, name, x.size)
        far = np.abs(x - y) > 0.05 * np.maximum(np.abs(x), np.abs(y))
        found += [f"{labels[k]} {x[k]:.3g} (here {y[k]:.3g})" for k in np.flatnonzero(far)]
    return found
