"""Four small models that contain every feature between them, and the laws that each is given.

A law is put in the place of `eta` (and of the effects between occasions) by `fm.replace_effect`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from cases import bent_weights
from diffrax import Kvaerno5
from numpyro.handlers import seed, substitute, trace

import flowme as fm
from flowme.infer.joint import Joint
from flowme.study import Study

# Closed form: every kind of dose and of censoring; correlated errors ------------------------------

DOSE = {"EVID": 1, "AMT": 100.0, "CMT": 1, "RATE": 0.0, "DUR": 0.0, "ADDL": 0, "II": 0.0, "SS": 0}
DOSES = (
    [{"TIME": 0.0, "ADDL": 2, "II": 6.0}],
    [{"TIME": 0.0}, {"TIME": 1.0, "CMT": 2, "RATE": 25.0, "AMT": 50.0}],
    [{"TIME": 0.0, "CMT": 2, "DUR": 3.0}],
    [{"TIME": 0.0, "SS": 1, "II": 12.0}],
    [{"TIME": 0.0}, {"TIME": 5.0, "EVID": 3, "AMT": 0.0}, {"TIME": 7.0, "EVID": 4, "AMT": 80.0}],
    [{"TIME": 0.0, "SS": 1, "II": 12.0, "CMT": 2, "RATE": 50.0, "ADDL": 1}],
)
SEEN = {"conc": (0.8, 4.0, 9.0, 20.0), "marker": (2.0, 2.5, 4.0)}


def clinic(study):
    """One compartment, by mouth and into the vein."""
    CL = fm.population("CL", dist.LogNormal(1.0, 0.5), init=3.0)
    beta = fm.population("beta", dist.Normal(0.75, 0.5), fixed=0.75)
    gamma = fm.population("gamma", dist.Normal(0.0, 0.5), fixed=0.2)
    b = fm.population("b", dist.HalfNormal(0.5), init=0.25)
    tau = fm.population("tau", dist.LogNormal(0.0, 1.0), fixed=1.5)
    x = (study.covariates["WT"][:, None] - 70) / 15
    law = fm.FlowRandomEffect(["CL", "V"], context=x)
    eta = fm.random_effect("eta", law, study.subjects, ["CL", "V"])
    zeta = fm.random_effect("zeta", fm.GaussianRandomEffect(["ka"]), study.subjects, ["ka"])
    sex = fm.covariate.by_level(study, "SEX", gamma)
    size = fm.covariate.power(study.covariates["WT"], beta, reference=70)
    psi = fm.individual(
        study.subjects, ka=1.2 * jnp.exp(zeta.ka), CL=CL * size * jnp.exp(sex + eta.CL),
        V=30 * jnp.exp(eta.V), lag=0.3, F=0.8,
    )  # fmt: skip
    f = fm.oral_one_compartment(psi, study)
    fm.observe("conc", fm.residual.combined1(f, 0.1, b), study)
    marker = fm.residual.constant(jnp.log1p(f), 0.3)
    fm.observe("marker", fm.residual.autocorrelated(marker, tau, study, "marker"), study)


def clinic_table():
    rows = []
    for i, doses in enumerate(DOSES):
        rows += [{"ID": i, "DVID": "conc", **DOSE, **dose} for dose in doses]
        seen = [(t, name) for name, times in SEEN.items() for t in times]
        rows += [{"ID": i, "TIME": t, "DVID": name, **DOSE, "EVID": 0, "AMT": 0.0}
                 for t, name in seen]  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["ID", "TIME"], kind="stable", ignore_index=True)
    table["WT"] = np.array([55.0, 90.0, 70.0, 62.0, 80.0, 75.0])[table.ID]
    table["SEX"] = np.array(["F", "M", "F", "M", "M", "F"])[table.ID]
    return table.assign(CENS=0, LIMIT=np.nan)


def clinic_censored(table):
    """Concentrations: one below 1 (M3), one known to be between 0 and 1 (M4), above, an interval;
    deaths after 12; relapses at visits every 3."""
    conc = table.DVID.eq("conc") & table.EVID.eq(0)
    low = conc & (table.DV < 1)
    table.loc[low, ["DV", "CENS"]] = [1.0, 1]
    table.loc[low & table.ID.mod(2).eq(0), "LIMIT"] = 0.0
    high = conc & (table.DV > 4)
    table.loc[high, ["DV", "CENS"]] = [4.0, -1]
    coarse = conc & table.TIME.eq(4.0) & table.CENS.eq(0)
    table.loc[coarse, "LIMIT"] = table.DV - 0.2
    table.loc[coarse, "CENS"] = 1
    return table


# Counts, categories, times to an event -----------------------------------------------------------

ONCE = ("poisson", "negative", "binomial", "share", "inflated", "binary", "ordered")
CUTS = np.array([-0.5, 1.0])


def weibull(t, scale, shape):
    return (t / scale) ** shape


def outcomes(study):
    """One level, which drives outcomes of nine kinds."""
    rate = fm.population("rate", dist.LogNormal(0.0, 1.0), init=2.0)
    eta = fm.random_effect(
        "eta", fm.GaussianRandomEffect(["level", "slope"]), study.subjects, ["level", "slope"]
    )
    zeta = fm.random_effect("zeta", fm.GaussianRandomEffect(["risk"]), study.subjects, ["risk"])
    x = eta.level[:, None] + eta.slope[:, None] * study.time
    mean, p, scale = rate * jnp.exp(x), jax.nn.sigmoid(x), 5.0 * jnp.exp(-x - zeta.risk[:, None])
    fm.observe("poisson", dist.Poisson(mean), study)
    fm.observe("negative", dist.NegativeBinomial2(mean, 2.0), study)
    fm.observe("binomial", dist.Binomial(6, p), study)
    fm.observe("share", dist.BetaBinomial(2 * p, 2 * (1 - p), 6), study)
    fm.observe("inflated", dist.ZeroInflatedPoisson(0.3, mean), study)
    fm.observe("binary", dist.Bernoulli(logits=x), study)
    fm.observe("ordered", dist.OrderedLogistic(x, CUTS), study)
    fm.observe("death", dist.Weibull(scale, 1.4), study)
    fm.observe("relapse", fm.outcomes.time_to_event(weibull, scale, 1.4), study)


def outcomes_table():
    rows = [
        {"ID": i, "TIME": t, "DVID": name}
        for i in range(5)
        for t in (0.0, 1.0)
        for name in (*ONCE, *(("death", "relapse") if t == 0 else ()))
    ]
    return pd.DataFrame(rows).assign(EVID=0, CENS=0, LIMIT=np.nan)


def outcomes_censored(table):
    """Deaths after 6; relapses at visits every 3."""
    late = table.DVID.eq("death") & (table.DV > 6)
    table.loc[late, ["DV", "CENS"]] = [6.0, -1]
    relapse = table.DVID.eq("relapse")
    end = 3 * np.ceil(table.DV / 3)
    table.loc[relapse, "LIMIT"] = np.where(end > 3, end - 3, np.nan)[relapse]
    table.loc[relapse, "DV"] = end
    table.loc[relapse, "CENS"] = 1
    return table


# ODEs: a saturable elimination, and stiff binding; covariates that change in time ----------------


def saturable(t, amount, psi):
    return (psi.inflow - psi.Vm * psi.growth * amount[0] / (psi.Km + amount[0]),)


def binding(t, amount, psi):
    """To a receptor, at once: stiff."""
    free, bound = amount
    flow = 300.0 * (free * (1.0 - bound) - psi.Kd * bound)
    return -flow - 0.3 * free, flow


def ode(study):
    Vm = fm.population("Vm", dist.LogNormal(1.0, 0.5), init=4.0)
    a = fm.population("a", dist.HalfNormal(1.0), init=0.4)
    c = fm.population("c", dist.HalfNormal(1.0), init=0.05)
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["Vm"]), study.subjects, ["Vm"])
    zeta = fm.random_effect("zeta", fm.GaussianRandomEffect(["Kd"]), study.subjects, ["Kd"])
    growth = study.covariates["GROWTH"]
    psi = fm.individual(
        study.subjects, Vm=Vm * jnp.exp(eta.Vm), Km=5.0, Kd=0.3 * jnp.exp(zeta.Kd), inflow=0.5,
        growth=growth,
    )  # fmt: skip
    held = psi._replace(growth=growth[:, 0])
    drug = fm.solve(saturable, psi, study, rtol=1e-6, atol=1e-6)
    bound = fm.solve(
        binding, held, study, rtol=1e-4, atol=1e-5, solver=Kvaerno5(),
        initial=jnp.array([1.0, 0.0]),
        bioavailability={1: jnp.full(study.subjects.size, 0.05)},
    )  # fmt: skip
    fm.observe("drug", fm.residual.combined2(drug[..., 0], a, 0.1), study)
    fm.observe("bound", fm.residual.constant(bound[..., 1], c), study)


def ode_table():
    rows = []
    for i in range(4):
        rows.append({"ID": i, "TIME": 0.0, "DVID": "drug", "EVID": 1, "AMT": 20.0})
        seen = [(1.0, "drug"), (2.0, "bound"), (3.0, "drug"), (6.0, "bound"), (6.0, "drug")]
        rows += [{"ID": i, "TIME": t, "DVID": n, "EVID": 0, "AMT": 0.0} for t, n in seen]
    table = pd.DataFrame(rows).assign(CENS=0)
    table["GROWTH"] = 1 + 0.1 * table.TIME * (1 + table.ID.mod(2))
    return table


def ode_censored(table):
    high = table.DVID.eq("drug") & table.EVID.eq(0) & (table.DV > 17)
    table.loc[high, ["DV", "CENS"]] = [17.0, -1]
    return table


# A linear system whose clearance changes between periods, and visits within these ----------------


def visits(study):
    CL = fm.population("CL", dist.LogNormal(0.0, 0.5), init=1.2)
    a = fm.population("a", dist.HalfNormal(0.5), init=0.3)
    normal = fm.GaussianRandomEffect(["CL"], omega=0.4)
    eta = fm.random_effect("eta", normal, study.subjects, ["CL"])
    kappa = fm.random_effect("kappa", normal, study.occasions["PERIOD"])
    visit = fm.random_effect("visit", normal, study.occasions["VISIT"])
    total = eta.CL[:, None] + kappa.CL + visit.CL
    psi = fm.individual(study.subjects, CL=CL * jnp.exp(total), V=10.0)
    amount = fm.solve_linear(lambda p: [[-p.CL / p.V]], psi, study)
    fm.observe("conc", fm.residual.exponential(amount[..., 0] / 10, a), study)


def visits_table():
    """Two periods of one or two visits, each of a dose and one or two measurements."""
    rows = []
    for i in range(5):
        for k, (period, visit) in enumerate([(1, 1), (1, 2), (2, 1)][: 2 + i % 2 + i // 2]):
            start = {"ID": i, "PERIOD": period, "VISIT": visit, "TIME": 20.0 * k}
            rows.append({**start, "EVID": 1, "AMT": 50.0})
            later = [(4.0,), (3.0, 9.0)][(i + k) % 2]
            rows += [{**start, "TIME": 20.0 * k + t, "EVID": 0, "AMT": 0.0} for t in later]
    return pd.DataFrame(rows).assign(DVID="conc")


class Case(NamedTuple):
    """A model, its study, and where it is looked at.

    Attributes:
        model: the model.
        table: its records, without values.
        censored: the table of drawn values, some of them censored.
        options: of `Study.from_frame`.
        effects: the names of the components of each random effect.
        start: population parameters off the maximum, from which it is fitted.
        vague: population parameters at which the data say little of the random effects.
        draws: of a law, for an average over them.
    """

    model: Callable
    table: Callable
    censored: Callable
    options: dict[str, Any]
    effects: dict[str, list[str]]
    start: dict[str, Any]
    vague: dict[str, Any]
    draws: int


CASES = {
    "closed form": Case(
        clinic, clinic_table, clinic_censored,
        {"covariates": "WT", "categorical": {"SEX": ["F", "M"]}},
        {"eta": ["CL", "V"], "zeta": ["ka"]}, {"CL": 6.0}, {"b": 1.0}, 8192,
    ),
    "outcomes": Case(
        outcomes, outcomes_table, outcomes_censored, {},
        {"eta": ["level", "slope"], "zeta": ["risk"]}, {"rate": 6.0}, {}, 8192,
    ),
    "ODE": Case(
        ode, ode_table, ode_censored, {"time_varying": {"GROWTH": "linear"}},
        {"eta": ["Vm"], "zeta": ["Kd"]}, {"Vm": 7.0}, {"a": 4.0, "c": 0.5}, 1024,
    ),
    "occasions": Case(
        visits, visits_table, lambda table: table, {"occasions": ["PERIOD", "VISIT"]},
        {"eta": ["CL"], "kappa": ["CL"], "visit": ["CL"]}, {"CL": 2.5, "a": 0.6}, {"a": 1.0}, 8192,
    ),
}  # fmt: skip


@cache
def study_of(name: str) -> Study:
    """The study of a case, with values drawn from its model at its starting values."""
    case = CASES[name]
    table = case.table()
    table["DV"] = np.where(table.EVID == 0, 1.0, np.nan)
    empty = Study.from_frame(table, **case.options)
    model = with_law(name, "gaussian")
    joint = Joint.of(model, empty)
    values = joint.constrain(joint.unconstrain({}))
    eta = 0.4 * np.random.default_rng(0).normal(size=(empty.subjects.size, joint.effect_size))

    @jax.jit
    def draw(eta, study):
        given = substitute(model, {**values, **joint.split(eta)})
        sites = trace(seed(given, jax.random.key(1))).get_trace(study)
        return {name: sites[name]["value"] for name in joint.roles.outcomes}

    for outcome, value in draw(eta, empty.unobserved()).items():
        here = table.EVID.eq(0) & table.DVID.eq(outcome)
        table.loc[here, "DV"] = np.asarray(value, float)[empty.observed[outcome]]
    return Study.from_frame(case.censored(table), **case.options)


# Laws ---------------------------------------------------------------------------------------------

# By case the laws of its random effects; where there are several, so as to compile fewer programs.
LAWS: dict[tuple[str, str], dict[str, str]] = {
    (case, "gaussian"): dict.fromkeys(of.effects, "gaussian") for case, of in CASES.items()
} | {
    ("closed form", "t and mixture"): {"eta": "t", "zeta": "mixture"},
    ("closed form", "conditional flow and plain"): {"eta": "conditional", "zeta": "plain"},
    ("outcomes", "mixture and t"): {"eta": "mixture", "zeta": "t"},
    ("outcomes", "flow and plain"): {"eta": "flow", "zeta": "plain"},
    ("ODE", "t and mixture"): {"eta": "t", "zeta": "mixture"},
    ("ODE", "flow and plain"): {"eta": "flow", "zeta": "plain"},
    ("occasions", "t and mixture"): {"eta": "t", "kappa": "t", "visit": "mixture"},
    ("occasions", "flow and plain"): {"eta": "plain", "kappa": "flow", "visit": "flow"},
}  # fmt: skip
KINDS: dict[str, Callable] = {
    "gaussian": lambda names: fm.GaussianRandomEffect(names, full=True),
    "t": lambda names: fm.StudentTRandomEffect(names, full=True),
    "mixture": lambda names: fm.MixtureRandomEffect(names, full=True),
    "flow": fm.FlowRandomEffect,
}


@cache
def with_law(case: str, law: str) -> Callable:
    """The model of a case with these laws."""
    kinds, of = LAWS[case, law], CASES[case]
    own = {s: KINDS[k](of.effects[s]) for s, k in kinds.items() if k in KINDS}
    plain = [site for site, kind in kinds.items() if kind == "plain"]
    if not plain:
        return fm.replace_effect(of.model, **own)

    def model(study):
        laws = {}
        for site in plain:
            size = len(of.effects[site])
            sd = numpyro.sample(f"{site}_sd", dist.HalfNormal(1.0).expand([size]).to_event(1))
            laws[site] = dist.MultivariateNormal(jnp.zeros(size), scale_tril=jnp.diag(sd))
        return fm.replace_effect(of.model, **own, **laws)(study)

    return model


def at_gaussian(joint: Joint, sd: float) -> dict[str, Any]:
    """Values at which all laws are N(0, sd² I), or as good as."""
    values = {}
    for name, site in joint.roles.population.items():
        part = name.removeprefix(f"{site.effect}_") if site.effect else name
        if part == "omega" or name.endswith("_sd"):
            values[name] = np.full(site.shape, sd)
        elif part == "corr_cholesky":
            values[name] = np.broadcast_to(np.eye(site.shape[-1]), site.shape)
        elif part in ("df", "probs", "locs"):
            values[name] = np.broadcast_to({"df": 1e7, "probs": 0.5, "locs": 0.0}[part], site.shape)
    return values


def away(joint: Joint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and flow weights at which no law is Gaussian but those that always are."""
    values = {}
    for name, site in joint.roles.population.items():
        part = name.removeprefix(f"{site.effect}_") if site.effect else name
        if part == "omega" or name.endswith("_sd"):
            values[name] = np.linspace(0.3, 0.7, int(np.prod(site.shape))).reshape(site.shape)
        elif part == "corr_cholesky":
            size = site.shape[-1]
            tril = np.linalg.cholesky(0.4 * np.ones((size, size)) + 0.6 * np.eye(size))
            values[name] = np.broadcast_to(tril, site.shape)
        elif part in ("df", "probs", "locs"):
            values[name] = {"df": 3.0, "probs": np.array([0.3, 0.7]), "locs": -0.8}[part]
            values[name] = np.broadcast_to(values[name], site.shape)
    weights = {}
    for name in joint.roles.weights:
        law = joint.roles.laws[name.removesuffix("_weights")]
        weights[name] = bent_weights(law.flow, len(law.names), by=0.25)
    return values, weights
