"""Rows without a key beside a fused kernel: they give the mean of all values, and its gradient.

There are hardly ever any. Written as selections, they cost passes over values, output and
cotangents, together up to half the time of a short call. So on a GPU small kernels look for such
rows, and only where there are some do they read more, and write to what they were given in place.
Should JAX lose its Triton backend, which it calls deprecated, the selections are what is left. They
are in exported programs, too: later versions need not read what Triton makes of a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp

from autochunk.attention.kernels.dense import mean_value
from autochunk.attention.kernels.grid import sum_to
from autochunk.attention.kernels.inputs import along_rows

# Rows or keys that a program puts right, rows or keys that it sums at a time, and flags that it
# looks at, at a time.
_BLOCK = 128
_STEP = 64
_FLAGS = 1024
# Triton counts elements in 32 bits.
_MOST_ELEMENTS = 2**31 - 1

_is_kept = ContextVar("is_kept", default=False)
_is_for_here = ContextVar("is_for_here", default=False)


@contextlib.contextmanager
def lowering(*, for_export: bool) -> Iterator[None]:
    """Says whether what is lowered here is exported."""
    token = _is_kept.set(for_export and not _is_for_here.get())
    try:
        yield
    finally:
        _is_kept.reset(token)


@contextlib.contextmanager
def for_this_machine() -> Iterator[None]:
    """What is exported here runs on this machine, and nothing of it is kept."""
    token = _is_for_here.set(True)
    try:
        yield
    finally:
        _is_for_here.reset(token)


def with_means(out: jax.Array, value: jax.Array, blind: jax.Array) -> jax.Array:
    """An output [..., T', H, G, V] with the mean of all values [..., T, H, V] in blind rows.

    ``blind`` says which rows they are [..., H, G, T'], sizes of one broadcast.
    """
    return _in_place_on_gpus(put_means, _means_selected, out, value, out, value, blind)


def with_cotangents_of_means(value: jax.Array, out: jax.Array, blind: jax.Array) -> jax.Array:
    """Cotangents of the values [..., T, H, V] with what the means in blind rows add to them.

    ``out`` are those of the output [..., T', H, G, V].
    """
    return _in_place_on_gpus(put_cotangents, _cotangents_added, out, value, value, out, blind)


def of_means(out: jax.Array, value: Any, blind: jax.Array, dtype: Any) -> jax.Array:
    """What the means in blind rows add to the cotangent of each key's values: [..., 1, H, V]."""
    rows = jnp.where(along_rows(blind), out.astype(dtype), 0)
    shared = jnp.sum(rows, axis=(-4, -2))[..., None, :, :] / value.shape[-3]
    return sum_to(shared, (*value.shape[:-3], 1, *value.shape[-2:]))


def _means_selected(out: jax.Array, value: jax.Array, blind: jax.Array) -> jax.Array:
    return jnp.where(along_rows(blind), mean_value(value), out)


def _cotangents_added(value: jax.Array, out: jax.Array, blind: jax.Array) -> jax.Array:
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return (value.astype(wide) + of_means(out, value, blind, wide)).astype(value.dtype)


def _in_place_on_gpus(
    kernel: Callable[..., jax.Array],
    plain: Callable[..., jax.Array],
    out: jax.Array,
    value: jax.Array,
    *arrays: jax.Array,
) -> jax.Array:
    """``kernel`` of some arrays where it can be used, else ``plain``, which does the same."""
    if _is_kept.get() or not _has_triton():
        return plain(*arrays)
    same_batch = out.shape[:-4] == value.shape[:-3]
    smallest, largest = sorted((out.size, value.size))
    if not same_batch or smallest == 0 or largest > _MOST_ELEMENTS:
        return plain(*arrays)
    found: jax.Array = jax.lax.platform_dependent(*arrays, cuda=kernel, default=plain)
    return found


@functools.cache
def _has_triton() -> bool:
    """Whether JAX lowers such kernels for this process's GPU; tried with the smallest."""
    if jax.extend.backend.get_backend().platform != "gpu":
        return False
    out, value = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 1, 1), (1, 1, 1)))
    try:
        jax.jit(put_means).lower(out, value, jax.ShapeDtypeStruct((1, 1, 1), bool))
    except Exception:  # whatever a version without it says
        return False
    return True


def put_means(
    out: jax.Array, value: jax.Array, blind: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """``with_means`` as a kernel; with ``interpret`` it runs anywhere, if slowly."""
    from jax.experimental import pallas as pl  # takes a moment

    *leading, rows, heads, groups, size = out.shape
    keys, block = value.shape[-3], min(_BLOCK, pl.next_power_of_2(rows))
    if math.prod(blind.shape[:-3]) != 1:
        blind = jnp.broadcast_to(blind, (*leading, *blind.shape[-3:]))
    if blind.shape[-3:-1] != (1, 1):
        blind = jnp.broadcast_to(blind, (*blind.shape[:-3], heads, groups, blind.shape[-1]))
    flags = (math.prod(blind.shape[:-3]), math.prod(blind.shape[-3:-1]), blind.shape[-1])

    def kernel(_: Any, value_ref: Any, blind_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0) * block + jnp.arange(block)
        head, one = pl.program_id(1), pl.program_id(2)
        column = jnp.arange(pl.next_power_of_2(size))[None]
        at = jnp.zeros_like(row)
        for own, index in zip(flags, (one, head, row), strict=True):
            at = at * own + (0 if own == 1 else index)
        is_blind = (row < rows) & (_load(blind_ref, at, row < rows) > 0)

        @pl.when(jnp.max(is_blind.astype(jnp.int32)) > 0)
        def _put_right() -> None:
            def some_values(first: Any) -> jax.Array:
                key = first + jnp.arange(_STEP)
                at = ((one * keys + key) * heads + head // groups)[:, None] * size + column
                return _load(value_ref, at, (key < keys)[:, None] & (column < size))

            mean = _sum(some_values, keys, column.size) / keys
            new = jnp.broadcast_to(mean.astype(out_ref.dtype), (block, column.size))
            at = ((one * rows + row) * heads * groups + head)[:, None] * size + column
            _store(out_ref, at, new, is_blind[:, None] & (column < size))

    grid = (pl.cdiv(rows, block), heads * groups, math.prod(leading))
    return _run(kernel, grid, interpret, out, value, blind)


def put_cotangents(
    value: jax.Array, out: jax.Array, blind: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """``with_cotangents_of_means`` as a kernel; see ``put_means``."""
    from jax.experimental import pallas as pl

    *leading, rows, heads, groups, size = out.shape
    block = min(_BLOCK, pl.next_power_of_2(keys := value.shape[-3]))
    count = groups * rows  # rows of a head's values

    def kernel(_: Any, out_ref: Any, blind_ref: Any, value_ref: Any) -> None:
        key = pl.program_id(0) * block + jnp.arange(block)
        head, one = pl.program_id(1), pl.program_id(2)
        column = jnp.arange(pl.next_power_of_2(size))[None]

        def flags(first: Any, size: int) -> tuple[jax.Array, jax.Array]:
            number = first + jnp.arange(size)
            at = (one * heads + head) * count + number
            return number, _load(blind_ref, at, number < count)

        def look(step: Any, found: jax.Array) -> jax.Array:
            return jnp.maximum(found, jnp.max(flags(step * _FLAGS, _FLAGS)[1].astype(jnp.int32)))

        @pl.when(jax.lax.fori_loop(0, pl.cdiv(count, _FLAGS), look, jnp.int32(0)) > 0)
        def _put_right() -> None:
            def some_rows(first: Any) -> jax.Array:
                number, is_blind = flags(first, _STEP)
                row, group = number % rows, number // rows
                at = (((one * rows + row) * heads + head) * groups + group)[:, None] * size + column
                return _load(out_ref, at, (is_blind > 0)[:, None] & (column < size))

            total = _sum(some_rows, count, column.size)
            at = ((one * keys + key) * heads + head)[:, None] * size + column
            there = (key < keys)[:, None] & (column < size)
            new = _load(value_ref, at, there).astype(jnp.float32) + total / keys
            _store(value_ref, at, new.astype(value_ref.dtype), there)

    blind = jnp.broadcast_to(blind, (*leading, heads, groups, rows))
    grid = (pl.cdiv(keys, block), heads, math.prod(leading))
    return _run(kernel, grid, interpret, value, out, blind)


def _run(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    interpret: bool,
    written: jax.Array,
    read: jax.Array,
    blind: jax.Array,
) -> jax.Array:
    """Runs a kernel of ravelled arrays, as Triton's blocks are powers of two, in the first one."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    run: Any = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((written.size,), written.dtype),
        grid=grid,
        input_output_aliases={0: 0},
        interpret=interpret,
        compiler_params=triton.CompilerParams(),
    )
    found: jax.Array = run(written.ravel(), read.ravel(), blind.astype(jnp.int8).ravel())
    return found.reshape(written.shape)


def _sum(some: Callable[[Any], jax.Array], count: int, width: int) -> jax.Array:
    """The sum [1, width] of so many rows, of which ``some`` gives _STEP from one on, float32."""
    from jax.experimental import pallas as pl

    def add(step: Any, total: jax.Array) -> jax.Array:
        return total + jnp.sum(some(step * _STEP).astype(jnp.float32), axis=0, keepdims=True)

    zeros = jnp.zeros((1, width), jnp.float32)
    found: jax.Array = jax.lax.fori_loop(0, pl.cdiv(count, _STEP), add, zeros)
    return found


def _load(ref: Any, at: jax.Array, there: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    return triton.load(ref.at[at], mask=there, other=0)


def _store(ref: Any, at: jax.Array, new: jax.Array, there: jax.Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[at], new, mask=there)
