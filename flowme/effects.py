"""Distributions of random effects: Gaussian, Student t, mixture, and normalizing flow.

All are NumPyro distributions over a vector η of named effects, with event shape `[effect]`. What
distinguishes them from others is that they know which of their own parameters a study teaches
(`priors`), so that `flowme.random_effect` can register those at the population level. Any other
NumPyro distribution may take their place; its parameters are then the user's own statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln, logsumexp
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from scipy.cluster.vq import kmeans2
from scipy.stats import multivariate_normal, norm, qmc

from flowme.flows import Flow, MarginalMixture, SplineCoupling


class RandomEffect(dist.Distribution):
    """A distribution of random effects η `[effect]` whose parameters are learned from the study.

    To write another one: store each learned parameter under its own name, list those names in
    `pytree_data_fields`, and define `priors` (their laws under full Bayes; the support of each is
    also its constraint under maximum likelihood), `start` (their values from draws of η, which is
    how an estimation begins), `log_prob`, `sample`, `mean` and `covariance_matrix`. Set
    `network = True` when there are `weights`, a flat vector, to be learned by gradient steps.
    """

    support = constraints.real_vector
    arg_constraints: dict[str, Any] = {}
    pytree_aux_fields: tuple[str, ...] = ("names",)
    network = False
    names: tuple[str, ...]

    def __init__(self, names: Sequence[str], batch_shape: tuple[int, ...] = ()):
        self.names = _check_names(names)
        super().__init__(batch_shape=batch_shape, event_shape=(len(self.names),))

    def priors(self) -> dict[str, dist.Distribution]:
        """The law of each learned parameter at the population level, by name."""
        raise NotImplementedError

    def with_parameters(self, **values: ArrayLike) -> RandomEffect:
        """The same distribution with other parameter values (those of `priors`, or `weights`)."""
        new = jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(self))
        for name, value in values.items():
            setattr(new, name, value)
        return new

    def start(
        self, key: jax.Array, covariance: np.ndarray, eta: np.ndarray, subjects: int
    ) -> dict[str, Any]:
        """Starting values of the learned parameters, from a fit of the Gaussian model.

        Args:
            key: random key; is consumed.
            covariance: Ω of that fit, `[effect, effect]`.
            eta: draws from its conditional distributions, `[draw, effect]`.
            subjects: how many subjects they are of.
        """
        raise NotImplementedError

    @property
    def covariance_matrix(self) -> jax.Array:
        """Cov(η), `[effect, effect]`."""
        raise NotImplementedError

    @property
    def variance(self):
        return jnp.diagonal(self.covariance_matrix)

    @property
    def mean(self):
        return jnp.zeros(self.event_shape)


class _Scaled(RandomEffect):
    """What distributions with one scale matrix share: L = diag(ω) · Cholesky(correlation)."""

    pytree_data_fields: tuple[str, ...] = ("omega", "corr_cholesky", "omega_prior")
    pytree_aux_fields: tuple[str, ...] = ("full",)

    def __init__(self, names, *, full, omega, omega_prior, batch_shape=()):
        names = _check_names(names)
        self.full = bool(full) and len(names) > 1
        self.omega = _positive("omega", omega, (len(names),))
        self.corr_cholesky = np.eye(len(names))
        self.omega_prior = dist.HalfNormal(1.0) if omega_prior is None else omega_prior
        super().__init__(names, batch_shape)

    def priors(self):
        size = len(self.names)
        laws = {"omega": self.omega_prior.expand([size]).to_event(1)}
        if self.full:
            laws["corr_cholesky"] = dist.LKJCholesky(size, 2.0)
        return laws

    def start(self, key, covariance, eta, subjects):
        values = {"omega": np.sqrt(np.diag(covariance))}
        if self.full:
            values["corr_cholesky"] = _corr_cholesky(covariance)
        return values

    @property
    def scale_tril(self) -> jax.Array:
        """L, `[effect, effect]`, lower triangular."""
        return self._tril

    @property
    def _tril(self) -> jax.Array:
        return self.omega[:, None] * self.corr_cholesky

    def _whiten(self, value):
        inverse = jax.scipy.linalg.solve_triangular(
            self._tril, jnp.eye(len(self.names)), lower=True
        )
        return value @ inverse.T

    def _log_det(self):
        return jnp.sum(jnp.log(self.omega)) + jnp.sum(jnp.log(jnp.diagonal(self.corr_cholesky)))


class GaussianRandomEffect(_Scaled):
    r"""η ~ N(0, Ω), Ω = diag(ω) R diag(ω).

    Args:
        names: names of the effects, in order.
        full: learn the correlation matrix R; by default Ω is diagonal (R = I).
        omega: starting standard deviations ω, a number or `[effect]`, in the unit of η
            (dimensionless for a lognormal parameter, where .3 is about 30 %).
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        full: bool = False,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
    ):
        super().__init__(names, full=full, omega=omega, omega_prior=omega_prior)

    def from_base(self, z):
        """η = L z of standard normal z `[..., effect]`."""
        return z @ self.scale_tril.T

    def to_base(self, eta):
        """The z of η `[..., effect]`."""
        return self._whiten(eta)

    def sample(self, key, sample_shape=()):
        return self.from_base(jax.random.normal(key, sample_shape + self.event_shape))

    def log_prob(self, value):
        z = self._whiten(value)
        return -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1) - self._log_det()

    @property
    def covariance_matrix(self):
        return self.scale_tril @ self.scale_tril.T


class StudentTRandomEffect(_Scaled):
    r"""η ~ t_ν(0, L Lᵀ): heavier tails than the Gaussian; ω is its scale, SD = ω √(ν/(ν-2)).

    Args:
        names: names of the effects, in order.
        full: learn the correlation matrix; by default the scale matrix is diagonal.
        omega: starting scales, a number or `[effect]`, in the unit of η.
        omega_prior: law of each ω under full Bayes and MAP; HalfNormal(1) by default.
        df: starting degrees of freedom ν. Its law is 2 + Gamma(2, 0.1), so the variance exists.
    """

    pytree_data_fields: tuple[str, ...] = ("df",)

    def __init__(
        self,
        names: Sequence[str],
        *,
        full: bool = False,
        omega: ArrayLike = 0.5,
        omega_prior: dist.Distribution | None = None,
        df: float = 10.0,
    ):
        if not np.ndim(df) == 0 or not df > 2:
            raise ValueError(f"expected df above 2, so that the variance exists; got {df}.")
        self.df = df
        super().__init__(names, full=full, omega=omega, omega_prior=omega_prior)

    def priors(self):
        shifted = dist.TransformedDistribution(
            dist.Gamma(2.0, 0.1), dist.transforms.AffineTransform(2.0, 1.0, constraints.positive)
        )
        return {**super().priors(), "df": shifted}

    def start(self, key, covariance, eta, subjects):
        values = super().start(key, covariance, eta, subjects)
        df = float(self.df)
        return {**values, "omega": values["omega"] * np.sqrt((df - 2) / df), "df": df}

    def sample(self, key, sample_shape=()):
        return dist.MultivariateStudentT(self.df, 0.0, self.scale_tril).sample(key, sample_shape)

    def log_prob(self, value):
        size, df = len(self.names), self.df
        distance = jnp.sum(self._whiten(value) ** 2, -1)
        constant = (
            gammaln(0.5 * (df + size)) - gammaln(0.5 * df) - 0.5 * size * jnp.log(df * jnp.pi)
        )
        return constant - 0.5 * (df + size) * jnp.log1p(distance / df) - self._log_det()

    @property
    def covariance_matrix(self):
        return self.df / (self.df - 2) * self.scale_tril @ self.scale_tril.T


class MixtureRandomEffect(RandomEffect):
    r"""η ~ Σ_m π_m N(μ_m, Ω_m), with Σ_m π_m μ_m = 0: subpopulations, each Gaussian.

    Centred like the others: the last component's mean follows from those before it,
    μ_M = -Σ_{m<M} π_m μ_m / π_M. Components are numbered as they were started.

    Args:
        names: names of the effects, in order.
        components: M, the number of subpopulations.
        full: learn a correlation matrix per component; by default each Ω_m is diagonal.
        spread: prior standard deviation of the component means, a number or `[effect]`, in the
            unit of η (also the law HalfNormal(spread) of each ω under full Bayes and MAP).
    """

    pytree_data_fields = ("probs", "locs", "omega", "corr_cholesky", "spread")
    pytree_aux_fields = ("full", "components")

    def __init__(
        self,
        names: Sequence[str],
        components: int = 2,
        *,
        full: bool = False,
        spread: ArrayLike = 1.0,
    ):
        names = _check_names(names)
        if not isinstance(components, int) or components < 2:
            raise ValueError(f"expected at least 2 components; got {components!r}.")
        size = len(names)
        self.components = components
        self.full = bool(full) and size > 1
        self.spread = _positive("spread", spread, (size,))
        self.probs = np.full(components, 1 / components)
        # Components apart from each other along all effects: equal ones would never separate.
        position = np.linspace(-1.0, 1.0, components)
        self.locs = 0.5 * position[:-1, None] * self.spread
        self.omega = np.full((components, size), 0.5) * self.spread
        self.corr_cholesky = np.broadcast_to(np.eye(size), (components, size, size))
        super().__init__(names)

    def priors(self):
        size, count = len(self.names), self.components
        laws = {
            "probs": dist.Dirichlet(jnp.full(count, 2.0)),
            "locs": dist.Normal(0, jnp.broadcast_to(self.spread, (count - 1, size))).to_event(2),
            "omega": dist.HalfNormal(jnp.broadcast_to(self.spread, (count, size))).to_event(2),
        }
        if self.full:
            laws["corr_cholesky"] = dist.LKJCholesky(size, 2.0).expand([count]).to_event(1)
        return laws

    def start(self, key, covariance, eta, subjects):
        """Starting values by k-means on the draws, each effect divided by its SD: of ten runs, as
        they end in different places, the one whose Gaussians are the likeliest."""
        eta = np.asarray(eta)
        scale = np.maximum(eta.std(0), 1e-12)
        seeds = np.asarray(jax.random.randint(key, (10,), 0, 2**31 - 1)).tolist()
        labels = [kmeans2(eta / scale, self.components, minit="++", seed=s)[1] for s in seeds]
        found = [self._clusters(eta, label) for label in labels]
        probs, means, covariances = max(found, key=lambda x: _log_mixture(eta, *x).sum())
        sds = np.stack([np.sqrt(np.diag(c)) for c in covariances])
        values = {
            "probs": probs,
            "locs": (means - probs @ means)[:-1],
            "omega": np.maximum(sds, 0.05 * scale),
        }
        if self.full:
            values["corr_cholesky"] = np.stack([_corr_cholesky(c) for c in covariances])
        return values

    def _clusters(self, eta: np.ndarray, label: np.ndarray):
        """Shares, means and covariances of labelled draws; of all draws where a label is rare."""
        parts = [eta[label == m] for m in range(self.components)]
        parts = [part if len(part) > 2 * eta.shape[1] else eta for part in parts]
        probs = np.array([np.mean(label == m) for m in range(self.components)])
        probs = (probs + 0.02) / (probs + 0.02).sum()
        means = np.stack([part.mean(0) for part in parts])
        return probs, means, [np.atleast_2d(np.cov(part, rowvar=False)) for part in parts]

    @property
    def component_means(self) -> jax.Array:
        """μ, `[component, effect]`."""
        last = -(self.probs[:-1] @ self.locs) / self.probs[-1]
        return jnp.concatenate([self.locs, last[None]])

    def _scale_tril(self):
        return jnp.asarray(self.omega)[..., None] * self.corr_cholesky

    def sample(self, key, sample_shape=()):
        key_component, key_normal = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.probs), shape=sample_shape)
        z = jax.random.normal(key_normal, sample_shape + self.event_shape)
        moved = jnp.einsum("...ij,...j->...i", self._scale_tril()[component], z)
        return self.component_means[component] + moved

    def log_prob(self, value):
        tril = self._scale_tril()
        inverse = jnp.linalg.inv(tril)
        z = jnp.einsum("mij,...mj->...mi", inverse, value[..., None, :] - self.component_means)
        log_det = jnp.sum(jnp.log(jnp.diagonal(tril, axis1=-2, axis2=-1)), -1)
        normal = -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), -1) - log_det
        return logsumexp(jnp.log(self.probs) + normal, axis=-1)

    @property
    def covariance_matrix(self):
        tril = self._scale_tril()
        within = tril @ jnp.swapaxes(tril, -1, -2)
        between = self.component_means[:, :, None] * self.component_means[:, None, :]
        return jnp.tensordot(self.probs, within + between, 1)


class FlowRandomEffect(_Scaled):
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
        names = _check_names(names)
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
        self.weights_scale = _positive("weights_scale", weights_scale, ())
        batch = () if self.context is None else self.context.shape[:1]
        super().__init__(names, full=True, omega=omega, omega_prior=omega_prior, batch_shape=batch)

    def typical(self) -> FlowRandomEffect:
        """The law of a subject whose covariates are x = 0; without covariates, this law."""
        new: Any = self.with_parameters()
        new.context, new._batch_shape = None, ()
        return new

    def weights_prior(self) -> dist.Distribution:
        """The shrinking prior w ~ N(0, weights_scale² I), used when the weights are sampled."""
        return dist.Normal(0.0, self.weights_scale).expand(self.weights.shape).to_event(1)

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


def _log_mixture(eta: np.ndarray, probs, means, covariances) -> np.ndarray:
    """log Σ_m π_m N(η; μ_m, Ω_m), `[draw]`."""
    laws = (
        multivariate_normal(m, c, allow_singular=True)
        for m, c in zip(means, covariances, strict=True)
    )
    terms = [np.log(p) + law.logpdf(eta) for p, law in zip(probs, laws, strict=True)]
    return np.logaddexp.reduce(terms, axis=0)


def _corr_cholesky(covariance: np.ndarray) -> np.ndarray:
    sd = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(sd, sd)
    # Kept off the boundary, where the unconstrained parameter would be infinite.
    return np.linalg.cholesky((1 - 1e-4) * correlation + 1e-4 * np.eye(len(sd)))


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise TypeError(
            f"expected a list of effect names such as ['ka', 'V'], each a Python name; got "
            f"{names!r}."
        )
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected one or more different effect names; got {list(names)}.")
    return tuple(names)


def _positive(what: str, value: ArrayLike, shape: tuple[int, ...]) -> Any:
    if isinstance(value, jax.core.Tracer):  # its value is not known before the program runs
        return jnp.broadcast_to(value, shape)
    array = np.asarray(value, float)
    if array.ndim and array.shape != shape or not np.all((array > 0) & np.isfinite(array)):
        raise ValueError(
            f"expected {what} positive, a number or of shape {list(shape)}; got {value}."
        )
    return np.broadcast_to(array, shape)


@cache
def _first_weights(flow: Flow, size: int, dtype: Any) -> np.ndarray:
    # A constant of the program: a model builds its random effect anew each time it is traced.
    del dtype  # only part of the key: double precision may be turned on later
    with jax.ensure_compile_time_eval():
        return np.asarray(flow.init(jax.random.key(0), size))
