"""Effects of groups that are no subjects (sites, batches): latent values whose prior is estimated.

    with numpyro.plate("site", 5):
        site = numpyro.sample("site", dist.Normal(0.0, sd))  # sd is latent too

Full Bayes takes this for what it is. Maximum likelihood would have to integrate over the sites;
with the sites as parameters, p(sites | sd) has no maximum (it rises without end as sd falls to 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, substitute, trace

from flowme.study import Study

__all__ = ["group_effects"]


def group_effects(
    model: Callable, study: Study, names: Iterable[str], among: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Of the latent sites `names`, those whose law depends on others: name -> which of `among`.

    Found by drawing: a law whose parameters change when another site's value does.
    """
    names, among = tuple(names), tuple(among)
    if not names:
        return {}
    data: dict[str, Any] = {}
    one, other = (_laws(model, study, data, jax.random.key(k)) for k in range(2))
    if all(_same(one[name][1], other[name][1]) for name in names):
        return {}
    data = {name: one[name][0] for name in among}
    found: dict[str, tuple[str, ...]] = {}
    here = _laws(model, study, data, jax.random.key(0))
    for moved in among:
        there = _laws(model, study, {**data, moved: other[moved][0]}, jax.random.key(0))
        for name in names:
            if not _same(here[name][1], there[name][1]):
                found[name] = (*found.get(name, ()), moved)
    return found


@partial(jax.jit, static_argnums=0)
def _laws(model: Callable, study: Study, data: dict[str, Any], key: jax.Array):
    """Value and parameters of the law of every latent site; XLA drops all else of the model."""
    with validation_enabled(False):
        sites = trace(seed(substitute(model, data=data), key)).get_trace(study)
    return {
        name: (site["value"], jax.tree.leaves(site["fn"]))
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def _same(one: list[Any], other: list[Any]) -> bool:
    return all(map(partial(np.array_equal, equal_nan=True), one, other))
