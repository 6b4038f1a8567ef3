"""How fast is an estimation, and how close to the maximum? One table per question.

    python benchmarks/estimation.py [size] [ode] [starts] [devices]

CPU seconds are of the whole process; "first" includes compilation, "again" is a second fit of the
same model in the same process, with the errors of the estimates and the likelihood by a finer rule;
"within .1" is the part of a climb after which θ is within .1 of the maximum for good. The gap is
log p(y; θ*) - log p(y; θ) of the exact likelihood (quadrature of the highest order), θ* being
where Newton steps of that order end.
"""

import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
from tqdm import tqdm

import flowme as fm
from flowme.infer.checkpoint import Checkpoint
from flowme.infer.climb import Climb
from flowme.infer.evaluate import LARGEST, evaluate
from flowme.infer.newton import newton_of, trust_region

jax.config.update("jax_enable_x64", True)

NAMES = ["ka", "V", "CL"]
SIZES = (100, 1000, 100_000)


def study_of(subjects: int, seed: int = 0) -> fm.Study:
    """10 concentrations per subject at times of its own, 320 mg; truth 1.5, 32, 2.8, ω .5 .2 .3,
    a .5."""
    rng = np.random.default_rng(seed)
    times = np.array([0.25, 0.5, 1, 2, 4, 6, 8, 12, 18, 24])
    t = np.sort(times * np.exp(0.1 * rng.normal(size=(subjects, 10))), axis=1)
    eta = rng.normal(size=(subjects, 3)) * [0.5, 0.2, 0.3]
    ka, V, CL = (np.array([1.5, 32.0, 2.8]) * np.exp(eta)).T[:, :, None]
    f = 320 * ka / (V * (ka - CL / V)) * (np.exp(-CL / V * t) - np.exp(-ka * t))
    dose = np.tile(np.arange(11) == 0, subjects)
    frame = pd.DataFrame(
        {
            "ID": np.repeat(np.arange(subjects), 11),
            "TIME": np.concatenate([np.zeros((subjects, 1)), t], 1).ravel(),
            "DV": np.pad(f + 0.5 * rng.normal(size=f.shape), ((0, 0), (1, 0))).ravel(),
            "AMT": np.where(dose, 320.0, 0.0),
            "EVID": dose.astype(int),
        }
    )
    return fm.Study.from_frame(frame, outcome={"conc": "DV"})


def model_of(concentration):
    """Lognormal ka, V, CL, constant error, starting away from the truth."""

    def model(study):
        ka = fm.population("ka", dist.LogNormal(0.0, 0.5))
        V = fm.population("V", dist.LogNormal(3.0, 0.5))
        CL = fm.population("CL", dist.LogNormal(1.6, 0.5))
        a = fm.population("a", dist.HalfNormal(3.0))
        law = fm.GaussianRandomEffect(NAMES, omega=1.0)
        eta = fm.random_effect("eta", law, study.subjects)
        psi = fm.individual(
            study.subjects,
            ka=ka * jnp.exp(eta.ka),
            V=V * jnp.exp(eta.V),
            CL=CL * jnp.exp(eta.CL),
        )
        fm.observe("conc", fm.residual.constant(concentration(psi, study), a), study)

    return model


def by_ode(psi, study):
    def absorption(t, amount, psi):
        gut, central = amount
        return jnp.stack([-psi.ka * gut, psi.ka * gut - psi.CL / psi.V * central])

    amount = fm.solve(absorption, psi, study, rtol=1e-6, atol=1e-8)
    return amount[..., 1] / psi.V[:, None]


def timed(run):
    begun = time.process_time()
    return run(), time.process_time() - begun


def gap(fit) -> float:
    """How far below the maximum of the likelihood by the finest quadrature: half the Newton
    decrement there."""
    engine = newton_of(fit.joint, fit.theta, {}, fit.study, use_priors=False).engine
    found = evaluate(
        engine, jax.random.key(0), np.asarray(fit.theta), {}, fit.study,
        np.asarray(fit.conditional.mean), order=LARGEST[3],
    )  # fmt: skip
    return trust_region(found.gradient, found.hessian, np.inf)[2]


class Trace(Checkpoint):
    """Keeps where each step of an estimation led, and when."""

    def write(self, name, value):
        if not name.endswith("-care"):
            self.steps.append((time.process_time(), value.state.theta))


def within(fit, vem, distance=0.1):
    """CPU seconds of a climb until log p(y; θ) is within `distance` of its maximum."""
    newton = newton_of(fit.joint, fit.theta, {}, fit.study, use_priors=False)
    trace, start = Trace(), fit.joint.unconstrain({})
    trace.steps, begun = [], time.process_time()
    climb = Climb(
        newton, jax.random.key(1), {}, vem.tolerance, 100, (trace, ""), tqdm(disable=True)
    )
    list(climb.run(np.asarray(start), fit.study, 1))
    return settled(fit, trace.steps, distance) - begun


def settled(fit, steps, distance=0.1):
    """When log p(y; θ) was within `distance` of its maximum for good."""
    engine = newton_of(fit.joint, fit.theta, {}, fit.study, use_priors=False).engine
    modes = np.asarray(fit.conditional.mean)

    def at(theta):
        found = evaluate(engine, jax.random.key(0), np.asarray(theta), {}, fit.study, modes,
                         order=7, steps=10)  # fmt: skip
        return found.log_likelihood.sum()

    best = at(fit.theta)
    far = [when for when, theta in steps if best - at(theta) > distance]
    return next(when for when, _ in steps if not far or when > far[-1])


def row(model, study, again=True):
    vem = fm.VariationalEM(model, starts=1)
    fit, first = timed(lambda: vem.run(jax.random.key(0), study, progress=False))
    _, second = (
        timed(lambda: vem.run(jax.random.key(1), study, progress=False)) if again else (0, 0)
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "subjects": study.subjects.size,
        "-2LL": fit.minus_two_ll,
        "error": fit.minus_two_ll_se,
        "gap": gap(fit),
        "converged": fit.converged,
        "CPU s first": first,
        "CPU s again": second,
        "within .1": within(fit, vem),
        "GB": memory,
    }


def size():
    """Closed form, three effects, 10 observations each."""
    model = model_of(fm.oral_one_compartment)
    for subjects in SIZES:
        yield row(model, study_of(subjects))


def ode():
    """The same by diffrax, 100 subjects."""
    yield row(model_of(by_ode), study_of(100))


def devices():
    """On every kind of device there is: wall seconds of a first fit (with compilation) and of a
    second one, and -2LL, which is to be the same."""
    closed, flow = model_of(fm.oral_one_compartment), fm.FlowRandomEffect(NAMES)
    cases = {
        "closed form": (closed, study_of(1000)),
        "closed form, many": (closed, study_of(100_000)),
        "ODE": (model_of(by_ode), study_of(1000)),
        "flow": (fm.replace_effect(closed, eta=flow), study_of(500)),
    }
    for name, (model, study) in cases.items():
        for kind in dict.fromkeys([jax.default_backend(), "cpu"]):
            with jax.default_device(jax.devices(kind)[0]):
                vem, found = fm.VariationalEM(model, starts=1), []
                for key in (0, 1):
                    begun = time.perf_counter()
                    fit = vem.run(jax.random.key(key), study, progress=False)
                    found.append(time.perf_counter() - begun)
                yield {
                    "model": name, "subjects": study.subjects.size, "device": kind,
                    "wall s first": found[0], "wall s again": found[1],
                    "-2LL": fit.minus_two_ll, "error": fit.minus_two_ll_se,
                }  # fmt: skip


def starts():
    """Theophylline from starting values a factor of 5 off each way."""
    study = fm.datasets.theophylline()
    vem = fm.VariationalEM(model_of(fm.oral_one_compartment), starts=1)
    for factors in np.array(np.meshgrid(*[[0.2, 5.0]] * 3)).reshape(3, -1).T:
        init = dict(zip(NAMES, np.array([1.58, 31.6, 2.75]) * factors, strict=True))
        fit = vem.run(jax.random.key(0), study, init=init, progress=False)
        yield {**init, "-2LL": fit.minus_two_ll, "converged": fit.converged, **dict(
            zip(("ka^", "V^", "CL^"), (float(fit.params[k]) for k in NAMES), strict=True)
        )}  # fmt: skip


if __name__ == "__main__":
    questions = {f.__name__: f for f in (size, ode, starts, devices)}
    for name in sys.argv[1:] or questions:
        print(f"\n{questions[name].__doc__}", flush=True)
        rows = []
        for answer in questions[name]():  # each as it comes: what was found is not lost
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in answer.items()},
                  file=sys.stderr, flush=True)  # fmt: skip
            rows.append(answer)
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
