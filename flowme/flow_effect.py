"""Random effects whose distribution is learned: a normalizing flow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from scipy.stats import norm, qmc

from flowme.effects import Scaled, check_names, positive
from flowme.flows import Flow, MarginalMixture, SplineCoupling


class FlowRandomEffect(Scaled):
    r"""η = L (T_w(z) standardised), z ~ N(0, I): a learned distribution of random effects.

    T_w is a normalizing flow with weights w, and

        u = T_w(z),  η = L R⁻¹ (u - c),  c = E u,  R Rᵀ = Cov u,  L = diag(ω) · Cholesky(R_η).

    Centred (the default): c and R are the moments of u, taken at fixed quasi-random points, so
    that E η = 0 and Cov η = L Lᵀ up to the error of that quadrature (about 1e-2 of an ω; exactly
    for a `flows.MarginalMixture`, which is standardised by construction). The
    population parameters are then the means of their (transformed) individual parameters and ω,
    R_η mean what they mean for a Gaussian: without it a shift or a stretch of the flow could not
    be told from a change of them. With `centred=False`, c = 0 and R = I: the flow is free, and
    population parameters are only the image of η = 0.

    At the start T_w is the identity and the distribution is exactly N(0, L Lᵀ).

    A conditional flow, `context=x`: the distribution is another one for each subject,

        η_i = L D(x_i) R⁻¹ (u_i - c),  u_i = T_w(z_i; x_i),  D(x) = diag(exp(A x)),

    with c and R at x_i: shape, dependence and (by D) variance depend on x, and E(η | x) = 0 for
    every x, not only on average. How the *mean* depends on covariates is thereby said in one
    place, the model (CL · (WT/70)^β · exp(η)). ω is the standard deviation at x = 0. The law has
    a batch, `[subject]`. Its flow is by default a `flows.MarginalMixture`, for which c and R are
    exact: the shape of each coordinate depends on x, and their dependence on each other is that
    of L. `flows.SplineCoupling()` lets that depend on x too (its conditioners see z_A and x), but
    needs c and R at 64 points of each subject, at every step: minutes where the other takes
    seconds. At the start nothing depends on x.

    The flow learns the function x -> law, which must be the same for every study: give x as
    fixed functions of the covariates, about 0 and with a spread of about 1, such as
    (WT - 70) / 15, not standardised by the mean and SD of whichever study it is; of a categorical
    covariate `covariate.indicators(study, "SEX")`. So it stands in the model, where the study is
    known, not in `replace_effect`; that can put another law in its place:

        x = (study.covariates["WT"][:, None] - 70) / 15
        eta = fm.random_effect("eta", fm.FlowRandomEffect(["CL"], context=x), study.subjects)

    Args:
        names: names of the effects, in order.
        flow: the architecture; `flows.SplineCoupling()` by default, `flows.MarginalMixture()` for
            a single effect and for a conditional flow. Small ones win: the unrestricted
            maximum-likelihood distribution is discrete, so the size and the stopping time are the
            smoothing parameter.
        centred: see above.
        omega: starting standard deviations ω, a number or `[effect]`, in the unit of η.
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
        weights_scale: standard deviation of the normal prior that shrinks w towards 0, that is
            the distribution towards the Gaussian, when the weights are sampled.
        context: x, `[subject, covariate]`, of a conditional flow: see above.
    """

    pytree_data_fields: tuple[str, ...] = ("weights", "weights_scale", "context")
    pytree_aux_fields: tuple[str, ...] = ("flow", "centred")
    network = True

    def __init__(
        self,
        names: Sequence[str],
        flow: Flow | None = None,
        *,
        centred: bool = True,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
        weights_scale: float = 0.3,
        context: ArrayLike | None = None,
    ):
        names = check_names(names)
        if flow is None:
            coupled = len(names) > 1 and context is None
            flow = SplineCoupling() if coupled else MarginalMixture()
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a flowme.flows.Flow; got {flow!r}.")
        self.context = None if context is None else _standardised(context)
        if self.context is not None:
            flow = flow.reading(self.context.shape[1])
        self.flow, self.centred = flow, bool(centred)
        self.weights = _first_weights(flow, len(names), jnp.zeros(()).dtype)
        self.weights_scale = positive("weights_scale", weights_scale, ())
        batch = () if self.context is None else self.context.shape[:1]
        super().__init__(names, full=True, omega=omega, omega_prior=omega_prior, batch_shape=batch)

    def typical(self) -> FlowRandomEffect:
        """The law of a subject whose covariates are x = 0; without covariates, this law."""
        new: Any = self.with_parameters()
        new.context, new._batch_shape = None, ()
        return new

    def weights_prior(self) -> dist.Distribution:
        """The prior w_j ~ N(0, (weights_scale · s_j)²) that shrinks weights when they are sampled.

        s_j is 1, or less where the sum over many hidden units enters (`Flow.prior_scale`).
        """
        scale = self.weights_scale * self.flow.prior_scale(len(self.names))
        return dist.Normal(0.0, scale).to_event(1)

    def start(self, key, covariance, eta, subjects):
        z = np.asarray(eta) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
        weights = self.flow.start(key, z, subjects)
        return {**super().start(key, covariance, eta, subjects), "weights": weights}

    @property
    def _x(self):
        """The covariates `[..., covariate]`; None of a flow that reads none."""
        if self.context is None and self.flow.context:
            return jnp.zeros(self.flow.context)
        return self.context

    @property
    def _bijector(self):
        return self.flow.bijector(self.weights, len(self.names), self._x)

    @property
    def scale_tril(self):
        """L D(x), `[..., effect, effect]`, lower triangular."""
        return self._tril if self._x is None else self._tril * self._spread[..., None, :]

    @property
    def _spread(self):
        """The diagonal of D(x), `[..., effect]`."""
        return self.flow.spread(self.weights, len(self.names), self._x)

    def _moments(self):
        """c = E u and R with R Rᵀ = Cov u, over fixed points."""
        size = len(self.names)
        if not self.centred or self.flow.standard:
            return jnp.zeros(size), jnp.eye(size)
        if self.context is None:
            u = self._bijector.forward(_normal_points(size))
        else:
            points = _normal_points(size, log2_count=5)[:, None]
            u = self._bijector.forward(jnp.broadcast_to(points, (64, *self.shape())))
        c = u.mean(0)
        square = jnp.einsum("k...i,k...j->...ij", u - c, u - c) / u.shape[0]
        return c, jnp.linalg.cholesky(square)

    def from_base(self, z):
        """η of standard normal z `[..., effect]`."""
        c, R = self._moments()
        v = self._bijector.forward(z) - c
        return jnp.einsum("...ij,...j->...i", self.scale_tril @ _inverse_tril(R), v)

    def sample(self, key, sample_shape=()):
        return self.from_base(jax.random.normal(key, sample_shape + self.shape()))

    def to_base(self, eta):
        """The z of η `[..., effect]`."""
        return self._inverse(eta)[0]

    def _inverse(self, eta):
        """z, log |dz/du| and R at η."""
        c, R = self._moments()
        u = c + jnp.einsum("...ij,...j->...i", R, self._whiten(eta))
        return *self._bijector.inverse_and_log_det(u), R

    def _whiten(self, value):
        whitened = super()._whiten(value)
        return whitened if self._x is None else whitened / self._spread

    def log_prob(self, value):
        z, log_det, R = self._inverse(value)
        normal = -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1)
        stretch = jnp.sum(jnp.log(jnp.diagonal(R, axis1=-2, axis2=-1)), -1)
        if self._x is not None:
            stretch = stretch - jnp.sum(jnp.log(self._spread), -1)
        return normal + log_det + stretch - self._log_det()

    # Those that it is standardised to; a flow that is free has them by quadrature.
    @property
    def mean(self):
        return jnp.zeros(self.shape()) if self.centred else _quadrature(self)[0]

    @property
    def covariance_matrix(self):
        if self.centred:
            return self.scale_tril @ jnp.swapaxes(self.scale_tril, -1, -2)
        return _quadrature(self)[1]


@jax.jit
def _quadrature(law: FlowRandomEffect) -> tuple[jax.Array, jax.Array]:
    """Mean and covariance of a flow. (Of a law for each subject, over fewer points.)"""
    points = _normal_points(len(law.names), log2_count=7 if law.batch_shape else 12, seed=1)
    points = points.reshape(-1, *[1] * len(law.batch_shape), len(law.names))
    eta = law.from_base(jnp.broadcast_to(points, (len(points), *law.shape())))
    mean = eta.mean(0)
    return mean, jnp.einsum("k...i,k...j->...ij", eta - mean, eta - mean) / len(points)


def _inverse_tril(tril: jax.Array) -> jax.Array:
    """The inverse of lower triangular matrices `[..., effect, effect]`."""
    eye = jnp.broadcast_to(jnp.eye(tril.shape[-1]), tril.shape)
    return jax.lax.linalg.triangular_solve(tril, eye, left_side=True, lower=True)


def _standardised(context: ArrayLike) -> Any:
    """The covariates of a conditional flow as floats, refused where a network could not read
    them."""
    known = not isinstance(context, jax.core.Tracer)
    x: Any = np.asarray(context, float) if known else jnp.asarray(context, float)
    if x.ndim != 2 or not x.size:
        raise ValueError(
            "expected context of shape [subject, covariate], constant in time; got shape "
            f"{list(x.shape)}. One covariate is x[:, None]; several are jnp.stack([...], -1)."
        )
    if known and not np.all(np.abs(x) <= 10):
        wrong = int(np.argmax(~(np.abs(x) <= 10).all(0)))
        raise ValueError(
            "expected a context about 0 with a spread of about 1; got column "
            f"{wrong} from {x[:, wrong].min():g} to {x[:, wrong].max():g}. Write "
            "(x - reference) / spread with fixed numbers, such as (WT - 70) / 15."
        )
    return x


def _normal_points(size: int, log2_count: int = 8, seed: int = 0) -> np.ndarray:
    """Fixed quasi-random points of N(0, I), `[point, size]`, with mean 0 and covariance I exactly.

    Exactly, so that the identity flow is standardised to itself.
    """
    sobol = qmc.Sobol(size, seed=seed).random_base2(log2_count)
    z = norm.ppf(np.clip(sobol, 1e-12, 1 - 1e-12))
    z = np.concatenate([z, -z])
    return z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T


@cache
def _first_weights(flow: Flow, size: int, dtype: Any) -> np.ndarray:
    # A constant of the program: a model builds its random effect anew each time it is traced.
    del dtype  # only part of the key: double precision may be turned on later
    with jax.ensure_compile_time_eval():
        return np.asarray(flow.init(jax.random.key(0), size))
