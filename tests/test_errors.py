"""Errors of estimates, against exact likelihoods, independent quadrature and known formulas."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from cases import differences, line_exact, line_model, line_study, normal_study, one_level
from fits import rough_fit

import flowme as fm
from flowme.infer.doubts import _at_bounds, doubts
from flowme.infer.errors import invert
from flowme.infer.joint import Joint


def line_log_likelihood(joint, study, theta):
    """The exact log p(y_i; θ) of the linear mixed model."""
    values = joint.constrain(jnp.asarray(theta))
    chol = values["eta_omega"][:, None] * values["eta_corr_cholesky"]
    fixed = (float(values[k]) for k in ("level", "slope", "a"))
    return line_exact(study, *fixed, np.asarray(chol @ chol.T))[0]


@cache
def line_fit():
    return fm.VariationalEM(line_model()).run(jax.random.key(0), line_study(), progress=False)


def test_line_information_and_sandwich_are_those_of_the_exact_likelihood():
    fit = line_fit()
    scores, hessian = differences(
        lambda t: line_log_likelihood(fit.joint, fit.study, t), np.asarray(fit.theta)
    )
    outer, inverse = scores @ scores.T, np.linalg.inv(-hessian)
    np.testing.assert_allclose(fit.covariance(), inverse, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(fit.outer, outer, rtol=2e-3, atol=2e-2)
    robust = inverse @ outer @ inverse
    np.testing.assert_allclose(fit.covariance(robust=True), robust, rtol=5e-3, atol=1e-5)
    errors = fit.standard_errors(robust=True, unconstrained=True)
    np.testing.assert_allclose(np.concatenate(list(errors.values())), np.sqrt(np.diag(robust)),
                               rtol=2e-3)  # fmt: skip
    # The logarithm of a has the relative standard error of a.
    own = fit.standard_errors()["a"] / fit.params["a"]
    np.testing.assert_allclose(own, fit.standard_errors(unconstrained=True)["a"][0], rtol=1e-9)
    assert not fit.messages


def test_correlations_have_names_and_a_condition_number():
    found = line_fit().correlation()
    names = ["level", "slope", "a", "omega(level)", "omega(slope)", "corr(level, slope)"]
    assert list(found.matrix.index) == list(found.matrix.columns) == names
    np.testing.assert_allclose(np.diag(found.matrix), 1.0)
    values = np.linalg.eigvalsh(found.matrix.to_numpy())
    np.testing.assert_allclose(found.condition_number, values[-1] / values[0])
    text = str(fm.summary(line_fit(), robust=True))
    assert f"Condition number of the correlations of estimates {found.condition_number:.1f}" in text
    frame = fm.summary(line_fit(), robust=True).frame
    expected = line_fit().standard_errors(robust=True)["slope"]
    np.testing.assert_allclose(frame.loc["slope", "robust SE"], expected, rtol=1e-9)


def test_errors_are_saved(tmp_path):
    fit = line_fit()
    again = fm.load(fm.save(fit, tmp_path / "fit"), fit.joint.model, fit.study)
    np.testing.assert_array_equal(again.covariance(robust=True), fit.covariance(robust=True))
    assert again.method == fit.method


def test_units_do_not_decide_whether_there_is_an_inverse():
    information = np.array([[1e14, 1e6], [1e6, 1.0]])
    np.testing.assert_allclose(invert(information) @ information, np.eye(2), atol=1e-6)
    assert invert(np.array([[1.0, 1.0], [1.0, 1.0]])) is None
    assert invert(None) is None and invert(np.array([[np.nan]])) is None
    fit = dataclasses.replace(line_fit(), information=None)
    assert fit.correlation() is None and fit.standard_errors(robust=True) is None


# What a study does not support is named.


def named(model, study, **options):
    return fm.VariationalEM(model, **options).run(jax.random.key(0), study, progress=False)


def test_an_effect_that_vanishes_is_named():
    fit = named(one_level(), normal_study(0.0))
    (message,) = fit.messages
    assert "omega(level) runs to its bound 0" in message and "leave this random effect" in message
    errors = fit.standard_errors()
    n = fit.study.time.size
    np.testing.assert_allclose(errors["level"], fit.params["a"] / np.sqrt(n), rtol=1e-3)


def test_two_parameters_in_one_place_are_named():
    fit = named(one_level(sites=("level", "shift")), normal_study(1.0), starts=1)
    assert fit.covariance() is None
    assert any("not positive definite along level, shift" in m for m in fit.messages)
    assert "No standard errors" in str(fm.summary(fit))


def test_an_effect_that_is_not_identified_is_named():
    """Its scale is known, from a prior, and the study says nothing of it."""
    study = normal_study(1.0)

    def model(study):
        level = fm.population("level", dist.Normal(0.0, 10.0))
        eta = fm.random_effect("eta", dist.Normal(0, 1).expand([2]).to_event(1), study.subjects,
                               names=["level", "slope"])  # fmt: skip
        f = level + eta.level + 0.01 * eta.slope
        fm.observe("y", fm.residual.constant(f[:, None] + 0.0 * study.time, 0.5), study)

    messages = named(model, study).messages
    assert any("slope is not identified (shrinkage 100 %)" in m for m in messages)
    assert not any("effect level" in m for m in messages)


def test_a_component_that_shrinks_to_a_point_is_named():
    """The ω of a mixture are `[component, effect]`: its effect is still there."""
    study = normal_study(between=1.0, subjects=6)
    joint = Joint.of(one_level(effect=fm.MixtureRandomEffect(["level"])), study)
    flat = np.zeros(joint.size, bool)
    flat[joint.slices["eta_omega"]] = [False, True]
    vanished, messages = _at_bounds(rough_fit(joint, study), flat, -np.ones(joint.size))
    assert not vanished.any() and len(messages) == 1
    assert "omega[1] runs to its bound 0" in messages[0]
    assert "take one component less" in messages[0]


def test_a_likelihood_that_bends_the_wrong_way_is_no_bound():
    """It is said that nothing is determined there, not that the parameter runs away."""
    fit = line_fit()
    bent = np.array(fit.information)
    bent[fit.joint.slices["a"]] *= -1.0
    found = doubts(dataclasses.replace(fit, information=bent), fit.conditional.mean, np.zeros(6))
    assert any("not positive definite along a" in message for message in found)
    assert not any("runs to its bound" in message for message in found)
