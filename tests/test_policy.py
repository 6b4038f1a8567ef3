"""The graph policy does not see names, serves any size, and learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from flowme.discovery import Library, Reaction, up_to_second_order
from flowme.discovery.candidate_features import FixedFeatures, GramFeatures
from flowme.discovery.environment import State, environment, mask_add, reset
from flowme.discovery.learner import Learner, init, update
from flowme.discovery.policy import GraphPolicy, graph_of, padded
from flowme.discovery.policy_arm import PolicyArm
from flowme.discovery.rollout import log_probability, orders_of, sample

POLICY = GraphPolicy(width=8)
LEARNER = Learner(POLICY, learning_rate=2e-2)
PAIR = up_to_second_order("AB")
ENV = environment(PAIR)
L = len(PAIR)
FEATURES = FixedFeatures(jnp.zeros((L, 3)))
PREDATION = ["A -> 2A", "A + B -> 2B", "B -> 0"]


def mask(library, reactions):
    rows = np.zeros(len(library), bool)
    rows[[library.index(r) for r in reactions]] = True
    return rows


@pytest.fixture(scope="module")
def params():
    """Weights that are random everywhere; the last layers begin as zero."""
    drawn = init(LEARNER, jax.random.key(0), ENV, FEATURES).params.policy
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
    state = init(LEARNER, jax.random.key(0), ENV, FEATURES)
    structures, orders = sample(POLICY, state.params, jax.random.key(1), ENV, FEATURES, 50)
    return state, np.asarray(structures), np.asarray(orders)


def test_begins_uniform_over_sizes_and_reactions(sampled):
    state, structures, orders = sampled
    log_p, entropy, value = jax.jit(log_probability, static_argnums=0)(
        POLICY, state.params, ENV, FEATURES, orders
    )
    sizes = structures.sum(1)
    for size in (1, 2):
        of_size = structures[sizes == size][:1]
        assert len(of_size), "no structure of this size in the sample"
        states = reset(ENV)._replace(chosen=np.zeros(L, bool))
        ways = [mask_add(ENV, states)[:L].sum()]
        if size == 2:
            first = orders[sizes == size][0, 0]
            states = states._replace(chosen=np.arange(L) == first)
            ways.append(mask_add(ENV, states)[:L].sum())
        expected = -np.log(8) - np.log(np.array(ways, float)).sum()
        np.testing.assert_allclose(log_p[sizes == size][0], expected, rtol=1e-9)
    assert np.ptp(sizes) == 7 and (entropy > 1).all() and not np.any(value)


def test_orders_build_their_structures(sampled):
    _, structures, _ = sampled
    impossible = structures.copy()
    impossible[0] = mask(PAIR, ["0 -> A", "0 -> 2A"])
    orders, buildable = orders_of(jax.random.key(0), ENV, impossible)
    assert not buildable[0] and buildable[1:].all()
    for structure, order in zip(impossible[1:], np.asarray(orders)[1:], strict=True):
        assert set(order) - {L} == set(np.flatnonzero(structure))


def test_only_the_rank_of_a_reward_counts(sampled):
    state, structures, orders = sampled
    rewards = -np.sum(structures ^ mask(PAIR, PREDATION), -1).astype(float)
    rewards += np.linspace(0, 0.5, len(rewards))  # no ties
    worse = np.append(np.exp(rewards[:-1]), np.nan)
    rewards[-1] = -1e300
    a, b = (update(LEARNER, state, ENV, FEATURES, structures, orders, r) for r in (rewards, worse))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)
    before = jax.tree.leaves(state.params)
    moved = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a.params), before, strict=True)]
    assert max(moved) > 1e-3
    best = np.argsort(-rewards)[0]
    np.testing.assert_array_equal(a.structures[0], structures[best])


def arm_of(env, seed=0, policy=None, prior=None):
    """An arm that is told nothing by data."""
    features = FixedFeatures(jnp.zeros((len(env.library), 3)))
    return PolicyArm(
        LEARNER, policy, space=lambda memory: env, features=lambda memory: features,
        prior=lambda memory: prior, seed=seed,
    )  # fmt: skip


def found_by(arm, rng, reward, rounds):
    """Rewards of `rounds` of 50 structures, [round, structure]."""
    seen = []
    for _ in range(rounds):
        structures = arm.propose(rng, 50, None)
        seen.append(reward(structures))
        arm.update(structures, seen[-1])
    return np.array(seen)


def test_learns_a_planted_optimum():
    """Four reactions of thirty, one of 27 405 such sets, found by 800 evaluations with each of
    two seeds; random structures, as many, come no nearer than one reaction."""
    truth = mask(PAIR, [*PREDATION, "2A -> A"])

    def reward(structures):
        return -np.sum(structures ^ truth, -1).astype(float)

    for seed in range(2):
        rng = np.random.default_rng(seed)
        arm = arm_of(ENV, seed)
        learned = found_by(arm, rng, reward, 16)
        ranks = np.argsort(np.argsort(rng.random((800, L)), 1), 1)
        random = reward(ranks < rng.integers(1, 9, size=(800, 1)))
        assert learned.max() == 0 > random.max()
        assert learned[-1].mean() > -2 and learned[0].mean() < -6


def test_learns_from_structures_of_others():
    """A structure that another arm found becomes likely; one that cannot be built is left out."""
    arm = arm_of(ENV)
    rng = np.random.default_rng(0)
    arm.propose(rng, 50, None)
    better = mask(PAIR, PREDATION)
    for _ in range(12):
        arm.update(np.stack([better, mask(PAIR, ["0 -> A", "0 -> 2A"])]), np.array([1.0, 2.0]))
    assert (arm.propose(rng, 50, None) == better).all(1).mean() > 0.5


def test_goes_on_where_it_was_kept():
    def reward(structures):
        return -np.sum(structures, -1).astype(float)

    arm = arm_of(ENV)
    found_by(arm, np.random.default_rng(0), reward, 2)
    other = arm_of(ENV, seed=1)
    other.restore(arm.state())
    one, two = (found_by(a, np.random.default_rng(1), reward, 2) for a in (arm, other))
    np.testing.assert_array_equal(one, two)


def test_weights_of_one_task_begin_another():
    """The network's weights go to any library; the bias is of its own task."""
    env = environment(up_to_second_order("ABC"))
    first = arm_of(ENV)
    first.propose(np.random.default_rng(0), 50, None)
    likely = np.where(mask(env.library, ["A -> B", "B -> C"]), 8.0, 0.0)
    arm = arm_of(env, policy=first.weights, prior=likely)
    proposed = arm.propose(np.random.default_rng(0), 50, None)
    both = proposed[:, likely > 0].all(1)
    assert both[proposed.sum(1) > 1].mean() > 0.9 and both.sum() > 20


def test_gram_features_are_those_of_the_regression():
    rng = np.random.default_rng(3)
    a, n = rng.normal(size=(40, 6)), 40
    b = a @ np.array([1.0, 0.5, 0.0, 0.0, 0.0, 0.0]) + 0.1 * rng.normal(size=n)
    features = GramFeatures(a.T @ a, a.T @ b, b @ b, n)
    chosen = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    got = features(jnp.asarray(chosen))
    for row, which in zip(got, chosen, strict=True):
        k, _ = nnls(a[:, which], b) if which.any() else (np.zeros(0), 0)
        residual = b - a[:, which] @ k
        correlation = residual @ a / np.linalg.norm(a, axis=0) / np.linalg.norm(residual)
        gain = -np.log(1 - np.maximum(correlation, 0) ** 2) - np.log(n) / n
        np.testing.assert_allclose(row[:, 0], correlation, atol=1e-6)
        np.testing.assert_allclose(row[:, 1], gain, atol=1e-6)
        rates = np.zeros(6)
        rates[which] = k * np.linalg.norm(a, axis=0)[which] / np.linalg.norm(b)
        np.testing.assert_allclose(row[:, 2], rates, atol=1e-6)
    assert (got[..., 2] > 0).any() and got[1, 0, 0] > 0.5
