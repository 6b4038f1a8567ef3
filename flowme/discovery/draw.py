"""The picture of a reaction network: its bipartite graph of species and reactions."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .network import ReactionNetwork
from .reaction import Reaction

_INK, _LEAF, _PALE, _RUST = "#22313a", "#1b7f6b", "#e3f2ec", "#c8553d"
_INCH = 0.85  # between neighbours


def bipartite_graph(network: ReactionNetwork) -> nx.DiGraph:
    """Species ("species", name) and reactions ("reaction", r) with an edge for what a reaction
    consumes and one for what it produces; `molecules` is their count, and `catalyst` says that
    the reaction gives back what it takes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(("species", s) for s in network.species)
    for i, reaction in enumerate(network.reactions):
        node = ("reaction", i)
        graph.add_node(node)
        for s, n in reaction.reactants:
            graph.add_edge(("species", s), node, molecules=n, catalyst=_kept(reaction, s))
        for s, n in reaction.products:
            graph.add_edge(node, ("species", s), molecules=n, catalyst=_kept(reaction, s))
    return graph


def draw(network: ReactionNetwork, ax: Axes | None = None) -> Figure:
    """Draws a network: species as circles, reactions as squares with their rates.

    An arrow into a square is what the reaction consumes, one out of it what it produces, with the
    number of molecules if not 1. A dashed line is a catalyst, which the reaction needs and keeps.

    Args:
        network: what to draw.
        ax: where; a new figure if None.

    Returns:
        The figure, to be saved or shown.
    """
    if not network.species:
        raise ValueError("expected a network with species to draw; got one without")
    graph = bipartite_graph(network)
    place = _layout(graph)
    extent = np.ptp(np.array(list(place.values())), axis=0) + 2.0
    if ax is None:
        _, ax = plt.subplots(figsize=tuple(_INCH * extent + 0.3), layout="constrained")
    for a, b, edge in graph.edges(data=True):
        _edge(ax, graph, place, a, b, edge)
    for (kind, name), (x, y) in place.items():
        if kind == "species":
            _node(ax, x, y, name, "o", _PALE, _LEAF)
        else:
            _node(ax, x, y, network.names[name], "s", "white", _INK)
            first, *rest = network.written_rate(name).split(", ")
            ax.text(
                x, y - 0.32, "\n".join([first.split(" = ")[1], *rest]), ha="center", va="top",
                size=8, color=_INK, zorder=4,
                bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.85},
            )  # fmt: skip
    (left, low), (right, high) = (f(list(place.values()), axis=0) for f in (np.min, np.max))
    ax.set(xlim=(left - 0.9, right + 0.9), ylim=(low - 0.8, high + 0.8), aspect="equal")
    ax.set_axis_off()
    return ax.figure  # type: ignore[return-value]


def _kept(reaction: Reaction, species: str) -> bool:
    """Whether a species takes part in a reaction that does not change it."""
    return species not in reaction.net


def _layout(graph: nx.DiGraph) -> dict[Any, np.ndarray]:
    """Positions, with neighbours about 1.6 apart (Kamada and Kawai), parts side by side."""
    place: dict[Any, np.ndarray] = {}
    right = 0.0
    parts = sorted(map(sorted, nx.weakly_connected_components(graph)), key=len, reverse=True)
    for nodes in parts:
        part = graph.subgraph(nodes).to_undirected()
        xy = nx.kamada_kawai_layout(nx.Graph(part), scale=1.0)
        points = np.array([xy[n] for n in nodes])
        near = [np.linalg.norm(xy[a] - xy[b]) for a, b in part.edges]
        points *= 1.9 / np.mean(near) if near else 1.0
        # Wide rather than high.
        _, axes = np.linalg.eigh(np.cov(points.T) if len(nodes) > 1 else np.eye(2))
        points = (points - points.mean(0)) @ axes[:, ::-1]
        points[:, 0] += right - points[:, 0].min()
        right = float(points[:, 0].max()) + 1.9
        place.update(zip(nodes, points, strict=True))
    return place


def _edge(ax: Axes, graph: nx.DiGraph, place: dict, a: Any, b: Any, edge: dict) -> None:
    back = graph.has_edge(b, a)
    if edge["catalyst"] and a[0] == "reaction":
        return  # drawn once, towards the reaction
    bend = 0.25 if back and not edge["catalyst"] else 0.0
    start, end = place[a], place[b]
    ax.annotate(
        "", end, start,
        arrowprops={
            "arrowstyle": "-" if edge["catalyst"] else "-|>",
            "linestyle": (0, (3, 2)) if edge["catalyst"] else "-",
            "connectionstyle": f"arc3,rad={bend}",
            "color": _RUST if a[0] == "species" and not edge["catalyst"] else _LEAF,
            "shrinkA": 15, "shrinkB": 15, "lw": 1.4, "mutation_scale": 13,
        },
        zorder=1,
    )  # fmt: skip
    if edge["molecules"] > 1:
        dx, dy = end - start
        middle = (start + end) / 2 + np.array([dy, -dx]) * (bend / 2 + 0.09)
        ax.text(
            middle[0],
            middle[1],
            str(edge["molecules"]),
            ha="center",
            va="center",
            color=_INK,
            size=10,
        )


def _node(ax: Axes, x: float, y: float, text: str, marker: str, fill: str, edge: str) -> None:
    ax.plot(x, y, marker, ms=25, mfc=fill, mec=edge, mew=1.5, zorder=3)
    size = 11 if len(text) < 4 else 33 / len(text)
    ax.text(x, y, text, ha="center", va="center_baseline", color=_INK, size=size, zorder=4)
