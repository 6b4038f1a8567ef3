"""A fit as a table to read aloud."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC

from flowme.convert import Names, reported
from flowme.infer.doubts import shrinkage
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.predict import Estimate, Result, estimate, mcmc_draws
from flowme.quick import soon
from flowme.study import Study
from flowme.table import counted


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What an estimation found; `print` it.

    Attributes:
        frame: a row for each population parameter: estimate, standard error (SE), relative
            standard error (RSE, %), on request robust SE, and unit; for an MCMC run posterior
            mean, SD, 5 % and 95 % quantiles, effective sample size (ESS) and R-hat.
        effects: a row for each random effect: mean, SD, skewness and excess kurtosis (0 for a
            Gaussian) of its fitted distribution (for an MCMC run, at the posterior mean), and
            shrinkage, 1 - Var(m_i)/Var(η) (%), m_i being the means of the conditional
            distributions.
        footer: likelihood, criteria, size of the study, convergence.
    """

    frame: pd.DataFrame
    effects: pd.DataFrame
    footer: tuple[str, ...]

    def __str__(self) -> str:
        tables = [_table("Population parameter", self.frame), _table("Random effect", self.effects)]
        return "\n\n".join([*tables, "\n".join(self.footer)])

    __repr__ = __str__


def summary(result: Result, *, robust: bool = False) -> Summary:
    """The estimates of a fit or an MCMC run, and how far to trust them.

    Standard errors are √(G I⁻¹ Gᵀ), the delta method with the observed information I; under
    `use_priors` that of the posterior density.

    Args:
        result: a `Fit`, or a NumPyro `MCMC` that was run on `model(study)`.
        robust: add standard errors by the sandwich I⁻¹ J I⁻¹, J the outer product of the subjects'
            scores. Where they differ much from the others, the model is wrong somewhere or
            subjects are few.
    """
    point = estimate(result)
    if isinstance(result, Fit):
        return Summary(_fit_frame(result, robust), _effects(point), _fit_footer(result))
    return Summary(_mcmc_frame(result), _effects(point), _mcmc_footer(result, point))


# Rows of the population parameters.


def _fit_frame(fit: Fit, robust: bool) -> pd.DataFrame:
    joint = fit.joint

    def values(theta):
        return _numbers(joint, fit.study, joint.constrain(theta))

    found, slope = np.asarray(values(fit.theta)), np.asarray(jax.jacobian(values)(fit.theta))

    def errors(covariance):
        if covariance is None:
            return np.full(found.shape, np.nan)
        return np.sqrt(np.einsum("ra,ab,rb->r", slope, covariance, slope))

    error = errors(fit.covariance())
    with np.errstate(divide="ignore"):  # an estimate of 0 has no relative error: infinite
        relative = 100 * error / np.abs(found)
    columns = {"estimate": found, "SE": error, "RSE (%)": relative}
    if robust:
        columns["robust SE"] = errors(fit.covariance(robust=True))
    return _frame(joint, fit.study, columns)


def _mcmc_frame(mcmc: MCMC) -> pd.DataFrame:
    draws = mcmc_draws(mcmc)

    def values(theta):
        return _numbers(draws.joint, draws.study, draws.joint.constrain(theta))

    found = np.asarray(jax.vmap(jax.vmap(values))(draws.theta))  # [chain, draw, row]
    quantiles = np.quantile(found, [0.05, 0.95], axis=(0, 1))
    columns = {
        "mean": found.mean((0, 1)),
        "SD": found.std((0, 1), ddof=1),
        "5 %": quantiles[0],
        "95 %": quantiles[1],
        "ESS": effective_sample_size(found),
        "R-hat": split_gelman_rubin(found),
    }
    return _frame(draws.joint, draws.study, columns)


def _frame(joint: Joint, study: Study, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    rows = list(_rows(joint, study))
    index = pd.Index([label for label, *_ in rows], name="parameter")
    return pd.DataFrame({**columns, "unit": [unit for _, unit, _ in rows]}, index=index)


def _numbers(joint: Joint, study: Study, values: dict[str, jax.Array]) -> jax.Array:
    """The value of each row, `[row]`."""
    found = reported(joint, values)
    return jnp.array([found[name][cell] for _, _, (name, cell) in _rows(joint, study)])


def _rows(joint: Joint, study: Study) -> Iterator[tuple[str, str, tuple[str, tuple[int, ...]]]]:
    """Label, unit, and (site, cell of its array) of each row."""
    parameters, dims, coords, units = Names.of(joint, study)
    for name in parameters:
        axes = [[str(c) for c in coords[dim]] for dim in dims[name]]
        correlation = len(dims[name]) > 1 and dims[name][-1] == f"{dims[name][-2]}_bis"
        site = joint.roles.population.get(name)
        for cell in itertools.product(*map(range, map(len, axes))):
            if correlation and cell[-2] <= cell[-1]:
                continue
            where = [
                f"group {axis[k]}" if "component" in dim else axis[k]
                for dim, axis, k in zip(dims[name], axes, cell, strict=True)
            ]
            if correlation:
                where[-2:] = where[:-3:-1]  # as in corr(ka, V): in the order of the effects
            label = (site.label if site else "") or _plain(joint, name)
            yield (f"{label}({', '.join(where)})" if where else label), units[name], (name, cell)


# What the learned parameters of distributions are called in prose.
_PLAIN = {"probs": "share", "locs": "mean", "df": "degrees of freedom"}


def _plain(joint: Joint, name: str) -> str:
    for effect in joint.roles.effects:
        if name.startswith(f"{effect}_"):
            parameter = name.removeprefix(f"{effect}_")
            text = _PLAIN.get(parameter, parameter)
            return text if len(joint.roles.effects) == 1 else f"{text} of {effect}"
    return name


# Random effects.


def _effects(point: Estimate) -> pd.DataFrame:
    """Moments of the law at the estimate: skewness and kurtosis from 50 000 draws."""
    joint, study = point.joint, point.study
    each = -(-50_000 // study.subjects.size)
    found = _law(joint, each, jax.random.key(0), point.theta, point.weights, study)
    draws, (mean, covariance) = jax.tree.map(np.asarray, found)
    shrunk = shrinkage(joint, np.asarray(point.eta), np.diag(covariance))
    first = [columns[0] for _, columns, _ in joint.roles.reported()]
    draws = draws.reshape(-1, joint.effect_size)[:, first]
    z = (draws - draws.mean(0)) / draws.std(0)
    columns = {
        "mean": mean[first],
        "SD": np.sqrt(np.diag(covariance))[first],
        "skewness": (z**3).mean(0),
        "excess kurtosis": (z**4).mean(0) - 3,
        "shrinkage (%)": 100 * np.array(list(shrunk.values())),
    }
    return pd.DataFrame(columns, index=pd.Index(shrunk, name="effect"))


@partial(soon, static_argnums=(0, 1))
def _law(joint: Joint, each: int, key, theta, weights, study: Study) -> Any:
    """Draws `[draw, subject, effect]` and moments of the law of the random effects."""
    at = (theta, weights, study)
    return joint.sample_effects(key, *at, each), joint.effect_moments(key, *at)


# What stands below the tables.


def _fit_footer(fit: Fit) -> tuple[str, ...]:
    method = "maximum a posteriori" if fit.use_priors else "maximum likelihood"
    if fit.weights:
        method = f"penalised {method}, stopped on held-out subjects"
    criteria = f", AIC {fit.aic:.2f}, BIC {fit.bic:.2f}"
    lines = [
        f"-2 log-likelihood {fit.minus_two_ll:.2f} ({fit.method}, error "
        f"{fit.minus_two_ll_se:.2f})"
        + ("" if fit.weights else criteria),  # a penalised weight is less than a parameter
        f"{_size(fit.study)}; {fit.joint.size} estimated parameters"
        + (f" and {fit.parameter_count - fit.joint.size} flow weights" if fit.weights else ""),
        f"Estimated by {method}: {'converged' if fit.converged else 'NOT CONVERGED'}"
        + (f" ({fit.seconds})." if fit.seconds else "."),
    ]
    if fit.selection is not None and fit.selected is not None:
        near = slice(max(1, fit.selected - 2), fit.selected + 3)
        lines.append(
            "Subjects held out ask for no more than the Gaussian, which was kept."
            if fit.selected == 0
            else "Subjects held out: the learned distribution changes -2 log-likelihood by "
            f"{-2 * fit.selection[near].mean():+.1f} against the Gaussian "
            f"(learning stopped after {fit.selected - 1} updates)."
        )
    if fit.weights and fit.covariance() is not None:
        lines.append("Standard errors hold the flow's weights fixed.")
    correlation = fit.correlation()
    if correlation is None:
        lines.append("No standard errors: the information matrix is not positive definite.")
    elif fit.joint.size > 1:
        lines.append(
            f"Condition number of the correlations of estimates {correlation.condition_number:.1f}."
        )
    return (*lines, *fit.messages)


def _mcmc_footer(mcmc: MCMC, point: Estimate) -> tuple[str, ...]:
    diverging = int(np.sum(mcmc.get_extra_fields()["diverging"]))
    transitions = "transition" if diverging == 1 else "transitions"
    messages = getattr(mcmc, "messages", ())  # of flowme.nuts
    missed = " (the posterior is not explored fully: raise target_accept_prob)"
    return (
        f"{_size(point.study)}; {mcmc.num_chains} chains of {mcmc.num_samples} draws",
        f"Posterior by {type(mcmc.sampler).__name__}: {diverging} divergent {transitions}"
        + (missed if diverging and not messages else ""),
        *messages,
    )


def _size(study: Study) -> str:
    observations = sum(int(np.sum(mask)) for mask in study.observed.values())
    return f"{counted(study.subjects.size, 'subject')}, {counted(observations, 'observation')}"


# The printed table.


def _table(title: str, frame: pd.DataFrame) -> str:
    """Columns aligned, numbers to the right."""
    columns = [[title, *map(str, frame.index)]]
    for name, values in frame.items():
        cells = [value if isinstance(value, str) else _number(str(name), value) for value in values]
        if any(cells):
            columns.append([str(name), *cells])
    left = [True, *(name == "unit" for name, *_ in columns[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _number(column: str, value: Any) -> str:
    """Four significant digits; percentages, moments and counts as one reads them."""
    if not np.isfinite(value):
        return "-"
    if column in ("skewness", "excess kurtosis"):
        return f"{value:.2f}".replace("-0.00", "0.00")
    if column.endswith("(%)"):
        return f"{value:.1f}"
    if column == "ESS":
        return f"{value:.0f}"
    if column == "R-hat":
        return f"{value:.3f}"
    if abs(value) < 1e-8:
        return "0"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:#.4g}"
