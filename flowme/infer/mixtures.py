"""Gaussian mixtures as the law of the random effects, their number chosen by BIC."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pandas as pd

from flowme.effects import GaussianRandomEffect
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.vem import VariationalEM
from flowme.mixture_effect import MixtureRandomEffect
from flowme.primitives import replace_effect
from flowme.study import Study


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureFits:
    """Fits with 1, 2, ... components.

    Attributes:
        fits: by number of components.
        table: a row for each: parameters, -2LL, its Monte-Carlo error, AIC, BIC, converged.
    """

    fits: dict[int, Fit]
    table: pd.DataFrame

    @property
    def components(self) -> int:
        """The number with the lowest BIC."""
        return int(self.table["BIC"].idxmin())

    @property
    def best(self) -> Fit:
        """The fit with the lowest BIC."""
        return self.fits[self.components]


def mixture_by_bic(
    model: Callable,
    study: Study,
    key: jax.Array,
    components: Sequence[int] = (1, 2, 3, 4),
    *,
    full: bool = True,
    progress: bool = True,
    **options,
) -> MixtureFits:
    """Fit `model` with a Gaussian and with mixtures in the place of its law of random effects.

    BIC = -2LL + log(subjects) · parameters. It is not justified by the usual theory, a parameter
    of a superfluous component being on the boundary, but is consistent (Keribin 2000).

    Args:
        model: a model with one `random_effect` statement.
        study: the study.
        key: random key; is consumed.
        components: the numbers to try.
        full: learn a full covariance matrix for every component.
        progress: show progress bars.
        **options: of `VariationalEM`.
    """
    if not components or any(not isinstance(m, int) or m < 1 for m in components):
        raise ValueError(f"expected numbers of components, 1 or more each; got {components}.")
    effects = Joint.of(model, study).roles.effects
    if len(effects) != 1:
        raise ValueError(f"expected a model with one random_effect statement; got {list(effects)}.")
    ((site, names),) = effects.items()
    fits = {}
    for m, k in zip(components, jax.random.split(key, len(components)), strict=True):
        law = (
            GaussianRandomEffect(names, full=full)
            if m == 1
            else MixtureRandomEffect(names, m, full=full)
        )
        vem = VariationalEM(replace_effect(model, **{site: law}), **options)
        fits[m] = vem.run(k, study, progress=progress)
    rows = {
        m: {
            "parameters": fit.parameter_count,
            "-2LL": fit.minus_two_ll,
            "MC error": fit.minus_two_ll_se,
            "AIC": fit.aic,
            "BIC": fit.bic if np.isfinite(fit.bic) else np.inf,
            "converged": fit.converged,
        }
        for m, fit in fits.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "components"
    return MixtureFits(fits, table)
