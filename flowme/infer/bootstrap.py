"""Bootstrap over subjects: the estimation repeated on studies of subjects drawn with replacement.

It holds for any law of the random effects, a learned flow's weights included, and where the model
is wrong; what it costs is an estimation for each replicate, here from the end of the first and
with its compiled program: replicate r weighs subject i by c_ri, how often i was drawn, (c_r1, ...,
c_rn) ~ Multinomial(n; 1/n, ..., 1/n), so that no shape changes.

References:
    Efron (1979), Annals of Statistics 7, 1; Thai, Mentré, Holford, Veyrat-Follet & Comets (2014),
    Journal of Pharmacokinetics and Pharmacodynamics 41, 15 (cases in mixed-effects models).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from flowme.garbage import set_aside
from flowme.infer.fit import Fit
from flowme.infer.joint import Joint
from flowme.infer.newton import Newton, newton_of
from flowme.infer.plan import FIRM
from flowme.infer.resampled import Bootstrap
from flowme.infer.starts import from_gaussian, gaussians
from flowme.infer.vem import VariationalEM
from flowme.primitives import replace_effect
from flowme.quick import soon


@set_aside()
def bootstrap(
    fit: Fit,
    key: jax.Array,
    replicates: int = 200,
    *,
    path: str | Path | None = None,
    group: int = 20,
    progress: bool = True,
    **options: Any,
) -> Bootstrap:
    """Estimates from `replicates` studies whose subjects are drawn from that of the fit.

    Each is a Newton iteration from the estimate. With a learned flow it is the whole estimation:
    the Gaussian by Newton's method, then as many updates of the flow, from its start, as held-out
    subjects chose for the fit (`fit.selected`; they are not asked again, so that the spread does
    not hold that choice), `group` replicates side by side.

    Args:
        fit: a fitted model.
        key: random key; is consumed. Replicate r depends on it and on r alone.
        replicates: how many; 50 for standard errors, some hundreds for intervals.
        path: a file (`.npz`) to which every finished group is written, and which is taken up again
            by the same call with the same result.
        group: replicates between two writings.
        progress: show a progress bar. Interrupting (Ctrl-C) returns the groups that are finished.
        **options: of `VariationalEM`, those of the fit.

    Raises:
        ValueError: fewer than 2 replicates, or the file is of another bootstrap.
    """
    if replicates < 2 or group < 1:
        raise ValueError(f"expected at least 2 replicates, groups of 1; got {replicates}, {group}.")
    counts = _draw(key, replicates, fit.study.subjects.size)
    vem = VariationalEM(fit.joint.model, use_priors=fit.use_priors, **options)
    engine: Any = _Climb.of(vem, fit)
    if fit.selected:
        engine = _Relearn.of(vem, fit)
    file = _File.of(path, fit, key)
    done = file.read()
    messages: tuple[str, ...] = ()
    with tqdm(total=replicates, initial=len(done), desc="Bootstrap", disable=not progress) as bar:
        try:
            while len(done) < replicates:
                new = range(len(done), min(len(done) + group, replicates))
                done += engine.run([jax.random.fold_in(key, r) for r in new], counts[new])
                file.write(done)
                bar.update(len(new))
        except KeyboardInterrupt:
            messages = (f"stopped by the user after {len(done)} of {replicates} replicates",)
    done = done[:replicates]
    theta, weights, converged = jax.tree.map(lambda *x: np.stack(x), *done) if done else _no(fit)
    if failed := int(np.sum(~converged)):
        messages += (f"{failed} of {len(done)} replicates did not converge and are left out.",)
    return Bootstrap(fit, theta, weights, counts[: len(done)], converged.astype(bool), messages)


def _no(fit: Fit):
    weights = {name: np.zeros((0, np.size(w))) for name, w in fit.weights.items()}
    return np.zeros((0, fit.joint.size)), weights, np.zeros(0, bool)


def _draw(key: jax.Array, replicates: int, size: int) -> np.ndarray:
    """How often each subject is drawn, `[replicate, subject]`."""
    counts = []
    for r in range(replicates):
        drawn = jax.random.randint(jax.random.fold_in(key, r), (size,), 0, size)
        counts.append(np.bincount(np.asarray(drawn), minlength=size))
    return np.stack(counts).astype(float)


_FITS = 60.0  # as much work as 200 replicates, which begin near their ends
_Estimate = tuple[np.ndarray, dict[str, Any], np.ndarray]  # θ, flow weights, whether it converged


class _Climb(NamedTuple):
    """Newton's method from the estimate, subjects weighed by their counts."""

    newton: Newton
    fit: Fit

    @classmethod
    def of(cls, vem: VariationalEM, fit: Fit) -> _Climb:
        newton = newton_of(
            fit.joint, fit.theta, fit.weights, fit.study,
            use_priors=fit.use_priors, points=vem.points, chunk=vem.chunk, fits=_FITS,
        )  # fmt: skip
        return cls(newton, fit)

    def run(self, keys: list[jax.Array], counts: np.ndarray) -> list[_Estimate]:
        fit, found = self.fit, []
        weights = {name: np.asarray(w) for name, w in fit.weights.items()}
        for count in counts:
            state, converged = self.climb(count)
            found.append((state.theta, weights, np.asarray(converged)))
        return found

    def climb(self, count: np.ndarray):
        """The maximum for these counts."""
        newton, key, fit = self.newton._replace(counts=count), jax.random.key(0), self.fit
        modes = fit.conditional.mean
        state = newton.near(key, fit.theta, fit.weights, fit.study, modes)
        return newton.finish(key, state, fit.weights, fit.study)


class _Relearn(NamedTuple):
    """The flow learned anew from the Gaussian estimate of each resampled study."""

    gaussian: _Climb
    program: Any  # update of all states, compiled
    learn: Any
    fit: Fit
    names: tuple[str, ...]  # the random effects with a flow

    @classmethod
    def of(cls, vem: VariationalEM, fit: Fit) -> _Relearn:
        laws = {n: law for n, law in fit.joint.roles.laws.items() if f"{n}_weights" in fit.weights}
        joint = Joint.of(replace_effect(fit.joint.model, **gaussians(laws)), fit.study)
        known = {k: v for k, v in fit.params.items() if k in joint.roles.population}
        start = np.asarray(joint.unconstrain(known))
        newton = newton_of(
            joint, start, {}, fit.study, use_priors=fit.use_priors, chunk=vem.chunk, fits=_FITS
        )
        key = jax.random.key(0)
        state, _ = newton.finish(key, newton.start(key, start, {}, fit.study), {}, fit.study)
        first = dataclasses.replace(
            fit,
            joint=joint,
            theta=state.theta,
            weights={},
            conditional=state.evaluation.conditional,
        )
        learn = vem._learn(fit.joint, _Climb.of(vem, fit).newton.engine.references)
        everyone = np.ones(fit.study.subjects.size)
        dependence = FIRM if fit.dependence is None else fit.dependence

        def update(key, state, rows):
            study = jax.tree.map(lambda x: jnp.asarray(x)[rows], fit.study)
            return learn.update(key, state, everyone, dependence, study)

        return cls(_Climb(newton, first), soon(jax.vmap(update)), learn, fit, tuple(laws))

    def run(self, keys: list[jax.Array], counts: np.ndarray) -> list[_Estimate]:
        rows, states, converged = [], [], []
        for key, count in zip(keys, counts, strict=True):
            state, ended = self.gaussian.climb(count)
            rows.append(np.repeat(np.arange(len(count)), count.astype(int)))
            states.append(self._start(key, state, rows[-1]))
            converged.append(ended)
        state = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *states)
        for number in range(int(self.fit.selected or 0) - 1):  # number 0 is the Gaussian itself
            now = jnp.stack([jax.random.fold_in(key, number) for key in keys])
            state = self.program(now, state, np.stack(rows))
        theta, weights = np.asarray(state.theta), jax.tree.map(np.asarray, state.weights)
        usable = np.array(converged) & np.isfinite(theta).all(1)
        return [
            (theta[r], {name: w[r] for name, w in weights.items()}, usable[r])
            for r in range(len(keys))
        ]

    def _start(self, key, state, rows: np.ndarray):
        """Where the learning starts, given the Gaussian estimate."""
        joint, conditional = self.fit.joint, state.evaluation.conditional
        first: Any = dataclasses.replace(
            self.gaussian.fit, theta=state.theta, conditional=conditional
        )
        known = {k: v for k, v in self.fit.params.items() if k in joint.roles.population}
        laws = {n: joint.roles.laws[n] for n in self.names}
        values, weights = from_gaussian(key, joint, laws, {}, first, rows)
        own = jax.tree.map(lambda x: x[rows], conditional)
        return self.learn.start(joint.unconstrain({**known, **values}), weights, own)


class _File(NamedTuple):
    """Where finished replicates are kept."""

    path: Path | None
    identity: str
    sites: tuple[str, ...]

    @classmethod
    def of(cls, path: str | Path | None, fit: Fit, key: jax.Array) -> _File:
        digest = hashlib.sha256(np.asarray(jax.random.key_data(key)).tobytes())
        for leaf in jax.tree.leaves((fit.theta, fit.weights, fit.study)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        if path is not None:
            path = Path(path)
            path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
        return cls(path, digest.hexdigest(), tuple(fit.weights))

    def read(self) -> list[_Estimate]:
        if self.path is None or not self.path.exists():
            return []
        with np.load(self.path) as file:
            if str(file["identity"]) != self.identity:
                raise ValueError(
                    f"expected {self.path} to hold replicates of this fit with this key; got "
                    "those of another. Name another file, or delete it to begin anew."
                )
            theta, converged = file["theta"], file["converged"]
            weights = {site: file[f"weights:{site}"] for site in self.sites}
        return [
            (theta[r], {site: w[r] for site, w in weights.items()}, converged[r])
            for r in range(len(theta))
        ]

    def write(self, done: list[_Estimate]) -> None:
        if self.path is None:
            return
        theta, weights, converged = jax.tree.map(lambda *x: np.stack(x), *done)
        arrays = {f"weights:{site}": w for site, w in weights.items()}
        half = self.path.with_suffix(".half.npz")  # a file half written is never read
        np.savez_compressed(
            half, identity=np.array(self.identity), theta=theta, converged=converged, **arrays
        )
        os.replace(half, self.path)
