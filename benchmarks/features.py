"""Is every feature estimated without bias? A table each, with Monte-Carlo errors.

    python benchmarks/features.py [data sets, by default 200] [features, by default all]

Each feature is a small model whose truth is known. Its data are drawn with NumPy and SciPy: doses
are added up by hand, laws are SciPy's. The features are in `features_doses.py` (regimens, an ODE),
`features_covariates.py` (covariates, occasions) and `features_outcomes.py` (several outcomes,
counts, categories, times to an event, censoring, correlated errors).

The bias of each population parameter is in per cent of its truth, beside it its Monte-Carlo error.
An estimate counts as unbiased when it is within three errors of zero plus 2 %. A maximum-likelihood
ω of N subjects is by itself biased by about -50/N %.
"""

import re
import sys
import time
from collections import Counter

import features_covariates
import features_doses
import features_outcomes
import jax
import numpy as np
import pandas as pd
from biases import biases
from tqdm import tqdm

import flowme as fm

jax.config.update("jax_enable_x64", True)

FEATURES = features_doses.FEATURES | features_covariates.FEATURES | features_outcomes.FEATURES


_NUMBER = re.compile(r"-?\d[\d.e+-]*(?!\w)")  # what differs between messages of one kind


def flat(values):
    """Parameters by name, those of random effects by the name of each: omega(CL), kappa(CL)."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            level = name.removesuffix("_omega")
            level = "omega" if level == "eta" else level
            found |= {f"{level}({effect})": x for effect, x in value.items()}
        else:
            found[name] = value
    return found


def estimates(fit, truth):
    """In the order of the truth, which names every parameter that was estimated."""
    if set(fit.params) != set(truth):
        raise ValueError(f"expected a truth of each of {sorted(fit.params)}; got {sorted(truth)}.")
    return np.concatenate([np.ravel(fit.params[name]) for name in truth])


def table_of(name, count):
    feature = FEATURES[name]
    vem = fm.VariationalEM(feature.model, starts=1)
    found, converged, messages, begun = [], 0, Counter(), time.process_time()
    own = list(FEATURES).index(name)  # so that features do not share their random numbers
    for seed in tqdm(range(count), desc=name, leave=False, disable=None):
        study = feature.draw(np.random.default_rng([own, seed]))
        fit = vem.run(jax.random.key(seed), study, progress=False)
        found.append(estimates(fit, feature.truth))
        converged += fit.converged
        messages.update(_NUMBER.sub("...", message) for message in fit.messages)
    seconds = time.process_time() - begun
    truth = flat(feature.truth)
    bias = biases(truth, found)
    rows = [
        (n, x, b or "not finite") for (n, x), b in zip(truth.items(), bias.values(), strict=True)
    ]
    print(f"{name}: {count} data sets of {study.subjects.size} subjects and "
          f"{sum(int(seen.sum()) for seen in study.observed.values())} measurements, "
          f"{converged} converged, {seconds:.0f} CPU s")  # fmt: skip
    table = pd.DataFrame(rows, columns=["parameter", "truth", "bias, %"])
    print(table.to_string(index=False))
    for message, times in messages.most_common():
        print(f"said of {times}: {message}")
    print(flush=True)


def main(count="200", *names):
    unknown = set(names) - set(FEATURES)
    if unknown:
        raise SystemExit(f"expected features among {list(FEATURES)}; got {sorted(unknown)}")
    print("* is biased\n")
    for name in names or FEATURES:
        table_of(name, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
