"""Biases of estimates over simulated data sets, as a row of a table."""

import numpy as np


def biases(truth: dict[str, float], estimates) -> dict[str, str]:
    """Mean error of each parameter in per cent of its truth ± its Monte-Carlo error; * marks what
    is further from 0 than three of those and 2 %.

    Args:
        truth: by parameter.
        estimates: `[data set, parameter]`; NaN where a model has no such parameter.
    """
    error = 100 * (np.asarray(estimates, float) / np.array(list(truth.values())) - 1)
    bias, own = error.mean(0), error.std(0, ddof=1) / np.sqrt(len(error))
    return {
        f"{name}, %": f"{b:+.1f} ± {e:.1f}{'' if abs(b) < 3 * e + 2 else ' *'}"
        if np.isfinite(b)
        else ""
        for name, b, e in zip(truth, bias, own, strict=True)
    }
