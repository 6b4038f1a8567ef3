"""Named cases over which the laws in the tests run."""

import jax
import jax.numpy as jnp
import numpy as np

from flowme import flows
from flowme.effects import GaussianRandomEffect, StudentTRandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.mixture_effect import MixtureRandomEffect

FLOWS = {
    "spline coupling, 3d": (flows.SplineCoupling(layers=3, width=5, bins=6), 3),
    "deep splines alone, 5d": (flows.SplineCoupling(width=8, depth=2, components=0), 5),
    "marginal mixture, 1d": (flows.MarginalMixture(), 1),
    "marginal mixture, 3d": (flows.MarginalMixture(components=4), 3),
    "monotone spline, 3d": (flows.MonotoneSpline(bins=5), 3),
}


def bent_weights(flow: flows.Flow, dim: int, seed: int = 1, by: float = 0.4) -> jax.Array:
    """Weights far from the identity."""
    start = flow.init(jax.random.key(seed), dim)
    scale = by * flow.prior_scale(dim)
    return start + scale * jax.random.normal(jax.random.key(seed + 1), start.shape)


def _corr_cholesky(size: int) -> jax.Array:
    correlation = 0.4 * np.ones((size, size)) + 0.6 * np.eye(size)
    return jnp.asarray(np.linalg.cholesky(correlation))


def _flow(names, flow=None, **options):
    effect = FlowRandomEffect(names, flow, omega=np.linspace(0.3, 0.8, len(names)), **options)
    return effect.with_parameters(
        weights=bent_weights(effect.flow, len(names), by=0.25),
        corr_cholesky=_corr_cholesky(len(names)),
    )


EFFECTS = {
    "gaussian, diagonal": GaussianRandomEffect(["ka", "V", "CL"], omega=[0.6, 0.2, 0.3]),
    "gaussian, full": GaussianRandomEffect(["ka", "V"], full=True).with_parameters(
        corr_cholesky=_corr_cholesky(2)
    ),
    "gaussian, one": GaussianRandomEffect(["phi"], omega=2.0),
    "student t": StudentTRandomEffect(["ka", "V"], df=9.0, full=True).with_parameters(
        corr_cholesky=_corr_cholesky(2)
    ),
    "mixture": MixtureRandomEffect(["ka", "V"], 3).with_parameters(
        probs=jnp.array([0.2, 0.5, 0.3])
    ),
    "mixture, full": MixtureRandomEffect(["ka", "V"], full=True, spread=2.0).with_parameters(
        probs=jnp.array([0.3, 0.7]), corr_cholesky=jnp.stack([_corr_cholesky(2), jnp.eye(2)])
    ),
    "flow at its start": FlowRandomEffect(["ka", "V", "CL"]),
    "flow": _flow(["ka", "V", "CL"]),
    "flow, one": _flow(["phi"]),
    "flow, free": _flow(["phi", "psi"], flows.SplineCoupling(components=0), centred=False),
}


def theophylline_model(effect=None, error="constant"):
    """Model M1 of theophylline: lognormal ka, V, CL, one compartment, oral."""
    import numpyro.distributions as dist

    import flowme as fm

    effect = fm.GaussianRandomEffect(["ka", "V", "CL"]) if effect is None else effect

    def model(study):
        ka = fm.population("ka", dist.LogNormal(0.5, 0.5), unit="1/h")
        V = fm.population("V", dist.LogNormal(3.4, 0.5), unit="L")
        CL = fm.population("CL", dist.LogNormal(1.0, 0.5), unit="L/h")
        a = fm.population("a", dist.HalfNormal(1.0), unit="mg/L")
        eta = fm.random_effect("eta", effect, study.subjects)
        psi = fm.individual(
            study.subjects,
            ka=ka * jnp.exp(eta.ka),
            V=V * jnp.exp(eta.V),
            CL=CL * jnp.exp(eta.CL),
        )
        f = fm.oral_one_compartment(psi, study)
        if error == "constant":
            law = fm.residual.constant(f, a)
        else:
            law = getattr(fm.residual, error)(f, a, fm.population("b", dist.HalfNormal(0.5)))
        fm.observe("conc", law, study)

    return model


def line_model(effect=None, fixed=None):
    """A linear mixed model, y_ij = (β₀ + η₀) + (β₁ + η₁) t_ij + a ε: its likelihood is exact."""
    import numpyro.distributions as dist

    import flowme as fm

    effect = fm.GaussianRandomEffect(["level", "slope"], full=True) if effect is None else effect
    fixed = fixed or {}

    def model(study):
        level = fm.population("level", dist.Normal(0.0, 10.0), fixed=fixed.get("level"))
        slope = fm.population("slope", dist.Normal(0.0, 10.0), fixed=fixed.get("slope"))
        a = fm.population("a", dist.HalfNormal(5.0), fixed=fixed.get("a"))
        eta = fm.random_effect("eta", effect, study.subjects)
        psi = fm.individual(study.subjects, level=level + eta.level, slope=slope + eta.slope)
        f = psi.level[:, None] + psi.slope[:, None] * study.time
        fm.observe("y", fm.residual.constant(f, a), study)

    return model


def line_study(subjects=40, seed=0):
    """Data of the linear mixed model, 3 to 6 times per subject."""
    import pandas as pd

    import flowme as fm

    rng = np.random.default_rng(seed)
    rows = []
    for subject in range(subjects):
        level, slope = rng.multivariate_normal([2.0, -1.0], [[1.0, 0.3], [0.3, 0.4]])
        for t in np.sort(rng.choice(np.arange(8), rng.integers(3, 7), replace=False)):
            rows.append((f"s{subject}", float(t), level + slope * t + 0.5 * rng.normal()))
    frame = pd.DataFrame(rows, columns=["id", "t", "y"])
    return fm.Study.from_frame(frame, subject="id", time="t", outcome="y")


def line_exact(study, level, slope, a, omega_matrix):
    """Exact log p(y_i) and E(η_i | y_i), Cov(η_i | y_i) of the linear mixed model."""
    from scipy.stats import multivariate_normal

    log_p, means, covariances = [], [], []
    for i in range(study.subjects.size):
        keep = study.observed["y"][i]
        t, y = study.time[i, keep], study.values["y"][i, keep]
        Z = np.stack([np.ones_like(t), t], 1)
        V = Z @ omega_matrix @ Z.T + a**2 * np.eye(len(t))
        residual = y - level - slope * t
        log_p.append(multivariate_normal(np.zeros(len(t)), V).logpdf(residual))
        gain = omega_matrix @ Z.T @ np.linalg.inv(V)
        means.append(gain @ residual)
        covariances.append(omega_matrix - gain @ Z @ omega_matrix)
    return np.array(log_p), np.array(means), np.array(covariances)


def differences(function, x, h=1e-3):
    """Gradient `[parameter, ...]` and Hessian of a sum, by central differences."""
    eye = h * np.eye(len(x))
    first = np.array([function(x + a) - function(x - a) for a in eye]) / (2 * h)

    def total(at):
        return np.sum(function(at))

    second = [
        [total(x + a + b) - total(x + a - b) - total(x - a + b) + total(x - a - b) for b in eye]
        for a in eye
    ]
    return first, np.array(second) / (4 * h**2)


def one_level(sites=("level",), effect=None):
    """y_ij = Σ sites + η + a ε."""

    import numpyro.distributions as dist

    import flowme as fm

    effect = fm.GaussianRandomEffect(["level"]) if effect is None else effect

    def model(study):
        levels = [fm.population(name, dist.Normal(0.0, 10.0)) for name in sites]
        a = fm.population("a", dist.HalfNormal(5.0))
        eta = fm.random_effect("eta", effect, study.subjects)
        f = sum(levels) + eta.level
        fm.observe("y", fm.residual.constant(f[:, None] + 0.0 * study.time, a), study)

    return model


def normal_study(between, subjects=30, times=4, seed=0):
    """y_ij = 3 + between η_i + .5 ε_ij, the η_i and, within a subject, the ε_ij centred."""
    import pandas as pd

    import flowme as fm

    rng = np.random.default_rng(seed)
    eta, noise = rng.normal(size=subjects), rng.normal(size=(subjects, times))
    y = 3 + between * (eta - eta.mean())[:, None] + 0.5 * (noise - noise.mean(1, keepdims=True))
    rows = [(i, t, y[i, t]) for i in range(subjects) for t in range(times)]
    frame = pd.DataFrame(rows, columns=["id", "t", "y"])
    return fm.Study.from_frame(frame, subject="id", time="t", outcome="y")
