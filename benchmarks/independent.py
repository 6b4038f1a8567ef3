"""The estimates of `benchmarks/references.py` without flowme: exact, and linearised as by nlme."""

from typing import NamedTuple

import numpy as np
from linearised import alternate
from quadrature import Quadrature, Subject


class Independent(NamedTuple):
    """What is found without flowme, from the reference: label -> estimate.

    Attributes:
        exact: maximum likelihood by `benchmarks/quadrature.py`.
        minus_two_ll: the likelihood by it there, at flowme's estimates and at the reference.
        linearised: the fixed point of nlme's alternation, by `benchmarks/linearised.py`.
        linearised_minus_two_ll: the likelihood as nlme prints it.
    """

    exact: dict[str, float]
    minus_two_ll: tuple[float, float, float]
    linearised: dict[str, float]
    linearised_minus_two_ll: float


def independently(reference, fit_values, study) -> Independent:
    """The estimates without flowme."""
    logs = [name for name in reference.values if name in ("CL", "V", "a") or "omega" in name]
    subjects = []
    ((name, seen),) = study.observed.items()
    for i, keep in enumerate(seen):
        given = study.doses.given[i] if study.doses.given.size else []
        doses = study.doses.time[i][given], study.doses.amount[i][given]
        subjects.append(
            Subject(study.values[name][i][keep], reference.independent(study.time[i][keep], doses))
        )
    effects = sum("omega" in name for name in reference.values)
    points = {1: 41, 2: 21, 3: 13}[effects]
    size = len(reference.values) - effects - 1
    likelihood = Quadrature(subjects, size, effects, points)

    def coordinates(values):
        return np.array([np.log(x) if n in logs else x for n, x in values.items()])

    def named(theta):
        values = zip(reference.values, theta, strict=True)
        return {n: np.exp(x) if n in logs else x for n, x in values}

    start = coordinates(reference.values)
    theta, least = likelihood.minimum(start)
    own = {n: fit_values[n] for n in reference.values}
    here = least, likelihood(coordinates(own)), likelihood(start)
    lin = alternate(subjects, start[:size], np.exp(start[size:-1]), np.exp(start[-1]))
    found = np.concatenate([lin.beta, np.log(lin.omega), [np.log(lin.s)]])
    return Independent(named(theta), here, named(found), lin.minus_two_ll)
