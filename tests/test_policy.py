"""The graph policy does not see names, serves any size, and learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowme.discovery import Library, Reaction, up_to_second_order
from flowme.discovery.candidate_features import FixedFeatures
from flowme.discovery.environment import State, environment, mask_add, reset
from flowme.discovery.learner import (
    Learner,
    init,
    log_probability,
    orders_of,
    sample,
    update,
)
from flowme.discovery.policy import GraphPolicy, graph_of, padded
from flowme.discovery.policy_arm import PolicyArm

POLICY = GraphPolicy(width=8)
LEARNER = Learner(POLICY)
PAIR = up_to_second_order("AB")
ENV = environment(PAIR)
L = len(PAIR)
PREDATION = ["A -> 2A", "A + B -> 2B", "B -> 0"]


def mask(library, reactions):
    rows = np.zeros(len(library), bool)
    rows[[library.index(r) for r in reactions]] = True
    return rows


@pytest.fixture(scope="module")
def params():
    """Weights that are random everywhere; the last layers begin as zero."""
    features = FixedFeatures(jnp.zeros((L, 3)))
    drawn = init(LEARNER, jax.random.key(0), ENV, features).params
    leaves, tree = jax.tree.flatten(drawn)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + 0.3 * rng.normal(size=x.shape) for x in leaves])


@partial(jax.jit, static_argnames="size")
def output(params, env, chosen, features, size=None):
    """Logits and values of states with these reactions chosen."""
    graph = graph_of(env)
    if size is not None:
        graph = padded(graph, *size)
        more = size[0] - chosen.shape[-1]
        chosen = jnp.pad(chosen, ((0, 0), (0, more)))
        features = jnp.pad(features, ((0, more), (0, 0)))
    first = reset(env, chosen.shape[:1])
    return POLICY.apply(params, graph, State(chosen, *first[1:]), features)


def test_equivariant_to_names_and_order(params):
    """Species renamed and reactions shuffled: the logits move with them, the value stays."""
    rng = np.random.default_rng(1)
    new = dict(zip("AB", "ZY", strict=True))
    renamed = [
        Reaction(*(tuple((new[s], n) for s, n in side) for side in (r.reactants, r.products)))
        for r in PAIR.reactions
    ]
    order = rng.permutation(L)
    other = environment(Library("YZ", [renamed[i] for i in order]))
    chosen = rng.random((16, L)) < 0.1
    features = rng.normal(size=(L, 3))
    a = output(params, ENV, chosen, features)
    b = output(params, other, chosen[:, order], features[order])
    moved = np.append(order, [L, L + 1])
    np.testing.assert_allclose(a.logits[:, moved], b.logits, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-10, atol=1e-10)
    assert np.ptp(np.asarray(a.logits), axis=1).min() > 0.1  # the reactions are told apart


def test_padding_changes_nothing(params):
    rng = np.random.default_rng(2)
    chosen, features = rng.random((4, L)) < 0.1, rng.normal(size=(L, 3))
    a = output(params, ENV, chosen, features)
    b = output(params, ENV, chosen, features, size=(L + 7, 4))
    kept = np.append(np.arange(L), [L + 7, L + 8])
    np.testing.assert_allclose(a.logits, b.logits[:, kept], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("species", ["AB", "ABC", "ABCD"])
def test_one_set_of_weights_for_any_size(params, species):
    env = environment(up_to_second_order(species))
    size = len(env.library)
    got = output(params, env, np.zeros((2, size), bool), np.zeros((size, 3)))
    assert got.logits.shape == (2, size + 2) and np.isfinite(got.logits).all()


@pytest.fixture(scope="module")
def sampled():
    features = FixedFeatures(jnp.zeros((L, 3)))
    state = init(LEARNER, jax.random.key(0), ENV, features)
    structures, orders = sample(POLICY, state.params, jax.random.key(1), ENV, features, 100)
    return features, state, np.asarray(structures), np.asarray(orders)


def test_begins_uniform_over_what_is_legal(sampled):
    features, state, structures, orders = sampled
    log_p, entropy, value = jax.jit(log_probability, static_argnums=0)(
        POLICY, state.params, ENV, features, orders[:88]
    )
    first = int(mask_add(ENV, reset(ENV)).sum())
    alone = orders[:88, 1] == L  # one reaction, then stop
    second = np.array([int(mask_add(ENV, reset(ENV)._replace(chosen=s)).sum())
                       for s in structures[:88][alone]])  # fmt: skip
    np.testing.assert_allclose(log_p[alone], -np.log(first) - np.log(second), rtol=1e-6)
    assert alone.sum() > 1 and (entropy > 2.5).all() and not np.any(value)


def test_orders_build_their_structures(sampled):
    _, _, structures, _ = sampled
    impossible = structures[:64].copy()
    impossible[0] = mask(PAIR, ["0 -> A", "0 -> 2A"])
    orders, buildable = orders_of(jax.random.key(0), ENV, impossible)
    assert not buildable[0] and buildable[1:].all()
    for structure, order in zip(impossible[1:], np.asarray(orders)[1:], strict=True):
        assert set(order) - {L} == set(np.flatnonzero(structure))


def test_only_the_rank_of_a_reward_counts(sampled):
    features, state, structures, orders = sampled
    rewards = -np.sum(structures ^ mask(PAIR, PREDATION), -1).astype(float)
    rewards += np.linspace(0, 0.5, len(rewards))  # no ties
    worse = np.append(np.exp(rewards[:-1]), np.nan)
    rewards[-1] = -1e300
    a, b = (update(LEARNER, state, ENV, features, structures, orders, r) for r in (rewards, worse))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)
    before = jax.tree.leaves(state.params)
    moved = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a.params), before, strict=True)]
    assert max(moved) > 1e-3
    best = np.argsort(-rewards)[0]
    np.testing.assert_array_equal(a.structures[0], structures[best])


def test_learns_a_planted_optimum():
    """Ten rounds of 100 structures, three seeds: the policy finds three reactions of thirty, of
    which there are 4060 sets; random search with the same evaluations comes less near."""
    truth = mask(PAIR, PREDATION)

    def reward(structures):
        return -np.sum(structures ^ truth, -1).astype(float)

    features = FixedFeatures(jnp.zeros((L, 3)))
    learned, random = [], []
    for seed in range(3):
        arm = PolicyArm(ENV, lambda memory: features, learner=LEARNER, seed=seed)
        rng = np.random.default_rng(seed)
        rounds = []
        for _ in range(12):
            structures = arm.propose(rng, 100, None)
            rounds.append(reward(structures))
            arm.update(structures, rounds[-1])
        learned.append([np.max(rounds), np.mean(rounds[-1])])
        sizes = rng.integers(1, 7, size=(1200, 1))
        picked = np.argsort(np.argsort(rng.random((1200, L)), 1), 1) < sizes
        random.append(reward(picked).max())
    best, mean = np.mean(learned, 0)
    print(learned, random)
    assert best > np.mean(random) and mean > -4.5
