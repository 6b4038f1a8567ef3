"""The words of a flowme model: population, random_effect, individual, observe.

Each issues ordinary NumPyro statements, so that every NumPyro handler and inference method works
on the model. What flowme must know besides (units, starting values, component names) travels in
the `infer` dictionary of the site, under the key "flowme".
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.primitives import Messenger, apply_stack

from flowme.censoring import Censored
from flowme.effects import RandomEffect
from flowme.per_occasion import PerOccasion
from flowme.study import Occasions, Study, Subjects
from flowme.where import where


def population(
    name: str,
    prior: dist.Distribution,
    *,
    init: float | None = None,
    fixed: float | None = None,
    unit: str = "",
    label: str = "",
) -> jax.Array:
    """A population parameter: `numpyro.sample(name, prior)` with what an estimation needs.

    Under maximum likelihood `prior` gives the support and, by its median, the starting value; and
    where the likelihood has several maxima, it says which is reported. Under MAP and full Bayes it
    is the prior.

    Args:
        name: name of the parameter.
        prior: its prior.
        init: starting value, in place of the prior's median.
        fixed: a value to hold it at; it is then not estimated.
        unit: its unit, for tables and plots.
        label: its name in tables and plots.

    Raises:
        ValueError: `init` or `fixed` outside the support of `prior`.
    """
    if not isinstance(prior, dist.Distribution):
        raise TypeError(
            f"expected a NumPyro distribution as the prior of population parameter {name!r}; "
            f"got {prior!r}. To hold it at a value, give a prior and `fixed={prior!r}`."
        )
    for what, value in (("init", init), ("fixed", fixed)):
        if value is not None and not _within(prior.support, value):
            raise ValueError(
                f"expected {what} of population parameter {name!r} within the support of its "
                f"prior, {prior.support}; got {value}."
            )
    if fixed is not None:
        return numpyro.deterministic(name, jnp.asarray(fixed, float))
    about = {"role": "population", "init": init, "unit": unit, "label": label}
    return numpyro.sample(name, prior, infer={"flowme": about})


def _within(support, value) -> bool:
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(support(jnp.asarray(value, float))))


def random_effect(
    name: str,
    effect: dist.Distribution,
    subjects: Subjects | Occasions,
    names: Sequence[str] | None = None,
) -> Any:
    """Random effects η_i of every subject, and the parameters of their distribution; or κ_ik of
    every occasion.

    The parameters that a `RandomEffect` learns become population-level sites `{name}_{parameter}`
    (`eta_omega`, `eta_corr_cholesky`, ...) and, for a flow, the `numpyro.param` `{name}_weights`.
    Then η is sampled in the plate "subject", at the site `name` of shape `[subject, effect]`.

    Between occasions, κ_i1, κ_i2, ... are independent draws of the same law, of which the site
    holds all, `[subject, occasion effect]` (see `flowme.per_occasion`). Levels add up: one
    statement for the subjects, one for each of `study.occasions`.

    Args:
        name: name of the random effect, `"eta"`.
        effect: its distribution: a flowme one, or any NumPyro distribution with real support
            and event shape `[effect]` (its parameters being statements of the model).
        subjects: `study.subjects`; or `study.occasions["OCC"]` for effects between occasions, of
            which `effect` is one of flowme's distributions.
        names: names of the components; needed when `effect` is not a flowme one.

    Returns:
        A named tuple of arrays, one per component: `eta.ka`, `[subject]`; between occasions those
        in force at each record, `[subject, time]`.
    """
    # A message without "name" passes NumPyro's handlers untouched; `replace_effect` answers it.
    message = {"type": "random_effect", "effect": name, "value": None, "fn": lambda: effect}
    effect = apply_stack({**message, "args": (), "kwargs": {}})["value"]
    if isinstance(subjects, Occasions) and not isinstance(effect, RandomEffect):
        raise TypeError(
            f"expected one of flowme's distributions for random effect {name!r} between "
            f"occasions, such as fm.GaussianRandomEffect(['CL']); got {effect!r}."
        )
    if isinstance(effect, RandomEffect):
        names, effect = effect.names, _learned(name, effect)
    if not isinstance(effect, dist.Distribution):
        raise TypeError(
            f"expected a distribution for random effect {name!r}, such as "
            f"fm.GaussianRandomEffect(['ka', 'V']); got {effect!r}."
        )
    if names is None or effect.event_shape != (len(names),):
        raise ValueError(
            f"expected random effect {name!r} to have event shape [effect] and one name per "
            f"component, `names=[...]`; got event shape {list(effect.event_shape)} and names "
            f"{names}."
        )
    if effect.batch_shape not in ((), (subjects.size,)):
        raise ValueError(
            f"expected random effect {name!r} to have one law, or one for each of {subjects.size} "
            f"subjects; got batch shape {list(effect.batch_shape)}. A context is of the subjects "
            "of one study: write it in the model, not in replace_effect."
        )
    about: dict[str, Any] = {"role": "effect", "names": tuple(names)}
    if isinstance(subjects, Occasions):
        if effect.batch_shape:
            raise ValueError(
                f"expected one law for random effect {name!r} between occasions; got batch shape "
                f"{list(effect.batch_shape)}: give the context to the effects of the subjects."
            )
        effect = PerOccasion(effect, subjects.most)
        about |= {"names": effect.names, "present": subjects.present}
    with subject_plate(subjects):
        eta = numpyro.sample(name, effect, infer={"flowme": about})
    if isinstance(subjects, Occasions):
        eta = jnp.take_along_axis(effect.each(eta), subjects.index[..., None], axis=1)
    return namedtuple(name, names)(*(eta[..., j] for j in range(len(names))))  # type: ignore


def _learned(name: str, effect: RandomEffect) -> RandomEffect:
    """`effect` with its parameters registered as sites of the model."""
    values = {}
    for parameter, prior in effect.priors().items():
        about = {"role": "population", "init": getattr(effect, parameter), "effect": name}
        values[parameter] = numpyro.sample(f"{name}_{parameter}", prior, infer={"flowme": about})
    if effect.network:
        values["weights"] = numpyro.param(f"{name}_weights", effect.weights)  # type: ignore
    return effect.with_parameters(**values)


class replace_effect(Messenger):
    """A handler: the same model with another distribution of its random effects.

    `replace_effect(model, eta=fm.FlowRandomEffect(["ka", "V", "CL"]))` is the model with that
    one line changed. Two of the same model with the same distributions are equal, so that a
    program compiled for one serves the other; one of a model that is changed already is a change
    of the model as it was, and has the last word.
    """

    def __init__(self, fn: Callable | None = None, **effects: dist.Distribution):
        if isinstance(fn, replace_effect):
            before: Any = fn
            fn, effects = before.fn, {**before.effects, **effects}
        super().__init__(fn)
        self.effects = effects

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, replace_effect) or self.fn != other.fn:
            return False
        own, others = jax.tree.leaves(self.effects), jax.tree.leaves(other.effects)
        trees: list[Any] = [jax.tree.structure(x.effects) for x in (self, other)]
        if trees[0] != trees[1] or any(isinstance(x, jax.core.Tracer) for x in own + others):
            return self is other
        return all(np.array_equal(a, b) for a, b in zip(own, others, strict=True))

    def __hash__(self) -> int:
        return hash((self.fn, *sorted(self.effects)))

    def process_message(self, msg):
        if msg["type"] == "random_effect" and msg["effect"] in self.effects:
            msg["value"] = self.effects[msg["effect"]]


def individual(subjects: Subjects, *, name: str = "psi", **parameters: ArrayLike) -> Any:
    """Individual parameters ψ_i, named: what the structural model is a function of.

    Args:
        subjects: `study.subjects`.
        name: name of the site that records them, `[subject, parameter]`; not that of another.
        **parameters: each a number (the same for all), an array `[subject]`, or, where it changes
            in time, `[subject, time]`: its value from each record to the next.

    Returns:
        A named tuple of arrays `[subject]` or `[subject, time]`: `psi.ka`. The site holds those
        at every record, `[subject, time, parameter]`, if one of them changes.
    """
    if not parameters:
        raise ValueError("expected at least one individual parameter, such as V=V * exp(eta.V).")
    if name in parameters:
        raise ValueError(
            f"expected a site name other than those of the parameters, {list(parameters)}; got "
            f"{name!r}, which is probably a population parameter too. Give another one, such as "
            "name='individual'."
        )
    arrays = {}
    for key, value in parameters.items():
        shape = jnp.shape(value)
        if shape[:1] not in ((), (subjects.size,)) or len(shape) > 2:
            raise ValueError(
                f"expected individual parameter {key!r} to be a number or of shape [subject] = "
                f"[{subjects.size}] or [subject, time]; got shape {list(shape)}."
            )
        arrays[key] = jnp.broadcast_to(jnp.asarray(value, float), shape or (subjects.size,))
    # A message without "name", as in `random_effect`; `flowme.infer.references` answers it.
    given = dict(arrays)
    message: dict[str, Any] = {"type": "individual", "value": None, "fn": lambda: given}
    arrays = apply_stack({**message, "args": (), "kwargs": {}})["value"]
    times = {key: x.shape[1] for key, x in arrays.items() if x.ndim == 2}
    if len(set(times.values())) > 1:
        raise ValueError(
            f"expected individual parameters [subject, time] with the same times; got {times}."
        )
    both = [x[:, None] if times and x.ndim == 1 else x for x in arrays.values()]
    stacked = jnp.stack(jnp.broadcast_arrays(*both), -1)
    _record(name, stacked, role="individual", names=tuple(arrays), changes=bool(times))
    return namedtuple(name, list(arrays))(**arrays)  # type: ignore


def observe(name: str, law: dist.Distribution, study: Study) -> jax.Array:
    """The observations of outcome `name`, given their law: one log-likelihood per subject.

    log p(y_i | ψ_i) = Σ_j log p(y_ij | f_ij) over the times at which subject i was measured;
    padding and times at which only other outcomes were measured do not count. A censored
    observation (`study.censored`) contributes the probability of the interval in which it lies,
    see `flowme.censoring`. In a study without values (`study.unobserved()`) the outcome is
    sampled, as it is before it is censored.

    Args:
        name: an outcome of the study.
        law: distribution of the observations, of batch shape `[subject, time]`; a continuous one
            with a cdf if some are censored.
        study: the study.

    Returns:
        The observed (or sampled) values `[subject, time]`.
    """
    if name not in study.observed:
        raise ValueError(
            f"expected an outcome of the study, one of {sorted(study.observed)}; got {name!r}."
        )
    mask = study.observed[name]
    if law.batch_shape != jnp.shape(mask) or law.event_shape:
        raise ValueError(
            f"expected a law of batch shape [subject, time] = {list(jnp.shape(mask))} for outcome "
            f"{name!r}; got batch shape {list(law.batch_shape)} and event shape "
            f"{list(law.event_shape)}. A prediction per time needs [:, None] on what is "
            "per subject."
        )
    values = study.values.get(name)
    if values is not None:
        if name in study.censored:
            law = Censored(law, study.censored[name], study.limit.get(name))
        law, values = _fill_unobserved(law, jnp.asarray(values), jnp.asarray(mask))
        if isinstance(law, dist.CategoricalProbs | dist.CategoricalLogits):
            values = values.astype(int)  # NumPyro's categories are indices
    with subject_plate(study.subjects):
        return numpyro.sample(
            name,
            law.mask(mask).to_event(1),
            obs=values,
            infer={"flowme": {"role": "outcome"}},
        )


def _fill_unobserved(law, values, mask):
    """Cells that do not count get the law and value of one that does, of the same subject if any.

    They are masked all the same; but a prediction of 0 there, under a proportional error, would
    be an infinite log density whose masked gradient is NaN. (Where none counts at all, that may
    be so: what follows from such a law is up to `flowme.infer.joint.outcomes`.)
    """
    size, count = mask.shape
    cell = jnp.arange(size * count).reshape(size, count)
    first = jnp.min(where(mask, cell, size * count), axis=1)
    first = jnp.minimum(where(mask.any(1), first, jnp.min(first)), size * count - 1)
    cell = where(mask, cell, first[:, None])

    def fill(leaf):
        if jnp.ndim(leaf) != 2 or leaf.shape[-1] != count:
            return leaf
        every = jnp.broadcast_to(leaf, mask.shape).reshape(-1)
        return every.at[cell].get(mode="promise_in_bounds", wrap_negative_indices=False)

    return jax.tree.map(fill, law), fill(values)


def subject_plate(subjects: Subjects | Occasions) -> numpyro.plate:
    """`numpyro.plate("subject", ...)`: statements in it are one per subject."""
    return numpyro.plate("subject", subjects.size, dim=-1)


def _record(name: str, value: jax.Array, **about: Any) -> None:
    """`numpyro.deterministic`, with something said about the site."""
    apply_stack(
        {
            "type": "deterministic",
            "name": name,
            "value": value,
            "cond_indep_stack": [],
            "infer": {"flowme": about},
        }
    )
