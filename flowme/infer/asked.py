"""What an estimation depends on, in numbers and words: a checkpoint is taken up only by the same.

A model and an optimiser are functions, which have no name that can be written. They are known by
what they do: the model by its densities at a place drawn once, the optimiser by where it goes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.fit import identity
from flowme.infer.joint import Joint
from flowme.infer.marginal import spread
from flowme.quick import quick
from flowme.study import Study

_SETTINGS = (
    "use_priors", "tolerance", "max_iterations", "starts", "points", "flow_updates", "folds",
    "chunk",
)  # fmt: skip


def asked(vem: Any, key: jax.Array, joint: Joint, study: Study, init: dict[str, Any]) -> dict:
    """What `vem.run(key, study, init=init)` depends on, by name, as JSON can write it.

    Args:
        vem: a `VariationalEM`.
        key: random key.
        joint: its model, for this study.
        study: the study.
        init: starting values by name.
    """
    population = joint.roles.population
    found = {
        "version of the checkpoint": 1,
        **identity(joint, study),
        "starting values": {name: _numbers(site.init) for name, site in population.items()},
        "model (its densities at some place)": _densities(joint, study),
        "init": {name: _numbers(value) for name, value in sorted(init.items())},
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "precision": str(jnp.zeros(0).dtype),
        **{name: getattr(vem, name) for name in _SETTINGS},
    }
    if joint.roles.weights:
        found["optimizer (where it goes)"] = _numbers(_way(vem.optimizer))
    return found


def _numbers(values: Any) -> list[float]:
    return np.ravel(np.asarray(values, float)).tolist()


def _densities(joint: Joint, study: Study) -> list[float]:
    """log p(y_i | η_i; θ) and log p(η_i; θ) of eight subjects and log p(θ), near the start."""
    some = study.subset(spread(study.subjects.size, 8))
    rng = np.random.default_rng(0)
    theta = np.asarray(joint.unconstrain({})) + 0.1 * rng.normal(size=joint.size)
    weights = {
        name: np.asarray(w) + 0.1 * rng.normal(size=np.shape(w))
        for name, w in joint.roles.weights.items()
    }
    eta = 0.2 * rng.normal(size=(some.subjects.size, joint.effect_size))
    return _numbers(_values(joint, theta, weights, eta, some))


@partial(quick, static_argnums=0)
def _values(joint: Joint, theta, weights, eta, study: Study) -> jax.Array:
    terms = joint.terms(joint.constrain(theta), weights, eta, study)
    return jnp.concatenate([*terms, joint.log_prior(theta, study)[None]])


def _way(optimizer: Any) -> jax.Array:
    """Where an optax optimiser goes from 1 on the slope x² in 200 steps, `[step]`."""

    def step(carry, _):
        x, state = carry
        move, state = optimizer.update(2 * x, state, x)
        return (x + move, state), x[0]

    x = jnp.ones(1)
    return jax.lax.scan(step, (x, optimizer.init(x)), None, length=200)[1]
