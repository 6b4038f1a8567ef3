"""Normalizing flows: distrax bijectors with flax conditioners, as architectures of flat weights.

An architecture is a frozen, hashable description (how many layers, how wide). It holds no weights:
`init(key, dim)` draws a flat vector of them and `bijector(weights, dim)` rebuilds the distrax
bijector u = T(z) they stand for. Distrax objects are rebuilt where they are used and never cross
a `jit` or `vmap` boundary, which some of them cannot.

A flow may read covariates x `[covariate]` (`context` of them): u = T(z; x), a law for each x. Its
conditioners then see x beside what they saw, its marginals are those that a small network gives
for x, and so is the factor by which the scale of each coordinate differs, `spread`.

Every architecture starts exactly at the identity: the last layer of each conditioner is zero.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowme.quantile import MixtureQuantile, fit_marginals

_LAST = "last"  # the name of the layer that gives the splines' parameters


class Flow(abc.ABC):
    """A normalizing flow u = T(z) on R^dim, described without its weights.

    To write another one, subclass it as a frozen dataclass and define `_layers(dim)`, the flax
    conditioner of each layer with an example of its input, and `_chain(conditioners, dim)`, the
    distrax bijectors in the order in which z passes through them. `standard` says that E u = 0 and
    Cov u = I whatever the weights, so that nobody needs to compute them.
    """

    standard: ClassVar[bool] = False
    context = 0  # covariates that the flow reads

    @abc.abstractmethod
    def _layers(self, dim: int) -> list[tuple[nn.Module, jax.ShapeDtypeStruct]]: ...

    @abc.abstractmethod
    def _chain(self, conditioners: list[Any], dim: int) -> list[distrax.Bijector]: ...

    def reading(self, covariates: int) -> Flow:
        """The same architecture, reading so many covariates."""
        if "context" not in {field.name for field in dataclasses.fields(self)}:  # type: ignore
            raise ValueError(
                f"expected a flow that can read covariates; got {self}. SplineCoupling and "
                "MarginalMixture can."
            )
        return dataclasses.replace(self, context=covariates)  # type: ignore

    def _modules(self, dim: int) -> list[tuple[nn.Module, jax.ShapeDtypeStruct]]:
        """The layers and, of a flow that reads covariates, the one that gives the spread."""
        layers = self._layers(dim)
        if self.context:
            covariates = jax.ShapeDtypeStruct((self.context,), jnp.zeros(()).dtype)
            layers.append((_Spread(dim), covariates))
        return layers

    def _shapes(self, dim: int) -> Any:
        keys = jax.eval_shape(lambda: jax.random.key(0))
        return [
            jax.eval_shape(module.init, keys, example) for module, example in self._modules(dim)
        ]

    def size(self, dim: int) -> int:
        """Number of weights for `dim` dimensions."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._shapes(dim)))

    def init(self, key: jax.Array, dim: int) -> jax.Array:
        """Starting weights `[weight]`: random hidden layers, zero last layers (T = identity)."""
        layers = self._modules(dim)
        keys = jax.random.split(key, len(layers))
        variables = [
            module.init(k, jnp.zeros(example.shape, example.dtype))
            for k, (module, example) in zip(keys, layers, strict=True)
        ]
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(variables)])

    def start(self, key: jax.Array, z: np.ndarray, subjects: int) -> jax.Array:
        """Weights to learn from, given draws z `[draw, dim]` of a standardised law, from
        `subjects` subjects. By default those of `init`."""
        del subjects
        return self.init(key, z.shape[1])

    def groups(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights that make one coordinate depart from the Gaussian, or depend on the others.

        A penalty on the norm of each group keeps what the data do not ask for exactly as it was.

        Returns:
            The group of every weight `[weight]`, -1 for weights of hidden layers; and for every
            group whether it is one of dependence (True) or of a marginal shape (False), `[group]`.
        """
        number: list[np.ndarray] = []
        kinds: list[bool] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._shapes(dim)):
            name = jax.tree_util.keystr(path)
            if _LAST not in name:
                number.append(np.full(math.prod(leaf.shape), -1))
                continue
            # The last axis runs over (coordinate, its parameters).
            module = self._modules(dim)[path[0].idx][0]
            coordinates = leaf.shape[-1] // module.parameters
            own = len(kinds) + np.repeat(np.arange(coordinates), module.parameters)
            number.append(np.broadcast_to(own, leaf.shape).ravel())
            coupled = name.endswith("['kernel']") and not isinstance(module, _Given | _Spread)
            kinds += [coupled] * coordinates
        return np.concatenate(number), np.array(kinds)

    def prior_scale(self, dim: int) -> np.ndarray:
        """How far each weight may be from 0 relative to the others, `[weight]`, for the law to be
        as free with wide networks as with narrow ones."""
        return np.ones(self.size(dim))

    def bijector(
        self, weights: jax.Array, dim: int, x: jax.Array | None = None
    ) -> distrax.Bijector:
        """The bijector T whose weights are `weights`, on events of shape `[dim]`; of a flow that
        reads covariates that at x `[..., covariate]`, on events `[..., dim]`."""
        conditioners = self._conditioners(weights, dim, x)[: len(self._layers(dim))]
        # distrax.Chain applies its last element first.
        return distrax.Chain(self._chain(conditioners, dim)[::-1])

    def spread(self, weights: jax.Array, dim: int, x: jax.Array) -> jax.Array:
        """The factor of the scale of each coordinate at x `[..., covariate]`: `[..., dim]`, 1 at
        x = 0."""
        return jnp.exp(self._conditioners(weights, dim, x)[-1](jnp.zeros(0)))

    def _conditioners(self, weights: jax.Array, dim: int, x: jax.Array | None) -> list[Any]:
        """The conditioner of each layer, with its weights; it sees x beside its input."""
        if (x is None) != (self.context == 0) or (x is not None and x.shape[-1] != self.context):
            raise ValueError(
                f"expected {self.context or 'no'} covariates for {self}; got "
                f"{'none' if x is None else f'shape {list(x.shape)}'}."
            )
        leaves, tree = jax.tree.flatten(self._shapes(dim))
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        if weights.shape != (sum(sizes),):
            raise ValueError(
                f"expected {sum(sizes)} weights for {self} in {dim} dimensions; got shape "
                f"{list(weights.shape)}. Draw them with `flow.init(key, {dim})`."
            )
        parts = jnp.split(weights, np.cumsum(sizes)[:-1])
        pieces = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        variables = jax.tree.unflatten(tree, pieces)
        return [
            lambda z, module=module, v=v: module.apply(v, _beside(z, x))
            for (module, _), v in zip(self._modules(dim), variables, strict=True)
        ]


def _beside(z: jax.Array, x: jax.Array | None) -> jax.Array:
    """z and x side by side, along the last axis."""
    if x is None:
        return z
    batch = jnp.broadcast_shapes(z.shape[:-1], x.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(y, (*batch, y.shape[-1])) for y in (z, x)], -1)


class _Conditioner(nn.Module):
    """x -> spline parameters `[transformed, 3 bins + 1]`; zero at the start (identity spline)."""

    width: int
    depth: int
    transformed: int
    parameters: int
    shapes: bool  # whether it may move a coordinate that depends on no other

    @nn.compact
    def __call__(self, x):
        dtype = x.dtype
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(self.width, dtype=dtype, param_dtype=dtype)(x))
        last = nn.Dense(
            self.transformed * self.parameters,
            dtype=dtype,
            param_dtype=dtype,
            kernel_init=nn.initializers.zeros,  # so that the flow starts at the identity
            use_bias=self.shapes,
            name=_LAST,
        )
        return last(x).reshape(*x.shape[:-1], self.transformed, self.parameters)


class _Given(_Conditioner):
    """The parameters of marginals, given covariates alone."""


class _Spread(nn.Module):
    """x -> logarithm of the factor of each scale, `[dim]`; 0 at x = 0, and at the start."""

    dim: int
    parameters = 1

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        last = nn.Dense(
            self.dim, dtype=x.dtype, param_dtype=x.dtype, kernel_init=zeros, use_bias=False,
            name=_LAST,
        )  # fmt: skip
        return last(x)


def _marginals(dim: int, components: int, width: int, context: int):
    """The layer of marginal mixtures: free, or given `context` covariates."""
    module: nn.Module = _Free(dim, 3 * components)
    if context:
        module = _Given(width, 1, dim, 3 * components, shapes=True)
    return module, jax.ShapeDtypeStruct((context,), jnp.zeros(()).dtype)


@dataclasses.dataclass(frozen=True)
class SplineCoupling(Flow):
    """Rational-quadratic-spline coupling layers (Durkan et al. 2019, arXiv 1906.04032).

    A layer keeps one half of the coordinates, z_A, and moves each of the others by a monotone
    spline on [-bound, bound] whose knots a network reads off z_A; outside it is the identity.
    Layers swap the halves. A last layer shapes the marginals: the quantile function of a mixture
    of Gaussians in each coordinate (`flowme.quantile`), so that the splines are for dependence.

    Args:
        layers: number of coupling layers; at least 2, so that every coordinate is moved.
        width: hidden units per layer of a conditioner.
        depth: hidden layers of a conditioner.
        bins: bins of each spline.
        bound: half width of the splines' range, in standard deviations of the base.
        components: of the mixture that shapes each marginal; 0: none, the splines do it.
        context: covariates that it reads.
    """

    layers: int = 2
    width: int = 64
    depth: int = 1
    bins: int = 4
    bound: float = 3.0
    components: int = 3
    context: int = 0

    def __post_init__(self):
        _check_counts(self, "layers", "width", "depth", "bins")
        if not isinstance(self.components, int) or self.components < 0 or self.components == 1:
            raise ValueError(
                f"expected components to be 0 (none) or at least 2; got {self.components!r}."
            )
        if self.layers < 2:
            raise ValueError(
                f"expected at least 2 layers, so that every coordinate is moved; got {self.layers}."
            )

    def _layers(self, dim):
        if dim < 2:
            raise ValueError(
                f"expected at least 2 dimensions for a coupling flow; got {dim}. "
                "Use `flows.MonotoneSpline()` for a single random effect."
            )
        dtype = jnp.zeros(()).dtype
        layers = []
        for number in range(self.layers):
            kept = dim // 2 if number % 2 == 0 else dim - dim // 2
            module = _Conditioner(
                self.width, self.depth, dim - kept, 3 * self.bins + 1, not self.components
            )
            layers.append((module, jax.ShapeDtypeStruct((kept + self.context,), dtype)))
        if self.components:
            layers.append(_marginals(dim, self.components, self.width, self.context))
        return layers

    def start(self, key, z, subjects):
        return _with_marginals(self, self.init(key, z.shape[1]), z, subjects)

    def prior_scale(self, dim):
        group, depends = self.groups(dim)
        summed = (group >= 0) & depends[group]  # over the hidden units
        return np.where(summed, np.sqrt(8 / self.width), 1.0)

    def _chain(self, conditioners, dim):
        couplings = conditioners[: self.layers]
        marginals = [
            _quantile(conditioner, dim, self.components)
            for conditioner in conditioners[self.layers :]
        ]
        return [
            distrax.SplitCoupling(
                split_index=dim // 2,
                event_ndims=1,
                conditioner=conditioner,
                bijector=lambda parameters: _spline(parameters, self.bound),
                swap=number % 2 == 1,
            )
            for number, conditioner in enumerate(couplings)
        ] + marginals


class _Free(nn.Module):
    """Parameters that depend on nothing: `[dim, parameter]`, zero at the start."""

    dim: int
    parameters: int

    @nn.compact
    def __call__(self, x):
        shape = (self.dim * self.parameters,)
        knots = self.param(_LAST, nn.initializers.zeros, shape, x.dtype)
        return knots.reshape(self.dim, self.parameters)


@dataclasses.dataclass(frozen=True)
class MonotoneSpline(Flow):
    """A monotone rational-quadratic spline per coordinate: the flow for one random effect.

    In several dimensions the coordinates stay independent before the scale matrix is applied.

    Args:
        bins: bins of the spline.
        bound: half width of its range, in standard deviations of the base.
    """

    bins: int = 4
    bound: float = 3.0

    def __post_init__(self):
        _check_counts(self, "bins")

    def _layers(self, dim):
        example = jax.ShapeDtypeStruct((dim,), jnp.zeros(()).dtype)
        return [(_Free(dim, 3 * self.bins + 1), example)]

    def _chain(self, conditioners, dim):
        knots = conditioners[0](jnp.zeros(dim))
        return [distrax.Block(_spline(knots, self.bound), 1)]


@dataclasses.dataclass(frozen=True)
class MarginalMixture(Flow):
    """The quantile function of a mixture of Gaussians per coordinate (`flowme.quantile`): the
    flow for one random effect.

    In several dimensions the coordinates stay independent before the scale matrix is applied.

    Args:
        components: of each mixture.
        width: hidden units of the network that gives them for covariates, where it reads some.
        context: covariates that it reads.
    """

    components: int = 3
    width: int = 4
    context: int = 0
    standard: ClassVar[bool] = (
        True  # F is standardised (`flowme.quantile`), coordinates independent
    )

    def __post_init__(self):
        _check_counts(self, "components", "width")

    def _layers(self, dim):
        return [_marginals(dim, self.components, self.width, self.context)]

    def start(self, key, z, subjects):
        return _with_marginals(self, self.init(key, z.shape[1]), z, subjects)

    def _chain(self, conditioners, dim):
        return [_quantile(conditioners[0], dim, self.components)]


def _quantile(conditioner: Any, dim: int, components: int) -> MixtureQuantile:
    parameters = conditioner(jnp.zeros(0))
    return MixtureQuantile(parameters.reshape(*parameters.shape[:-2], dim, 3, components))


def _with_marginals(flow: Any, weights: jax.Array, z: np.ndarray, subjects: int) -> jax.Array:
    """The weights, those of the marginals (at x = 0) fitted to the draws z."""
    if not flow.components:
        return weights
    # Equal components would stay equal for every x, and the mixture of laws that differ by x may
    # look Gaussian: a flow that reads covariates starts from components that differ.
    marginals = fit_marginals(z, flow.components, subjects, always=flow.context > 0).ravel()
    end = len(weights)
    if flow.context:  # behind them stand how they depend on x, and the spread
        end -= flow.width * marginals.size + flow.context * z.shape[1]
    return weights.at[end - marginals.size : end].set(marginals)


def _spline(parameters: jax.Array, bound: float) -> distrax.Bijector:
    return distrax.RationalQuadraticSpline(
        parameters, range_min=-bound, range_max=bound, boundary_slopes="identity"
    )


def _check_counts(flow: Flow, *fields: str) -> None:
    for field in fields:
        value = getattr(flow, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {field} to be a positive integer; got {value!r}.")
