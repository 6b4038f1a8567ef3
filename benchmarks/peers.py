"""The same study by flowme, pynlme and R's nlme and saemix: CPU seconds, distance to the maximum.

    pip install pynlme
    python benchmarks/peers.py [subjects, 1000]

Closed form, three lognormal effects, 10 concentrations each (`estimation.study_of`). All estimates
are judged by one likelihood: adaptive Gauss-Hermite quadrature of the highest order, at the
estimates of each program, below its maximum. CPU seconds are of the estimation, without imports;
flowme's contain the errors of the estimates and the likelihood, those of the others (as far as they
can be told) do not. "With compilation" is a fresh process, "cache filled" one that keeps its
programs in JAX's persistent compilation cache, "warm cache" the next one; "again" is a 30th fit,
whose programs have been optimised by then. Programs of R that are not there are left out; nlme
maximises a linearisation.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from estimation import Trace, gap, model_of, settled, study_of, timed, within
from fresh import cold_and_warm, fresh
from pynlme import nlmefitsa

import flowme as fm
import flowme.infer.vem
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


def by_r(study, program, seed):
    """CPU seconds and estimates (`benchmarks/peers.R`), or None."""
    frame = study.to_frame()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        rows = frame[frame["DV"].notna() & (frame["EVID"] == 0)]
        rows[["ID", "TIME", "DV"]].to_csv(table, index=False)
        command = ["Rscript", Path(__file__).with_name("peers.R"), table, program, str(seed)]
        found = subprocess.run(command, capture_output=True, text=True)
    values = found.stdout.split()
    if found.returncode or not values:
        print(f"{program} did not run: {found.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(values[0]), [float(x) for x in values[1:]]


def one_fit(subjects):
    """Prints the CPU seconds of the first fit of this process, and those after which log p(y; θ)
    stays within .1 of its maximum."""
    study, trace = study_of(subjects), Trace()
    trace.steps, vem = [], fm.VariationalEM(model_of(fm.oral_one_compartment), starts=1)
    flowme.infer.vem.Checkpoint, key = lambda: trace, jax.random.key(0)
    begun = time.process_time()
    fit = vem.run(key, study, init=START, progress=False)
    seconds = time.process_time() - begun
    near = settled(fit, trace.steps) - begun
    print(json.dumps([seconds, near, gap(fit)]))


def with_cache(subjects):
    """The same in a process that finds nothing in the persistent cache, and in the next one; and
    in one without a cache, which optimises less."""
    names = "flowme, with compilation", "flowme, cache filled", "flowme, warm cache"
    found = [fresh(__file__, "one_fit", str(subjects))]
    found += cold_and_warm(__file__, "one_fit", str(subjects))
    for name, (seconds, near, below) in zip(names, found, strict=True):
        yield {"program": f"{name}, within .1", "CPU s": near, "below maximum": 0.1}
        yield {"program": name, "CPU s": seconds, "below maximum": below}


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

    def add(row):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    for row in with_cache(subjects):
        add(row)
    for _ in range(30):  # programs that go on being called are optimised in the end
        fit, seconds = timed(lambda: vem.run(jax.random.key(0), study, init=START, progress=False))
    add({"program": "flowme, again", "CPU s": seconds, "below maximum": gap(fit)})
    add({"program": "flowme, within .1", "CPU s": within(fit, vem), "below maximum": 0.1})
    for seed in range(3):
        found, seconds = timed(lambda seed=seed: by_pynlme(study, seed))
        row = {"program": f"pynlme SAEM, seed {seed}", "CPU s": seconds}
        add(row | {"below maximum": below_maximum(fit, found)})
    for program, seeds in {"nlme": (0,), "saemix": (1, 2)}.items():
        for seed in seeds if shutil.which("Rscript") else ():
            if found := by_r(study, program, seed):
                row = {"program": f"R {program}, seed {seed}", "CPU s": found[0]}
                add(row | {"below maximum": below_maximum(fit, found[1])})
    table = pd.DataFrame(rows)
    best = table["CPU s"][table["program"] == "flowme, within .1"].item()
    table["times flowme, within .1"] = table["CPU s"] / best
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    subjects = int(sys.argv[-1]) if len(sys.argv) > 1 else 1000
    one_fit(subjects) if sys.argv[1:2] == ["one_fit"] else main(subjects)
