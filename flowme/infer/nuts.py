"""Full Bayes: NumPyro's NUTS on a population model, non-centred and started where it is likely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import lift, reparam, substitute
from numpyro.infer import MCMC, NUTS
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import Reparam

from flowme.effects import FlowRandomEffect, RandomEffect
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.study import Study


class NonCentred(Reparam):
    """η as a function of standard normal z: the site `{name}_base` [subject, effect] is sampled.

    For laws with a `from_base` (Gaussian, flow). With few observations per subject the posterior
    of z is far rounder than that of η.
    """

    def __call__(self, name, fn, obs):
        if obs is not None:
            raise ValueError(f"expected random effect {name!r} unobserved; got observed values.")
        law = getattr(fn, "base_dist", fn)
        shape = fn.batch_shape + fn.event_shape
        z = numpyro.sample(f"{name}_base", dist.Normal(0.0, 1.0).expand(shape[-1:]).to_event(1))
        return None, law.from_base(z)


def nuts(
    model: Callable,
    study: Study,
    key: jax.Array,
    *,
    fit: Fit | None = None,
    sample_flow: bool = False,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    target_accept_prob: float = 0.9,
    progress: bool = True,
) -> MCMC:
    """Draw from the posterior of a population model by NUTS (Hoffman & Gelman 2014).

    Random effects are sampled non-centred (`NonCentred`) where their law allows it. Chains start
    from `fit`, when given, else from the model's starting values; all from the same point, so
    R-hat cannot tell of a mode that none of them visits.

    Args:
        model: the model.
        study: the study.
        key: random key; is consumed.
        fit: a `VariationalEM` fit of the same model: where chains start and, for a flow, its
            weights. Needed when the model has a flow and `sample_flow` is False.
        sample_flow: False holds the weights of flows at those of `fit`; True samples them from
            the prior N(0, weights_scale²) of their `FlowRandomEffect`, which shrinks the law to
            the Gaussian. Weights are not identified one by one and mix slowly: look at the law.
        num_warmup: warm-up iterations per chain.
        num_samples: draws per chain.
        num_chains: chains, run side by side.
        target_accept_prob: of NUTS.
        progress: show a progress bar.

    Returns:
        NumPyro's own `MCMC`, after its run: `print_summary`, `get_samples`, `flowme.to_arviz`.
    """
    joint = Joint.of(model, study)
    weights = _held_weights(joint, fit, sample_flow)
    if weights:
        model = substitute(model, data=weights)
    elif joint.roles.weights:
        priors = {
            f"{name}_weights": law.weights_prior()
            for name, law in joint.roles.laws.items()
            if isinstance(law, FlowRandomEffect)
        }
        model = lift(model, prior=priors)
    config = {
        name: NonCentred()
        for name, law in joint.roles.laws.items()
        if isinstance(law, RandomEffect) and hasattr(law, "from_base")
    }
    kernel = NUTS(
        reparam(model, config=config),
        target_accept_prob=target_accept_prob,
        init_strategy=init_to_value(values=_start(joint, study, fit, config, sample_flow)),
    )
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=progress,
    )
    mcmc.run(key, study, extra_fields=_FIELDS)
    return mcmc


_FIELDS = ("potential_energy", "energy", "diverging", "num_steps", "accept_prob")


def _held_weights(joint: Joint, fit: Fit | None, sample_flow: bool) -> dict[str, jax.Array]:
    if sample_flow or not joint.roles.weights:
        return {}
    if fit is None or set(fit.weights) != set(joint.roles.weights):
        raise ValueError(
            "expected a fit of this model, to hold the weights of its flow at; got "
            f"{'none' if fit is None else 'one of another model'}. Give "
            "fit=fm.VariationalEM(model).run(...), or sample the weights with sample_flow=True."
        )
    return fit.weights


def _start(joint: Joint, study: Study, fit: Fit | None, config, sample_flow) -> dict[str, Any]:
    """Values of all sites where chains start."""
    if fit is not None and fit.theta.shape != (joint.size,):
        raise ValueError(
            f"expected a fit of this model, with {joint.size} parameters; got one with "
            f"{fit.theta.shape[0]}."
        )
    theta = joint.unconstrain({}) if fit is None else fit.theta
    weights = start_weights(joint) if fit is None else fit.weights
    eta = jnp.zeros((study.subjects.size, joint.effect_size))
    eta = eta if fit is None else fit.conditional.mean
    values = dict(joint.constrain(theta))
    if sample_flow:
        values |= weights
    laws = joint.laws(theta, weights, study)
    for law, (name, part) in zip(laws, joint.split(eta).items(), strict=True):
        if name in config:
            values[f"{name}_base"] = getattr(law, "base_dist", law).to_base(part)
        else:
            values[name] = part
    return values
