"""The five models of theophylline of reference-values.md: exact -2LL, and standard errors."""

import re
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import differences, theophylline_model

import flowme as fm
from flowme.infer.errors import parameter_names

THEOPHYLLINE = {
    "M1": (345.435, {}),
    "M3, combined2": (343.4002, {"error": "combined2"}),
    "M3b, combined1": (341.9774, {"error": "combined1"}),
    "M1, 132 rows": (360.7007, {"baseline": True}),
    "M1, full Ω": (334.041, {"full": True}),
}


@cache
def theophylline(name):
    options = dict(THEOPHYLLINE[name][1])
    study = fm.datasets.theophylline(options.pop("baseline", False))
    effect = fm.GaussianRandomEffect(["ka", "V", "CL"], full=options.pop("full", False))
    model = theophylline_model(effect, **options)
    return fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)


def theophylline_log_likelihood(fit, error, order=11):
    """log p(y_i; θ) as a function of θ by adaptive quadrature over z, η = L(θ) z, that shares
    nothing with flowme but the places of its nodes."""
    study, values = fit.study, fit.params
    corr = np.asarray(values.get("eta_corr_cholesky", np.eye(3)))
    L = np.asarray(values["eta_omega"])[:, None] * corr
    x, w = np.polynomial.hermite_e.hermegauss(order)
    grid = np.stack(np.meshgrid(x, x, x, indexing="ij"), -1).reshape(-1, 3)
    log_w = np.sum(np.meshgrid(*[np.log(w)] * 3, indexing="ij"), 0).ravel() + 0.5 * (grid**2).sum(1)
    mean = np.asarray(fit.conditional.mean) @ np.linalg.inv(L).T
    tril = np.linalg.inv(L) @ np.asarray(fit.conditional.scale_tril)
    z = mean + np.einsum("sde,ke->ksd", tril, grid)
    log_w = log_w[:, None] + np.linalg.slogdet(tril)[1] - 0.5 * (z**2).sum(-1)
    log_w = log_w - 1.5 * np.log(2 * np.pi)
    dose, time = np.asarray(study.doses.amount)[:, :1], study.time - study.time[:, :1]
    seen, y = study.observed["conc"], np.nan_to_num(study.values["conc"])

    def function(theta):
        p = {k: np.asarray(v) for k, v in fit.joint.constrain(jnp.asarray(theta)).items()}
        eta = z @ (p["eta_omega"][:, None] * p.get("eta_corr_cholesky", np.eye(3))).T
        ka, V, CL = (p[n] * np.exp(eta[..., j : j + 1]) for j, n in enumerate(("ka", "V", "CL")))
        k = CL / V
        f = dose * ka / (V * (ka - k)) * (np.exp(-k * time) - np.exp(-ka * time))
        sd = {
            "constant": p["a"] + 0 * f,
            "combined1": p["a"] + p.get("b", 0.0) * f,
            "combined2": np.sqrt(p["a"] ** 2 + (p.get("b", 0.0) * f) ** 2),
        }[error]
        log_p = -0.5 * ((y - f) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
        total = np.where(seen, log_p, 0.0).sum(-1) + log_w
        top = total.max(0)
        return top + np.log(np.exp(total - top).sum(0))

    return function


@pytest.mark.parametrize("name", THEOPHYLLINE)
def test_theophylline_likelihood_and_errors(name):
    """-2LL within .01 of the reference; standard errors within 5 % (here .5 %) of the observed
    information by finite differences of an independent quadrature of higher order."""
    fit, error = theophylline(name), THEOPHYLLINE[name][1].get("error", "constant")
    assert fit.converged
    assert abs(fit.minus_two_ll - THEOPHYLLINE[name][0]) < 0.01
    function = theophylline_log_likelihood(fit, error)
    theta = np.asarray(fit.theta)
    np.testing.assert_allclose(-2 * function(theta).sum(), fit.minus_two_ll, atol=5e-3)
    # On the boundary, at infinity, the correlation that runs there is held.
    free = [k for k, n in enumerate(parameter_names(fit.joint)) if n != "corr(V, CL)"]

    def part(x):
        moved = theta.copy()
        moved[free] = x
        return function(moved)

    scores, hessian = differences(part, theta[free])
    inverse = np.linalg.inv(-hessian)
    expected = np.sqrt(np.diag(inverse))
    np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance()))[free], expected, rtol=5e-3)
    robust = np.sqrt(np.diag(inverse @ scores @ scores.T @ inverse))
    found = np.sqrt(np.diag(fit.covariance(robust=True)))[free]
    np.testing.assert_allclose(found, robust, rtol=1e-2)


def test_the_boundary_is_named():
    fit = theophylline("M1, full Ω")
    message = fit.messages[-1]
    assert "Ω of ka, V, CL is degenerate, of rank 2 of 3: corr(V, CL) 0.98" in message
    assert message in str(fm.summary(fit))
    assert not any("degenerate" in message for message in theophylline("M1").messages)


NAMED = re.compile(r"another maximum, -2LL (.*?) \((.*?) at the one reported\), at (.*?)\. The")


def test_a_full_law_does_not_tell_flip_flop_apart():
    """log ka, log V, log CL -> log CL - log V, log CL - log ka, log CL is linear: Ω follows."""
    (other,) = (found for m in theophylline("M1, full Ω").messages if (found := NAMED.search(m)))
    assert other[1] == "334.0" and other[2] == "as"
    assert "ka 0.0878 (here 1.58), V 1.75 (here 31.6)" in other[3] and "CL" not in other[3]


@pytest.mark.parametrize("off", [*product((0.2, 5.0), repeat=3)])
def test_starts_off_by_five_end_in_the_same_place_and_say_what_else_there_is(off):
    fit, usual = theophylline("M1"), {"ka": 1.58, "V": 31.6, "CL": 2.75}
    vem = fm.VariationalEM(fit.joint.model)
    init = {name: x * factor for (name, x), factor in zip(usual.items(), off, strict=True)}
    for found in (fit, vem.run(jax.random.key(1), fit.study, init=init, progress=False)):
        assert found.converged and abs(found.minus_two_ll - 345.435) < 0.01
        (message,) = found.messages
        other = NAMED.search(message)
        assert other[1] == "338.8" and other[2].startswith("6.6") and "lower" in other[2]
        assert "ka 0.085" in other[3] and "V 1.69 (here 31.6)" in other[3]


def test_the_other_maximum_is_had_by_its_starting_values():
    fit = theophylline("M1")
    vem = fm.VariationalEM(fit.joint.model, starts=1)
    init = {"ka": 0.085, "V": 1.69}
    other = vem.run(jax.random.key(0), fit.study, init=init, progress=False)
    assert other.converged and abs(other.minus_two_ll - 338.822) < 0.01
