"""Tests run stricter than users: double precision, and NumPyro checks every argument."""

import jax
import matplotlib
import numpyro

jax.config.update("jax_enable_x64", True)
numpyro.enable_validation(True)
matplotlib.use("Agg")
