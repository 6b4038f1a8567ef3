"""Does flowme find the published estimates of classical data sets? One table for each.

    python benchmarks/references.py [orange] [indomethacin] [phenobarbital] [oxboys] [wheat]
                                    [isoniazid]

Beside every estimate stands its reference and the difference in per cent. References are "exact"
(the maximum likelihood itself: -2LL is to agree within .3) or "linearised" (another quantity, of
which estimates are to agree within 2 %; R's nlme). Where a linearised reference is further away,
two programs that share no code with flowme say why: `quadrature` is the maximum likelihood by
`benchmarks/quadrature.py`, which flowme is to find; `linearised` is what nlme's alternation comes
to by `benchmarks/linearised.py`, and is to agree with the reference within .5 %. `*` marks what is
beyond its tolerance. The data in ../shared are read where they lie, and their tables left out if
they are not there.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from independent import Independent, independently

import flowme as fm

jax.config.update("jax_enable_x64", True)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class Reference(NamedTuple):
    """A data set, its model, and what is known about it.

    Attributes:
        study: reads the data.
        model: the model.
        values: estimate by its label, as `fm.summary` names them; SD are those of η.
        minus_two_ll: of the reference; None where none is published.
        kind: "exact" or "linearised".
        independent: the prediction of a subject in NumPy, from (β, η) and a subject's times and
            doses; None where nothing is in doubt. `values` then begins with β, ω, s in its order.
        init: where the estimation starts, for parameters far from the middle of their priors.
    """

    study: Callable[[], fm.Study]
    model: Callable[[fm.Study], None]
    values: dict[str, float]
    minus_two_ll: float | None
    kind: str
    independent: Callable[..., Any] | None = None
    init: dict[str, float] | None = None


def growth(study):
    """Logistic growth with a random asymptote, in which the model is linear."""
    asymptote = fm.population("asymptote", dist.Normal(200.0, 100.0), unit="mm")
    middle = fm.population("middle", dist.Normal(700.0, 300.0), unit="d")
    pace = fm.population("pace", dist.LogNormal(6.0, 1.0), unit="d")
    a = fm.population("a", dist.HalfNormal(20.0), unit="mm")
    eta = fm.random_effect(
        "eta", fm.GaussianRandomEffect(["asymptote"], omega=30.0), study.subjects
    )
    psi = fm.individual(study.subjects, asymptote=asymptote + eta.asymptote)
    f = psi.asymptote[:, None] / (1 + jnp.exp(-(study.time - middle) / pace))
    fm.observe("circumference", fm.residual.constant(f, a), study)


def growth_of_one(t, doses):
    return lambda beta, eta: (beta[0] + eta) / (1 + np.exp(-(t - beta[1]) / beta[2]))


def biexponential(study):
    """Two exponentials; A1, log rate 1 and A2 vary."""
    A1 = fm.population("A1", dist.Normal(2.0, 2.0), unit="mg/L")
    lrc1 = fm.population("lrc1", dist.Normal(0.0, 1.0))
    A2 = fm.population("A2", dist.Normal(0.5, 1.0), unit="mg/L")
    lrc2 = fm.population("lrc2", dist.Normal(-1.0, 1.0))
    a = fm.population("a", dist.HalfNormal(0.5), unit="mg/L")
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["A1", "lrc1", "A2"]), study.subjects)
    psi = fm.individual(study.subjects, A1=A1 + eta.A1, lrc1=lrc1 + eta.lrc1, A2=A2 + eta.A2)
    fast = psi.A1[:, None] * jnp.exp(-jnp.exp(psi.lrc1)[:, None] * study.time)
    slow = psi.A2[:, None] * jnp.exp(-jnp.exp(lrc2) * study.time)
    fm.observe("conc", fm.residual.constant(fast + slow, a), study)


def biexponential_of_one(t, doses):
    def f(beta, eta):
        A1, lrc1, A2 = (beta[:3] + eta).T[:, :, None]
        return A1 * np.exp(-np.exp(lrc1) * t) + A2 * np.exp(-np.exp(beta[3]) * t)

    return f


def neonates(study):
    """One compartment, boluses; lognormal CL and V."""
    CL = fm.population("CL", dist.LogNormal(-5.0, 1.0), unit="L/h")
    V = fm.population("V", dist.LogNormal(0.5, 1.0), unit="L")
    a = fm.population("a", dist.HalfNormal(5.0), unit="mg/L")
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(["CL", "V"]), study.subjects)
    psi = fm.individual(study.subjects, CL=CL * jnp.exp(eta.CL), V=V * jnp.exp(eta.V))
    fm.observe("conc", fm.residual.constant(fm.iv_one_compartment(psi, study), a), study)


def neonates_of_one(t, doses):
    times, amounts = doses
    since = t[:, None] - times  # [time, dose]

    def f(beta, eta):
        CL, V = (np.exp(beta + eta)).T[:, :, None, None]
        decay = np.where(since >= 0, np.exp(-CL / V * np.maximum(since, 0)), 0.0)
        return (amounts / V * decay).sum(-1)

    return f


def heights(study):
    """A line for each boy."""
    level = fm.population("level", dist.Normal(150.0, 20.0), unit="cm")
    slope = fm.population("slope", dist.Normal(5.0, 5.0))
    a = fm.population("a", dist.HalfNormal(5.0), unit="cm")
    law = fm.GaussianRandomEffect(["level", "slope"], full=True, omega=5.0)
    eta = fm.random_effect("eta", law, study.subjects)
    psi = fm.individual(study.subjects, level=level + eta.level, slope=slope + eta.slope)
    f = psi.level[:, None] + psi.slope[:, None] * study.time
    fm.observe("height", fm.residual.constant(f, a), study)


def withering(study):
    """Logistic senescence, full Ω of φ and log ψ."""
    phi = fm.population("phi", dist.Normal(15.0, 5.0), unit="d")
    psi = fm.population("psi", dist.LogNormal(1.0, 0.5), unit="d")
    a = fm.population("a", dist.HalfNormal(10.0), unit="%")
    law = fm.GaussianRandomEffect(["phi", "psi"], full=True, omega=[2.0, 0.3])
    eta = fm.random_effect("eta", law, study.subjects)
    each = fm.individual(
        study.subjects, name="variety", phi=phi + eta.phi, psi=psi * jnp.exp(eta.psi)
    )
    f = 100 * jax.nn.sigmoid((study.time - each.phi[:, None]) / each.psi[:, None])
    fm.observe("senescence", fm.residual.constant(f, a), study)


def acetylators(weight, genotype):
    """One compartment; lognormal V and CL, which weight scales by powers that are estimated; the
    genotype has two effects on log CL. The first sample, at 1 h, does not tell ka: it is held at
    100/h, without a random effect. References: the maximum of the likelihood by the trapezoidal
    rule over a grid of (log V, log CL/V), which a grid four times finer changes by less than .001.

    Published are 1848.2 without covariates, 1720.6 with weight and 1657.0 with genotype too
    (saemix), which are no maxima: there ka and ω(ka) are estimated, along which the likelihood is
    a ridge. By the same rule in three dimensions, the others at their maximum given ω(ka), -2LL is
        ω(ka)       0       1.5      2.2      3.2     free
        none     1850.66  1848.60  1846.30  1845.22  1844.9 (ω 4.6, ka e^10.5/h)
        weight   1724.79  1722.17  1719.83  1718.76  1718.4
        genotype 1659.49  1656.59  1654.44  1653.52  1653.3
    and the published values are those at ω(ka) of about 1.6, 2.0 and 1.4. At any ω(ka) the
    genotype is worth 65.1 to 65.6."""

    def model(study):
        ka = fm.population("ka", dist.LogNormal(0.5, 1.0), fixed=100.0, unit="1/h")
        V = fm.population("V", dist.LogNormal(4.0, 1.0), unit="L")
        CL = fm.population("CL", dist.LogNormal(3.0, 1.0), unit="L/h")
        b = fm.population("b", dist.HalfNormal(0.5))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["V", "CL"]), study.subjects)
        log_V, log_CL = eta.V, eta.CL
        if weight:
            size = jnp.log(study.covariates["WT"] / 70)
            log_V = log_V + fm.population("WT on V", dist.Normal(1.0, 0.5)) * size
            log_CL = log_CL + fm.population("WT on CL", dist.Normal(0.75, 0.5)) * size
        if genotype:
            law = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
            log_CL = log_CL + fm.covariate.by_level(
                study, "ACE_PROFILE", fm.population("genotype", law)
            )
        psi = fm.individual(
            study.subjects, ka=ka + 0 * eta.V, V=V * jnp.exp(log_V), CL=CL * jnp.exp(log_CL)
        )
        fm.observe("conc", fm.residual.proportional(fm.oral_one_compartment(psi, study), b), study)

    return model


def shared(name, *args, **options):
    return lambda: fm.Study.from_csv(SHARED / f"{name}.csv", *args, **options)


def without_censored():
    return fm.datasets.isoniazid(censored=False)


CLEARED = {"V": 80.0, "CL": 20.0}
REFERENCES = {
    "orange": [
        Reference(
            fm.datasets.orange, growth,
            {"asymptote": 191.05, "middle": 722.56, "pace": 344.17, "omega(asymptote)": 31.483,
             "a": 7.8463},
            2 * 131.5846, "exact", growth_of_one, {"middle": 700.0, "pace": 350.0, "a": 10.0},
        )
    ],
    "indomethacin": [
        Reference(
            fm.datasets.indomethacin, biexponential,
            {"A1": 2.8276, "lrc1": 0.77341, "A2": 0.46121, "lrc2": -1.3446,
             "omega(A1)": 0.57138, "omega(lrc1)": 0.1581, "omega(A2)": 0.11156, "a": 0.081495},
            -2 * 54.5942, "linearised", biexponential_of_one,
        )
    ],
    "phenobarbital": [
        Reference(
            shared("phenobarbital", outcome={"conc": "DV"}), neonates,
            {"CL": np.exp(-5.0932), "V": np.exp(0.34253), "omega(CL)": 0.44021,
             "omega(V)": 0.45044, "a": 2.7927},
            2 * 505.4157, "linearised", neonates_of_one,
        )
    ],
    "oxboys": [
        Reference(
            shared("oxboys", "Subject", "age", "height"), heights,
            {"level": 149.3718, "slope": 6.525467, "omega(level)": 7.92403,
             "omega(slope)": 1.64672, "a": 0.65989},
            725.9677, "exact",
        )
    ],
    "wheat": [
        Reference(
            shared("wheat_senescence", "id", "day", {"senescence": "senescence_pct"}), withering,
            {"phi": 15.966, "psi": 2.707, "omega(phi)": 1.985, "omega(psi)": 0.161, "a": 3.905},
            23312.19, "exact",
        )
    ],
    "isoniazid": [
        Reference(
            without_censored, acetylators(False, False),
            {"V": 91.99, "CL": 20.30, "b": 0.4043, "omega(V)": 0.4144, "omega(CL)": 0.4669},
            1850.705, "exact", None, CLEARED,
        ),
        Reference(
            without_censored, acetylators(True, False),
            {"V": 86.50, "CL": 19.16, "b": 0.4065, "omega(V)": 0.2544, "omega(CL)": 0.3395,
             "WT on V": 1.3855, "WT on CL": 1.3548},
            1724.868, "exact", None, CLEARED,
        ),
        Reference(
            without_censored, acetylators(True, True),
            {"V": 86.25, "CL": 14.59, "b": 0.4149, "omega(V)": 0.2164, "omega(CL)": 0.2229,
             "WT on V": 1.3973, "WT on CL": 1.2753, "genotype(1)": 0.4083, "genotype(2)": 0.6388},
            1659.507, "exact", None, CLEARED,
        ),
    ],
}  # fmt: skip


def estimates(fit):
    """The estimates by label, as in the summary."""
    return fm.summary(fit).frame["estimate"].to_dict()


def table(reference):
    """One row for each estimate, and one for -2LL."""
    study, cpu = reference.study(), time.process_time()
    vem = fm.VariationalEM(reference.model)
    fit = vem.run(jax.random.key(0), study, init=reference.init, progress=False)
    cpu = time.process_time() - cpu
    again = time.process_time()
    vem.run(jax.random.key(1), study, init=reference.init, progress=False)
    again = time.process_time() - again
    print(
        f"{study}\n{'converged' if fit.converged else 'NOT CONVERGED'}; {cpu:.1f} CPU s "
        f"({fit.seconds.compilation:.1f} s compilation), {again:.1f} CPU s again; "
        f"{'; '.join(fit.messages)}"
    )
    found, rows = estimates(fit), []
    other = Independent({}, (np.nan,) * 3, {}, np.nan)
    if reference.independent is not None:
        other = independently(reference, found, study)
    for name, value in found.items():
        row = {"parameter": name, "flowme": f"{value:.5g}"}
        if name in reference.values:
            row |= compared(value, reference.values[name], "reference")
        if name in other.exact:
            row |= compared(value, other.exact[name], "quadrature")
            far = compared(other.linearised[name], reference.values[name], "reference", 0.5)
            row["linearised"] = f"{other.linearised[name]:.5g}"
            row["its % from reference"] = far["% from reference"]
        rows.append(row)
    row = {"parameter": "-2LL", "flowme": f"{fit.minus_two_ll:.3f} ± {fit.minus_two_ll_se:.3f}"}
    if reference.minus_two_ll is not None:
        far = abs(fit.minus_two_ll - reference.minus_two_ll) > 0.3 and reference.kind == "exact"
        row["reference"] = f"{reference.minus_two_ll:.3f} ({reference.kind})" + " *" * far
    if other.exact:
        row["quadrature"] = f"{other.minus_two_ll[0]:.3f}"
        row["linearised"] = f"{other.linearised_minus_two_ll:.3f}"
        print(
            "-2LL by quadrature: {:.3f} at its minimum, {:.3f} at flowme's estimates, {:.3f} at "
            "the reference".format(*other.minus_two_ll)
        )
    print(pd.DataFrame([*rows, row]).fillna("").to_string(index=False))


def compared(value, reference, title, most=2.0):
    percent = 100 * (value / reference - 1)
    far = " *" if abs(percent) > most else ""
    return {title: f"{reference:.5g}", f"% from {title}": f"{percent:+.2f}{far}"}


if __name__ == "__main__":
    for name in sys.argv[1:] or REFERENCES:
        for reference in REFERENCES[name]:
            print(f"\n{name}: {reference.model.__doc__ or acetylators.__doc__}", flush=True)
            try:
                table(reference)
            except FileNotFoundError as error:
                print(f"left out: no {error.filename}")
