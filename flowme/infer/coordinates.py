"""Coordinates in which the posterior of a population model is close to N(0, I).

With m̂_i, C_i the conditional distributions of a fit at θ̂, and the law of η_i of location μ(θ) and
scale L(θ),

    θ = θ₀ + S t,    η_i = μ(θ) + L(θ) u_i,    u_i = P_i⁻¹ r_i + R_i⁻ᵀ z_i,    P_i = R_i R_iᵀ,

where P_i(θ) = I + Lᵀ I_i L and r_i(θ) = Lᵀ (g_i + G_i (θ - θ̂) + I_i (m̂_i - μ)) come from the
expansion of log p(y_i | η; θ) around (m̂_i, θ̂): gradient g_i, cross derivatives G_i and information
I_i = C_i⁻¹ - Ω̂⁻¹. For a linear Gaussian model z_i is N(0, I) whatever y and θ, hence independent
of t. A subject with rich data (I_i large) is centred, η_i = m_i(θ) + a fixed scale times z_i; one
with poor data (I_i near 0) is non-centred, η_i = μ(θ) + L(θ) z_i; all others lie in between
(partially non-centred: Papaspiliopoulos, Roberts & Sköld 2007, Statistical Science 22:59). Only the
coordinates are approximate: the density carries their exact Jacobian.

Laws with a `from_base` (the flow) have η_i = from_base(u_i), which is expanded as
μ + L (b_i + S_i u_i) around m̂_i. (For a Gaussian law both are the same, b_i = 0 and S_i = I.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import biject_to

from flowme.effects import RandomEffect
from flowme.flow_effect import FlowRandomEffect
from flowme.infer.joint import Joint, Weights
from flowme.study import Study


class Map(NamedTuple):
    """The numbers of the coordinates; that they are approximate costs speed, not correctness."""

    theta: jax.Array  # θ₀, [parameter]
    scale: jax.Array  # S, upper triangular, [parameter, parameter]
    weights: Weights  # flow weights ŵ: held, or around which they are sampled
    mean: jax.Array  # m̂_i, [subject, effect]
    information: jax.Array  # I_i, [subject, effect, effect]
    gradient: jax.Array  # g_i + G_i (θ₀ - θ̂), [subject, effect]
    cross: jax.Array  # G_i S, [subject, effect, parameter]
    offset: jax.Array  # b_i, [subject, effect]
    slope: jax.Array  # S_i, [subject, effect, effect]


class Point(NamedTuple):
    """What x stands for."""

    theta: jax.Array  # [parameter], unconstrained
    weights: Weights
    eta: jax.Array  # [subject, effect]
    base: jax.Array  # u, [subject, effect]
    log_det: jax.Array  # log |d(θ, w, η)/dx|, with u in the place of η where η = from_base(u)


@dataclasses.dataclass(frozen=True, eq=False)
class Coordinates:
    """The coordinates x = (t, x_w, z) of a model, a flat vector, and its density there.

    Two are equal when programs compiled for one serve the other.

    Attributes:
        joint: the model.
        sample_flow: whether flow weights are unknowns too: w = ŵ + (their prior's SD) x_w.
    """

    joint: Joint
    sample_flow: bool

    def _key(self) -> tuple:
        supports = tuple(repr(site.support) for site in self.joint.roles.population.values())
        return self.joint.model, self.joint.signature, supports, self.sample_flow

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coordinates) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def size(self, study: Study) -> int:
        """Length of x."""
        return self._first + study.subjects.size * self.joint.effect_size

    @property
    def _first(self) -> int:
        """Where z begins."""
        weights = self.joint.roles.weights.values() if self.sample_flow else ()
        return self.joint.size + sum(w.size for w in weights)

    def point(self, x: jax.Array, map: Map, study: Study) -> Point:
        """θ, flow weights and η of x."""
        joint = self.joint
        t, z = x[: joint.size], x[self._first :].reshape(map.mean.shape)
        theta = map.theta + map.scale @ t
        weights, log_det_weights = self._weights(x[joint.size : self._first], map)
        laws = joint.laws(theta, weights, study)
        location, L = frame(joint, laws)
        r, data = _expansion(map, t, location, L)
        u, log_det = _conditional(r, data, z)
        eta = location + times(L, u)
        log_diagonal = jnp.log(jnp.abs(jnp.diagonal(L, axis1=-2, axis2=-1)))
        log_diagonal = jnp.broadcast_to(log_diagonal, u.shape)
        log_det = log_det + log_det_weights + jnp.sum(jnp.log(jnp.diagonal(map.scale)))
        parts = []
        for name, law, where in by_site(joint, laws):
            if has_base(joint, name):
                parts.append(inner(law).from_base(u[:, where]))
            else:
                parts.append(eta[:, where])
                log_det = log_det + jnp.sum(log_diagonal[:, where])
        return Point(theta, weights, jnp.concatenate(parts, -1), u, log_det)

    def _weights(self, x: jax.Array, map: Map) -> tuple[Weights, jax.Array]:
        if not self.sample_flow:
            return map.weights, jnp.zeros(())
        weights, start, log_det = {}, 0, jnp.zeros(())
        for name, center in map.weights.items():
            part, start = x[start : start + center.size], start + center.size
            scale = jnp.sqrt(self._prior(name).variance)
            weights[name] = center + scale * part
            log_det = log_det + jnp.sum(jnp.log(scale))
        return weights, log_det

    def _prior(self, name: str) -> Any:
        return self.joint.roles.laws[name.removesuffix("_weights")].weights_prior()

    def potential(self, x: jax.Array, map: Map, study: Study) -> jax.Array:
        """-log p(θ, w, η, y) - log |Jacobian|: what NUTS moves on."""
        joint = self.joint
        point = self.point(x, map, study)
        sites = joint.sites(joint.constrain(point.theta), point.weights, point.eta, study)
        total = point.log_det + _log_det_constrain(joint, point.theta)
        for name, _, where in by_site(joint, list(joint.roles.effects)):
            if has_base(joint, name):  # log p(η) + log |dη/du| = log N(u; 0, I)
                u = point.base[:, where]
                total = total - 0.5 * jnp.sum(u**2 + math.log(2 * math.pi))
                del sites[name]
        for site in sites.values():
            if site["type"] == "sample":
                scale = 1.0 if site["scale"] is None else site["scale"]
                total = total + jnp.sum(scale * site["fn"].log_prob(site["value"]))
        if self.sample_flow:
            for name, weights in point.weights.items():
                total = total + self._prior(name).log_prob(weights)
        return -total

    def values(self, x: jax.Array, map: Map, study: Study) -> dict[str, jax.Array]:
        """The values of all sites at x: the unknowns, and what the model records."""
        joint = self.joint
        point = self.point(x, map, study)
        sites = joint.sites(joint.constrain(point.theta), point.weights, point.eta, study)
        unknown = {*joint.roles.population, *joint.roles.effects}
        found = {
            name: site["value"]
            for name, site in sites.items()
            if name in unknown or site["type"] == "deterministic"
        }
        return {**found, **(point.weights if self.sample_flow else {})}


def frame(joint: Joint, laws: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Location μ `[..., effect]` and lower triangular scale L `[..., effect, effect]` of the laws
    of all random effects, with or without a leading axis over subjects.

    Of laws that are not flowme's: mean and SD where they have them, else 0 and 1.
    """
    sites = by_site(joint, laws)
    pieces = [_frame(inner(law), where.stop - where.start) for _, law, where in sites]
    if len(pieces) == 1:
        return pieces[0]
    d, batch = joint.effect_size, jnp.broadcast_shapes(*(x.shape[:-1] for x, _ in pieces))
    location, L = jnp.zeros((*batch, d)), jnp.zeros((*batch, d, d))
    for (_, _, where), (mu, tril) in zip(sites, pieces, strict=True):
        location = location.at[..., where].set(mu)
        L = L.at[..., where, where].set(tril)
    return location, L


def _frame(law: Any, size: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(law, RandomEffect):
        tril = getattr(law, "scale_tril", None)
        tril = jnp.linalg.cholesky(law.covariance_matrix) if tril is None else jnp.asarray(tril)
        # The mean of a flow is a quadrature, and 0 or not needed.
        return jnp.zeros(size) if isinstance(law, FlowRandomEffect) else law.mean, tril
    sd = jnp.sqrt(_moment(law, "variance", 1.0, size))
    return _moment(law, "mean", 0.0, size), sd[..., None] * jnp.eye(size)


def _moment(law: Any, name: str, otherwise: float, size: int) -> jax.Array:
    """A moment of a law, `[..., effect]`; `otherwise` where it has none that is finite."""
    try:
        value = jnp.broadcast_to(getattr(law, name), law.shape())
    except (NotImplementedError, AttributeError):
        value = jnp.full(law.shape(), otherwise)
    usable = jnp.isfinite(value) if name == "mean" else jnp.isfinite(value) & (value > 0)
    return jnp.where(usable, value, otherwise).reshape(*law.batch_shape, size)


def by_site(joint: Joint, laws: list[Any]) -> list[tuple[str, Any, slice]]:
    """Name, law and columns of η of every random effect."""
    found, start = [], 0
    for (name, names), law in zip(joint.roles.effects.items(), laws, strict=True):
        found.append((name, law, slice(start, start + len(names))))
        start += len(names)
    return found


def has_base(joint: Joint, name: str) -> bool:
    """Whether the effect is sampled as a function of N(0, I)."""
    law = joint.roles.laws.get(name)
    return isinstance(law, RandomEffect) and hasattr(law, "from_base")


def inner(law: Any) -> Any:
    """A law of flowme's as it was before the plate made it one per subject."""
    expanded = isinstance(law, dist.ExpandedDistribution)
    return law.base_dist if expanded and isinstance(law.base_dist, RandomEffect) else law


def _log_det_constrain(joint: Joint, theta: jax.Array) -> jax.Array:
    """log |d(parameters on their own scale)/dθ|."""
    total = jnp.zeros(())
    for name, site in joint.roles.population.items():
        to = biject_to(site.support)
        x = theta[joint.slices[name]].reshape(to.inverse_shape(site.shape))
        total = total + jnp.sum(to.log_abs_det_jacobian(x, to(x)))
    return total


# Small matrices, one per subject. Sums of products, which XLA fuses with what stands around them;
# calls of dot and LAPACK would cost more than the rest of a leapfrog step.


def times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector, over leading axes."""
    return jnp.sum(matrix * vector[..., None, :], -1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.sum(left[..., :, :, None] * right[..., None, :, :], -2)


def _expansion(map: Map, t: jax.Array, location: jax.Array, L: jax.Array):
    """r_i and P_i - I."""
    T = _product(L, map.slope)
    turned = jnp.swapaxes(T, -1, -2)
    miss = map.mean - location - times(L, map.offset)
    pull = map.gradient + map.cross @ t + times(map.information, miss)
    return times(turned, pull), _product(turned, _product(map.information, T))


def _conditional(r: jax.Array, data: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u = P⁻¹ r + R⁻ᵀ z with P = I + data = R Rᵀ, and log |du/dz| of all subjects together."""
    d = z.shape[-1]
    if d > 6:  # where written out it would take long to compile
        factor = jnp.linalg.cholesky(jnp.eye(d) + data)
        half = jax.scipy.linalg.solve_triangular(factor, r[..., None], lower=True)
        full = jax.scipy.linalg.solve_triangular(factor, half + z[..., None], lower=True, trans=1)
        return full[..., 0], -jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)))
    R = [[jnp.zeros(())] * d for _ in range(d)]
    y, u = [jnp.zeros(())] * d, [jnp.zeros(())] * d
    for j in range(d):
        for k in range(j):
            R[j][k] = (data[..., j, k] - sum(R[j][i] * R[k][i] for i in range(k))) / R[k][k]
        R[j][j] = jnp.sqrt(1 + data[..., j, j] - sum(R[j][i] ** 2 for i in range(j)))
        y[j] = (r[..., j] - sum(R[j][k] * y[k] for k in range(j))) / R[j][j]
    for j in reversed(range(d)):
        u[j] = (y[j] + z[..., j] - sum(R[k][j] * u[k] for k in range(j + 1, d))) / R[j][j]
    return jnp.stack(u, -1), -sum((jnp.sum(jnp.log(R[j][j])) for j in range(d)), jnp.zeros(()))
