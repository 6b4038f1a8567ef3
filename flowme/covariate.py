"""Effects of covariates on individual parameters, as factors and terms of plain NumPyro maths.

    CL_i = CL · (WT_i / 70)^β · exp(γ_SEX(i) + η_i)

is written

    WT = fm.covariate.power(study.covariates["WT"], beta, reference=70.0)
    CL = CL * WT * jnp.exp(fm.covariate.by_level(study, "SEX", gamma) + eta.CL)

with `beta` and `gamma` population parameters. Population parameters stay mu-referenced beside
them: CL is still the typical value, of a subject at the reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowme.study import Study

__all__ = ["additive", "by_level", "exponential", "indicators", "power"]


def power(x: ArrayLike, beta: ArrayLike, reference: ArrayLike) -> jax.Array:
    """(x / reference)^beta: a factor that is 1 at the reference.

    Args:
        x: a positive covariate, `[subject]` or `[subject, time]`.
        beta: exponent, dimensionless (.75 for clearance by body weight in allometry, 1 for
            volume).
        reference: a positive value in the unit of x, near the middle of the covariate.

    Raises:
        ValueError: x or the reference is not positive.
    """
    for what, value in (("x", x), ("reference", reference)):
        known = _known(value)
        if known is not None and not np.all(known > 0):
            raise ValueError(
                f"expected {what} of a power positive; got {known[~(known > 0)].flat[0]:g}. Use "
                "covariate.exponential for a covariate that may be 0 or below."
            )
    return (jnp.asarray(x) / reference) ** beta


def exponential(x: ArrayLike, beta: ArrayLike, reference: ArrayLike) -> jax.Array:
    """exp(beta (x - reference)): a factor that is 1 at the reference.

    Args:
        x: a covariate, `[subject]` or `[subject, time]`.
        beta: relative change per unit of x.
        reference: a value in the unit of x, near the middle of the covariate.

    Raises:
        ValueError: x or the reference is not finite.
    """
    return jnp.exp(additive(x, beta, reference))


def additive(x: ArrayLike, beta: ArrayLike, reference: ArrayLike) -> jax.Array:
    """beta (x - reference): a term that is 0 at the reference.

    Args:
        x: a covariate, `[subject]` or `[subject, time]`.
        beta: change per unit of x, in the unit of the parameter.
        reference: a value in the unit of x, near the middle of the covariate: the population
            parameter is the typical value there. Far from all subjects the two are hard to tell
            apart.

    Raises:
        ValueError: x or the reference is not finite.
    """
    for what, value in (("x", x), ("reference", reference)):
        known = _known(value)
        if known is not None and not np.all(np.isfinite(known)):
            raise ValueError(f"expected {what} of a covariate effect finite; got {known}.")
    return jnp.asarray(beta) * (jnp.asarray(x) - reference)


def by_level(study: Study, name: str, betas: ArrayLike) -> jax.Array:
    """The term of each subject's level: 0 for the first one, the reference, `betas` of the others.

    Args:
        study: the study.
        name: a categorical covariate of it, see `Study.from_frame`.
        betas: `[level - 1]`, in the order of `study.levels[name]` after the first; a number where
            there are two levels. For a term other than 0 of the first level, write a population
            parameter.

    Returns:
        `[subject]`, or `[subject, time]` if the covariate changes in time; in the unit of betas.
        NaN for a code that has none (a study coded by other levels: `Study.with_levels`).

    Raises:
        ValueError: the covariate is not categorical, or the number of betas is another one.
    """
    levels = _levels(study, name)
    betas = jnp.atleast_1d(jnp.asarray(betas, float))
    if betas.shape != (len(levels) - 1,):
        raise ValueError(
            f"expected {len(levels) - 1} betas for {name!r}, one for each level but the first of "
            f"{list(levels)}; got shape {list(betas.shape)}."
        )
    terms = jnp.concatenate([jnp.zeros(1), betas])
    return terms.at[study.covariates[name]].get(mode="fill", fill_value=jnp.nan)


def indicators(study: Study, name: str) -> jax.Array:
    """The level of each subject as columns of 0 and 1, one for each level but the first: what a
    conditional flow reads (`FlowRandomEffect(..., context=...)`).

    Args:
        study: the study.
        name: a categorical covariate of it.

    Returns:
        `[subject, level - 1]`, or `[subject, time, level - 1]` if the covariate changes in time.

    Raises:
        ValueError: the covariate is not categorical.
    """
    others = jnp.arange(1, len(_levels(study, name)))
    return (jnp.asarray(study.covariates[name])[..., None] == others).astype(float)


def _levels(study: Study, name: str) -> tuple[Any, ...]:
    if name not in study.levels:
        raise ValueError(
            f"expected a categorical covariate of the study, one of {sorted(study.levels)}; got "
            f"{name!r}. Read the table with categorical={name!r}."
        )
    return study.levels[name]


def _known(value: Any) -> np.ndarray | None:
    """The numbers, where they are known before the program runs."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value, float)
