"""What an estimation returns: a value with its parameters, its course, and how to keep it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowme.infer.clock import Seconds
from flowme.infer.conditional import Conditional
from flowme.infer.errors import Correlation, correlation, invert, parameter_names, sandwich
from flowme.infer.joint import Joint, Weights
from flowme.study import Study


def total_error(errors: np.ndarray, method: str) -> float:
    """Error of Σ_i log p(y_i) from those of each subject: independent by Monte Carlo, so that
    their squares add up; by quadrature of one sign, so that they do."""
    together = np.sum(errors) if "quadrature" in method else np.sqrt(np.sum(errors**2))
    return float(together)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted population model.

    Attributes:
        joint: the model and the roles of its sites.
        study: the study it was fitted to.
        theta: population parameters on their unconstrained scale, `[parameter]`.
        weights: weights of the flows, by site.
        conditional: N(m_i, C_i) around each subject's p(η_i | y_i; θ); for a law that is not
            Gaussian, with a Gaussian of its moments in its place.
        log_likelihood: log p(y_i; θ), `[subject]`.
        log_likelihood_se: error of each, `[subject]`: the Monte-Carlo standard error, or by
            quadrature the difference to another rule (`flowme.infer.marginal.by_quadrature`).
        information: minus the Hessian of the objective at θ; with a flow, the outer product of
            the subjects' scores, its weights held. None where it was not computed.
        history: the objective after each iteration.
        converged: whether the stopping rule was met.
        messages: what the user should know: failed subjects, degenerate parameters, why stopped.
        use_priors: MAP instead of maximum likelihood.
        selection: for flows, the held-out log-likelihood of each number of the path (see
            `selected`), relative to number 0, under the penalty that was chosen.
        selected: for flows, the number chosen: 0 the Gaussian, 1 the flow as it was started (its
            marginal shapes read off the Gaussian fit), 2 after one update, and so on.
        dependence: for flows, the penalty on dependence between coordinates that was chosen.
        outer: the outer product Σ_i s_i s_iᵀ of the subjects' scores s_i at θ.
        method: how `log_likelihood` was found.
        seconds: how long the estimation took, and its compilation.
    """

    joint: Joint
    study: Study
    theta: jax.Array
    weights: Weights
    conditional: Conditional
    log_likelihood: np.ndarray
    log_likelihood_se: np.ndarray
    information: np.ndarray | None
    history: np.ndarray
    converged: bool
    messages: tuple[str, ...] = ()
    use_priors: bool = False
    selection: np.ndarray | None = None
    selected: int | None = None
    dependence: float | None = None
    outer: np.ndarray | None = None
    method: str = "importance sampling"
    seconds: Seconds | None = None

    @property
    def params(self) -> dict[str, jax.Array]:
        """Population parameters on their own scale, and flow weights, by site."""
        return {**self.joint.constrain(self.theta), **self.weights}

    @property
    def minus_two_ll(self) -> float:
        """-2 log p(y; θ), the marginal likelihood."""
        return -2.0 * float(np.sum(self.log_likelihood))

    @property
    def minus_two_ll_se(self) -> float:
        """Error of `minus_two_ll`: see `total_error`."""
        return 2.0 * total_error(self.log_likelihood_se, self.method)

    @property
    def parameter_count(self) -> int:
        """Number of estimated parameters, weights of flows included."""
        return self.joint.size + sum(int(np.size(w)) for w in self.weights.values())

    @property
    def aic(self) -> float:
        """-2 log p(y; θ) + 2 · parameters. For a flow it counts every weight: prefer held-out."""
        return self.minus_two_ll + 2 * self.parameter_count

    @property
    def bic(self) -> float:
        """-2 log p(y; θ) + log(n) · parameters, n the number of subjects, not of observations:
        they are what is independent. (Delattre, Lavielle & Poursat 2014, Electronic Journal of
        Statistics 8, 456, count observations for parameters that do not vary between subjects.)
        """
        return self.minus_two_ll + np.log(self.study.subjects.size) * self.parameter_count

    def covariance(self, robust: bool = False) -> np.ndarray | None:
        """Covariance of the estimate of θ (unconstrained), `[parameter, parameter]`.

        I⁻¹ with the observed information I; under `use_priors` I is minus the Hessian of
        log p(y; θ) + log p(θ), and I⁻¹ the covariance of Laplace's posterior. Robust: the sandwich
        I⁻¹ J I⁻¹ with J the outer product of the subjects' scores. With a flow its weights are
        held fixed and I is J, so that both agree: use `flowme.bootstrap`.

        None when it was not computed or is not positive definite (a parameter that the study does
        not identify); `messages` then names the parameters.

        References:
            Huber (1967), 5th Berkeley Symposium 1, 221; White (1982), Econometrica 50, 1.
        """
        return sandwich(self.information, self.outer) if robust else invert(self.information)

    def correlation(self, robust: bool = False) -> Correlation | None:
        """Correlations of the estimates by name, with their condition number."""
        covariance = self.covariance(robust)
        return None if covariance is None else correlation(covariance, parameter_names(self.joint))

    def standard_errors(
        self, robust: bool = False, *, unconstrained: bool = False
    ) -> dict[str, np.ndarray] | None:
        """Standard errors of the population parameters, by site.

        On their own scale by the delta method, √(G Cov Gᵀ) with G the Jacobian of the parameter
        with respect to θ.

        Args:
            robust: from the sandwich.
            unconstrained: of θ itself, in the unconstrained shape of each site: of log ka instead
                of ka, of the inverse hyperbolic tangent of a correlation.
        """
        covariance = self.covariance(robust)
        if covariance is None:
            return None
        if unconstrained:
            errors = np.sqrt(np.diag(covariance))
            return {name: errors[where] for name, where in self.joint.slices.items()}
        jacobian = jax.jacobian(self.joint.constrain)(self.theta)
        return {
            name: np.sqrt(np.einsum("...a,ab,...b->...", np.asarray(j), covariance, np.asarray(j)))
            for name, j in jacobian.items()
        }


def save(fit: Fit, path: str | Path) -> Path:
    """Write a fit to one file (`.npz`): estimates, conditional distributions, course.

    The model is code and the study a table: give them again to `load`.
    """
    path = _file(path)
    header = {
        "format": 1,
        **identity(fit.joint, fit.study),
        "converged": fit.converged,
        "messages": list(fit.messages),
        "use_priors": fit.use_priors,
        "selected": fit.selected,
        "dependence": fit.dependence,
        "method": fit.method,
        "seconds": fit.seconds,
    }
    arrays: dict[str, Any] = {f"weights:{name}": w for name, w in fit.weights.items()}
    for field in ("theta", "log_likelihood", "log_likelihood_se", "history"):
        arrays[field] = getattr(fit, field)
    for field in ("information", "selection", "outer"):
        if getattr(fit, field) is not None:
            arrays[field] = getattr(fit, field)
    arrays |= {"mean": fit.conditional.mean, "scale_tril": fit.conditional.scale_tril}
    np.savez_compressed(path, header=np.array(json.dumps(header)), **arrays)
    return path


def load(path: str | Path, model: Callable, study: Study) -> Fit:
    """The fit written by `save`, of the same model to the same study.

    Raises:
        ValueError: the model's parameters or the study's subjects are not those of the file.
    """
    path = _file(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header")))
    joint = Joint.of(model, study)
    for what, value in identity(joint, study).items():
        if header.get(what, value) != value:  # files of older versions lack the levels
            raise ValueError(
                f"expected a model and a study with the {what} of {path.name}, "
                f"{_short(header[what])}; got {_short(value)}."
            )
    weights = {name: jnp.asarray(arrays[f"weights:{name}"]) for name in joint.roles.weights}
    conditional = Conditional(jnp.asarray(arrays["mean"]), jnp.asarray(arrays["scale_tril"]))
    return Fit(
        joint=joint,
        study=study,
        theta=jnp.asarray(arrays["theta"]),
        weights=weights,
        conditional=conditional,
        log_likelihood=arrays["log_likelihood"],
        log_likelihood_se=arrays["log_likelihood_se"],
        information=arrays.get("information"),
        history=arrays["history"],
        converged=header["converged"],
        messages=tuple(header["messages"]),
        use_priors=header["use_priors"],
        selection=arrays.get("selection"),
        selected=header["selected"],
        dependence=header.get("dependence"),
        outer=arrays.get("outer"),  # files of older versions lack this, the method and the time
        method=header.get("method", "importance sampling"),
        seconds=Seconds(*header["seconds"]) if header.get("seconds") else None,
    )


def _file(path: str | Path) -> Path:
    """The path with ".npz" added, not put in place of another ending ("run.1" stays apart)."""
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def identity(joint: Joint, study: Study) -> dict[str, Any]:
    """What a file and the model and study it is loaded with must agree on."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(study):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    roles = joint.roles
    return {
        "parameters": {name: list(site.shape) for name, site in roles.population.items()},
        "flow weights": {name: int(np.size(w)) for name, w in roles.weights.items()},
        "effects": list(roles.effect_names),
        "laws of the random effects": [type(law).__name__ for law in roles.laws.values()],
        "subjects": [str(i) for i in study.subjects.ids],
        "levels": {name: [repr(x) for x in own] for name, own in study.levels.items()},
        "data": digest.hexdigest(),
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + " ..."
