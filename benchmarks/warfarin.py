"""Two outcomes of warfarin: concentrations, and the prothrombin activity that they lower.

    python benchmarks/warfarin.py [folder for figures]

32 subjects, one oral dose of 1.5 mg/kg; the data of O'Reilly (1968) are read in ../shared. Drug
passes a transit compartment and the gut; activity turns over, and the drug inhibits its production:

    d depot/dt = - ka depot
    d gut/dt = ka depot - ka gut
    d central/dt = ka gut - CL c,   c = central / V
    d activity/dt = kout (E0 (1 - c / (EC50 + c)) - activity),   activity(0) = E0

The published model differs in two things. It has two rates of absorption, ktr and ka, each with its
own variance: they can be exchanged without a change of the curve, so that a maximum has a twin and
subjects have two modes. Here they are one; two steps take 2 / ka on average, and 1 / ktr + 1 / ka,
which is compared. And its effect is incomplete, emax c / (EC50 + c) with a logit-normal emax of
.968: under maximum likelihood emax runs to 1. flowme says so, and -2LL is 2215.50 ± .11 with it and
2215.39 ± .12 without.

All parameters are lognormal; Ω is diagonal; the concentration has an additive and a proportional
error, the activity an additive one. Published: nlmixr's estimates of this example as the tests of
the R package posologyr record them (test_multi_outputs.R). One that is further away than two of
flowme's standard errors is marked *.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd

import flowme as fm

jax.config.update("jax_enable_x64", True)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "warfarin.csv"
PUBLISHED = {
    "ka": 2 / (np.exp(-0.106) + np.exp(0.087)), "CL": np.exp(-2.03), "V": np.exp(2.07),
    "EC50": np.exp(0.00724), "kout": np.exp(-2.9),
    "E0": np.exp(4.57), "b": 0.150, "a": 0.144, "a of activity": 3.91,
    "omega(CL)": 0.281, "omega(V)": 0.229,
    "omega(EC50)": 0.519, "omega(kout)": 0.127, "omega(E0)": 0.0708,
}  # fmt: skip


def turnover(t, amount, psi):
    depot, gut, central, activity = amount
    concentration = central / psi.V
    inhibited = 1 - concentration / (psi.EC50 + concentration)
    return (
        -psi.ka * depot,
        psi.ka * depot - psi.ka * gut,
        psi.ka * gut - psi.CL * concentration,
        psi.kout * (psi.E0 * inhibited - activity),
    )


def model(study):
    ka = fm.population("ka", dist.LogNormal(0.0, 0.5), unit="1/h")
    CL = fm.population("CL", dist.LogNormal(-2.0, 0.5), unit="L/h")
    V = fm.population("V", dist.LogNormal(2.0, 0.5), unit="L")
    EC50 = fm.population("EC50", dist.LogNormal(0.0, 0.5), unit="mg/L")
    kout = fm.population("kout", dist.LogNormal(-3.0, 0.5), unit="1/h")
    E0 = fm.population("E0", dist.LogNormal(4.6, 0.2), unit="%")
    a = fm.population("a", dist.HalfNormal(1.0), unit="mg/L")
    b = fm.population("b", dist.HalfNormal(0.3))
    a_activity = fm.population("a of activity", dist.HalfNormal(5.0), unit="%")

    names = ["ka", "CL", "V", "EC50", "kout", "E0"]
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(names), study.subjects)
    psi = fm.individual(
        study.subjects,
        ka=ka * jnp.exp(eta.ka),
        CL=CL * jnp.exp(eta.CL),
        V=V * jnp.exp(eta.V),
        EC50=EC50 * jnp.exp(eta.EC50),
        kout=kout * jnp.exp(eta.kout),
        E0=E0 * jnp.exp(eta.E0),
    )

    nothing = jnp.zeros_like(psi.E0)
    initial = jnp.stack([nothing, nothing, nothing, psi.E0], axis=-1)
    state = fm.solve(turnover, psi, study, initial=initial, rtol=1e-6, atol=1e-6)
    concentration = state[..., 2] / psi.V[:, None]
    fm.observe("cp", fm.residual.combined2(concentration, a, b), study)
    fm.observe("pca", fm.residual.constant(state[..., 3], a_activity), study)


def main(folder=None):
    study = fm.Study.from_csv(
        DATA, "id", "time", "dv", outcome_type="dvid", amount="amt", event="evid", replicates=True,
        units={"time": "h", "cp": "mg/L", "pca": "%", "amount": "mg"},
    )  # fmt: skip
    print(study)
    begun = time.process_time()
    fit = fm.VariationalEM(model).run(jax.random.key(0), study)
    print(f"{time.process_time() - begun:.0f} CPU s; {fit.seconds}")
    summary = fm.summary(fit)
    print(summary, "\n")
    found = summary.frame[["estimate", "SE"]]
    found = found.assign(published=pd.Series(PUBLISHED))
    found["% apart"] = 100 * (found["estimate"] / found["published"] - 1)
    apart = (found["estimate"] - found["published"]).abs() > 2 * found["SE"]
    print(found.assign(beyond=np.where(apart, "*", "")).round(4).to_string())
    for outcome in study.outcomes if folder else ():
        figure = fm.plots.individual_fits(fit, outcome=outcome)
        figure.savefig(Path(folder) / f"warfarin_{outcome}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
