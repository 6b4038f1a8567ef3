"""Is flowme's NUTS worth its name? Effective draws per CPU second, divergences, R-hat.

    python benchmarks/nuts.py [ours] [numpyro] [rich]

Theophylline, model M1 of the reference values (weak priors; NUTS of 4 x 2000: ka 1.618, V 31.7,
CL 2.748, a 0.753). CPU seconds are of the whole process, of a call after one that compiled. The
minimum ESS is over all population parameters and random effects. NumPyro's own `MCMC` runs the
same model non-centred, from the same EM fit (from its default start chains get stuck), in two
ways: chains one after another with the progress bar, which compiles in the first run only, and
vectorised without it, which compiles in every run; its CPU seconds without the compilation are
given too.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import Reparam

import flowme as fm

jax.config.update("jax_enable_x64", True)

SEEDS = range(1, 6)
NAMES = ["ka", "V", "CL"]
COMPILED = [0.0]  # seconds (wall) spent compiling so far
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(seconds) if "backend_compile" in name else None
)


def oral(study):
    """One compartment, oral, lognormal ka, V, CL, diagonal Ω, constant error."""
    ka = fm.population("ka", dist.LogNormal(0.5, 0.5))
    V = fm.population("V", dist.LogNormal(3.4, 0.5))
    CL = fm.population("CL", dist.LogNormal(1.0, 0.5))
    a = fm.population("a", dist.HalfNormal(1.0))
    eta = fm.random_effect("eta", fm.GaussianRandomEffect(NAMES), study.subjects)
    psi = fm.individual(
        study.subjects, ka=ka * jnp.exp(eta.ka), V=V * jnp.exp(eta.V), CL=CL * jnp.exp(eta.CL)
    )
    fm.observe("conc", fm.residual.constant(fm.oral_one_compartment(psi, study), a), study)


class NonCentred(Reparam):
    """η as a function of standard normal z."""

    def __call__(self, name, fn, obs):
        law, shape = getattr(fn, "base_dist", fn), fn.batch_shape + fn.event_shape
        z = numpyro.sample(f"{name}_base", dist.Normal(0.0, 1.0).expand(shape[-1:]).to_event(1))
        return None, law.from_base(z)


def timed(run):
    """A run, its CPU seconds, and the seconds in it that went to compilation."""
    begun, compiled = time.process_time(), sum(COMPILED)
    mcmc = run()
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, time.process_time() - begun, sum(COMPILED) - compiled


def row(mcmc, seconds, compiled):
    draws = mcmc.get_samples(group_by_chain=True)
    sites = {k: np.asarray(draws[k]) for k in (*NAMES, "a", "eta_omega", "eta")}
    about = numpyro.diagnostics.summary(sites)
    least = min(float(np.min(v["n_eff"])) for v in about.values())
    fields = mcmc.get_extra_fields()
    return {
        "CPU s": seconds,
        "least ESS": least,
        "ESS per CPU s": least / seconds,
        # Compiling is known in wall time only: on a machine with more to do, nothing can be said.
        "without compilation": least / (seconds - compiled) if compiled < seconds else np.nan,
        "divergences": int(np.sum(fields["diverging"])),
        "largest R-hat": max(float(np.max(v["r_hat"])) for v in about.values()),
        "leapfrogs": float(np.mean(fields["num_steps"])),
        **{name: float(about[name]["mean"]) for name in (*NAMES, "a")},
    }


def fitted(study):
    return fm.VariationalEM(oral).run(jax.random.key(0), study, progress=False)


def ours(study=None):
    """flowme: 4 chains of 200 + 1000; seed 0 compiles."""
    study = fm.datasets.theophylline() if study is None else study
    fit = fitted(study)
    for seed in (0, *SEEDS):
        run = timed(lambda: fm.nuts(oral, study, jax.random.key(seed), fit=fit, progress=False))
        yield {"seed": seed, "compiling s": run[2], **row(*run)}


def numpyro_own():
    """NumPyro's MCMC, non-centred: 4 chains of 500 + 1000; the first run of each way compiles."""
    study = fm.datasets.theophylline()
    fit = fitted(study)
    values = dict(fit.params)
    values["eta_base"] = fit.conditional.mean / fit.params["eta_omega"]
    for way, bar in {"sequential": True, "vectorized": False}.items():
        for seed in range(3):
            # A vectorised MCMC of NumPyro 0.22 cannot be run a second time.
            if seed == 0 or way == "vectorized":
                kernel = NUTS(
                    reparam(oral, config={"eta": NonCentred()}),
                    init_strategy=init_to_value(values=values),
                )
                mcmc = MCMC(
                    kernel, num_warmup=500, num_samples=1000, num_chains=4,
                    chain_method=way, progress_bar=bar,
                )  # fmt: skip

            def run(mcmc=mcmc, seed=seed):
                mcmc.run(jax.random.key(seed), study, extra_fields=("num_steps",))
                return mcmc

            found = timed(run)
            yield {"chains": way, "bar": bar, "seed": seed, "compiling s": found[2], **row(*found)}


def rich():
    """flowme, 100 simulated subjects with 10 observations each (ω .5, .2, .3, error .5)."""
    rng = np.random.default_rng(0)
    grid, rows = np.array([0.25, 0.5, 1, 2, 4, 6, 8, 12, 18, 24]), []
    for i in range(100):
        ka, V, CL = np.array([1.5, 32.0, 2.8]) * np.exp(rng.normal(size=3) * [0.5, 0.2, 0.3])
        t = grid * np.exp(0.1 * rng.normal(size=10))
        f = 320 * ka / (V * ka - CL) * (np.exp(-CL / V * t) - np.exp(-ka * t))
        rows.append((i, 0.0, 320.0, np.nan, 1))
        rows += [(i, a, 0.0, b, 0) for a, b in zip(t, f + 0.5 * rng.normal(size=10), strict=True)]
    frame = pd.DataFrame(rows, columns=["ID", "TIME", "AMT", "DV", "EVID"])
    yield from ours(fm.Study.from_frame(frame, outcome={"conc": "DV"}))


if __name__ == "__main__":
    questions = {"ours": ours, "numpyro": numpyro_own, "rich": rich}
    for name in sys.argv[1:] or questions:
        print(f"\n{questions[name].__doc__}", flush=True)
        print(pd.DataFrame(questions[name]()).round(3).to_string(index=False), flush=True)
