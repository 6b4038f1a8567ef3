"""Pictures of a fit. Each function returns a matplotlib `Figure`."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from flowme.infer.fit import Fit
from flowme.infer.profile import Profile
from flowme.infer.resampled import Bootstrap
from flowme.npde import npde
from flowme.predict import Result, estimate, population_draws, predict, simulate
from flowme.study import Study

_INK, _LEAF, _PALE, _RUST = "#22313a", "#1b7f6b", "#8fcdb9", "#c8553d"
_DENSITY = LinearSegmentedColormap.from_list(
    "leaf", ["#eef7f2", "#c3e5d6", "#84c8b0", "#3f9f88", "#17705f", "#0c4a44"]
)
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def individual_fits(result: Result, subjects: int = 12, outcome: str | None = None) -> Figure:
    """What was measured in each subject, with its individual and the population prediction.

    Censored observations are triangles at their bound that point to where the value lies.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        subjects: how many panels, one per subject, in the order of the study.
        outcome: which outcome; the first one by default.
    """
    study = estimate(result, conditional=False).study
    name = _outcome(study, outcome)
    chosen = study.subset(range(min(subjects, study.subjects.size)))
    # All records count, so that a curve begins at the dose.
    start, stop = study.time[study.recorded].min(), study.time[study.recorded].max()
    dense = chosen.at(np.linspace(start, stop, 150))
    own, typical = predict(result, dense)[name], predict(result, dense, population=True)[name]
    columns = min(4, chosen.subjects.size)
    rows = -(-chosen.subjects.size // columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.6 * columns + 0.4, 1.9 * rows + 0.9), squeeze=False,
            sharex=True, sharey=True, layout="constrained",
        )  # fmt: skip
        for i, ax in enumerate(axes.flat):
            if i >= chosen.subjects.size:
                ax.set_axis_off()
                continue
            seen = chosen.observed[name][i]
            ax.plot(dense.time[i], typical[i], color=_INK, lw=1, ls=(0, (4, 3)), alpha=0.7)
            ax.plot(dense.time[i], own[i], color=_LEAF, lw=1.8)
            side = chosen.censored.get(name, np.zeros(chosen.time.shape, int))[i]
            for code, marker in ((0, "o"), (1, "v"), (-1, "^")):
                shown = seen & (side == code)
                if code == 0 or shown.any():
                    ax.plot(chosen.time[i, shown], chosen.values[name][i, shown], marker, ms=4,
                            color=_RUST, mec="white", mew=0.5)  # fmt: skip
            ax.set_title(str(chosen.ids[i]))
        figure.supxlabel(_label(study, "time"), fontsize=11)
        figure.supylabel(_label(study, name), fontsize=11)
        handles = [
            Line2D([], [], color=_RUST, marker="o", ls="", mec="white", label="measured"),
            Line2D([], [], color=_LEAF, lw=1.8, label="individual prediction"),
            Line2D([], [], color=_INK, lw=1, ls=(0, (4, 3)), label="population prediction"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def random_effects(result: Any, against: Any = None, *, individual: bool = False) -> Figure:
    """The fitted distribution of random effects, beside a Gaussian and the conditional means.

    Filled areas hold the densest 10, 25, 50, 75, 90 and 97 % of the distribution; dashed lines
    hold 50 and 90 % of the Gaussian. Dots are the means of the conditional distributions. These
    are less spread than the distribution itself, the less was measured the more.

    Args:
        result: a `Fit`, a NumPyro `MCMC` that was run on `model(study)`, or what `to_arviz` made.
        against: another of these, the fit of a Gaussian, drawn dashed. By default it is the
            Gaussian with the same mean and covariance of η.
        individual: show the individual parameters ψ instead of η.
    """
    law = _law(result, individual)
    if against is not None:
        other = _law(against, individual)
        if other.names != law.names:
            raise ValueError(f"expected fits of the same {list(law.names)}; got {other.names}.")
        dashed, text = other.draws, "Gaussian fit"
    else:
        dashed, text = _same_moments(result, law, individual), "Gaussian, same mean and covariance"
    size = len(law.names)
    limits = [_limits(law.draws[:, j], dashed[:, j], law.points[:, j]) for j in range(size)]
    with plt.rc_context(_STYLE):
        figure, joint, marginal = _panels(size)
        for (row, column), ax in joint.items():
            pair = (column, row)
            _joint_density(ax, law, dashed, pair, [limits[j] for j in pair])
        for j, (ax, upright) in marginal.items():
            _marginal_density(ax, law.draws[:, j], dashed[:, j], limits[j], upright)
            if upright and size > 2:
                ax.set_title(law.labels[j])
        _label_panels(law, joint, marginal)
        handles = [
            Patch(color=_DENSITY(0.6), label="fitted distribution"),
            Line2D([], [], color=_RUST, lw=1.4, ls=(0, (4, 2.5)), label=text),
            Line2D([], [], color=_INK, marker="o", ls="", ms=4, mec="white",
                   label="conditional means"),
        ]  # fmt: skip
        where = {"loc": "upper right"} if size > 2 else {"loc": "outside upper center"}
        figure.legend(handles=handles, ncols=3 if size == 2 else 1, **where)  # type: ignore
    return figure


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
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(simulated), figsize=(6.8 * len(simulated), 4.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (name, values) in zip(axes.flat, simulated.items(), strict=True):
            _vpc_panel(ax, study, name, values)
        handles = [
            Line2D([], [], color=_RUST, lw=1.6, label="measured: 10, 50, 90 %"),
            Patch(color=_PALE, label="simulated: 95 % intervals"),
            Line2D([], [], color=_INK, marker="o", ls="", ms=3, alpha=0.4, label="measurements"),
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
    name = _outcome(study, outcome)
    table = npde(result, key, replicates=replicates)
    table = table[table["outcome"] == name]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.4), layout="constrained")
        unit = study.units.get(name, "")
        for ax, (x, y, label) in zip(
            axes.flat[[0, 1, 3]],
            [
                ("time", "npde", _label(study, "time")),
                ("pred", "npde", _with_unit("population prediction", unit)),
                ("ipred", "iwres", _with_unit("individual prediction", unit)),
            ],
            strict=True,
        ):
            _residual_panel(ax, table, x, y)
            ax.set(xlabel=label, ylabel=y.upper())
        _quantile_panel(axes[1, 0], table["npde"].to_numpy())
        handles = [Line2D([], [], label=label, **line) for label, line in _RUNNING.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle(f"{name}: {_tested(table['npde'].to_numpy())}", fontsize=11)
    return figure


def convergence(fit: Fit) -> Figure:
    """-2 log-likelihood by iteration; for a flow also that of held-out subjects by update."""
    if not isinstance(fit, Fit):
        raise TypeError(f"expected a Fit; got {type(fit).__name__}. For MCMC see az.plot_trace.")
    panels = 1 if fit.selection is None else 2
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, panels, figsize=(5.2 * panels, 3.4), squeeze=False, layout="constrained"
        )
        ax = axes[0, 0]
        ax.plot(np.arange(len(fit.history)), -2 * fit.history, "-o", ms=3, color=_LEAF, lw=1.5)
        ax.set(xlabel="iteration", ylabel="-2 log-likelihood")
        ax.set_title("converged" if fit.converged else "not converged")
        if fit.selection is not None:
            ax, gain = axes[0, 1], -2 * fit.selection
            ax.axhline(0, color=_INK, lw=1, ls=(0, (4, 3)))
            ax.annotate("Gaussian", (len(gain) - 1, 0), xytext=(0, 4), ha="right",
                        textcoords="offset points")  # fmt: skip
            ax.plot(np.arange(len(gain)), gain, "-o", ms=3, color=_RUST, lw=1.5)
            ax.set(xlabel="0: Gaussian, 1: start of the flow, then updates")
            ax.set(ylabel="change of -2 log-likelihood")
            ax.set_title("subjects held out")
    return figure


def profile(profile: Profile) -> Figure:
    """How -2 log-likelihood rises away from the estimate, and the interval (`flowme.profile`).

    Args:
        profile: what `flowme.profile` found.
    """
    if not isinstance(profile, Profile):
        raise TypeError(f"expected what flowme.profile returns; got {type(profile).__name__}.")
    x, low, high = profile.value, *profile.interval
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
        ax.axhline(profile.limit, color=_INK, lw=1, ls=(0, (4, 3)))
        inside = (x >= low) & (x <= high)
        ax.fill_between(
            x[inside], profile.rise[inside], profile.limit, color=_PALE, alpha=0.5, lw=0
        )
        ax.plot(x, profile.rise, "-o", ms=3.5, color=_LEAF, lw=1.6)
        ax.plot([profile.estimate], [0.0], "o", ms=6, color=_RUST, mec="white", clip_on=False)
        ax.set(xlabel=_with_unit(profile.name, profile.unit), ylabel="rise of -2 log-likelihood")
        ax.set_ylim(bottom=min(0.0, 1.05 * profile.rise.min()), top=1.35 * profile.limit)
        ends = " to ".join(f"{end:.4g}" for end in (low, high))
        ax.set_title(f"{profile.estimate:.4g}, {100 * profile.level:g} % interval {ends}")
    return figure


def density_bands(bootstrap: Bootstrap, level: float = 0.95) -> Figure:
    """The marginal density of each random effect, with its pointwise band over replicates.

    The band says how far the shape can be trusted: a second hump that it does not keep is not one.

    Args:
        bootstrap: what `flowme.bootstrap` found.
        level: share of replicates in the band, at each point.
    """
    if not isinstance(bootstrap, Bootstrap):
        raise TypeError(f"expected what flowme.bootstrap returns; got {type(bootstrap).__name__}.")
    found = bootstrap.densities()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(found), figsize=(3.6 * len(found) + 0.6, 3.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (name, density) in zip(axes.flat, found.items(), strict=True):
            ax.fill_between(density.grid, *density.band(level), color=_PALE, alpha=0.6, lw=0)
            ax.plot(density.grid, density.estimate, color=_LEAF, lw=1.8)
            ax.set(xlabel=f"η, {name}", ylim=(0, None), xlim=density.grid[[0, -1]])
        axes[0, 0].set_ylabel("density")
        count = int(bootstrap.converged.sum())
        handles = [
            Line2D([], [], color=_LEAF, lw=1.8, label="fitted distribution"),
            Patch(color=_PALE, label=f"{100 * level:g} % of {count} resampled studies"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


# The distribution of random effects.


class _Law(NamedTuple):
    names: tuple[str, ...]
    labels: list[str]
    draws: np.ndarray  # [sample, effect]
    points: np.ndarray  # [subject, effect]


def _law(result: Any, individual: bool) -> _Law:
    """Draws from the fitted law and the conditional means, of η or of ψ."""
    if hasattr(result, "posterior"):
        return _law_of_tree(result, individual)
    point = estimate(result)
    eta, psi = population_draws(jax.random.key(0), result, 200_000)
    if not individual:
        names = point.joint.roles.effect_names
        return _Law(names, [f"η, {name}" for name in names], eta, np.asarray(point.eta))
    sites, means = point.joint.roles.individual, point.individual()
    names = tuple(name for site in sites for name in sites[site])
    known = {name: site.unit for name, site in point.joint.roles.population.items()}
    known = {**point.study.units, **known}
    labels = [_with_unit(name, known.get(name, "")) for name in names]
    draws = np.concatenate([psi[site] for site in sites], -1)
    changing = point.joint.roles.changing
    first = [means[site][:, 0] if site in changing else means[site] for site in sites]
    points = np.concatenate([np.asarray(x) for x in first], -1)
    return _varying(_Law(names, labels, draws, points))


def _law_of_tree(tree: Any, individual: bool) -> _Law:
    kind = "parameter" if individual else "effect"
    names, labels, draws, points = [], [], [], []
    for site, variable in tree.population.data_vars.items():
        if not str(variable.dims[-1]).endswith(kind):
            continue
        part = [str(name) for name in variable[variable.dims[-1]].values]
        units = [
            tree.posterior[n].attrs.get("units", "") if n in tree.posterior else "" for n in part
        ]
        names += part
        labels += [
            _with_unit(n, u) if individual else f"η, {n}" for n, u in zip(part, units, strict=True)
        ]
        draws.append(variable.values)
        means = tree.posterior[site].mean(("chain", "draw"))
        first = {dim: 0 for dim in means.dims[1:-1]}  # of times, or occasions
        points.append(means.isel(first).values)
    law = _Law(tuple(names), labels, np.concatenate(draws, -1), np.concatenate(points, -1))
    return _varying(law)


def _varying(law: _Law) -> _Law:
    """Without the parameters that are the same for everybody."""
    varies = np.flatnonzero(law.draws.std(0) > 1e-9 * np.abs(law.draws.mean(0)))
    names, labels = ([x[j] for j in varies] for x in (law.names, law.labels))
    return _Law(tuple(names), labels, law.draws[:, varies], law.points[:, varies])


def _same_moments(result: Any, law: _Law, individual: bool) -> np.ndarray:
    """Draws of the Gaussian with the same moments of η, taken to ψ by the model."""
    if not individual:
        rng = np.random.default_rng(0)
        covariance = np.atleast_2d(np.cov(law.draws, rowvar=False))
        return rng.multivariate_normal(law.draws.mean(0), covariance, len(law.draws))
    if hasattr(result, "posterior"):
        raise ValueError(
            "expected `against`, the fit of a Gaussian: the individual parameters of the Gaussian "
            "with the same moments follow from the model, which an ArviZ object does not hold."
        )
    _, psi = population_draws(jax.random.key(1), result, len(law.draws), gaussian=True)
    sites = estimate(result, conditional=False).joint.roles.individual
    draws = dict(
        zip(
            (name for names in sites.values() for name in names),
            np.concatenate([psi[site] for site in sites], -1).T,
            strict=True,
        )
    )
    return np.stack([draws[name] for name in law.names], -1)


def _panels(size: int):
    """The figure; panels of pairs by (row, column), of single effects with "is upright"."""
    if size == 1:
        figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
        return figure, {}, {0: (ax, True)}
    if size == 2:
        figure = plt.figure(figsize=(6.9, 6.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5))
        center = figure.add_subplot(grid[1, 0])
        above = figure.add_subplot(grid[0, 0], sharex=center)
        beside = figure.add_subplot(grid[1, 1], sharey=center)
        return figure, {(1, 0): center}, {0: (above, True), 1: (beside, False)}
    figure = plt.figure(figsize=(2.3 * size + 0.4, 2.3 * size + 0.4), layout="constrained")
    grid = figure.add_gridspec(size, size)
    pairs = [(i, j) for i, j in itertools.product(range(size), repeat=2) if j < i]
    joint = {pair: figure.add_subplot(grid[pair]) for pair in pairs}
    return figure, joint, {j: (figure.add_subplot(grid[j, j]), True) for j in range(size)}


def _label_panels(law: _Law, joint: dict, marginal: dict) -> None:
    last = len(law.names) - 1
    for (row, column), ax in joint.items():
        ax.set_xlabel(law.labels[column] if row == last else "")
        ax.set_ylabel(law.labels[row] if column == 0 else "")
        ax.tick_params(labelbottom=row == last, labelleft=column == 0)
    for j, (ax, upright) in marginal.items():
        density, value = (ax.yaxis, ax.xaxis) if upright else (ax.xaxis, ax.yaxis)
        density.set_visible(False)
        ax.spines["left" if upright else "bottom"].set_visible(False)
        if last < 2 and joint:
            value.set_tick_params(labelbottom=False, labelleft=False)
        elif j == last:
            ax.set_xlabel(law.labels[j])
        else:
            ax.tick_params(labelbottom=False)


_BINS = 160


def _limits(*samples: np.ndarray) -> tuple[float, float]:
    """Where to look: 99.6 % of each sample of draws, and all points."""
    *draws, points = samples
    ends = [np.quantile(x, [0.002, 0.998]) for x in draws] + [(points.min(), points.max())]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _bandwidth(x: np.ndarray, limits: tuple[float, float]) -> float:
    """In bins: three quarters of Scott's rule, which is for a single mode."""
    spread = min(x.std(), np.subtract(*np.quantile(x, [0.75, 0.25])) / 1.34)
    return max(1.5, 0.75 * spread * len(x) ** (-1 / 6) / (limits[1] - limits[0]) * _BINS)


def _grid_density(x, y, limits):
    """A smoothed histogram, `[y, x]`, on the middles of its bins."""
    counts, *edges = np.histogram2d(y, x, bins=_BINS, range=limits[::-1])
    smooth = gaussian_filter(counts, [_bandwidth(y, limits[1]), _bandwidth(x, limits[0])])
    return smooth, *(0.5 * (e[1:] + e[:-1]) for e in edges[::-1])


def _levels(density: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """The densities whose superlevel sets hold these shares of the mass, increasing."""
    ordered = np.sort(density.ravel())[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return [float(ordered[np.searchsorted(mass, share)]) for share in shares]


def _joint_density(ax: Axes, law: _Law, dashed, pair, limits) -> None:
    column, row = pair
    density, x, y = _grid_density(law.draws[:, column], law.draws[:, row], limits)
    levels = _levels(density, (0.97, 0.9, 0.75, 0.5, 0.25, 0.1))
    colors = _DENSITY(np.linspace(0, 1, len(levels)))
    ax.contourf(x, y, density, levels=[*levels, density.max() * 1.001], colors=colors)
    gaussian, x, y = _grid_density(dashed[:, column], dashed[:, row], limits)
    levels = _levels(gaussian, (0.9, 0.5))
    ax.contour(x, y, gaussian, levels=levels, colors=_RUST, linewidths=1.4,
               linestyles=[(0, (4, 2.5))])  # fmt: skip
    size = 16 if len(law.points) < 60 else 9
    ax.scatter(law.points[:, column], law.points[:, row], s=size, color=_INK, lw=0.4,
               edgecolor="white", alpha=0.85, zorder=3)  # fmt: skip
    ax.set(xlim=limits[0], ylim=limits[1])


def _marginal_density(ax: Axes, draws, dashed, limits, upright: bool) -> None:
    curves = []
    for x in (draws, dashed):
        counts, edges = np.histogram(x, bins=_BINS, range=limits)
        curve = gaussian_filter1d(counts.astype(float), _bandwidth(x, limits))
        curves.append(curve / (len(x) * (edges[1] - edges[0])))
    middle = 0.5 * (edges[1:] + edges[:-1])
    if upright:
        ax.fill_between(middle, curves[0], color=_DENSITY(0.45), lw=0)
        ax.plot(middle, curves[1], color=_RUST, lw=1.4, ls=(0, (4, 2.5)))
        ax.set(xlim=limits, ylim=(0, None))
    else:
        ax.fill_betweenx(middle, curves[0], color=_DENSITY(0.45), lw=0)
        ax.plot(curves[1], middle, color=_RUST, lw=1.4, ls=(0, (4, 2.5)))
        ax.set(ylim=limits, xlim=(0, None))


# The visual predictive check.


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
    ax.plot(time, measured, "o", ms=2.5, color=_INK, alpha=0.25, mew=0, zorder=1)
    for k in range(3):
        color = _LEAF if k == 1 else _PALE
        ax.fill_between(middle, low[:, k], high[:, k], color=color, alpha=0.55, lw=0)
        ax.plot(middle, lines[:, k], color=_RUST, lw=1.6, ls="-" if k == 1 else (0, (5, 2)))
    ax.plot(edges, np.ones(len(edges)), "|", color=_INK, ms=8, clip_on=False,
            transform=ax.get_xaxis_transform())  # fmt: skip
    for limit in np.array(limits)[np.isfinite(limits)]:
        ax.axhline(limit, color=_INK, lw=1, ls=":")
    kind = "one for each time" if common else "of equally many observations"
    ax.set_title(f"{len(middle)} time bins, {kind}", fontsize=9, loc="left", pad=9)
    ax.set(xlabel=_label(study, "time"), ylabel=_label(study, name))


# Residuals.

_RUNNING: dict[str, dict[str, Any]] = {
    "running mean (0)": {"color": _RUST, "lw": 1.6, "ls": "-"},
    "running mean of the size (.80)": {"color": _RUST, "lw": 1.6, "ls": (0, (5, 2))},
}


def _residual_panel(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    known = table[np.isfinite(table[y])]
    for code, marker in {0: "o", 1: "v", -1: "^"}.items():
        some = known[known["censored"] == code]
        if len(some):
            ax.plot(some[x], some[y], marker, ms=3 if code == 0 else 4, color=_INK, alpha=0.35,
                    mew=0)  # fmt: skip
    for level in (-1.96, 0.0, 1.96):
        ax.axhline(level, color=_LEAF, lw=1, ls="-" if level == 0 else ":")
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
    ax.fill_between(expected, *band, color=_PALE, alpha=0.55, lw=0)
    ax.plot(expected, expected, color=_LEAF, lw=1)
    ax.plot(expected, values, "o", ms=2.5, color=_INK, alpha=0.5, mew=0)
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


def _outcome(study: Study, outcome: str | None) -> str:
    if outcome is not None and outcome not in study.outcomes:
        raise ValueError(f"expected an outcome among {list(study.outcomes)}; got {outcome!r}.")
    return study.outcomes[0] if outcome is None else outcome


def _label(study: Study, name: str) -> str:
    return _with_unit(name, study.units.get(name, ""))


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name
