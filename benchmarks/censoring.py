"""Are estimates from censored data biased? A table with Monte-Carlo errors.

    python benchmarks/censoring.py [data sets, by default 200]

y = exp(level + η - k exp(κ) t) + a ε, 30 subjects, seven times over 12 h, everything below .5
reported as "below .5" (about 45 % of the records). Three readings of the same data:

    M3         the censored records say P(y < .5) (`CENS`)
    dropped    they are left out
    LLOQ/2     they are read as .25

The bias of each parameter is in per cent of its truth, beside it its Monte-Carlo error. An estimate
counts as unbiased when it is within three errors of zero plus 2 %.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from biases import biases

import flowme as fm

jax.config.update("jax_enable_x64", True)

TRUTH = {"level": 1.0, "k": 0.3, "a": 0.2, "omega(level)": 0.4, "omega(k)": 0.3}
TIMES, SUBJECTS, LLOQ = np.array([0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0]), 30, 0.5


def washout(study):
    level = fm.population("level", dist.Normal(1.0, 1.0))
    k = fm.population("k", dist.LogNormal(-1.0, 0.5))
    a = fm.population("a", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level", "k"]), study.subjects)
    rate = k * jnp.exp(eta.k)
    f = jnp.exp(level + eta.level[:, None] - rate[:, None] * study.time)
    fm.observe("y", fm.residual.constant(f, a), study)


def draw(seed):
    """A table with CENS; MDV is 0."""
    rng = np.random.default_rng(seed)
    level = TRUTH["level"] + TRUTH["omega(level)"] * rng.normal(size=(SUBJECTS, 1))
    k = TRUTH["k"] * np.exp(TRUTH["omega(k)"] * rng.normal(size=(SUBJECTS, 1)))
    f = np.exp(level - k * TIMES)
    y = f + TRUTH["a"] * rng.normal(size=f.shape)
    subject, times = np.repeat(np.arange(SUBJECTS), len(TIMES)), np.tile(TIMES, SUBJECTS)
    table = pd.DataFrame({"ID": subject, "TIME": times, "DV": y.ravel(), "MDV": 0})
    table["CENS"] = (table.DV < LLOQ).astype(int)
    table["DV"] = table.DV.clip(lower=LLOQ)
    return table


# Rows that are dropped stay as records without a measurement, so that shapes do not change.
READINGS = {
    "M3": lambda t: t,
    "dropped": lambda t: t.assign(MDV=t.CENS).drop(columns="CENS"),
    "LLOQ/2": lambda t: t.assign(DV=t.DV.where(t.CENS == 0, LLOQ / 2)).drop(columns="CENS"),
}


def estimates(table):
    study = fm.Study.from_frame(table, outcome={"y": "DV"}, keep_unobserved=True)
    fit = fm.VariationalEM(washout).run(jax.random.key(0), study, progress=False)
    omega = np.asarray(fit.params["eta_omega"])
    return [float(fit.params[n]) for n in ("level", "k", "a")] + omega.tolist() + [fit.converged]


def main(count):
    found = {name: [] for name in READINGS}
    share, begun = [], time.process_time()
    for seed in range(count):
        table = draw(seed)
        share.append(table.CENS.mean())
        for name, reading in READINGS.items():
            found[name].append(estimates(reading(table)))
    rows = []
    for name, values in found.items():
        *columns, converged = np.array(values).T
        row = {"reading": name} | biases(TRUTH, np.array(columns).T)
        rows.append(row | {"converged": f"{int(converged.sum())} of {count}"})
    print(f"{count} data sets, {100 * np.mean(share):.0f} % of the records censored, "
          f"{time.process_time() - begun:.0f} CPU s; * is biased")  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
