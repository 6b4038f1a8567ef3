"""Figures have named axes with units, and show what they say."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from fits import theophylline, theophylline_nuts
from matplotlib.figure import Figure

from flowme import plots
from flowme.convert import to_arviz
from flowme.plots import checks, effects
from flowme.predict import estimate


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_individual_fits_show_every_subject_and_measurement():
    fit = theophylline()
    figure = plots.individual_fits(fit, subjects=5)
    assert figure.get_supxlabel() == "time (h)" and figure.get_supylabel() == "conc (mg/L)"
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in panels] == [str(i) for i in fit.study.ids[:5]]
    for i, ax in enumerate(panels):
        typical, own, seen = ax.get_lines()
        assert typical.get_linestyle() != "-" and own.get_linestyle() == "-"
        measured = fit.study.values["conc"][i, fit.study.observed["conc"][i]]
        np.testing.assert_array_equal(seen.get_ydata(), measured)
    with pytest.raises(ValueError, match="expected an outcome among"):
        plots.individual_fits(fit, outcome="effect")


@pytest.mark.parametrize("individual", [False, True])
def test_random_effects_show_the_conditional_means(individual):
    fit = theophylline()
    figure = plots.random_effects(fit, individual=individual)
    joint, above, beside = figure.axes
    labels = ("ka (1/h)", "CL (L/h)") if individual else ("η, ka", "η, CL")
    assert (joint.get_xlabel(), joint.get_ylabel()) == labels
    point = estimate(fit)
    expected = np.asarray(point.individual()["psi"])[:, [0, 2]] if individual else point.eta
    dots = joint.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, expected, rtol=1e-12)
    assert above.get_xlim() == joint.get_xlim() and beside.get_ylim() == joint.get_ylim()


def test_random_effects_of_a_run_against_a_fit_and_of_a_tree():
    fit = theophylline()
    assert isinstance(plots.random_effects(theophylline_nuts(), fit), Figure)
    tree = to_arviz(fit)
    figure = plots.random_effects(tree, tree, individual=True)
    assert figure.axes[0].get_xlabel() == "ka (1/h)"
    with pytest.raises(ValueError, match="expected `against`"):
        plots.random_effects(tree, individual=True)


def test_contours_hold_the_share_they_say():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 400_000))
    density, *_ = effects._grid_density(x, y, [(-5.0, 5.0), (-5.0, 5.0)])
    for share, level in zip((0.9, 0.5), effects._levels(density, (0.9, 0.5)), strict=True):
        radius = np.sqrt(-2 * np.log(1 - share))  # of the disc of a standard normal
        area = np.sum(density >= level) * (10.0 / density.shape[0]) ** 2
        assert abs(area / (np.pi * radius**2) - 1) < 0.1


def test_vpc_bins_every_observation():
    fit = theophylline()
    (ax,) = plots.vpc(fit, replicates=20).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (h)", "conc (mg/L)")
    assert "10 time bins, of equally many observations" in ax.get_title(loc="left")
    time = fit.study.time[fit.study.observed["conc"]]
    where, edges, common = checks._bins(time, 10)
    assert not common and np.bincount(where).min() >= 5 and np.bincount(where).sum() == time.size
    assert np.all((edges[where] <= time) & (time <= edges[where + 1]))


def test_common_times_are_bins_of_their_own():
    where, edges, common = checks._bins(np.tile([4.0, 8.0, 12.0], 20), 3)
    assert common and len(edges) == 4
    np.testing.assert_array_equal(where, np.tile([0, 1, 2], 20))


def test_convergence_shows_the_held_out_subjects_of_a_flow():
    fit = theophylline()
    (ax,) = plots.convergence(fit).axes
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), -2 * fit.history)
    assert ax.get_xlabel() == "iteration" and ax.get_ylabel() == "-2 log-likelihood"
    learned = dataclasses.replace(fit, selection=np.linspace(0.0, 10.0, 30))
    assert len(plots.convergence(learned).axes) == 2
    with pytest.raises(TypeError, match="expected a Fit"):
        plots.convergence(theophylline_nuts())
