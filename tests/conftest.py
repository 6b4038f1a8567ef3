"""Tests run stricter than users: double precision, and NumPyro checks every argument."""

from pathlib import Path

import jax
import matplotlib
import numpyro
import pytest

jax.config.update("jax_enable_x64", True)
numpyro.enable_validation(True)
matplotlib.use("Agg")


@pytest.fixture(scope="session")
def shared():
    """The folder of development data beside the checkout, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared data beside this checkout")
    return folder
