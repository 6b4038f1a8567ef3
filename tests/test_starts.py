"""Where else a likelihood is climbed from."""

from itertools import combinations

import numpy as np
import pytest
from cases import line_model, line_study, theophylline_model

import flowme as fm
from flowme.infer.around import FAR, around, covering
from flowme.infer.joint import Joint


@pytest.mark.parametrize(("columns", "rows"), [(1, 2), (3, 4), (4, 5), (10, 6), (11, 7), (35, 8)])
def test_any_two_parameters_move_in_all_four_directions(columns, rows):
    """In as few starts as Kleitman & Spencer (1973) prove enough."""
    array = covering(columns)
    assert array.shape == (rows, columns) and np.all(abs(array) == 1)
    for i, j in combinations(range(columns), 2):
        assert len({*zip(array[:, i], array[:, j], strict=True)}) == 4


def test_starts_are_a_factor_of_five_from_the_end_laws_as_they_were():
    study = fm.datasets.theophylline()
    joint = Joint.of(theophylline_model(), study)
    start = np.asarray(joint.unconstrain({}))
    end = np.asarray(joint.unconstrain({"ka": 0.1, "a": 1e-9, "eta_omega": [1e-6, 1.0, 1.0]}))
    found = around(joint, study, start, end)
    values = {name: np.exp(found[:, where]) for name, where in joint.slices.items()}
    np.testing.assert_allclose(np.sort(values["ka"], 0)[[0, -1], 0], [0.02, 0.5])
    low = joint.roles.population["a"].init / 5  # it ran to its bound: taken from the start
    np.testing.assert_allclose(values["a"].min(), low)
    np.testing.assert_allclose(values["eta_omega"], np.full((5, 3), 0.5))
    more = around(joint, study, start, end, 9)
    np.testing.assert_array_equal(more[:5], found)
    assert more.shape == (9, joint.size) and np.all(abs(more - more[:5].mean(0)) < 2.1 * FAR)
    assert len(around(joint, study, start, end, 2)) == 2


def test_real_parameters_move_by_the_scale_of_their_priors():
    study = line_study(3)
    joint = Joint.of(line_model(), study)
    theta = np.asarray(joint.unconstrain({}))
    found = around(joint, study, theta, theta + 1.0)
    where = joint.slices["level"]
    np.testing.assert_allclose(np.unique(found[:, where]), 1.0 + FAR * np.array([-10.0, 10.0]))
