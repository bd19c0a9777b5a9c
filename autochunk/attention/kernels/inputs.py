"""What a call of the kernels consists of.

Its arrays, the names of their axes, and what is static about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.plan import LogitsShape, Plans


class Call(NamedTuple):
    """What is static about a call.

    ``kernel`` is the traced fused kernel, if a plan has one. Only JAX looks at it: it looks into
    tuples among a primitive's parameters for kernels that have to know their devices when they are
    lowered, as cuDNN's has.
    """

    scale: float
    is_causal: bool
    has_bias: bool
    has_mask: bool
    plans: Plans
    kernel: Any = None


def operands_of(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """Those arrays that are there."""
    return tuple(array for array in arrays if array is not None)


class Inputs(NamedTuple):
    """The arrays that every computation starts from, whole or one slice of each."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None

    @property
    def logits(self) -> LogitsShape:
        """Sizes of all their logits; those of half-precision inputs are float32."""
        rows, heads, groups, _ = self.query.shape[-4:]
        itemsize = jnp.promote_types(self.query.dtype, jnp.float32).itemsize
        return LogitsShape(
            math.prod(self.query.shape[:-4]), heads, groups, rows, self.key.shape[-3], itemsize
        )

    def map(self, function: Callable[[jax.Array, tuple[str, ...]], jax.Array]) -> Inputs:
        """``function(array, its axes)`` of each array that is there."""
        return Inputs(
            *(
                array if array is None else function(array, axes)
                for array, axes in zip(self, INPUT_AXES, strict=True)
            )
        )  # type: ignore[arg-type]


# Trailing axes of each kind of array, by name; an axis that the plan slices is sliced in the array.
QUERY = ("rows", "heads", "groups", "features")
KEY = ("keys", "heads", "features")
LOGITS = ("heads", "groups", "rows", "keys")
STATS = ("heads", "groups", "rows")
INPUT_AXES = (QUERY, KEY, KEY, LOGITS, LOGITS)

_HEAD_MAJOR = ("heads", "groups", "rows", "keys", "features")


def head_major(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Heads before rows and keys, as products want them."""
    return _permute(array, axes, in_head_major(axes))


def caller_major(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """From head-major back to the order of ``axes``."""
    return _permute(array, in_head_major(axes), axes)


def in_head_major(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes in the order that products want."""
    return tuple(sorted(axes, key=_HEAD_MAJOR.index))


def _permute(array: jax.Array, axes: tuple[str, ...], wanted: tuple[str, ...]) -> jax.Array:
    if axes == wanted:
        return array
    leading = array.ndim - len(axes)
    return jnp.transpose(array, (*range(leading), *(leading + axes.index(axis) for axis in wanted)))


def split(operands: Sequence[Any], call: Call) -> tuple[Inputs, list[Any]]:
    """Separates the inputs from what a primitive takes besides."""
    rest = list(operands)
    query, key, value = rest[:3]
    del rest[:3]
    bias = rest.pop(0) if call.has_bias else None
    mask = rest.pop(0) if call.has_mask else None
    return Inputs(query, key, value, bias, mask), rest
