"""Where a law of the random effects is started from: the Gaussian fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from flowme.effects import GaussianRandomEffect, RandomEffect
from flowme.infer.course import Course
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, start_weights
from flowme.mixture_effect import MixtureRandomEffect


def needs_start(law: dist.Distribution) -> bool:
    """Whether a law is started from the Gaussian fit."""
    return isinstance(law, RandomEffect) and not isinstance(law, GaussianRandomEffect)


def gaussians(laws: dict[str, RandomEffect]) -> dict[str, GaussianRandomEffect]:
    """The Gaussian that each law is started from, with what they have in common."""
    shared = ("omega", "omega_prior")
    return {
        name: GaussianRandomEffect(
            law.names,
            full=getattr(law, "full", False),
            **(
                {"omega": 0.5 * law.spread}
                if isinstance(law, MixtureRandomEffect)
                else {k: getattr(law, k) for k in shared if hasattr(law, k)}
            ),
        )
        for name, law in laws.items()
    }


def from_gaussian(key, joint: Joint, laws, init, first: Course | Fit, chosen=slice(None)):
    """Values and weights to start `joint` from, given the Gaussian fit to the chosen subjects."""
    values = {k: np.asarray(v) for k, v in first.joint.constrain(first.theta).items()}
    values = {k: v for k, v in values.items() if k in joint.roles.population}
    weights = start_weights(joint)
    keys = jax.random.split(key, len(laws) + 1)
    noise = jax.random.normal(keys[0], (8, *first.conditional.mean.shape))
    draws = first.conditional.mean + jnp.einsum("sde,kse->ksd", first.conditional.scale_tril, noise)
    draws = draws[:, chosen]
    gaussian = first.joint.constrain(first.theta)
    for k, (name, law) in zip(keys[1:], laws.items(), strict=True):
        eta = np.asarray(first.joint.split(draws.reshape(-1, draws.shape[-1]))[name])
        eta = eta.reshape(-1, len(law.names))  # one draw for each occasion, if between them
        parameters = {
            parameter.removeprefix(f"{name}_"): value
            for parameter, value in gaussian.items()
            if first.joint.roles.population[parameter].effect == name
        }
        covariance = first.joint.roles.laws[name].with_parameters(**parameters).covariance_matrix
        for parameter, value in law.start(k, np.asarray(covariance), eta, draws.shape[1]).items():
            target = weights if parameter == "weights" else values
            target[f"{name}_{parameter}"] = value
    # Where the Gaussian fit ended is a better start than where it began; but what was asked of
    # parameters that it does not have is done.
    asked = {k: v for k, v in init.items() if k not in first.joint.roles.population}
    return {**values, **asked}, weights
