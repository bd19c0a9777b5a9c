"""Derivatives of derivatives on several devices: each device computes those of its share.

They are JAX's own, of slices that are recomputed (see ``differentiate_plainly``). XLA would gather
what is sliced along a sharded dim. So they are primitives as the maps that they are of, with the
axes of these: what has an axis of the query is of one share, the rest are sums over all shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad

from autochunk.attention.kernels.inputs import Call
from autochunk.attention.kernels.meshes import Axes
from autochunk.attention.kernels.primitive import plain_rule, primitive, promoting
from autochunk.attention.kernels.shares import is_spread

Shapes = list[tuple[tuple[int, ...], Any]]
Place = str | int
"""Which operand: an input's name, or a number among the other operands.

A share's call may have one more input than the whole call.
"""


class Map(Protocol):
    """What is computed of operands for a call: inputs first, as a primitive has them."""

    def run(self, *operands: jax.Array, call: Call) -> list[jax.Array]:
        """The results."""

    def shapes(self, *operands: Any, call: Call) -> Shapes:
        """Shapes and dtypes of the results."""

    def axes(self, call: Call) -> tuple[list[Axes], list[Axes]]:
        """Trailing axes of the operands and of the results."""

    def own(self, call: Call) -> set[str]:
        """The inputs of which each element of a batch must have its own."""


@dataclass(frozen=True)
class Plain:
    """A primitive's map, in slices that JAX can differentiate.

    Attributes:
      function, shape, axis: the map, and ``shapes`` and ``axes`` of it, all with ``wanted``.
      wanted: the inputs of which it gives cotangents; None if it gives none.
    """

    function: Callable[..., list[jax.Array]]
    shape: Callable[..., Shapes]
    axis: Callable[..., tuple[list[Axes], list[Axes]]]
    wanted: tuple[bool, ...] | None = None

    @property
    def _params(self) -> dict[str, Any]:
        return {} if self.wanted is None else {"wanted": self.wanted}

    def run(self, *operands: jax.Array, call: Call) -> list[jax.Array]:
        """As ``Map`` says."""
        return self.function(*operands, call=call, **self._params)

    def shapes(self, *operands: Any, call: Call) -> Shapes:
        """As ``Map`` says."""
        return self.shape(*operands, call=call, **self._params)

    def axes(self, call: Call) -> tuple[list[Axes], list[Axes]]:
        """As ``Map`` says."""
        return self.axis(call, **self._params)

    def own(self, call: Call) -> set[str]:
        """As ``Map`` says."""
        return set(call.wanted(self.wanted or ()))


@dataclass(frozen=True)
class _Derived:
    """A derivative of a map with respect to some of its operands.

    Attributes:
      of: the map, whose operands come first.
      moved: these operands.
    """

    of: Map
    moved: tuple[Place, ...]

    def own(self, call: Call) -> set[str]:
        """As ``Map`` says."""
        return self.of.own(call) | {one for one in self.moved if isinstance(one, str)}

    def _of_moved(
        self, operands: Sequence[jax.Array], call: Call
    ) -> tuple[Callable[..., list[jax.Array]], list[jax.Array]]:
        """The map as a function of what is moved, and what that is."""
        indices = [_index(place, call) for place in self.moved]

        def run(*moved: jax.Array) -> list[jax.Array]:
            whole = list(operands)
            for index, one in zip(indices, moved, strict=True):
                whole[index] = one
            return self.of.run(*whole, call=call)

        return run, [operands[index] for index in indices]

    def _axes_of_moved(self, call: Call) -> list[Axes]:
        given, _ = self.of.axes(call)
        return [given[_index(place, call)] for place in self.moved]


class Pushed(_Derived):
    """Tangents of a map's results; the tangents of what is moved are the last operands."""

    def run(self, *operands: jax.Array, call: Call) -> list[jax.Array]:
        """As ``Map`` says."""
        count = len(operands) - len(self.moved)
        run, moved = self._of_moved(operands[:count], call)
        return list(jax.jvp(run, moved, list(operands[count:]))[1])

    def shapes(self, *operands: Any, call: Call) -> Shapes:
        """As ``Map`` says."""
        return self.of.shapes(*operands[: len(operands) - len(self.moved)], call=call)

    def axes(self, call: Call) -> tuple[list[Axes], list[Axes]]:
        """As ``Map`` says."""
        given, made = self.of.axes(call)
        return [*given, *self._axes_of_moved(call)], made


class Pulled(_Derived):
    """Cotangents of what is moved; the cotangents of a map's results are the last operands."""

    def run(self, *operands: jax.Array, call: Call) -> list[jax.Array]:
        """As ``Map`` says."""
        count = len(operands) - len(self.of.axes(call)[1])
        run, moved = self._of_moved(operands[:count], call)
        return list(jax.vjp(run, *moved)[1](list(operands[count:])))

    def shapes(self, *operands: Any, call: Call) -> Shapes:
        """As ``Map`` says."""
        moved = (operands[_index(place, call)] for place in self.moved)
        return [(one.shape, one.dtype) for one in moved]

    def axes(self, call: Call) -> tuple[list[Axes], list[Axes]]:
        """As ``Map`` says."""
        given, made = self.of.axes(call)
        return [*given, *made], self._axes_of_moved(call)


def _index(place: Place, call: Call) -> int:
    return call.operands.index(place) if isinstance(place, str) else len(call.operands) + place


def _place(index: int, call: Call) -> Place:
    count = len(call.operands)
    return call.operands[index] if index < count else index - count


def _run(*operands: jax.Array, call: Call, of: Map) -> list[jax.Array]:
    return of.run(*operands, call=call)


def _shapes(*operands: Any, call: Call, of: Map) -> Shapes:
    return of.shapes(*operands, call=call)


def _axes(call: Call, of: Map) -> tuple[list[Axes], list[Axes]]:
    return of.axes(call)


derived_p = primitive("autochunk_attention_derived", _run, _shapes, axes=_axes)


@promoting
def _jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call, of: Map) -> Any:
    """The results of a map and their tangents."""
    outs = derived_p.bind(*primals, call=call, of=of)
    moving = [
        (_place(index, call), tangent)
        for index, tangent in enumerate(tangents)
        if type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0
    ]
    if not moving:
        return outs, [jnp.zeros_like(out) for out in outs]
    places, moved = zip(*moving, strict=True)
    return outs, derived_p.bind(*primals, *moved, call=call, of=Pushed(of, places))


def _transpose(cotangents: Sequence[Any], *operands: Any, call: Call, of: Map) -> list[Any]:
    """The rule for transposition: of a map that is linear in the operands that are not known."""
    linear = [index for index, one in enumerate(operands) if ad.is_undefined_primal(one)]
    known = [
        jnp.zeros(one.aval.shape, one.aval.dtype) if ad.is_undefined_primal(one) else one
        for one in operands
    ]
    pulled = map(ad.instantiate_zeros, cotangents)
    places = tuple(_place(index, call) for index in linear)
    found = derived_p.bind(*known, *pulled, call=call, of=Pulled(of, places))
    by_index = dict(zip(linear, found, strict=True))
    return [by_index.get(index) for index in range(len(operands))]


ad.primitive_jvps[derived_p] = _jvp
ad.primitive_transposes[derived_p] = _transpose


def differentiate_in_shares(primitive: Primitive, plain: Plain) -> None:
    """Derivatives of a derivative, in shares if its arrays may be sharded."""
    alone = plain_rule(plain.function)

    def rule(
        primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call, **params: Any
    ) -> Any:
        if not is_spread(call):
            return alone(primals, tangents, call=call, **params)
        of = replace(plain, **params)
        return _jvp(primals, tangents, call=call, of=of)

    ad.primitive_jvps[primitive] = rule
