"""Residual error models against their formulas."""

import numpy as np
import pytest
from scipy import stats

from flowme import residual

F, Y, A, B = np.array([0.5, 2.0, 10.0]), np.array([0.7, 1.5, 12.0]), 0.3, 0.2

CASES = {
    "constant": (residual.constant(F, A), stats.norm(F, A)),
    "proportional": (residual.proportional(F, B), stats.norm(F, B * F)),
    "combined1": (residual.combined1(F, A, B), stats.norm(F, A + B * F)),
    "combined2": (residual.combined2(F, A, B), stats.norm(F, np.sqrt(A**2 + B**2 * F**2))),
    "exponential": (residual.exponential(F, A), stats.lognorm(A, scale=F)),
}


@pytest.mark.parametrize(("law", "expected"), CASES.values(), ids=CASES.keys())
def test_density(law, expected):
    np.testing.assert_allclose(law.log_prob(Y), expected.logpdf(Y))


def test_negative_predictions_have_positive_errors():
    for law in (residual.proportional(-F, B), residual.combined1(-F, A, B)):
        assert np.all(law.scale > 0)
