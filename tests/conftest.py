"""Tests run stricter than users: double precision, and NumPyro checks every argument."""

import os
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib
import numpyro
import pytest

jax.config.update("jax_enable_x64", True)
# Many tests compile the same programs; what one has compiled the others read.
CACHE = str(Path(__file__).parents[1] / ".jax_cache")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Nearly all of the time is XLA's compiler, which takes half as long when told to hurry.
HURRY = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later ones know no such flag
    HURRY.append("--xla_cpu_use_fusion_emitters=false")
# Processes that a test starts are told the same.
os.environ["XLA_FLAGS"] = " ".join([*HURRY, os.environ.get("XLA_FLAGS", "")])
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
numpyro.enable_validation(True)
matplotlib.use("Agg")

from flowme import quick  # noqa: E402

quick.SOON.update(quick.AT_ONCE)


def pytest_collection_modifyitems(items):
    """Files whose few tests take minutes first: no worker then waits for them at the end."""
    long = ("test_every_law.py", "test_examples.py", "test_readme.py", "test_parallel.py")
    items.sort(key=lambda item: item.path.name not in long)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A compiled program keeps memory mappings, of which Linux gives a process 65 530: beyond,
    XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared():
    """The folder of development data beside the checkout, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared data beside this checkout")
    return folder
