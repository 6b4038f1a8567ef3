"""Features of `features.py` that say what was observed: several outcomes, counts, categories, times
to an event, censored values, correlated errors. Everything is drawn by NumPy and SciPy."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from feature import Feature, populations
from scipy import stats
from scipy.special import expit

import flowme as fm


def effects(study, *names):
    return fm.random_effect("eta", fm.GaussianRandomEffect(list(names)), study.subjects)


def long(y, times, **columns):
    """A table of y `[subject, time]`, with further columns of that shape."""
    i, j = np.indices(y.shape).reshape(2, -1)
    frame = pd.DataFrame({"ID": i, "TIME": np.asarray(times)[j], "DV": y.ravel()})
    return frame.assign(**{name: np.ravel(x) for name, x in columns.items()})


# Counts and categories ----------------------------------------------------------------------------

WEEKS, SUBJECTS = np.arange(8.0), 150


def generalised(law, draw, start=0.0, **more):
    """x = level + η + slope t, of which `law(x, ...)` is the law and `draw(rng, x, ...)` a draw.

    `more` are further positive parameters and their truth; of one below 1, a share.
    """
    truth = {"level": start, "slope": 0.15} | more | {"eta_omega": {"level": 0.6}}
    if not start:
        del truth["level"]  # the first of the cut points stands for it

    def model(study):
        level = fm.population("level", dist.Normal(0.0, 3.0)) if start else 0.0
        slope = fm.population("slope", dist.Normal(0.0, 1.0))
        others = [
            fm.population(name, dist.Beta(1.0, 1.0) if x < 1 else dist.LogNormal(1.0, 1.0))
            for name, x in more.items()
        ]
        x = level + effects(study, "level").level[:, None] + slope * study.time
        fm.observe("y", law(x, *others), study)

    def simulate(rng):
        eta = truth["eta_omega"]["level"] * rng.normal(size=(SUBJECTS, 1))
        y = draw(rng, start + eta + truth["slope"] * WEEKS, *more.values())
        return fm.Study.from_frame(long(y, WEEKS), outcome={"y": "DV"})

    return Feature(truth, model, simulate)


def negative_binomial(rng, x, concentration):
    p = concentration / (concentration + np.exp(x))
    return stats.nbinom.rvs(concentration, p, random_state=rng)


def beta_binomial(rng, x, size):
    p = expit(x)
    return stats.betabinom.rvs(10, size * p, size * (1 - p), random_state=rng)


def inflated(rng, x, gate):
    return rng.poisson(np.exp(x)) * (rng.uniform(size=x.shape) > gate)


def ordered(rng, x, below, gap):
    """0 below the cut point -below, 2 above -below + gap."""
    hidden = x + rng.logistic(size=x.shape)
    return (hidden > -below).astype(int) + (hidden > gap - below)


COUNTS = {
    "poisson": generalised(
        lambda x: dist.Poisson(jnp.exp(x)), lambda rng, x: rng.poisson(np.exp(x)), 0.7
    ),
    "negative-binomial": generalised(
        lambda x, c: dist.NegativeBinomial2(jnp.exp(x), c),
        negative_binomial,
        0.7,
        concentration=3.0,
    ),
    "binomial": generalised(
        lambda x: dist.Binomial(10, logits=x), lambda rng, x: rng.binomial(10, expit(x)), -0.8
    ),
    "beta-binomial": generalised(
        lambda x, n: dist.BetaBinomial(n / (1 + jnp.exp(-x)), n / (1 + jnp.exp(x)), 10),
        beta_binomial,
        -0.8,
        size=5.0,
    ),
    "zero-inflated": generalised(
        lambda x, gate: dist.ZeroInflatedPoisson(gate, jnp.exp(x)), inflated, 0.7, gate=0.3
    ),
    "binary": generalised(
        lambda x: dist.Bernoulli(logits=x),
        lambda rng, x: rng.uniform(size=x.shape) < expit(x),
        -0.8,
    ),
    "ordered": generalised(
        lambda x, below, gap: dist.OrderedLogistic(x, jnp.stack([-below, gap - below])),
        ordered,
        below=1.0,
        gap=2.0,
    ),
}

# Times to an event --------------------------------------------------------------------------------

EVENTS = dict(scale=8.0, shape=1.5, effect=0.5, eta_omega={"scale": 0.5})
TEETH, UNTIL, VISITS = 8, 12.0, 3.0


def events(law):
    """Eight times of each subject, half of the subjects treated."""

    def model(study):
        scale, shape = populations(scale=5, shape=1)
        effect = fm.population("effect", dist.Normal(0.0, 1.0))
        x = effect * study.covariates["arm"] + effects(study, "scale").scale
        own = jnp.broadcast_to((scale * jnp.exp(x))[:, None], study.time.shape)
        fm.observe("time", law(own, shape), study)

    return model


def times(rng, law):
    arm = np.arange(SUBJECTS)[:, None] % 2
    eta = EVENTS["eta_omega"]["scale"] * rng.normal(size=(SUBJECTS, 1))
    scale = EVENTS["scale"] * np.exp(EVENTS["effect"] * arm + eta)
    t = law.rvs(EVENTS["shape"], scale=scale, size=(SUBJECTS, TEETH), random_state=rng)
    return t, np.broadcast_to(arm, t.shape)


def draw_exact(rng):
    """Until 12, then censored."""
    t, arm = times(rng, stats.weibull_min)
    frame = long(np.minimum(t, UNTIL), np.arange(TEETH), arm=arm, CENS=-(t > UNTIL).astype(int))
    return fm.Study.from_frame(frame, outcome={"time": "DV"}, covariates="arm")


def draw_between(rng):
    """Seen at visits every 3 until 12: between which two, or not until then."""
    t, arm = times(rng, stats.fisk)
    after = np.minimum(np.ceil(t / VISITS) * VISITS, UNTIL)
    late = t > UNTIL
    frame = long(after, np.arange(TEETH), arm=arm, CENS=np.where(late, -1, 1))
    frame["LIMIT"] = np.where(late | (after == VISITS), np.nan, after - VISITS).ravel()
    return fm.Study.from_frame(frame, outcome={"time": "DV"}, covariates="arm")


def log_logistic(t, scale, shape):
    return jnp.log1p((t / scale) ** shape)


# Censored values ----------------------------------------------------------------------------------

DECLINE = dict(level=1.0, k=0.3, a=0.2, eta_omega=dict(level=0.4, k=0.3))
HOURS = np.array([0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0])


def decline(law):
    def model(study):
        level = fm.population("level", dist.Normal(1.0, 1.0))
        k = fm.population("k", dist.LogNormal(-1.0, 0.5))
        a = fm.population("a", dist.HalfNormal(0.5))
        eta = effects(study, "level", "k")
        rate = k * jnp.exp(eta.k)
        f = jnp.exp(level + eta.level[:, None] - rate[:, None] * study.time)
        fm.observe("y", law(f, a), study)

    return model


def declining(rng, subjects=100):
    """Predictions, [subject, time]."""
    eta = rng.normal(size=(subjects, 2)) * list(DECLINE["eta_omega"].values())
    return np.exp(DECLINE["level"] + eta[:, :1] - DECLINE["k"] * np.exp(eta[:, 1:]) * HOURS)


def positive(f, a):
    """A normal law given that y > 0: with CENS 1 and LIMIT 0, Beal's M4."""
    return dist.TruncatedNormal(f, a, low=0.0)


def draw_m4(rng):
    """y > 0, and below .5 not measured."""
    f = declining(rng)
    a = DECLINE["a"]
    y = stats.truncnorm.rvs(-f / a, np.inf, f, a, random_state=rng)
    low = y < 0.5
    limit = np.where(low, 0.0, np.nan)
    frame = long(np.where(low, 0.5, y), HOURS, CENS=low.astype(int), LIMIT=limit)
    return fm.Study.from_frame(frame, outcome={"y": "DV"})


def draw_above(rng):
    """The scale ends at 2."""
    f = declining(rng)
    y = f + DECLINE["a"] * rng.normal(size=f.shape)
    frame = long(np.minimum(y, 2.0), HOURS, CENS=-(y > 2).astype(int))
    return fm.Study.from_frame(frame, outcome={"y": "DV"})


def draw_interval(rng):
    """Between .3 and 1, and between 2 and 3, only that is known; below .3 not even so much."""
    f = declining(rng)
    y = f + DECLINE["a"] * rng.normal(size=f.shape)
    lowest, low, high = y < 0.3, (y >= 0.3) & (y < 1), (y > 2) & (y < 3)
    value = np.select([lowest, low, high], [0.3, 1.0, 2.0], y)
    limit = np.select([low, high], [0.3, 3.0], np.nan)
    cens = np.select([lowest | low, high], [1, -1], 0)
    return fm.Study.from_frame(long(value, HOURS, CENS=cens, LIMIT=limit), outcome={"y": "DV"})


# Several outcomes, and errors with a memory -------------------------------------------------------

PAIR = dict(CL=3.0, V=30.0, b=0.1, E0=100.0, C50=2.0, a=6.0, eta_omega=dict(CL=0.3, C50=0.4))
SAMPLED, EXAMINED = np.array([1.0, 2, 4, 8, 16]), np.array([0.5, 3, 6, 12, 18, 24, 36])


def pair(study):
    CL, V, E0, C50 = populations(CL=2, V=40, E0=80, C50=3)
    b = fm.population("b", dist.HalfNormal(0.5))
    a = fm.population("a", dist.HalfNormal(20.0))
    eta = effects(study, "CL", "C50")
    psi = fm.individual(study.subjects, CL=CL * jnp.exp(eta.CL), V=V)
    C = fm.iv_one_compartment(psi, study)
    half = (C50 * jnp.exp(eta.C50))[:, None]
    fm.observe("conc", fm.residual.proportional(C, b), study)
    fm.observe("effect", fm.residual.constant(E0 * half / (half + C), a), study)


def draw_pair(rng, subjects=100):
    eta = rng.normal(size=(subjects, 2)) * list(PAIR["eta_omega"].values())
    k, half = PAIR["CL"] * np.exp(eta[:, :1]) / PAIR["V"], PAIR["C50"] * np.exp(eta[:, 1:])
    sampled, C = (300 / PAIR["V"] * np.exp(-k * t) for t in (SAMPLED, EXAMINED))
    conc = sampled * (1 + PAIR["b"] * rng.normal(size=sampled.shape))
    effect = PAIR["E0"] * half / (half + C) + PAIR["a"] * rng.normal(size=C.shape)
    doses = pd.DataFrame({"ID": np.arange(subjects), "TIME": 0.0, "AMT": 300.0, "DVID": "conc"})
    doses = doses.assign(MDV=1)
    seen = [long(conc, SAMPLED).assign(DVID="conc"), long(effect, EXAMINED).assign(DVID="effect")]
    seen = pd.concat(seen).assign(AMT=0.0, MDV=0)
    frame = pd.concat([doses, seen]).sort_values(["ID", "TIME"], ignore_index=True)
    return fm.Study.from_frame(frame)


MEMORY = dict(level=1.0, k=0.1, b=0.2, tau=2.0, eta_omega=dict(level=0.4, k=0.3))
OFTEN = np.concatenate([np.arange(0.5, 6.5, 0.5), [8.0, 10, 12, 15, 18, 24]])


def remembering(study):
    level = fm.population("level", dist.Normal(1.0, 1.0))
    k = fm.population("k", dist.LogNormal(-2.0, 0.5))
    b = fm.population("b", dist.HalfNormal(0.5))
    (tau,) = populations(tau=1.0)
    eta = effects(study, "level", "k")
    rate = k * jnp.exp(eta.k)
    f = jnp.exp(level + eta.level[:, None] - rate[:, None] * study.time)
    fm.observe(
        "y", fm.residual.autocorrelated(fm.residual.proportional(f, b), tau, study, "y"), study
    )


def draw_remembering(rng, subjects=100):
    eta = rng.normal(size=(subjects, 2)) * list(MEMORY["eta_omega"].values())
    f = np.exp(MEMORY["level"] + eta[:, :1] - MEMORY["k"] * np.exp(eta[:, 1:]) * OFTEN)
    correlation = np.exp(-np.abs(OFTEN[:, None] - OFTEN) / MEMORY["tau"])
    error = rng.multivariate_normal(np.zeros(len(OFTEN)), correlation, subjects)
    y = f * (1 + MEMORY["b"] * error)
    return fm.Study.from_frame(long(y, OFTEN), outcome={"y": "DV"})


FEATURES = COUNTS | {
    "event": Feature(EVENTS, events(dist.Weibull), draw_exact),
    "event-between-visits": Feature(
        EVENTS,
        events(lambda *parameters: fm.outcomes.time_to_event(log_logistic, *parameters)),
        draw_between,
    ),
    "below-M4": Feature(DECLINE, decline(positive), draw_m4),
    "above": Feature(DECLINE, decline(fm.residual.constant), draw_above),
    "interval": Feature(DECLINE, decline(fm.residual.constant), draw_interval),
    "two-outcomes": Feature(PAIR, pair, draw_pair),
    "autocorrelated": Feature(MEMORY, remembering, draw_remembering),
}
