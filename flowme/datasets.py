"""Studies that ship with flowme, and simulated ones whose truth is known."""

from importlib.resources import files

import pandas as pd

from flowme.simulated import (
    LogNormalPopulation,
    SenescencePopulation,
    Simulated,
    gaussian_population,
    senescence,
    two_subpopulations,
)
from flowme.study import Study

__all__ = [
    "LogNormalPopulation",
    "SenescencePopulation",
    "Simulated",
    "gaussian_population",
    "hare_lynx",
    "indomethacin",
    "isoniazid",
    "orange",
    "senescence",
    "theophylline",
    "two_subpopulations",
]


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
    frame = _read("theophylline")
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
    frame = _read("hare_lynx").rename(columns={"Hare": "hare", "Lynx": "lynx"})
    return Study.from_frame(
        frame.assign(place="Hudson Bay"),
        "place",
        "Year",
        ["hare", "lynx"],
        units={"time": "year", "hare": "thousand", "lynx": "thousand"},
    )


def orange() -> Study:
    """Growth of 5 orange trees: the circumference of their trunks on 7 days, the same for all.

    Outcome "circumference" (mm), time in days since 31 December 1968. R's `Orange`, the textbook
    example of a logistic curve with a random asymptote.

    Returns:
        The study.

    Reference:
        Draper and Smith (1998), Applied Regression Analysis, 3rd edition, exercise 24.N. Wiley.
    """
    units = {"time": "d", "circumference": "mm"}
    return Study.from_frame(_read("orange"), "Tree", "age", "circumference", units=units)


def indomethacin() -> Study:
    """Plasma concentrations of indomethacin in 6 subjects, 11 of each, after a bolus.

    Outcome "conc" (mg/L), time in h. The dose, 25 mg and the same for all, stands in no row: a sum
    of exponentials describes the curves. R's `Indometh`.

    Returns:
        The study.

    Reference:
        Kwan, Breault, Umbenhauer, McMahon and Duggan (1976), Kinetics of indomethacin absorption,
        elimination, and enterohepatic circulation in man. Journal of Pharmacokinetics and
        Biopharmaceutics 4, 255-280.
    """
    units = {"time": "h", "conc": "mg/L"}
    return Study.from_frame(_read("indometh"), "Subject", "time", "conc", units=units)


def isoniazid(censored: bool = True) -> Study:
    """Isoniazid in 104 patients on two occasions, and the genotype that makes acetylators slow.

    Outcome "conc" (mg/L), time in h, doses by mouth in mg, measured 1, 2, 8 and 24 h after the
    dose; occasions "OCC". Covariates: WT (kg) and, by levels, ACE_PROFILE ("Slow", "Intermediate",
    "Rapid": the genotype of NAT2, the known hidden group), SEX, AGE_GROUP, RACE and SITE. On the
    first occasion the dose went by genotype (300, 900, 1500 mg), hence leaks it; on the second
    everybody had 900 mg. The first measurement, at 1 h, is too late to tell ka.

    Args:
        censored: Whether to keep the 39 measurements below the limit of quantification, .01 mg/L,
            as censored ones. Without them 775 remain. (Two that the source marks as not to be used
            are always left out.)

    Returns:
        The study.

    Reference:
        The repository kesiaeds/POCPOI-NAT2-isoniazid-PK on GitHub, MIT licence.
    """
    frame = _read("isoniazid")
    below = (frame["CENS"] == 1) & (frame["EVID"] == 0)
    frame.loc[below, "MDV"] = 0
    if not censored:
        frame = frame[~below].drop(columns="CENS").reset_index(drop=True)
    return Study.from_frame(
        frame,
        outcome={"conc": "DV"},
        covariates="WT",
        categorical={
            "ACE_PROFILE": ["Slow", "Intermediate", "Rapid"],
            **dict.fromkeys(["SEX", "AGE_GROUP", "RACE", "SITE"]),
        },
        units={"time": "h", "conc": "mg/L", "amount": "mg", "WT": "kg"},
    )


def _read(name: str) -> pd.DataFrame:
    with (files("flowme") / "data" / f"{name}.csv").open() as file:
        return pd.read_csv(file)
