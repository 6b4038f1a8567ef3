"""Structural models in closed form: individual parameters and doses to predictions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowme.structural import check_psi
from flowme.study import Study

__all__ = ["oral_one_compartment"]

# (1 - exp(-x)) / x = sum_n (-x)^n / (n + 1)!; 10 terms are exact to double precision below 1/10.
_SERIES = tuple((-1) ** n / math.factorial(n + 1) for n in range(10))


def oral_one_compartment(psi: Any, study: Study) -> Array:
    r"""Concentration of a drug that is absorbed at first order into one compartment.

    The sum over the doses before t of

    .. math:: C(t) = \sum_d \frac{D_d\, k_a}{V (k_a - k)}
        \left(e^{-k (t - t_d)} - e^{-k_a (t - t_d)}\right), \qquad k = CL / V,

    smooth through :math:`k_a = k` and without overflow for any positive parameters.

    Args:
        psi: individual parameters `ka` (1/time), `V` (volume), `CL` (volume/time), `[subject]`.
        study: a `Study` whose doses are boluses into compartment 1. Under `jax.jit` the doses
            cannot be read, so there a subject with an infusion is predicted as NaN.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: if a parameter is not `[subject]`, a dose goes elsewhere than compartment 1,
            or a dose is an infusion.
    """
    check_psi({"ka": psi.ka, "V": psi.V, "CL": psi.CL}, study)
    doses = study.doses
    if set(study.compartments) - {1}:
        raise ValueError(
            "oral_one_compartment: expected doses into compartment 1 only; got compartments "
            f"{tuple(study.compartments)}. Write the model as an ODE and use fm.solve."
        )
    if not isinstance(doses.rate, jax.core.Tracer) and np.any(np.asarray(doses.rate) > 0):
        row = int(np.argwhere(np.asarray(doses.rate) > 0)[0, 0])
        raise ValueError(
            "oral_one_compartment: expected bolus doses (rate 0); got an infusion for subject "
            f"{study.ids[row]!r}. Write the model as an ODE and use fm.solve."
        )
    ka, k, volume = (jnp.asarray(x)[:, None, None] for x in (psi.ka, psi.CL / psi.V, psi.V))
    # [subject, time, dose]. A dose not yet given stands at elapsed = 0, where it adds exactly 0.
    elapsed = jnp.asarray(study.time)[:, :, None] - jnp.asarray(doses.time)[:, None, :]
    elapsed = jnp.maximum(elapsed.astype(jnp.result_type(float, ka)), 0)
    amount = jnp.where(doses.rate > 0, jnp.nan, doses.amount) * doses.given
    # The expression is symmetric in (ka, k). Selecting (not min/abs, whose kinks spoil second
    # derivatives) keeps every exponent negative.
    slow, fast = jnp.where(ka < k, ka, k), jnp.where(ka < k, k, ka)
    shape = elapsed * jnp.exp(-slow * elapsed) * _relative_decay((fast - slow) * elapsed)
    return (amount.astype(elapsed.dtype)[:, None, :] * ka / volume * shape).sum(axis=-1)


def _relative_decay(x: Array) -> Array:
    """(1 - exp(-x)) / x for x >= 0, with two accurate derivatives at and near 0."""
    near = x < 0.1
    small, large = jnp.where(near, x, 0), jnp.where(near, 1, x)  # neither branch makes a NaN
    series = jnp.polyval(jnp.asarray(_SERIES[::-1], x.dtype), small)
    return jnp.where(near, series, (1 - jnp.exp(-large)) / large)
