"""Every regimen: closed forms, ODEs and the matrix exponential are one another, and LSODA."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dosing import dosed_into
from regimens import CASES, ORAL, VEIN, by_lsoda, give, seen, study_of

from flowme import closed_forms
from flowme.linear import solve_linear
from flowme.structural import solve

NONLINEAR = {
    "saturable, additional": [give(0.0, more=3, every=6.0), *seen(0.2, 1.0, 7.0, 30.0)],
    "saturable, steady state": [give(0.0, ss=1, every=8.0), *seen(0.1, 3.0, 20.0)],
    "saturable, rate": [give(0.0, into=2, rate=25.0), *seen(2.0, 2.9, 12.0)],
    "no steady state": [give(0.0, 500.0, ss=1, every=8.0), *seen(0.1, 3.0, 20.0)],
}
ALL = CASES | NONLINEAR  # one study, hence one program of the ODE
NAMES = tuple(ALL)
INTO_VEIN = np.asarray([name in VEIN or name == "saturable, rate" for name in NAMES])
LAG, PART = 0.3, 0.7


class Psi(NamedTuple):
    """Elimination at CL / V / (1 + s A), which is linear for s = 0."""

    ka: Any
    CL: Any
    V: Any
    s: Any
    lag: Any
    F: Any


class Psi3(NamedTuple):
    ka: Any
    CL: Any
    V1: Any
    Q2: Any
    V2: Any
    Q3: Any
    V3: Any
    lag: Any
    F: Any


PSI3 = dict(ka=1.1, CL=2.0, V1=10.0, Q2=3.0, V2=15.0, Q3=4.0, V3=10.0, lag=LAG, F=PART)


def psi_of(kind, study, **values):
    return kind(*(jnp.full(study.subjects.size, values[name]) for name in kind._fields))


@pytest.fixture(scope="module")
def study():
    """The oral subjects, those of the vein, and those whose elimination saturates."""
    return study_of(ALL)


@pytest.fixture(scope="module")
def psi(study):
    psi = psi_of(Psi, study, ka=1.1, CL=2.0, V=10.0, s=0.0, lag=LAG, F=PART)
    some = jnp.asarray([name in NONLINEAR for name in NAMES])
    return psi._replace(CL=jnp.where(some, 8.0, psi.CL), s=jnp.where(some, 0.04, psi.s))


def dosing(psi):
    """The lag and F of a closed form: of what is swallowed, or else of what is injected."""
    lag = {1: psi.lag, 2: jnp.where(INTO_VEIN, psi.lag, 0)}
    return dict(lag=lag, bioavailability={1: psi.F, 2: jnp.where(INTO_VEIN, psi.F, 1)})


def saturable(t, amount, psi):
    gut, central = amount
    return jnp.stack(
        [-psi.ka * gut, psi.ka * gut - psi.CL / psi.V * central / (1 + psi.s * central)]
    )


def by_ode(psi, study):
    return solve(saturable, psi, study, **dosing(psi))[..., 1]


def by_exponential(psi, study):
    def matrix(psi):
        return [[-psi.ka, 0], [psi.ka, -psi.CL / psi.V]]

    return solve_linear(matrix, psi, study, **dosing(psi))[..., 1]


def by_closed_form(model, psi, study):
    """The oral form of the oral subjects, the iv form, with its compartment 1, of the others."""
    oral, iv = (getattr(closed_forms, f"{way}_{model}_compartment") for way in ("oral", "iv"))
    doses = study.doses
    central = replace(doses, compartment=jnp.where(doses.compartment == 2, 1, doses.compartment))
    central = replace(study, doses=central, compartments=(1,))
    return jnp.where(INTO_VEIN[:, None], iv(psi, central), oral(psi, study))


@partial(jax.jit, static_argnums=0)
def with_jacobian(model, psi, study):
    """Amount [subject, time], and by the logarithms of psi, [subject, time, parameter]."""

    def twice(delta):
        value = model(type(psi)(*(x * jnp.exp(d) for x, d in zip(psi, delta, strict=True))), study)
        return value, value

    jacobian, value = jax.jacfwd(twice, has_aux=True)(jnp.zeros(len(psi)))
    return value, jacobian


def one_compartment(psi, study):
    return by_closed_form("one", psi, study) * psi.V[:, None]


three_compartments = jax.jit(partial(by_closed_form, "three"))
NUMERICAL = {"ODE": by_ode, "matrix exponential": by_exponential}
TOLERANCE = {"ODE": (1e-6, 1e-5), "matrix exponential": (1e-12, 1e-11)}


@pytest.mark.parametrize("method", NUMERICAL)
def test_every_regimen_is_the_closed_form(study, psi, method):
    expected, expected_jacobian = with_jacobian(one_compartment, psi, study)
    value, jacobian = with_jacobian(NUMERICAL[method], psi, study)
    of_value, of_gradient = TOLERANCE[method]
    for i, name in enumerate(CASES):
        size = np.abs(expected[i]).max()
        np.testing.assert_allclose(
            value[i], expected[i], rtol=of_value, atol=1e-9 * size, err_msg=name
        )
        size = np.abs(expected_jacobian[i]).max()
        np.testing.assert_allclose(
            jacobian[i], expected_jacobian[i], of_gradient, 1e-7 * size, err_msg=name
        )


@pytest.mark.parametrize("method", NUMERICAL)
def test_without_delay_doses_act_in_the_order_of_the_table(study, psi, method):
    """The events that are sorted inside jit are those of the table where nothing is delayed."""
    psi = psi._replace(lag=0 * psi.lag, F=psi.F / psi.F)
    expected, _ = with_jacobian(one_compartment, psi, study)
    value, _ = with_jacobian(NUMERICAL[method], psi, study)
    linear = len(CASES)
    np.testing.assert_allclose(value[:linear], expected[:linear], rtol=1e-6, atol=1e-8)


# SciPy -------------------------------------------------------------------------------------------


def three(p):
    """The right-hand side of three compartments and a gut."""
    k12, k21, k13, k31 = p["Q2"] / p["V1"], p["Q2"] / p["V2"], p["Q3"] / p["V1"], p["Q3"] / p["V3"]
    out = p["CL"] / p["V1"] + k12 + k13
    matrix = [[-p["ka"], 0, 0, 0], [p["ka"], -out, k21, k31], [0, k12, -k21, 0], [0, k13, 0, -k31]]
    return lambda t, amount: np.asarray(matrix) @ amount


@pytest.fixture(scope="module")
def conc_of_three(study):
    return three_compartments(psi_of(Psi3, study, **PSI3), study)


@pytest.mark.parametrize("name", CASES)
def test_three_compartments_are_lsoda(conc_of_three, name):
    route, rows = (1 if name in ORAL else 2), CASES[name]
    amount = by_lsoda(three(PSI3), rows, 4, {route: LAG}, {route: PART})
    expected = amount[:, 1] / PSI3["V1"]
    size = expected.max()
    actual = conc_of_three[NAMES.index(name), : len(rows)]
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9 * size)


@pytest.mark.parametrize("name", list(NONLINEAR)[:3])
def test_nonlinear_system_is_lsoda_and_its_gradient_finite_differences(study, psi, name):
    i, rows = NAMES.index(name), NONLINEAR[name]
    value, jacobian = (x[i, : len(rows)] for x in with_jacobian(by_ode, psi, study))
    own = Psi(*(float(x[i]) for x in psi))

    def rhs(t, y):
        gone = own.CL / own.V * y[1] / (1 + own.s * y[1])
        return np.asarray([-own.ka * y[0], own.ka * y[0] - gone])

    def amount(lag, part):
        places = dict.fromkeys((1, 2), lag), dict.fromkeys((1, 2), part)
        return by_lsoda(rhs, rows, 2, *places)[:, 1]

    np.testing.assert_allclose(value, amount(LAG, PART), rtol=1e-6, atol=1e-6)
    h = 1e-3
    by_lag = (amount(LAG * np.exp(h), PART) - amount(LAG * np.exp(-h), PART)) / (2 * h)
    by_part = (amount(LAG, PART * np.exp(h)) - amount(LAG, PART * np.exp(-h))) / (2 * h)
    expected = np.stack([by_lag, by_part], axis=1)
    np.testing.assert_allclose(jacobian[:, -2:], expected, rtol=2e-5, atol=2e-5)


def test_without_a_steady_state_a_subject_is_nan_alone(study, psi):
    value, jacobian = with_jacobian(by_ode, psi, study)
    bad = NAMES.index("no steady state")
    assert np.isnan(value[bad]).all() and np.isfinite(np.delete(value, bad, 0)).all()
    assert np.isfinite(jacobian).all() and not jacobian[bad].any()


# Compartments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["iv", "oral"])
def test_two_equal_peripheral_compartments_are_one(study, way):
    """Where two roots of the cubic could meet; and one compartment is two without exchange."""
    models = [
        jax.jit(getattr(closed_forms, f"{way}_{n}_compartment")) for n in ("one", "two", "three")
    ]
    rows = [give(0.0, more=2, every=5.0), *seen(0.5, 4.0, 18.0)]
    single = study_of({"x": rows})
    three = psi_of(Psi3, single, **PSI3 | dict(Q3=2.0))  # Q3 / V3 = Q2 / V2
    two = three._replace(Q2=three.Q2 + three.Q3, V2=three.V2 + three.V3)
    np.testing.assert_allclose(models[2](three, single), models[1](two, single), rtol=1e-12)
    alone = Psi(three.ka, three.CL, three.V1, None, three.lag, three.F)
    without = two._replace(Q2=0 * two.Q2)
    np.testing.assert_allclose(models[1](without, single), models[0](alone, single), rtol=1e-12)
    without = three._replace(Q3=0 * three.Q3)
    np.testing.assert_allclose(models[2](without, single), models[1](three, single), rtol=1e-12)


def test_rates_of_any_size_do_not_overflow():
    size = np.asarray([1e-12, 1e-3, 1.0, 1e3, 1e8])
    ka, CL, Q2, Q3 = (jnp.asarray(x.ravel()) for x in np.meshgrid(size, size, size, size))
    one = jnp.ones(ka.size)
    psi = Psi3(ka, CL, 3 * one, Q2, one, Q3, 2 * one, 0.1 * one, one)
    rows = [give(0.0, ss=1, every=5.0), *seen(0.5, 4.0)]
    study = study_of({i: rows for i in range(ka.size)})
    conc = jax.jit(closed_forms.oral_three_compartment)(psi, study)
    # Exponentials of opposite sign may leave less than nothing, far below the rounding of 1.
    assert np.isfinite(conc).all() and (conc >= -1e-32).all()


def test_study_at_other_times_has_the_same_doses(study, psi):
    amount, _ = with_jacobian(one_compartment, psi, study)
    name = "steady state, late"
    i = NAMES.index(name)
    alone = study.subset([i])
    grid = np.unique(np.append(alone.time, [0.2, 6.0]))
    single = Psi(*(x[i : i + 1] for x in psi))
    dense = jax.jit(closed_forms.oral_one_compartment)(single, alone.at(grid))
    again = np.asarray(dense)[0, np.searchsorted(grid, alone.time[0])]
    np.testing.assert_allclose(again * psi.V[i], amount[i], rtol=1e-12)


# The door ----------------------------------------------------------------------------------------


def simple(matrix=lambda psi: [[-psi.CL]], **options):
    return lambda psi, study: solve_linear(matrix, psi, study, **options)


BAD = {
    "lag of one value for all": (simple(lag=0.3), r"shape \[subject\] = \(2,\).* 'lag'"),
    "lag of no compartment": (simple(lag={2: jnp.ones(2)}), r"lag of compartments 1 to 1; got 2"),
    "bioavailability of other subjects": (
        simple(bioavailability={1: jnp.ones(3)}),
        r"got \(3,\) for 'bioavailability'",
    ),
    "not square": (simple(lambda psi: [[psi.CL, 0.0]]), r"matrix \[state, state\].*\(1, 2\)"),
    "initial": (simple(initial=jnp.ones(2)), r"\[state\] = \(1,\).*got \(2,\)"),
    "dose beyond the states": (
        lambda psi, study: simple()(psi, dosed_into(3)),
        r"compartments 1 to 1.*got a dose into compartment 3 \(row 0, subject 'a'\)",
    ),
    "dose into a peripheral compartment": (
        lambda psi, study: closed_forms.iv_one_compartment(psi, dosed_into(2)),
        r"iv_one_compartment: .* compartment 1 only; got a dose into compartment 2 \(row 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_advice(name):
    call, words = BAD[name]
    study = dosed_into(1)
    with pytest.raises(ValueError, match=words):
        call(psi_of(Psi, study, ka=1.0, CL=1.0, V=1.0, s=0.0, lag=0.0, F=1.0), study)
