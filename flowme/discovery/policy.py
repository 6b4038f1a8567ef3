"""A policy over networks: message passing on the bipartite graph of species and reactions.

Every reaction has the same weights, and so has every species: the policy is equivariant to
renaming of both, and one set of weights serves any number of them.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .environment import Environment, State
from .reaction import LAWS


class Graph(NamedTuple):
    """The candidate reactions of a task as a bipartite graph.

    Attributes:
        consumed: molecules consumed, [L, S].
        produced: molecules produced, [L, S].
        reactions: what kind each reaction is, [L, kind].
        species: what is known of each species, [S, kind].
        is_reaction: bool [L]; False rows are padding.
        is_species: bool [S].
    """

    consumed: Array
    produced: Array
    reactions: Array
    species: Array
    is_reaction: Array
    is_species: Array


class Output(NamedTuple):
    """What the policy says of states [...].

    Attributes:
        logits: of adding each reaction, of stopping, and of opening a hidden species, [..., L + 2].
        value: of the share of structures that this one will outdo, logit, [...].
    """

    logits: Array
    value: Array


def graph_of(env: Environment) -> Graph:
    """The graph of an environment's library."""
    library = env.library
    y, z, net = library.consumed, library.produced, library.net
    kinds = [
        y.sum(1) / 2,
        z.sum(1) / 2,
        y.sum(1) == 0,
        z.sum(1) == 0,
        ((y > 0) & (net == 0)).any(1),  # catalytic
        ((y > 0) & (net > 0)).any(1),  # autocatalytic
        net.sum(1) / 2,
        env.level > 0,
        *(np.array([r.law == law for r in library.reactions]) for law in LAWS),
    ]
    hidden = np.array([s in env.hidden for s in library.species])
    return Graph(
        consumed=jnp.asarray(y, float),
        produced=jnp.asarray(z, float),
        reactions=jnp.stack([jnp.asarray(kind, float) for kind in kinds], 1),
        species=jnp.stack([env.present, hidden], 1).astype(float),
        is_reaction=jnp.ones(len(library), bool),
        is_species=jnp.ones(len(library.species), bool),
    )


def padded(graph: Graph, reactions: int, species: int) -> Graph:
    """The same graph with so many rows, so that tasks of several sizes share one program."""
    more, others = (n - m for n, m in zip((reactions, species), graph.consumed.shape, strict=True))
    return Graph(
        jnp.pad(graph.consumed, ((0, more), (0, others))),
        jnp.pad(graph.produced, ((0, more), (0, others))),
        jnp.pad(graph.reactions, ((0, more), (0, 0))),
        jnp.pad(graph.species, ((0, others), (0, 0))),
        jnp.pad(graph.is_reaction, (0, more)),
        jnp.pad(graph.is_species, (0, others)),
    )


class GraphPolicy(nn.Module):
    """Logits and value of a partial network.

    The library is encoded once for a task: h_r of reactions and h_s of species exchange messages
    `rounds` times along the stoichiometry,

        h_s ← h_s + f(h_s, mean_r y_rs h_r, mean_r y'_rs h_r),
        h_r ← h_r + f(h_r, Σ_s y_rs h_s, Σ_s y'_rs h_s).

    Each state then adds one round that only the reactions chosen take part in, and the features of
    the data: so a state costs little, also with hundreds of candidates.

    Attributes:
        width: numbers in h.
        rounds: of message passing on the library.
    """

    width: int = 32
    rounds: int = 2

    def setup(self) -> None:
        self.of_reaction, self.of_species = nn.Dense(self.width), nn.Dense(self.width)
        self.to_species = [_Update(self.width) for _ in range(self.rounds)]
        self.to_reactions = [_Update(self.width) for _ in range(self.rounds)]
        self.chosen_to_species, self.summary = _Update(self.width), _Update(self.width)
        self.own, self.near = nn.Dense(self.width), nn.Dense(self.width, use_bias=False)
        self.far, self.about = (nn.Dense(self.width, use_bias=False) for _ in range(2))
        # The last layers are zero: the policy starts uniform over what is legal.
        zero = nn.initializers.zeros
        self.logit = nn.Dense(1, kernel_init=zero)
        self.others = nn.Dense(3, kernel_init=zero)

    def encode(self, graph: Graph) -> tuple[Array, Array]:
        """h_r [L, width] and h_s [S, width]."""
        size = jnp.maximum(graph.is_reaction.sum(), 1)
        h, s = self.of_reaction(graph.reactions), self.of_species(graph.species)
        for to_species, to_reactions in zip(self.to_species, self.to_reactions, strict=True):
            real = h * graph.is_reaction[:, None]
            s = to_species(s, graph.consumed.T @ real / size, graph.produced.T @ real / size)
            s = s * graph.is_species[:, None]
            h = to_reactions(h, graph.consumed @ s, graph.produced @ s)
        return h, s

    def decode(
        self, encoded: tuple[Array, Array], graph: Graph, state: State, features: Array
    ) -> Output:
        """The policy at states [...], given the encoded library.

        Args:
            encoded: what `encode` returned.
            graph: the library.
            state: of the environment.
            features: what the data say of each candidate reaction, [..., L, feature].
        """
        h, s = encoded
        chosen = state.chosen.astype(h.dtype)
        # Σ over the chosen reactions, a matrix product: [..., L] with [L, S width].
        taken, made = (
            (chosen @ (y[:, :, None] * h[:, None]).reshape(len(h), -1)).reshape(
                *chosen.shape[:-1], *s.shape
            )
            for y in (graph.consumed, graph.produced)
        )
        species = jnp.broadcast_to(s, (*chosen.shape[:-1], *s.shape))
        species = self.chosen_to_species(species, taken, made) * graph.is_species[:, None]
        counts = jnp.stack([chosen.sum(-1), state.hidden, state.steps], -1).astype(h.dtype) / 8
        mean = species.sum(-2) / jnp.maximum(graph.is_species.sum(), 1)
        g = self.summary(mean, chosen @ h, counts)
        features = jnp.broadcast_to(features, (*chosen.shape, features.shape[-1]))
        known = jnp.concatenate([features.astype(h.dtype), chosen[..., None]], -1)
        messages = graph.consumed @ self.near(species) + graph.produced @ self.far(species)
        mixed = jax.nn.gelu(self.own(h) + self.about(known) + messages + g[..., None, :])
        logits = self.logit(mixed)[..., 0]
        stop, opened, value = jnp.moveaxis(self.others(g), -1, 0)
        return Output(jnp.concatenate([logits, stop[..., None], opened[..., None]], -1), value)

    def __call__(self, graph: Graph, state: State, features: Array) -> Output:
        return self.decode(self.encode(graph), graph, state, features)


class _Update(nn.Module):
    """h + f(h, messages), f having one hidden layer."""

    width: int

    @nn.compact
    def __call__(self, h: Array, *messages: Array) -> Array:
        inside = jax.nn.gelu(nn.Dense(self.width)(jnp.concatenate([h, *messages], -1)))
        return h + nn.Dense(self.width)(inside)
