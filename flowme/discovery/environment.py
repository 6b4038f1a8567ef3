"""Building a network reaction by reaction: a Markov decision process as pure functions.

A state is a partial bipartite graph, the reactions chosen from a library, with the hidden species
opened and the steps left. Every function takes states with any leading axes, and passes `jit` and
`vmap`. There is no reward here: a structure has one when its episode ends, and it takes a fit.

An action is a pair of numbers (drop, add):

====================  ==========================================================
(L, r)                add reaction r of the library
(d, L)                drop reaction d
(d, r)                swap d for r
(L, L + 1)            open the next hidden species, whose reactions may then be added
(L, L)                stop
====================  ==========================================================

`mask_drop` says which `drop` are legal, `mask_add` which `add` are with it. An action that is not
legal changes nothing, and takes a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .cone import shortest
from .conservation import check_known, conserving
from .door import check_whole
from .library import Library
from .reaction import Reaction


class State(NamedTuple):
    """A partial network.

    Attributes:
        chosen: its reactions, bool [..., L].
        hidden: hidden species opened, integers [...].
        steps: steps left, integers [...].
        done: whether the episode has ended, bool [...].
    """

    chosen: Array
    hidden: Array
    steps: Array
    done: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["allowed", "required", "parallel", "needs", "makes", "level", "present"],
    meta_fields=["library", "hidden", "max_reactions", "max_steps"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """What may be built; `environment` makes it.

    Attributes:
        library: the L candidate reactions between S species, observed and hidden.
        hidden: names of the hidden species, in the order of their opening.
        max_reactions: most reactions of a network.
        max_steps: steps of an episode.
        allowed: reactions that may ever be added, bool [L].
        required: reactions that are always there, bool [L].
        parallel: pairs of reactions with the same source and the same direction, which are one
            ODE, such as 0 -> T and 0 -> 2T, bool [L, L]; the diagonal too.
        needs: species consumed, bool [L, S].
        makes: species produced, bool [L, S].
        level: hidden species that must be open for a reaction, integers [L].
        present: species there from the beginning, bool [S].
    """

    library: Library
    hidden: tuple[str, ...]
    max_reactions: int
    max_steps: int
    allowed: Array
    required: Array
    parallel: Array
    needs: Array
    makes: Array
    level: Array
    present: Array


def environment(
    library: Library,
    *,
    hidden: Sequence[str] = (),
    present: Sequence[str] | None = None,
    conserved: Iterable[Mapping[str, float]] = (),
    whitelist: Iterable[Reaction | str] | None = None,
    blacklist: Iterable[Reaction | str] = (),
    required: Iterable[Reaction | str] = (),
    max_reactions: int = 8,
    max_steps: int = 24,
) -> Environment:
    """The process that builds networks from a library.

    Args:
        library: candidate reactions, those of hidden species among them.
        hidden: species of the library that may be opened, in this order.
        present: species there from the beginning; all if None. Another one is reachable only if
            reactions chosen make it from these, and so are the reactions that need it.
        conserved: laws that hold, as weights c of Σ_s c_s x_s: {"E": 1, "C": 1}.
        whitelist: the only reactions allowed; all if None.
        blacklist: reactions not allowed.
        required: reactions that are always there, known beforehand.
        max_reactions: most reactions of a network.
        max_steps: steps of an episode.

    Raises:
        ValueError: an unknown species or reaction, laws that no reaction obeys, required
            reactions that are forbidden, parallel or cannot take place, or nothing left to choose.
    """
    check_whole("max_reactions", max_reactions, 1)
    check_whole("max_steps", max_steps, 1)
    for what, given in (("hidden", hidden), ("present", present or ())):
        check_known(given, library, f"{what} species")
    if len(set(hidden)) != len(hidden):
        raise ValueError(f"expected each hidden species once; got {list(hidden)}")
    opened = {s: i + 1 for i, s in enumerate(hidden)}
    allowed = library.net.any(axis=1) & conserving(library, conserved)
    if whitelist is not None:
        allowed &= _among(library, whitelist, "whitelist")
    allowed &= ~_among(library, blacklist, "blacklist")
    always = _among(library, required, "required")
    masks = {"allowed": allowed, "required": always, "parallel": _parallel(library)}
    _check_required(library, **masks, most=max_reactions)
    level = [max((opened.get(s, 0) for s in r.species), default=0) for r in library.reactions]
    env = Environment(
        library=library,
        hidden=tuple(hidden),
        max_reactions=max_reactions,
        max_steps=max_steps,
        **{k: jnp.asarray(v) for k, v in masks.items()},
        needs=jnp.asarray(library.consumed > 0),
        makes=jnp.asarray(library.produced > 0),
        level=jnp.asarray(level, jnp.int32),
        present=jnp.asarray([present is None or s in present for s in library.species]),
    )
    _check_something_left(env)
    return env


def reset(env: Environment, batch: tuple[int, ...] = ()) -> State:
    """The first state, with `batch` as leading axes: the required reactions alone."""
    size = len(env.library)
    return State(
        chosen=jnp.broadcast_to(env.required, (*batch, size)),
        hidden=jnp.full(batch, jnp.max(jnp.where(env.required, env.level, 0)), jnp.int32),
        steps=jnp.full(batch, env.max_steps, jnp.int32),
        done=jnp.zeros(batch, bool),
    )


def step(env: Environment, state: State, action: Any) -> State:
    """The state after an action (drop, add), integers [..., 2]. Once done, nothing changes."""
    drop, add = jnp.asarray(action)[..., 0], jnp.asarray(action)[..., 1]
    legal = _at(mask_drop(env, state), drop) & _at(mask_add(env, state, drop), add)
    return act(env, state, action, legal)


def act(env: Environment, state: State, action: Any, legal: Any = True) -> State:
    """`step` for actions whose legality, bool [...], is known."""
    nothing = len(env.library)
    drop, add = jnp.asarray(action)[..., 0], jnp.asarray(action)[..., 1]
    acts = legal & ~state.done
    rows = jnp.arange(nothing)
    changed = (state.chosen & (rows != drop[..., None])) | (rows == add[..., None])
    opens = acts & (add == nothing + 1)
    stops = acts & (drop == nothing) & (add == nothing)
    steps = state.steps - ~state.done
    return State(
        chosen=jnp.where(acts[..., None], changed, state.chosen),
        hidden=state.hidden + opens,
        steps=steps,
        done=state.done | stops | (steps <= 0),
    )


def mask_drop(env: Environment, state: State) -> Array:
    """Which `drop` are legal, bool [..., L + 1], the last being none.

    A reaction may go if it is not required and the others can still take place without it.
    """
    most = min(env.max_reactions, len(env.library))
    _, rows = jax.lax.top_k(state.chosen.astype(jnp.float32), most)  # the chosen ones are first
    rest = state.chosen[..., None, :] & ~jax.nn.one_hot(rows, len(env.library), dtype=bool)
    stuck = rest & ~can_occur(env, rest)
    may = jnp.zeros(state.chosen.shape, bool)
    may = jnp.put_along_axis(may, rows, ~stuck.any(-1), axis=-1, inplace=False)
    may &= state.chosen & ~env.required
    return jnp.concatenate([may, jnp.ones((*may.shape[:-1], 1), bool)], -1)


def mask_add(env: Environment, state: State, drop: Any = None) -> Array:
    """Which `add` are legal with a `drop` [...] (none if None), bool [..., L + 2]: the reactions,
    none, and the next hidden species.

    Not legal are a reaction that is chosen already, or parallel to one chosen or dropped (the ODE
    would be the same), or needs a species that is not reachable or hidden and not open, or is
    forbidden, or one too many; none without a drop, that is, to stop, before there is a reaction.
    """
    nothing = len(env.library)
    drop = jnp.full(state.hidden.shape, nothing) if drop is None else jnp.asarray(drop)
    dropped = jnp.arange(nothing) == drop[..., None]
    rest = state.chosen & ~dropped
    duplicate = _any_of(rest | dropped, env.parallel)
    room = rest.sum(-1, keepdims=True) < env.max_reactions
    opened = env.level <= state.hidden[..., None]
    add = env.allowed & opened & room & ~duplicate & can_occur(env, rest)
    none = (drop < nothing) | state.chosen.any(-1)
    more = (drop == nothing) & (state.hidden < len(env.hidden))
    return jnp.concatenate([add, none[..., None], more[..., None]], -1)


def can_occur(env: Environment, chosen: Array) -> Array:
    """Reactions of the library whose reactants are present, or made by the chosen ones from what
    is; bool [..., L]."""
    there = jnp.broadcast_to(env.present, (*chosen.shape[:-1], len(env.library.species)))
    for _ in env.library.species:  # the longest chain makes one species a time
        fires = chosen & ~_any_of(~there, env.needs.T)
        there = there | _any_of(fires, env.makes)
    return ~_any_of(~there, env.needs.T)


def _any_of(which: Array, relation: Array) -> Array:
    """∃ i: which_i and relation_ij, [..., j]."""
    return which.astype(jnp.float32) @ relation.astype(jnp.float32) > 0


def _at(mask: Array, index: Array) -> Array:
    inside = (index >= 0) & (index < mask.shape[-1])
    found = jnp.take_along_axis(mask, jnp.where(inside, index, 0)[..., None], axis=-1)[..., 0]
    return inside & found


def _parallel(library: Library) -> np.ndarray:
    """Same source and same direction, [L, L]. Constants of its own tell a saturating law apart."""
    own = [r if r.law != "mass action" else None for r in library.reactions]
    directions = map(shortest, library.net.tolist())
    sources = (r.source for r in library.reactions)
    keys = list(zip(sources, directions, own, strict=True))
    numbers = np.array([keys.index(key) for key in keys])
    return numbers[:, None] == numbers[None]


def _among(library: Library, reactions: Iterable[Reaction | str], what: str) -> np.ndarray:
    """Rows of these reactions, bool [L]."""
    if isinstance(reactions, str | Reaction):
        raise ValueError(f"expected {what} as a list of reactions; got {reactions!r}")
    rows = np.zeros(len(library), bool)
    rows[[library.index(r) for r in reactions]] = True
    return rows


def _check_something_left(env: Environment) -> None:
    occurs = np.asarray(jax.jit(can_occur)(env, env.required))
    stuck = np.flatnonzero(np.asarray(env.required) & ~occurs)
    if len(stuck):
        there = [s for s, p in zip(env.library.species, env.present, strict=True) if p]
        raise ValueError(
            "expected required reactions that can take place, from the species present "
            f"({', '.join(there)}) or what the required reactions make of them; got "
            f"{env.library.reactions[stuck[0]]}"
        )
    first = reset(env)._replace(hidden=jnp.asarray(len(env.hidden)))
    if not jax.jit(mask_add)(env, first)[: len(env.library)].any():  # all in one program
        raise ValueError(
            "expected some reaction that may be added; got none that the conservation laws, the "
            "whitelist, the blacklist, the required reactions and the species present leave"
        )


def _check_required(
    library: Library, allowed: np.ndarray, required: np.ndarray, parallel: np.ndarray, most: int
) -> None:
    forbidden = np.flatnonzero(required & ~allowed)
    if len(forbidden):
        raise ValueError(
            f"expected required reactions that are allowed; got {library.reactions[forbidden[0]]}, "
            "which a conservation law, the whitelist or the blacklist forbids"
        )
    pairs = np.argwhere(np.triu(parallel & required & required[:, None], 1))
    if len(pairs):
        one, two = (library.reactions[r] for r in pairs[0])
        raise ValueError(f"expected required reactions with different ODEs; got {one} and {two}")
    if required.sum() >= most:
        raise ValueError(
            f"expected max_reactions above the {required.sum()} required reactions, or none could "
            f"be added; got {most}"
        )
