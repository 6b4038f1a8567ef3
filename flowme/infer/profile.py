"""Profile likelihood: how -2 log p(y; θ) rises away from the estimate of one parameter.

With θ_a held at x and all others maximised anew,

    D(x) = -2 max_{θ: θ_a = x} log p(y; θ) + 2 log p(y; θ̂),

the interval {x: D(x) <= 3.84} covers in 95 % of studies (Wilks 1938). It does not depend on the
scale of the parameter, and unlike one by standard errors it need not be symmetric.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from scipy.stats import chi2

from flowme.garbage import set_aside
from flowme.infer.errors import base_support, parameter_names
from flowme.infer.evaluate import CHUNK
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.newton import Newton, NewtonState, newton_of

_MOST = 20  # steps away from the estimate, on each side
_RISE = 0.4  # that each is to add to √D
_CLOSE = 0.003  # how near to the limit D is brought
_FAR = 6.0  # a factor of 400 of a positive parameter
_WAYS = (("below", "down to"), ("above", "up to"))


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """The profile likelihood of one parameter.

    Attributes:
        name: of the parameter.
        unit: its unit.
        estimate: its maximum likelihood estimate.
        value: values of the parameter, increasing, `[point]`.
        minus_two_ll: -2 max log p(y; θ) at each (under `use_priors` with log p(θ)), `[point]`.
        rise: D at each, `[point]`.
        level: confidence level of the interval.
        limit: the D at its ends, 3.84 for 95 %.
        interval: its ends; -inf or inf, or the parameter's bound, where D stays below the limit.
        theta: the maximum at each value, `[point, parameter]`, unconstrained.
        messages: sides on which the interval does not close, points that have not converged.
    """

    name: str
    unit: str
    estimate: float
    value: np.ndarray
    minus_two_ll: np.ndarray
    rise: np.ndarray
    level: float
    limit: float
    interval: tuple[float, float]
    theta: np.ndarray
    messages: tuple[str, ...] = ()


class _Point(NamedTuple):
    state: NewtonState
    converged: bool

    @property
    def theta(self) -> np.ndarray:
        return self.state.theta


@set_aside()
def profile(
    fit: Fit, name: str, *, level: float = 0.95, points: int = 256, chunk: int = CHUNK
) -> Profile:
    """The profile likelihood of a parameter, and its interval.

    The other parameters are maximised by Newton steps with the compiled program of the fit, from
    a line through the two points before. The weights of a flow are held.

    Args:
        fit: a fitted model.
        name: the parameter, as the summary names it: "CL", "omega(CL)".
        level: confidence level of the interval.
        points: importance nodes per subject, where quadrature does not serve.
        chunk: subjects evaluated together.

    Raises:
        ValueError: there is no such parameter, or it cannot be held by itself.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1; got {level}.")
    place = _place(fit.joint, name)
    newton = newton_of(
        fit.joint, fit.theta, fit.weights, fit.study,
        use_priors=fit.use_priors, points=points, chunk=chunk,
    )._replace(held=(place,))  # fmt: skip
    walk = _Walk(newton, fit, place, float(chi2.ppf(level, 1)))
    centre = walk.at(np.asarray(fit.theta), fit.conditional.mean)
    sides = [walk.side(centre, sign) for sign in (-1, 1)]
    return walk.gather(name, level, centre, sides)


class _Walk(NamedTuple):
    """Along one parameter of a fit."""

    newton: Newton
    fit: Fit
    place: int
    limit: float

    def at(self, theta: np.ndarray, modes) -> _Point:
        """The maximum over the other parameters, from θ."""
        fit, key = self.fit, jax.random.key(0)  # one key: the same nodes at all points
        state = self.newton.near(key, theta, fit.weights, fit.study, modes)
        return _Point(*self.newton.finish(key, state, fit.weights, fit.study))

    def rise(self, point: _Point, centre: _Point) -> float:
        return 2 * (centre.state.objective - point.state.objective)

    def side(self, centre: _Point, sign: int) -> tuple[list[_Point], bool]:
        """Points from the estimate outwards, the last one at the limit if it is reached."""
        found, step = [centre], sign * _RISE * self._error()
        while len(found) <= _MOST:
            x = found[-1].theta[self.place] + step
            found.append(self._towards(found, x))
            before, now = (np.sqrt(max(0.0, self.rise(p, centre))) for p in found[-2:])
            if not np.isfinite(now):
                return found[:-1], False
            if now**2 >= self.limit:
                return self._close(found, centre), True
            if self._is_flat(found):
                return found, False
            step *= np.clip(_RISE / max(now - before, 1e-9), 0.3, 1.5)
        return found, False

    def _is_flat(self, found: list[_Point]) -> bool:
        """Whether D has not changed over a stretch of θ_a in which a logarithm goes to a bound."""
        *before, last = found
        far = [p for p in before if abs(p.theta[self.place] - last.theta[self.place]) > _FAR]
        if not far or not _is_bounded(self.fit.joint, self.place):
            return False
        return abs(self.rise(last, far[-1])) < 1e-3

    def _error(self) -> float:
        """A first guess of the standard error of θ_a."""
        covariance, information = self.fit.covariance(), self.fit.information
        if covariance is not None:
            return min(2.0, float(np.sqrt(covariance[self.place, self.place])))
        if information is not None and information[self.place, self.place] > 0.25:
            return float(information[self.place, self.place] ** -0.5)
        return 0.3

    def _towards(self, found: list[_Point], x: float) -> _Point:
        """The point at θ_a = x, from the line through the last two."""
        last = found[-1]
        theta, a = last.theta.copy(), self.place
        if len(found) > 1 and last.converged:
            before = found[-2].theta
            theta += (last.theta - before) * (x - last.theta[a]) / (last.theta[a] - before[a])
        theta[a] = x
        matrix = self.newton.engine.references.matrix(self.fit.joint)
        modes = last.state.evaluation.conditional.mean - matrix @ (theta - last.theta)
        return self.at(theta, modes)

    def _close(self, found: list[_Point], centre: _Point) -> list[_Point]:
        """Brings the last point to where D is at the limit, by secants of √D."""
        *inside, outside = found
        for _ in range(8):
            roots = [np.sqrt(max(0.0, self.rise(p, centre))) for p in (inside[-1], outside)]
            share = (np.sqrt(self.limit) - roots[0]) / (roots[1] - roots[0])
            ends = inside[-1].theta[self.place], outside.theta[self.place]
            new = self._towards([*inside[-2:]], ends[0] + share * (ends[1] - ends[0]))
            if abs(self.rise(new, centre) - self.limit) < _CLOSE:
                return [*inside, new]
            if self.rise(new, centre) < self.limit:
                inside = [*inside, new]
            else:
                outside = new
        return [*inside, outside]

    def gather(self, name, level, centre, sides) -> Profile:
        """The points in order, and the interval."""
        joint, messages = self.fit.joint, []
        low, high = (side for side, _ in sides)
        points = [*low[:0:-1], *high]
        theta = np.array([p.theta for p in points])
        objective = np.array([p.state.objective for p in points])
        ends = []
        for (found, closed), (side, way), sign in zip(sides, _WAYS, (-1, 1), strict=True):
            end = _value(joint, found[-1].theta, self.place)
            ends.append(end if closed else _bound(joint, centre.theta, self.place, sign))
            if not closed:
                messages.append(
                    f"the interval of {name} is open {side}: {way} {end:.3g} -2LL rises by "
                    f"{self.rise(found[-1], centre):.2f} only, not {self.limit:.2f}. The study "
                    "does not bound it on this side."
                )
        rise = 2 * (centre.state.objective - objective)
        if (most := float(rise.min())) < -0.01:
            best = _value(joint, theta[np.argmin(rise)], self.place)
            messages.append(
                f"-2LL is lower by {-most:.2f} at {name} = {best:.3g}: the fit is not at the "
                "maximum. Start it again from there."
            )
        if failed := sum(not p.converged for p in points):
            messages.append(f"{failed} of {len(points)} points have not converged.")
        return Profile(
            name, _site(joint, self.place)[1].unit, _value(joint, centre.theta, self.place),
            np.array([_value(joint, t, self.place) for t in theta]), -2 * objective, rise, level,
            self.limit, (ends[0], ends[1]), theta, tuple(messages),
        )  # fmt: skip


# Where a parameter stands in θ, and its value.


def _site(joint: Joint, place: int):
    name = next(n for n, where in joint.slices.items() if where.start <= place < where.stop)
    return name, joint.roles.population[name]


def _value(joint: Joint, theta: np.ndarray, place: int) -> float:
    """The parameter on its own scale."""
    name, site = _site(joint, place)
    if base_support(site.support) is constraints.corr_cholesky:
        return float(np.tanh(theta[place]))
    if not _is_bounded(joint, place):
        return float(theta[place])
    values = np.ravel(joint.constrain(jnp.asarray(theta))[name])
    return float(values[place - joint.slices[name].start])


def _bound(joint: Joint, theta: np.ndarray, place: int, sign: int) -> float:
    """Where the support of the parameter ends."""
    if not _is_bounded(joint, place):
        return sign * np.inf
    end = theta.copy()
    end[place] = sign * 700.0
    value = _value(joint, end, place)
    return 0.0 if abs(value) < 1e-12 else sign * np.inf if abs(value) > 1e100 else value


def _is_bounded(joint: Joint, place: int) -> bool:
    return base_support(_site(joint, place)[1].support) is not constraints.real


def _place(joint: Joint, name: str) -> int:
    """The place in θ of a parameter that can be held by itself."""
    names = parameter_names(joint)
    scalars = {n: joint.slices[n].start for n, s in joint.roles.population.items() if not s.shape}
    if name not in names and name not in scalars:
        raise ValueError(f"expected a parameter among {list(names)}; got {name!r}.")
    place = names.index(name) if name in names else scalars[name]
    site_name, site = _site(joint, place)
    effects = joint.roles.components(site.effect)
    where = joint.slices[site_name]
    if base_support(site.support) is constraints.corr_cholesky:
        alone = len(site.shape) == 2 and name.split("(")[-1].startswith(f"{effects[0]},")
    else:
        alone = where.stop - where.start == int(np.prod(site.shape))
    if not alone:
        raise ValueError(
            f"expected a parameter that can be held by itself; got {name!r}, which depends on "
            "others of its site. Of correlations those with the first effect can be held: name "
            "the effects in another order."
        )
    return place
