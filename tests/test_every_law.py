"""Every feature with every law of the random effects in every engine.

`features.CASES` has the models, `features.LAWS` the laws that each is given. Of all of them the
likelihood p(y | η; θ) is that of the Gaussian model, compiled once, so that every check here sets
an engine beside that function, the law's own draws or density, and nothing else of flowme.
"""

import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from features import CASES, LAWS, at_gaussian, away, study_of, with_law
from numpyro.distributions import biject_to
from scipy import stats
from scipy.special import logsumexp

import flowme as fm
from flowme.infer import nuts as nuts_module
from flowme.infer.joint import Joint, start_weights
from flowme.infer.marginal import MarginalLikelihood, estimate_marginal

everywhere = pytest.mark.parametrize(("case", "law"), LAWS, ids=map(", ".join, LAWS))
SD = 0.4
# As rarely exceeded as 4.5 of a normal law, by an error that is estimated from 16 replicates.
ERRORS = stats.t.isf(3.4e-6, 15)
CHUNK = 128


@cache
def joint_of(case, law) -> Joint:
    return Joint.of(with_law(case, law), study_of(case))


@cache
def _likelihood(case):
    """log p(y_i | η_i; θ) `[point, subject]` at points (θ of the Gaussian model, η)."""
    joint, study = joint_of(case, "gaussian"), study_of(case)

    @jax.jit
    def program(theta, eta):
        return jax.vmap(lambda t, e: joint.likelihood(joint.constrain(t), {}, e, study))(theta, eta)

    return program


def likelihood(case, values, eta):
    """log p(y_i | η_i) `[point, subject]` of values by name, `[point, ...]`, and of η."""
    joint, count = joint_of(case, "gaussian"), len(eta)
    common = [n for n, site in joint.roles.population.items() if not site.effect]
    start = jnp.broadcast_to(joint.unconstrain({}), (count, joint.size))
    own = jax.vmap(lambda v: _unconstrained(joint, v))({n: values[n] for n in common})
    theta = start.at[:, : own.shape[1]].set(own)
    pad = [(0, -count % CHUNK)]
    theta = np.pad(theta, [*pad, (0, 0)], mode="edge").reshape(-1, CHUNK, joint.size)
    eta = np.pad(eta, [*pad, (0, 0), (0, 0)], mode="edge").reshape(-1, CHUNK, *eta.shape[1:])
    found = [_likelihood(case)(*part) for part in zip(theta, eta, strict=True)]
    return np.concatenate(found)[:count]


def _unconstrained(joint, values):
    """The elements of θ of the parameters outside of laws, which stand first."""
    parts = [biject_to(joint.roles.population[n].support).inv(v) for n, v in values.items()]
    return jnp.concatenate([jnp.ravel(part) for part in parts])


@cache
def marginal(case, law, where) -> MarginalLikelihood:
    """log p(y_i) by importance sampling: `where` the laws are Gaussian, or none is, or at the
    start of the fits."""
    joint, study = joint_of(case, law), study_of(case)
    values, weights = _place(case, law, where)
    key = jax.random.key(len(law) + len(where))
    return estimate_marginal(key, joint, joint.unconstrain(values), weights, study, **SHORT)


SHORT = {"points": 32, "replicates": 16}


def _place(case, law, where):
    joint = joint_of(case, law)
    if where == "away":
        values, weights = away(joint)
        return {**CASES[case].vague, **values}, weights
    values = at_gaussian(joint, SD) if where == "gaussian" else CASES[case].start
    return values, start_weights(joint)


@everywhere
def test_a_law_at_the_gaussian_has_its_marginal_likelihood(case, law):
    found, expected = (marginal(case, name, "gaussian") for name in (law, "gaussian"))
    error = np.hypot(found.standard_error, expected.standard_error)
    assert np.all(np.abs(found.log_likelihood - expected.log_likelihood) < ERRORS * error + 1e-5)
    assert np.max(error) < 0.2


@everywhere
def test_the_marginal_likelihood_is_the_mean_over_draws_of_the_law(case, law):
    """log of the average of p(y_i | η) over draws of η, within Monte-Carlo errors of both."""
    joint, study, count = joint_of(case, law), study_of(case), CASES[case].draws
    values, weights = _place(case, law, "away")
    theta = joint.unconstrain(values)
    draw = jax.jit(partial(joint.sample_effects, study=study, count=count))
    eta = np.asarray(draw(jax.random.key(5), theta, weights))
    constrained = {
        n: np.broadcast_to(v, (count, *v.shape)) for n, v in joint.constrain(theta).items()
    }
    terms = likelihood(case, constrained, eta)
    terms = np.where(np.isnan(terms), -np.inf, terms)  # a clearance at which nothing is left
    mean = logsumexp(terms, axis=0) - np.log(count)
    found = marginal(case, law, "away")
    own = np.std(np.exp(terms - mean), axis=0) / np.sqrt(count)
    error = np.hypot(own, found.standard_error)
    assert np.all(np.abs(found.log_likelihood - mean) < ERRORS * error)
    assert np.max(error) < 0.2


# Fits ---------------------------------------------------------------------------------------------


@cache
def fit_of(case, law) -> fm.Fit:
    """A short fit from off the maximum; flows are learned, whatever held-out subjects say."""
    vem = fm.VariationalEM(
        with_law(case, law), starts=1, points=64, flow_updates=5, folds=0, tolerance=0.02,
        max_iterations=8,
    )  # fmt: skip
    return vem.run(jax.random.key(0), study_of(case), init=CASES[case].start, progress=False)


@everywhere
def test_a_fit_climbs_and_says_where_it_is(case, law):
    fit = fit_of(case, law)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heavy weights of a few points
        found = fm.marginal_log_likelihood(jax.random.key(1), fit, **SHORT)
    start = marginal(case, law, "start")
    assert found.total - start.total > 4.5 * np.hypot(found.total_se, start.total_se)
    error = np.hypot(fit.minus_two_ll_se, 2 * found.total_se)
    assert abs(fit.minus_two_ll + 2 * found.total) < ERRORS * error + 1e-4
    assert np.all(np.isfinite(fit.theta)) and np.isfinite(fit.minus_two_ll)
    errors = fit.standard_errors()
    if errors is None:
        assert any("information matrix is not positive definite" in m for m in fit.messages)
    else:
        assert all(np.all(np.isfinite(e)) for e in errors.values())
    assert bool(fit.weights) == ("flow" in law)
    assert all(np.any(w != 0) for w in fit.weights.values())


# NUTS ---------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A few draws: the run, its coordinates, the map of these, and x `[draw, ...]`."""

    run: Any
    coordinates: Any
    map: Any
    x: np.ndarray


def draws_of(case, law) -> Drawn:
    """Of 100 iterations, two blocks: the last draw is then the last state."""
    kept = []
    values = nuts_module._values

    def keeping(coordinates, x, map, study):
        kept.append((coordinates, map, np.asarray(x[0])))
        return values(coordinates, x, map, study)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(nuts_module, "_values", keeping)
        warnings.simplefilter("ignore")  # that it is short
        run = fm.nuts(
            with_law(case, law), study_of(case), jax.random.key(2), fit=fit_of(case, law),
            num_warmup=70, num_samples=30, num_chains=1, progress=False,
        )  # fmt: skip
    return Drawn(run, *kept[0])


def density(case, law, drawn):
    """x -> log p(y, η, θ) of the model plus log |d(θ, η)/dx|, `[point]`."""
    joint, study = joint_of(case, law), study_of(case)
    priors = joint.priors(study)

    def unknowns(x):
        point = drawn.coordinates.point(x, drawn.map, study)
        return jnp.concatenate([point.theta, point.eta.ravel()])

    @jax.jit
    def rest(x):
        point = drawn.coordinates.point(x, drawn.map, study)
        values = joint.constrain(point.theta)
        total = jnp.sum(joint.effect_density(values, drawn.map.weights, point.eta, study))
        for name, prior in priors.items():
            to = biject_to(prior.support)
            part = point.theta[joint.slices[name]].reshape(to.inverse_shape(prior.shape()))
            total += jnp.sum(prior.log_prob(values[name]))
            total += jnp.sum(to.log_abs_det_jacobian(part, values[name]))
        return total + jnp.linalg.slogdet(jax.jacfwd(unknowns)(x))[1], values, point.eta

    def log_density(points):
        others, values, eta = jax.tree.map(lambda *x: np.stack(x), *map(rest, points))
        return others + likelihood(case, values, eta).sum(1)

    return log_density


@everywhere
def test_nuts_draws_from_the_density_of_the_model(case, law):
    """The potential at its draws is the model's, the slope that it followed is that of the
    potential by differences, and no draw is NaN."""
    drawn = draws_of(case, law)
    log_density = density(case, law, drawn)
    fields, last = drawn.run.get_extra_fields(), drawn.run._last_state
    some = [0, 10, -1]
    np.testing.assert_allclose(
        -np.asarray(fields["potential_energy"])[some], log_density(drawn.x[some]), rtol=1e-7
    )
    h, x = 1e-4, drawn.x[-1]
    ways = np.random.default_rng(0).normal(size=(3, x.size))
    rise = [np.diff(log_density(np.stack([x - h * v, x + h * v])))[0] / (2 * h) for v in ways]
    slope = np.asarray(last.z_grad)[0]
    np.testing.assert_allclose(-ways @ slope, rise, rtol=1e-3, atol=1e-3)
    assert all(np.all(np.isfinite(v)) for v in drawn.run.get_samples().values())
    assert len(np.unique(drawn.x[:, 0])) > 3


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "error", "message"),
    [
        (
            dist.Normal(0.0, 0.4).expand([1]).to_event(1),
            TypeError,
            "expected one of flowme's distributions for random effect 'kappa' between occasions",
        ),
        (
            fm.FlowRandomEffect(["CL"], context=np.zeros((5, 1))),
            ValueError,
            "expected one law for random effect 'kappa' between occasions; got batch shape .5.",
        ),
    ],
    ids=["plain", "conditional flow"],
)
def test_between_occasions_there_is_one_law_of_flowme(law, error, message):
    with pytest.raises(error, match=message):
        Joint.of(fm.replace_effect(CASES["occasions"].model, kappa=law), study_of("occasions"))
