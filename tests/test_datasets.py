"""Shipped studies hold what their source says; simulated ones follow their stated truth."""

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from flowme import datasets

POPULATIONS = {
    "two_subpopulations": datasets.two_subpopulations,
    "gaussian_population": datasets.gaussian_population,
    "senescence": datasets.senescence,
}
population = pytest.mark.parametrize("simulate", POPULATIONS.values(), ids=POPULATIONS)


def _coordinates(psi):
    """The coordinates of each truth's `log_prob`: φ as it is, everything else in logarithms."""
    return np.stack([psi[n] if n == "phi" else np.log(psi[n]) for n in psi], axis=-1)


def test_theophylline():
    study = datasets.theophylline()
    assert study.subjects.size == 12 and study.outcomes == ("conc",) and study.compartments == (1,)
    assert study.observed["conc"].sum() == 120 and study.doses.given.sum() == 12
    assert study.units == {"time": "h", "conc": "mg/L", "amount": "mg", "WT": "kg"}
    assert study.values["conc"].max() == 11.4 and study.time.max() == 24.65
    np.testing.assert_allclose(study.covariates["WT"].mean(), 69.583, atol=1e-3)
    # 4.02 mg/kg for the first subject, as in R's Theoph
    np.testing.assert_allclose(study.doses.amount[0, 0] / study.covariates["WT"][0], 4.02)
    np.testing.assert_array_equal(study.time[:, 0], study.doses.time[:, 0])


def test_orange_and_indomethacin():
    trees, drug = datasets.orange(), datasets.indomethacin()
    assert trees.observed["circumference"].sum() == 35 and trees.ids == (1, 2, 3, 4, 5)
    assert trees.values["circumference"].max() == 214 and trees.time.max() == 1582
    assert drug.observed["conc"].sum() == 66 and drug.subjects.size == 6
    assert drug.values["conc"].max() == 2.72 and drug.time.max() == 8


def test_isoniazid():
    study, some = datasets.isoniazid(), datasets.isoniazid(censored=False)
    assert study.observed["conc"].sum() == 814 and some.observed["conc"].sum() == 775
    below = study.censored["conc"] == 1
    assert below.sum() == 39 and not some.censored
    np.testing.assert_array_equal(study.values["conc"][below], 0.01)
    assert np.bincount(study.covariates["ACE_PROFILE"]).tolist() == [43, 45, 16]
    by_genotype = (
        study.doses.amount[:, 0] == np.array([300, 900, 1500])[study.covariates["ACE_PROFILE"]]
    )
    assert by_genotype.all() and study.occasions["OCC"].present.sum() == 207


def test_theophylline_baseline_adds_the_measurements_at_time_zero():
    rows = datasets.theophylline(baseline=True).to_frame()
    assert (rows["EVID"] == 0).sum() == 132
    at_zero = (rows["TIME"] == 0) & (rows["EVID"] == 0)
    assert at_zero.sum() == 12
    kept = datasets.theophylline().to_frame()
    np.testing.assert_array_equal(rows[~at_zero].to_numpy(), kept.to_numpy())


def test_hare_lynx():
    study = datasets.hare_lynx()
    assert study.subjects.size == 1 and study.outcomes == ("hare", "lynx")
    assert (study.time[0, 0], study.time[0, -1], study.time.size) == (1900, 1920, 21)
    assert study.values["hare"].sum() == pytest.approx(715.7)
    assert study.values["lynx"].max() == 59.4 and study.units["hare"] == "thousand"


@population
def test_same_seed_same_study_another_seed_another(simulate):
    one, again, other = simulate(3), simulate(3), simulate(4)
    jax.tree.map(np.testing.assert_array_equal, one.study, again.study)
    assert one.psi.equals(again.psi) and not one.psi.equals(other.psi)
    assert tuple(one.psi.index) == one.study.ids


@population
def test_samples_fall_into_boxes_as_often_as_the_density_says(simulate):
    """Counts over a grid of boxes are binomial around the integral of exp(log_prob) over each."""
    truth, n = simulate(0).truth, 400_000
    x = _coordinates(truth.sample(1, n))
    edges = np.quantile(x, [0.02, 0.25, 0.5, 0.75, 0.98], axis=0).T
    counts, _ = np.histogramdd(x, list(edges))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = np.diff(edges) / 2  # [parameter, bin]
    points = (edges[:, :-1] + half)[..., None] + half[..., None] * nodes
    grid = np.stack(np.meshgrid(*points.reshape(len(edges), -1), indexing="ij"), axis=-1)
    mass = np.exp(truth.log_prob(grid))
    for axis, scale in enumerate(half):
        by_bin = np.moveaxis(mass, axis, -1)
        by_bin = by_bin.reshape(*by_bin.shape[:-1], scale.size, nodes.size) @ weights * scale
        mass = np.moveaxis(by_bin, -1, axis)
    z = (counts - n * mass) / np.sqrt(n * mass * (1 - mass) + 1)
    assert counts.sum() > 0.8 * n
    assert np.all(np.abs(z) < 4.5)


@population
def test_individual_parameters_of_the_study_follow_the_truth(simulate):
    psi = _coordinates(simulate(7).psi)
    other = _coordinates(simulate(0).truth.sample(8, 20_000))
    for own, drawn in zip(psi.T, other.T, strict=True):
        assert stats.ks_2samp(own, drawn).pvalue > 1e-3


def test_two_subpopulations_has_the_stated_valley():
    """Mass of CL in 1.7 to 2.4: .017 in shared/reference-values; a Gaussian would put .23."""
    truth = datasets.two_subpopulations(0).truth
    cl = truth.sample(0, 200_000)["CL"]
    share = ((cl > 1.7) & (cl < 2.4)).mean()
    assert abs(share - 0.017) < 0.001 + 4 * np.sqrt(0.017 / 200_000)
    assert abs((cl < 2.0).mean() - 0.40) < 4 * np.sqrt(0.24 / 200_000) + 0.002


def test_moments_of_the_lognormal_populations():
    n = 100_000
    for simulate, mean, sd in (
        (datasets.gaussian_population, np.log([1.5, 30.0, 2.2]), [0.30, 0.20, 0.35]),
        (
            datasets.two_subpopulations,
            [np.log(1.5), np.log(30.0), 0.4 * np.log(1.2) + 0.6 * np.log(3.6)],
            [0.30, 0.20, np.sqrt(0.4 * 0.15**2 + 0.6 * 0.2**2 + 0.24 * np.log(3.0) ** 2)],
        ),
    ):
        x = np.log(simulate(0).truth.sample(2, n).to_numpy())
        sd = np.array(sd)
        assert np.all(np.abs(x.mean(0) - mean) < 4 * sd / np.sqrt(n))
        # kurtosis at most 3: the standard error of a standard deviation is at most sd / √(2n)
        assert np.all(np.abs(x.std(0) - sd) < 4 * sd / np.sqrt(2 * n))
        assert np.all(np.abs(np.corrcoef(x.T) - np.eye(3)) < 4 / np.sqrt(n))


@pytest.mark.parametrize("name", ["two_subpopulations", "gaussian_population"])
def test_measurements_are_the_solution_of_the_model_plus_error(name):
    """The residuals of an independent ODE solution are N(0, .30²)."""
    study, _, psi = POPULATIONS[name](5, subjects=60)
    np.testing.assert_array_equal(study.doses.amount, 320.0)
    residuals = []
    for i, (ka, v, cl) in enumerate(psi[["ka", "V", "CL"]].to_numpy()):
        t = study.time[i, 1:]
        solution = integrate.solve_ivp(
            lambda _, a, ka=ka, k=cl / v: [-ka * a[0], ka * a[0] - k * a[1]],
            (0.0, t[-1]),
            [320.0, 0.0],
            t_eval=t,
            rtol=1e-9,
            atol=1e-9,
        )
        residuals.append(study.values["conc"][i, 1:] - solution.y[1] / v)
    assert np.size(residuals) == 600
    assert abs(np.std(residuals) - 0.30) < 4 * 0.30 / np.sqrt(2 * 600)
    assert stats.kstest(np.ravel(residuals) / 0.30, "norm").pvalue > 1e-3


def test_senescence():
    study, truth, psi = datasets.senescence(0, varieties=2000)
    np.testing.assert_array_equal(study.time[0], np.arange(4.0, 33.0, 4.0))
    np.testing.assert_array_equal(study.covariates["leaves"], 12.0)
    assert study.units == {"time": "d"} and study.outcomes == ("withered",)
    y = study.values["withered"]
    assert np.all((y >= 0) & (y <= 12) & (y % 1 == 0)) and study.observed["withered"].all()
    p = 1 / (1 + np.exp(-(study.time - psi[["phi"]].to_numpy()) / psi[["psi"]].to_numpy()))
    z = (y - 12 * p).sum(0) / np.sqrt((12 * p * (1 - p)).sum(0))
    assert np.all(np.abs(z) < 4)
    # variance as well: counts are binomial given ψ, not more and not less
    spread = ((y - 12 * p) ** 2).sum() / (12 * p * (1 - p)).sum()
    assert abs(spread - 1) < 0.06


def test_the_two_strategies_of_senescence():
    n = 200_000
    drawn = datasets.senescence(0).truth.sample(0, n)
    # Told apart at day 16: 3.3 SD above early, 1.9 below late, hence shares known exactly.
    before = 0.6 * stats.norm.cdf(16, 12, 1.2) + 0.4 * stats.norm.cdf(16, 19.5, 1.8)
    assert abs((drawn["phi"] < 16).mean() - before) < 4 * np.sqrt(0.25 / n)
    early, late = drawn[drawn["phi"] < 12], drawn[drawn["phi"] > 19.5]
    pace = np.log(early["psi"])
    # φ < 12 holds almost only early varieties: SD .28 and the skewness √2 of a Gamma(2)
    assert abs(pace.mean() - np.log(1.6)) < 4 * 0.28 / np.sqrt(len(early))
    assert abs(pace.std() - 0.28) < 0.005 and abs(stats.skew(pace) - np.sqrt(2.0)) < 0.1
    slope = stats.linregress((late["phi"] - 19.5) / 1.8, np.log(late["psi"]))
    assert abs(slope.slope - 0.10) < 4 * slope.stderr
    assert abs(slope.intercept - np.log(3.0)) < 4 * slope.intercept_stderr


BAD_CALLS = {
    "no subjects": (lambda: datasets.two_subpopulations(0, subjects=0), "at least 1 of subjects"),
    "no varieties": (lambda: datasets.senescence(0, varieties=0), "at least 1 of varieties"),
    "time 0": (
        lambda: datasets.gaussian_population(0, times=(0.0, 1.0)),
        "positive and increasing",
    ),
    "times": (lambda: datasets.gaussian_population(0, times=(2.0, 1.0)), "got [2.0, 1.0]"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    call, words = BAD_CALLS[name]
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
