"""Structural models: the ODE is the closed form, and its derivatives pass every transformation."""

from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from flowme.structural import oral_one_compartment, solve
from flowme.study import Study


class Psi(NamedTuple):
    ka: Any
    V: Any
    CL: Any


def absorption(t, amount, psi):
    gut, central = amount
    return jnp.stack([-psi.ka * gut, psi.ka * gut - psi.CL / psi.V * central])


def elimination(t, amount, psi):
    return -psi.CL / psi.V * amount


def dose(time, amount=100.0, rate=0.0):
    return (time, np.nan, amount, rate, 1)


def record(time):
    return (time, 1.0, 0.0, 0.0, 0)


def study_of(subjects):
    rows = [(name, *row) for name, rows in subjects.items() for row in rows]
    frame = pd.DataFrame(rows, columns=["ID", "TIME", "DV", "AMT", "RATE", "EVID"])
    return Study.from_frame(frame, outcome={"conc": "DV"})


# Each case is a subject; together they are one ragged study, hence one program to compile.
CASES = {
    "single dose": [dose(0.0), *map(record, (0.3, 1.0, 2.5, 6.0, 12.0, 24.0))],
    "repeated doses": [
        dose(0.0),
        record(1.0),
        dose(6.0, 50.0),
        record(7.0),
        dose(12.0),
        record(20),
    ],
    "record before dose": [dose(0.0), record(1.0), record(6.0), dose(6.0), record(8.0)],
    "dose before record": [dose(0.0), record(1.0), dose(6.0), record(6.0), record(8.0)],
    "record before first dose": [record(0.0), dose(1.0), record(1.5), record(5.0)],
    "two records": [dose(0.0), record(2.0), record(4.0)],
    "ka equals k": [dose(0.0), *map(record, (0.5, 2.0, 8.0))],
    "ka near k": [dose(0.0), *map(record, (0.5, 2.0, 8.0))],
    "ka below k": [dose(0.0), *map(record, (0.5, 2.0, 8.0))],
    "late first record": [dose(0.0), record(30.0), record(40.0)],
}
KA = {"ka equals k": 0.1, "ka near k": 0.1 + 1e-9, "ka below k": 0.02}
NAMES = tuple(CASES)


@pytest.fixture(scope="module")
def study():
    return study_of(CASES)


@pytest.fixture(scope="module")
def psi():
    ones = jnp.ones(len(CASES))
    ka = jnp.asarray([KA.get(name, 1.3) for name in NAMES])
    return Psi(ka=ka, V=20.0 * ones, CL=2.0 * ones)


def concentration(psi, study, **options):
    return solve(absorption, psi, study, **options)[..., 1] / psi.V[:, None]


@partial(jax.jit, static_argnames=("solver", "rtol", "atol"))
def compiled(psi, study, **options):
    return concentration(psi, study, **options)


def scaled(psi, delta):
    """Individual parameters moved on the log scale by `delta` [parameter], the same for all."""
    return Psi(*(leaf * jnp.exp(d) for leaf, d in zip(psi, delta, strict=True)))


def by_parameter(model, psi, study, derivative):
    """Derivatives of [subject, time] in the logarithms of ka, V, CL, each of its own subject."""
    return jax.jit(
        lambda psi, study: derivative(lambda d: model(scaled(psi, d), study))(jnp.zeros(3))
    )(psi, study)


@pytest.fixture(scope="module")
def both(psi, study):
    """Value and Jacobian [subject, time, parameter], (ODE, closed form)."""

    def value_and_jacobian(model):
        def run(f):
            return lambda d: (f(d), jax.jacfwd(f)(d))

        return by_parameter(model, psi, study, run)

    return value_and_jacobian(concentration), value_and_jacobian(oral_one_compartment)


@pytest.mark.parametrize("name", NAMES)
def test_ode_is_the_closed_form(both, name):
    (value, jacobian), (expected, expected_jacobian) = both
    i = NAMES.index(name)
    np.testing.assert_allclose(value[i], expected[i], rtol=1e-6, atol=1e-12)
    size = np.abs(expected_jacobian[i]).max()
    np.testing.assert_allclose(jacobian[i], expected_jacobian[i], rtol=1e-5, atol=1e-7 * size)


@pytest.mark.parametrize("name", ["record before dose", "dose before record"])
def test_rows_of_one_time_act_in_their_order(study, psi, name):
    """The gut holds the second dose at the same time only if the dose row stands first."""
    gut = jax.jit(lambda psi, study: solve(absorption, psi, study))(psi, study)
    gut = gut[NAMES.index(name), :, 0]
    at = np.flatnonzero(study.time[NAMES.index(name)] == 6.0)
    before, after = np.exp(-1.3 * 6) * 100, np.exp(-1.3 * 6) * 100 + 100
    seen = [before, after] if name == "record before dose" else [after, after]
    np.testing.assert_allclose(gut[at], seen, rtol=1e-6)


def test_padding_changes_nothing(study, psi):
    together = compiled(psi, study)
    i = NAMES.index("two records")
    alone = compiled(Psi(*(leaf[i : i + 1] for leaf in psi)), study_of({"x": CASES[NAMES[i]]}))
    np.testing.assert_allclose(together[i, : alone.shape[1]], alone[0], rtol=1e-14)


# Closed form -------------------------------------------------------------------------------------


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
    study = study_of({i: CASES["repeated doses"] for i in range(len(k))})
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


def test_closed_form_predicts_nan_for_an_infusion_it_cannot_see(psi):
    study = study_of({"a": [dose(0.0), record(1.0)], "b": [dose(0.0, rate=10.0), record(1.0)]})
    psi = Psi(*(leaf[:2] for leaf in psi))
    conc = jax.jit(oral_one_compartment)(psi, study)
    assert np.isfinite(conc[0]).all() and np.isnan(conc[1]).all()


# Infusions and initial states --------------------------------------------------------------------

INFUSIONS = {
    "one": [dose(0.0, 100.0, 25.0), *map(record, (1.0, 4.0, 6.0))],
    "overlapping": [
        dose(0.0, 100, 25),
        record(1),
        dose(2, 60, 10),
        record(3),
        record(5),
        record(9),
    ],
    "after a bolus": [dose(0.0), record(1.0), dose(2.0, 100.0, 50.0), record(3.0), record(8.0)],
    "still running": [dose(0.0, 100.0, 10.0), record(1.0), record(2.0)],
}


def test_infusions_are_their_analytic_solution():
    study = study_of(INFUSIONS)
    k = 0.1 * np.arange(1, 1 + len(INFUSIONS))
    psi = Psi(ka=jnp.ones(len(k)), V=jnp.ones(len(k)), CL=jnp.asarray(k))
    amount = jax.jit(lambda psi, study: solve(elimination, psi, study))(psi, study)[..., 0]
    for i, (name, rows) in enumerate(INFUSIONS.items()):
        expected = np.zeros(len(rows))
        for start, _, given, rate, event in rows:
            if event:
                tau = np.maximum(np.asarray([row[0] for row in rows]) - start, 0)
                on = np.minimum(tau, given / rate) if rate else 0
                gained = rate / k[i] * -np.expm1(-k[i] * on) if rate else given
                expected += gained * np.exp(-k[i] * (tau - on))
        measured = [j for j, row in enumerate(rows) if row[-1] == 0]
        np.testing.assert_allclose(amount[i, measured], expected[measured], rtol=1e-6, err_msg=name)


def test_initial_state_may_depend_on_parameters(study, psi):
    def total(psi, log_base, study):
        base = jnp.exp(log_base) * psi.CL
        return solve(elimination, psi, study, initial=base[:, None])[..., 0]

    run = jax.jit(lambda s: jax.jvp(lambda x: total(psi, x, s), (0.0,), (1.0,)))
    value, tangent = run(study)
    doses_only = jax.jit(lambda s: solve(elimination, psi, s))(study)[..., 0]
    expected = psi.CL[:, None] * np.exp(-0.1 * (study.time - study.time[:, :1]))
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)
    np.testing.assert_allclose(value - doses_only, expected, rtol=1e-5)
    one_for_all = jax.jit(lambda s: solve(elimination, psi, s, initial=jnp.asarray([2.0])))(study)
    np.testing.assert_allclose(one_for_all[..., 0], value, rtol=1e-12)


# Transformations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(study, psi):
    """Two subjects for the laws whose programs are dear to compile."""
    chosen = [NAMES.index("single dose"), NAMES.index("repeated doses")]
    return study.subset(chosen), Psi(*(leaf[np.asarray(chosen)] for leaf in psi))


def squares(model, psi, study, delta):
    return jnp.sum(model(scaled(psi, delta), study) ** 2)


DERIVATIVES = {
    "reverse": jax.grad,
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse through checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}
QUICK = ("reverse", "forward over reverse")  # the forward Jacobian is in the fixture `both`


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in DERIVATIVES]
)
def test_derivatives_of_every_mode_are_those_of_the_closed_form(pair, name):
    study, psi = pair

    def run(model):
        def differentiate(psi, study):
            return DERIVATIVES[name](lambda d: squares(model, psi, study, d))(jnp.zeros(3))

        return jax.jit(differentiate)(psi, study)

    expected = run(oral_one_compartment)
    np.testing.assert_allclose(run(concentration), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loop", ["vmap", pytest.param("scan", marks=pytest.mark.slow)])
def test_gradient_over_nodes(pair, loop):
    """Individual parameters [node, subject], as in a quadrature over random effects."""
    study, psi = pair
    nodes = Psi(*(leaf * jnp.asarray([0.8, 1.0, 1.5])[:, None] for leaf in psi))

    def gradients(model, loop):
        gradient = jax.grad(lambda psi: (model(psi, study) ** 2).sum())
        over = {"vmap": jax.vmap(gradient), "scan": lambda x: jax.lax.map(gradient, x)}
        return jax.jit(over[loop])(nodes)

    actual, expected = gradients(concentration, loop), gradients(oral_one_compartment, "vmap")
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_value_does_not_depend_on_what_is_differentiated(pair):
    study, psi = pair
    value = compiled(psi, study)
    primal, _ = jax.jit(
        lambda psi, study: jax.jvp(lambda p: concentration(p, study), (psi,), (psi,))
    )(psi, study)
    np.testing.assert_allclose(primal, value, rtol=1e-13)


def test_what_the_right_hand_side_closes_over_is_differentiated(pair):
    """A population parameter, an integer array and a batched constant, all from outside."""
    study, psi = pair

    def total(log_factor, constant):
        index = jnp.asarray([1, 0]) + 0 * log_factor.astype(int)

        def rhs(t, amount, psi):
            swapped = amount[index]
            gut, central = swapped[1], swapped[0]
            flow = jnp.exp(log_factor) * constant * psi.CL / psi.V * central
            return -psi.ka * gut, psi.ka * gut - flow

        return (solve(rhs, psi, study)[..., 1] / psi.V[:, None] ** 2).sum()

    def closed(log_factor, constant):
        faster = psi._replace(CL=psi.CL * jnp.exp(log_factor) * constant)
        return (oral_one_compartment(faster, study) / psi.V[:, None]).sum()

    constants = jnp.asarray([1.0, 1.1])
    actual = jax.jit(jax.vmap(jax.value_and_grad(total), in_axes=(None, 0)))(0.1, constants)
    expected = jax.vmap(jax.value_and_grad(closed), in_axes=(None, 0))(0.1, constants)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)


def test_another_study_of_the_same_shape_does_not_recompile(pair):
    study, psi = pair
    traces = []

    @jax.jit
    def run(psi, study):
        traces.append(1)
        return concentration(psi, study)

    other = study_of(
        {
            "x": [(t + 0.1 * t, *rest) for t, *rest in CASES["single dose"]],
            "y": CASES["repeated doses"],
        }
    )
    run(psi, study), run(psi, other)
    assert len(traces) == 1


def test_compiled_program_has_no_host_callback(pair):
    """Callbacks would keep it out of the persistent compilation cache."""
    study, psi = pair
    gradient = jax.jit(jax.grad(lambda psi, study: concentration(psi, study).sum()))
    assert "callback" not in gradient.lower(psi, study).as_text()


def test_single_precision(pair):
    study, psi = pair
    expected = oral_one_compartment(psi, study)
    with jax.enable_x64(False):
        single = Psi(*(jnp.asarray(np.asarray(leaf)) for leaf in psi))
        value, gradient = jax.value_and_grad(lambda psi: compiled(psi, study)[0, 2])(single)
    assert value.dtype == gradient.CL.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[0, 2], rtol=1e-4)


def test_solver_is_exchangeable(pair):
    study, psi = pair
    stiff = compiled(psi, study, solver=diffrax.Kvaerno5(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(stiff, oral_one_compartment(psi, study), rtol=1e-5, atol=1e-9)


def test_unrolled_tsit5_is_diffrax_tsit5(pair):
    study, psi = pair
    stock = compiled(psi, study, solver=diffrax.Tsit5())
    np.testing.assert_allclose(compiled(psi, study), stock, rtol=1e-10)


# Failures ----------------------------------------------------------------------------------------


def explosive(t, amount, psi):
    """Decays; but if CL >= 5 it blows up in finite time, and if ka < 0 it is NaN."""
    return jnp.where(psi.CL < 5, -psi.CL / psi.V * amount, amount**2) + 0 * jnp.sqrt(psi.ka)


@jax.jit
def explode(psi, study):
    """The amounts, and the gradient of their sum of squares in what all subjects share."""

    def loss(population):
        amount = solve(explosive, scaled(psi, population), study, max_steps=64)[..., 0]
        return (amount**2).sum(), amount

    (_, amount), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.zeros(3))
    return amount, gradient


@pytest.mark.parametrize(
    "bad", [dict(CL=10.0), dict(ka=-1.0), dict(V=1e-7)], ids=["blows up", "NaN", "max_steps"]
)
def test_a_failing_subject_is_alone(study, psi, bad):
    """NaN from its failing interval on; the others keep every bit of value and gradient."""
    failing = NAMES.index("single dose")
    broken = psi._replace(**{n: getattr(psi, n).at[failing].set(v) for n, v in bad.items()})
    others = np.arange(len(NAMES)) != failing

    amount, gradient = explode(broken, study)
    intact, _ = explode(psi, study)
    np.testing.assert_array_equal(amount[others], intact[others])
    assert np.isfinite(amount[failing, 0])  # the dose itself, before anything was solved
    assert np.isnan(amount[failing, 1:]).all()
    _, expected = explode(Psi(*(leaf[others] for leaf in psi)), study.subset(others))
    assert np.abs(expected[1:]).min() > 1
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_failure_begins_where_the_solver_fails():
    def rhs(t, amount, psi):
        return jnp.where(t > 3, amount**2, -psi.CL * amount)

    study = study_of({"x": [dose(0.0), *map(record, (1.0, 2.0, 5.0, 6.0))]})
    amount = solve(rhs, Psi(*jnp.full((3, 1), 0.1)), study)[0, :, 0]
    np.testing.assert_array_equal(np.isnan(amount), [False, False, False, True, True])


# The door ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_number_of_states_is_inferred(pair, count):
    study, psi = pair

    def chain(t, amount, psi):
        parts = [amount[i] for i in range(count)]
        _ = jnp.zeros(count) + amount  # refuses another length
        return [-psi.ka * x for x in parts]

    assert jax.eval_shape(lambda: solve(chain, psi, study)).shape[-1] == count
    assert jax.eval_shape(lambda: solve(elimination, psi, study, states=count)).shape[-1] == count


BAD = {
    "psi of one value for all": (
        lambda psi, study: solve(absorption, psi._replace(ka=1.0), study),
        r"shape \[subject\] = \(2,\); got \(\) for 'ka'",
    ),
    "closed form, psi of one value for all": (
        lambda psi, study: oral_one_compartment(psi._replace(V=1.0), study),
        r"shape \[subject\] = \(2,\); got \(\) for 'V'",
    ),
    "states that do not fit": (
        lambda psi, study: solve(absorption, psi, study, states=3),
        r"for 3 states; got, with 3 states, ValueError",
    ),
    "right-hand side that fits no number of states": (
        lambda psi, study: solve(lambda t, a, psi: jnp.zeros(len(a) + 1), psi, study),
        r"any of 1 to 20 states; got, with 20 states, \(21,\)",
    ),
    "initial of another number of states": (
        lambda psi, study: solve(absorption, psi, study, initial=jnp.zeros(3)),
        r"for 3 states; got",
    ),
    "initial against states": (
        lambda psi, study: solve(absorption, psi, study, initial=jnp.zeros(2), states=4),
        r"expected `initial` with 4 states",
    ),
    "initial for other subjects": (
        lambda psi, study: solve(absorption, psi, study, initial=jnp.zeros((5, 2))),
        r"with 2 subjects; got \(5, 2\)",
    ),
    "dose beyond the states": (
        lambda psi, study: solve(elimination, psi, dosed_into(2)),
        r"compartments 1 to 1.*got doses into compartment 2",
    ),
    "closed form, dose into the central compartment": (
        lambda psi, study: oral_one_compartment(psi, dosed_into(2)),
        r"expected doses into compartment 1 only; got compartments \(2,\)",
    ),
    "closed form, infusion": (
        lambda psi, study: oral_one_compartment(
            psi, study_of({"a": [dose(0.0), record(1.0)], "b": [dose(0.0, rate=9.0), record(1.0)]})
        ),
        r"got an infusion for subject 'b'",
    ),
    "derivative with respect to the study": (
        lambda psi, study: jax.grad(
            lambda s: solve(
                absorption,
                psi,
                jax.tree.map(lambda x: x * s if x.dtype == float else x, study),
            ).sum()
        )(1.0),
        r"expected a study and tolerances that are not differentiated",
    ),
}


def dosed_into(compartment):
    rows = [
        (s, t, np.nan if e else 1.0, 100.0 * e, e) for s in "ab" for t, e in ((0.0, 1), (1.0, 0))
    ]
    frame = pd.DataFrame(rows, columns=["ID", "TIME", "DV", "AMT", "EVID"]).assign(CMT=compartment)
    return Study.from_frame(frame, outcome={"conc": "DV"})


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_advice(pair, name):
    study, psi = pair
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call(psi, study)


def test_a_mistake_inside_the_right_hand_side_is_not_hidden(pair):
    study, psi = pair
    with pytest.raises(AttributeError, match="Vmax"):
        solve(lambda t, amount, psi: psi.Vmax * amount, psi, study)
