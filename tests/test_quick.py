"""Programs compiled in a hurry compute the same, and are optimised when that pays."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import flowme as fm
from flowme import quick
from flowme.closed_forms import _relative_decay
from flowme.garbage import set_aside
from flowme.infer import evaluate
from flowme.infer.checkpoint import Checkpoint
from flowme.infer.joint import Joint
from flowme.infer.newton import newton_of
from flowme.infer.quadratic import in_z, quadratic_form, second_order


def oral(study):
    ka = fm.population("ka", dist.LogNormal(0.5, 0.5))
    V = fm.population("V", dist.LogNormal(3.4, 0.5))
    CL = fm.population("CL", dist.LogNormal(1.0, 0.5))
    law = fm.GaussianRandomEffect(["ka", "V", "CL"], full=True, omega=0.4)
    eta = fm.random_effect("eta", law, study.subjects)
    psi = fm.individual(
        study.subjects, ka=ka * jnp.exp(eta.ka), V=V * jnp.exp(eta.V), CL=CL * jnp.exp(eta.CL)
    )
    f = fm.oral_one_compartment(psi, study)
    fm.observe("conc", fm.residual.combined1(f, 0.4, fm.population("b", dist.Beta(2, 8))), study)


def case():
    study = fm.datasets.theophylline()
    joint = Joint.of(oral, study)
    theta = np.asarray(joint.unconstrain({}))
    theta = theta + 0.2 * np.random.default_rng(0).normal(size=theta.shape)
    return study, joint, theta, newton_of(joint, theta, {}, study, use_priors=False).engine


def test_all_tiers_compute_the_same(monkeypatch):
    study, _, theta, engine = case()
    found, soon = [], {**quick.AT_ONCE, "xla_backend_optimization_level": 1}
    programs = [*evaluate._PROGRAMS, quick.quick(evaluate._of_chunk, 0, soon)]  # soon, for users
    monkeypatch.setattr(evaluate, "_PROGRAMS", programs)
    for number in range(4):
        engine = engine._replace(tier=number)
        found.append(evaluate.evaluate(engine, jax.random.key(0), theta, {}, study, order=5))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9), found[0], other)


@pytest.fixture
def on_a_processor(monkeypatch):
    monkeypatch.setattr(quick, "on_accelerator", lambda: False)
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", kept)


def test_a_program_is_optimised_when_it_has_much_to_do(on_a_processor, monkeypatch):
    assert [quick.tier(work) for work in (1e7, 1e8, 1e9)] == [0, 1, 2]
    assert quick.serves() == 1
    jax.config.update("jax_compilation_cache_dir", "somewhere")
    assert quick.serves() == 10
    monkeypatch.setattr(quick, "on_accelerator", lambda: True)
    assert quick.tier(1.0) == 2


def test_what_was_begun_is_forgotten_with_the_model():
    assert [quick.begun(oral, name, 2.0) for name in "aab"] == [2.0, 4.0, 2.0]

    def fit():
        def model(study):
            oral(study)

        fm.VariationalEM(model, starts=1).run(
            jax.random.key(0), fm.datasets.theophylline(), progress=False
        )
        return weakref.ref(model)

    model = fit()
    assert model() is not None  # as long as its programs are there
    jax.clear_caches()
    gc.collect()
    assert model() is None


def noted(monkeypatch):
    """The tiers of the programs that are called."""
    programs, used = evaluate._PROGRAMS, []

    def watched(number):
        def program(*arguments):
            used.append(number)
            return programs[number](*arguments)

        return program

    monkeypatch.setattr(evaluate, "_PROGRAMS", [watched(number) for number in range(3)])
    return used


def test_fits_of_a_model_are_optimised_in_the_end(on_a_processor, monkeypatch, tmp_path):
    """But one that goes on from a checkpoint is computed by the program that it began with."""
    vem = fm.VariationalEM(lambda study: oral(study), starts=1)  # of which there was none before
    study, used = fm.datasets.theophylline(), noted(monkeypatch)
    joint = Joint.of(vem.model, study)
    once = newton_of(joint, joint.unconstrain({}), {}, study, use_priors=False).work(60, study)
    monkeypatch.setattr(quick, "_WORTH", (once, 1e3 * once))
    for folder, expected in ((tmp_path, {0}), (None, {1}), (tmp_path, {0})):
        used.clear()
        vem.run(jax.random.key(0), study, progress=False, checkpoint=folder)
        assert set(used) == expected


def test_a_long_fit_is_optimised_on_its_way(on_a_processor, monkeypatch, tmp_path):
    """At the same step, and to the same last bit, when it is taken up again."""
    vem = fm.VariationalEM(lambda study: oral(study), starts=3)
    study, used = fm.datasets.theophylline(), noted(monkeypatch)
    joint = Joint.of(vem.model, study)
    newton = newton_of(joint, joint.unconstrain({}), {}, study, use_priors=False)
    monkeypatch.setattr(quick, "_WORTH", (newton.work(25, study), newton.work(1000, study)))
    quick._done.clear()

    def run(folder):
        used.clear()
        return vem.run(jax.random.key(0), study, progress=False, checkpoint=folder)

    whole = run(tmp_path / "whole")
    assert set(used) == {0, 1} and used == sorted(used)
    care = list(used)
    quick._done.clear()
    write, calls = Checkpoint.write, []

    def killed(self, stage, state):
        write(self, stage, state)
        calls.append(stage)
        if len(calls) == 12:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpoint, "write", killed)
        run(tmp_path / "killed")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    again = run(tmp_path / "killed")
    assert 0 < len(used) < len(care) and used == care[-len(used) :]
    for field in ("theta", "log_likelihood", "information", "history"):
        np.testing.assert_array_equal(getattr(again, field), getattr(whole, field))


def test_options_that_an_xla_does_not_have_are_left_out(monkeypatch):
    monkeypatch.setattr(quick, "_unknown", set())
    options = {"xla_no_such_option": True, "xla_nor_this": 3, "xla_backend_optimization_level": 0}
    program = quick.quick(lambda x: x + 1, options=options)
    assert program(1.0) == 2.0 and quick._unknown == {"xla_no_such_option", "xla_nor_this"}
    wrong = quick.quick(lambda x: x + 1, options={"xla_backend_optimization_level": "high"})
    with pytest.raises(jax.errors.JaxRuntimeError):
        wrong(1.0)


def test_in_another_program_it_is_that_program():
    program = quick.quick(lambda x: x**2)
    assert jax.jit(lambda x: program(x) + 1)(3.0) == 10.0
    assert jax.jit(lambda y: y + program(3.0))(1.0) == 10.0  # none of its arguments is traced
    np.testing.assert_array_equal(jax.vmap(program)(jnp.arange(3.0)), [0, 1, 4])
    assert jax.grad(program)(3.0) == 6.0


def test_what_is_set_aside_comes_back():
    few = 1000  # Python itself sets some aside
    assert gc.get_freeze_count() < few
    with pytest.raises(KeyboardInterrupt), set_aside():
        assert gc.get_freeze_count() > few
        with set_aside():
            pass
        assert gc.get_freeze_count() > few
        raise KeyboardInterrupt
    assert gc.get_freeze_count() < few
    with set_aside():
        assert gc.get_freeze_count() > few


@pytest.mark.parametrize("size", [0, 1, 3])
def test_derivatives_by_pairs_are_the_derivatives(size):
    x = jnp.linspace(0.5, 1.5, size)

    def function(x):
        return jnp.stack([jnp.sum(x**3) * jnp.exp(jnp.sum(x)), jnp.prod(jnp.sin(x))])

    found = second_order(function, x)
    expected = function(x), jax.jacobian(function)(x), jax.hessian(function)(x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, 1e-12, 1e-12)


def test_the_quadratic_form_is_the_log_density_and_its_derivatives():
    study, joint, theta, engine = case()
    W, q = quadratic_form((joint, engine.references), theta, {}, study)
    own, matrix = engine.references.of_density(joint), engine.references.matrix(joint)
    rng = np.random.default_rng(1)
    mean, tril = rng.normal(size=(1, 3)), np.tril(rng.normal(size=(1, 3, 3)))
    z = rng.normal(size=3)
    eta = mean[0] + tril[0] @ z
    j, k = np.triu_indices(3)
    in_u = np.concatenate([[1.0], W @ eta, (W @ eta)[j] * (W @ eta)[k]])
    T = np.concatenate([[1.0], z, z[j] * z[k]])
    np.testing.assert_allclose(T @ in_z(mean @ W.T, W @ tril)[0], in_u, rtol=1e-10)

    def density(part):
        moved = jnp.asarray(theta).at[own].set(part)
        (law,) = joint.laws(moved, {}, study)
        return law.log_prob(jnp.asarray(eta) - matrix @ (moved - theta))[0]

    part = jnp.asarray(theta)[own]
    expected = density(part), jax.grad(density)(part), jax.hessian(density)(part)
    for a, b in zip(q, expected, strict=True):
        np.testing.assert_allclose(np.tensordot(in_u, a, 1), b, 1e-9, 1e-9)


@pytest.mark.parametrize("x", [0.0, 1e-6, 0.0999, 0.1001, 1.0, 50.0])
def test_relative_decay_has_derivatives(x):
    """(1 - exp(-x)) / x and its derivatives ∫ (-s)^n exp(-s x) ds over [0, 1]; each costs a digit
    where the series ends."""
    s, w = np.polynomial.legendre.leggauss(80)
    s, w = 0.5 * (s + 1), 0.5 * w
    function = _relative_decay
    for n in range(4):
        expected = np.sum(w * (-s) ** n * np.exp(-s * x))
        np.testing.assert_allclose(function(jnp.asarray(x)), expected, rtol=1e-14 * 20**n)
        function = jax.grad(function)
