"""Is the variance between occasions estimated without bias? A table with Monte-Carlo errors.

    python benchmarks/occasions.py [data sets, by default 200]

One compartment, a bolus on each of two occasions, the first washed out before the second, six
records on each, 50 subjects:

    CL_ik = CL exp(η_i1 + κ_ik),   V_i = V exp(η_i2),   y = f (1 + b ε).

Two models of the same data: with κ (whose variance other programs have been reported to bias
towards zero), and without. The bias of each parameter is in per cent of its truth, beside it its
Monte-Carlo error. An estimate counts as unbiased when it is within three errors of zero plus 2 %.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from biases import biases
from tqdm import tqdm

import flowme as fm

jax.config.update("jax_enable_x64", True)

TRUTH = {"CL": 2.7, "V": 32.0, "b": 0.1, "omega(CL)": 0.3, "omega(V)": 0.15, "kappa(CL)": 0.2}
TIMES, DOSE, SUBJECTS = np.array([1.0, 2, 4, 8, 12, 24]), 320.0, 50


def bolus(between_occasions):
    def model(study):
        CL = fm.population("CL", dist.LogNormal(1.0, 0.5), unit="L/h")
        V = fm.population("V", dist.LogNormal(3.4, 0.5), unit="L")
        b = fm.population("b", dist.HalfNormal(0.5))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL", "V"]), study.subjects)
        change = eta.CL[:, None]
        if between_occasions:
            law = fm.GaussianRandomEffect(["CL"])
            change = change + fm.random_effect("kappa", law, study.occasions["OCC"]).CL
        volume = (V * jnp.exp(eta.V))[:, None]
        rate = CL * jnp.exp(change) / volume
        f = DOSE / volume * jnp.exp(-rate * study.covariates["since"])  # [subject, time]
        fm.observe("conc", fm.residual.proportional(f, b), study)

    return model


MODELS = {"with kappa": bolus(True), "without": bolus(False)}


def draw(seed):
    rng = np.random.default_rng(seed)
    V = TRUTH["V"] * np.exp(TRUTH["omega(V)"] * rng.normal(size=SUBJECTS))
    eta = TRUTH["omega(CL)"] * rng.normal(size=SUBJECTS)
    rows = []
    for occasion in (1, 2):
        CL = TRUTH["CL"] * np.exp(eta + TRUTH["kappa(CL)"] * rng.normal(size=SUBJECTS))
        f = DOSE / V[:, None] * np.exp(-(CL / V)[:, None] * TIMES)
        y = f * (1 + TRUTH["b"] * rng.normal(size=f.shape))
        rows += [
            {"ID": i, "TIME": 1000.0 * occasion + t, "DV": y[i, j], "OCC": occasion, "since": t}
            for i in range(SUBJECTS)
            for j, t in enumerate(TIMES)
        ]
    return pd.DataFrame(rows).sort_values(["ID", "TIME"], ignore_index=True)


def estimates(name, study):
    fit = fm.VariationalEM(MODELS[name]).run(jax.random.key(0), study, progress=False)
    kappa = fit.params.get("kappa_omega", [np.nan])
    values = [fit.params[n] for n in ("CL", "V", "b")] + [*fit.params["eta_omega"], *kappa]
    return [float(x) for x in values] + [fit.minus_two_ll, fit.converged]


def main(count):
    found, begun = {name: [] for name in MODELS}, time.process_time()
    for seed in tqdm(range(count), desc="data sets"):
        study = fm.Study.from_frame(draw(seed), outcome={"conc": "DV"}, time_varying="since")
        for name in MODELS:
            found[name].append(estimates(name, study))
    rows = []
    for name, values in found.items():
        *columns, minus_two_ll, converged = np.array(values).T
        row = {"model": name} | biases(TRUTH, np.array(columns).T)
        row["-2LL"] = f"{minus_two_ll.mean():.1f}"
        rows.append(row | {"converged": f"{int(converged.sum())} of {count}"})
    print(f"{count} data sets, {time.process_time() - begun:.0f} CPU s; * is biased")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
