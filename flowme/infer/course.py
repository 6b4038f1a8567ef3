"""How an estimation went, and what there is to say about it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.climb import Ascent
from flowme.infer.conditional import Conditional
from flowme.infer.joint import Joint
from flowme.infer.newton import MEANS, Newton, NewtonState
from flowme.study import Study


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


def disagreement(best: Course, courses: list[Course], tolerance: float) -> tuple[str, ...]:
    """A message when other starts ended elsewhere."""
    ends = np.array([c.history[-1] for c in courses if c.converged])
    # On ridges the value depends a little on where the nodes around means came from.
    lower = best.history[-1] - ends > (100 if best.state.rule == MEANS else 10) * tolerance
    if len(courses) == 1 or not np.any(lower):
        return ()
    return (
        f"{np.sum(lower)} of {len(courses)} starts ended in a lower maximum (-2LL higher by "
        f"{', '.join(f'{2 * (best.history[-1] - e):.2f}' for e in ends[lower])}); the best one is "
        "reported. The likelihood has several maxima: check the starting values.",
    )


def ridges(course: Course) -> list[str]:
    """A message when modes did not serve to find θ."""
    if course.state.rule < MEANS or course.selected:  # a learned flow's θ was found otherwise
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
