"""Estimates from resampled studies: standard errors, intervals and bands of densities."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpyro.distributions import constraints
from scipy.ndimage import gaussian_filter1d
from scipy.stats import norm

from flowme.effects import GaussianRandomEffect
from flowme.infer.errors import base_support, site_names
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.quick import soon


@dataclasses.dataclass(frozen=True, eq=False)
class Bootstrap:
    """Estimates from resampled studies.

    Attributes:
        fit: the fit that was resampled.
        theta: estimates, unconstrained, `[replicate, parameter]`.
        weights: weights of flows, by site, `[replicate, weight]`.
        counts: how often each subject was drawn, `[replicate, subject]`.
        converged: `[replicate]`; the others are left out of all summaries.
        messages: what the user should know.
    """

    fit: Fit
    theta: np.ndarray
    weights: dict[str, np.ndarray]
    counts: np.ndarray
    converged: np.ndarray
    messages: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Population parameters of the converged replicates on their own scale, and flow weights,
        by site, `[replicate, ...]`."""
        joint = self.fit.joint
        values = jax.vmap(joint.constrain)(jnp.asarray(self.theta[self.converged]))
        weights = {name: w[self.converged] for name, w in self.weights.items()}
        return {**{name: np.asarray(values[name]) for name in joint.slices}, **weights}

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """A row for each parameter, correlations for their Cholesky factors: estimate, standard
        error (SD over replicates), and the interval of their quantiles at (1 ± level)/2."""
        joint = self.fit.joint
        draws = {name: v for name, v in self.params.items() if name in joint.slices}
        found = joint.constrain(self.fit.theta)
        rows = {}
        for name, values in draws.items():
            numbers = _numbers(joint, name, values)
            best = _numbers(joint, name, np.asarray(found[name])[None])[0]
            low, high = np.quantile(numbers, [0.5 - level / 2, 0.5 + level / 2], axis=0)
            for k, label in enumerate(site_names(joint, name, numbers.shape[1])):
                rows[label] = (best[k], numbers[:, k].std(ddof=1), low[k], high[k])
        ends = (f"{50 * (1 - level):g} %", f"{50 * (1 + level):g} %")
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["estimate", "SE", *ends])
        frame.index.name = "parameter"
        return frame

    def densities(self, key: jax.Array | None = None, points: int = 121) -> dict[str, Density]:
        """The marginal density of each random effect, by name, for `plots.density_bands`.

        Of a Gaussian by formula; else from 50 000 draws, smoothed, the same random numbers for
        all replicates.

        Args:
            key: random key; `jax.random.key(0)` by default.
            points: of the grid.
        """
        fit, key = self.fit, jax.random.key(0) if key is None else key
        theta = np.concatenate([np.asarray(fit.theta)[None], self.theta[self.converged]])
        weights = {
            name: np.concatenate([np.asarray(fit.weights[name])[None], w[self.converged]])
            for name, w in self.weights.items()
        }
        grids, curves = _densities(fit, key, theta, weights, points)
        return {
            name: Density(grids[j], curves[0, j], curves[1:, j])
            for j, name in enumerate(fit.joint.roles.effect_names)
        }


class Density(NamedTuple):
    """The marginal density of a random effect on a grid."""

    grid: np.ndarray  # [point]
    estimate: np.ndarray  # [point]
    replicates: np.ndarray  # [replicate, point]

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Its pointwise band: quantiles over replicates, each `[point]`."""
        low, high = np.quantile(self.replicates, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high


# What is reported.


def _numbers(joint: Joint, name: str, values: np.ndarray) -> np.ndarray:
    """A parameter as rows of a table, `[replicate, number]`."""
    support = base_support(joint.roles.population[name].support)
    if support is constraints.corr_cholesky and values.ndim == 3:
        matrix = values @ np.swapaxes(values, 1, 2)
        return matrix[:, *np.tril_indices(matrix.shape[1], -1)]
    return values.reshape(len(values), -1)


_BINS = 400


def _densities(fit: Fit, key, theta, weights, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Grids `[effect, point]`, and densities `[replicate, effect, point]`."""
    joint, study = fit.joint, fit.study
    gaussian = all(isinstance(joint.roles.laws.get(n), GaussianRandomEffect)
                   for n in joint.roles.effects)  # fmt: skip
    each = -(-50_000 // study.subjects.size)

    @soon
    def moments(theta, weights):
        return joint.effect_moments(key, theta, weights, study)

    @soon
    def draw(theta, weights):
        draws = joint.sample_effects(key, theta, weights, study, each)
        return draws.reshape(-1, joint.effect_size)

    def at(function, r):
        return jax.tree.map(np.asarray, function(theta[r], {n: w[r] for n, w in weights.items()}))

    mean, covariance = at(moments, 0)
    reach = 4.5 * np.sqrt(np.diag(covariance))[:, None]
    grids = mean[:, None] + reach * np.linspace(-1, 1, points)
    curves = []
    for r in range(len(theta)):
        if gaussian:
            mean, covariance = at(moments, r)
            curves.append(norm.pdf(grids, mean[:, None], np.sqrt(np.diag(covariance))[:, None]))
        else:
            draws = at(draw, r)
            curves.append([_smooth(x, grid) for x, grid in zip(draws.T, grids, strict=True)])
    return grids, np.array(curves)


def _smooth(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """A smoothed histogram at the points of a grid: half of Scott's bandwidth, which is for a
    single mode."""
    counts, edges = np.histogram(x, bins=_BINS, range=(grid[0], grid[-1]))
    width = edges[1] - edges[0]
    bandwidth = 0.5 * min(x.std(), np.subtract(*np.quantile(x, [0.75, 0.25])) / 1.34)
    curve = gaussian_filter1d(counts.astype(float), bandwidth * len(x) ** -0.2 / width)
    return np.interp(grid, 0.5 * (edges[1:] + edges[:-1]), curve / (len(x) * width))
