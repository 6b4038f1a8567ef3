"""Are the Monte-Carlo errors of importance sampling honest, and how much does a small one cost?

    python benchmarks/importance.py [repetitions, 100]

500 subjects with 10 concentrations, and with 3, three Gaussian effects: log p(y_i; θ) against
adaptive Gauss-Hermite quadrature with 9 nodes per effect. "within 2 SE" counts subjects and
repetitions, or repetitions of the total; 8 replicates have a t distribution of 7 degrees of
freedom, of which 91.4 % is within 2.
"""

import sys
import time

import jax
import numpy as np
import pandas as pd
from estimation import model_of, study_of

import flowme as fm
from flowme.infer.evaluate import evaluate
from flowme.infer.newton import newton_of

jax.config.update("jax_enable_x64", True)


def thinned(study):
    """The records at about .5, 4 and 18 h."""
    frame = study.to_frame()
    number = frame.groupby("ID").cumcount()
    return fm.Study.from_frame(frame[number.isin([0, 2, 5, 9])], outcome={"conc": "DV"})


def row(name, study, repetitions):
    fit = fm.VariationalEM(model_of(fm.oral_one_compartment), starts=1).run(
        jax.random.key(0), study, progress=False
    )
    engine = newton_of(fit.joint, fit.theta, {}, study, use_priors=False).engine
    modes = np.asarray(fit.conditional.mean)
    exact = evaluate(engine, jax.random.key(0), np.asarray(fit.theta), {}, study, modes, order=9)
    fm.marginal_log_likelihood(jax.random.key(0), fit)  # compiles
    z, total, own, seconds = [], [], [], []
    for key in jax.random.split(jax.random.key(1), repetitions):
        begun = time.process_time()
        found = fm.marginal_log_likelihood(key, fit)
        seconds.append(time.process_time() - begun)
        away = found.log_likelihood - exact.log_likelihood
        z.append(away / found.standard_error)
        own.append(found.total_se)
        total.append(away.sum())
    total, own = np.array(total), np.array(own)
    return {
        "study": name,
        "error of the total, mean": total.mean(),
        "SD": total.std(ddof=1),
        "stated SE": own.mean(),
        "subjects within 2 SE, %": 100 * np.mean(np.abs(z) < 2),
        "totals within 2 SE, %": 100 * np.mean(np.abs(total / own) < 2),
        "CPU s": np.median(seconds),
    }


def main(repetitions):
    rich = study_of(500)
    rows = [row("10 records", rich, repetitions), row("3 records", thinned(rich), repetitions)]
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
