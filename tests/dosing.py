"""Subjects with doses, and derivatives in their parameters, for the laws of structural models."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from flowme.study import Study


class Psi(NamedTuple):
    ka: Any
    V: Any
    CL: Any


def dose(time, amount=100.0, rate=0.0):
    return (time, np.nan, amount, rate, 1)


def record(time):
    return (time, 1.0, 0.0, 0.0, 0)


def study_of(subjects):
    rows = [(name, *row) for name, rows in subjects.items() for row in rows]
    frame = pd.DataFrame(rows, columns=["ID", "TIME", "DV", "AMT", "RATE", "EVID"])
    return Study.from_frame(frame, outcome={"conc": "DV"})


def scaled(psi, delta):
    """Individual parameters moved on the log scale by `delta` [parameter], the same for all."""
    return Psi(*(leaf * jnp.exp(d) for leaf, d in zip(psi, delta, strict=True)))


def by_parameter(model, psi, study, derivative):
    """Derivatives of [subject, time] in the logarithms of ka, V, CL, each of its own subject."""
    return jax.jit(
        lambda psi, study: derivative(lambda d: model(scaled(psi, d), study))(jnp.zeros(3))
    )(psi, study)


def dosed_into(compartment):
    rows = [
        (s, t, np.nan if e else 1.0, 100.0 * e, e) for s in "ab" for t, e in ((0.0, 1), (1.0, 0))
    ]
    frame = pd.DataFrame(rows, columns=["ID", "TIME", "DV", "AMT", "EVID"]).assign(CMT=compartment)
    return Study.from_frame(frame, outcome={"conc": "DV"})
