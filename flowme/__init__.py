"""flowme: nonlinear mixed-effects models in NumPyro, with learned random-effect distributions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowme import covariate, datasets, flows, outcomes, residual
from flowme.closed_forms import (
    iv_one_compartment,
    iv_three_compartment,
    iv_two_compartment,
    oral_one_compartment,
    oral_three_compartment,
    oral_two_compartment,
)
from flowme.convert import to_arviz
from flowme.effects import GaussianRandomEffect, StudentTRandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.infer.bootstrap import bootstrap
from flowme.infer.compare import compare
from flowme.infer.fit import Fit, load, save
from flowme.infer.marginal import marginal_log_likelihood
from flowme.infer.mixtures import mixture_by_bic
from flowme.infer.npmle import npmle
from flowme.infer.nuts import nuts
from flowme.infer.profile import profile
from flowme.infer.smoothed import smoothed_npmle
from flowme.infer.vem import VariationalEM
from flowme.linear import solve_linear
from flowme.mixture_effect import MixtureRandomEffect
from flowme.npde import npde
from flowme.predict import predict, simulate
from flowme.primitives import individual, observe, population, random_effect, replace_effect
from flowme.report import summary
from flowme.semi_nonparametric import SemiNonparametricRandomEffect
from flowme.structural import solve
from flowme.study import Study

if TYPE_CHECKING:
    from flowme import plots

__all__ = [
    "Fit",
    "FlowRandomEffect",
    "GaussianRandomEffect",
    "MixtureRandomEffect",
    "SemiNonparametricRandomEffect",
    "StudentTRandomEffect",
    "Study",
    "VariationalEM",
    "bootstrap",
    "compare",
    "covariate",
    "datasets",
    "flows",
    "individual",
    "iv_one_compartment",
    "iv_three_compartment",
    "iv_two_compartment",
    "load",
    "marginal_log_likelihood",
    "mixture_by_bic",
    "npmle",
    "npde",
    "nuts",
    "observe",
    "oral_one_compartment",
    "oral_three_compartment",
    "oral_two_compartment",
    "outcomes",
    "plots",
    "population",
    "predict",
    "profile",
    "random_effect",
    "replace_effect",
    "residual",
    "save",
    "simulate",
    "smoothed_npmle",
    "solve",
    "solve_linear",
    "summary",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    """`fm.plots`, imported when it is asked for: a fit needs no Matplotlib."""
    if name == "plots":
        return import_module("flowme.plots")
    raise AttributeError(f"module 'flowme' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
