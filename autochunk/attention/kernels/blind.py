"""Rows without a key beside a fused kernel: they give the mean of all values, and its gradient.

There are hardly ever any, and to select costs passes over values, output and cotangents: see
``in_place``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import sum_to
from autochunk.attention.kernels.in_place import STEP, can_run, in_place, load, store, total
from autochunk.attention.kernels.inputs import along_rows

# Keys that a program puts right, and flags that it looks at, at a time.
_BLOCK = 128
_FLAGS = 1024


def with_cotangents_of_means(value: jax.Array, out: jax.Array, blind: jax.Array) -> jax.Array:
    """Cotangents of the values [..., T, H, V] with what the means in blind rows add to them.

    ``out`` are those of the output [..., T', H, G, V].
    """
    if out.shape[:-4] != value.shape[:-3] or not can_run(out, value):
        return _cotangents_added(value, out, blind)
    found: jax.Array = jax.lax.platform_dependent(
        value, out, blind, cuda=put_cotangents, default=_cotangents_added
    )
    return found


def of_means(out: jax.Array, value: Any, blind: jax.Array, dtype: Any) -> jax.Array:
    """What the means in blind rows add to the cotangent of each key's values: [..., 1, H, V]."""
    rows = jnp.where(along_rows(blind), out.astype(dtype), 0)
    shared = jnp.sum(rows, axis=(-4, -2))[..., None, :, :] / value.shape[-3]
    return sum_to(shared, (*value.shape[:-3], 1, *value.shape[-2:]))


def _cotangents_added(value: jax.Array, out: jax.Array, blind: jax.Array) -> jax.Array:
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return (value.astype(wide) + of_means(out, value, blind, wide)).astype(value.dtype)


def put_cotangents(
    value: jax.Array, out: jax.Array, blind: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """``with_cotangents_of_means`` as a kernel; with ``interpret`` it runs anywhere, if slowly."""
    from jax.experimental import pallas as pl  # takes a moment

    *leading, rows, heads, groups, size = out.shape
    block = min(_BLOCK, pl.next_power_of_2(keys := value.shape[-3]))
    count = groups * rows  # rows of a head's values

    def kernel(indices: Sequence[Any], out_ref: Any, blind_ref: Any, value_ref: Any) -> None:
        some, head, one = indices
        key = some * block + jnp.arange(block)
        column = jnp.arange(pl.next_power_of_2(size))[None]

        def flags(first: Any, size: int) -> tuple[jax.Array, jax.Array]:
            number = first + jnp.arange(size)
            at = (one * heads + head) * count + number
            return number, load(blind_ref, at, number < count)

        def look(step: Any, found: jax.Array) -> jax.Array:
            return jnp.maximum(found, jnp.max(flags(step * _FLAGS, _FLAGS)[1].astype(jnp.int32)))

        @pl.when(jax.lax.fori_loop(0, pl.cdiv(count, _FLAGS), look, jnp.int32(0)) > 0)
        def _put_right() -> None:
            def some_rows(first: Any) -> jax.Array:
                number, is_blind = flags(first, STEP)
                row, group = number % rows, number // rows
                at = (((one * rows + row) * heads + head) * groups + group)[:, None] * size + column
                return load(out_ref, at, is_blind[:, None] & (column < size))

            added = total(some_rows, count, column.size) / keys
            at = ((one * keys + key) * heads + head)[:, None] * size + column
            there = (key < keys)[:, None] & (column < size)
            new = load(value_ref, at, there).astype(jnp.float32) + added
            store(value_ref, at, new.astype(value_ref.dtype), there)

    blind = jnp.broadcast_to(blind, (*leading, heads, groups, rows))
    grid = (pl.cdiv(keys, block), heads, math.prod(leading))
    return in_place(kernel, grid, value, out, blind, interpret=interpret)
