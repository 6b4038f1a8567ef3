"""Building networks reaction by reaction: what is legal, and gymnasium's own checker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowme.discovery import Library, Reaction, up_to_second_order
from flowme.discovery.environment import (
    environment,
    mask_add,
    mask_drop,
    reset,
    step,
)

PAIR = up_to_second_order("AB")
L = len(PAIR)
NONE, HIDDEN = L, L + 1


def add(reaction):
    return [NONE, PAIR.index(reaction)]


def after(env, *actions):
    state = reset(env)
    for action in actions:
        state = step(env, state, jnp.array(action))
    return state


def written(env, state):
    return {str(env.library.reactions[r]) for r in np.flatnonzero(state.chosen)}


def legal(env, state, reaction, drop=None):
    return bool(mask_add(env, state, drop)[env.library.index(reaction)])


def test_add_drop_swap_stop():
    env = environment(PAIR, max_steps=10)
    state = after(env, add("A -> 2A"), add("B -> 0"), add("A + B -> 2B"))
    assert written(env, state) == {"A -> 2A", "B -> 0", "A + B -> 2B"} and state.steps == 7
    state = step(env, state, jnp.array([PAIR.index("B -> 0"), NONE]))
    state = step(env, state, jnp.array([PAIR.index("A -> 2A"), PAIR.index("A -> B")]))
    assert written(env, state) == {"A + B -> 2B", "A -> B"} and not state.done
    state = step(env, state, jnp.array([NONE, NONE]))
    assert state.done and state.steps == 4
    frozen = step(env, state, jnp.array(add("0 -> A")))
    assert all(np.array_equal(a, b) for a, b in zip(frozen, state, strict=True))


def test_duplicates_and_parallel_duplicates():
    env = environment(PAIR)
    state = after(env, add("0 -> A"), add("2A -> A"))
    for reaction in ("0 -> A", "0 -> 2A", "2A -> A", "2A -> 0"):
        assert not legal(env, state, reaction)
    assert legal(env, state, "0 -> B") and legal(env, state, "2A -> B")
    # A swap for a parallel reaction would leave the ODE as it was.
    assert not legal(env, state, "0 -> 2A", drop=PAIR.index("0 -> A"))
    assert legal(env, state, "0 -> B", drop=PAIR.index("0 -> A"))
    illegal = step(env, state, jnp.array(add("0 -> 2A")))
    assert np.array_equal(illegal.chosen, state.chosen) and illegal.steps == state.steps - 1


def test_no_ops_are_never_legal():
    idle = Library("AB", [Reaction((("A", 1),), (("A", 1),)), "A -> B"])
    env = environment(idle)
    assert not legal(env, reset(env), "A -> A") and legal(env, reset(env), "A -> B")


def test_stop_needs_a_reaction_and_episodes_end():
    env = environment(PAIR, max_steps=2)
    state = reset(env)
    assert not mask_add(env, state)[NONE] and not mask_drop(env, state)[:L].any()
    assert mask_add(env, after(env, add("0 -> A")))[NONE]
    assert after(env, add("0 -> A"), add("A -> 0")).done


def test_unreachable_species():
    enzyme = up_to_second_order("CEPS")
    env = environment(enzyme, present=["S", "E"])
    state = reset(env)
    assert legal(env, state, "E + S -> C") and not legal(env, state, "C -> E + P")
    state = step(env, state, jnp.array([len(enzyme), enzyme.index("E + S -> C")]))
    assert legal(env, state, "C -> E + P") and not legal(env, state, "P -> S")
    state = step(env, state, jnp.array([len(enzyme), enzyme.index("C -> E + P")]))
    assert legal(env, state, "P -> S")
    # Without what makes C, C -> E + P could not take place.
    drop = mask_drop(env, state)
    assert not drop[enzyme.index("E + S -> C")] and drop[enzyme.index("C -> E + P")]


def test_hidden_species_open_in_order():
    library = up_to_second_order(["A", "H1", "H2"])
    env = environment(library, hidden=["H1", "H2"])
    size = len(library)
    state = reset(env)
    assert not legal(env, state, "A -> H1") and mask_add(env, state)[size + 1]
    opened = step(env, state, jnp.array([size, size + 1]))
    assert legal(env, opened, "A -> H1") and not legal(env, opened, "A -> H2")
    opened = step(env, opened, jnp.array([size, size + 1]))
    assert legal(env, opened, "H1 -> H2") and not mask_add(env, opened)[size + 1]


def test_conservation_laws_lists_and_size():
    env = environment(PAIR, conserved=[{"A": 1, "B": 1}], blacklist=["2A -> 2B"], max_reactions=2)
    may = np.asarray(mask_add(env, reset(env))[:L])
    assert may.any() and not PAIR.net[may].sum(1).any()
    assert not legal(env, reset(env), "2A -> 2B") and legal(env, reset(env), "A -> B")
    full = after(env, add("A -> B"), add("B -> A"))
    assert not mask_add(env, full)[:L].any() and legal(
        env, full, "A + B -> 2B", PAIR.index("A -> B")
    )
    only = environment(PAIR, whitelist=["A -> B", "B -> 0"], required=["A -> B"])
    assert written(only, reset(only)) == {"A -> B"}
    assert np.flatnonzero(mask_add(only, reset(only))[:L]) == [PAIR.index("B -> 0")]
    assert not mask_drop(only, reset(only))[PAIR.index("A -> B")]


# ---- laws of random episodes


@partial(jax.jit, static_argnums=2)
def episodes(key, env, batch):
    """States [time, batch, ...] of random legal actions; half of them begin with a drop."""

    def one(state, key):
        first, second, third = jax.random.split(key, 3)
        drop = jax.random.categorical(first, jnp.where(mask_drop(env, state), 0.0, -jnp.inf))
        drop = jnp.where(jax.random.bernoulli(second, 0.5, drop.shape), drop, len(env.library))
        may = jnp.where(mask_add(env, state, drop), 0.0, -jnp.inf)
        may = may.at[:, len(env.library)].add(-2.0)
        action = jnp.stack([drop, jax.random.categorical(third, may)], -1)
        return step(env, state, action), (state, action)

    return jax.lax.scan(one, reset(env, (batch,)), jax.random.split(key, env.max_steps))


@pytest.fixture(scope="module")
def played():
    library = up_to_second_order("ABH")
    env = environment(
        library, hidden=["H"], present=["A", "B"], blacklist=["0 -> A"], max_reactions=4,
        max_steps=12,
    )  # fmt: skip
    return env, *episodes(jax.random.key(0), env, 64)


def test_every_legal_action_acts_and_leaves_a_legal_network(played):
    env, last, (states, actions) = played
    library = env.library
    assert last.done.all()
    chosen = np.concatenate([states.chosen, last.chosen[None]])
    hidden = np.concatenate([states.hidden, last.hidden[None]])
    stopped = (np.asarray(actions) == len(library)).all(-1) | np.asarray(states.done)
    changed = (chosen[1:] != chosen[:-1]).any(-1) | (hidden[1:] != hidden[:-1])
    assert (changed == ~stopped).all() and changed.sum() > 300
    structures = {tuple(np.flatnonzero(c)) for c in chosen.reshape(-1, len(library))}
    assert len(structures) > 100
    for rows in structures:
        reactions = [library.reactions[r] for r in rows]
        assert len(rows) <= 4 and "0 -> A" not in map(str, reactions)
        sizes = [max(map(abs, r.net.values())) for r in reactions]
        directions = {
            (r.source, *((s, n / size) for s, n in r.net.items()))
            for r, size in zip(reactions, sizes, strict=True)
        }
        assert len(directions) == len(rows)  # no two parallel
        there = {"A", "B"}
        for _ in rows:
            there |= {
                s for r in reactions if {x for x, _ in r.reactants} <= there for s in r.species
            }
        assert all({x for x, _ in r.reactants} <= there for r in reactions)


def test_batched_is_one_by_one(played):
    env, _, (states, actions) = played
    t = 5
    now = jax.tree.map(lambda x: x[t], states)
    together = step(env, now, actions[t])
    mapped = jax.vmap(partial(step, env))(now, actions[t])
    for a, b, c in zip(together, mapped, jax.tree.map(lambda x: x[t + 1], states), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


BAD = {
    "expected a library of at least one reaction": lambda: environment(Library("AB", [])),
    "expected hidden species among A, B; got H": lambda: environment(PAIR, hidden=["H"]),
    "expected species in conservation laws among A, B; got Z": lambda: environment(
        PAIR, conserved=[{"A": 1, "Z": 1}]
    ),
    "expected conservation laws that some reaction .* hold every species constant": lambda: (
        environment(PAIR, conserved=[{"A": 1, "B": 1}, {"A": 1, "B": 2}])
    ),
    "expected a conservation law with some weight": lambda: environment(
        PAIR, conserved=[{"A": 0}]
    ),
    "expected a reaction of the library; got A -> 3B": lambda: environment(
        PAIR, blacklist=["A -> 3B"]
    ),
    "expected required reactions that are allowed; got A -> 0": lambda: environment(
        PAIR, conserved=[{"A": 1, "B": 1}], required=["A -> 0"]
    ),
    "expected required reactions with different ODEs": lambda: environment(
        PAIR, required=["0 -> A", "0 -> 2A"]
    ),
    "expected some reaction that may be added": lambda: environment(
        PAIR, whitelist=["B -> A"], present=["A"]
    ),
    "expected max_reactions above the 2 required": lambda: environment(
        PAIR, required=["0 -> A", "A -> 0"], max_reactions=1
    ),
    "expected max_reactions above the 1 required": lambda: environment(
        PAIR, required=["A -> B"], max_reactions=1
    ),
    "expected max_reactions of 1 or more.* got -1": lambda: environment(PAIR, max_reactions=-1),
    "expected max_steps of 1 or more.* got 0": lambda: environment(PAIR, max_steps=0),
    r"expected required reactions that can take .*present \(A\).*got B -> A": lambda: environment(
        PAIR, present=["A"], required=["B -> A"]
    ),
    "expected each hidden species once": lambda: environment(PAIR, hidden=["A", "A"]),
    "expected whitelist as a list": lambda: environment(PAIR, whitelist="A -> B"),
    "expected blacklist as a list": lambda: environment(PAIR, blacklist="A -> B"),
    "expected conserved as a list of laws.* got {'A'": lambda: environment(
        PAIR, conserved={"A": 1, "B": 1}
    ),
    r"expected conserved as a list of laws.* got \['A\+B'\]": lambda: environment(
        PAIR, conserved=["A+B"]
    ),
    "expected finite weights in conservation laws": lambda: environment(
        PAIR, conserved=[{"A": np.nan}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_gymnasium_accepts_it():
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from flowme.discovery.gym import NetworkEnv

    given = {
        "env": environment(PAIR, max_steps=3),
        "reward": lambda structures: -structures.sum(-1).astype(float),
    }
    gymnasium.register("Network-v0", NetworkEnv)
    check_env(gymnasium.make("Network-v0", **given).unwrapped)
    env = NetworkEnv(**given)
    env.reset(seed=0)
    env.step(np.array(add("A -> B")))
    _, reward, terminated, truncated, _ = env.step(np.array([NONE, NONE]))
    assert (reward, terminated, truncated) == (-1.0, True, False)
    env.reset()
    for _ in range(3):
        observation, reward, terminated, truncated, _ = env.step(np.array([NONE, NONE]))
    assert (reward, terminated, truncated) == (0.0, False, True)  # illegal: nothing was chosen
    assert observation["steps"] == 0 and env.add_after(NONE).shape == (L + 2,)
