"""How heavy the tail of importance weights is: the Pareto-k diagnostic.

Above a threshold u, weights follow nearly a generalised Pareto law, with density

    p(w) = (1 + k (w - u) / σ)^(-1/k - 1) / σ,

whose moments above order 1/k do not exist. Vehtari, Simpson, Gelman, Yao & Gabry (2024): with
k > .7 the mean of the weights is not to be believed, nor its standard error.
"""

from __future__ import annotations

import numpy as np

TOO_HEAVY = 0.7


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    """k̂ of the largest weights of every subject, `[subject]`.

    The M = ⌈min(S/5, 3 √S)⌉ largest of S weights are fitted by the empirical Bayes method of Zhang
    & Stephens (2009), and k̂ is drawn to .5 as by 10 weights more (Vehtari et al. 2024). Weights
    that are all equal have k̂ = -∞, those of a subject that is impossible everywhere k̂ = ∞.

    Args:
        log_weights: log w_is up to a constant of the subject, `[draw, subject]`; -∞ is allowed.
    """
    log_w = np.asarray(log_weights, float)
    count = int(np.ceil(min(0.2 * len(log_w), 3 * np.sqrt(len(log_w)))))
    if count < 5:
        raise ValueError(f"expected at least 25 weights per subject; got {len(log_w)}.")
    log_w = np.where(np.isnan(log_w), -np.inf, log_w)
    tail = np.sort(np.partition(log_w, -count - 1, axis=0)[-count - 1 :], axis=0).T
    top = tail[:, -1:]
    possible, level = np.isfinite(top[:, 0]), tail[:, 0] == top[:, 0]
    tail = np.exp(np.where(possible[:, None], tail - np.where(possible[:, None], top, 0.0), 0.0))
    excess = np.maximum(tail[:, 1:] - tail[:, :1], np.finfo(float).tiny)
    k = np.where(level, -np.inf, _zhang_stephens(excess))
    return np.where(possible, k, np.inf)


def _zhang_stephens(x: np.ndarray) -> np.ndarray:
    """k̂ of generalised Pareto samples, each sorted, `[subject, sample]`.

    With b = -k/σ, k(b) = mean log(1 - b x) and ℓ(b) = n (log(-b/k(b)) - k(b) - 1), b̂ is the mean
    of a grid b_1, ..., b_m under the weights exp ℓ(b_j), and k̂ = k(b̂).
    """
    n = x.shape[1]
    m = 30 + int(np.sqrt(n))
    b = (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * x[:, [int(n / 4 + 0.5) - 1]])
    b = b + 1 / x[:, -1:]

    def shape(b):
        return np.stack([np.log1p(-c[:, None] * x).mean(1) for c in b.T], 1)

    with np.errstate(all="ignore"):  # samples on top of each other: no k, see `fmax`
        k = shape(b)
        fit = n * (np.log(-b / k) - k - 1)
        weight = np.exp(fit - np.nanmax(fit, axis=1, keepdims=True))
        weight = np.where(weight > 0, weight, 0.0)
        best = np.sum(weight * b, axis=1, keepdims=True) / weight.sum(1, keepdims=True)
        k = shape(best)[:, 0]
    return np.where(np.isnan(k), np.inf, (n * k + 5) / (n + 10))
