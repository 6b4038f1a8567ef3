"""Models in closed form: right through every singularity, never overflowing, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dosing import Psi, by_parameter, dose, dosed_into, record, study_of

from flowme.closed_forms import oral_one_compartment


def by_quadrature(psi, study):
    """C = sum of D ka / V int_0^tau exp(-k s - ka (tau - s)) ds, which has no singularity."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    nodes, weights = (nodes + 1) / 2, weights / 2
    tau = jnp.maximum(study.time[:, :, None] - study.doses.time[:, None, :], 0)[..., None]
    k, ka = (x[:, None, None, None] for x in (psi.CL / psi.V, psi.ka))
    integral = (weights * tau * jnp.exp(-tau * (k * nodes + ka * (1 - nodes)))).sum(-1)
    amount = (study.doses.amount * study.doses.given)[:, None, :]
    return ((psi.ka / psi.V)[:, None, None] * amount * integral).sum(-1)


ORDERS = {
    "value": lambda f: f,
    "Jacobian": jax.jacfwd,
    "Hessian": lambda f: jax.jacfwd(jax.jacrev(f)),
}


def oral_subjects(ka, k):
    """One subject with repeated doses for each pair of rates, 1/h."""
    rows = [dose(0.0), record(1.0), dose(6.0, 50.0), record(7.0), dose(12.0), record(20.0)]
    study = study_of({i: rows for i in range(len(k))})
    return Psi(ka=jnp.asarray(ka), V=jnp.full(len(k), 20.0), CL=20.0 * jnp.asarray(k)), study


@pytest.mark.parametrize("order", ORDERS)
def test_closed_form_is_smooth_through_ka_equal_to_k(order):
    ratio = np.asarray([0.3, 1 - 1e-4, 1 - 1e-9, 1.0, 1 + 1e-12, 1 + 1e-5, 1.4, 5.0])
    psi, study = oral_subjects(0.1 * ratio, np.full(len(ratio), 0.1))
    expected = by_parameter(by_quadrature, psi, study, ORDERS[order])
    actual = by_parameter(oral_one_compartment, psi, study, ORDERS[order])
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_closed_form_never_overflows(order):
    rates = np.asarray([1e-30, 1e-3, 1.0, 1e3, 1e8])
    ka, k = (x.ravel() for x in np.meshgrid(rates, rates))
    derivative = by_parameter(oral_one_compartment, *oral_subjects(ka, k), ORDERS[order])
    assert np.isfinite(derivative).all()


def test_closed_form_predicts_nan_for_an_infusion_it_cannot_see():
    study = study_of({"a": [dose(0.0), record(1.0)], "b": [dose(0.0, rate=10.0), record(1.0)]})
    psi = Psi(ka=jnp.full(2, 1.3), V=jnp.full(2, 20.0), CL=jnp.full(2, 2.0))
    conc = jax.jit(oral_one_compartment)(psi, study)
    assert np.isfinite(conc[0]).all() and np.isnan(conc[1]).all()


BAD = {
    "psi of one value for all": (
        lambda psi, study: oral_one_compartment(psi._replace(V=1.0), study),
        r"shape \[subject\] = \(2,\); got \(\) for 'V'",
    ),
    "dose into a peripheral compartment": (
        lambda psi, study: oral_one_compartment(psi, dosed_into(3)),
        r"compartment 1 and 2 only; got a dose into compartment 3 \(row 0, subject 'a'\)",
    ),
    "infusion": (
        lambda psi, study: oral_one_compartment(
            psi, study_of({"a": [dose(0.0), record(1.0)], "b": [dose(0.0, rate=9.0), record(1.0)]})
        ),
        r"got an infusion for subject 'b'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_advice(name):
    call, words = BAD[name]
    study = study_of({name: [dose(0.0), record(1.0)] for name in "ab"})
    with pytest.raises(ValueError, match=words):
        call(Psi(*jnp.ones((3, 2))), study)
