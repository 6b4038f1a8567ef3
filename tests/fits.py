"""Fits that several test files look at, each made once."""

import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.infer import MCMC

from flowme import datasets, residual
from flowme.closed_forms import oral_one_compartment
from flowme.effects import GaussianRandomEffect
from flowme.infer.conditional import Conditional
from flowme.infer.fit import Fit
from flowme.infer.nuts import nuts
from flowme.infer.vem import VariationalEM
from flowme.primitives import individual, observe, population, random_effect

INIT = {"ka": 1.5, "V": 32.0, "CL": 2.7, "a": 0.7}


def absorption(study):
    """Lognormal ka, V, CL, constant error; ka and CL vary, correlated."""
    ka = population("ka", dist.LogNormal(0.5, 0.5), unit="1/h")
    V = population("V", dist.LogNormal(3.4, 0.5), unit="L", label="volume")
    CL = population("CL", dist.LogNormal(1.0, 0.5), unit="L/h")
    a = population("a", dist.HalfNormal(0.5), unit="mg/L")
    eta = random_effect("eta", GaussianRandomEffect(["ka", "CL"], full=True), study.subjects)
    psi = individual(study.subjects, ka=ka * jnp.exp(eta.ka), V=V, CL=CL * jnp.exp(eta.CL))
    observe("conc", residual.constant(oral_one_compartment(psi, study), a), study)


@cache
def theophylline() -> Fit:
    study = datasets.theophylline()
    return VariationalEM(absorption).run(jax.random.key(0), study, init=INIT, progress=False)


@cache
def theophylline_nuts() -> MCMC:
    fit = theophylline()
    with warnings.catch_warnings():  # that it is short
        warnings.simplefilter("ignore")
        return nuts(
            absorption, fit.study, jax.random.key(1), fit=fit,
            num_warmup=100, num_samples=100, num_chains=2, progress=False,
        )  # fmt: skip


def rough_fit(joint, study, seed=0, near=None):
    """Some fit: what it says costs NUTS time, never correctness."""
    rng = np.random.default_rng(seed)
    n, d, p = study.subjects.size, joint.effect_size, joint.size
    theta = joint.unconstrain(near or {}) + 0.1 * rng.normal(size=p)
    weights = {k: w + 0.1 * rng.normal(size=w.shape) for k, w in joint.roles.weights.items()}
    tril = np.tril(0.1 * rng.normal(size=(n, d, d))) + 0.4 * np.eye(d)
    conditional = Conditional(jnp.asarray(0.3 * rng.normal(size=(n, d))), jnp.asarray(tril))
    zero = np.zeros(n)
    return Fit(joint, study, theta, weights, conditional, zero, zero, 10 * np.eye(p), zero, True)
