"""Pictures of the fitted distribution of random effects."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from flowme.infer.resampled import Bootstrap
from flowme.plots.style import DENSITY, INK, LEAF, PALE, RUST, STYLE, with_unit
from flowme.predict import estimate, population_draws

_BINS = 160


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
    with plt.rc_context(STYLE):
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
            Patch(color=DENSITY(0.6), label="fitted distribution"),
            Line2D([], [], color=RUST, lw=1.4, ls=(0, (4, 2.5)), label=text),
            Line2D([], [], color=INK, marker="o", ls="", ms=4, mec="white",
                   label="conditional means"),
        ]  # fmt: skip
        where = {"loc": "upper right"} if size > 2 else {"loc": "outside upper center"}
        figure.legend(handles=handles, ncols=3 if size == 2 else 1, **where)  # type: ignore
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
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(found), figsize=(3.6 * len(found) + 0.6, 3.4), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (name, density) in zip(axes.flat, found.items(), strict=True):
            ax.fill_between(density.grid, *density.band(level), color=PALE, alpha=0.6, lw=0)
            ax.plot(density.grid, density.estimate, color=LEAF, lw=1.8)
            ax.set(xlabel=f"η, {name}", ylim=(0, None), xlim=density.grid[[0, -1]])
        axes[0, 0].set_ylabel("density")
        count = int(bootstrap.converged.sum())
        handles = [
            Line2D([], [], color=LEAF, lw=1.8, label="fitted distribution"),
            Patch(color=PALE, label=f"{100 * level:g} % of {count} resampled studies"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


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
    labels = [with_unit(name, known.get(name, "")) for name in names]
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
            with_unit(n, u) if individual else f"η, {n}" for n, u in zip(part, units, strict=True)
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
    colors = DENSITY(np.linspace(0, 1, len(levels)))
    ax.contourf(x, y, density, levels=[*levels, density.max() * 1.001], colors=colors)
    gaussian, x, y = _grid_density(dashed[:, column], dashed[:, row], limits)
    levels = _levels(gaussian, (0.9, 0.5))
    ax.contour(x, y, gaussian, levels=levels, colors=RUST, linewidths=1.4,
               linestyles=[(0, (4, 2.5))])  # fmt: skip
    size = 16 if len(law.points) < 60 else 9
    ax.scatter(law.points[:, column], law.points[:, row], s=size, color=INK, lw=0.4,
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
        ax.fill_between(middle, curves[0], color=DENSITY(0.45), lw=0)
        ax.plot(middle, curves[1], color=RUST, lw=1.4, ls=(0, (4, 2.5)))
        ax.set(xlim=limits, ylim=(0, None))
    else:
        ax.fill_betweenx(middle, curves[0], color=DENSITY(0.45), lw=0)
        ax.plot(curves[1], middle, color=RUST, lw=1.4, ls=(0, (4, 2.5)))
        ax.set(ylim=limits, xlim=(0, None))
