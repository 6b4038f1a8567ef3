"""The laws that `compare` sets against each other, and one fold of the comparison."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpyro.distributions as dist

from flowme.effects import GaussianRandomEffect, RandomEffect, StudentTRandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.marginal import MarginalLikelihood, estimate_marginal
from flowme.infer.smoothed import BANDWIDTHS, smoothed_npmle
from flowme.infer.vem import VariationalEM
from flowme.mixture_effect import MixtureRandomEffect
from flowme.primitives import replace_effect
from flowme.study import Study

Build: TypeAlias = Callable[[jax.Array, Fit], Fit]
Law: TypeAlias = Any  # a distribution, site -> distribution, or a Build


class Rival(NamedTuple):
    """A law and how it is fitted: by `vem`, or by `build` from the fit of the first law."""

    described: str
    vem: VariationalEM | None
    build: Build | None = None


def rivals_of(model, study: Study, laws: Mapping[str, Law] | None, options) -> dict[str, Rival]:
    """The laws by name, default ones in place of None, each with what fits it."""
    effects = Joint.of(model, study).roles.effects
    if laws is None:
        laws = default_laws(model, study)
    if len(laws) < 2:
        raise ValueError(f"expected at least two laws, by name; got {list(laws)}.")
    rivals: dict[str, Rival] = {}
    for name, law in laws.items():
        if isinstance(law, dist.Distribution):
            if len(effects) != 1:
                raise ValueError(
                    f"expected law {name!r} to be a dict with a distribution for each "
                    f"random_effect statement of the model, {list(effects)}; got one distribution."
                )
            law = dict.fromkeys(effects, law)
        if isinstance(law, Mapping):
            if unknown := sorted(set(law) - set(effects)):
                raise ValueError(
                    f"expected law {name!r} to name random_effect statements of the model, "
                    f"{list(effects)}; got {unknown}."
                )
            what = ", ".join(f"{site} {type(d).__name__}" for site, d in law.items())
            rivals[name] = Rival(what, VariationalEM(replace_effect(model, **law), **options))
        elif callable(law) and rivals:
            rivals[name] = Rival("function", None, law)
        else:
            raise TypeError(
                f"expected law {name!r} to be a distribution, a dict of them, or (but for the "
                f"first) a function (key, fit) -> Fit; got {law!r}."
            )
    return rivals


def default_laws(model: Callable, study: Study) -> dict[str, Law]:
    """The laws that `compare` takes when it is given none, for a model with one `random_effect`."""
    roles = Joint.of(model, study).roles
    if len(roles.effects) != 1:
        raise ValueError(
            f"expected a model with one random_effect statement; got {list(roles.effects)}. Give "
            "`laws`: for each a dict with one distribution per statement."
        )
    ((site, names),) = roles.effects.items()
    own = roles.laws.get(site)
    sd = (
        np.sqrt(np.asarray(own.variance))
        if isinstance(own, RandomEffect)
        else np.full(len(names), 0.5)
    )
    return {
        "Gaussian": GaussianRandomEffect(names, full=True, omega=sd),
        "Student t": StudentTRandomEffect(names, full=True, omega=sd),
        **{
            f"mixture of {m}": MixtureRandomEffect(names, m, full=True, spread=2 * sd)
            for m in (2, 3, 4)
        },
        "flow": FlowRandomEffect(names, omega=sd),
        "smoothed NPMLE": _smoothed,
    }


def _smoothed(key: jax.Array, fit: Fit) -> Fit:
    """The smoothed NPMLE; one of its bandwidths is as wide as the Gaussian itself, so that it need
    not find anything where nothing is."""
    return smoothed_npmle(key, fit, bandwidths=(*BANDWIDTHS, 1.0)).fit


@dataclasses.dataclass(eq=False)
class Fold:
    """One fold: the subjects that laws are fitted to, and those they are judged on."""

    rivals: tuple[Rival, ...]
    keys: jax.Array  # [law]
    train: Study
    rest: Study
    own: np.ndarray  # the fold's subjects, the first ones of `rest`

    @classmethod
    def of(cls, study: Study, fold: np.ndarray, number: int, rivals, key: jax.Array) -> Fold:
        """The fold that leaves out the subjects with this number."""
        own, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        folds = fold.max() + 1
        spare = others[number : number + -(-len(fold) // folds) - len(own)]  # one at most
        return cls(
            rivals,
            jax.random.split(jax.random.fold_in(key, number), len(rivals)),
            study.subset(np.setdiff1d(others, spare)),
            study.subset(np.concatenate([own, spare])),
            own,
        )

    @cached_property
    def reference(self) -> Fit:
        """The fit of the first law."""
        return self._run(0)

    def _run(self, law: int) -> Fit:
        vem = self.rivals[law].vem
        assert vem is not None  # those without have `build`
        return vem.run(self.keys[law], self.train, progress=False)

    def judge(self, law: int, key: jax.Array) -> tuple[Fit, MarginalLikelihood, float]:
        """The fit of a law, log p(y_i) of `rest` under it, and CPU seconds; those of the fit that
        a function starts from are the first law's."""
        build = self.rivals[law].build
        first = self.reference if build is not None else None
        begun = time.process_time()
        if build is not None and first is not None:
            fit = build(self.keys[law], first)
        else:
            fit = self._run(law) if law else self.reference
        if any(message.startswith("stopped by the user") for message in fit.messages):
            raise KeyboardInterrupt
        found = estimate_marginal(key, fit.joint, fit.theta, fit.weights, self.rest)
        return fit, found, time.process_time() - begun
