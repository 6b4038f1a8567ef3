"""Structural models in closed form: individual parameters and doses to concentrations."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowme.disposition import modes
from flowme.structural import check_psi
from flowme.study import Study
from flowme.where import where

__all__ = [
    "iv_one_compartment",
    "iv_three_compartment",
    "iv_two_compartment",
    "oral_one_compartment",
    "oral_three_compartment",
    "oral_two_compartment",
]


def iv_one_compartment(psi: Any, study: Study) -> Array:
    r"""Concentration of a drug that is given into one compartment, by bolus or infusion.

    The sum over the doses before t of, for a bolus and an infusion of duration T,

    .. math:: C(t) = \frac{D}{V} e^{-k \tau}, \qquad
        C(t) = \frac{D}{V T} \int_0^{\min(\tau, T)} e^{-k (\tau - s)} ds, \qquad
        k = CL / V, \quad \tau = t - t_d.

    At steady state (SS = 1) the doses at :math:`t_d - II, t_d - 2 II, \dots` are added, by their
    geometric series. Of any order of derivative, without overflow for any positive parameters.

    Args:
        psi: individual parameters `CL` (volume/time), `V` (volume), `[subject]`. If there are
            `lag` (time, 0 or more) and `F` (bioavailability), the doses into compartment 1 come
            later by `lag`, and only their part `F` arrives; an infusion whose rate is known then
            has that rate for another time.
        study: a `Study` with doses into compartment 1.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`. NaN for a subject with an infusion
        that, by `F`, outlasts its interval at steady state.

    Raises:
        ValueError: if a parameter is not `[subject]`, or a dose goes into another compartment.

    References:
        Bertrand and Mentré, Mathematical expressions of the pharmacokinetic and pharmacodynamic
        models implemented in the Monolix software (2008).
    """
    return _concentration("iv_one_compartment", psi, study, ("CL", "V"), oral=False)


def iv_two_compartment(psi: Any, study: Study) -> Array:
    r"""Concentration in the central of two compartments, the drug being given into it.

    As `iv_one_compartment`, with a sum of two exponentials instead of one, for

    .. math:: \frac{dA_1}{dt} = r - \frac{CL + Q_2}{V_1} A_1 + \frac{Q_2}{V_2} A_2, \qquad
        \frac{dA_2}{dt} = \frac{Q_2}{V_1} A_1 - \frac{Q_2}{V_2} A_2, \qquad C = A_1 / V_1.

    Args:
        psi: individual parameters `CL`, `Q2` (volume/time), `V1`, `V2` (volume), `[subject]`; and
            `lag`, `F` if there are any.
        study: a `Study` with doses, boluses or infusions, into compartment 1.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: as `iv_one_compartment`.
    """
    return _concentration("iv_two_compartment", psi, study, ("CL", "V1", "Q2", "V2"), oral=False)


def iv_three_compartment(psi: Any, study: Study) -> Array:
    """Concentration in the central of three compartments, the drug being given into it.

    As `iv_two_compartment`, with another peripheral compartment that exchanges with the central
    one. Derivatives are right up to the third.

    Args:
        psi: individual parameters `CL`, `Q2`, `Q3` (volume/time), `V1`, `V2`, `V3` (volume),
            `[subject]`; and `lag`, `F` if there are any.
        study: a `Study` with doses, boluses or infusions, into compartment 1.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: as `iv_one_compartment`.
    """
    names = ("CL", "V1", "Q2", "V2", "Q3", "V3")
    return _concentration("iv_three_compartment", psi, study, names, oral=False)


def oral_one_compartment(psi: Any, study: Study) -> Array:
    r"""Concentration of a drug that is absorbed at first order into one compartment.

    The sum over the doses before t of

    .. math:: C(t) = \sum_d \frac{D_d\, k_a}{V (k_a - k)}
        \left(e^{-k (t - t_d)} - e^{-k_a (t - t_d)}\right), \qquad k = CL / V,

    smooth through :math:`k_a = k` and without overflow for any positive parameters. Steady states
    are as in `iv_one_compartment`.

    Args:
        psi: individual parameters `ka` (1/time), `V` (volume), `CL` (volume/time), `[subject]`;
            `lag` and `F` of the doses into compartment 1, if there are any.
        study: a `Study` whose doses are boluses into compartment 1, which absorbs, or boluses and
            infusions into the central compartment 2. Under `jax.jit` the doses cannot be read, so
            there a subject with an infusion into compartment 1 is predicted as NaN.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: if a parameter is not `[subject]`, a dose goes elsewhere than compartments 1
            and 2, or a dose into compartment 1 is an infusion.
    """
    return _concentration("oral_one_compartment", psi, study, ("CL", "V"), oral=True)


def oral_two_compartment(psi: Any, study: Study) -> Array:
    """Concentration in the central of two compartments, into which the drug is absorbed.

    First-order absorption, as in `oral_one_compartment`, and the disposition of
    `iv_two_compartment`.

    Args:
        psi: individual parameters `ka` (1/time), `CL`, `Q2` (volume/time), `V1`, `V2` (volume),
            `[subject]`; and `lag`, `F` if there are any.
        study: a `Study` with doses as in `oral_one_compartment`.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: as `oral_one_compartment`.
    """
    return _concentration("oral_two_compartment", psi, study, ("CL", "V1", "Q2", "V2"), oral=True)


def oral_three_compartment(psi: Any, study: Study) -> Array:
    """Concentration in the central of three compartments, into which the drug is absorbed.

    First-order absorption, as in `oral_one_compartment`, and the disposition of
    `iv_three_compartment`.

    Args:
        psi: individual parameters `ka` (1/time), `CL`, `Q2`, `Q3` (volume/time), `V1`, `V2`, `V3`
            (volume), `[subject]`; and `lag`, `F` if there are any.
        study: a `Study` with doses as in `oral_one_compartment`.

    Returns:
        Concentration (dose unit / volume), `[subject, time]`.

    Raises:
        ValueError: as `oral_one_compartment`.
    """
    names = ("CL", "V1", "Q2", "V2", "Q3", "V3")
    return _concentration("oral_three_compartment", psi, study, names, oral=True)


def _concentration(model: str, psi: Any, study: Study, names: Sequence[str], oral: bool) -> Array:
    """The sum over doses and exponentials; `names` are CL, V of the central, and (Q, V) pairs."""
    optional = [name for name in ("lag", "F") if getattr(psi, name, None) is not None]
    wanted = (*names, *(["ka"] if oral else []), *optional)
    check_psi({name: getattr(psi, name) for name in wanted}, study)
    _check_doses(model, study, oral)
    values = {name: jnp.expand_dims(getattr(psi, name), (1, 2)) for name in wanted}
    clearance, volume, *rest = (values[name] for name in names)
    exchange = [(q / volume, q / v) for q, v in zip(rest[::2], rest[1::2], strict=True)]
    given = _given(study, values.get("lag"), values.get("F"), jnp.result_type(float, clearance))
    if oral and given.length is not None:
        infused = (study.doses.compartment[:, None, :] == 1) & (given.length > 0)
        given = given._replace(amount=where(infused, jnp.nan, given.amount))
    total: Any = 0.0
    for mode in modes(clearance / volume, exchange):
        if not oral:
            total += mode.weight * _central(mode.rate, given)
            continue
        into_gut = jnp.asarray(study.doses.compartment)[:, None, :] == 1
        response = _absorbed(values["ka"], mode.rate, given)
        if 2 in study.compartments:
            response = where(into_gut, response, _central(mode.rate, given))
        total += mode.weight * response
    return (given.amount / volume * total).sum(axis=-1)


class _Given(NamedTuple):
    """Doses as the records see them, each of a shape that broadcasts to [subject, time, dose].

    A dose not yet given, or undone by a reset, has amount 0.
    """

    amount: Array
    elapsed: Array  # since it arrived
    length: Array | None  # of its infusion, 0 for a bolus; None if the study has no infusion
    interval: Array | None  # of its steady state, else 0; None if the study has no steady state


def _given(study: Study, lag: Array | None, bioavailability: Array | None, dtype: Any) -> _Given:
    doses, time = study.doses, jnp.expand_dims(study.time, 2)
    amount, start, rate, duration, interval, compartment, first = (
        jnp.expand_dims(x, 1)
        for x in (
            doses.amount,
            doses.time,
            doses.rate,
            doses.duration,
            doses.interval,
            doses.compartment,
            study.events.dose,
        )
    )
    elapsed = (time - start).astype(dtype)
    seen = jnp.arange(study.time.shape[1])[:, None] >= first
    if lag is not None:
        elapsed = elapsed - where(compartment == 1, lag, 0)
        before = elapsed < 0
        if doses.steady.shape[1]:  # the doses before the one that begins it
            back = where(interval > 0, interval, 1)
            since = elapsed - back * jnp.floor(elapsed / back)
            elapsed = where(before & (interval > 0), since, elapsed)
            before &= interval == 0
        seen &= ~before
    if doses.resets.shape[1]:
        seen &= _together(study)
    if bioavailability is not None:
        amount = amount * where(compartment == 1, bioavailability, 1)
    length = None
    if doses.infusions.shape[1]:
        length = where(rate > 0, amount / where(rate > 0, rate, 1), duration).astype(dtype)
        amount = where((interval > 0) & (length > interval), jnp.nan, amount)
    return _Given(
        amount=where(seen, amount, 0).astype(dtype),
        elapsed=where(seen, elapsed, 0),
        length=length,
        interval=interval.astype(dtype) if doses.steady.shape[1] else None,
    )


def _together(study: Study) -> Array:
    """True where a dose and a record have no reset between them, [subject, time, dose]."""
    resets, first = jnp.asarray(study.doses.resets), jnp.asarray(study.events.dose)
    real = resets >= 0
    begins = jnp.take_along_axis(first, jnp.maximum(resets, 0), axis=1)
    record = jnp.arange(study.time.shape[1])[None, :, None]
    dose = jnp.arange(first.shape[1])[None, :, None]
    record_period = ((record >= begins[:, None, :]) & real[:, None, :]).sum(axis=-1)
    dose_period = ((dose >= resets[:, None, :]) & real[:, None, :]).sum(axis=-1)
    return record_period[:, :, None] == dose_period[:, None, :]


def _central(k: Array, given: _Given) -> Array:
    """Response of exp(-k t) to a unit dose into it, [subject, time, dose]."""
    _, elapsed, length, interval = given
    on = jnp.zeros_like(elapsed) if length is None else jnp.minimum(elapsed, length)
    response = jnp.exp(-k * (elapsed - on))
    if length is not None:
        part = where(length > 0, on / where(length > 0, length, 1), 1)
        response = part * _relative_decay(k * on) * response
    if interval is not None:
        whole = 0.0 if length is None else length
        safe = where(interval > 0, interval, 1)
        earlier = jnp.exp(-k * (elapsed + safe - whole)) / _lost(k * safe)
        if length is not None:
            earlier = earlier * _relative_decay(k * length)
        response = response + where(interval > 0, earlier, 0)
    return response


def _absorbed(ka: Array, k: Array, given: _Given) -> Array:
    """Response of exp(-k t) to a unit dose that is absorbed into it at rate ka."""
    # The expression is symmetric in (ka, k). Selecting (not min/abs, whose kinks spoil second
    # derivatives) keeps every exponent negative.
    less = ka < k
    slow, fast = where(less, ka, k), where(less, k, ka)

    def after(t: Array) -> Array:
        return t * jnp.exp(-slow * t) * _relative_decay((fast - slow) * t)

    response = after(given.elapsed)
    if given.interval is not None:
        safe = where(given.interval > 0, given.interval, 1)
        left = jnp.exp(-fast * given.elapsed) * after(safe) / _lost(fast * safe)
        repeated = (response + left) / _lost(slow * safe)
        response = where(given.interval > 0, repeated, response)
    return ka * response


def _lost(x: Array) -> Array:
    """1 - exp(-x) for x >= 0, with accurate derivatives."""
    return x * _relative_decay(x)


def _relative_decay(x: Array) -> Array:
    """(1 - exp(-x)) / x for x >= 0, with accurate derivatives at and near 0."""
    return _decay(0, x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decay(n: int, x: Array) -> Array:
    """The integral of sⁿ exp(-s x) for s from 0 to 1, x >= 0; its derivative is minus the next."""
    near = x < 0.1  # where ten terms of its series are exact to double precision
    small, large = where(near, -x, 0), where(near, 1, x)  # neither branch makes a NaN
    series: Any = 1 / (math.factorial(9) * (n + 10))
    for m in reversed(range(9)):
        series = series * small + 1 / (math.factorial(m) * (n + m + 1))
    left = jnp.exp(-large)
    far = (1 - left) / large
    for k in range(1, n + 1):
        far = (k * far - left) / large
    return where(near, series, far)


@_decay.defjvp
def _(n: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _decay(n, *primals), -_decay(n + 1, *primals) * tangents[0]


def _check_doses(model: str, study: Study, oral: bool) -> None:
    """Refuses doses that the model has no place for."""
    places = (1, 2) if oral else (1,)
    named = "1 and 2" if oral else "1"
    for compartment in study.compartments:
        if compartment not in places:
            raise ValueError(
                f"{model}: expected doses into compartment {named} only; got a dose into "
                f"compartment {compartment}{study.row_of_dose(compartment)}. Write the model as an "
                "ODE and use fm.solve."
            )
    doses = study.doses
    if not oral or isinstance(doses.amount, jax.core.Tracer):
        return
    infused = (doses.rate > 0) | (doses.duration > 0)
    wrong = np.argwhere(infused & (doses.compartment == 1))
    if wrong.size:
        raise ValueError(
            f"{model}: expected bolus doses (rate 0) into compartment 1, which absorbs; got an "
            f"infusion for subject {study.ids[wrong[0, 0]]!r}. Give it into compartment 2, or "
            "write the model as an ODE and use fm.solve."
        )
