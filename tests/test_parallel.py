"""Devices and processes change nothing but the time.

In subprocesses: JAX is told of its devices before it starts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_fit import found

from flowme.infer import parallel

HERE = Path(__file__).parent
HURRY = os.environ["XLA_FLAGS"]  # see conftest.py


def start(*arguments, devices):
    """`parallel_fit.py`, on as many devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{HURRY} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(HERE / "parallel_fit.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def alone():
    """One process with one device."""
    return found()


def agree(one, other):
    for name in ("-2LL", "theta", "information", "modes", "sampled"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-9)


def test_an_accelerator_has_several_chunks_at_a_time(alone, monkeypatch):
    """All six chunks of 93 subjects beside each other, filled up to eight."""
    monkeypatch.setattr(parallel, "on_accelerator", lambda: True)
    together = found()
    agree(together, alone)
    assert (together["most at once"], alone["most at once"]) == (6, 1)


def test_devices_and_processes_share_out_the_chunks(alone):
    """Two processes, which talk by JAX's distributed service and gloo, of two devices each: both
    have the result of one process with one device, each from half of the chunks, of which every
    device had one at a time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(port, 2, number, devices=2) for number in range(2)]
    results = [process.communicate(timeout=600) for process in processes]
    assert not alone["shardings"]
    for process, (output, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
        one = json.loads(output.splitlines()[-1])
        agree(one, alone)
        assert one["chunks"] <= 0.7 * alone["chunks"]
        # Arrays [chunk, ...] of two chunks on two devices, one chunk on each.
        assert one["shardings"] == [["P('subject',)", 2, 2, 1]]
