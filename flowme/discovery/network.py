"""Reaction networks: a set of reactions with rate constants, and the ODE they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .conservation import conserved
from .reaction import Reaction, check_names

_CONSTANTS = {"mass action": (), "michaelis-menten": ("K",), "hill": ("K", "n")}


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class ReactionNetwork:
    r"""Reactions r = 1..R with rates k_r between S species, that is, the ODE

    .. math:: \dot x = \sum_r k_r\, v_r(x)\, (y'_r - y_r),

    where :math:`v_r(x) = x^{y_r}` by mass action; `Reaction` has the other rate laws. The network
    is a structural model, `fm.solve(network, psi, study, initial=x0)` with the species as states:
    a parameter that `psi` names is individual, the others are the network's own. With all its own
    parameters it is `fm.solve(network, (), study, initial=x0)`.

    It is a pytree whose leaves are the parameters. Two networks are equal, and hash equally, when
    they have the same reactions, whatever their order, the species' and the *values* of the
    parameters, so that networks are keys of a cache of fits. `same_ode` compares values also.

    Args:
        reactions: reactions, or their text, each with its rate k (1 / (time concentration^(m - 1))
            where m molecules are consumed); of a saturating rate law (k, K) or (k, K, n), where K
            is a concentration and n > 0. Or the reactions alone, whose parameters are then 1.
        rates: the parameters of each reaction, if `reactions` are reactions alone.
        species: names of the species, in the order of the states; by name if None. Those that no
            reaction has stay constant.
        names: names of the rates; k1, k2, ... if None. The constants of the third reaction
            are K3 and n3.

    Attributes:
        reactions: the R reactions, as given.
        species: the S names.
        names: the names of the rates, one for each reaction.
        parameters: values by name: the rates, and the rate laws' constants.

    >>> print(ReactionNetwork({"A -> 2A": 1.0, "A + B -> 2B": 0.5, "B -> 0": 0.8}))
    A -> 2A      k1 = 1
    A + B -> 2B  k2 = 0.5
    B -> 0       k3 = 0.8
    """

    reactions: tuple[Reaction, ...]
    species: tuple[str, ...]
    names: tuple[str, ...]
    parameters: dict[str, Any]

    def __init__(
        self,
        reactions: Mapping[Any, Any] | Iterable[Reaction | str],
        rates: Iterable[Any] | None = None,
        *,
        species: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ):
        if isinstance(reactions, str):
            raise ValueError(f"expected a list of reactions; got {reactions!r}: [{reactions!r}]?")
        parsed = tuple(Reaction.parse(r) if isinstance(r, str) else r for r in reactions)
        if isinstance(reactions, Mapping):
            if rates is not None:
                raise ValueError("expected rates once: as values of `reactions`, or as `rates`")
            rates = reactions.values()
        given = tuple(1.0 for _ in parsed) if rates is None else tuple(rates)
        called = tuple(names or (f"k{i + 1}" for i in range(len(parsed))))
        _check_reactions(parsed, given, called)
        values: dict[str, Any] = {}
        for i, (r, own, name) in enumerate(zip(parsed, given, called, strict=True)):
            values.update(_parameters(r, own, name, i + 1))
        _set(self, parsed, _species(parsed, species), called, values)

    @property
    def rates(self) -> tuple[Any, ...]:
        """The rate k_r of each reaction, in the order of `reactions`."""
        return tuple(self.parameters[name] for name in self.names)

    def names_of(self, r: int) -> tuple[str, ...]:
        """Names of the parameters of reaction r: of its k and, if its law has them, K and n."""
        kinds = _CONSTANTS[self.reactions[r].law]
        return self.names[r], *(f"{kind}{r + 1}" for kind in kinds)

    def constants(self, r: int) -> tuple[Any, ...]:
        """K, or K and n, of reaction r; nothing by mass action."""
        return tuple(self.parameters[name] for name in self.names_of(r)[1:])

    @property
    def net(self) -> np.ndarray:
        """y' - y, integers [R, S]."""
        return np.array(
            [[r.net.get(s, 0) for s in self.species] for r in self.reactions], int
        ).reshape(len(self.reactions), len(self.species))

    @property
    def conservation_laws(self) -> tuple[dict[str, int], ...]:
        """Independent c with Σ_s c_s x_s constant: {"E": 1, "C": 1}. See `conserved`."""
        return tuple(
            {s: c for s, c in zip(self.species, law, strict=True) if c}
            for law in conserved(self.net)
        )

    def replace(self, **values: Any) -> ReactionNetwork:
        """The same network with other values of the parameters named."""
        unknown = sorted(set(values) - set(self.parameters))
        if unknown:
            raise ValueError(
                f"expected parameters among {', '.join(self.parameters)}; got {', '.join(unknown)}"
            )
        new = object.__new__(type(self))
        _set(new, self.reactions, self.species, self.names, {**self.parameters, **values})
        return new

    def __call__(self, t: Any, amount: Any, psi: Any = ()) -> Array:
        """dx/dt, [state].

        Args:
            t: time; the ODE does not depend on it.
            amount: concentrations x of the species, [state].
            psi: individual parameters by name, a named tuple or mapping of scalars. Names that
                are no parameter of the network are left to the rest of the model.
        """
        del t
        values = {**self.parameters, **self._of(psi)}
        x = dict(zip(self.species, amount, strict=True))
        if not self.species:
            return jnp.zeros_like(jnp.asarray(amount))
        change = dict.fromkeys(self.species, jnp.zeros_like(jnp.asarray(amount[0])))
        for i, r in enumerate(self.reactions):
            k, *constants = (values[name] for name in self.names_of(i))
            v = k * _speed(r, x, *constants)
            for s, n in r.net.items():
                change[s] = change[s] + n * v
        return jnp.stack(list(change.values()))

    def _of(self, psi: Any) -> dict[str, Any]:
        """The parameters of the network that psi names."""
        given = psi._asdict() if hasattr(psi, "_asdict") else dict(psi)
        mine = {name: value for name, value in given.items() if name in self.parameters}
        if given and not mine:
            raise ValueError(
                f"expected psi to name some of {', '.join(self.parameters)}; got only "
                f"{', '.join(given)}. With the network's own parameters alone, psi is ()."
            )
        return mine

    def _structure(self) -> frozenset[Reaction]:
        return frozenset(self.reactions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReactionNetwork) and self._structure() == other._structure()

    def __hash__(self) -> int:
        return hash(self._structure())

    def __len__(self) -> int:
        return len(self.reactions)

    def __str__(self) -> str:
        written = [str(r) for r in self.reactions]
        width = max(map(len, written), default=0)
        lines = [f"{text:<{width}}  {self.written_rate(i)}" for i, text in enumerate(written)]
        return "\n".join(lines) or "no reactions"

    def written_rate(self, r: int) -> str:
        """Names and values of the parameters of reaction r: "k4 = 1, K4 = 2"."""
        return ", ".join(f"{p} = {_number(self.parameters[p])}" for p in self.names_of(r))

    def __repr__(self) -> str:
        return f"<ReactionNetwork {'; '.join(map(str, self.reactions))}>"


def _flatten(network: ReactionNetwork) -> tuple[Any, Any]:
    static = (network.reactions, network.species, network.names, tuple(network.parameters))
    keys = map(jax.tree_util.DictKey, network.parameters)
    return tuple(zip(keys, network.parameters.values(), strict=True)), static


def _unflatten(static: Any, values: Any) -> ReactionNetwork:
    *structure, keys = static
    new = object.__new__(ReactionNetwork)
    _set(new, *structure, dict(zip(keys, values, strict=True)))
    return new


jax.tree_util.register_pytree_with_keys(ReactionNetwork, _flatten, _unflatten)


def _set(network: ReactionNetwork, *values: Any) -> None:
    for field, value in zip(dataclasses.fields(ReactionNetwork), values, strict=True):
        object.__setattr__(network, field.name, value)


def _speed(reaction: Reaction, x: dict[str, Any], K: Any = None, n: Any = None) -> Any:
    """v_r(x): its rate divided by k_r."""
    v: Any = 1.0
    for s, molecules in reaction.reactants:
        if K is None or s != reaction.substrate:
            v = v * x[s] ** molecules
        elif n is None:
            v = v * x[s] / (K + x[s])
        else:
            # A solver may step below 0, where a power has no derivative.
            inside = jnp.where(x[s] > 0, x[s], 1.0)
            v = v * jnp.where(x[s] > 0, inside**n / (K**n + inside**n), 0.0)
    return v


def _check_reactions(reactions: tuple, rates: tuple, names: tuple) -> None:
    for r in reactions:
        if not isinstance(r, Reaction):
            raise TypeError(f"expected reactions, or text such as 'A + B -> 2B'; got {r!r}")
    twice = sorted({str(r) for r in reactions if reactions.count(r) > 1})
    if twice:
        raise ValueError(f"expected each reaction once; got twice: {'; '.join(twice)}")
    for what, values in (("rates", rates), ("names", names)):
        if len(values) != len(reactions):
            raise ValueError(
                f"expected {what} of {len(reactions)} reactions; got {len(values)}: {values}"
            )
    constants = [f"{c}{i + 1}" for i, r in enumerate(reactions) for c in _CONSTANTS[r.law]]
    if len({*names, *constants}) != len(names) + len(constants):
        raise ValueError(f"expected parameters named once; got {[*names, *constants]}")


def _parameters(reaction: Reaction, given: Any, name: str, number: int) -> dict[str, Any]:
    """Values by name of one reaction's rate and constants, checked."""
    kinds = _CONSTANTS[reaction.law]
    values = tuple(given) if isinstance(given, tuple | list) else (given,)
    if len(values) == 1 and kinds:
        values += (1.0,) * len(kinds)
    if len(values) != 1 + len(kinds):
        raise ValueError(
            f"expected {' and '.join(('a rate', *kinds))} of {reaction}; got {given!r}"
        )
    for what, value in zip(("a rate", *kinds), values, strict=True):
        if isinstance(value, str) or value is None:
            raise TypeError(f"expected {what} of {reaction} to be a number; got {value!r}")
        if not _is_number(value):
            continue
        size = float(value)
        if not math.isfinite(size) or size < 0 or (what != "a rate" and size == 0):
            least = "of at least 0" if what == "a rate" else "above 0"
            raise ValueError(f"expected {what} {least} of {reaction}; got {value}")
    return dict(zip((name, *(f"{kind}{number}" for kind in kinds)), values, strict=True))


def _species(reactions: tuple, given: Sequence[str] | None) -> tuple[str, ...]:
    found = sorted({s for r in reactions for s in r.species})
    if given is None:
        return tuple(found)
    check_names(given)
    missing = sorted(set(found) - set(given))
    if missing or len(set(given)) != len(given):
        problem = f"without {', '.join(missing)}" if missing else "some twice"
        raise ValueError(f"expected all species once; got {list(given)}, {problem}")
    return tuple(given)


def _number(value: Any) -> str:
    if _is_number(value):
        return f"{float(value):.4g}"
    return f"{type(value).__name__}{list(np.shape(value))}"


def _is_number(value: Any) -> bool:
    """Not a sampled value under a trace, nor those of many networks, nor a placeholder."""
    traced = isinstance(value, jax.core.Tracer)
    return not traced and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "fiu"
