"""ODEs of structural models: they are the closed form, and pass every transformation."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from dosing import Psi, by_parameter, dose, dosed_into, record, scaled, study_of

from flowme import lockstep
from flowme.closed_forms import oral_one_compartment
from flowme.structural import solve
from flowme.study import Study


def absorption(t, amount, psi):
    gut, central = amount
    return jnp.stack([-psi.ka * gut, psi.ka * gut - psi.CL / psi.V * central])


def elimination(t, amount, psi):
    return -psi.CL / psi.V * amount


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
    return solve(absorption, psi, study, states=2, **options)[..., 1] / psi.V[:, None]


closed = jax.jit(oral_one_compartment)


@partial(jax.jit, static_argnames=("solver", "rtol", "atol"))
def amounts(psi, study, **options):
    return solve(absorption, psi, study, **options)


def compiled(psi, study, **options):
    """`concentration`, by a program that all tests share: compiling is what takes the time."""
    return amounts(psi, study, **options)[..., 1] / psi.V[:, None]


@pytest.fixture(scope="module")
def both(psi, study):
    """Value and Jacobian [subject, time, parameter], (ODE, closed form), of one program each."""

    def value_and_jacobian(model):
        def run(f):
            def twice(d):
                value = f(d)
                return value, value

            return lambda d: jax.jacfwd(twice, has_aux=True)(d)[::-1]

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
    gut = amounts(psi, study)[NAMES.index(name), :, 0]
    at = np.flatnonzero(study.time[NAMES.index(name)] == 6.0)
    before, after = np.exp(-1.3 * 6) * 100, np.exp(-1.3 * 6) * 100 + 100
    seen = [before, after] if name == "record before dose" else [after, after]
    np.testing.assert_allclose(gut[at], seen, rtol=1e-6)


def test_padding_changes_nothing(study, psi):
    together = compiled(psi, study)
    i = NAMES.index("two records")
    alone = compiled(Psi(*(leaf[i : i + 1] for leaf in psi)), study_of({"x": CASES[NAMES[i]]}))
    np.testing.assert_allclose(together[i, : alone.shape[1]], alone[0], rtol=1e-14)


def test_study_at_other_times_has_the_same_states(study, psi):
    """At its own times and between them: the doses act as before, and before a record with them."""
    grid = np.unique(np.append(study.time, [0.1, 3.3, 26.0]))
    dense = study.at(grid)
    conc = np.asarray(compiled(psi, dense))
    np.testing.assert_allclose(conc, closed(psi, dense), rtol=1e-6, atol=1e-12)
    again = np.take_along_axis(conc, np.searchsorted(grid, study.time), 1)
    np.testing.assert_allclose(again, compiled(psi, study), rtol=1e-6, atol=1e-12)


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
    @jax.jit
    def run(share, study):
        def total(share):
            return solve(elimination, psi, study, initial=(share * psi.CL)[:, None])[..., 0]

        return jax.jvp(total, (share,), (1.0,))

    value, tangent = run(1.0, study)
    doses_only, _ = run(0.0, study)
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
BY_DEFAULT_SOLVER = ("reverse", "forward over reverse")


@pytest.fixture(scope="module")
def closed_derivatives(pair):
    """Gradient [parameter] and Hessian [parameter, parameter] of the closed form, by order."""
    study, psi = pair
    loss = partial(squares, oral_one_compartment, psi, study)
    return jax.jit(lambda d: {1: jax.grad(loss)(d), 2: jax.hessian(loss)(d)})(jnp.zeros(3))


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_every_mode_are_those_of_the_closed_form(pair, closed_derivatives, name):
    study, psi = pair
    # diffrax's own Tsit5 gives the same numbers (see below) by a program that compiles sooner.
    solver = None if name in BY_DEFAULT_SOLVER else diffrax.Tsit5()
    model = partial(concentration, solver=solver)
    differentiate = DERIVATIVES[name](partial(squares, model, psi, study))
    actual = jax.jit(differentiate)(jnp.zeros(3))
    np.testing.assert_allclose(actual, closed_derivatives[actual.ndim], rtol=1e-5, atol=1e-6)


def test_gradient_over_nodes(pair):
    """Individual parameters [node, subject], as in a quadrature over random effects."""
    study, psi = pair
    nodes = Psi(*(leaf * jnp.asarray([0.8, 1.0, 1.5])[:, None] for leaf in psi))

    def gradient(model):
        return jax.grad(lambda psi: (model(psi, study) ** 2).sum())

    expected = jax.jit(jax.vmap(gradient(oral_one_compartment)))(nodes)
    for loop in (jax.vmap, lambda f: partial(jax.lax.map, f)):
        actual = jax.jit(loop(gradient(concentration)))(nodes)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_value_does_not_depend_on_what_is_differentiated(both, study, psi):
    value, _ = both[0]  # computed while its Jacobian was
    np.testing.assert_allclose(value, compiled(psi, study), rtol=1e-13)


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

        amount = solve(rhs, psi, study, solver=diffrax.Tsit5())[..., 1]
        return (amount / psi.V[:, None] ** 2).sum()

    def total_closed(log_factor, constant):
        faster = psi._replace(CL=psi.CL * jnp.exp(log_factor) * constant)
        return (oral_one_compartment(faster, study) / psi.V[:, None]).sum()

    constants = jnp.asarray([1.0, 1.1])
    actual = jax.jit(jax.vmap(jax.value_and_grad(total), in_axes=(None, 0)))(0.1, constants)
    expected = jax.jit(jax.vmap(jax.value_and_grad(total_closed), in_axes=(None, 0)))(
        0.1, constants
    )
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)


def test_another_study_of_the_same_shape_does_not_recompile(pair):
    study, psi = pair
    traces = []

    @jax.jit
    def run(psi, study):
        traces.append(1)
        return concentration(psi, study, solver=diffrax.Heun())

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
    expected = closed(psi, study)
    with jax.enable_x64(False):
        single = Psi(*(jnp.asarray(np.asarray(leaf)) for leaf in psi))
        run = jax.jit(jax.value_and_grad(lambda psi: concentration(psi, study)[0, 2]))
        value, gradient = run(single)
    assert value.dtype == gradient.CL.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[0, 2], rtol=1e-4)


def test_solver_is_exchangeable(pair):
    study, psi = pair
    stiff = compiled(psi, study, solver=diffrax.Kvaerno5(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(stiff, closed(psi, study), rtol=1e-5, atol=1e-9)


def test_the_loop_over_rows_agrees_with_diffrax(study, psi):
    stock = compiled(psi, study, solver=diffrax.Tsit5())
    np.testing.assert_allclose(compiled(psi, study), stock, rtol=1e-7, atol=1e-9)


def test_a_row_does_not_depend_on_how_many_there_are(study, psi):
    """Nodes of every subject (more rows than one loop takes, and a remainder), as engines do."""
    factors = jnp.linspace(0.5, 2.0, 40)
    assert factors.size * study.subjects.size > lockstep._CHUNK

    @jax.jit
    def at(factors):
        return jax.vmap(lambda f: solve(absorption, psi._replace(CL=f * psi.CL), study))(factors)

    together = at(factors)
    for chosen in (slice(0, 1), slice(37, 40)):
        np.testing.assert_allclose(at(factors[chosen]), together[chosen], rtol=1e-12, atol=1e-12)


def test_a_row_has_its_own_number_of_steps(study, psi):
    """How many it may take in an interval does not depend on those beside it."""
    factors = jnp.geomspace(0.5, 50.0, 12)

    @jax.jit
    def failed(factors, rtol):
        def one(f):
            own = psi._replace(ka=f * psi.ka)
            return solve(absorption, own, study, rtol=rtol, atol=1e-10, max_steps=12)

        return jnp.isnan(jax.vmap(one)(factors))

    for rtol in (1e-4, 1e-6, 1e-8):
        together = failed(factors, rtol)
        alone = [failed(factors[i : i + 1], rtol)[0] for i in range(len(factors))]
        np.testing.assert_array_equal(together, alone)
    assert jnp.any(together) and not jnp.all(together)


def test_an_accelerator_has_all_rows_in_one_loop(study, psi, monkeypatch):
    """Which changes nothing: each row has its own steps."""
    factors = jnp.linspace(0.5, 2.0, 40)

    def program():
        def at(factors):
            each = jax.vmap(lambda f: solve(absorption, psi._replace(CL=f * psi.CL), study))
            return each(factors)

        return jax.jit(at)

    def loops(at):
        return str(at.trace(factors).jaxpr).count("scan[")

    usual = program()
    monkeypatch.setattr(lockstep, "on_accelerator", lambda: True)
    whole = program()
    found, few = whole(factors), loops(whole)
    monkeypatch.undo()
    np.testing.assert_allclose(found, usual(factors), rtol=1e-12, atol=1e-12)
    assert few == loops(usual) - 1  # none over chunks of rows


def test_tolerances_may_be_mapped_over(study, psi):
    """As in a study of how tight they must be: each is that of a solve of its own."""

    def at(rtol):
        return solve(absorption, psi, study, rtol=rtol, atol=1e-10)

    rtol = jnp.array([1e-3, 1e-9])
    together = jax.jit(jax.vmap(at))(rtol)
    np.testing.assert_allclose(together[1], at(1e-9), rtol=1e-12, atol=1e-12)
    assert 1e-9 < jnp.abs(together[0] - together[1]).max() / together[1].max() < 1e-2


def test_derivative_where_an_event_meets_a_record():
    """An infusion of 2 h at rate R, F = 1: its end is at the record at 2 h, and moves with F.

    From then on A = R (e^(kFD/R) - 1) e^(-kt) / k with dA/dF = D e^(kFD/R - kt).
    """
    rows = [(0.0, 100.0, 50.0, 1), *((t, 0.0, 0.0, 0) for t in (0.0, 1.0, 2.0, 3.0, 4.0))]
    frame = pd.DataFrame(rows, columns=["TIME", "AMT", "RATE", "EVID"]).assign(ID=1)
    study = Study.from_frame(frame.assign(DV=np.where(frame["EVID"] == 1, np.nan, 1.0)))

    def at(F):
        rate = {"k": jnp.full(1, 0.3)}
        found = solve(lambda t, a, p: -p["k"] * a, rate, study, bioavailability=jnp.full(1, F))
        return found[0, -2:, 0]

    first, second = (f(1.0) for f in (jax.jacfwd(at), jax.jacfwd(jax.jacrev(at))))
    later = np.exp(-0.3 * np.array([1.0, 2.0]))
    np.testing.assert_allclose(first, 100 * later, rtol=1e-6)
    np.testing.assert_allclose(second, 100 * 0.3 * 2 * later, rtol=1e-6)


# Failures ----------------------------------------------------------------------------------------


def explosive(t, amount, psi):
    """Decays; but if CL >= 5 it blows up in finite time, and if ka < 0 it is NaN."""
    return jnp.where(psi.CL < 5, -psi.CL / psi.V * amount, amount**2) + 0 * jnp.sqrt(psi.ka)


@jax.jit
def explode(psi, study, weight):
    """The amounts, and the gradient of their sum of squares in what all subjects share."""

    def loss(population):
        amount = solve(explosive, scaled(psi, population), study, max_steps=64)[..., 0]
        return (weight[:, None] * amount**2).sum(), amount

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

    amount, gradient = explode(broken, study, jnp.ones(len(NAMES)))
    intact, expected = explode(psi, study, jnp.asarray(others, float))
    np.testing.assert_array_equal(amount[others], intact[others])
    assert np.isfinite(amount[failing, 0])  # the dose itself, before anything was solved
    assert np.isnan(amount[failing, 1:]).all()
    assert np.abs(expected[1:]).min() > 1
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_failure_begins_where_the_solver_fails():
    def rhs(t, amount, psi):
        return jnp.where(t > 3, amount**2, -psi.CL * amount)

    study = study_of({"x": [dose(0.0), *map(record, (1.0, 2.0, 5.0, 6.0))]})
    amount = jax.jit(lambda psi: solve(rhs, psi, study))(Psi(*jnp.full((3, 1), 0.1)))[0, :, 0]
    np.testing.assert_array_equal(np.isnan(amount), [False, False, False, True, True])


# The door ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_number_of_states_is_inferred(pair, count):
    study, psi = pair

    def chain(t, amount, psi):
        parts = [amount[i] for i in range(count)]
        _ = jnp.zeros(count) + amount  # refuses another length
        return [-psi.ka * x for x in parts]

    quick = partial(solve, psi=psi, study=study, solver=diffrax.Heun())  # quick to trace
    assert jax.eval_shape(lambda: quick(chain)).shape[-1] == count
    assert jax.eval_shape(lambda: quick(elimination, states=count)).shape[-1] == count


BAD = {
    "psi of one value for all": (
        lambda psi, study: solve(absorption, psi._replace(ka=1.0), study),
        r"shape \[subject\] = \(2,\) or \[subject, time\] = \(2, 7\); got \(\) for 'ka'",
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
        r"compartments 1 to 1.*got a dose into compartment 2 \(row 0, subject 'a'\)",
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
