"""Does a population need more than a Gaussian? And are Monte-Carlo errors what they say?

    python benchmarks/compare.py [two] [gaussian] [senescence] [wheat] [importance]

Held-out -2LL of seven laws of the random effects, its difference to the Gaussian's with the
standard error of the difference, and CPU seconds (compilation included). Interrupted (Ctrl-C), it
goes on from the files in `benchmarks/.compare/` when it is called again. The wheat scores lie in
`../shared/data`; they may not be shipped.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from first_fit import NAMES, oral

import flowme as fm
from flowme.infer.marginal import estimate_marginal

jax.config.update("jax_enable_x64", True)

KEPT = Path(__file__).parent / ".compare"
WHEAT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wheat_senescence.csv"


def two():
    """Two subpopulations, 500 subjects, 5 folds: a Gaussian loses about 430 of -2LL."""
    study = fm.datasets.two_subpopulations(1).study
    yield compared("two", oral(fm.GaussianRandomEffect(NAMES, full=True)), study)


def gaussian():
    """A Gaussian truth, 500 subjects, 5 folds: nothing should be found."""
    study = fm.datasets.gaussian_population(1).study
    yield compared("gaussian", oral(fm.GaussianRandomEffect(NAMES, full=True)), study)


def senescence():
    """200 varieties, binomial counts, 5 folds: two strategies, one of them skewed."""

    def model(study):
        phi = fm.population("phi", dist.Normal(15.0, 5.0))
        psi = fm.population("psi", dist.LogNormal(0.7, 0.5))
        effect = fm.GaussianRandomEffect(["phi", "psi"], full=True, omega=[3.0, 0.3])
        eta = fm.random_effect("eta", effect, study.subjects)
        each = fm.individual(
            study.subjects, name="variety", phi=phi + eta.phi, psi=psi * jnp.exp(eta.psi)
        )
        logits = (study.time - each.phi[:, None]) / each.psi[:, None]
        fm.observe("withered", dist.Binomial(12, logits=logits), study)

    yield compared("senescence", model, fm.datasets.senescence(1).study)


def wheat():
    """Real wheat scores, 220 varieties, 10 folds: log-likelihood per variety by a probe: Gaussian
    -53.14, smoothed NPMLE -52.90, flow -52.91, mixture of 3 -52.83; all by saemix: -2LL 23312.19,
    phi 15.966, psi 2.707, SD 1.985 and .161, correlation -.47, a 3.905."""
    study = fm.Study.from_frame(
        pd.read_csv(WHEAT), subject="id", time="day", outcome={"score": "senescence_pct"}
    )
    fit, seconds = timed(
        lambda: fm.VariationalEM(scores).run(jax.random.key(0), study, progress=False)
    )
    tril = fit.params["eta_corr_cholesky"]
    yield pd.Series(
        {
            "-2LL": fit.minus_two_ll,
            **{name: float(fit.params[name]) for name in ("phi", "psi", "a")},
            "SD": np.round(np.asarray(fit.params["eta_omega"]), 3),
            "correlation": float((tril @ tril.T)[1, 0]),
            "CPU s": seconds,
        }
    ).to_string()
    found = compared("wheat", scores, study, folds=10)
    yield found
    yield (-found.table["held-out -2LL"] / 2 / found.judged.sum()).round(3).to_string()


def scores(study):
    """Scores 0 to 100, 100 / (1 + exp(-(t - φ)/ψ)), φ normal, ψ lognormal, constant error."""
    phi = fm.population("phi", dist.Normal(15.0, 5.0))
    psi = fm.population("psi", dist.LogNormal(1.0, 0.5))
    a = fm.population("a", dist.HalfNormal(10.0))
    effect = fm.GaussianRandomEffect(["phi", "psi"], full=True, omega=[3.0, 0.3])
    eta = fm.random_effect("eta", effect, study.subjects)
    each = fm.individual(
        study.subjects, name="variety", phi=phi + eta.phi, psi=psi * jnp.exp(eta.psi)
    )
    f = 100 * jax.nn.sigmoid((study.time - each.phi[:, None]) / each.psi[:, None])
    fm.observe("score", fm.residual.constant(f, a), study)


def importance():
    """Importance sampling, 500 subjects of two subpopulations: CPU seconds after compilation, the
    stated standard error of the total, and z-scores of 100 totals against one of 64 times the
    points: their SD should be near 1."""
    study = fm.datasets.two_subpopulations(1).study
    for effect in (
        fm.GaussianRandomEffect(NAMES, full=True), fm.MixtureRandomEffect(NAMES, full=True)
    ):  # fmt: skip
        vem = fm.VariationalEM(oral(effect), starts=1)
        fit = vem.run(jax.random.key(0), study, progress=False)

        def total(seed, **more):
            key = jax.random.key(seed)
            return estimate_marginal(key, fit.joint, fit.theta, fit.weights, study, **more)

        total(0)
        found, seconds = timed(lambda: [total(seed) for seed in range(1, 101)])
        exact = np.mean([total(seed, points=2560).total for seed in range(101, 109)])
        z = np.array([(x.total - exact) / x.total_se for x in found])
        row = {
            "CPU s": seconds / 100,
            "total SE": np.mean([x.total_se for x in found]),
            "mean z": z.mean(),
            "SD z": z.std(ddof=1),
            "|z| < 1.96": np.mean(np.abs(z) < 1.96),
            "largest Pareto k": max(x.pareto_k.max() for x in found),
        }
        yield f"{type(effect).__name__}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items())


def compared(name, model, study, folds=5):
    KEPT.mkdir(exist_ok=True)
    return fm.compare(
        model, study, jax.random.key(0), folds=folds, path=KEPT / name, starts=1,
        progress=sys.stderr.isatty(),
    )  # fmt: skip


def timed(run):
    begun = time.process_time()
    return run(), time.process_time() - begun


if __name__ == "__main__":
    questions = {f.__name__: f for f in (two, gaussian, senescence, wheat, importance)}
    for name in sys.argv[1:] or questions:
        print(f"\n{questions[name].__doc__}", flush=True)
        for answer in questions[name]():
            print(answer, flush=True)
