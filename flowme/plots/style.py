"""What the pictures have in common: colours, and labels with units."""

from matplotlib.colors import LinearSegmentedColormap

from flowme.study import Study

INK, LEAF, PALE, RUST = "#22313a", "#1b7f6b", "#8fcdb9", "#c8553d"
DENSITY = LinearSegmentedColormap.from_list(
    "leaf", ["#eef7f2", "#c3e5d6", "#84c8b0", "#3f9f88", "#17705f", "#0c4a44"]
)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def outcome_of(study: Study, outcome: str | None) -> str:
    """The outcome that is asked for, the first one by default."""
    if outcome is not None and outcome not in study.outcomes:
        raise ValueError(f"expected an outcome among {list(study.outcomes)}; got {outcome!r}.")
    return study.outcomes[0] if outcome is None else outcome


def label(study: Study, name: str) -> str:
    """The name of what was measured, with its unit."""
    return with_unit(name, study.units.get(name, ""))


def with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name
