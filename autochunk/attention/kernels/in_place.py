"""Small kernels that look for what hardly ever is there, and put it right in place.

Written as selections that would cost passes over whole arrays, which take up to half the time of a
short call. So on a GPU kernels in Pallas Triton look, and only where they find something do they
read more, and write to what they were given. Should JAX lose its Triton backend, which it calls
deprecated, the selections are what is left. They are in exported programs, too: later versions need
not read what Triton makes of a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp

STEP = 64
"""Rows that ``total`` sums at a time."""
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


def can_run(*arrays: jax.Array) -> bool:
    """Whether such kernels can be used here, on arrays of these sizes."""
    if _is_kept.get() or not _has_triton():
        return False
    sizes = [array.size for array in arrays]
    return min(sizes) > 0 and max(sizes) <= _MOST_ELEMENTS


@functools.cache
def _has_triton() -> bool:
    """Whether JAX lowers such kernels for this process's GPU; tried with a small one."""
    if jax.extend.backend.get_backend().platform != "gpu":
        return False

    def kernel(_: Any, out_ref: Any) -> None:
        at, there = jnp.arange(1), jnp.ones(1, bool)
        store(out_ref, at, load(out_ref, at, there), there)

    run = jax.jit(lambda array: in_place(kernel, (1,), array))
    try:
        run.lower(jax.ShapeDtypeStruct((1,), jnp.float32))
    except Exception:  # whatever a version without it says
        return False
    return True


def in_place(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    written: jax.Array,
    *read: jax.Array,
    interpret: bool = False,
    **parameters: Any,
) -> jax.Array:
    """Runs ``kernel(indices, *read, written)`` for all indices in a grid.

    Arrays are ravelled, as Triton's blocks are powers of two. With ``interpret`` it runs anywhere,
    if slowly; ``parameters`` are Triton's.
    """
    from jax.experimental import pallas as pl  # takes a moment
    from jax.experimental.pallas import triton

    def run_one(_: Any, *refs: Any) -> None:
        number, indices = pl.program_id(0), []
        for size in grid:
            indices.append(number % size)
            number //= size
        kernel(indices, *refs)

    run: Any = pl.pallas_call(
        run_one,
        out_shape=jax.ShapeDtypeStruct((written.size,), written.dtype),
        grid=(math.prod(grid),),  # a GPU takes no more than 65535 along other dims
        input_output_aliases={0: 0},
        interpret=interpret,
        compiler_params=triton.CompilerParams(**parameters),
    )
    found: jax.Array = run(*(array.ravel() for array in (written, *read)))
    return found.reshape(written.shape)


def index(sizes: Sequence[int], indices: Sequence[Any]) -> Any:
    """Where elements of a ravelled array of some sizes are; along sizes of one all are the same."""
    at: Any = 0
    for size, one in zip(sizes, indices, strict=True):
        at = at * size + (0 if size == 1 else one)
    return at


def load(ref: Any, at: jax.Array, there: jax.Array) -> jax.Array:
    """The elements at some indices; zero where there is none."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[at], mask=there, other=jnp.zeros((), ref.dtype))


def store(ref: Any, at: jax.Array, new: jax.Array, there: jax.Array) -> None:
    """Writes elements at some indices, those that are there."""
    from jax.experimental.pallas import triton

    triton.store(ref.at[at], new, mask=there)


def total(some: Callable[[Any], jax.Array], count: int, width: int) -> jax.Array:
    """The sum [1, width] of so many rows, of which ``some`` gives 64 from one on, in float32."""
    from jax.experimental import pallas as pl

    def add(step: Any, so_far: jax.Array) -> jax.Array:
        return so_far + jnp.sum(some(step * STEP).astype(jnp.float32), axis=0, keepdims=True)

    zeros = jnp.zeros((1, width), jnp.float32)
    found: jax.Array = jax.lax.fori_loop(0, pl.cdiv(count, STEP), add, zeros)
    return found
