"""Laws of results: predictions, simulations, and the ArviZ object."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import xarray as xr
from fits import absorption, theophylline, theophylline_nuts
from numpyro.infer import MCMC, NUTS

from flowme.convert import Names, reported, to_arviz
from flowme.effects import GaussianRandomEffect
from flowme.infer.joint import Joint
from flowme.infer.marginal import marginal_log_likelihood
from flowme.mixture_effect import MixtureRandomEffect
from flowme.predict import estimate, mcmc_draws, population_draws, predict, simulate
from flowme.primitives import individual, observe, population, random_effect

pytestmark = [
    pytest.mark.filterwarnings("ignore:The inplace keyword:Warning"),  # arviz 0.23, on pandas 3
    # Twelve subjects, some of whom matter: that ArviZ says so is as it should be.
    pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning"),
]


@cache
def of_fit():
    return to_arviz(theophylline(), jax.random.key(2), draws=400)


@cache
def of_nuts():
    return to_arviz(theophylline_nuts())


DIMS = {
    "posterior": {
        "ka": (),
        "V": (),
        "CL": (),
        "a": (),
        "eta_omega": ("effect",),
        "eta_corr": ("effect", "effect_bis"),
        "eta": ("subject", "effect"),
        "psi": ("subject", "parameter"),
    },
    "log_likelihood": {"conc": ("subject",)},
    "observed_data": {"conc": ("subject", "time")},
    "constant_data": {"time_of_record": ("subject", "time"), "WT": ("subject",)},
    "predictions": {"pred_conc": ("subject", "time"), "ipred_conc": ("subject", "time")},
    "population": {"eta": ("effect",), "psi": ("parameter",)},
}
SAMPLE = {
    "posterior": ("chain", "draw"),
    "log_likelihood": ("chain", "draw"),
    "population": ("sample",),
}


@pytest.mark.parametrize("tree", [of_fit, of_nuts])
@pytest.mark.parametrize("group", DIMS)
def test_dimensions_have_the_names_of_the_field(tree, group):
    found = {name: variable.dims for name, variable in tree()[group].data_vars.items()}
    expected = {name: SAMPLE.get(group, ()) + dims for name, dims in DIMS[group].items()}
    assert found == expected
    assert list(found) == list(expected)  # in the order of the model


def test_coordinates_are_identifiers_and_names():
    study, tree = theophylline().study, of_fit()
    assert tuple(tree.posterior.subject.values) == study.ids
    assert list(tree.posterior.effect.values) == ["ka", "CL"]
    assert list(tree.posterior.parameter.values) == ["ka", "V", "CL"]
    assert list(tree.predictions.time.values) == list(range(1, study.time.shape[1] + 1))
    assert tree.posterior.V.attrs["units"] == "L"
    assert tree.observed_data.conc.attrs["units"] == "mg/L"


def test_observed_data_is_what_was_measured():
    study = theophylline().study
    for tree in (of_fit(), of_nuts()):
        conc = tree.observed_data.conc.values
        assert np.array_equal(~np.isnan(conc), study.observed["conc"])
        assert np.array_equal(
            conc[study.observed["conc"]], study.values["conc"][study.observed["conc"]]
        )
        time = tree.constant_data.time_of_record.values
        assert np.array_equal(time[study.recorded], study.time[study.recorded])


def test_draws_of_a_fit_have_the_moments_of_its_estimate():
    fit, posterior = theophylline(), of_fit().posterior
    log_ka = np.log(posterior.ka.values[0])
    where = fit.joint.slices["ka"].start
    sd = np.sqrt(fit.covariance()[where, where])
    assert abs(log_ka.mean() - float(fit.theta[where])) < 4 * sd / np.sqrt(400)
    assert abs(log_ka.std(ddof=1) / sd - 1) < 4 / np.sqrt(2 * 400)
    eta = posterior.eta.values[0]
    error = np.abs(eta.mean(0) - np.asarray(estimate(fit).eta))
    # Two samples of the same distribution: of 400 draws, and of 256 weighted nodes.
    assert np.all(error < 5 * eta.std(0) * np.sqrt(1 / 400 + 1 / 128))


def test_individual_parameters_follow_from_the_random_effects():
    fit, posterior = theophylline(), of_fit().posterior
    ka = fit.params["ka"] * np.exp(posterior.eta.sel(effect="ka").values)
    np.testing.assert_allclose(posterior.psi.sel(parameter="ka").values, ka, rtol=1e-12)


def test_without_a_covariance_the_estimate_is_repeated_and_its_likelihood_is_the_fits():
    fit = dataclasses.replace(theophylline(), information=None)
    tree = to_arviz(fit, draws=4)
    assert "repeated" in tree.posterior.attrs["draws"]
    assert np.all(tree.posterior.V.values == np.asarray(fit.params["V"]))
    sampled = marginal_log_likelihood(jax.random.key(0), fit)
    error = 5 * np.hypot(sampled.standard_error * np.sqrt(8), 1e-3)  # one replicate here, 8 there
    assert np.all(np.abs(tree.log_likelihood.conc.values[0] - fit.log_likelihood) < error)


@pytest.mark.parametrize("tree", [of_fit, of_nuts])
def test_log_likelihood_is_the_marginal_one_at_each_draw(tree):
    fit, tree = theophylline(), tree()
    posterior = tree.posterior
    for draw in (3, 77):
        at = posterior.isel(chain=0, draw=draw)
        values = {name: at[name].values for name in ("ka", "V", "CL", "a", "eta_omega")}
        values["eta_corr_cholesky"] = np.linalg.cholesky(at.eta_corr.values)
        theta = fit.joint.unconstrain(values)
        there = dataclasses.replace(fit, theta=theta)
        exact = marginal_log_likelihood(jax.random.key(5), there, points=1024)
        found = tree.log_likelihood.conc.isel(chain=0, draw=draw).values
        np.testing.assert_allclose(found, exact.log_likelihood, atol=0.15)
        assert abs(found.sum() - exact.total) < 0.4


def test_population_has_the_covariance_of_the_law():
    fit = theophylline()
    covariance = np.cov(of_fit().population.eta.values, rowvar=False)
    exact = np.asarray(fit.joint.effect_moments(jax.random.key(0), fit.theta, {}, fit.study)[1])
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.all(np.abs(covariance - exact) / scale < 5 * np.sqrt(2 / 10_000))
    same, _ = population_draws(jax.random.key(1), fit, gaussian=True)
    assert np.all(np.abs(np.cov(same, rowvar=False) - exact) / scale < 5 * np.sqrt(2 / 10_000))


def test_mcmc_draws_are_those_of_numpyro():
    mcmc, tree = theophylline_nuts(), of_nuts()
    samples = mcmc.get_samples(group_by_chain=True)
    for name in ("ka", "eta_omega", "eta", "psi"):
        np.testing.assert_allclose(tree.posterior[name].values, samples[name], rtol=1e-9)
    factor = np.asarray(samples["eta_corr_cholesky"])
    np.testing.assert_allclose(
        tree.posterior.eta_corr.values, factor @ factor.swapaxes(-1, -2), atol=1e-12
    )
    stats = tree.sample_stats
    assert {"diverging", "energy", "lp", "n_steps", "tree_depth", "acceptance_rate"} == set(stats)
    assert all(variable.dims == ("chain", "draw") for variable in stats.data_vars.values())
    draws = mcmc_draws(mcmc)
    values = draws.joint.constrain(draws.theta[1, 9])
    np.testing.assert_allclose(values["eta_corr_cholesky"], factor[1, 9], atol=1e-9)


def test_loo_leaves_out_a_subject_and_models_compare():
    import arviz as az

    loo = az.loo(of_fit())
    assert loo.n_data_points == 12
    table = az.compare({"maximum likelihood": of_fit(), "posterior": of_nuts()})
    assert set(table.index) == {"maximum likelihood", "posterior"}


@pytest.mark.parametrize("tree", [of_fit, of_nuts])
def test_netcdf_keeps_everything(tree, tmp_path):
    import arviz as az

    tree, path = tree(), tmp_path / "fit.nc"
    tree.to_netcdf(path)
    again = az.from_netcdf(path)
    for group in DIMS:
        xr.testing.assert_identical(_dataset(tree[group]), _dataset(again[group]))


def _dataset(group):
    return group.to_dataset() if hasattr(group, "to_dataset") else group.load()


def _two_sites(study):
    ka = population("ka", dist.LogNormal(0.5, 0.5))
    slope = population("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    eta = random_effect("eta", MixtureRandomEffect(["ka", "V"], 3, full=True), study.subjects)
    zeta = random_effect("zeta", GaussianRandomEffect(["b"]), study.subjects)
    psi = individual(study.subjects, ka=ka * jnp.exp(eta.ka), V=eta.V + slope[0])
    late = individual(study.subjects, name="late", b=zeta.b)
    f = psi.ka[:, None] + psi.V[:, None] * study.time + late.b[:, None]
    observe("conc", dist.Normal(f, 1.0), study)


def test_several_sites_and_mixtures_have_named_dimensions():
    study = theophylline().study
    joint = Joint.of(_two_sites, study)
    names = Names.of(joint, study)
    assert names.dims == {
        "eta": ("subject", "eta_effect"),
        "zeta": ("subject", "zeta_effect"),
        "psi": ("subject", "psi_parameter"),
        "late": ("subject", "late_parameter"),
        "ka": (),
        "slope": ("slope_element",),
        "eta_probs": ("eta_component",),
        "eta_locs": ("eta_component", "eta_effect"),
        "eta_omega": ("eta_component", "eta_effect"),
        "eta_corr": ("eta_component", "eta_effect", "eta_effect_bis"),
        "zeta_omega": ("zeta_effect",),
    }
    values = reported(joint, joint.constrain(joint.unconstrain({})))
    for name in names.parameters:
        assert values[name].shape == tuple(len(names.coords[dim]) for dim in names.dims[name])
    # A mixture is centred: reported with the mean of its last component.
    np.testing.assert_allclose(values["eta_probs"] @ values["eta_locs"], 0.0, atol=1e-12)


def test_plain_nuts_of_numpyro_is_understood():
    def intercepts(study):
        mean = population("mean", dist.Normal(5.0, 5.0))
        eta = random_effect("eta", GaussianRandomEffect(["mean"], omega=1.0), study.subjects)
        f = jnp.broadcast_to((mean + eta.mean)[:, None], study.time.shape)
        observe("conc", dist.Normal(f, 3.0), study)

    mcmc = MCMC(NUTS(intercepts), num_warmup=10, num_samples=10, progress_bar=False)
    with pytest.raises(ValueError, match="expected an MCMC after its run"):
        to_arviz(mcmc)
    mcmc.run(jax.random.key(0), theophylline().study)
    tree = to_arviz(mcmc)
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": 10, "effect": 1, "subject": 12}
    assert np.all(np.isfinite(tree.log_likelihood.conc.values))


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="expected a Fit .* got str"):
        to_arviz("fit")
    with pytest.raises(ValueError, match="expected at least 4 draws; got 1"):
        to_arviz(theophylline(), draws=1)


# Predictions.


def test_individual_predictions_are_those_of_the_model_at_the_conditional_means():
    fit = theophylline()
    point, study = estimate(fit), fit.study
    ka, V, CL = np.asarray(point.individual()["psi"]).T[:, :, None]
    dose = study.doses.amount[:, :1]
    t = study.time - study.doses.time[:, :1]
    f = dose * ka / (V * ka - CL) * (np.exp(-CL / V * t) - np.exp(-ka * t))
    for name, value in (("ipred_conc", of_fit().predictions.ipred_conc.values),
                        ("predict", predict(fit)["conc"])):  # fmt: skip
        assert np.array_equal(np.isnan(value), ~study.recorded), name
        np.testing.assert_allclose(value[study.recorded], f[study.recorded], atol=1e-9)


def test_predictions_at_other_times_and_for_some_subjects():
    fit = theophylline()
    study = fit.study
    every = predict(fit)["conc"]
    some = study.subset([4, 2])
    np.testing.assert_allclose(predict(fit, some)["conc"], every[[4, 2]], atol=1e-12)
    dense = predict(fit, some.at(study.time[4]))["conc"]
    np.testing.assert_allclose(dense[0], every[4], atol=1e-9)


def test_new_subjects_have_population_predictions_only():
    fit = theophylline()
    frame = fit.study.to_frame()
    frame["ID"] += 100
    other = type(fit.study).from_frame(frame, outcome={"conc": "DV"}, covariates="WT")
    with pytest.raises(ValueError, match="got new subjects"):
        predict(fit, other)
    typical = predict(fit, population=True)["conc"]
    np.testing.assert_allclose(predict(fit, other, population=True)["conc"], typical, atol=1e-12)


def test_simulated_studies_average_to_the_mean_of_the_population():
    fit = theophylline()
    values = simulate(jax.random.key(3), fit, replicates=2000)["conc"]
    assert values.shape == (2000, *fit.study.time.shape)
    assert np.array_equal(np.isnan(values[0]), ~fit.study.recorded)
    again = simulate(jax.random.key(3), fit, replicates=2000)["conc"]
    np.testing.assert_array_equal(values, again)
    eta, _ = population_draws(jax.random.key(4), fit)
    # E f over the law, by the closed form of one subject and one time.
    ka, CL = (np.asarray(fit.params[n]) * np.exp(eta[:, j]) for j, n in enumerate(["ka", "CL"]))
    V, dose, t = float(fit.params["V"]), fit.study.doses.amount[0, 0], fit.study.time[0, 5]
    f = dose * ka / (V * ka - CL) * (np.exp(-CL / V * t) - np.exp(-ka * t))
    spread = values[:, 0, 5].std()
    assert abs(values[:, 0, 5].mean() - f.mean()) < 4 * spread * np.sqrt(1 / 2000 + 1 / 10_000)
    a = float(fit.params["a"])
    assert abs(values[:, 0, 5].var() / (f.var() + a**2) - 1) < 5 * np.sqrt(2 / 2000)


def test_a_run_simulates_with_the_uncertainty_of_its_parameters():
    values = simulate(jax.random.key(3), theophylline_nuts(), replicates=3)["conc"]
    assert values.shape[0] == 3 and np.isfinite(values[:, 0, 1]).all()
    with pytest.raises(ValueError, match="at least 1 replicate"):
        simulate(jax.random.key(3), theophylline(), replicates=0)


def test_the_model_of_the_fit_is_the_one_of_the_tests():
    assert theophylline().converged and theophylline().joint.model is absorption
