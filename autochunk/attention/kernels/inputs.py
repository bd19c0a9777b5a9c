"""What a call consists of: its arrays, the names of their axes, and what is static about it.

And what fused kernels get of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.blocks import reach_of
from autochunk.implementations import is_fused
from autochunk.operands import OPERANDS, TERMS
from autochunk.plan import LogitsShape, Plans


class Call(NamedTuple):
    """The static part of a call.

    ``operands`` names its arrays, in the order of OPERANDS. ``window`` is how many positions to the
    left and to the right of its own position a query sees. ``offset`` is added to a query's index
    to give its position, besides ``query_offset``. With ``some_keys`` the given row maximum and sum
    are those of more keys than the call has. With ``half_logits`` dense attention has the inputs'
    dtype throughout, as haiku's does. With ``shares`` each of several devices computes its share.
    The others are those of the op.

    ``kernel`` and ``training_kernel`` are the traced fused kernels of its plans, if those have
    them. Only JAX looks at them: it searches tuples among a primitive's parameters for what must
    know its devices when it is lowered, as cuDNN's must. ``shares`` is another such program.
    """

    operands: tuple[str, ...]
    scale: float
    is_causal: bool
    plans: Plans
    kernel: Any = None
    training_kernel: Any = None
    window: tuple[int, int] | None = None
    offset: int = 0
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    residual: bool = False
    some_keys: bool = False
    precision: Any = None
    half_logits: bool = False
    shares: Any = None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many positions to its left and right a query sees; None is all."""
        return reach_of(self.window, self.is_causal)

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the arrays that have tangents and cotangents."""
        return tuple(name for name in self.operands if OPERANDS[name].differentiable)

    def wanted(self, wanted: Sequence[bool]) -> tuple[str, ...]:
        """Names of the wanted arrays of ``moving``."""
        return tuple(itertools.compress(self.moving, wanted))


class Inputs(NamedTuple):
    """The arrays that every computation starts from, whole or one slice of each."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    key_value_segment_ids: jax.Array | None = None
    query_offset: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    dropout_bits: jax.Array | None = None

    @property
    def present(self) -> dict[str, jax.Array]:
        """The arrays that are there, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}

    @property
    def terms(self) -> dict[str, jax.Array]:
        """The optional arrays that are there, by name."""
        return {name: array for name, array in self.present.items() if name in TERMS}

    @property
    def logits(self) -> LogitsShape:
        """Sizes of all logits; those of half-precision inputs are float32."""
        *leading, rows, heads, groups, _ = self.query.shape
        itemsize = jnp.promote_types(self.query.dtype, jnp.float32).itemsize
        batch, keys = math.prod(leading), self.key.shape[-3]
        return LogitsShape(batch, heads, groups, rows, keys, itemsize)

    def map(self, function: Callable[[jax.Array, tuple[str, ...]], jax.Array]) -> Inputs:
        """``function(array, its axes)`` of each array that is there."""
        return Inputs(**{name: function(array, AXES[name]) for name, array in self.present.items()})


# Trailing axes of each kind of array, by name; an axis that the plan slices is sliced in the array.
QUERY = ("rows", "heads", "groups", "features")
KEY = ("keys", "heads", "features")
LOGITS = ("heads", "groups", "rows", "keys")
STATS = ("heads", "groups", "rows")
# By the dims that an operand has for the caller; its query heads are [heads, groups] here.
_KERNEL_AXES: dict[str, tuple[str, ...]] = {
    "thk": QUERY,
    "snk": KEY,
    "snv": KEY,
    "hts": LOGITS,
    "ht": STATS,
    "h": ("heads", "groups"),
    "t": ("rows",),
    "s": ("keys",),
    "": (),
}
AXES = {name: _KERNEL_AXES[operand.dims] for name, operand in OPERANDS.items()}
INPUT_AXES = tuple(AXES[name] for name in Inputs._fields)

_HEAD_MAJOR = ("heads", "groups", "rows", "keys", "features")


def head_major(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Heads before rows and keys, as products want them."""
    return _permute(array, axes, in_head_major(axes))


def caller_major(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """From head-major back to the order of ``axes``."""
    return _permute(array, in_head_major(axes), axes)


def along_rows(stats: jax.Array) -> jax.Array:
    """A number for each row [..., H, G, T'] as [..., T', H, G, 1]."""
    return caller_major(stats[..., None], QUERY)


def in_head_major(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes in the order that products want."""
    return tuple(sorted(axes, key=_HEAD_MAJOR.index))


def _permute(array: jax.Array, axes: tuple[str, ...], wanted: tuple[str, ...]) -> jax.Array:
    if axes == wanted:
        return array
    leading = array.ndim - len(axes)
    return jnp.transpose(array, (*range(leading), *(leading + axes.index(axis) for axis in wanted)))


def kept_dtype(dtype: Any, call: Call) -> Any:
    """The dtype of the output that is kept for the backward pass, for a query of this dtype.

    Slices subtract the product of the output and its cotangent from the cotangents of the weights.
    For uniform rows the difference is so small that rounding to half precision would show.
    """
    if is_fused(call.plans.training.implementation):
        return dtype
    return jnp.promote_types(dtype, jnp.float32)


def split(operands: Sequence[Any], call: Call) -> tuple[Inputs, list[Any]]:
    """Separates the inputs from the other operands of a primitive."""
    count = len(call.operands)
    named = dict(zip(call.operands, operands, strict=False))
    return Inputs(**named), list(operands[count:])


class Settings(NamedTuple):
    """The static part of a kernel's call.

    A query sees ``left`` positions to its left and ``right`` to its right; None is all. The other
    fields are those of ``Call``.
    """

    scale: float
    left: int | None
    right: int | None
    soft_cap: float | None
    precision: Any

    @property
    def is_causal(self) -> bool:
        """Whether a query sees nothing to its right."""
        return self.right == 0


class KeyRange(NamedTuple):
    """All keys that a row sees are from ``first``, or the start, to before ``end``.

    Both are int32 [..., H, G, T'], sizes of one broadcast, for a kernel [B or 1, H or 1, T' or 1];
    zero for a row without a key. ``first`` is there for segments, where it saves most: to heed it
    costs as much again, in other calls for nothing but padding on the left.
    """

    first: jax.Array | None
    end: jax.Array
