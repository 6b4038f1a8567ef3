"""Numbers by NumPy are those of the JAX programs that they stand in for."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.distributions import biject_to, constraints

import flowme as fm
from flowme import plain, roles
from flowme.infer import joint

LAWS = [
    dist.Normal(0.3, 2.0),
    dist.LogNormal(np.array([0.2, 1.0]), 0.4),
    dist.HalfNormal(3.0),
    dist.HalfCauchy(2.0),
    dist.Exponential(0.3),
    dist.Uniform(1, 4),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_medians(law):
    np.testing.assert_allclose(plain.median(law), roles._median(law), 1e-14)
    np.testing.assert_allclose(law.cdf(plain.median(law)), 0.5, 1e-14)
    wide = law.expand((3, *law.batch_shape)).to_event(1)
    assert plain.median(wide).shape == wide.shape()
    assert (plain.median(wide) == plain.median(law)).all()


def test_no_median_of_what_is_not_known():
    assert plain.median(dist.Beta(2.0, 8.0)) is None
    seen = []
    jax.jit(lambda x: seen.append(plain.median(dist.Normal(x, 1.0))))(0.3)
    jax.jit(lambda n: seen.append(plain.outside(dist.Binomial(n, 0.3), np.ones(2))))(3)
    assert seen == [None, None]


@pytest.mark.parametrize(
    ("law", "inside"),
    [
        (dist.Normal(0.0, 1.0), [-1.0, 0.5, 3.0, 12.0]),
        (dist.LogNormal(0.0, 1.0), [0.5, 3.0, 12.0, np.inf]),
        (dist.Poisson(3.0), [3.0, 12.0]),
        (dist.Binomial(np.array([3, 3, 3, 3, 5, 3]), 0.4), [3.0]),
        (dist.Bernoulli(0.4), []),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values_outside_a_support(law, inside):
    values = np.array([-1.0, 0.5, 3.0, 12.0, np.nan, np.inf])
    found = plain.outside(law, values)
    assert found.shape == values.shape
    assert values[~found].tolist() == inside
    np.testing.assert_array_equal(found, ~np.asarray(law.support(jnp.asarray(values))))


@pytest.mark.parametrize(
    ("support", "value"),
    [
        (constraints.real, np.array([-1.0, 2.0])),
        (constraints.real_vector, np.array([-1.0, 2.0])),
        (constraints.positive, np.array(2.5)),
        (constraints.nonnegative, np.array([[2.5, 1e-9]])),
        (constraints.independent(constraints.positive, 1), np.array([2.5, 0.1])),
        (constraints.unit_interval, np.array(0.2)),
    ],
    ids=str,
)
def test_where_a_parameter_is_not_constrained(support, value):
    found = plain.unconstrained(support, value)
    np.testing.assert_allclose(found, np.ravel(biject_to(support).inv(value)), 1e-14)
    if support not in (constraints.real, constraints.real_vector):
        wrong = value.copy()
        wrong.flat[0] = -1.0
        assert np.isnan(plain.unconstrained(support, wrong)).all()


def test_what_numpy_does_not_know():
    assert plain.unconstrained(constraints.corr_cholesky, np.eye(2)) is None
    assert plain.unconstrained(constraints.interval(1.0, 3.0), np.array(2.0)) is None


def test_both_ways_start_in_the_same_place(monkeypatch):
    def model(study):
        a = fm.population("a", dist.LogNormal(0.3, 1.0))
        b = fm.population("b", dist.Normal(0.0, 1.0))
        law = fm.GaussianRandomEffect(["a"], omega=0.4)
        eta = fm.random_effect("eta", law, study.subjects)
        psi = fm.individual(study.subjects, a=a * jnp.exp(eta.a))
        rate = psi.a[:, None] + jnp.exp(b) * study.time
        fm.observe("count", dist.Poisson(rate), study)

    frame = {"ID": [1, 1, 1], "TIME": [1.0, 2.0, 3.0], "DV": [1.0, 0.0, 4.0]}
    study = fm.Study.from_frame(pd.DataFrame(frame), outcome={"count": "DV"})
    asked = []
    monkeypatch.setattr(roles, "_inspect", lambda *x: asked.append(x))
    found = joint.Joint.of(model, study)
    theta = found.unconstrain({})
    assert not asked
    monkeypatch.undo()
    monkeypatch.setattr(plain, "median", lambda law: None)
    monkeypatch.setattr(plain, "unconstrained", lambda support, value: None)
    np.testing.assert_allclose(joint.Joint.of(model, study).unconstrain({}), theta, 1e-14)
    frame["DV"] = [1.0, -2.0, 4.0]
    wrong = fm.Study.from_frame(pd.DataFrame(frame), outcome={"count": "DV"})
    for _ in range(2):
        with pytest.raises(ValueError, match="got -2 for subject 1 at time 2"):
            joint.Joint.of(model, wrong)
        monkeypatch.undo()


@pytest.fixture
def single_precision():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def test_in_single_precision_numbers_are_those_of_jax(single_precision):
    law = dist.TruncatedNormal(0.0, 1.0, low=np.float32(0.1), high=3.0)
    assert plain.outside(law, np.array([0.1, 0.05, 3.0])).tolist() == [False, True, False]
    assert plain.outside(dist.Exponential(1.0), np.array([1e-50, 1e-9])).tolist() == [True, False]
    assert np.isnan(plain.unconstrained(constraints.positive, np.array(1e-60)))
    assert plain.median(dist.LogNormal(0.3, 1.0)) == pytest.approx(np.exp(0.3))


class Above(constraints.Constraint):
    """A support that JAX does not look into."""

    def __init__(self, low):
        self.low = low

    def __call__(self, x):
        return x > self.low


class Powered(dist.Distribution):
    """A normal law with fields that are no arrays, and of which it makes up its mind."""

    arg_constraints = {"loc": constraints.real, "power": constraints.positive_integer}
    pytree_data_fields = ("loc", "power", "flag")
    pytree_aux_fields = ("knots",)

    def __init__(self, loc):
        self.loc, self.power, self.flag, self.knots = loc, 1, True, np.arange(3.0)
        super().__init__(jnp.shape(loc), validate_args=False)

    @property
    def support(self):
        return Above(self.loc - 100.0)

    def log_prob(self, value):
        scale = 0.1
        for _ in range(self.power):
            scale = scale * 1.0 if self.flag else 1.0
        return dist.Normal(self.loc, scale * self.knots[1]).log_prob(value)


def curve(law):
    def model(study):
        a = fm.population("a", dist.LogNormal(0.3, 1.0))
        eta = fm.random_effect("eta", fm.GaussianRandomEffect(["a"], omega=0.4), study.subjects)
        psi = fm.individual(study.subjects, a=a * jnp.exp(eta.a))
        fm.observe("y", law(psi.a[:, None] * jnp.exp(-0.3 * study.time)), study)

    return model


def curves():
    rng = np.random.default_rng(0)
    time = np.tile([1.0, 2.0, 4.0], 12)
    a = np.repeat(np.exp(0.4 * rng.normal(size=12)), 3)
    y = a * np.exp(-0.3 * time) + 0.1 * rng.normal(size=36)
    return pd.DataFrame({"ID": np.repeat(np.arange(12), 3), "TIME": time, "DV": y})


def test_laws_whose_fields_are_no_arrays_and_supports_of_users():
    study = fm.Study.from_frame(curves(), outcome={"y": "DV"})
    fits = [
        fm.VariationalEM(curve(law), starts=1).run(jax.random.key(0), study, progress=False)
        for law in (Powered, lambda f: dist.Normal(f, 0.1))
    ]
    assert fits[0].minus_two_ll == pytest.approx(fits[1].minus_two_ll, abs=1e-9)
    frame = curves()
    frame.loc[4, "DV"] = -1000.0
    with pytest.raises(ValueError, match="their law, Powered; got -1000 for subject 1 at time 2"):
        joint.Joint.of(curve(Powered), fm.Study.from_frame(frame, outcome={"y": "DV"}))


def first_impossible(f, b, time):
    g = jnp.where(time == 1.0, 0.0, f)
    return dist.Normal(g, b * g)


def last_impossible(f, b, time):
    g = jnp.where(time == 4.0, 0.0, f)
    return dist.Normal(g, b * g)


def far_bound(f, b, time):
    return dist.TruncatedNormal(30.0 + f, b, low=30.0)


@pytest.mark.parametrize("law", [first_impossible, last_impossible, far_bound])
def test_an_outcome_that_nobody_of_a_chunk_has(law):
    """Its law may be impossible wherever one looks: -2LL is that of all subjects together."""

    def model(study):
        a = fm.population("a", dist.LogNormal(0.3, 1.0))
        b = fm.population("b", dist.HalfNormal(0.5))
        effect = fm.GaussianRandomEffect(["a"], omega=0.4)
        eta = fm.random_effect("eta", effect, study.subjects)
        psi = fm.individual(study.subjects, a=a * jnp.exp(eta.a))
        f = psi.a[:, None] * jnp.exp(-0.3 * study.time)
        fm.observe("y", dist.Normal(f, b), study)
        fm.observe("z", law(f, b, study.time), study)

    frame = curves()
    seen = (frame["ID"] < 4) & (frame["TIME"] == 2.0)
    frame["Z"] = np.where(seen, frame["DV"] + 30.0 * (law is far_bound), np.nan)
    study = fm.Study.from_frame(frame, outcome={"y": "DV", "z": "Z"})
    found = [
        fm.VariationalEM(model, starts=1, chunk=chunk).run(jax.random.key(0), study, progress=False)
        for chunk in (4, 256)
    ]
    nobody = jax.tree.map(lambda x: x[4:8], study)
    within = found[1].joint
    theta, eta = jnp.asarray(found[1].theta), 0.3 * jnp.ones((4, 1))

    def likelihood(theta, eta, names):
        one = joint.Joint(model, within.roles._replace(outcomes=names))
        return one.likelihood(one.constrain(theta), {}, eta, nobody).sum()

    both, alone = (
        jax.value_and_grad(likelihood, (0, 1))(theta, eta, names) for names in (("y", "z"), ("y",))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12), both, alone)
    assert all(fit.converged for fit in found)
    assert found[0].minus_two_ll == pytest.approx(found[1].minus_two_ll, abs=1e-3)
    np.testing.assert_allclose(found[0].theta, found[1].theta, atol=1e-3)


def test_a_law_without_real_parameters_is_refused():
    def model(study):
        curve(lambda f: dist.DiscreteUniform(jnp.zeros(f.shape, int), 10))(study)

    frame = curves()
    frame["DV"] = 3.0
    study = fm.Study.from_frame(frame, outcome={"y": "DV"})
    with pytest.raises(ValueError, match="a parameter that is a real number; got 'y' without"):
        fm.VariationalEM(model, starts=1).run(jax.random.key(0), study, progress=False)


def test_where_to_start_is_asked_for():
    study = fm.Study.from_frame(curves(), outcome={"y": "DV"})

    def model(study):
        b = fm.population("b", dist.ImproperUniform(constraints.positive, (), ()))
        curve(lambda f: dist.Normal(f, b))(study)

    with pytest.raises(ValueError, match=r"prior of 'b'.*got ImproperUniform.*init="):
        joint.Joint.of(model, study)
    found = joint.Joint.of(curve(lambda f: dist.Normal(f, 0.1)), study)
    for value in (np.inf, 0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="'a' of shape .* strictly within its support"):
            found.unconstrain({"a": value})
