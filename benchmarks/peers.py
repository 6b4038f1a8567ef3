"""The same study by flowme and by pynlme, side by side: CPU seconds and distance to the maximum.

    pip install pynlme
    python benchmarks/peers.py [subjects, 1000]

Closed form, three lognormal effects, 10 concentrations each (`estimation.study_of`). All estimates
are judged by one likelihood: adaptive Gauss-Hermite quadrature of the highest order, at the
estimates of each program, below its maximum.
"""

import sys

import jax
import numpy as np
import pandas as pd
from estimation import gap, model_of, study_of, timed, within
from pynlme import nlmefitsa

import flowme as fm
from flowme.infer.evaluate import LARGEST, evaluate
from flowme.infer.newton import newton_of

jax.config.update("jax_enable_x64", True)

START = {"ka": 1.0, "V": 20.0, "CL": 5.0}


def concentration(phi, x):
    ka, V, CL = phi.T if phi.ndim == 1 else (phi[:, j] for j in range(3))
    k, t = CL / V, x[:, 0]
    return 320 * ka / (V * (ka - k)) * (np.exp(-k * t) - np.exp(-ka * t))


def by_pynlme(study, seed):
    """Estimates of ka, V, CL, their ω, and a."""
    frame = study.to_frame()
    rows = frame[frame["DV"].notna() & (frame["EVID"] == 0)]
    beta, psi, stats, _ = nlmefitsa(
        rows[["TIME"]].to_numpy(), rows["DV"].to_numpy(), rows["ID"].to_numpy(), None,
        concentration, np.log(list(START.values())),
        ParamTransform=[1, 1, 1], Vectorization="Full", random_state=seed,
    )  # fmt: skip
    a = np.ravel(stats.errorparam)[0]
    return [*np.exp(np.ravel(beta)), *np.sqrt(np.diag(psi)), a]


def below_maximum(best, values):
    """log p(y; θ̂) - log p(y; θ) by quadrature of the highest order."""
    joint = best.joint
    theta = joint.unconstrain(
        {"ka": values[0], "V": values[1], "CL": values[2], "eta_omega": values[3:6], "a": values[6]}
    )
    engine = newton_of(joint, best.theta, {}, best.study, use_priors=False).engine

    def at(theta):
        found = evaluate(
            engine, jax.random.key(0), np.asarray(theta), {}, best.study, order=LARGEST[3]
        )
        return found.log_likelihood.sum()

    return at(best.theta) - at(theta) + gap(best)


def main(subjects):
    study = study_of(subjects)
    vem = fm.VariationalEM(model_of(fm.oral_one_compartment), starts=1)
    rows = []
    for name in ("flowme, with compilation", "flowme", "flowme, second run"):
        fit, seconds = timed(lambda: vem.run(jax.random.key(0), study, init=START, progress=False))
        rows.append({"program": name, "CPU s": seconds, "below maximum": gap(fit)})
        print(rows[-1], flush=True)
    rows.append({"program": "flowme, within .1", "CPU s": within(fit, vem), "below maximum": 0.1})
    for seed in range(3):
        found, seconds = timed(lambda seed=seed: by_pynlme(study, seed))
        row = {"program": f"pynlme SAEM, seed {seed}", "CPU s": seconds}
        rows.append(row | {"below maximum": below_maximum(fit, found)})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    print("ratio, pynlme to flowme without compilation:",
          round(table["CPU s"][4:].median() / table["CPU s"][1:3].min(), 1))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
