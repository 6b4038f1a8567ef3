"""Nodes around the mean and covariance of each conditional distribution.

Mode and curvature see a point of p(η_i | y_i), mean and covariance all of it: nodes around the
latter (Naylor & Smith 1982, Applied Statistics 31, 214) are better where it is far from Gaussian,
above all on a ridge. They ask for an evaluation around the former first.
"""

from __future__ import annotations

import numpy as np

from flowme.infer.conditional import Conditional


def by_moments(mean: np.ndarray, covariance: np.ndarray) -> Conditional:
    """N(mean_i, covariance_i); NaN where a covariance is not positive definite in the unit of each
    effect.

    Args:
        mean: E(η_i | y_i), `[subject, effect]`.
        covariance: Cov(η_i | y_i), `[subject, effect, effect]`.
    """
    sd = np.sqrt(np.maximum(np.einsum("sdd->sd", covariance), np.finfo(float).tiny))
    correlation = covariance / (sd[:, :, None] * sd[:, None, :])
    usable = np.all(np.isfinite(correlation), (1, 2))
    one = np.eye(covariance.shape[1])
    correlation = np.where(usable[:, None, None], correlation, one)
    usable &= np.linalg.eigvalsh(correlation)[:, 0] > 1e-9
    factor = np.linalg.cholesky(np.where(usable[:, None, None], correlation, one))
    return Conditional(mean, np.where(usable[:, None, None], sd[:, :, None] * factor, np.nan))
