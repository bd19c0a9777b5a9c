"""Runs a function over chunks of its arrays by ``lax.scan``, one chunked axis inside the other.

Positions that do not fill a chunk make a smaller one at the end. Where JAX sees several devices
the axis is cut into equal blocks, and a chunk takes equally many positions of each block. If an
array is sharded along the axis, a chunk then has part of each device's share, and no data moves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import vary_alike, varying_axes
from autochunk.chunks.axes import Axes
from autochunk.chunks.reductions import Arrays, Reduction

Function = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Split:
    """How the positions along one axis are chunked.

    Attributes:
      length: how many positions there are.
      size: of a chunk, at most; a multiple of ``blocks``.
      blocks: number of equal blocks; a chunk takes equally many positions of each.
    """

    length: int
    size: int
    blocks: int = 1

    @property
    def count(self) -> int:
        """How many whole chunks there are."""
        return self.length // self.size

    @property
    def rest(self) -> int:
        """How many positions are left for a smaller chunk."""
        return self.length - self.count * self.size

    def take(self, array: jax.Array, dim: int, first: Any, count: int) -> jax.Array:
        """``count`` positions of each block from ``first`` on, which may be traced."""
        view = self._view(array, dim)
        part = jax.lax.dynamic_slice_in_dim(view, first, count, dim + 1)
        return _merged(part, dim)

    def stacked(self, array: jax.Array, dim: int) -> jax.Array:
        """All whole chunks [count, ...], for a scan."""
        each = self.size // self.blocks
        view = self._view(array, dim)
        whole = jax.lax.slice_in_dim(view, 0, self.count * each, axis=dim + 1)
        shape = (*whole.shape[: dim + 1], self.count, each, *whole.shape[dim + 2 :])
        return _merged(jnp.moveaxis(whole.reshape(shape), dim + 1, 0), dim + 1)

    def joined(self, chunks: jax.Array, rest: jax.Array | None, dim: int) -> jax.Array:
        """The inverse of ``stacked``; ``rest`` is the smaller chunk, if there is one."""
        each = self.size // self.blocks
        shape = (*chunks.shape[: dim + 1], self.blocks, each, *chunks.shape[dim + 2 :])
        moved = jnp.moveaxis(chunks.reshape(shape), 0, dim + 1)
        whole = _merged(moved, dim + 1)
        if rest is not None:
            whole = jnp.concatenate([whole, self._view(rest, dim)], dim + 1)
        return _merged(whole, dim)

    def put(self, total: jax.Array, part: jax.Array, dim: int, first: Any) -> jax.Array:
        """A total, as ``empty`` makes it, with a chunk put in from ``first`` of each block on."""
        return jax.lax.dynamic_update_slice_in_dim(total, self._view(part, dim), first, dim + 1)

    def empty(self, chunk: Any, dim: int) -> jax.Array:
        """A total for all positions, of which ``chunk`` has some."""
        each = self.length // self.blocks
        shape = (*chunk.shape[:dim], self.blocks, each, *chunk.shape[dim + 1 :])
        return vary_alike([jnp.zeros(shape, chunk.dtype)], [chunk])[0]

    def _view(self, array: jax.Array, dim: int) -> jax.Array:
        """[..., blocks, positions, ...]"""
        shape = array.shape
        return array.reshape(
            *shape[:dim], self.blocks, shape[dim] // self.blocks, *shape[dim + 1 :]
        )


def _merged(array: jax.Array, dim: int) -> jax.Array:
    """Two dims as one."""
    shape = array.shape
    return array.reshape(*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])


def make_split(length: int, size: int | None, devices: int) -> Split | None:
    """Chunks of at most ``size`` positions; None where that is all of them."""
    if size is None or size >= length:
        return None
    blocks = max(n for n in _divisors(math.gcd(length, devices)) if n <= size)
    return Split(length, size // blocks * blocks, blocks)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


@dataclass(frozen=True, eq=False)  # JAX tells functions apart by what they are
class Loop:
    """One chunked axis, and what is inside.

    Attributes:
      split: its chunks.
      inner: the function of a chunk.
      inputs: the dim of each array that is this axis, or None.
      outputs: the same for the results; those with None are reduced.
      reduction: how they are reduced.
      differentiable: whether gradients will be taken. Results of chunks are then stacked and not
        put in place, so that JAX does not keep whole results for each chunk.
      recompute: whether the backward pass computes a chunk again.
    """

    split: Split
    inner: Function
    inputs: Sequence[int | None]
    outputs: Sequence[int | None]
    reduction: Reduction
    differentiable: bool
    recompute: bool

    def __call__(self, arrays: Arrays) -> Arrays:
        """The function's results for whole arrays."""
        like = jax.eval_shape(self.inner, self._part(arrays, 0, self._each))
        stacks = self.differentiable or any(map(_is_extended, like))
        run = self._stacked if stacks else self._in_place
        total, joined = run(arrays, self._start(like), like)
        reduced = self.reduction.end(total, self._reduced(like)) if total else []
        one, other = iter(reduced), iter(joined)
        return [next(one) if dim is None else next(other) for dim in self.outputs]

    def _in_place(
        self, arrays: Arrays, total: Arrays, like: Sequence[Any]
    ) -> tuple[Arrays, Arrays]:
        """Chunks are cut out of whole arrays, and put into whole results."""
        split = self.split

        def of_number(carry: Any, number: jax.Array) -> Any:
            total, places = carry
            first = number * self._each
            total, results = self._step(total, self._part(arrays, first, self._each), self._share)
            return (total, self._put(places, results, first)), None

        places = [split.empty(like[i], dim) for i, dim in self._mapped]
        numbers = jnp.arange(split.count, dtype=jnp.int32)
        (total, places), _ = jax.lax.scan(of_number, (total, places), numbers)
        if split.rest:
            total, results = self._rest(arrays, total)
            places = self._put(places, results, split.count * self._each)
        joined = [_merged(one, dim) for one, (_, dim) in zip(places, self._mapped, strict=True)]
        return total, joined

    def _stacked(self, arrays: Arrays, total: Arrays, _: Sequence[Any]) -> tuple[Arrays, Arrays]:
        """A scan takes the stacked chunks, and returns their stacked results."""
        split, arrays = self.split, self._varying(arrays)
        shared = list(map(_widened, arrays, self.inputs))

        def step(total: Arrays, chunk: Arrays) -> tuple[Arrays, Arrays]:
            part = map(_as_it_was, self._filled(shared, chunk), arrays)
            return self._step(total, list(part), self._share)

        if self.recompute:
            step = jax.checkpoint(step, prevent_cse=False)
        chunks = [split.stacked(arrays[i], dim) for i, dim in self._cut]
        total, found = jax.lax.scan(step, total, chunks)
        results: list[Any] = [None] * len(found)
        if split.rest:
            total, results = self._rest(arrays, total)
        mapped = zip(found, results, self._mapped, strict=True)
        return total, [split.joined(one, rest, dim) for one, rest, (_, dim) in mapped]

    def _varying(self, arrays: Arrays) -> Arrays:
        """The arrays; inside ``shard_map`` all vary alike, unless results would then vary more.

        Their cotangents are then summed over devices once, and not for each chunk.
        """
        if not any(map(varying_axes, arrays)):  # as outside of shard_map
            return arrays
        varying = vary_alike(arrays, arrays)
        before = jax.eval_shape(self.inner, self._part(arrays, 0, self._each))
        after = jax.eval_shape(self.inner, self._part(varying, 0, self._each))
        alike = map(operator.eq, map(varying_axes, before), map(varying_axes, after))
        return varying if all(alike) else arrays

    @property
    def _share(self) -> float:
        """What part of all positions a chunk has."""
        return self.split.size / self.split.length

    @property
    def _each(self) -> int:
        """How many positions of each block a chunk has."""
        return self.split.size // self.split.blocks

    @property
    def _cut(self) -> list[tuple[int, int]]:
        """Number and dim of each array that has the axis."""
        return [(i, dim) for i, dim in enumerate(self.inputs) if dim is not None]

    @property
    def _mapped(self) -> list[tuple[int, int]]:
        """Number and dim of each result that has the axis."""
        return [(i, dim) for i, dim in enumerate(self.outputs) if dim is not None]

    def _part(self, arrays: Arrays, first: Any, count: int) -> Arrays:
        return self._filled(
            arrays, [self.split.take(arrays[i], dim, first, count) for i, dim in self._cut]
        )

    def _filled(self, arrays: Arrays, chunk: Arrays) -> Arrays:
        """The arrays, with a chunk in place of those that are cut."""
        parts = {i: part for (i, _), part in zip(self._cut, chunk, strict=True)}
        return [parts.get(i, array) for i, array in enumerate(arrays)]

    def _reduced(self, results: Sequence[Any]) -> list[Any]:
        return [one for one, dim in zip(results, self.outputs, strict=True) if dim is None]

    def _start(self, like: Sequence[Any]) -> Arrays:
        """The first total; inside ``shard_map`` it varies as later ones do."""
        reduced = self._reduced(like)
        if not reduced:
            return []
        start = self.reduction.start(reduced)
        after = jax.eval_shape(lambda old, new: self.reduction.add(old, new, 1.0), start, reduced)
        return [vary_alike([one], [then])[0] for one, then in zip(start, after, strict=True)]

    def _step(self, total: Arrays, part: Arrays, share: float) -> tuple[Arrays, Arrays]:
        """The next total, and a chunk's results that are joined."""
        results = self.inner(part)
        reduced = self._reduced(results)
        total = self.reduction.add(total, reduced, share) if reduced else []
        return total, [results[i] for i, _ in self._mapped]

    def _rest(self, arrays: Arrays, total: Arrays) -> tuple[Arrays, Arrays]:
        """The step for the smaller chunk at the end."""
        split, share = self.split, self.split.rest / self.split.length
        part = self._part(arrays, split.count * self._each, split.rest // split.blocks)
        step = jax.checkpoint(self._step, static_argnums=(2,)) if self.recompute else self._step
        found: tuple[Arrays, Arrays] = step(total, part, share)
        return found

    def _put(self, places: Arrays, results: Arrays, first: Any) -> Arrays:
        mapped = zip(places, results, self._mapped, strict=True)
        return [self.split.put(place, part, dim, first) for place, part, (_, dim) in mapped]


def _widened(array: jax.Array, dim: int | None) -> jax.Array:
    """A shared array of half precision in float32.

    Its cotangents are summed over chunks in the dtype that it has outside of the loop.
    """
    is_half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32) if is_half and dim is None else array


def _as_it_was(array: jax.Array, before: jax.Array) -> jax.Array:
    return array if array.dtype == before.dtype else array.astype(before.dtype)


def _is_extended(one: Any) -> bool:
    return bool(jnp.issubdtype(one.dtype, jax.dtypes.extended))


def in_chunks(
    function: Function,
    splits: Sequence[Split | None],
    inputs: Sequence[Axes],
    outputs: Sequence[Axes],
    reduction: Reduction,
    *,
    differentiable: bool,
) -> Function:
    """The function in chunks, one axis inside the other; axes with None stay whole."""
    innermost = True
    for number in reversed(range(len(splits))):
        split = splits[number]
        if split is None:
            continue
        function = Loop(
            split,
            function,
            [dims[number] for dims in inputs],
            [dims[number] for dims in outputs],
            reduction,
            differentiable,
            recompute=differentiable and innermost,
        )
        innermost = False
    return function
