"""Nodes of conditional distributions."""

import jax
import numpy as np

from flowme.infer.conditional import resample


def test_draws_are_as_frequent_as_their_shares():
    """Over 20 000 draws, within four standard errors; a node without a share is never drawn."""
    share = np.array([[0.0, 0.1], [0.2, 0.4], [0.0, 0.5], [0.8, 0.0]])  # [node, subject]
    log_share = np.log(np.where(share > 0, share, 1.0)) + 3.0
    log_share[share == 0] = [-np.inf, np.nan, -np.inf]
    eta = np.arange(8.0).reshape(4, 2, 1)
    draws = np.asarray(resample(jax.random.key(0), eta, log_share, 20_000))
    assert draws.shape == (20_000, 2, 1)
    found = np.stack([[(draws[:, i, 0] == eta[k, i, 0]).mean() for i in (0, 1)] for k in range(4)])
    error = np.sqrt(share * (1 - share) / 20_000)
    np.testing.assert_array_less(np.abs(found - share), 4 * error + 1e-12)
