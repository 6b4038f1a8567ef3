"""Does flowme find the numbers it must, and in what time? One table per question.

    python benchmarks/first_fit.py [theophylline] [two] [sparse] [gaussian] [senescence] [nuts]

Accuracy stands beside CPU seconds of the whole process (compilation included; the first row of a
table pays most of it). References: -2LL and estimates of theophylline by adaptive quadrature;
simulated studies with known truth, judged on subjects that no fit has seen.
"""

import sys
import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from scipy.stats import wasserstein_distance

import flowme as fm
from flowme.infer.joint import Joint
from flowme.infer.marginal import estimate_marginal

jax.config.update("jax_enable_x64", True)

SEEDS, MORE = range(1, 6), range(1, 11)
NAMES = ["ka", "V", "CL"]
FULL, FLOW = fm.GaussianRandomEffect(NAMES, full=True), fm.FlowRandomEffect(NAMES)
MIXTURE = fm.MixtureRandomEffect(NAMES)


@cache  # the same function: compiled once
def oral(effect, error=fm.residual.constant, parameters=("a",)):
    """One compartment, oral, lognormal ka, V, CL."""

    def model(study):
        ka = fm.population("ka", dist.LogNormal(0.5, 0.5))
        V = fm.population("V", dist.LogNormal(3.4, 0.5))
        CL = fm.population("CL", dist.LogNormal(1.0, 0.5))
        sizes = [fm.population(name, dist.HalfNormal(1.0)) for name in parameters]
        eta = fm.random_effect("eta", effect, study.subjects)
        psi = fm.individual(
            study.subjects,
            ka=ka * jnp.exp(eta.ka),
            V=V * jnp.exp(eta.V),
            CL=CL * jnp.exp(eta.CL),
        )
        fm.observe("conc", error(fm.oral_one_compartment(psi, study), *sizes), study)

    return model


def timed(run):
    begun = time.process_time()
    return run(), time.process_time() - begun


def theophylline():
    """Theophylline: reference -2LL and estimates, from ka 1, V 20, CL 0.5, five seeds."""
    reference = {
        "constant": (345.435, [1.579, 31.63, 2.748, 0.738, 0.395, 0.0179, 0.0708]),
        "combined1": (341.9774, [1.5319, 31.603, 2.7573, 0.4285, 0.0574, 0.3931, 0.01665, 0.06902]),
    }
    study = fm.datasets.theophylline()
    for error, parameters in {"constant": ("a",), "combined1": ("a", "b")}.items():
        minus_two_ll, values = reference[error]
        model = oral(fm.GaussianRandomEffect(NAMES), getattr(fm.residual, error), parameters)
        vem = fm.VariationalEM(model)
        for seed in SEEDS:
            start = {"ka": 1.0, "V": 20.0, "CL": 0.5}
            fit, seconds = timed(
                lambda: vem.run(jax.random.key(seed), study, init=start, progress=False)
            )
            found = [float(fit.params[k]) for k in (*NAMES, *parameters)]
            found += list(np.asarray(fit.params["eta_omega"]) ** 2)
            yield {
                "error": error,
                "seed": seed,
                "-2LL": fit.minus_two_ll,
                "MC error": fit.minus_two_ll_se,
                "reference": minus_two_ll,
                "largest error of an estimate, %": 100
                * np.max(np.abs(np.array(found) / values - 1)),
                "converged": fit.converged,
                "CPU s": seconds,
            }


def sparse():
    """The same with three times per subject: 1, 8 and 24 h."""
    yield from two((1.0, 8.0, 24.0))


def two(*times):
    """Two subpopulations: -2LL on 500 new subjects against the truth, and mass in the valley."""
    mean = 0.4 * np.log(1.2) + 0.6 * np.log(3.6)
    for seed in SEEDS:
        study = fm.datasets.two_subpopulations(seed, 500, *times).study
        new = fm.datasets.two_subpopulations(seed + 1000, 500, *times).study
        joint = Joint.of(oral(MIXTURE), new)
        truth = joint.unconstrain(
            {
                "ka": 1.5, "V": 30.0, "CL": np.exp(mean), "a": 0.3,
                "eta_probs": np.array([0.4, 0.6]),
                "eta_locs": np.array([[0.0, 0.0, np.log(1.2) - mean]]),
                "eta_omega": np.array([[0.3, 0.2, 0.15], [0.3, 0.2, 0.2]]),
            }
        )  # fmt: skip
        key = jax.random.key(seed)
        best = -2 * estimate_marginal(key, joint, truth, {}, new).total
        for effect in (FLOW, FULL, MIXTURE):
            row = held_out(effect, study, new, key)
            yield {"seed": seed, **row, "-2LL new - truth": row.pop("-2LL new") - best}


def gaussian():
    """A Gaussian truth: what a flow loses on 500 new subjects."""
    for seed in MORE:
        study = fm.datasets.gaussian_population(seed).study
        new = fm.datasets.gaussian_population(seed + 1000).study
        key = jax.random.key(seed)
        flow = held_out(FLOW, study, new, key)
        full = held_out(FULL, study, new, key)
        yield {
            "seed": seed,
            "-2LL new, flow - Gaussian": flow["-2LL new"] - full["-2LL new"],
            "updates": flow["updates"],
            "CPU s": flow["CPU s"],
        }


def held_out(effect, study, new, key):
    fit, seconds = timed(lambda: fm.VariationalEM(oral(effect)).run(key, study, progress=False))
    found = fm.marginal_log_likelihood(key, fit, new)
    joint = fit.joint
    draw = jax.jit(lambda theta, w, s: joint.sample_effects(key, theta, w, s, 400))
    clearance = float(fit.params["CL"]) * np.exp(draw(fit.theta, fit.weights, study)[..., 2])
    return {
        "law": type(effect).__name__,
        "-2LL new": -2 * found.total,
        "MC error": 2 * found.total_se,
        "valley %": 100 * float(np.mean((clearance > 1.7) & (clearance < 2.4))),
        "updates": fit.selected,
        "CPU s": seconds,
    }


@cache
def counts(effect):
    """Withered leaves out of 12: a binomial count with a logistic mean in time."""

    def model(study):
        phi = fm.population("phi", dist.Normal(15.0, 5.0))
        psi = fm.population("psi", dist.LogNormal(0.7, 0.5))
        eta = fm.random_effect("eta", effect, study.subjects)
        each = fm.individual(
            study.subjects, name="variety", phi=phi + eta.phi, psi=psi * jnp.exp(eta.psi)
        )
        logits = (study.time - each.phi[:, None]) / each.psi[:, None]
        fm.observe("withered", dist.Binomial(12, logits=logits), study)

    return model


def senescence():
    """200 varieties, binomial counts: -2LL on 200 new ones, and the sliced Wasserstein-1 distance
    (sW1) to the true density of (phi, log psi), each in its true standard deviation."""
    names = ["phi", "psi"]
    laws = {
        "Gaussian": fm.GaussianRandomEffect(names, full=True),
        "mixture": fm.MixtureRandomEffect(names, full=True),
        "flow": fm.FlowRandomEffect(names),
    }
    for seed in MORE:
        simulated = fm.datasets.senescence(seed)
        new = fm.datasets.senescence(seed + 1000).study
        row = {"seed": seed}
        for title, effect in laws.items():
            vem, key = fm.VariationalEM(counts(effect)), jax.random.key(seed)
            fit, seconds = timed(lambda: vem.run(key, simulated.study, progress=False))
            row[title] = -2 * fm.marginal_log_likelihood(jax.random.key(0), fit, new).total
            row[f"{title}, sW1"] = sliced_wasserstein(fit, simulated.truth)
            row[f"{title}, CPU s"] = seconds
        yield row


def sliced_wasserstein(fit, truth, draws=20_000, directions=32):
    """Mean Wasserstein-1 distance of projections of (phi, log psi) on directions of the plane."""
    law = fit.joint.sample_effects(
        jax.random.key(0), fit.theta, fit.weights, fit.study, draws // fit.study.subjects.size
    )
    centre = np.array([float(fit.params["phi"]), np.log(float(fit.params["psi"]))])
    found = centre + np.asarray(law).reshape(-1, 2)
    drawn = truth.sample(0, draws)
    exact = np.stack([drawn["phi"], np.log(drawn["psi"])], 1)
    angles = np.pi * np.arange(directions) / directions
    slices = np.stack([np.cos(angles), np.sin(angles)]) / exact.std(0)[:, None]
    pairs = zip((found @ slices).T, (exact @ slices).T, strict=True)
    return float(np.mean([wasserstein_distance(*pair) for pair in pairs]))


def nuts():
    """NUTS on theophylline, four chains of 1000, five seeds."""
    study = fm.datasets.theophylline()
    model = oral(fm.GaussianRandomEffect(NAMES))
    fit = fm.VariationalEM(model).run(jax.random.key(0), study, progress=False)
    for seed in SEEDS:
        mcmc, seconds = timed(
            lambda: fm.nuts(model, study, jax.random.key(seed), fit=fit, progress=False)
        )
        draws = mcmc.get_samples(group_by_chain=True)
        about = numpyro.diagnostics.summary(
            {k: draws[k] for k in (*NAMES, "a", "eta_omega", "eta")}
        )
        yield {
            "seed": seed,
            "divergences": int(np.sum(mcmc.get_extra_fields()["diverging"])),
            "largest R-hat": max(float(np.max(v["r_hat"])) for v in about.values()),
            "least ESS": min(float(np.min(v["n_eff"])) for v in about.values()),
            **{name: float(about[name]["mean"]) for name in (*NAMES, "a")},
            "omega2 (median)": np.round(np.asarray(about["eta_omega"]["median"]) ** 2, 3),
            "CPU s": seconds,
        }


if __name__ == "__main__":
    questions = {f.__name__: f for f in (theophylline, two, sparse, gaussian, senescence, nuts)}
    for name in sys.argv[1:] or questions:
        print(f"\n{questions[name].__doc__}", flush=True)
        rows = []
        for row in questions[name]():  # each as it comes: a long run that is stopped is not lost
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
                  file=sys.stderr, flush=True)  # fmt: skip
            rows.append(row)
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
