"""Held-out subjects choose a flow and the length of its learning (`flowme.infer.plan`)."""

import numpy as np
import pytest

from flowme.flows import SplineCoupling
from flowme.infer.learn import Block
from flowme.infer.plan import Plan

SUBJECTS = 40
NOISE = np.random.default_rng(0).normal(size=SUBJECTS)


def path(gains):
    """A path of one penalty and two folds whose held-out gains are these, each spread over the
    subjects: number 0 is the Gaussian."""
    each = np.array([0.0, *gains])[:, None] / SUBJECTS * (1 + 0.1 * NOISE)
    values = np.broadcast_to(each[:, None], (len(each), 3, SUBJECTS))
    return Block(values, np.zeros((len(each), 1, 2)), {})


@pytest.fixture
def plan():
    folds = np.arange(SUBJECTS) % 2
    masks = np.stack([folds != 0, folds != 1, np.ones(SUBJECTS, bool)]).astype(float)
    return Plan(folds, 2, masks, np.full(3, 0.3), np.array([2]))


@pytest.mark.parametrize(
    "gains, number",
    [
        ([50, 45, 44, 43, 42, 41, 40, 40, 40, 40], 1),  # as it was started
        ([20, 30, 40, 45, 50, 45, 40, 30, 20, 10], 5),
        ([10, 20, 30, 40, 50], 5),
        ([-1, -2, -3, -4, -5, -6], 0),
    ],
)
def test_the_number_where_held_out_subjects_are_best(plan, gains, number):
    """Also the first: the Gaussian's 0 is not one of the points that a running mean smooths."""
    chosen, candidate, selection = plan.choose(path(gains))
    assert (chosen, candidate) == (number, 0)
    gain = np.array([0.0, *gains]) * (1 + 0.1 * NOISE.mean())
    np.testing.assert_allclose(selection, gain, atol=1e-12)


@pytest.mark.parametrize("firm, penalty", [(30, 0), (44, 0), (90, 1)])
def test_of_penalties_that_are_alike_the_smaller_one(plan, firm, penalty):
    """40 under the small one; how subjects differ makes a standard error of about 6 of it."""
    plan = plan._replace(
        masks=np.tile(plan.masks, (2, 1)), dependence=np.repeat([0.3, 8.0], 3),
        everyone=np.array([2, 5]),
    )  # fmt: skip
    gains = np.array([[40.0] * 6, [firm] * 6]) / SUBJECTS  # [penalty, update]
    each = gains[..., None] + np.stack([NOISE - NOISE.mean(), 0 * NOISE])[:, None]
    each = np.concatenate([np.zeros((2, 1, SUBJECTS)), each], 1)
    values = np.repeat(each.transpose(1, 0, 2), 3, axis=1)
    _, candidate, selection = plan.choose(Block(values, np.zeros((7, 2, 2)), {}))
    assert candidate == penalty
    np.testing.assert_allclose(selection[1:], [40.0, firm][penalty], atol=1e-9)


def test_it_ends_when_nothing_has_improved_for_a_while(plan):
    assert not plan.past_the_best(path([50, 45, 40]))
    assert plan.past_the_best(path([50, *[40] * 9]))


def test_wide_networks_are_as_free_as_narrow_ones():
    """What a hidden unit may add shrinks with the number of units; biases and marginals do not."""
    narrow, wide = (SplineCoupling(width=w) for w in (8, 32))
    assert set(narrow.prior_scale(2)) == {1.0}
    scale = wide.prior_scale(2)
    group, depends = wide.groups(2)
    np.testing.assert_allclose(scale[(group >= 0) & depends[group]], 0.5)
    assert np.sum(scale == 0.5) == 4 * np.sum(
        depends[narrow.groups(2)[0]] & (narrow.groups(2)[0] >= 0)
    )
    assert set(scale[(group < 0) | ~depends[group]]) == {1.0}
