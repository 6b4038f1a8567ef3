"""The reward of a structure: how well it predicts, how simple it is, how robust.

Each part is per measurement and in nats, so that weights of 1 make their sum, but for robustness,
the logarithm of the structure's posterior probability divided by n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .equivalence import molecules
from .library import Library
from .problem import Problem
from .reaction import Reaction

FLOOR = -10.0  # of the prediction: a structure whose fit fails


class Weights(NamedTuple):
    """How much each part counts.

    Attributes:
        prediction: of -BIC / 2n.
        complexity: of the log prior / n.
        robustness: of the leaders' robustness, see `robustness.py`.
    """

    prediction: float = 1.0
    complexity: float = 1.0
    robustness: float = 0.0


def plausibility(reaction: Reaction) -> float:
    """Log prior weight of a reaction: each molecule that takes part costs half a nat."""
    return -0.5 * molecules(reaction)


def log_prior(library: Library, weight: Callable[[Reaction], float] = plausibility) -> np.ndarray:
    """log π_r of each reaction, [L]: weights normalised over the library.

    That a structure has R reactions at all costs it Σ log π_r, about -R log L: out of a large
    library something always fits the noise.

    Reference: Chen & Chen, Biometrika 95 (2008) 759.

    Raises:
        ValueError: a weight that is not finite.
    """
    logs = np.array([weight(r) for r in library.reactions], float)
    wrong = np.flatnonzero(~np.isfinite(logs))
    if wrong.size:
        raise ValueError(
            f"expected a prior with finite log weights; got {logs[wrong[0]]} of "
            f"{library.reactions[wrong[0]]}. To forbid a reaction, put it on the blacklist."
        )
    return logs - np.logaddexp.reduce(logs)


def prediction(problem: Problem, deviance: np.ndarray, parameters: int) -> np.ndarray:
    """-BIC / 2n of an ODE fit, nats per measurement; at least the floor."""
    n = problem.courses.count.sum()
    return np.maximum(-problem.bic(deviance, parameters) / (2 * n), FLOOR)


def complexity(problem: Problem, prior: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Σ_r log π_r / n of structures, rows [n, R] padded by L."""
    return np.append(prior, 0.0)[rows].sum(1) / problem.courses.count.sum()
