"""Two strategies of leaf senescence, found without being told; and theophylline beside it.

Fits the Gaussian and the flow model to withered-leaf counts of 200 simulated varieties, compares
them on held-out varieties, and leaves figures and results in a folder.

    python examples/demo.py [folder]
"""

import os
import sys
import time
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

import flowme as fm  # noqa: E402

FAST = bool(os.environ.get("FLOWME_FAST"))  # a short setting, for tests


def senescence(effect):
    """Withered leaves out of 12: y_ij ~ Binomial(12, 1 / (1 + exp(-(t_ij - φ_i) / ψ_i)))."""

    def model(study):
        phi = fm.population("phi", dist.Normal(15.0, 5.0), unit="d", label="half withered")
        psi = fm.population("psi", dist.LogNormal(0.7, 0.5), unit="d", label="pace")
        eta = fm.random_effect("eta", effect, study.subjects)
        variety = fm.individual(
            study.subjects, name="variety", phi=phi + eta.phi, psi=psi * jnp.exp(eta.psi)
        )
        progress = (study.time - variety.phi[:, None]) / variety.psi[:, None]
        fm.observe("withered", dist.Binomial(12, logits=progress), study)

    return model


def theophylline(effect):
    """Theophylline: one compartment, oral; constant residual error."""

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
        fm.observe("conc", fm.residual.constant(fm.oral_one_compartment(psi, study), a), study)

    return model


def fit(title, model, study, seed):
    print(f"\n--- {title} ---", flush=True)
    begun = time.perf_counter()
    settings = {"flow_updates": 5, "folds": 2} if FAST else {}
    result = fm.VariationalEM(model, **settings).run(jax.random.key(seed), study)
    print(fm.summary(result))
    print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    return result


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    varieties = 40 if FAST else 200
    effects = {
        "Gaussian": fm.GaussianRandomEffect(["phi", "psi"], full=True),
        "flow": fm.FlowRandomEffect(["phi", "psi"]),
    }

    study = fm.datasets.senescence(seed=0, varieties=varieties).study
    new = fm.datasets.senescence(seed=1000, varieties=varieties).study
    print(study)
    fits = {
        name: fit(f"Senescence, {name}", senescence(effect), study, seed=0)
        for name, effect in effects.items()
    }
    print(f"\n{varieties} varieties that no fit has seen:")
    for name, result in fits.items():
        held_out = fm.marginal_log_likelihood(jax.random.key(1), result, new)
        print(f"  {name:8s} -2LL {-2 * held_out.total:9.1f} ± {2 * held_out.total_se:.1f}")
    save("senescence", fits, folder)
    compare("senescence", fits, folder)
    figure(
        fm.plots.random_effects(fits["flow"], against=fits["Gaussian"]), "senescence_law", folder
    )
    figure(fm.plots.vpc(fits["flow"], key=jax.random.key(2)), "senescence_vpc", folder)
    figure(fm.plots.individual_fits(fits["flow"]), "senescence_fits", folder)
    figure(fm.plots.convergence(fits["flow"]), "senescence_convergence", folder)

    study = fm.datasets.theophylline()
    print(f"\n{study}")
    result = fit(
        "Theophylline, Gaussian", theophylline(fm.GaussianRandomEffect(["ka", "V", "CL"])), study, 0
    )
    save("theophylline", {"Gaussian": result}, folder)
    figure(fm.plots.individual_fits(result), "theophylline_fits", folder)
    figure(fm.plots.vpc(result, key=jax.random.key(2)), "theophylline_vpc", folder)

    print(f"\nFigures and results are in {folder.resolve()}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}")


def save(title, fits, folder):
    for name, result in fits.items():
        stem = f"{title}_{name.lower()}"
        fm.save(result, folder / stem)
        fm.summary(result).frame.to_csv(folder / f"{stem}.csv")
        (folder / f"{stem}.txt").write_text(f"{fm.summary(result)}\n")
        fm.to_arviz(result, jax.random.key(0)).to_netcdf(folder / f"{stem}.nc")


def compare(title, fits, folder):
    """ArviZ's leave-one-variety-out comparison."""
    table = az.compare({n: fm.to_arviz(r, jax.random.key(0)) for n, r in fits.items()})
    print("\nLeave-one-subject-out comparison (ArviZ; higher elpd is better):")
    print(table.to_string())
    table.to_csv(folder / f"{title}_compare.csv")


def figure(fig, name, folder):
    fig.savefig(folder / f"{name}.png", dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
