"""Pictures of what a model does not reproduce: the visual predictive check, residuals."""

from __future__ import annotations

from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

from flowme.npde import npde
from flowme.plots.style import INK, LEAF, PALE, RUST, STYLE, label, outcome_of, with_unit
from flowme.predict import Result, estimate, simulate
from flowme.study import Study

_RUNNING: dict[str, dict[str, Any]] = {
    "running mean (0)": {"color": RUST, "lw": 1.6, "ls": "-"},
    "running mean of the size (.80)": {"color": RUST, "lw": 1.6, "ls": (0, (5, 2))},
}


def vpc(result: Result, key: jax.Array | None = None, replicates: int = 200) -> Figure:
    """Visual predictive check: percentiles of what was measured against simulated ones.

    In every time bin, the 10th, 50th and 90th percentile of the observations (lines) and the
    95 % interval of the same percentile over simulated studies of new subjects (bands). A line
    outside its band is something that the model does not reproduce. When subjects are measured
    at the same times each is a bin; else bins hold equally many observations. Ticks along the
    top are the borders of the bins.

    Where observations are censored, everything below the largest limit of quantification counts
    as lying at it, measured or simulated; likewise above the smallest upper limit. Dotted lines
    are these limits: percentiles on them are only known to be beyond.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        key: random key; `jax.random.key(0)` by default.
        replicates: simulated studies.

    Reference:
        Bergstrand, Hooker, Wallin and Karlsson (2011), AAPS Journal 13, 143-151.
    """
    study = estimate(result, conditional=False).study
    key = jax.random.key(0) if key is None else key
    simulated = simulate(key, result, replicates=replicates)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(simulated), figsize=(6.8 * len(simulated), 4.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (name, values) in zip(axes.flat, simulated.items(), strict=True):
            _vpc_panel(ax, study, name, values)
        handles = [
            Line2D([], [], color=RUST, lw=1.6, label="measured: 10, 50, 90 %"),
            Patch(color=PALE, label="simulated: 95 % intervals"),
            Line2D([], [], color=INK, marker="o", ls="", ms=3, alpha=0.4, label="measurements"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def residuals(
    result: Result,
    key: jax.Array | None = None,
    replicates: int = 1000,
    outcome: str | None = None,
) -> Figure:
    """Residuals of an outcome (`flowme.npde`): a model that is right leaves N(0, 1) everywhere.

    NPDE over time and over the population prediction, their quantiles against those of N(0, 1)
    with the band in which 95 % of each lie, and IWRES over the individual prediction. Lines are
    running means of the residuals and, dashed, of their size, where 0 and .80 belong. Triangles
    are censored observations. The title has the mean and the variance of NPDE with p-values of
    their being 0 and 1.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        key: random key; `jax.random.key(0)` by default.
        replicates: simulated studies.
        outcome: which outcome; the first one by default.
    """
    study = estimate(result, conditional=False).study
    name = outcome_of(study, outcome)
    table = npde(result, key, replicates=replicates)
    table = table[table["outcome"] == name]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.4), layout="constrained")
        unit = study.units.get(name, "")
        for ax, (x, y, text) in zip(
            axes.flat[[0, 1, 3]],
            [
                ("time", "npde", label(study, "time")),
                ("pred", "npde", with_unit("population prediction", unit)),
                ("ipred", "iwres", with_unit("individual prediction", unit)),
            ],
            strict=True,
        ):
            _residual_panel(ax, table, x, y)
            ax.set(xlabel=text, ylabel=y.upper())
        _quantile_panel(axes[1, 0], table["npde"].to_numpy())
        handles = [Line2D([], [], label=label, **line) for label, line in _RUNNING.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle(f"{name}: {_tested(table['npde'].to_numpy())}", fontsize=11)
    return figure


def _vpc_panel(ax: Axes, study: Study, name: str, simulated: np.ndarray) -> None:
    seen = study.observed[name]
    limits = _limits_of_quantification(study, name)
    time, measured = study.time[seen], np.clip(study.values[name][seen], *limits)
    simulated = np.clip(simulated[:, seen], *limits)
    where, edges, common = _bins(time, int(np.median(seen.sum(1))))
    shares = [0.1, 0.5, 0.9]
    bins = range(len(edges) - 1)
    middle = np.array([np.median(time[where == b]) for b in bins])
    lines = np.array([np.quantile(measured[where == b], shares) for b in bins])
    drawn = np.array([np.quantile(simulated[:, where == b], shares, axis=1) for b in bins])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=2)  # [bin, percentile]
    ax.plot(time, measured, "o", ms=2.5, color=INK, alpha=0.25, mew=0, zorder=1)
    for k in range(3):
        color = LEAF if k == 1 else PALE
        ax.fill_between(middle, low[:, k], high[:, k], color=color, alpha=0.55, lw=0)
        ax.plot(middle, lines[:, k], color=RUST, lw=1.6, ls="-" if k == 1 else (0, (5, 2)))
    ax.plot(edges, np.ones(len(edges)), "|", color=INK, ms=8, clip_on=False,
            transform=ax.get_xaxis_transform())  # fmt: skip
    for limit in np.array(limits)[np.isfinite(limits)]:
        ax.axhline(limit, color=INK, lw=1, ls=":")
    kind = "one for each time" if common else "of equally many observations"
    ax.set_title(f"{len(middle)} time bins, {kind}", fontsize=9, loc="left", pad=9)
    ax.set(xlabel=label(study, "time"), ylabel=label(study, name))


def _residual_panel(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    known = table[np.isfinite(table[y])]
    for code, marker in {0: "o", 1: "v", -1: "^"}.items():
        some = known[known["censored"] == code]
        if len(some):
            ax.plot(some[x], some[y], marker, ms=3 if code == 0 else 4, color=INK, alpha=0.35,
                    mew=0)  # fmt: skip
    for level in (-1.96, 0.0, 1.96):
        ax.axhline(level, color=LEAF, lw=1, ls="-" if level == 0 else ":")
    if known.empty:  # a law without a distribution function
        return
    where, _, _ = _bins(known[x].to_numpy(), max(4, int(len(known) ** 0.5 / 2)))
    bins = known.groupby(where)
    for values, line in zip((known[y], known[y].abs()), _RUNNING.values(), strict=True):
        ax.plot(bins[x].median(), values.groupby(where).mean(), **line)


def _quantile_panel(ax: Axes, values: np.ndarray) -> None:
    values = np.sort(values[np.isfinite(values)])
    size = len(values)
    rank = np.arange(1, size + 1)
    expected = stats.norm.ppf((rank - 0.5) / size)
    # An ordered uniform variable has a beta law.
    band = stats.norm.ppf(stats.beta.ppf([[0.025], [0.975]], rank, size + 1 - rank))
    ax.fill_between(expected, *band, color=PALE, alpha=0.55, lw=0)
    ax.plot(expected, expected, color=LEAF, lw=1)
    ax.plot(expected, values, "o", ms=2.5, color=INK, alpha=0.5, mew=0)
    ax.set(xlabel="quantiles of N(0, 1)", ylabel="NPDE, ordered")


def _tested(values: np.ndarray) -> str:
    """Mean and variance with the p-values of their being 0 and 1."""
    values = values[np.isfinite(values)]
    if len(values) < 3:
        return f"{len(values)} residuals"
    mean, variance, size = values.mean(), values.var(ddof=1), len(values)
    of_mean = stats.ttest_1samp(values, 0.0).pvalue
    tail = stats.chi2.cdf((size - 1) * variance, size - 1)
    of_variance = 2 * min(tail, 1 - tail)
    return (
        f"mean of NPDE {mean:.2f} (p = {of_mean:.2g}), variance {variance:.2f} "
        f"(p = {of_variance:.2g})"
    )


def _limits_of_quantification(study: Study, name: str) -> tuple[float, float]:
    """Between them nothing is censored; infinite where there is no such limit."""
    side, values = study.censored.get(name), study.values[name]
    if side is None:
        return -np.inf, np.inf
    lower = np.max(values, where=side == 1, initial=-np.inf)
    return float(lower), float(np.min(values, where=side == -1, initial=np.inf))


def _bins(time: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which bin each observation is in, the borders, and whether each time is a bin."""
    distinct, where, sizes = np.unique(time, return_inverse=True, return_counts=True)
    if len(distinct) <= 30 and sizes.min() >= 5:
        middle = 0.5 * (distinct[1:] + distinct[:-1])
        return where, np.array([distinct[0], *middle, distinct[-1]]), True
    count = max(2, min(count, 20, len(time) // 5))
    # Ties may make two borders one.
    edges = np.unique(np.quantile(time, np.linspace(0, 1, count + 1)))
    return np.clip(np.searchsorted(edges, time, side="right") - 1, 0, len(edges) - 2), edges, False
