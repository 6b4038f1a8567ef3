"""Laws of random-effect distributions, over every named one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import EFFECTS
from numpyro.distributions import constraints
from scipy import stats

from flowme.effects import GaussianRandomEffect, RandomEffect, StudentTRandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.mixture_effect import MixtureRandomEffect

# Op by op, a flow takes seconds per call; compiled, milliseconds.
sample = jax.jit(lambda effect, key, count: effect.sample(key, (count,)), static_argnums=2)
log_prob = jax.jit(lambda effect, eta: effect.log_prob(eta))
moments = jax.jit(lambda effect: (effect.mean, effect.covariance_matrix))

effects = pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS.keys())


def draws(effect, count=20_000, seed=0):
    return np.asarray(sample(effect, jax.random.key(seed), count))


def wide_law(effect):
    mean, covariance = moments(effect)
    return dist.MultivariateStudentT(4.0, mean, 1.3 * jnp.linalg.cholesky(covariance))


@effects
def test_shapes_and_support(effect):
    size = len(effect.names)
    eta = jax.eval_shape(lambda k: effect.sample(k, (4, 7)), jax.random.key(0))
    assert eta.shape == (4, 7, size)
    assert jax.eval_shape(effect.log_prob, eta).shape == (4, 7)
    assert effect.event_shape == (size,) and effect.batch_shape == ()
    assert effect.support is constraints.real_vector
    wide = effect.expand([5])
    eta = jax.eval_shape(lambda k: wide.sample(k, (2,)), jax.random.key(0))
    assert eta.shape == (2, 5, size)
    assert jax.eval_shape(wide.log_prob, eta).shape == (2, 5)


@effects
def test_passes_jit_vmap_and_scan(effect):
    eta = sample(effect, jax.random.key(0), 6)
    expected = log_prob(effect, eta)
    through = jax.jit(lambda e, x: (e, e.log_prob(x)))
    same, value = through(effect, eta)
    assert isinstance(same, type(effect)) and same.names == effect.names
    np.testing.assert_allclose(value, expected, atol=1e-10)
    pair = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), effect)
    over = jax.jit(jax.vmap(lambda e: e.log_prob(eta)))
    np.testing.assert_allclose(over(pair), [expected, expected], atol=1e-10)
    _, scanned = jax.lax.scan(
        lambda e, x: (e, e.log_prob(x)), jax.tree.map(jnp.asarray, effect), eta
    )
    np.testing.assert_allclose(scanned, expected, atol=1e-10)


@effects
def test_density_integrates_to_one(effect):
    """By importance sampling from a wide Student t: within 4 Monte-Carlo errors of 1."""
    size = len(effect.names)
    wide = wide_law(effect)
    eta = wide.sample(jax.random.key(0), (40_000,))
    ratio = np.exp(log_prob(effect, eta) - wide.log_prob(eta))
    error = ratio.std() / np.sqrt(len(ratio))
    assert error < 0.02 * size
    assert abs(ratio.mean() - 1) < 4 * error


@effects
def test_samples_follow_the_density(effect):
    """E h(η) over samples equals ∫ h p by importance sampling, for bumps h all over the place."""
    eta = draws(effect)
    wide = wide_law(effect)
    x = wide.sample(jax.random.key(1), (40_000,))
    ratio = np.exp(log_prob(effect, x) - wide.log_prob(x))
    sd = np.sqrt(np.diag(moments(effect)[1]))
    for centre in eta[:6]:

        def bump(e, centre=centre):
            return np.exp(-0.5 * np.sum(((e - centre) / (0.7 * sd)) ** 2, -1))

        sampled, integral = bump(eta), bump(np.asarray(x)) * ratio
        error = np.hypot(sampled.std() / np.sqrt(len(eta)), integral.std() / np.sqrt(len(x)))
        assert abs(sampled.mean() - integral.mean()) < 4.5 * error


@effects
def test_moments(effect):
    """Stated mean and covariance against those of samples."""
    eta = draws(effect, 50_000)
    mean, covariance = moments(effect)
    sd = np.sqrt(np.diag(covariance))
    slack = 2e-3 if isinstance(effect, FlowRandomEffect) else 0.0  # error of the fixed points
    error = eta.std(0) / np.sqrt(len(eta))
    assert np.all(np.abs(eta.mean(0) - mean) < 4 * error + slack * sd)
    products = (eta - eta.mean(0))[:, :, None] * (eta - eta.mean(0))[:, None, :]
    error = products.std(0) / np.sqrt(len(eta))
    slack = 10 * slack * np.outer(sd, sd)
    assert np.all(np.abs(products.mean(0) - covariance) < 4 * error + slack)
    np.testing.assert_allclose(jax.jit(lambda e: e.variance)(effect), np.diag(covariance))


@effects
def test_base_and_back(effect):
    if not hasattr(effect, "from_base"):
        pytest.skip("not a transformed normal")
    z = jax.random.normal(jax.random.key(0), (100, len(effect.names)))
    np.testing.assert_allclose(
        jax.jit(lambda e, z: e.to_base(e.from_base(z)))(effect, z), z, atol=1e-8
    )


def test_flow_starts_exactly_at_the_gaussian():
    names, omega = ["ka", "V", "CL"], [0.6, 0.2, 0.4]
    gaussian = GaussianRandomEffect(names, full=True, omega=omega)
    gaussian = gaussian.with_parameters(corr_cholesky=EFFECTS["flow"].corr_cholesky)
    flow = FlowRandomEffect(names, omega=omega)
    flow = flow.with_parameters(corr_cholesky=gaussian.corr_cholesky)
    eta = gaussian.sample(jax.random.key(0), (100,))
    np.testing.assert_allclose(log_prob(flow, eta), gaussian.log_prob(eta), atol=1e-10)


@pytest.mark.parametrize("name", ["flow", "flow, one"])
def test_centred_flow_has_mean_zero_and_sd_omega(name):
    """To the error of its 512 fixed points, whatever its weights."""
    eta = draws(EFFECTS[name], 100_000)
    omega = np.asarray(EFFECTS[name].omega)
    np.testing.assert_allclose(eta.mean(0) / omega, 0, atol=0.015)
    np.testing.assert_allclose(eta.std(0) / omega, 1, atol=0.02)


def test_free_flow_is_not_centred():
    eta = draws(EFFECTS["flow, free"])
    assert np.any(np.abs(eta.mean(0)) / eta.std(0) > 0.05)


@pytest.mark.parametrize("name", ["gaussian, full", "student t", "mixture, full"])
def test_against_scipy(name):
    effect = EFFECTS[name]
    eta = np.asarray(effect.sample(jax.random.key(0), (50,)))
    if isinstance(effect, MixtureRandomEffect):
        trils = effect.omega[..., None] * effect.corr_cholesky
        parts = [
            p * stats.multivariate_normal(m, tril @ tril.T).pdf(eta)
            for p, m, tril in zip(effect.probs, effect.component_means, trils, strict=True)
        ]
        expected = np.log(sum(parts))
    else:
        shape = effect.scale_tril @ effect.scale_tril.T
        if isinstance(effect, StudentTRandomEffect):
            expected = stats.multivariate_t(shape=shape, df=float(effect.df)).logpdf(eta)
        else:
            expected = stats.multivariate_normal(cov=shape).logpdf(eta)
    np.testing.assert_allclose(effect.log_prob(eta), expected, atol=1e-10)


@effects
def test_parameters_have_priors_that_fit(effect):
    """What a prior draws can be put into the distribution."""
    for name, prior in effect.priors().items():
        value = jax.jit(prior.sample)(jax.random.key(0))
        assert value.shape == np.shape(getattr(effect, name))
        new = effect.with_parameters(**{name: value})
        assert np.isfinite(log_prob(new, sample(new, jax.random.key(1), 2))).all()
        assert np.isfinite(prior.log_prob(getattr(effect, name)))


@pytest.mark.parametrize(
    "law",
    [
        GaussianRandomEffect(["a", "b"], full=True),
        StudentTRandomEffect(["a", "b"]),
        MixtureRandomEffect(["a", "b"], 2),
        FlowRandomEffect(["a", "b"]),
    ],
    ids=lambda law: type(law).__name__,
)
def test_start_from_a_gaussian_fit(law: RandomEffect):
    """Started laws have the moments of the Gaussian fit; a mixture finds the two clusters."""
    rng = np.random.default_rng(0)
    eta = np.concatenate(
        [rng.normal([-1, 0.2], 0.2, (400, 2)), rng.normal([1, -0.2], 0.2, (400, 2))]
    )
    covariance = np.cov(eta.T)
    started = law.with_parameters(**law.start(jax.random.key(0), covariance, eta, len(eta)))
    diagonal = not getattr(law, "full", False)
    found = moments(started)[1]
    expected = np.diag(np.diag(covariance)) if diagonal else covariance
    if isinstance(law, MixtureRandomEffect):
        np.testing.assert_allclose(sorted(started.component_means[:, 0]), [-1, 1], atol=0.05)
    else:
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda: GaussianRandomEffect("ka"), TypeError, "expected a list of effect names"),
        (lambda: GaussianRandomEffect(["ka", "ka"]), ValueError, "different effect names"),
        (lambda: GaussianRandomEffect([]), ValueError, "one or more"),
        (lambda: GaussianRandomEffect(["k a"]), TypeError, "each a Python name"),
        (lambda: GaussianRandomEffect(["ka"], omega=-1.0), ValueError, "expected omega positive"),
        (lambda: GaussianRandomEffect(["ka"], omega=[1.0, 2.0]), ValueError, r"shape \[1\]"),
        (lambda: StudentTRandomEffect(["ka"], df=1.5), ValueError, "df above 2"),
        (lambda: MixtureRandomEffect(["ka"], 1), ValueError, "at least 2 components"),
        (lambda: FlowRandomEffect(["ka"], flow="spline"), TypeError, "flowme.flows.Flow"),
    ],
)
def test_bad_input(bad, error, words):
    with pytest.raises(error, match=words):
        bad()


def test_numpyro_samples_it_in_a_plate():
    def model():
        with numpyro.plate("subject", 3):
            return numpyro.sample("eta", EFFECTS["flow, one"])

    sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    assert sites["eta"]["value"].shape == (3, 1)
