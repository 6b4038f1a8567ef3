"""Laws of the semi-nonparametric density: exact ones, by grids and by samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import _corr_cholesky
from scipy import stats

from flowme.effects import GaussianRandomEffect
from flowme.semi_nonparametric import SemiNonparametricRandomEffect, _powers

# Op by op, each call takes seconds; compiled, milliseconds.
log_prob = jax.jit(lambda effect, eta: effect.log_prob(eta))


def law(size, degree, seed=0, full=True):
    names = ["ka", "V", "CL"][:size]
    effect = SemiNonparametricRandomEffect(
        names, degree, full=full, omega=np.array([0.6, 0.2, 0.3])[:size]
    )
    rng = np.random.default_rng(seed)
    values = {"coefficients": jnp.asarray(rng.normal(0, 0.7, effect.coefficients.shape))}
    if effect.full:
        values["corr_cholesky"] = _corr_cholesky(size)
    return effect.with_parameters(**values)


LAWS = {
    "one effect, degree 3": law(1, 3),
    "two effects, degree 2": law(2, 2),
    "two effects, degree 4, diagonal": law(2, 4, full=False),
    "three effects, degree 2": law(3, 2),
}
laws = pytest.mark.parametrize("effect", LAWS.values(), ids=LAWS.keys())


def on_grid(effect, points=121, far=9.0):
    """A grid in units of L, `[point, effect]`, and its weight times the density at it."""
    size = len(effect.names)
    points = points if size < 3 else 61
    axis = np.linspace(-far, far, points)
    u = np.stack(np.meshgrid(*[axis] * size, indexing="ij"), -1).reshape(-1, size)
    tril = np.asarray(effect.scale_tril)
    eta = u @ tril.T
    cell = (axis[1] - axis[0]) ** size * np.linalg.det(tril)
    return eta, cell * np.exp(np.asarray(log_prob(effect, eta)))


@laws
def test_density_integrates_to_one_with_the_stated_moments(effect):
    """The trapezoidal rule, which for smooth densities is exact to its last digits."""
    eta, mass = on_grid(effect)
    np.testing.assert_allclose(mass.sum(), 1, atol=1e-6)
    sd = np.sqrt(np.diag(effect.covariance_matrix))
    np.testing.assert_allclose(mass @ eta / sd, 0, atol=1e-6)
    np.testing.assert_allclose((mass * eta.T) @ eta, effect.covariance_matrix, atol=1e-6)
    np.testing.assert_allclose(effect.mean, 0)


@laws
def test_samples_follow_the_density(effect):
    """E h(η) over samples is Σ h p over the grid, for bumps h all over the place."""
    draws = np.asarray(jax.jit(lambda e, k: e.sample(k, (20_000,)))(effect, jax.random.key(0)))
    eta, mass = on_grid(effect)
    sd = np.sqrt(np.diag(effect.covariance_matrix))
    for centre in draws[:12]:

        def bump(e, centre=centre):
            return np.exp(-0.5 * np.sum(((e - centre) / (0.5 * sd)) ** 2, -1))

        sampled = bump(draws)
        error = sampled.std() / np.sqrt(len(draws))
        assert abs(sampled.mean() - mass @ bump(eta)) < 4.5 * error


def test_degree_zero_is_the_gaussian():
    gaussian = GaussianRandomEffect(["ka", "V"], full=True, omega=[0.6, 0.2])
    gaussian = gaussian.with_parameters(corr_cholesky=_corr_cholesky(2))
    flat = SemiNonparametricRandomEffect(["ka", "V"], 0, full=True, omega=[0.6, 0.2])
    flat = flat.with_parameters(corr_cholesky=_corr_cholesky(2))
    zero = law(2, 3).with_parameters(coefficients=jnp.zeros(9))
    eta = gaussian.sample(jax.random.key(0), (50,))
    for effect in (flat, zero):
        np.testing.assert_allclose(log_prob(effect, eta), gaussian.log_prob(eta), atol=1e-10)
    assert set(flat.priors()) == set(gaussian.priors())


def test_one_effect_of_degree_one_by_hand():
    """P(z) ∝ 1 + b z: E z = 2b/(1 + b²), E z² = (1 + 3b²)/(1 + b²)."""
    b = 0.8
    effect = SemiNonparametricRandomEffect(["phi"], 1, omega=2.0)
    effect = effect.with_parameters(coefficients=jnp.array([b]))
    c = 2 * b / (1 + b**2)
    sd = np.sqrt((1 + 3 * b**2) / (1 + b**2) - c**2)
    eta = np.linspace(-5, 5, 11)
    z = c + sd * eta / 2
    expected = (1 + b * z) ** 2 / (1 + b**2) * stats.norm.pdf(z) * sd / 2
    np.testing.assert_allclose(log_prob(effect, eta[:, None]), np.log(expected), atol=1e-10)


def test_gradients_are_finite_even_at_a_zero_of_the_polynomial():
    effect = SemiNonparametricRandomEffect(["phi"], 1, omega=1.0)

    def value(b, eta):
        return effect.with_parameters(coefficients=b).log_prob(eta)

    b = jnp.array([1.0])  # E z = 1 and Var z = 1: the zero of P, z = -1, is at η = -2
    program = jax.jit(jax.value_and_grad(value, (0, 1)))
    assert program(b, jnp.array([-2.0]))[0] < -50
    for eta in (-2.0, 0.3, 8.0):
        for slope in program(b, jnp.array([eta]))[1]:
            assert np.all(np.isfinite(slope))


def test_start_finds_two_clusters():
    """From draws of two clusters, close to their entropy and far above the Gaussian."""
    rng = np.random.default_rng(0)
    eta = rng.normal(np.where(rng.random(2000) < 0.4, -1.0, 0.7)[:, None], 0.25, (2000, 1))
    effect = SemiNonparametricRandomEffect(["phi"], 4)
    covariance = np.cov(eta.T, ddof=0)[None, None]
    start = effect.start(jax.random.key(0), covariance, eta, len(eta))
    effect = effect.with_parameters(**start)
    centred = eta - eta.mean()
    gaussian = stats.norm(0, centred.std()).logpdf(centred).mean()
    truth = np.log(
        0.4 * stats.norm(-1, 0.25).pdf(eta) + 0.6 * stats.norm(0.7, 0.25).pdf(eta)
    ).mean()
    found = float(log_prob(effect, centred).mean())
    assert gaussian + 0.7 * (truth - gaussian) < found < truth + 0.02


def test_number_of_terms():
    assert len(_powers(3, 2)) == 10 and not _powers(3, 2)[0].any()
    assert SemiNonparametricRandomEffect(["a", "b", "c"], 2).coefficients.shape == (9,)


@pytest.mark.parametrize("degree", [-1, 9, 1.5])
def test_bad_degree(degree):
    with pytest.raises(ValueError, match="expected a degree from 0 to 8"):
        SemiNonparametricRandomEffect(["phi"], degree)
