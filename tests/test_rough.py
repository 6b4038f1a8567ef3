"""Where no step raises a likelihood that is not smooth: within what its maximum is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from flowme.infer.climb import Ascent, Climb
from flowme.infer.newton import MEANS


def ended(gain, added, tolerance=1e-3):
    newton = SimpleNamespace(added=lambda *_: added)
    climb = Climb(newton, None, {}, tolerance, 100, (None, ""), None)
    ascent = Ascent(SimpleNamespace(gain=gain, rule=MEANS), np.zeros(1), 9, True, True, why="old")
    return climb._rough(ascent, None)


@pytest.mark.parametrize(
    "gain, added, within",
    [(2e-3, 1e-3 - 1e-6, "0.063"), (1e-3, -3e-3, "0.089")],  # √(2 δ), δ the larger one
)
def test_converged_where_what_is_left_is_a_tenth_of_a_standard_error(gain, added, within):
    found = ended(gain, added)
    assert found.converged
    assert f"within about {within} standard errors" in found.why


@pytest.mark.parametrize(
    "gain, added, tolerance",
    [(2e-3, -0.13, 1e-3), (6e-3, 5.9e-3, 1e-3), (2e-3, 1.5e-3, 1e-3), (4e-3, 3e-3, 1e-8)],
    ids=["misses", "promises", "leads on", "asked for more"],
)
def test_not_converged_where_it_is_more(gain, added, tolerance):
    found = ended(gain, added, tolerance)
    assert not found.converged and found.why.startswith("stopped: no step raises")


@pytest.mark.parametrize("added", [np.nan, np.inf])
def test_a_likelihood_that_is_not_finite_says_nothing(added):
    found = ended(1e-3, added)
    assert not found.converged and found.why == "old"
