"""Profile likelihoods against exact ones, found by another optimiser."""

from functools import cache

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import line_exact, line_model, line_study, normal_study, one_level
from scipy.optimize import minimize, minimize_scalar

import flowme as fm
from flowme.infer.clock import Clock
from flowme.infer.errors import parameter_names


@cache
def line_fit():
    return fm.VariationalEM(line_model()).run(jax.random.key(0), line_study(24), progress=False)


def exact_profile(fit, place, start):
    """-2 max log p(y; θ) of the linear mixed model with one element of θ held."""
    free = np.arange(fit.joint.size) != place

    def minus_two_ll(x):
        theta = start.copy()
        theta[free] = x
        values = fit.joint.constrain(jnp.asarray(theta))
        chol = values["eta_omega"][:, None] * values["eta_corr_cholesky"]
        fixed = (float(values[k]) for k in ("level", "slope", "a"))
        return -2 * line_exact(fit.study, *fixed, np.asarray(chol @ chol.T))[0].sum()

    return minimize(minus_two_ll, start[free], method="BFGS", options={"gtol": 1e-3}).fun


@pytest.mark.parametrize("name", ["slope", "omega(slope)"])
def test_line_profile_is_exact(name):
    fit = line_fit()
    found = fm.profile(fit, name)
    assert not found.messages
    place = parameter_names(fit.joint).index(name)
    low, high = found.interval
    assert low < found.estimate < high and np.all(np.diff(found.value) > 0)
    best = -2 * fit.history[-1]
    for end in (0, -1):
        np.testing.assert_allclose(found.value[end], found.interval[end])
        exact = exact_profile(fit, place, found.theta[end])
        np.testing.assert_allclose(found.minus_two_ll[end], exact, atol=2e-3)
        np.testing.assert_allclose(exact - best, 3.8415, atol=6e-3)
    np.testing.assert_allclose(found.rise.min(), 0.0, atol=1e-4)


def test_a_profile_compiles_nothing_and_does_not_depend_on_the_scale():
    fit = line_fit()
    fm.profile(fit, "a")
    clock = Clock()
    found = fm.profile(fit, "level", level=0.9)
    assert clock.read().compilation == 0.0
    error = fit.standard_errors()["level"]  # near enough a parabola
    np.testing.assert_allclose(np.diff(found.interval), 2 * 1.645 * error, rtol=0.06)
    np.testing.assert_allclose(found.limit, 2.7055, rtol=1e-4)


def test_an_interval_that_does_not_close_says_so():
    """Means all alike: ω is estimated 0, and its upper end known in closed form."""
    study = normal_study(0.0)
    fit = fm.VariationalEM(one_level()).run(jax.random.key(0), study, progress=False)
    found = fm.profile(fit, "omega(level)")
    assert found.interval[0] == 0.0
    assert any("open below" in message for message in found.messages)
    y = study.values["y"]
    subjects, times = y.shape
    within = np.sum((y - y.mean(1, keepdims=True)) ** 2)

    def minus_two_ll(log_a, omega):
        v = np.exp(2 * log_a)
        return (
            subjects * (times - 1) * np.log(v)
            + within / v
            + subjects * np.log(v + times * omega**2)
        )

    ends = [minimize_scalar(minus_two_ll, args=(w,)).fun for w in (0.0, found.interval[1])]
    np.testing.assert_allclose(ends[1] - ends[0], 3.8415, atol=6e-3)


def test_names():
    with pytest.raises(ValueError, match="expected a parameter among .*'slope'.*got 'CL'"):
        fm.profile(line_fit(), "CL")
    with pytest.raises(ValueError, match="expected a level"):
        fm.profile(line_fit(), "slope", level=95)


def test_plot():
    found = fm.profile(line_fit(), "slope")
    (ax,) = fm.plots.profile(found).axes
    assert ax.get_xlabel() == "slope" and ax.get_ylabel() == "rise of -2 log-likelihood"
    np.testing.assert_array_equal(ax.get_lines()[1].get_xdata(), found.value)
    plt.close("all")
    with pytest.raises(TypeError, match="expected what flowme.profile returns"):
        fm.plots.profile(line_fit())
