"""Features of `features.py` that say to whom, and when: covariates, and two levels of occasions.

Concentrations are exponentials by NumPy.
"""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from feature import Feature, populations
from features_doses import BOLUS, Arm, table

import flowme as fm

# Covariates ---------------------------------------------------------------------------------------

COVARIATES = dict(CL=3.0, V=30.0, beta=0.75, gamma=dict(b=0.3, c=-0.4), b=0.1)
COVARIATES |= {"eta_omega": {"CL": 0.3}}


def by_covariates(study):
    CL, V = populations(CL=2, V=40)
    beta = fm.population("beta", dist.Normal(0.0, 1.0))
    gamma = fm.population("gamma", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    b = fm.population("b", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL"]), study.subjects)
    weight = fm.covariate.power(study.covariates["WT"], beta, 70.0)
    genotype = fm.covariate.by_level(study, "GEN", gamma)
    psi = fm.individual(study.subjects, CL=CL * weight * jnp.exp(genotype + eta.CL), V=V)
    fm.observe("conc", fm.residual.proportional(fm.iv_one_compartment(psi, study), b), study)


def draw_covariates(rng, subjects=200):
    weight, level = rng.uniform(45, 110, subjects), rng.integers(0, 3, subjects)
    gamma = np.array([0.0, *COVARIATES["gamma"].values()])[level]
    eta = COVARIATES["eta_omega"]["CL"] * rng.normal(size=subjects)
    CL = COVARIATES["CL"] * (weight / 70) ** COVARIATES["beta"] * np.exp(gamma + eta)
    k = CL[:, None] / COVARIATES["V"]
    f = 100 / COVARIATES["V"] * np.exp(-k * np.array(BOLUS.times))
    y = f * (1 + COVARIATES["b"] * rng.normal(size=f.shape))
    frame = table([BOLUS], y)
    frame["WT"], frame["GEN"] = weight[frame.ID], np.array(list("ABC"))[level][frame.ID]
    levels = {"GEN": ["A", "B", "C"]}
    return fm.Study.from_frame(frame, outcome={"conc": "DV"}, covariates="WT", categorical=levels)


CARRIED = dict(CL=3.0, V=30.0, beta=0.6, b=0.1, eta_omega={"CL": 0.3})
CARRIED_TIMES = np.arange(4.0, 49.0, 4.0)
FUNCTION = np.linspace(100, 40, len(CARRIED_TIMES) + 1)  # of the kidney, on average


def carried(study):
    CL, V = populations(CL=2, V=40)
    beta = fm.population("beta", dist.Normal(0.0, 1.0))
    b = fm.population("b", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL"]), study.subjects)
    kidney = fm.covariate.power(study.covariates["CRCL"], beta, 70.0)
    psi = fm.individual(study.subjects, CL=CL * kidney * jnp.exp(eta.CL)[:, None], V=V)
    f = fm.solve_linear(lambda p: [[-p.CL / p.V]], psi, study)[..., 0] / V
    fm.observe("conc", fm.residual.proportional(f, b), study)


def draw_carried(rng, subjects=60):
    """A bolus of 300 at 0 h and of 200 at 22 h; clearance keeps its value from row to row."""
    kidney = FUNCTION * rng.uniform(0.5, 1.5, (subjects, 1)) * rng.uniform(0.8, 1.2, (subjects, 13))
    eta = CARRIED["eta_omega"]["CL"] * rng.normal(size=(subjects, 1))
    k = CARRIED["CL"] * (kidney / 70) ** CARRIED["beta"] * np.exp(eta) / CARRIED["V"]
    gone = np.cumsum(4 * k[:, :-1], axis=1)  # ∫ k dt up to each measurement
    at_22 = gone[:, 4:5] + 2 * k[:, 5:6]
    second = np.where(CARRIED_TIMES > 22, np.exp(-np.maximum(gone - at_22, 0)), 0)
    f = (300 * np.exp(-gone) + 200 * second) / CARRIED["V"]
    y = f * (1 + CARRIED["b"] * rng.normal(size=f.shape))
    arm = Arm([dict(TIME=0, AMT=300), dict(TIME=22, AMT=200)], [], CARRIED_TIMES)
    frame = table([arm], y)
    row = (frame.TIME // 4).astype(int)  # that of 22 h carries the value of 20 h
    frame["CRCL"] = kidney[frame.ID, row]
    return fm.Study.from_frame(frame, outcome={"conc": "DV"}, time_varying={"CRCL": "carried"})


LINEAR = dict(level=5.0, slope=0.8, a=0.3, eta_omega=dict(level=0.5, slope=0.3))


def linear(study):
    level = fm.population("level", dist.Normal(0.0, 5.0))
    slope = fm.population("slope", dist.Normal(0.0, 1.0))
    a = fm.population("a", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["level", "slope"]), study.subjects)
    own = (slope + eta.slope)[:, None]
    warmth = fm.covariate.additive(study.covariates["temp"], own, 37.0)
    fm.observe("y", fm.residual.constant((level + eta.level)[:, None] + warmth, a), study)


def draw_linear(rng, subjects=100):
    temp = 37 + rng.normal(size=(subjects, 8)).cumsum(1)
    eta = rng.normal(size=(subjects, 2)) * list(LINEAR["eta_omega"].values())
    f = LINEAR["level"] + eta[:, :1] + (LINEAR["slope"] + eta[:, 1:]) * (temp - 37)
    y = f + LINEAR["a"] * rng.normal(size=f.shape)
    i, j = np.indices(y.shape).reshape(2, -1)
    frame = pd.DataFrame({"ID": i, "TIME": j, "DV": y.ravel(), "temp": temp.ravel()})
    return fm.Study.from_frame(frame, outcome={"y": "DV"}, time_varying={"temp": "linear"})


# Two levels of occasions --------------------------------------------------------------------------

LEVELS = dict(CL=3.0, V=30.0, b=0.1, eta_omega={"CL": 0.3})
LEVELS |= {"period_omega": {"CL": 0.25}, "visit_omega": {"CL": 0.2}}


def two_levels(study):
    CL, V = populations(CL=2, V=40)
    b = fm.population("b", dist.HalfNormal(0.5))
    change = 0.0
    for name, whose in (("eta", study.subjects), *study.occasions.items()):
        effect = fm.random_effect(name, fm.GaussianRandomEffect(["CL"]), whose).CL
        change = change + (effect[:, None] if name == "eta" else effect)
    f = 300 / V * jnp.exp(-CL * jnp.exp(change) / V * study.covariates["since"])
    fm.observe("conc", fm.residual.proportional(f, b), study)


def draw_two_levels(rng, subjects=60):
    """Two periods of two visits, a bolus of 300 at each, the last one washed out."""
    since = np.array([2.0, 6, 12, 24])
    eta, period, visit = (
        LEVELS[f"{name}_omega"]["CL"] * rng.normal(size=(subjects, *shape))
        for name, shape in (("eta", (1, 1, 1)), ("period", (2, 1, 1)), ("visit", (2, 2, 1)))
    )
    k = LEVELS["CL"] * np.exp(eta + period + visit) / LEVELS["V"]
    f = 300 / LEVELS["V"] * np.exp(-k * since)
    y = f * (1 + LEVELS["b"] * rng.normal(size=f.shape))
    i, one, two, j = np.indices(y.shape).reshape(4, -1)
    columns = {"ID": i, "TIME": 2000 * one + 1000 * two + since[j], "DV": y.ravel()}
    frame = pd.DataFrame(columns | {"period": one, "visit": two, "since": since[j]})
    return fm.Study.from_frame(
        frame, outcome={"conc": "DV"}, occasions=["period", "visit"], time_varying="since"
    )


FEATURES = {
    "covariates": Feature(COVARIATES, by_covariates, draw_covariates),
    "carried": Feature(CARRIED, carried, draw_carried),
    "linear": Feature(LINEAR, linear, draw_linear),
    "two-levels": Feature(LEVELS, two_levels, draw_two_levels),
}
