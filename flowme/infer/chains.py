"""What speaks against the draws of a Markov chain, in words."""

from __future__ import annotations

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC

from flowme.infer.joint import Joint
from flowme.study import Study

R_HAT = 1.01  # Vehtari et al. 2021, Bayesian Analysis 16:667
LEAST_ESS = 100  # per chain, of the same


def doubts(
    mcmc: MCMC, joint: Joint, study: Study, points: jax.Array | None = None
) -> tuple[str, ...]:
    """Divergences, chains that disagree and small effective sample sizes, each with advice.

    Args:
        mcmc: after its run, with the fields of NumPyro's NUTS.
        joint: the model.
        study: its study.
        points: with sampled flow weights, η `[subject, effect]` at which the density of the law
            is looked at; the weights themselves are not identified.
    """
    samples = mcmc.get_samples(group_by_chain=True)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    chains, count = fields["diverging"].shape
    if count < 4:
        return (f"{count} draws per chain are too few to say how far to trust them.",)
    messages = []
    diverging = int(np.sum(fields["diverging"]))
    if diverging:
        messages.append(
            f"{diverging} divergent {'transition' if diverging == 1 else 'transitions'}: corners "
            "of the posterior may be missing. Raise target_accept_prob or num_warmup, or give "
            "the parameter that the data say least about a narrower prior."
        )
    names, values = _elements(joint, study, samples)
    with np.errstate(all="ignore"):  # constant elements: 0/0, which is skipped
        r_hat = np.nan_to_num(split_gelman_rubin(values), nan=1.0)
        size = np.nan_to_num(effective_sample_size(values), nan=np.inf)
    if chains > 1 and np.max(r_hat) > R_HAT:
        messages.append(
            f"R-hat {np.max(r_hat):.3f} for {names[np.argmax(r_hat)]} (above {R_HAT}): the chains "
            "disagree. Raise num_samples; if it stays, the posterior has several modes or the "
            "parameter is not identified: see its trace, fix it or narrow its prior."
        )
    if np.min(size) < LEAST_ESS * chains:
        messages.append(
            f"effective sample size {np.min(size):.0f} for {names[np.argmin(size)]} (below "
            f"{LEAST_ESS * chains}): quantiles are rough. Raise num_samples."
        )
    if points is not None:
        messages += _flow_doubts(joint, study, samples, points)
    return tuple(messages)


def _elements(joint: Joint, study: Study, samples) -> tuple[list[str], np.ndarray]:
    """Names and draws `[chain, draw, element]` of all population parameters and random effects."""
    names, values = [], []
    for name in (*joint.roles.population, *joint.roles.effects):
        value = np.asarray(samples[name])
        for cell in np.ndindex(value.shape[2:]):
            names.append(_label(joint, study, name, cell))
        values.append(value.reshape(*value.shape[:2], -1))
    return names, np.concatenate(values, -1)


def _label(joint: Joint, study: Study, name: str, cell: tuple[int, ...]) -> str:
    if name in joint.roles.effects:
        effects = joint.roles.effects[name]
        effect = effects[cell[1]] if len(cell) > 1 else effects[0]
        return f"{name}.{effect} of subject {study.ids[cell[0]]}"
    effects = joint.roles.components(joint.roles.population[name].effect)
    if len(cell) == 1 and len(effects) == joint.roles.population[name].shape[0]:
        return f"{name}[{effects[cell[0]]}]"
    return f"{name}{list(cell)}" if cell else name


def _flow_doubts(joint: Joint, study: Study, samples, points: jax.Array) -> list[str]:
    """Whether chains agree on log p(η*; θ, w) at up to 20 of the points."""
    some = np.unique(np.linspace(0, len(points) - 1, min(20, len(points))).astype(int))
    names = (*joint.roles.population, *joint.roles.weights)
    drawn = {name: samples[name] for name in names}

    def density(drawn):
        values = {name: drawn[name] for name in joint.roles.population}
        weights = {name: drawn[name] for name in joint.roles.weights}
        return joint.terms(values, weights, points, study)[1][some]

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)
    found = jax.jit(lambda d: jax.lax.map(density, d, batch_size=100))(flat)
    shape = next(iter(drawn.values())).shape[:2]
    found = np.asarray(found).reshape(*shape, -1)
    r_hat, size = split_gelman_rubin(found), effective_sample_size(found)
    if np.nanmax(r_hat) <= R_HAT and np.nanmin(size) >= LEAST_ESS * shape[0]:
        return []
    return [
        f"the density of the random effects has R-hat {np.nanmax(r_hat):.3f} and effective sample "
        f"size {np.nanmin(size):.0f}: the posterior of the flow is not to be believed. Raise "
        "num_samples, lower weights_scale, or hold the flow at a fit (sample_flow=False)."
    ]
