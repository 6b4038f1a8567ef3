"""A feature of flowme whose estimates are to be judged: a model, its truth, and data of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpyro.distributions as dist

import flowme as fm


class Feature(NamedTuple):
    """What `features.py` fits.

    Attributes:
        truth: by the name of each population parameter; of random effects by effect,
            {"eta_omega": {"CL": .3}}.
        model: of a study.
        draw: a study from a NumPy generator; all of one shape.
    """

    truth: dict[str, Any]
    model: Callable
    draw: Callable


def populations(**medians):
    """Positive population parameters, whose fits start at these medians."""
    return [fm.population(name, dist.LogNormal(0.0, 1.0), init=x) for name, x in medians.items()]
