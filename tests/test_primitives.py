"""The statements of a model, and every NumPyro handler and method on it, unmodified."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from cases import line_model, line_study, theophylline_model
from numpyro import handlers, infer

import flowme as fm
from flowme.infer.joint import Joint

PARAMETERS = {"level", "slope", "a", "eta_omega", "eta_corr_cholesky"}


@pytest.fixture(scope="module")
def study():
    return line_study(5)


def sites(model, study, **how):
    return handlers.trace(handlers.seed(model, how.get("seed", 0))).get_trace(study)


def test_trace_and_seed(study):
    found = sites(line_model(), study)
    assert {*PARAMETERS, "eta", "psi", "y", "subject"} == set(found)
    assert found["eta"]["value"].shape == (5, 2)
    assert found["psi"]["value"].shape == (5, 2)
    assert found["y"]["fn"].log_prob(found["y"]["value"]).shape == (5,)
    again = sites(line_model(), study)
    np.testing.assert_array_equal(found["eta"]["value"], again["eta"]["value"])


def test_substitute_and_condition(study):
    eta = jnp.arange(10.0).reshape(5, 2)
    for handler in (handlers.substitute, handlers.condition):
        found = sites(handler(line_model(), data={"eta": eta, "level": 3.0}), study)
        np.testing.assert_array_equal(found["eta"]["value"], eta)
        np.testing.assert_allclose(found["psi"]["value"][:, 0], 3.0 + eta[:, 0])


def test_block_hides(study):
    assert "eta" not in sites(handlers.block(line_model(), hide=["eta"]), study)


def test_replace_effect_changes_one_line(study):
    names = ["level", "slope"]
    swapped = fm.replace_effect(line_model(), eta=fm.FlowRandomEffect(names))
    written = line_model(fm.FlowRandomEffect(names))
    found, expected = sites(swapped, study), sites(written, study)
    assert found.keys() == expected.keys() and "eta_weights" in found
    np.testing.assert_array_equal(found["y"]["value"], expected["y"]["value"])
    diagonal = fm.replace_effect(line_model(), eta=fm.GaussianRandomEffect(names))
    assert "eta_corr_cholesky" not in sites(diagonal, study)


def test_the_last_replacement_counts(study):
    """So that a program of the model with one law serves however the law came there."""
    names = ["level", "slope"]
    model, gaussian = line_model(), fm.GaussianRandomEffect(names, full=True)
    twice = fm.replace_effect(
        fm.replace_effect(model, eta=fm.FlowRandomEffect(names)), eta=gaussian
    )
    once = fm.replace_effect(model, eta=fm.GaussianRandomEffect(names, full=True))
    assert twice == once and hash(twice) == hash(once)
    assert Joint.of(twice, study) == Joint.of(once, study)
    assert not Joint.of(twice, study).roles.weights


def test_log_likelihood_counts_observed_cells_only(study):
    """One per subject, and what stands in cells that are not observed does not matter."""
    model = handlers.seed(line_model(), 0)
    found = handlers.trace(model).get_trace(study)
    psi, a = found["psi"]["value"], found["a"]["value"]
    keep = study.observed["y"]
    f = psi[:, :1] + psi[:, 1:] * study.time
    each = np.where(keep, dist.Normal(f, a).log_prob(study.values["y"]), 0.0)
    np.testing.assert_allclose(found["y"]["fn"].log_prob(found["y"]["value"]), each.sum(1))


def test_masked_cells_never_spoil_a_gradient():
    """A proportional error at a prediction of 0 has no finite density; where the cell is not
    observed, value and gradient stay finite."""
    frame = pd.DataFrame(
        {"id": [1, 1, 1], "t": [0.0, 1.0, 2.0], "y": [np.nan, 1.1, 2.3], "z": [0.2, 0.1, np.nan]}
    )
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome=["y", "z"])

    def log_density(slope):
        law = fm.residual.proportional(slope * jnp.asarray(study.time), 0.1)
        model = handlers.seed(lambda: fm.observe("y", law, study), 0)
        return (
            handlers.trace(model)
            .get_trace()["y"]["fn"]
            .log_prob(handlers.trace(model).get_trace()["y"]["value"])[0]
        )

    # Compiled, as in an estimation: NumPyro would refuse a scale of 0 that it can see.
    value, slope = jax.jit(jax.value_and_grad(log_density))(1.0)
    exact = (
        dist.Normal(jnp.array([1.0, 2.0]), jnp.array([0.1, 0.2]))
        .log_prob(jnp.array([1.1, 2.3]))
        .sum()
    )
    np.testing.assert_allclose(value, exact)
    assert np.isfinite(slope)


def test_a_subject_never_measured_for_an_outcome_spoils_nothing():
    frame = pd.DataFrame(
        {"id": [1, 1, 2], "t": [0.0, 1.0, 0.0], "y": [np.nan, 1.1, np.nan], "z": [0.2, 0.1, 0.3]}
    )
    study = fm.Study.from_frame(frame, subject="id", time="t", outcome=["y", "z"])

    def total(slope):
        law = fm.residual.proportional(slope * jnp.asarray(study.time), 0.1)
        site = handlers.trace(handlers.seed(lambda: fm.observe("y", law, study), 0)).get_trace()[
            "y"
        ]
        return site["fn"].log_prob(site["value"]).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(1.0)
    np.testing.assert_allclose(value, dist.Normal(1.0, 0.1).log_prob(1.1))
    assert np.isfinite(slope) and abs(slope) > 0


def test_predictive(study):
    """Prior predictive on a study without values; the posterior one with draws given."""
    draws = infer.Predictive(line_model(), num_samples=7)(jax.random.key(0), study.unobserved())
    assert draws["y"].shape == (7, *study.time.shape)
    assert draws["eta"].shape == (7, 5, 2)
    given = {name: draws[name] for name in PARAMETERS | {"eta"}}
    again = infer.Predictive(line_model(), given)(jax.random.key(1), study.unobserved())
    np.testing.assert_allclose(again["psi"], draws["psi"])
    assert not np.allclose(again["y"], draws["y"])


@pytest.mark.parametrize("flow", [False, True], ids=["gaussian", "flow"])
def test_svi(study, flow):
    """NumPyro's SVI with an automatic guide improves its objective and learns the weights."""
    model = line_model(fm.FlowRandomEffect(["level", "slope"]) if flow else None)
    svi = infer.SVI(
        model, infer.autoguide.AutoNormal(model), numpyro.optim.Adam(0.02), infer.Trace_ELBO()
    )
    result = svi.run(jax.random.key(0), 100, study, progress_bar=False)
    assert np.mean(result.losses[-20:]) < np.mean(result.losses[:20])
    if flow:
        start = fm.FlowRandomEffect(["level", "slope"]).weights
        assert np.max(np.abs(result.params["eta_weights"] - start)) > 1e-3


@pytest.mark.parametrize("flow", [False, True], ids=["gaussian", "flow"])
def test_mcmc(study, flow):
    """NumPyro's own MCMC(NUTS(model)) runs as written."""
    model = line_model(fm.FlowRandomEffect(["level", "slope"]) if flow else None)
    mcmc = infer.MCMC(infer.NUTS(model), num_warmup=50, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), study)
    draws = mcmc.get_samples()
    assert draws["psi"].shape == (20, 5, 2)
    assert np.all(np.isfinite(draws["eta"])) and np.ptp(draws["level"]) > 0


def test_population_carries_what_it_is_given(study):
    found = sites(theophylline_model(), fm.datasets.theophylline())
    assert found["V"]["infer"]["flowme"]["unit"] == "L"

    def model(study):
        fm.population("V", dist.LogNormal(3.0, 1.0), fixed=31.0)

    found = sites(model, study)
    assert found["V"]["type"] == "deterministic" and found["V"]["value"] == 31.0


def any_law(study, shape=None):
    shape = study.time.shape if shape is None else shape
    return dist.Normal(jnp.zeros(shape), 1.0)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (
            lambda s: fm.population("V", 3.0),
            TypeError,
            "expected a NumPyro distribution as the prior",
        ),
        (
            lambda s: fm.population("V", dist.LogNormal(0, 1), init=-1.0),
            ValueError,
            "expected init of population parameter 'V' within the support",
        ),
        (
            lambda s: fm.population("V", dist.LogNormal(0, 1), fixed=0.0),
            ValueError,
            "expected fixed of population parameter 'V'",
        ),
        (
            lambda s: fm.random_effect("eta", 1.0, s.subjects),
            TypeError,
            "expected a distribution for random effect 'eta'",
        ),
        (
            lambda s: fm.random_effect("eta", dist.Normal(0, 1), s.subjects),
            ValueError,
            "one name per component",
        ),
        (
            lambda s: fm.individual(s.subjects, V=jnp.ones(3)),
            ValueError,
            r"expected individual parameter 'V' to be a number or of shape \[subject\] = \[5\]",
        ),
        (
            lambda s: fm.individual(s.subjects, phi=1.0, psi=2.0),
            ValueError,
            "expected a site name other than those of the parameters",
        ),
        (lambda s: fm.individual(s.subjects), ValueError, "at least one individual parameter"),
        (lambda s: fm.observe("conc", any_law(s), s), ValueError, r"one of \['y'\]; got 'conc'"),
        (
            lambda s: fm.observe("y", any_law(s, (5,)), s),
            ValueError,
            r"expected a law of batch shape \[subject, time\]",
        ),
    ],
)
def test_bad_input(study, bad, error, words):
    with pytest.raises(error, match=words), handlers.seed(rng_seed=0):
        bad(study)


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (lambda f: dist.Poisson(jnp.exp(f)), "expected observations of 'y' in the support"),
        (lambda f: dist.Binomial(12, logits=f), "subject s"),
    ],
)
def test_observations_outside_their_law_are_refused(study, law, words):
    def model(study):
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level"]), study.subjects)
        fm.observe("y", law(eta.level[:, None] + 0 * study.time), study)

    with pytest.raises(ValueError, match=words):
        fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)


def test_positive_random_effect_is_refused(study):
    def model(study):
        eta = fm.random_effect(
            "eta", dist.LogNormal(0, 1).expand([1]).to_event(1), study.subjects, names=["V"]
        )
        fm.observe("y", dist.Normal(eta.V[:, None] + 0 * study.time, 1.0), study)

    with pytest.raises(ValueError, match="expected random effect 'eta' to be real-valued"):
        fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
