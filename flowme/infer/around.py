"""Where else a likelihood is climbed from: around where the first ascent has ended.

A maximum has its rivals where parameters change places (ka and CL/V, the two exponentials of a
sum): at least two of them move, far, each in a direction of its own. So every parameter is moved
far up or far down, and the directions are a covering array of strength 2: whichever two parameters
one picks, the four combinations of their directions all occur. Such an array of N starts serves as
many as C(N - 1, ⌈N/2⌉) parameters (Kleitman & Spencer 1973): 4 starts three, 6 ten, 8 thirty-five.

Around the end of the first ascent, not around its start: there the scale of the data is known, and
the other maxima are found wherever the first ascent began.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from scipy.stats import qmc

from flowme.infer.errors import base_support
from flowme.infer.joint import Joint
from flowme.study import Study

FAR = np.log(5.0)  # a factor of 5, where θ is a logarithm


def around(
    joint: Joint, study: Study, start: np.ndarray, end: np.ndarray, count: int | None = None
) -> np.ndarray:
    """Values of θ to start from, `[start, parameter]`.

    Parameters of the laws of random effects start where they did. The others are a factor of 5
    away from the end; real ones log 5 standard deviations of their prior. One that has run from
    its start to a bound is taken from the start.

    Args:
        joint: the model.
        study: the study.
        start: where the first ascent began, `[parameter]`.
        end: where it ended.
        count: how many; None: as many as cover all pairs of directions. Of more, the others
            fill the box between.
    """
    own = np.array([not joint.roles.population[name].effect for name in _sites(joint)])
    step = FAR * _scale(joint, study)
    near = np.where(own & (np.abs(end - start) < 3 * step), end, start)
    if not own.any():
        return np.zeros((0, joint.size))
    array = covering(own.sum())
    more = max(0, (count or 0) - len(array))
    array = np.concatenate([array, 2 * qmc.Halton(own.sum(), seed=0).random(more) - 1])[:count]
    directions = np.zeros((len(array), joint.size))
    directions[:, own] = array
    return near + step * directions


def covering(columns: int) -> np.ndarray:
    """Directions, 1 or -1, `[row, column]`: whichever two columns one picks, all four combinations
    occur.

    A column is -1 in the first of N rows and 1 in ⌈N/2⌉ of the others: two different such sets of
    rows meet, and neither holds the other.
    """
    size = 2
    while comb(size - 1, -(-size // 2)) < columns:
        size += 1
    array = -np.ones((size, columns))
    sets = combinations(range(1, size), -(-size // 2))
    for column, ups in zip(range(columns), sets, strict=False):
        array[list(ups), column] = 1.0
    return array


def _sites(joint: Joint) -> list[str]:
    """The site of each element of θ."""
    return [name for name, where in joint.slices.items() for _ in range(where.stop - where.start)]


def _scale(joint: Joint, study: Study) -> np.ndarray:
    """1, or the standard deviation of the prior of a real parameter, `[parameter]`."""
    scale = np.ones(joint.size)
    real = [
        name
        for name, site in joint.roles.population.items()
        if base_support(site.support) is constraints.real and not site.effect
    ]
    priors = joint.priors(study) if real else {}
    for name in real:
        variance = np.ravel(_variance(priors[name]))
        usable = np.isfinite(variance) & (variance > 0)
        scale[joint.slices[name]] = np.sqrt(np.where(usable, variance, 1.0))
    return scale


def _variance(prior: dist.Distribution) -> np.ndarray:
    try:
        return np.broadcast_to(prior.variance, prior.shape())
    except NotImplementedError:
        return np.full(prior.shape(), np.nan)


def log_prior(joint: Joint, theta: np.ndarray, study: Study) -> float:
    """log p(θ) on the parameters' own scale, as MAP estimation has it."""
    values = joint.constrain(jax.numpy.asarray(theta))
    laws = joint.priors(study)
    return float(sum(jax.numpy.sum(law.log_prob(values[name])) for name, law in laws.items()))
