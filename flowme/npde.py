"""Residuals of a fit: individual ones, and prediction distribution errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from scipy.special import ndtri, ndtri_exp

from flowme.censoring import Censored, log_tail
from flowme.infer.joint import Joint
from flowme.predict import Result, estimate, predict, simulate
from flowme.quick import soon
from flowme.study import Study

_COUNTED = 10_000  # beyond, a count has no IWRES: its shares would be too many terms
_ROOM = 10_000_000  # simulated observations held at a time


def npde(result: Result, key: jax.Array | None = None, *, replicates: int = 1000) -> pd.DataFrame:
    r"""IWRES and NPDE of every observation: N(0, 1) if the model is right.

    Individual weighted residuals are those of y given the conditional means of η,

    .. math:: IWRES_{ij} = \Phi^{-1} \{F(y_{ij} \mid \hat\eta_i)\},

    F being the distribution function of the outcome's law: (y - f)/sd where errors are normal, the
    same of log y where they are lognormal, of an autocorrelated error what is new in it. The less
    a subject's data say of η, the closer they are to 0 (ε-shrinkage).

    Prediction distribution errors compare y with `replicates` simulated studies of new subjects,
    whose η come from the fitted law, and do not know η: `npd` by the share of simulated values
    below y; `npde` after what was measured in a subject, and its simulations, are decorrelated by
    the correlation of the latter. (Of their normal scores, Φ⁻¹ of ranks, where Brendel et al. take
    the values: the same for normal ones, and counts, censored values and heavy tails have scores
    too.) So a wrong law of η shows in them, whatever its shape.

    Of a censored observation it is known between which shares it lies: it takes a random one
    between. Of counts and categories likewise.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        key: random key; `jax.random.key(0)` by default.
        replicates: simulated studies, at least 100 and twice the records of a subject: beyond
            ±Φ⁻¹(1 - 1/replicates) none can tell.

    Returns:
        A row for each observation: `subject`, `time`, `outcome`, `value`, `censored` (0, 1, -1),
        `pred` at η = 0, `ipred` at the conditional means, `iwres`, `npd`, `npde`. IWRES is not a
        number where a law has no distribution function, and of counts above 10 000.

    Raises:
        ValueError: too few replicates.

    References:
        Brendel et al. (2006), Pharm. Res. 23, 2036-2049. Nguyen, Comets & Mentré (2012), J.
        Pharmacokinet. Pharmacodyn. 39, 499-518 (censored data). Dunn & Smyth (1996), J. Comput.
        Graph. Stat. 5, 236-244.
    """
    point = estimate(result)
    study = point.study
    least = max(100, 2 * max(int(seen.sum(1).max()) for seen in study.observed.values()))
    if replicates < least:
        raise ValueError(f"expected at least {least} replicates; got {replicates}.")
    key_random, key_simulate = jax.random.split(jax.random.key(0) if key is None else key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key_random)))
    shares = _shares(point.joint, _largest(study), point.theta, point.weights, point.eta, study)
    own, typical = predict(result), predict(result, population=True)
    against = _against_simulated(key_simulate, rng, result, study, replicates)
    tables = []
    for name in point.joint.roles.outcomes:
        seen = study.observed[name]
        subject, _ = np.nonzero(seen)
        side = study.censored.get(name, np.zeros(seen.shape, int))
        columns = {
            "value": study.values[name],
            "censored": side,
            "pred": typical[name],
            "ipred": own[name],
            "iwres": _normal_score(rng, *jax.tree.map(np.asarray, shares[name])),
            "npd": against[name][0],
            "npde": against[name][1],
        }
        about = {"subject": np.asarray(study.ids)[subject], "time": study.time[seen]}
        rest = {column: np.asarray(x)[seen] for column, x in columns.items()}
        tables.append(pd.DataFrame({**about, "outcome": name, **rest}))
    return pd.concat(tables, ignore_index=True)


# Given the random effects.


def _largest(study: Study) -> int:
    """The largest value observed that may be a count whose shares are added up."""
    values = [v[study.observed[name]] for name, v in study.values.items()]
    return int(max((x for v in values for x in v if x <= _COUNTED), default=0.0))


_Share = tuple[Any, Any]  # log P(y < a) and log P(y > a)


@partial(soon, static_argnums=0)
def _shares(joint: Joint, largest, theta, weights, eta, study: Study) -> dict[str, Any]:
    """Between which shares of its law each observation lies: those of low and high, which are both
    y where it was measured."""
    sites = joint.sites(joint.constrain(theta), weights, eta, study)
    found = {}
    for name in joint.roles.outcomes:
        law, value = sites[name]["fn"], jnp.asarray(sites[name]["value"])
        while isinstance(law, dist.Independent | dist.MaskedDistribution):
            law = law.base_dist
        if law.is_discrete:
            known = jnp.where(value <= _COUNTED, 0.0, jnp.nan)
            shares = _of_count(law, value, largest)
            found[name] = jax.tree.map(lambda x, known=known: x + known, shares)
        elif isinstance(law, Censored):
            found[name] = _of_interval(law, value)
        else:
            found[name] = (_share(law, value),) * 2
    return found


def _share(law: Any, value: jax.Array) -> _Share:
    try:
        return log_tail(law, value, False), log_tail(law, value, True)
    except NotImplementedError:  # a law without a distribution function
        return (jnp.full(value.shape, jnp.nan),) * 2


def _of_interval(law: Censored, value: jax.Array) -> tuple[_Share, _Share]:
    """What is censored lies between its value and its limit, or the end of the law."""
    law, side, limit = law.base_dist, jnp.asarray(law.side), law.limit
    limit = jnp.full(value.shape, jnp.nan) if limit is None else jnp.asarray(limit)
    closed = law.support(limit) & jnp.where(side > 0, limit < value, limit > value)
    here, there = _share(law, value), _share(law, jnp.where(closed, limit, value))
    low = _chosen(side > 0, _chosen(closed, there, (-jnp.inf, 0.0)), here)
    high = _chosen(side < 0, _chosen(closed, there, (0.0, -jnp.inf)), here)
    return low, high


def _chosen(condition: jax.Array, a: _Share, b: _Share) -> _Share:
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def _of_count(law: Any, value: jax.Array, largest) -> tuple[_Share, _Share]:
    """Between P(k < y) and P(k <= y), of a law of 0, 1, 2, ...: its terms added up, those below y
    and those above (of which so many count as there are below the largest y, and a hundred)."""

    def add(k, sums):
        below, here, above = sums
        at = jnp.where(law.support(k), law.log_prob(jnp.full_like(value, k)), -jnp.inf)
        return (
            jnp.where(k < value, jnp.logaddexp(below, at), below),
            jnp.where(k == value, at, here),
            jnp.where(k > value, jnp.logaddexp(above, at), above),
        )

    none = jnp.full(jnp.shape(value), -jnp.inf)
    below, here, above = jax.lax.fori_loop(0, 2 * largest + 101, add, (none, none, none))
    return (below, jnp.logaddexp(here, above)), (jnp.logaddexp(below, here), above)


def _normal_score(rng: np.random.Generator, low: _Share, high: _Share) -> np.ndarray:
    """Φ⁻¹ of a random share between two, from the shorter tail."""
    (below_low, above_low), (below_high, above_high) = low, high
    at = rng.uniform(size=np.shape(below_low))
    with np.errstate(divide="ignore", invalid="ignore"):
        below = below_high + np.log(at + (1 - at) * np.exp(below_low - below_high))
        above = above_low + np.log(1 - at + at * np.exp(above_high - above_low))
        return np.where(below < above, ndtri_exp(below), -ndtri_exp(above))


# Among simulated studies.


def _against_simulated(key, rng, result: Result, study: Study, replicates: int):
    """`npd` and `npde` by outcome, `[subject, time]`, from some subjects at a time."""
    most = max(1, _ROOM // (replicates * study.time.shape[1]))
    rows = np.array_split(np.arange(study.subjects.size), -(-study.subjects.size // most))
    found: list[dict[str, tuple]] = []
    for number, own in enumerate(rows):
        some = study.subset(own)
        drawn = simulate(jax.random.fold_in(key, number), result, some, replicates=replicates)
        found.append({name: _errors(rng, some, name, x) for name, x in drawn.items()})
    return {
        name: tuple(np.concatenate(x) for x in zip(*(part[name] for part in found), strict=True))
        for name in found[0]
    }


def _errors(rng: np.random.Generator, study: Study, name: str, drawn: np.ndarray):
    """`npd` and `npde` of an outcome from its simulations `[replicate, subject, time]`."""
    seen = study.observed[name]
    value, side = study.values[name], study.censored.get(name, np.zeros(seen.shape, int))
    limit = study.limit.get(name, np.full(seen.shape, np.nan))
    drawn, value = np.where(seen, drawn, 0.0), np.where(seen, value, 0.0)
    below, upto = (drawn < value).mean(0), (drawn <= value).mean(0)
    with np.errstate(invalid="ignore"):
        closed = np.where(side > 0, limit < value, limit > value)
    beyond = np.where(closed, (drawn < np.where(closed, limit, 0.0)).mean(0), side < 0)
    low, high = np.where(side > 0, beyond, below), np.where(side < 0, beyond, upto)
    npd = ndtri(_inside(low + rng.uniform(size=seen.shape) * (high - low), len(drawn)))
    found = npd, _decorrelated(rng, seen, np.where(seen, npd, 0.0), drawn)
    return tuple(np.where(seen, x, np.nan) for x in found)


def _inside(share: np.ndarray, replicates: int) -> np.ndarray:
    """A share of so many simulations that is neither 0 nor 1."""
    return np.clip(share, 0.5 / replicates, 1 - 0.5 / replicates)


def _decorrelated(rng, seen: np.ndarray, npd: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """`npde`: normal scores, of observations and of simulations, multiplied subject by subject by
    the inverse of the Cholesky factor of the correlation of the latter; then Φ⁻¹ of the share of
    simulations below."""
    count = len(drawn)
    order = np.lexsort((rng.uniform(size=drawn.shape), drawn), axis=0)  # equal values at random
    levels = ndtri((np.arange(count) + 0.5) / count)
    scores = np.where(seen, (levels / levels.std())[np.argsort(order, axis=0)], 0.0)
    correlation = np.einsum("rst,rsu->stu", scores, scores) / count
    correlation += np.eye(seen.shape[1]) * ~seen[:, :, None]  # what was not measured
    inverse = np.linalg.inv(_factors(correlation))
    new = np.einsum("stu,su->st", inverse, npd)
    every = np.einsum("stu,rsu->rst", inverse, scores)
    # The factor fits the simulations better than what is new, the more records come before.
    before = (np.cumsum(seen, axis=1) - 1) / count
    new = new * np.sqrt((1 - before) / (1 + before))
    share = (every < new).mean(0)
    return np.where(np.isfinite(new), ndtri(_inside(share, count)), np.nan)


def _factors(matrices: np.ndarray) -> np.ndarray:
    """Cholesky factors; not a number of a matrix that has none."""
    try:
        return np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        if len(matrices) == 1:
            return np.full(matrices.shape, np.nan)
        return np.concatenate([_factors(part[None]) for part in matrices])
