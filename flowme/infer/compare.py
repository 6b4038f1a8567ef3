"""Laws of random effects compared on held-out subjects: does it take more than a Gaussian?

A law that learns much wins on the subjects that it has learned from, whatever the truth. So every
law is judged by subjects that its fit has not seen: with K folds over subjects, and θ̂_k, ŵ_k the
fit to those outside fold k, a law has the held-out log-likelihoods

    ℓ_i = log p(y_i; θ̂_k(i), ŵ_k(i)),      held-out -2LL = -2 Σ_i ℓ_i.

Two laws are compared subject by subject, which removes what makes all laws fail alike: with
d_i = -2 (ℓ_i - ℓ_i of the reference), the difference Σ_i d_i has the standard error √N · SD(d_i)
(Vehtari, Gelman & Gabry 2017, their eq. 24). It leaves out that the folds' fits share subjects.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from flowme.infer.joint import Joint
from flowme.infer.record import Record
from flowme.infer.rivals import Fold, Law, rivals_of
from flowme.study import Study


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Laws of random effects, judged on held-out subjects. Printed, it is a table and an answer.

    Attributes:
        laws: names of the laws; the first is the reference.
        log_likelihood: ℓ_i, `[law, subject]`; NaN where an interruption left it out.
        standard_error: Monte-Carlo standard errors of ℓ_i, `[law, subject]`.
        fold: the fold that leaves out each subject, `[subject]`.
        cpu_seconds: of fitting and judging, compilation included, `[law, fold]`.
        converged: whether each fit has converged, `[law, fold]`.
        messages: what the fits had to say, by law, each beginning with its fold.
    """

    laws: tuple[str, ...]
    log_likelihood: np.ndarray
    standard_error: np.ndarray
    fold: np.ndarray
    cpu_seconds: np.ndarray
    converged: np.ndarray
    messages: dict[str, tuple[str, ...]]

    @property
    def judged(self) -> np.ndarray:
        """The subjects that every law was judged on (every law at all, where interrupted),
        `[subject]`."""
        known = ~np.isnan(self.log_likelihood)
        return np.all(known[known.any(1)], axis=0) & known.any()

    @property
    def table(self) -> pd.DataFrame:
        """A row for each law: held-out -2LL, difference to the reference (negative is better), its
        standard error, Monte-Carlo error of -2LL, folds not converged, CPU seconds."""
        minus_two = -2 * self.log_likelihood[:, self.judged]
        with np.errstate(invalid="ignore"):  # impossible under both laws: inf - inf
            d = minus_two - minus_two[0]
            spread = np.std(d, axis=1, ddof=1) if d.shape[1] > 1 else np.full(len(d), np.nan)
        columns = {
            "held-out -2LL": minus_two.sum(1),
            "difference": d.sum(1),
            "SE": np.sqrt(d.shape[1]) * spread,
            "MC error": 2 * np.sqrt(np.sum(self.standard_error[:, self.judged] ** 2, axis=1)),
            "not converged": np.sum(~self.converged & ~np.isnan(self.cpu_seconds), axis=1),
            "CPU s": np.nansum(self.cpu_seconds, axis=1),
        }
        return pd.DataFrame(columns, index=pd.Index(self.laws, name="law"))

    @property
    def answer(self) -> str:
        """Whether another law than the reference is called for: one sentence.

        It is when the best one improves the held-out -2LL by more than two standard errors; being
        the best of several, it is a little flattered.
        """
        reference, others = self.laws[0], self.table.iloc[1:].dropna(subset=["difference", "SE"])
        if others.empty:
            return f"Nothing to compare: no subject was judged under {reference} and another law."
        best = others["difference"].idxmin()
        difference, error = others.loc[best, ["difference", "SE"]]
        size = f"the held-out -2LL by {abs(difference):.1f} ± {error:.1f}"
        if difference < -2 * error:
            return f"The population needs more than the {reference}: {best} improves {size}."
        verb = "improves" if difference < 0 else "worsens"
        return (
            f"The population is not shown to need more than the {reference}: the best other law, "
            f"{best}, {verb} {size}."
        )

    def __str__(self) -> str:
        count, size = int(self.judged.sum()), len(self.fold)
        text = f"{self.table.round(1).to_string()}\n{self.answer}"
        if count < size:
            text += f"\nInterrupted: these are {count} of {size} subjects."
        for law, some in self.messages.items():
            more = f" ({len(some) - 1} more in `messages`)" if len(some) > 1 else ""
            text += f"\n{law}, {some[0]}{more}"
        return text

    __repr__ = __str__


def compare(
    model: Callable,
    study: Study,
    key: jax.Array,
    laws: Mapping[str, Law] | None = None,
    *,
    folds: int = 5,
    path: str | Path | None = None,
    progress: bool = True,
    **options,
) -> Comparison:
    """Fit `model` under several laws of its random effects and judge each on held-out subjects.

    All folds train on the same number of subjects, so that every law is compiled once: where the
    folds are not of equal size, the smaller ones leave out one subject more than they judge.

    Args:
        model: a function of a study, with one `random_effect` statement unless `laws` names them.
        study: the study.
        key: random key; is consumed.
        laws: name -> law. A law is a distribution of the random effects; or one for each
            `random_effect` statement, by its name; or a function `(key, fit) -> Fit` of the
            training subjects' fit under the first law, which is the reference and no function.
            By default full Gaussian, Student t, mixtures of 2 to 4 Gaussians, flow, and
            smoothed NPMLE, with the model's own standard deviations to start from.
        folds: folds over subjects.
        path: a file (`.npz`) that keeps what is done; another call with the same arguments goes
            on from there, to the same result.
        progress: show a progress bar. Interrupting (Ctrl-C) returns what is done.
        **options: of `VariationalEM`.

    Example:
        >>> print(fm.compare(model, study, jax.random.key(0)))  # doctest: +SKIP
    """
    size = study.subjects.size
    if not isinstance(folds, int) or not 2 <= folds <= size - 1:
        raise ValueError(f"expected 2 to {size - 1} folds over {size} subjects; got {folds}.")
    rivals = rivals_of(model, study, laws, options)
    keys = jax.random.split(key, 3)
    fold = np.asarray(jax.random.permutation(keys[0], np.arange(size) % folds))
    described = {name: rival.described for name, rival in rivals.items()}
    record = Record.open(path, study, described, folds, _asked(model, study, key, options))
    with (
        contextlib.suppress(KeyboardInterrupt),
        tqdm(total=len(rivals) * folds, initial=record.count, disable=not progress) as bar,
    ):
        for number in range(folds):
            part = Fold.of(study, fold, number, tuple(rivals.values()), keys[1])
            for law, name in enumerate(rivals):
                if record.has(law, number):
                    continue
                bar.set_description(f"{name}, fold {number + 1} of {folds}")
                fit, found, seconds = part.judge(law, jax.random.fold_in(keys[2], number))
                record.add(law, number, part.own, found, fit, seconds)
                bar.update()
    return Comparison(
        record.laws, record.log_likelihood, record.standard_error, fold, record.cpu_seconds,
        record.converged, record.messages,
    )  # fmt: skip


def _asked(model: Callable, study: Study, key: jax.Array, options: dict[str, Any]) -> dict:
    """What the results depend on besides laws, folds and data, as far as it can be written."""
    roles = Joint.of(model, study).roles
    plain = (int, float, str, bool, type(None))
    return {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "options": {k: v if isinstance(v, plain) else str(type(v)) for k, v in options.items()},
        "model": [name for name, site in roles.population.items() if not site.effect],
    }
