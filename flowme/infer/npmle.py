"""The nonparametric maximum-likelihood estimate of the law of the random effects.

With the population parameters held, the law G of η that maximises

    ℓ(G) = Σ_i log f_i(G),      f_i(G) = ∫ p(y_i | η) dG(η),

is discrete, with at most as many points as there are subjects (Lindsay 1983), G = Σ_k w_k δ(η_k).
ℓ is concave in G, so the gradient function

    D(η; G) = Σ_i p(y_i | η) / f_i(G) - N

tells how far a law is from the best one: ℓ(H) - ℓ(G) ≤ max_η D(η; G) for every H whatever, and
at the maximum D ≤ 0 everywhere, with D = 0 on the support. The algorithm exchanges support
points (Wang 2007): add the maxima of D, weigh all points anew, drop those without weight.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from flowme.infer.fit import Fit
from flowme.infer.joint import Joint, Weights
from flowme.infer.mixing import mixing_weights
from flowme.infer.support import Likelihood, Search
from flowme.study import Study


@dataclasses.dataclass(frozen=True, eq=False)
class NPMLE:
    """A discrete law of the random effects, Σ_k w_k δ(η_k), with the other parameters held.

    Attributes:
        joint: the model; the law that it states for its random effects is not used.
        theta: population parameters on their unconstrained scale, held, `[parameter]`.
        flow_weights: weights of the flows of the model, by site.
        support: η_k, `[point, effect]`.
        weights: w_k, `[point]`, positive, with sum 1.
        log_likelihood_at_fit: log f_i of the subjects it was estimated from, `[subject]`.
        gap: the largest D(η) found: no law whatever has a log-likelihood higher by more.
        history: the log-likelihood after each round.
        converged: whether `gap` is below the tolerance.
        messages: what the user should know.
    """

    joint: Joint
    theta: jax.Array
    flow_weights: Weights
    support: np.ndarray
    weights: np.ndarray
    log_likelihood_at_fit: np.ndarray
    gap: float
    history: np.ndarray
    converged: bool
    messages: tuple[str, ...] = ()

    @property
    def mean(self) -> np.ndarray:
        """E η, `[effect]`; not 0 in general."""
        return self.weights @ self.support

    @property
    def covariance_matrix(self) -> np.ndarray:
        """Cov η, `[effect, effect]`."""
        centred = self.support - self.mean
        return (self.weights * centred.T) @ centred

    @property
    def minus_two_ll(self) -> float:
        """-2 ℓ on the subjects it was estimated from: lower than that of any other law."""
        return -2.0 * float(np.sum(self.log_likelihood_at_fit))

    def log_likelihood(self, study: Study) -> np.ndarray:
        """log Σ_k w_k p(y_i | η_k) of the subjects of any study, `[subject]`; it is exact."""
        log_p = Likelihood(self.joint, self.theta, self.flow_weights, study).matrix(self.support)
        return np.asarray(logsumexp(log_p + np.log(self.weights), axis=1))

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """`count` draws of η, `[draw, effect]`."""
        chosen = jax.random.categorical(key, jnp.log(self.weights), shape=(count,))
        return jnp.asarray(self.support)[chosen]


def npmle(
    fit: Fit,
    study: Study | None = None,
    *,
    candidates: int = 1000,
    ascents: int = 64,
    rounds: int = 60,
    tolerance: float = 0.05,
) -> NPMLE:
    """The nonparametric maximum-likelihood estimate of the law of η, at the parameters of `fit`.

    Every round draws fresh candidates, evaluates D at them, and climbs D by Newton steps from the
    best of them and from the present support. The largest D over all of these points is the gap;
    they are fresh points, to which the law has not been fitted. Before a gap below the tolerance
    is believed, ten times as many candidates are looked at, and climbed from further.

    It is a discrete law: on the subjects it was estimated from it beats every other one, on new
    subjects it is the worst (`smoothed_npmle` is its cure).

    Args:
        fit: a fitted model, Gaussian as a rule: its population parameters and residual error are
            held, its conditional distributions say where to look.
        study: the subjects; by default those of the fit.
        candidates: fresh candidates per round: half from the conditional distributions, half from
            the population.
        ascents: of these, how many are starts of an ascent.
        rounds: at most so many.
        tolerance: stop when the gap, in units of the log-likelihood of all subjects, is below.

    Raises:
        ValueError: a subject is impossible under every candidate.
    """
    if not (tolerance > 0 and candidates >= 2 and ascents >= 1 and rounds >= 1):
        raise ValueError(
            "expected a positive tolerance, at least 2 candidates, 1 ascent and 1 round; got "
            f"{tolerance}, {candidates}, {ascents} and {rounds}."
        )
    search = Search.of(fit, study)
    likelihood = search.likelihood
    support = search.points(0, candidates)
    log_p = likelihood.matrix(support)
    _check_possible(log_p, likelihood.study)
    weights, history = np.full(candidates, 1 / candidates), []
    for number in range(1, rounds + 1):
        weights, log_f = mixing_weights(log_p, weights)
        keep = weights > 0
        support, log_p, weights = support[keep], log_p[:, keep], weights[keep]
        history.append(float(log_f.sum()))
        new, log_p_new, gap = search.ascend(number, candidates, ascents, support, log_f)
        if gap < tolerance:  # to be believed, a closer look
            new, log_p_new, gap = search.ascend(
                number + rounds, 10 * candidates, 4 * ascents, support, log_f, steps=4
            )
        if gap < tolerance or number == rounds:
            break
        support, log_p = np.concatenate([support, new]), np.hstack([log_p, log_p_new])
        weights = np.append(weights, np.zeros(len(new)))
    converged = gap < tolerance
    why = f"the gap is {gap:.2g} after {rounds} rounds, not below {tolerance:g}: raise rounds"
    return NPMLE(
        fit.joint, fit.theta, fit.weights, support, weights, log_f, gap, np.asarray(history),
        converged, () if converged else (why,),
    )  # fmt: skip


def _check_possible(log_p: np.ndarray, study: Study) -> None:
    bad = np.flatnonzero(~np.isfinite(log_p.max(1)))
    if bad.size:
        raise ValueError(
            f"expected every subject to be possible under some value of its random effects; got "
            f"a likelihood of 0 at all {log_p.shape[1]} candidates for subject "
            f"{study.subjects.ids[bad[0]]}. Start from a fit with a larger Ω or residual error, or "
            "raise candidates."
        )
