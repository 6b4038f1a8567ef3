"""How fast are ODEs with sensitivities? One-compartment oral, Tsit5, rtol 1e-6, atol 1e-8.

    python benchmarks/ode.py [subjects, 1000]
    python benchmarks/ode.py fit

Amounts at 10 times of every subject and their derivatives with respect to its ka, V and CL, in one
run beside: textbook diffrax (`vmap(diffeqsolve)`, `SaveAt(ts)`, forward mode), SciPy's odeint with
the sensitivity equations, and a C loop of the same method with the same sensitivities (gcc -O3
-march=native -ffast-math), if there is a gcc. CPU seconds are the least of several runs; errors
are relative to the largest element of each subject, against the closed form. Where there is a GPU,
the first two run on it (wall time), and flowme is timed on both, for 10 to 100 000 subjects.

`fit`: what compiling the fit of an ODE model costs, 100 subjects, in a process that finds nothing
in the persistent cache and in the next one. "programs" are what a first fit costs more than a
second one in CPU seconds: tracing, lowering and compiling, or reading. The parts are JAX's own
figures, of wall time: right on a machine with nothing else to do.
"""

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from estimation import by_ode, model_of, study_of
from fresh import cold_and_warm
from scipy.integrate import odeint

import flowme as fm

jax.config.update("jax_enable_x64", True)

Psi = namedtuple("Psi", "ka V CL")
DOSE, RTOL, ATOL = 320.0, 1e-6, 1e-8

C_LOOP = r"""
#include <math.h>
static void f(const double *y, double ka, double V, double CL, double *o) {
  double k = CL / V;
  o[0] = -ka*y[0];         o[1] = ka*y[0] - k*y[1];
  o[2] = -ka*y[2] - y[0];  o[3] = ka*y[2] + y[0] - k*y[3];
  o[4] = -ka*y[4];         o[5] = ka*y[4] - k*y[5] + k/V*y[1];
  o[6] = -ka*y[6];         o[7] = ka*y[6] - k*y[7] - y[1]/V;
}
void solve(int n, int T, const double *A, const double *E, const double *psi, const double *dt,
           double dose, double rtol, double atol, double *out) {
  for (int i = 0; i < n; i++) {
    double y[8] = {dose}, k[7][8], z[8], h = 0, ka = psi[3*i], V = psi[3*i+1], CL = psi[3*i+2];
    f(y, ka, V, CL, k[0]);
    for (int j = 0; j < T; j++) {
      double t = 0, end = dt[i*T+j];
      if (h <= 0 || h > end) h = end;
      while (t < end) {
        double step = h < end - t ? h : end - t, e2 = 0;
        for (int s = 0; s < 6; s++) {
          for (int m = 0; m < 8; m++) {
            double a = 0;
            for (int q = 0; q <= s; q++) a += A[6*s+q] * k[q][m];
            z[m] = y[m] + step * a;
          }
          f(z, ka, V, CL, k[s+1]);
        }
        for (int m = 0; m < 2; m++) {
          double e = 0;
          for (int q = 0; q < 7; q++) e += E[q] * k[q][m];
          e *= step / (atol + rtol * fmax(fabs(y[m]), fabs(z[m])));
          e2 += e * e / 2;
        }
        double factor = .9 * pow(e2, -.1);
        int good = e2 < 1;
        if (good) {
          t = step == end - t ? end : t + step;
          for (int m = 0; m < 8; m++) { y[m] = z[m]; k[0][m] = k[6][m]; }
          factor = fmin(fmax(factor, 1), 10);
        } else factor = fmin(fmax(factor, .2), .9);
        h = good && step < h ? h : step * factor;
      }
      for (int m = 0; m < 8; m++) out[(i*T+j)*8+m] = y[m];
    }
  }
}
"""


def absorption(t, amount, psi):
    gut, central = amount
    return jnp.stack([-psi.ka * gut, psi.ka * gut - psi.CL / psi.V * central])


def with_jacobian(amounts):
    """`[1 + parameter, subject, time, state]`: amounts(psi), and their derivatives with respect to
    each subject's own ka, V and CL."""

    def run(psi, study):
        def along(j):
            tangent = Psi(*(jnp.full_like(x, 1.0) * (i == j) for i, x in enumerate(psi)))
            return jax.jvp(lambda p: amounts(p, study), (psi,), (tangent,))

        value, slope = jax.vmap(along, out_axes=(None, 0))(jnp.arange(3))
        return jnp.concatenate([value[None], slope])

    return jax.jit(run)


def by_flowme(psi, study):
    return fm.solve(absorption, psi, study, rtol=RTOL, atol=ATOL)[:, 1:]


def textbook(psi, study):
    def one(psi, times):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(absorption), diffrax.Tsit5(), times[0], times[-1], None,
            jnp.array([DOSE, 0.0]), psi, saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(RTOL, ATOL),
            adjoint=diffrax.ForwardMode(),
        ).ys[1:]  # fmt: skip

    return jax.vmap(one)(psi, jnp.asarray(study.time))


def exact(psi, study):
    t = jnp.asarray(study.time)[:, 1:]
    ka, k = psi.ka[:, None], (psi.CL / psi.V)[:, None]
    central = DOSE * ka / (ka - k) * (jnp.exp(-k * t) - jnp.exp(-ka * t))
    return jnp.stack([DOSE * jnp.exp(-ka * t), central], -1)


def by_odeint(psi, study):
    def rhs(y, t, ka, V, CL):
        k = CL / V
        return [
            -ka * y[0], ka * y[0] - k * y[1],
            -ka * y[2] - y[0], ka * y[2] + y[0] - k * y[3],
            -ka * y[4], ka * y[4] - k * y[5] + k / V * y[1],
            -ka * y[6], ka * y[6] - k * y[7] - y[1] / V,
        ]  # fmt: skip

    start, times = [DOSE] + 7 * [0.0], np.asarray(study.time)
    found = [
        odeint(rhs, start, t, tuple(args), rtol=RTOL, atol=ATOL)[1:]
        for t, args in zip(times, np.stack(psi, 1).tolist(), strict=True)
    ]
    return np.moveaxis(np.reshape(found, (len(times), -1, 4, 2)), 2, 0)


def by_c(folder):
    (folder / "loop.c").write_text(C_LOOP)
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    library = folder / "loop.so"
    subprocess.run(["gcc", *flags, "-o", library, folder / "loop.c", "-lm"], check=True)
    solve = ctypes.CDLL(str(library)).solve
    table = diffrax.Tsit5.tableau
    a = np.zeros((6, 6))
    for s, row in enumerate(table.a_lower):
        a[s, : len(row)] = row

    def run(psi, study):
        dt = np.ascontiguousarray(np.diff(np.asarray(study.time), axis=1))
        out = np.zeros((*dt.shape, 4, 2))
        arrays = [a, np.asarray(table.b_error), np.stack(psi, 1), dt]
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in map(np.ascontiguousarray, arrays)]
        rest = [ctypes.c_double(x) for x in (DOSE, RTOL, ATOL)]
        solve(*dt.shape, *pointers, *rest, out.ctypes.data_as(ctypes.c_void_p))
        return np.moveaxis(out, 2, 0)

    return run


def least(run, times):
    """CPU seconds; on a GPU, which the processor waits for, seconds of wall time."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    found = []
    for _ in range(times):
        begun = clock()
        jax.block_until_ready(run())
        found.append(clock() - begun)
    return min(found)


def draw(subjects):
    study, rng = study_of(subjects), np.random.default_rng(1)
    eta = rng.normal(size=(subjects, 3)) * [0.5, 0.2, 0.3]
    return Psi(*(np.array([1.5, 32.0, 2.8]) * np.exp(eta)).T), study


def main(subjects):
    psi, study = draw(subjects)
    truth = np.asarray(with_jacobian(exact)(psi, study))
    size = np.abs(truth).max(axis=(2, 3), keepdims=True)
    rows = []

    def add(name, run, times, compiling=0.0):
        error = np.abs(np.asarray(run()) - truth) / size
        seconds = least(run, times)
        row = {
            "route": name,
            "us per subject": 1e6 * seconds / subjects,
            "compile, CPU s": compiling,
        }
        rows.append(row | {"value error": error[0].max(), "gradient error": error[1:].max()})

    for name, route in (("flowme", by_flowme), ("textbook diffrax", textbook)):
        begun = time.process_time()
        program = with_jacobian(route).lower(psi, study).compile()
        compiling = time.process_time() - begun
        add(name, lambda program=program: program(psi, study), 40, compiling)
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("gcc"):
            loop = by_c(Path(folder))
            add("C loop", lambda: loop(psi, study), 40)
        add("SciPy odeint", lambda: by_odeint(psi, study), 1)
    table = pd.DataFrame(rows)
    table["times flowme"] = table["us per subject"] / table["us per subject"][0]
    print(f"{subjects} subjects, 10 times, {jax.default_backend()}")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))


def on_gpu():
    rows = []
    for subjects in (10, 100, 1000, 10_000, 100_000):
        row = {"subjects": subjects}
        for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
            with jax.default_device(device):
                psi, study = jax.device_put(draw(subjects), device)
                program = with_jacobian(by_flowme)
                jax.block_until_ready(program(psi, study))
                begun = time.perf_counter()
                jax.block_until_ready(program(psi, study))
                row[f"{device.platform}, ms"] = 1e3 * (time.perf_counter() - begun)
        rows.append(row)
    print("\nWall time on both; a GPU pays from where its column is the smaller one")
    print(pd.DataFrame(rows).round(2).to_string(index=False))


PARTS = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compiling or reading",
}


def one_fit():
    """Prints what the first fit of this process costs, and a second one."""
    row = dict.fromkeys(["programs", *PARTS.values(), "first", "again"], 0.0)

    def note(event, seconds, **_):
        name = event.split("/")[-1]
        if name in PARTS:
            row[PARTS[name]] += seconds

    study, vem = study_of(100), fm.VariationalEM(model_of(by_ode), starts=1)
    jax.monitoring.register_event_duration_secs_listener(note)
    for key in ("first", "again"):
        begun = time.process_time()
        vem.run(jax.random.key(0), study, progress=False)
        row[key] = time.process_time() - begun
    print(json.dumps(row | {"programs": row["first"] - row["again"]}))


def fits():
    rows = dict(zip(("cold", "warm"), cold_and_warm(__file__, "one_fit"), strict=True))
    print("Fit of an ODE, 100 subjects; seconds")
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    if sys.argv[1:] == ["one_fit"]:
        sys.exit(one_fit())
    if sys.argv[1:] == ["fit"]:
        sys.exit(fits())
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    if any(d.platform == "gpu" for d in jax.devices()):
        on_gpu()
