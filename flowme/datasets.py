"""Studies that ship with flowme, and simulated ones whose truth is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

from flowme.study import Study

__all__ = [
    "LogNormalPopulation",
    "SenescencePopulation",
    "Simulated",
    "gaussian_population",
    "hare_lynx",
    "senescence",
    "theophylline",
    "two_subpopulations",
]


class Simulated(NamedTuple):
    """A simulated study and what it was simulated from.

    Attributes:
        study: What one would have measured.
        truth: The distribution of the individual parameters in the population, with
            `sample(seed, n)` and `log_prob`.
        psi: The individual parameters of the subjects: a row for each, named by `study.ids`.
    """

    study: Study
    truth: Any
    psi: pd.DataFrame


def theophylline(baseline: bool = False) -> Study:
    """Theophylline concentrations of 12 subjects after one oral dose.

    Outcome "conc" (mg/L), time in h, doses in mg, covariate WT (kg). The file is the NONMEM
    version of the data of Dr Robert Upton (R's `Theoph`) with the weight-scaled doses in mg as
    recorded; its RxODE event code 101 is written as 1, a dose.

    Args:
        baseline: Whether to keep the measurement that each subject has at time 0, with the dose.
            Most are zero, where a proportional error has no density. Without them 120
            measurements remain of 132.

    Returns:
        The study.

    Reference:
        Boeckmann, Sheiner and Beal (1994), NONMEM Users Guide, part V. University of California.
    """
    with (files("flowme") / "data" / "theophylline.csv").open() as file:
        frame = pd.read_csv(file)
    if not baseline:
        frame = frame[(frame["TIME"] > 0) | (frame["EVID"] == 1)].reset_index(drop=True)
    return Study.from_frame(
        frame,
        outcome={"conc": "DV"},
        covariates="WT",
        units={"time": "h", "conc": "mg/L", "amount": "mg", "WT": "kg"},
    )


def hare_lynx() -> Study:
    """Pelts of snowshoe hares and Canada lynxes bought by the Hudson's Bay Company, 1900 to 1920.

    One subject, 21 years; outcomes "hare" and "lynx" (thousands of pelts a year), time in years.

    Returns:
        The study.

    Reference:
        Hewitt (1921), The Conservation of the Wild Life of Canada. New York: Scribner.
    """
    with (files("flowme") / "data" / "hare_lynx.csv").open() as file:
        frame = pd.read_csv(file)
    frame = frame.rename(columns={"Hare": "hare", "Lynx": "lynx"})
    return Study.from_frame(
        frame.assign(place="Hudson Bay"),
        "place",
        "Year",
        ["hare", "lynx"],
        units={"time": "year", "hare": "thousand", "lynx": "thousand"},
    )


@dataclass(frozen=True, eq=False)
class LogNormalPopulation:
    """A mixture of lognormals with independent components: log ψ_p ~ Σ_g w_g N(m_gp, s_gp²).

    Attributes:
        names: Parameters, [parameter].
        weight: Share of each subpopulation, [group].
        mean: Means of log ψ, [group, parameter].
        sd: Standard deviations of log ψ, [group, parameter].
    """

    names: tuple[str, ...]
    weight: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    def sample(self, seed: int | np.random.Generator, n: int) -> pd.DataFrame:
        """Draws ψ of `n` subjects, on its natural scale: one column for each parameter."""
        rng = np.random.default_rng(seed)
        group = rng.choice(self.weight.size, size=n, p=self.weight)
        log_psi = rng.normal(self.mean[group], self.sd[group])
        return pd.DataFrame(np.exp(log_psi), columns=list(self.names))

    def log_prob(self, log_psi: np.ndarray) -> np.ndarray:
        """Log density of log ψ, [..., parameter] -> [...]."""
        each = stats.norm.logpdf(np.asarray(log_psi)[..., None, :], self.mean, self.sd)
        return special.logsumexp(each.sum(-1) + np.log(self.weight), axis=-1)


@dataclass(frozen=True, eq=False)
class SenescencePopulation:
    """Two strategies of senescence: φ, the day half of the leaves have withered, and its pace ψ.

    With probability .6 early and fast, φ and ψ independent:
        φ ~ N(12, 1.2²),  log ψ = log 1.6 + .28 (G - 2)/√2,  G ~ Gamma(2, 1);
    otherwise late and slow:
        φ ~ N(19.5, 1.8²),  log ψ = log 3 + .10 (φ - 19.5)/1.8 + ε,  ε ~ N(0, .12²).
    """

    early: float = 0.6

    def sample(self, seed: int | np.random.Generator, n: int) -> pd.DataFrame:
        """Draws φ and ψ (both in days) of `n` varieties: columns "phi" and "psi"."""
        rng = np.random.default_rng(seed)
        early = rng.random(n) < self.early
        z = rng.normal(size=n)
        skewed = np.log(1.6) + 0.28 * (rng.gamma(2.0, size=n) - 2.0) / np.sqrt(2.0)
        along = np.log(3.0) + 0.10 * z + rng.normal(0.0, 0.12, size=n)
        phi = np.where(early, 12.0 + 1.2 * z, 19.5 + 1.8 * z)
        return pd.DataFrame({"phi": phi, "psi": np.exp(np.where(early, skewed, along))})

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Log density of (φ, log ψ), [..., 2] -> [...]."""
        phi, log_psi = np.moveaxis(np.asarray(x), -1, 0)
        scale = 0.28 / np.sqrt(2.0)
        early = stats.norm.logpdf(phi, 12.0, 1.2) + stats.gamma.logpdf(
            log_psi, 2.0, loc=np.log(1.6) - 2.0 * scale, scale=scale
        )
        late = stats.norm.logpdf(phi, 19.5, 1.8) + stats.norm.logpdf(
            log_psi, np.log(3.0) + 0.10 * (phi - 19.5) / 1.8, 0.12
        )
        return np.logaddexp(np.log(self.early) + early, np.log1p(-self.early) + late)


_TIMES = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 18.0, 24.0)


def two_subpopulations(
    seed: int, subjects: int = 500, times: Sequence[float] = _TIMES
) -> Simulated:
    """Simulates a drug that 40 % of the subjects clear slowly and 60 % fast, unknown who.

    log ka ~ N(log 1.5, .30²), log V ~ N(log 30, .20²), and
    log CL ~ .40 N(log 1.2, .15²) + .60 N(log 3.6, .20²), independent. 320 mg by mouth at time 0,
    one compartment, constant residual error of .30 mg/L. A measurement may be negative.

    Args:
        seed: Seed; another one gives new subjects of the same population.
        subjects: Number of subjects.
        times: Times of measurement (h), the same for all, positive and increasing.

    Returns:
        The study (outcome "conc"), the `LogNormalPopulation`, and ka (1/h), V (L), CL (L/h).
    """
    return _absorption(seed, subjects, times, [0.4, 0.6], [1.2, 3.6], [0.15, 0.20])


def gaussian_population(
    seed: int, subjects: int = 500, times: Sequence[float] = _TIMES
) -> Simulated:
    """Simulates `two_subpopulations` without them: log CL ~ N(log 2.2, .35²), all else equal.

    The case in which nothing is hidden and a flow must find nothing.

    Args:
        seed: Seed; another one gives new subjects of the same population.
        subjects: Number of subjects.
        times: Times of measurement (h), the same for all, positive and increasing.

    Returns:
        The study (outcome "conc"), the `LogNormalPopulation`, and ka (1/h), V (L), CL (L/h).
    """
    return _absorption(seed, subjects, times, [1.0], [2.2], [0.35])


def _absorption(
    seed: int,
    subjects: int,
    times: Sequence[float],
    weight: Sequence[float],
    clearance: Sequence[float],
    sd: Sequence[float],
) -> Simulated:
    """Simulates one-compartment oral absorption with a clearance for each subpopulation."""
    t = np.asarray(times, float)
    if t.ndim != 1 or t.size == 0 or t[0] <= 0 or np.any(np.diff(t) <= 0):
        raise ValueError(f"expected times positive and increasing; got {list(times)}.")
    _check_number(subjects, "subjects")
    groups = len(weight)
    truth = LogNormalPopulation(
        names=("ka", "V", "CL"),
        weight=np.array(weight),
        mean=np.log([[1.5, 30.0, value] for value in clearance]),
        sd=np.column_stack([np.full(groups, 0.30), np.full(groups, 0.20), sd]),
    )
    rng = np.random.default_rng(seed)
    psi = truth.sample(rng, subjects)
    dose, error = 320.0, 0.30
    ka, v, cl = psi[["ka", "V", "CL"]].to_numpy().T[:, :, None]
    k = cl / v
    conc = dose * ka / (v * (ka - k)) * (np.exp(-k * t) - np.exp(-ka * t))
    conc = conc + rng.normal(0.0, error, size=conc.shape)

    psi.index = pd.Index(np.arange(1, subjects + 1), name="ID")
    frame = pd.DataFrame(
        {
            "ID": np.repeat(psi.index, t.size + 1),
            "TIME": np.tile([0.0, *t], subjects),
            "DV": np.column_stack([np.zeros(subjects), conc]).ravel(),
            "AMT": np.tile([dose, *np.zeros(t.size)], subjects),
            "EVID": np.tile([1, *np.zeros(t.size, int)], subjects),
        }
    )
    units = {"time": "h", "conc": "mg/L", "amount": "mg"}
    return Simulated(Study.from_frame(frame, outcome={"conc": "DV"}, units=units), truth, psi)


def senescence(seed: int, varieties: int = 200) -> Simulated:
    """Simulates the senescence of Arabidopsis-like rosettes: withered leaves, counted out of 12.

    y ~ Binomial(12, 1/(1 + exp(-(t - φ)/ψ))) at t = 4, 8, ..., 32 days, with φ and ψ from
    `SenescencePopulation`: two strategies, one early and fast, one late and slow.

    Args:
        seed: Seed; another one gives new varieties of the same population.
        varieties: Number of varieties.

    Returns:
        The study (outcome "withered", covariate "leaves" = 12), the `SenescencePopulation`, and
        phi and psi (d) of each variety.
    """
    _check_number(varieties, "varieties")
    rng = np.random.default_rng(seed)
    truth = SenescencePopulation()
    psi = truth.sample(rng, varieties)
    days, leaves = np.arange(4.0, 33.0, 4.0), 12
    phi, pace = psi[["phi", "psi"]].to_numpy().T[:, :, None]
    withered = rng.binomial(leaves, special.expit((days - phi) / pace))

    psi.index = pd.Index(np.arange(1, varieties + 1), name="variety")
    frame = pd.DataFrame(
        {
            "variety": np.repeat(psi.index, days.size),
            "day": np.tile(days, varieties),
            "withered": withered.ravel(),
            "leaves": leaves,
        }
    )
    study = Study.from_frame(
        frame, "variety", "day", "withered", covariates="leaves", units={"time": "d"}
    )
    return Simulated(study, truth, psi)


def _check_number(number: int, of: str) -> None:
    if number < 1:
        raise ValueError(f"expected at least 1 of {of}; got {number}.")
