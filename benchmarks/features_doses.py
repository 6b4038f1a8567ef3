"""Features of `features.py` that say what was given: regimens of every kind, and an ODE.

Concentrations are sums over single doses into one compartment, by NumPy.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from feature import Feature, populations
from scipy.special import expit, lambertw

import flowme as fm

# Regimens -----------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What some of the subjects take.

    Attributes:
        rows: dose rows of the table.
        taken: what they mean, dose by dose: (time, amount, hours of infusion).
        times: of the measurements.
        lost: when a reset undoes all doses before it.
    """

    rows: list
    taken: list
    times: list
    lost: float = np.inf


def concentration(arm, CL, V, ka=None, lag=0.0, F=1.0):
    """[time], of one subject; without ka the doses go straight into the vein."""
    t, k, total = np.array(arm.times, float), CL / V, 0.0
    for time, amount, hours in arm.taken:
        since = t - time - lag
        here = (since >= 0) & ((time >= arm.lost) | (t < arm.lost))
        since = np.where(here, since, 0.0)
        if ka is not None:
            response = F * ka / (ka - k) * (np.exp(-k * since) - np.exp(-ka * since))
        elif hours:
            during = np.minimum(since, hours)
            response = -np.expm1(-k * during) * np.exp(-k * (since - during)) / (k * hours)
        else:
            response = np.exp(-k * since)
        total = total + here * amount / V * response
    return total


def table(arms, values):
    """`values` of each subject, the arms taking turns."""
    rows = []
    for i, y in enumerate(values):
        arm = arms[i % len(arms)]
        rows += [{"ID": i, "EVID": 1} | row for row in arm.rows]
        rows += [
            {"ID": i, "TIME": t, "DV": v, "EVID": 0} for t, v in zip(arm.times, y, strict=True)
        ]
    frame = pd.DataFrame(rows).sort_values(["ID", "TIME"], kind="stable", ignore_index=True)
    others = frame.columns.difference(["DV"])
    return frame.fillna({name: 0 for name in others if name != "CMT"} | {"CMT": 1})


ERRORS = {  # y of a prediction f, with standard normal numbers e
    "constant": lambda f, e, a: f + a * e,
    "proportional": lambda f, e, b: f * (1 + b * e),
    "combined1": lambda f, e, a, b: f + (a + b * f) * e,
    "combined2": lambda f, e, a, b: f + np.hypot(a, b * f) * e,
    "exponential": lambda f, e, a: f * np.exp(a * e),
}


def regimen(arms, law, error, ka=None, subjects=60):
    """A feature: the subjects take turns at the arms; CL differs between them."""
    oral = {} if ka is None else {"ka": ka}
    typical, omega = oral | {"CL": 3.0, "V": 30.0}, {"CL": 0.3}
    structure = fm.iv_one_compartment if ka is None else fm.oral_one_compartment

    def model(study):
        starts = dict.fromkeys(oral, 1.0) | {"CL": 2.0, "V": 40.0}
        values = dict(zip(starts, populations(**starts), strict=True))
        errors = [fm.population(name, dist.HalfNormal(0.5)) for name in error]
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL"]), study.subjects)
        values["CL"] = values["CL"] * jnp.exp(eta.CL)
        f = structure(fm.individual(study.subjects, **values), study)
        fm.observe("conc", getattr(fm.residual, law)(f, *errors), study)

    def draw(rng):
        values = []
        for i, eta in enumerate(omega["CL"] * rng.normal(size=subjects)):
            own = typical | {"CL": typical["CL"] * np.exp(eta)}
            f = concentration(arms[i % len(arms)], **own)
            values.append(ERRORS[law](f, rng.normal(size=f.shape), **error))
        return fm.Study.from_frame(table(arms, values), outcome={"conc": "DV"})

    return Feature(typical | error | {"eta_omega": omega}, model, draw)


def every(hours, amount, count, first=0.0, length=0.0):
    return [(first + n * hours, amount, length) for n in range(count)]


def before(hours, amount, length=0.0):
    """What a steady state at time 0 stands for, the dose of time 0 included."""
    return every(hours, amount, 101, -100 * hours, length)


INFUSIONS = [
    Arm([dict(TIME=0, AMT=300, RATE=150)], [(0, 300, 2)], [0.5, 1.5, 2, 3, 6, 10, 16, 24]),
    Arm([dict(TIME=0, AMT=300, DUR=4)], [(0, 300, 4)], [1, 2.5, 3.5, 5, 8, 12, 18, 24]),
    Arm(
        [dict(TIME=0, AMT=200, RATE=25), dict(TIME=6, AMT=100)],  # a bolus in an infusion
        [(0, 200, 8), (6, 100, 0)],
        [1, 3, 5, 6.5, 7.5, 9, 14, 24],
    ),
]
REPEATED = [
    Arm([dict(TIME=0, AMT=100, ADDL=2, II=8)], every(8, 100, 3), [1, 3, 8, 9.5, 14, 17, 24, 36]),
    Arm(
        [dict(TIME=0, AMT=100), dict(TIME=10, AMT=150), dict(TIME=22, AMT=50)],
        [(0, 100, 0), (10, 150, 0), (22, 50, 0)],
        [0.5, 2, 6, 9, 12, 20, 24, 36],
    ),
]
STEADY = [
    Arm([dict(TIME=0, AMT=100, SS=1, II=8)], before(8, 100), [0.5, 2, 4, 7, 10, 14, 20]),
    Arm(
        [dict(TIME=0, AMT=200, DUR=3, SS=1, II=12, ADDL=1)],
        before(12, 200, 3.0) + [(12, 200, 3)],
        [1, 3.5, 8, 13, 16, 22, 30],
    ),
    Arm(
        [dict(TIME=0, AMT=100, RATE=50, SS=1, II=6)],
        before(6, 100, 2.0),
        [0.5, 1.5, 2.5, 5, 9, 13, 18],
    ),
]
STEADY_ORAL = [
    Arm([dict(TIME=0, AMT=100, SS=1, II=8)], before(8, 100), [0.5, 1, 2, 4, 7, 12, 20]),
    Arm(
        [dict(TIME=0, AMT=200, SS=1, II=24, ADDL=1)],
        before(24, 200) + [(24, 200, 0)],
        [0.5, 1.5, 4, 12, 25, 28, 40],
    ),
]
RESETS = [
    Arm(
        [dict(TIME=0, AMT=100, ADDL=5, II=4), dict(TIME=9, EVID=3), dict(TIME=11, AMT=200)],
        every(4, 100, 3) + [(11, 200, 0)],
        [1, 3, 6, 8.5, 10, 12, 15, 24],
        lost=9,
    ),
    Arm(
        [dict(TIME=0, AMT=200), dict(TIME=7, AMT=100, EVID=4)],
        [(0, 200, 0), (7, 100, 0)],
        [0.5, 2, 4, 6.5, 7.5, 9, 12, 20],
        lost=7,
    ),
]

# Each subject gets 100 into the vein, and 24 h later 200 by mouth. Lags end before the records of
# absorption begin (all but 1 in 600): a likelihood has kinks where a lag meets a record.
BOTH = Arm(
    [dict(TIME=0, AMT=100, CMT=2), dict(TIME=24, AMT=200, CMT=1)],
    [],
    [2, 8, 20, 24.9, 25.2, 25.6, 26.5, 28, 34, 44],
)


def lagged(study):
    ka, CL, V, lag = populations(ka=1, CL=2, V=40, lag=1)
    F = fm.population("F", dist.Beta(1.0, 1.0))
    b = fm.population("b", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["lag", "F"]), study.subjects)
    part = 1 / (1 + (1 - F) / F * jnp.exp(-eta.F))  # logit F + η
    psi = fm.individual(study.subjects, ka=ka, CL=CL, V=V, lag=lag * jnp.exp(eta.lag), F=part)
    f = fm.oral_one_compartment(psi, study)
    fm.observe("conc", fm.residual.proportional(f, b), study)


LAGGED = dict(ka=1.5, CL=3.0, V=30.0, lag=0.5, F=0.6, b=0.1, eta_omega=dict(lag=0.2, F=0.5))


def draw_lagged(rng, subjects=60):
    values = []
    for eta in rng.normal(size=(subjects, 2)) * list(LAGGED["eta_omega"].values()):
        disposition = dict(CL=LAGGED["CL"], V=LAGGED["V"])
        vein = concentration(BOTH._replace(taken=[(0, 100, 0)]), **disposition)
        mouth = concentration(
            BOTH._replace(taken=[(24, 200, 0)]),
            **disposition,
            ka=LAGGED["ka"],
            lag=LAGGED["lag"] * np.exp(eta[0]),
            F=expit(np.log(LAGGED["F"] / (1 - LAGGED["F"])) + eta[1]),
        )
        f = vein + mouth
        values.append(f * (1 + LAGGED["b"] * rng.normal(size=f.shape)))
    return fm.Study.from_frame(table([BOTH], values), outcome={"conc": "DV"})


# An ODE -------------------------------------------------------------------------------------------

SATURABLE = dict(Vm=15.0, Km=3.0, V=10.0, b=0.1, eta_omega=dict(Vm=0.3))
BOLUS = Arm([dict(TIME=0, AMT=100)], [], [0.5, 1, 2, 4, 6, 8, 10])


def saturable(study):
    Vm, Km, V = populations(Vm=10, Km=5, V=15)
    b = fm.population("b", dist.HalfNormal(0.5))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["Vm"]), study.subjects)
    psi = fm.individual(study.subjects, Vm=Vm * jnp.exp(eta.Vm), Km=Km, V=V)

    def rhs(t, amount, psi):
        (A,) = amount
        return (-psi.Vm * A / (psi.Km * psi.V + A),)

    f = fm.solve(rhs, psi, study)[..., 0] / psi.V[:, None]
    fm.observe("conc", fm.residual.proportional(f, b), study)


def draw_saturable(rng, subjects=60):
    """C = Km W(C0 / Km exp((C0 - Vm / V t) / Km)), W being Lambert's function."""
    Vm = SATURABLE["Vm"] * np.exp(SATURABLE["eta_omega"]["Vm"] * rng.normal(size=(subjects, 1)))
    Km, V = SATURABLE["Km"], SATURABLE["V"]
    C0 = 100 / V
    f = Km * lambertw(C0 / Km * np.exp((C0 - Vm / V * np.array(BOLUS.times)) / Km)).real
    y = f * (1 + SATURABLE["b"] * rng.normal(size=f.shape))
    return fm.Study.from_frame(table([BOLUS], y), outcome={"conc": "DV"})


FEATURES = {
    "infusions": regimen(INFUSIONS, "proportional", dict(b=0.1)),
    "repeated": regimen(REPEATED, "combined1", dict(a=0.3, b=0.1), ka=1.5),
    "steady": regimen(STEADY, "combined2", dict(a=0.3, b=0.1)),
    "steady-oral": regimen(STEADY_ORAL, "exponential", dict(a=0.1), ka=1.5),
    "resets": regimen(RESETS, "constant", dict(a=0.3), ka=1.5),
    "lag-and-F": Feature(LAGGED, lagged, draw_lagged),
    "ode": Feature(SATURABLE, saturable, draw_saturable),
}
