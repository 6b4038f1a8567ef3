"""The mixing weights of given components: a concave problem, solved to a certificate."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls


def mixing_weights(
    log_p: np.ndarray, start: np.ndarray | None = None, tolerance: float = 1e-7
) -> tuple[np.ndarray, np.ndarray]:
    """The w that maximise Σ_i log Σ_k w_k p_ik over the simplex, and log f_i.

    Constrained Newton method (Wang 2007). With A = p_ik / f_i, the second-order model of the
    log-likelihood at w is, up to a constant, -½ ‖A w' - 2‖²: a non-negative least-squares problem
    in w', with the constraint Σ w' = 1 as one more row of large weight. Then a line search.

    Args:
        log_p: log p(y_i | η_k), `[subject, point]`; every subject possible under some point.
        start: where to start, `[point]`; by default equal weights.
        tolerance: stop when max_k D(η_k) is below this times the number of subjects.
    """
    top = log_p.max(1)
    P = np.exp(log_p - top[:, None])
    count, size = P.shape
    w = np.full(size, 1.0 / size) if start is None else start
    for _ in range(100):
        f = P @ w
        A = P / f[:, None]
        slope = A.sum(0) - count
        if slope.max() < tolerance * count:
            break
        target = _least_squares(A) - w
        gain, step = slope @ target, 1.0
        while np.log(P @ (w + step * target)).sum() < np.log(f).sum() + step * gain / 3:
            step /= 2
            if step < 1e-10:  # rounding errors: no more to be had
                return w, np.log(f) + top
        w = w + step * target
    return w, np.log(P @ w) + top


def _least_squares(A: np.ndarray) -> np.ndarray:
    """The w ≥ 0, Σ w = 1, that minimises ‖A w - 2‖²."""
    count, size = A.shape
    heavy = 10.0 * np.sqrt(count)
    rows = np.vstack([np.column_stack([A, np.full(count, 2.0)]), np.full(size + 1, heavy)])
    if count > size:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))
    w, _ = nnls(rows[:, :-1], rows[:, -1], maxiter=30 * size)
    return w / w.sum()


def directional(log_p: np.ndarray, log_f: np.ndarray) -> np.ndarray:
    """D(η_k) = Σ_i p(y_i | η_k) / f_i - N, `[point]`."""
    with np.errstate(over="ignore"):
        return np.exp(log_p - log_f[:, None]).sum(0) - len(log_f)
