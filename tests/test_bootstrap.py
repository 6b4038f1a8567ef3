"""The bootstrap against formulas, and taken up again after an interruption."""

from functools import cache

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import normal_study, one_level
from scipy.stats import norm

import flowme as fm
from flowme.infer.clock import Clock


@cache
def level_fit():
    study = normal_study(1.0, subjects=40, times=2)
    return fm.VariationalEM(one_level()).run(jax.random.key(0), study, progress=False)


@cache
def level_bootstrap():
    return fm.bootstrap(level_fit(), jax.random.key(1), 400, progress=False)


def test_mean_of_a_normal_sample():
    """The estimate is the mean of the subjects' means ȳ_i; in each replicate their weighted mean,
    and its standard error s/√n (with the divisor n) within 4 of its own, which is 1/√(2 · 400)."""
    fit, found = level_fit(), level_bootstrap()
    assert found.converged.all() and not found.messages
    means, n = fit.study.values["y"].mean(1), fit.study.subjects.size
    assert np.all(found.counts.sum(1) == n)
    np.testing.assert_allclose(found.params["level"], found.counts @ means / n, atol=2e-4)
    error = means.std() / np.sqrt(n)
    table = found.table()
    assert abs(table.loc["level", "SE"] / error - 1) < 4 / np.sqrt(2 * 400)
    np.testing.assert_allclose(
        table.loc["level", ["2.5 %", "97.5 %"]], means.mean() + 1.96 * error * np.array([-1, 1]),
        atol=0.35 * error,
    )  # fmt: skip
    assert list(table.index) == ["level", "a", "omega(level)"]


def test_weights_are_subjects_repeated():
    """A replicate is the estimate from a study in which subjects stand as often as they count."""
    fit, found = level_fit(), level_bootstrap()
    rows = np.repeat(np.arange(fit.study.subjects.size), found.counts[3].astype(int))
    frame = fit.study.to_frame()
    parts = [
        frame[frame["id"] == fit.study.ids[i]].assign(id=number) for number, i in enumerate(rows)
    ]
    study = fm.Study.from_frame(pd.concat(parts), subject="id", time="t", outcome="y")
    again = fm.VariationalEM(one_level()).run(jax.random.key(0), study, progress=False)
    np.testing.assert_allclose(again.theta, found.theta[3], atol=2e-3)


def test_bands_hold_the_density():
    density = level_bootstrap().densities()["level"]
    omega = float(level_fit().params["eta_omega"][0])
    np.testing.assert_allclose(density.estimate, norm.pdf(density.grid, 0, omega), rtol=1e-6)
    low, high = density.band(0.9)
    assert np.all(low <= density.estimate) and np.all(density.estimate <= high)
    (ax,) = fm.plots.density_bands(level_bootstrap()).axes
    assert ax.get_xlabel() == "η, level" and ax.get_ylabel() == "density"
    plt.close("all")


def test_it_goes_on_from_its_file(tmp_path):
    fit, key = level_fit(), jax.random.key(1)
    clock = Clock()
    fm.bootstrap(fit, key, 6, path=tmp_path / "run", group=3, progress=False)
    found = fm.bootstrap(fit, key, 15, path=tmp_path / "run", group=4, progress=False)
    np.testing.assert_array_equal(found.theta, level_bootstrap().theta[:15])
    assert clock.read().compilation == 0.0
    with pytest.raises(ValueError, match="expected .*run.npz to hold replicates of this fit"):
        fm.bootstrap(fit, jax.random.key(2), 15, path=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="at least 2 replicates"):
        fm.bootstrap(fit, key, 1)
    with pytest.raises(TypeError, match="expected what flowme.bootstrap returns"):
        fm.plots.density_bands(fit)
