"""Pictures of a fit: its curves, its convergence, profiles of its likelihood."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowme.infer.fit import Fit
from flowme.infer.profile import Profile
from flowme.plots.style import INK, LEAF, PALE, RUST, STYLE, label, outcome_of, with_unit
from flowme.predict import Result, estimate, predict


def individual_fits(result: Result, subjects: int = 12, outcome: str | None = None) -> Figure:
    """What was measured in each subject, with its individual and the population prediction.

    Censored observations are triangles at their bound that point to where the value lies.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        subjects: how many panels, one per subject, in the order of the study.
        outcome: which outcome; the first one by default.
    """
    study = estimate(result, conditional=False).study
    name = outcome_of(study, outcome)
    chosen = study.subset(range(min(subjects, study.subjects.size)))
    # All records count, so that a curve begins at the dose.
    start, stop = study.time[study.recorded].min(), study.time[study.recorded].max()
    dense = chosen.at(np.linspace(start, stop, 150))
    own, typical = predict(result, dense)[name], predict(result, dense, population=True)[name]
    columns = min(4, chosen.subjects.size)
    rows = -(-chosen.subjects.size // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.6 * columns + 0.4, 1.9 * rows + 0.9), squeeze=False,
            sharex=True, sharey=True, layout="constrained",
        )  # fmt: skip
        for i, ax in enumerate(axes.flat):
            if i >= chosen.subjects.size:
                ax.set_axis_off()
                continue
            seen = chosen.observed[name][i]
            ax.plot(dense.time[i], typical[i], color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7)
            ax.plot(dense.time[i], own[i], color=LEAF, lw=1.8)
            side = chosen.censored.get(name, np.zeros(chosen.time.shape, int))[i]
            for code, marker in ((0, "o"), (1, "v"), (-1, "^")):
                shown = seen & (side == code)
                if code == 0 or shown.any():
                    ax.plot(chosen.time[i, shown], chosen.values[name][i, shown], marker, ms=4,
                            color=RUST, mec="white", mew=0.5)  # fmt: skip
            ax.set_title(str(chosen.ids[i]))
        figure.supxlabel(label(study, "time"), fontsize=11)
        figure.supylabel(label(study, name), fontsize=11)
        handles = [
            Line2D([], [], color=RUST, marker="o", ls="", mec="white", label="measured"),
            Line2D([], [], color=LEAF, lw=1.8, label="individual prediction"),
            Line2D([], [], color=INK, lw=1, ls=(0, (4, 3)), label="population prediction"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def convergence(fit: Fit) -> Figure:
    """-2 log-likelihood by iteration; for a flow also that of held-out subjects by update."""
    if not isinstance(fit, Fit):
        raise TypeError(f"expected a Fit; got {type(fit).__name__}. For MCMC see az.plot_trace.")
    panels = 1 if fit.selection is None else 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, panels, figsize=(5.2 * panels, 3.4), squeeze=False, layout="constrained"
        )
        ax = axes[0, 0]
        ax.plot(np.arange(len(fit.history)), -2 * fit.history, "-o", ms=3, color=LEAF, lw=1.5)
        ax.set(xlabel="iteration", ylabel="-2 log-likelihood")
        ax.set_title("converged" if fit.converged else "not converged")
        if fit.selection is not None:
            ax, gain = axes[0, 1], -2 * fit.selection
            ax.axhline(0, color=INK, lw=1, ls=(0, (4, 3)))
            ax.annotate("Gaussian", (len(gain) - 1, 0), xytext=(0, 4), ha="right",
                        textcoords="offset points")  # fmt: skip
            ax.plot(np.arange(len(gain)), gain, "-o", ms=3, color=RUST, lw=1.5)
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
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
        ax.axhline(profile.limit, color=INK, lw=1, ls=(0, (4, 3)))
        inside = (x >= low) & (x <= high)
        ax.fill_between(x[inside], profile.rise[inside], profile.limit, color=PALE, alpha=0.5, lw=0)
        ax.plot(x, profile.rise, "-o", ms=3.5, color=LEAF, lw=1.6)
        ax.plot([profile.estimate], [0.0], "o", ms=6, color=RUST, mec="white", clip_on=False)
        ax.set(xlabel=with_unit(profile.name, profile.unit), ylabel="rise of -2 log-likelihood")
        ax.set_ylim(bottom=min(0.0, 1.05 * profile.rise.min()), top=1.35 * profile.limit)
        ends = " to ".join(f"{end:.4g}" for end in (low, high))
        ax.set_title(f"{profile.estimate:.4g}, {100 * profile.level:g} % interval {ends}")
    return figure
