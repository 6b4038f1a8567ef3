"""Full Bayes: NUTS on a population model, in coordinates that a fit has made round."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import condition, lift, substitute
from numpyro.infer import MCMC, NUTS
from numpyro.infer.hmc import HMCState, hmc
from numpyro.infer.util import ParamInfo
from tqdm.auto import tqdm

from flowme.effects import GaussianRandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.garbage import set_aside
from flowme.infer.chains import doubts
from flowme.infer.conditional import Conditional
from flowme.infer.coordinates import Coordinates, Map, frame
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights, start_weights
from flowme.infer.vem import VariationalEM
from flowme.infer.whiten import whiten
from flowme.primitives import replace_effect
from flowme.quick import soon
from flowme.study import Study

_BLOCK = 50  # iterations in one compiled call, between two moves of the progress bar
_SPREAD = 2.0  # standard deviations of the population parameters over which chains start


@set_aside()
def nuts(
    model: Callable,
    study: Study,
    key: jax.Array,
    *,
    fit: Fit | None = None,
    sample_flow: bool = False,
    num_warmup: int = 200,
    num_samples: int = 1000,
    num_chains: int = 4,
    target_accept_prob: float = 0.7,
    progress: bool = True,
) -> MCMC:
    """Draw from the posterior of a population model by NUTS (Hoffman & Gelman 2014).

    Sampled are coordinates in which the posterior is close to N(0, I): population parameters by
    the covariance of the fit, each subject's random effects by their conditional distribution as
    it moves with the population parameters (`flowme.infer.coordinates`). Hence the short warm-up.
    Each chain starts from a draw of its own, population parameters from twice as wide a Gaussian
    as their posterior is expected to be, so that R-hat can tell of chains that disagree. Modes
    far from the fit are not searched for.

    Ctrl-C ends the run with the draws so far.

    Args:
        model: the model.
        study: the study.
        key: random key; is consumed.
        fit: a `VariationalEM` fit of the same model: the coordinates and, for a flow, its
            weights. By default one with priors (MAP) is made. Needed when the model has a flow
            and `sample_flow` is False.
        sample_flow: False holds the weights of flows at those of `fit`; True samples them from
            the prior N(0, weights_scale²) of their `FlowRandomEffect`, which shrinks the law to
            the Gaussian. Weights are not identified one by one and mix slowly: look at the law.
        num_warmup: warm-up iterations per chain.
        num_samples: draws per chain.
        num_chains: chains; one after another in one program on a CPU, side by side on a GPU.
        target_accept_prob: of NUTS; what is reached is about 0.1 above it.
        progress: show a progress bar.

    Returns:
        NumPyro's own `MCMC`, as after its run: `print_summary`, `get_samples`, `flowme.to_arviz`.
        What speaks against the draws (divergences, R-hat, effective sample sizes, a flow whose
        chains disagree) is warned about and kept in its attribute `messages`.
    """
    _check(num_warmup, num_samples, num_chains, target_accept_prob)
    joint = Joint.of(model, study)
    _check_fit(joint, study, fit, sample_flow)
    key_fit, key_start = jax.random.split(key)
    if fit is None:
        fit = _quick_fit(key_fit, joint, study, progress)
    sampler = Sampler(Coordinates(joint, sample_flow), num_warmup, target_accept_prob)
    map = whiten(sampler.coordinates, fit, study)
    states = sampler.start(jax.random.split(key_start, num_chains), map, study)
    states, fields = _run(sampler, states, map, study, num_samples, progress)
    samples = _values(sampler.coordinates, fields.pop("x"), map, study)
    sampled = _sampled_model(joint, map.weights, sample_flow)
    mcmc = _Run(sampled, sampler, study, states, samples, fields)
    mcmc.messages = doubts(mcmc, joint, study, map.mean if sample_flow else None)
    for message in mcmc.messages:
        warnings.warn(message, stacklevel=2)
    return mcmc


@dataclasses.dataclass(frozen=True)
class Sampler:
    """NUTS of NumPyro in the coordinates of a model. Equal ones share their compiled programs."""

    coordinates: Coordinates
    num_warmup: int
    target_accept_prob: float

    def kernel(self, map: Map, study: Study) -> tuple[Callable, Callable]:
        """`init(ParamInfo, key)` and `sample(state)`."""
        init, sample = hmc(lambda x: self.coordinates.potential(x, map, study), algo="NUTS")
        options = {
            "num_warmup": self.num_warmup,
            "step_size": 0.5,
            "target_accept_prob": self.target_accept_prob,
        }
        return lambda info, key: init(info, rng_key=key, **options), sample

    @partial(soon, static_argnums=0)
    def start(self, keys: jax.Array, map: Map, study: Study) -> HMCState:
        """A state for each chain: drawn wide, moved to the centre until the density is finite."""
        joint, size = self.coordinates.joint, self.coordinates.size(study)
        evaluate = jax.value_and_grad(lambda x: self.coordinates.potential(x, map, study))
        toward = jnp.array([1.0, 0.5, 0.2, 0.0])
        init, _ = self.kernel(map, study)

        def chain(key):
            key_x, key_kernel = jax.random.split(key)
            x = jax.random.normal(key_x, (size,)).at[: joint.size].multiply(_SPREAD)
            tries = toward[:, None] * x
            values, slopes = jax.lax.map(evaluate, tries)
            k = jnp.argmax(jnp.isfinite(values) & jnp.all(jnp.isfinite(slopes), 1))
            return init(ParamInfo(tries[k], values[k], slopes[k]), key_kernel)

        return jax.lax.map(chain, keys)

    @partial(soon, static_argnums=(0, 1))
    def advance(self, count: int, states: HMCState, map: Map, study: Study):
        """`count` iterations of every chain: the states, and x and fields `[chain, iteration]`."""
        init, sample = self.kernel(map, study)

        def step(state, _):
            state = sample(state)
            fields = {name: getattr(state, name) for name in _FIELDS}
            return state, {"x": state.z, **fields}

        def chain(state):
            # NumPyro's kernel learns of its options in `init`; XLA drops what that computes.
            init(ParamInfo(state.z, state.potential_energy, state.z_grad), state.rng_key)
            return jax.lax.scan(step, state, length=count)

        # On a CPU chains side by side would all wait for the longest trajectory among them.
        if jax.default_backend() == "cpu":
            return jax.lax.map(chain, states)
        return jax.vmap(chain)(states)


_FIELDS = ("potential_energy", "energy", "diverging", "num_steps", "accept_prob")


def _run(sampler: Sampler, states, map, study, num_samples, progress):
    """Iterations in blocks, until done or interrupted; the states and the draws after warm-up."""
    warmup, total = sampler.num_warmup, sampler.num_warmup + num_samples
    blocks: list[dict[str, np.ndarray]] = []
    with tqdm(total=total, desc="NUTS", disable=not progress) as bar:
        try:
            while (done := _BLOCK * len(blocks)) < total:
                states, block = sampler.advance(_BLOCK, states, map, study)
                blocks.append(jax.tree.map(np.asarray, block))
                bar.update(min(_BLOCK, total - done))
                steps = np.mean(blocks[-1]["num_steps"])
                bar.set_postfix_str(f"{'warm-up' if done < warmup else 'draws'}, {steps:.0f} steps")
        except KeyboardInterrupt:
            if _BLOCK * len(blocks) <= warmup:
                raise
            warnings.warn("stopped by the user before all draws were made.", stacklevel=3)
    return states, jax.tree.map(lambda *x: np.concatenate(x, 1)[:, warmup:total], *blocks)


@partial(soon, static_argnums=0)
def _values(coordinates: Coordinates, x, map: Map, study: Study) -> dict[str, jax.Array]:
    """The values of all sites at x `[chain, draw, ...]`."""
    found = jax.lax.map(
        lambda x: coordinates.values(x, map, study), x.reshape(-1, x.shape[-1]), batch_size=100
    )
    return jax.tree.map(lambda v: v.reshape(*x.shape[:2], *v.shape[1:]), found)


class _Run(MCMC):
    """NumPyro's `MCMC` of a model, as it is after a run, with draws that were made elsewhere."""

    def __init__(self, model: Callable, sampler: Sampler, study: Study, states, samples, fields):
        num_chains, num_samples = fields["diverging"].shape
        super().__init__(
            NUTS(model, target_accept_prob=sampler.target_accept_prob),
            num_warmup=sampler.num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
        )
        joint = sampler.coordinates.joint
        unknown = {*joint.roles.population, *joint.roles.effects, *joint.roles.weights}
        last = {name: value[:, -1] for name, value in samples.items() if name in unknown}
        self._args: tuple = (study,)
        self._kwargs: dict = {}
        self._states = {"z": samples, **fields}
        self._last_state = states._replace(z=last)  # print_summary reads the names of its sites
        self.messages: tuple[str, ...] = ()


# The model and its fit.


def _sampled_model(joint: Joint, weights: Weights, sample_flow: bool) -> Callable:
    """The model whose posterior is drawn: flow weights held, or with their prior."""
    if not joint.roles.weights:
        return joint.model
    if not sample_flow:
        return substitute(joint.model, data=weights)
    priors = {
        f"{name}_weights": law.weights_prior()
        for name, law in joint.roles.laws.items()
        if isinstance(law, FlowRandomEffect)
    }
    return lift(joint.model, prior=priors)


def _quick_fit(key: jax.Array, joint: Joint, study: Study, progress: bool) -> Fit:
    """A MAP fit of the model; of a model with flows that with Gaussians in their places."""
    flows = {
        name: GaussianRandomEffect(
            law.names, full=True, omega=law.omega, omega_prior=law.omega_prior
        )
        for name, law in joint.roles.laws.items()
        if isinstance(law, FlowRandomEffect)
    }
    model = replace_effect(joint.model, **flows) if flows else joint.model
    if not joint.size:
        return _prior_fit(joint, study)
    held = {
        name: joint.roles.population[name].init
        for others in joint.roles.groups.values()
        for name in others
    }
    model = condition(model, data=held) if held else model
    fit = VariationalEM(model, use_priors=True).run(key, study, progress=progress)
    fit = _placed(fit, joint, held) if held else fit
    return dataclasses.replace(fit, joint=joint, weights=start_weights(joint))


def _placed(fit: Fit, joint: Joint, held: dict[str, Any]) -> Fit:
    """A fit with some parameters held, as one of all: it knows nothing of those."""
    theta = joint.unconstrain({**fit.joint.constrain(fit.theta), **held})
    information = np.zeros((joint.size, joint.size))
    if fit.information is not None:
        own = np.concatenate(
            [np.arange(joint.size)[joint.slices[name]] for name in fit.joint.slices]
        )
        information[np.ix_(own, own)] = fit.information
    return dataclasses.replace(fit, theta=theta, information=information)


def _prior_fit(joint: Joint, study: Study) -> Fit:
    """Where there is nothing to estimate: the law of the random effects as every conditional
    distribution, so that z = u."""
    theta, weights = joint.unconstrain({}), start_weights(joint)
    location, L = frame(joint, joint.laws(theta, weights, study))
    shape = (study.subjects.size, joint.effect_size)
    conditional = Conditional(
        jnp.broadcast_to(location, shape), jnp.broadcast_to(L, (*shape, shape[1]))
    )
    none = np.zeros(shape[0])
    return Fit(joint, study, theta, weights, conditional, none, none, None, none, True)


def _check_fit(joint: Joint, study: Study, fit: Fit | None, sample_flow: bool) -> None:
    if joint.roles.weights and not sample_flow:
        if fit is None or set(fit.weights) != set(joint.roles.weights):
            raise ValueError(
                "expected a fit of this model, to hold the weights of its flow at; got "
                f"{'none' if fit is None else 'one of another model'}. Give "
                "fit=fm.VariationalEM(model).run(...), or sample the weights with sample_flow=True."
            )
    if fit is None:
        return
    if fit.theta.shape != (joint.size,):
        raise ValueError(
            f"expected a fit of this model, with {joint.size} parameters; got one with "
            f"{fit.theta.shape[0]}."
        )
    shape = (study.subjects.size, joint.effect_size)
    if fit.conditional.mean.shape != shape:
        raise ValueError(
            f"expected a fit of this study, with {shape[0]} subjects and {shape[1]} random "
            f"effects; got one with {' and '.join(map(str, fit.conditional.mean.shape))}."
        )


def _check(num_warmup: int, num_samples: int, num_chains: int, target: float) -> None:
    counts = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    for name, value in counts.items():
        least = 0 if name == "num_warmup" else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"expected {name} to be an integer, at least {least}; got {value!r}.")
    if not 0 < target < 1:
        raise ValueError(f"expected target_accept_prob between 0 and 1; got {target}.")
