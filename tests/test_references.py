"""Classical data sets: what exact maximum likelihood finds in them, and what linearisation does.

Beside R's nlme (linearised) stand the values of an adaptive quadrature that shares no code with
flowme (benchmarks/quadrature.py, 41 points for one effect, 13 in each direction for three)."""

import runpy
from pathlib import Path

import jax
import numpy as np
import numpyro.distributions as dist
from jax import numpy as jnp

import flowme as fm


def growth(study):
    asymptote = fm.population("asymptote", dist.Normal(200.0, 100.0))
    middle = fm.population("middle", dist.Normal(700.0, 300.0))
    pace = fm.population("pace", dist.LogNormal(6.0, 1.0))
    a = fm.population("a", dist.HalfNormal(20.0))
    law = fm.GaussianRandomEffect(["asymptote"], omega=30.0)
    eta = fm.random_effect("eta", law, study.subjects)
    psi = fm.individual(study.subjects, asymptote=asymptote + eta.asymptote)
    f = psi.asymptote[:, None] / (1 + jnp.exp(-(study.time - middle) / pace))
    fm.observe("circumference", fm.residual.constant(f, a), study)


def test_orange():
    """Logistic growth, random asymptote: the model is linear in it, so nlme's is the likelihood
    itself, if not quite its maximum (its -2LL is .025 higher)."""
    study = fm.datasets.orange()
    fit = fm.VariationalEM(growth, starts=1).run(jax.random.key(0), study, progress=False)
    quadrature = {"asymptote": 192.06, "middle": 727.91, "pace": 348.08, "a": 7.8431}
    for name, value in quadrature.items():
        np.testing.assert_allclose(fit.params[name], value, rtol=3e-4)
    np.testing.assert_allclose(fit.params["eta_omega"], [31.647], rtol=3e-4)
    np.testing.assert_allclose(fit.minus_two_ll, 263.144, atol=2e-3)
    assert abs(fit.minus_two_ll - 2 * 131.5846) < 0.3
    nlme = {"asymptote": 191.05, "middle": 722.56, "pace": 344.17, "a": 7.8463}
    for name, value in nlme.items():
        np.testing.assert_allclose(fit.params[name], value, rtol=0.02)
    np.testing.assert_allclose(fit.params["eta_omega"], [31.483], rtol=0.02)


def biexponential(study):
    A1 = fm.population("A1", dist.Normal(2.0, 2.0))
    lrc1 = fm.population("lrc1", dist.Normal(0.0, 1.0))
    A2 = fm.population("A2", dist.Normal(0.5, 1.0))
    lrc2 = fm.population("lrc2", dist.Normal(-1.0, 1.0))
    a = fm.population("a", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["A1", "lrc1", "A2"]), study.subjects)
    psi = fm.individual(study.subjects, A1=A1 + eta.A1, lrc1=lrc1 + eta.lrc1, A2=A2 + eta.A2)
    fast = psi.A1[:, None] * jnp.exp(-jnp.exp(psi.lrc1)[:, None] * study.time)
    slow = psi.A2[:, None] * jnp.exp(-jnp.exp(lrc2) * study.time)
    fm.observe("conc", fm.residual.constant(fast + slow, a), study)


def by_quadrature(study, beta, omega, a):
    """-2LL of the biexponential model, without flowme."""
    path = Path(__file__).parents[1] / "benchmarks" / "quadrature.py"
    Quadrature, Subject = (runpy.run_path(str(path))[name] for name in ("Quadrature", "Subject"))

    def of_one(t):
        def f(beta, eta):
            A1, lrc1, A2 = (beta[:3] + eta).T[:, :, None]
            return A1 * np.exp(-np.exp(lrc1) * t) + A2 * np.exp(-np.exp(beta[3]) * t)

        return f

    rows = zip(study.values["conc"], study.time, strict=True)
    likelihood = Quadrature([Subject(y, of_one(t)) for y, t in rows], 4, 3, points=13)
    return likelihood(np.array([*beta, *np.log(omega), np.log(a)]))


def test_indomethacin():
    """The maximum lies far from nlme's estimates, where -2LL is 2.8 higher: six subjects do not
    tell the variation of the fast rate from none."""
    study = fm.datasets.indomethacin()
    fit = fm.VariationalEM(biexponential, starts=1).run(jax.random.key(0), study, progress=False)
    found = [float(fit.params[name]) for name in ("A1", "lrc1", "A2", "lrc2")]
    omega, a = np.asarray(fit.params["eta_omega"]), float(fit.params["a"])
    np.testing.assert_allclose(found, [2.7735, 1.0339, 0.786, -0.8699], rtol=2e-3)
    np.testing.assert_allclose([*omega[[0, 2]], a], [0.5772, 0.209, 0.0821], rtol=3e-3)
    assert any("omega(lrc1) runs to its bound 0" in message for message in fit.messages)
    np.testing.assert_allclose(fit.minus_two_ll, -112.229, atol=5e-3)
    np.testing.assert_allclose(by_quadrature(study, found, omega, a), fit.minus_two_ll, atol=2e-3)
    nlme = [2.8276, 0.77341, 0.46121, -1.3446], [0.57138, 0.1581, 0.11156], 0.081495
    np.testing.assert_allclose(by_quadrature(study, *nlme), -109.414, atol=2e-3)
