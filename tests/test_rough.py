"""Where no step raises a likelihood that is not smooth: within what its maximum is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from flowme.infer.climb import Ascent, Climb
from flowme.infer.newton import MEANS


def ended(gain, missed):
    newton = SimpleNamespace(missed=lambda *_: missed)
    climb = Climb(newton, None, {}, 1e-3, 100, (None, ""), None)
    ascent = Ascent(SimpleNamespace(gain=gain, rule=MEANS), np.zeros(1), 9, True, True, why="old")
    return climb._rough(ascent, None)


@pytest.mark.parametrize(
    "gain, missed, within",
    [(2e-3, 1e-3, "0.063"), (1e-3, 4e-3, "0.089")],  # √(2 δ), δ the larger one
)
def test_converged_where_what_is_left_is_a_tenth_of_a_standard_error(gain, missed, within):
    found = ended(gain, missed)
    assert found.converged
    assert f"within about {within} standard errors" in found.why


@pytest.mark.parametrize("gain, missed", [(2e-3, 0.13), (6e-3, 1e-4)])
def test_not_converged_where_it_is_more(gain, missed):
    found = ended(gain, missed)
    assert not found.converged and found.why.startswith("stopped: no step raises")


@pytest.mark.parametrize("missed", [np.nan, np.inf])
def test_a_likelihood_that_is_not_finite_says_nothing(missed):
    found = ended(1e-3, missed)
    assert not found.converged and found.why == "old"
