"""How many ODE fits a CPU second does flowme do beside a numba loop of the same fit?

    python benchmarks/discovery_kernels.py [fits, by default 256]

Both fit the same random structures of R reactions to the same data (of discovery_networks.py, four
conditions of 40 points, known initial states) by the same method: Runge and Kutta's scheme with two
steps between records, forward sensitivities to the log rates, Levenberg and Marquardt's damping, 12
iterations. numba loops over structures, conditions and the reactions a structure has; flowme works
in batches. The first call of each, which compiles, is not counted. Table: fits per CPU second,
their ratio (the bar is .5), and, that it is the same fit, in how many the sums of squares agree
within 1 %: all where the rates are identified; elsewhere rounding decides which step is accepted.
"""

import sys
import time

import jax
import numba
import numpy as np
from discovery_networks import NETWORKS, simulated

from flowme import discovery
from flowme.discovery.data import time_courses
from flowme.discovery.fit import evaluate, solve
from flowme.discovery.problem import Problem

jax.config.update("jax_enable_x64", True)

ITERATIONS, SUBSTEPS = 12, 2
FAST = {"contract", "reassoc", "arcp", "nsz"}  # but infinities are infinities


@numba.njit(fastmath=FAST)
def slopes(x, s, first, second, net, rates, f, ds, J):
    """f, and Ṡ = J S + ∂f/∂log κ, for R reactions; species 0 is 1."""
    R, S = net.shape
    f[:] = 0.0
    J[:] = 0.0
    ds[:] = 0.0
    for r in range(R):
        a, b = first[r], second[r]
        va = 1.0 if a == 0 else x[a - 1]
        vb = 1.0 if b == 0 else x[b - 1]
        k = rates[r]
        for i in range(S):
            n = net[r, i]
            if n != 0.0:
                f[i] += n * k * va * vb
                ds[i, r] += n * k * va * vb
                if a > 0:
                    J[i, a - 1] += n * k * vb
                if b > 0:
                    J[i, b - 1] += n * k * va
    for i in range(S):
        for j in range(S):
            if J[i, j] != 0.0:
                for r in range(R):
                    ds[i, r] += J[i, j] * s[j, r]


@numba.njit(fastmath=FAST)
def moved(x, s, h, f, d, y, z):
    """y = x + h f and z = s + h d, in place."""
    for i in range(x.size):
        y[i] = x[i] + h * f[i]
        for r in range(s.shape[1]):
            z[i, r] = s[i, r] + h * d[i, r]


@numba.njit(fastmath=FAST)
def step_of(x, s, h, how, f, d, y, z, J):
    """One step of Runge and Kutta's scheme, in place; how: the reactions and their rates."""
    first, second, net, rates = how
    slopes(x, s, first, second, net, rates, f[0], d[0], J)
    moved(x, s, h / 2, f[0], d[0], y, z)
    slopes(y, z, first, second, net, rates, f[1], d[1], J)
    moved(x, s, h / 2, f[1], d[1], y, z)
    slopes(y, z, first, second, net, rates, f[2], d[2], J)
    moved(x, s, h, f[2], d[2], y, z)
    slopes(y, z, first, second, net, rates, f[3], d[3], J)
    for i in range(x.size):
        x[i] += h / 6 * (f[0, i] + 2 * (f[1, i] + f[2, i]) + f[3, i])
        for r in range(s.shape[1]):
            s[i, r] += h / 6 * (d[0, i, r] + 2 * (d[1, i, r] + d[2, i, r]) + d[3, i, r])


@numba.njit(fastmath=FAST)
def equations(first, second, net, log_rates, initial, step, values):
    """SSE, gradient and Hessian of one structure in all conditions."""
    (C, S), R, T = initial.shape, net.shape[0], step.shape[0]
    how = first, second, net, np.exp(log_rates)
    total, g, H = 0.0, np.zeros(R), np.zeros((R, R))
    J, y, z = np.zeros((S, S)), np.zeros(S), np.zeros((S, R))
    f, d = np.zeros((4, S)), np.zeros((4, S, R))
    for c in range(C):
        x, s = initial[c].copy(), np.zeros((S, R))
        for t in range(T):
            for _ in range(SUBSTEPS if step[t, c] > 0 else 0):
                step_of(x, s, step[t, c] / SUBSTEPS, how, f, d, y, z, J)
            for i in range(S):
                off = values[t, i, c] - x[i]
                total += off * off
                for r in range(R):
                    g[r] += s[i, r] * off
                    for q in range(R):
                        H[r, q] += s[i, r] * s[i, q]
    return total, g, H


@numba.njit(fastmath=FAST)
def loop(first, second, net, starts, initial, step, values):
    """SSE of every structure after the iterations."""
    n, R = starts.shape
    found = np.full(n, np.inf)
    for b in range(n):
        point, damping = starts[b].copy(), 1e-2
        trial = point.copy()
        g, H = np.zeros(R), np.zeros((R, R))
        for _ in range(ITERATIONS):
            total, g_new, H_new = equations(
                first[b], second[b], net[b], trial, initial, step, values
            )
            if total < found[b]:
                found[b], g, H = total, g_new, H_new
                point[:] = trial
                damping /= 5
            else:
                damping *= 6
            A = H.copy()
            for r in range(R):
                A[r, r] += damping * H[r, r] + 1e-6
            delta = np.linalg.solve(A, g)
            for r in range(R):
                trial[r] = point[r] + min(max(delta[r], -2.0), 2.0)
    return found


def batches(problem, rows, starts):
    """The same with flowme's kernel: SSE of every structure after the iterations."""
    found = []
    R = rows.shape[1]
    for i in range(0, len(rows), problem.batch):
        here = rows[i : i + problem.batch]
        padded = np.full((len(here), problem.slots), len(problem.library))
        padded[:, :R] = here
        point = np.zeros((len(here), problem.slots))
        point[:, :R] = starts[i : i + problem.batch]
        C, S = problem.courses.initial.shape
        states = np.tile(problem.courses.initial, (len(here), 1, 1))
        ones = np.ones((len(here), S)), np.ones((len(here), C))
        best, damping, trial, kept = (
            np.full(len(here), np.inf),
            np.full(len(here), 1e-2),
            point,
            None,
        )
        for _ in range(ITERATIONS):
            squares, new = evaluate(problem, padded, trial, states, *ones)
            total = squares.sum(1)
            better = total < best
            best = np.where(better, total, best)
            point = np.where(better[:, None], trial, point)
            damping = np.where(better, damping / 5, damping * 6)
            g, H = new if kept is None else kept
            g = np.where(better[:, None, None], new[0], g)
            H = np.where(better[:, None, None, None], new[1], H)
            kept = g, H
            trial = point + np.clip(solve(g, H, damping, problem.slots)[0], -2, 2)
        found.append(best)
    return np.concatenate(found)


def timed(fit, *args):
    fit(*args)
    begun = time.process_time()
    result = fit(*args)
    return result, time.process_time() - begun


def main(n):
    print(
        f"{'network':17s} {'R':>2s} {'numba /s':>9s} {'flowme /s':>9s} {'ratio':>6s} {'agree':>6s}"
    )
    for number, R in ((2, 3), (2, 8), (4, 8), (6, 5), (6, 8), (12, 6), (12, 8)):
        study, initial = simulated(number, 0.05, 0)
        courses = time_courses(study, list(initial), initial)
        library = discovery.up_to_second_order(courses.species)
        rng = np.random.default_rng(0)
        rows = np.array([rng.choice(len(library), R, replace=False) for _ in range(n)])
        problem = Problem.of(courses, library, slots=R)
        starts = rng.normal(size=(n, R))
        first, second = (a.argmax(0)[rows] for a in problem.reactions[:2])
        net = np.ascontiguousarray(problem.reactions.net.T[rows])
        given = (
            first,
            second,
            net,
            starts,
            courses.initial,
            problem.design.step,
            problem.design.values,
        )
        loops, slow = timed(loop, *given)
        batched, fast = timed(batches, problem, rows, starts)
        agree = np.mean(np.isclose(loops, batched, rtol=0.01))
        print(
            f"{NETWORKS[number][0]:17s} {R:2d} {n / slow:9.0f} {n / fast:9.0f} "
            f"{slow / fast:6.2f} {agree:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
