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
