"""The bootstrap of a learned flow: a file of its own, for it compiles for long."""

import jax
import numpy as np
from cases import normal_study, one_level

import flowme as fm


def test_a_flow_is_learned_anew(tmp_path):
    """After a few updates it is nearly the Gaussian: the mean's standard error is s/√n again."""
    model = one_level(effect=fm.FlowRandomEffect(["level"]))
    vem = fm.VariationalEM(model, flow_updates=5, folds=0)
    fit = vem.run(jax.random.key(0), normal_study(1.0, subjects=40, times=2), progress=False)
    assert fit.selected
    options = {"group": 10, "flow_updates": 5, "progress": False, "path": tmp_path / "flow"}
    found = fm.bootstrap(fit, jax.random.key(1), 30, **options)
    assert found.converged.all() and found.weights["eta_weights"].shape[0] == 30
    assert np.all(found.weights["eta_weights"].std(0).max() > 0)
    means = fit.study.values["y"].mean(1)
    ratio = found.table().loc["level", "SE"] / means.std() * np.sqrt(len(means))
    assert abs(ratio - 1) < 4 / np.sqrt(2 * 30)
    again = fm.bootstrap(fit, jax.random.key(1), 30, **options)
    np.testing.assert_array_equal(again.theta, found.theta)
    density = found.densities()["level"]
    mass = density.replicates.sum(1) * (density.grid[1] - density.grid[0])
    np.testing.assert_allclose(mass, 1.0, atol=0.02)
