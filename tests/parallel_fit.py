"""Fits a small study, on as many devices as XLA_FLAGS asks for, maybe as one of several processes,
and prints what it found as JSON. Run by `test_parallel.py`:

    python parallel_fit.py [PORT PROCESSES PROCESS]
"""

import json
import sys

import jax


def found():
    """What a fit comes to, and how its chunks were evaluated."""
    from cases import normal_study, one_level

    import flowme as fm
    from flowme.infer import marginal, parallel

    calls, shardings = [], set()
    at_once, on_mesh, usual = parallel._at_once, parallel.on_mesh, marginal.CHUNK

    def count(devices, beside, program, static, shared, chunks):
        calls.append(len(chunks))
        return at_once(devices, beside, program, static, shared, chunks)

    def look(*args):
        result = on_mesh(*args)
        for leaf in jax.tree.leaves((args[-1], result)):
            devices = {shard.device for shard in leaf.addressable_shards}
            own = {len(shard.data) for shard in leaf.addressable_shards}
            shardings.add((str(leaf.sharding.spec), len(leaf), len(devices), *own))
        return result

    parallel._at_once, parallel.on_mesh, marginal.CHUNK = count, look, 16
    study = normal_study(1.0, subjects=93, times=3)
    vem = fm.VariationalEM(one_level(), chunk=16, starts=1)
    fit = vem.run(jax.random.key(0), study, progress=False)
    chunks = sum(calls)
    sampled = marginal.estimate_marginal(
        jax.random.key(1), fit.joint, fit.theta, fit.weights, study, points=32, replicates=2
    )
    parallel._at_once, parallel.on_mesh, marginal.CHUNK = at_once, on_mesh, usual
    return {
        "-2LL": fit.minus_two_ll,
        "theta": fit.theta.tolist(),
        "information": fit.information.tolist(),
        "modes": fit.conditional.mean[:, 0].tolist(),
        "sampled": sampled.total,
        "shardings": sorted(shardings),
        "chunks": chunks,
        "most at once": max(calls),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        port, processes, process = map(int, sys.argv[1:])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    print(json.dumps(found()))
