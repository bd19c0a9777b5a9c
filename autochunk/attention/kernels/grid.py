"""Slices: where they lie, how the parts are taken and put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.cells import Cell, Cover, Finish, Join, OfRows, Output, Parts
from autochunk.attention.kernels.inputs import Inputs, caller_major, head_major, in_head_major
from autochunk.plan import slice_count


class Grid:
    """Runs a computation on every slice in turn and puts the parts together.

    All slices along an axis have the same size. If it does not divide the axis, the last slice
    begins earlier and overlaps its neighbour. Results that are written twice are equal. Results
    that are joined must be weighed with ``Cell.fresh``, which is zero for repeated elements. With
    ``follow`` each slice of rows has one slice of keys, which begins at ``follow(first row)``.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        lengths: dict[str, int],
        cover: Cover | None,
        differentiable: bool,
        follow: Callable[[Any], Any] | None = None,
    ) -> None:
        self.sizes, self.lengths = sizes, lengths
        self.cover, self.differentiable, self.follow = cover, differentiable, follow
        self.counts = {axis: slice_count(lengths[axis], size) for axis, size in sizes.items()}
        if follow is not None:
            self.counts["keys"] = 1
        self.cells = math.prod(self.counts.values())

    def run(
        self,
        compute: Callable[..., Parts],
        arrays: Sequence[jax.Array | None],
        axes: Sequence[tuple[str, ...]],
        outputs: Sequence[Output],
        join: Join | None = None,
        finish: Finish | None = None,
    ) -> Parts:
        """``compute(cell, *slices)`` gives one part per output.

        Parts are written in place, or with ``join`` joined with what is there. After all cells
        ``finish(cell, parts, slices)`` makes the results of them. Slices and parts are head-major.
        """
        over = self._outer(outputs, join)
        if not over:
            totals = self._scan(compute, arrays, axes, outputs, join)
            return _finished(finish, totals, outputs, arrays, axes)
        outer = Grid({axis: self.sizes[axis] for axis in over}, self.lengths, None, False)
        inner = {axis: size for axis, size in self.sizes.items() if axis not in over}
        # Outputs that have all these axes are written once, and never joined.
        alone = all(outer._has_part_of_its_own(output) for output in outputs)

        # Arrays that have none of these axes are not taken here: they would be made head-major for
        # each slice.
        taken = [
            one if one is not None and outer._sliced(one.shape, names) else None
            for one, names in zip(arrays, axes, strict=True)
        ]
        inner_axes = [
            names if one is None else in_head_major(names)
            for one, names in zip(taken, axes, strict=True)
        ]

        def group(cell: Cell, *slices: Any) -> Parts:
            def one(place: Cell, *arrays: Any) -> Parts:
                fresh = place.fresh if alone else cell.fresh | place.fresh
                return compute(Cell(cell.starts | place.starts, fresh, place.is_open), *arrays)

            cover = self.cover
            if cover is not None and "rows" in over:
                cover = OfRows(cover, cell.starts, outer.sizes)
            within = Grid(inner, self.lengths, cover, differentiable=False, follow=self.follow)
            parts = [outer.part(output if alone else output.unfinished()) for output in outputs]
            pairs = zip(slices, arrays, strict=True)
            given = [whole if part is None else part for part, whole in pairs]
            done = None if finish is None or not alone else functools.partial(_at, finish, cell)
            return within.run(one, given, inner_axes, parts, join, done)

        if alone:
            return outer._scan(group, taken, axes, outputs, None)
        totals = outer._scan(group, taken, axes, outputs, join)
        return _finished(finish, totals, outputs, arrays, axes)

    def _outer(self, outputs: Sequence[Output], join: Join | None) -> list[str]:
        """The axes that an outer loop goes over; empty if one loop goes over all."""
        inner = [axis for axis in self.sizes if axis in ("rows", "keys")]
        outer = [axis for axis in self.sizes if axis not in inner]
        if self.differentiable:
            return []
        # With an outer loop keys, values and their cotangents are taken and put once for each batch
        # element and head, not for each slice of its rows. If all share an output, such as the
        # cotangent of a broadcast bias, there is none: that output would be joined whole each time.
        groups = Grid({axis: self.sizes[axis] for axis in outer}, self.lengths, None, False)
        shared = any(not groups._sliced(output.shape, output.axes) for output in outputs)
        if not shared and self._cells(outer) != 1 and self._cells(inner) != 1:
            return outer
        # With rows in the outer loop sums over keys are kept for one slice of rows at a time. If
        # the number of its slices of keys is known while tracing, one loop over all is better: it
        # needs no look at each slice, and these looks are what costs on GPUs.
        looks = join is not None and self.cover is not None and self.cover.names
        by_row = all("rows" in output.axes for output in outputs) and inner == ["rows", "keys"]
        several = by_row and all(self.counts[axis] != 1 for axis in inner)
        return [*outer, "rows"] if looks and several and isinstance(self.cells, int) else []

    def _has_part_of_its_own(self, output: Output) -> bool:
        """Whether an output is sliced along all axes that have several slices."""
        sliced = {axis for _, axis in self._sliced(output.shape, output.axes)}
        return sliced == {axis for axis, count in self.counts.items() if count != 1}

    def _cells(self, axes: Sequence[str] | dict[str, int]) -> int:
        return math.prod(self.counts[axis] for axis in axes)

    def part(self, output: Output) -> Output:
        """An output's part in a slice, head-major."""
        sizes, axes = self._part_sizes(output.shape, output.axes), in_head_major(output.axes)
        leading = len(sizes) - len(axes)
        own = dict(zip(output.axes, sizes[leading:], strict=True))
        shape = (*sizes[:leading], *(own[axis] for axis in axes))
        return output._replace(axes=axes, shape=shape)

    def _part_sizes(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> list[int]:
        """Sizes of an array's part in a slice, in the array's own order."""
        sizes = list(shape)
        for dim, axis in self._sliced(shape, axes):
            sizes[dim] = self.sizes[axis]
        return sizes

    def _scan(
        self,
        compute: Callable[..., tuple[jax.Array, ...]],
        arrays: Sequence[jax.Array | None],
        axes: Sequence[tuple[str, ...]],
        outputs: Sequence[Output],
        join: Join | None,
    ) -> Parts:

        def part(is_open: bool, index: Any, arrays: Sequence[Any]) -> tuple[jax.Array, ...]:
            cell = self.cell(index)._replace(is_open=is_open)
            pairs = zip(arrays, axes, strict=True)
            taken = [None if one is None else self.take(one, names, cell) for one, names in pairs]
            return compute(cell, *taken)

        outputs = outputs if join is None else [output.unfinished() for output in outputs]
        if self.cells == 1 and self.follow is None:
            pieces = zip(part(False, 0, arrays), outputs, strict=True)
            return tuple(caller_major(one.astype(whole.dtype), whole.axes) for one, whole in pieces)
        if self.differentiable:
            # Arrays enter whole: what the checkpoint keeps is then the same for every slice, and
            # kept once.
            part = jax.checkpoint(part, prevent_cse=False, static_argnums=0)

        def step(
            is_open: bool, totals: tuple[jax.Array, ...], index: jax.Array
        ) -> tuple[jax.Array, ...]:
            pieces = part(is_open, index, arrays)
            cell = self.cell(index)
            if join is not None:
                wholes = zip(totals, outputs, strict=True)
                old = tuple(self.take(total, output.axes, cell) for total, output in wholes)
                pieces = join(old, pieces)
            places = zip(totals, pieces, outputs, strict=True)
            return tuple(self._put(old, new, out.axes, cell) for old, new, out in places)

        empty = [jnp.full(output.shape, output.fill, output.dtype) for output in outputs]
        totals = tuple(vary_alike(empty, arrays))
        for is_open, numbers, count in self._passes(arrays, axes):
            totals = _repeat(functools.partial(step, is_open), totals, numbers, count)
        return totals

    def _passes(
        self, arrays: Sequence[jax.Array | None], axes: Sequence[tuple[str, ...]]
    ) -> list[tuple[bool, jax.Array, jax.Array | None]]:
        """The slices to compute, in passes: whether they are open, their numbers, how many of them.

        How many is None for all. Closed slices are skipped; in open ones nothing need be excluded.
        If the number of slices is symbolic, they cannot be looked at one by one.
        """
        if self.cover is None or not isinstance(self.cells, int):
            return [(False, jnp.arange(self.cells, dtype=jnp.int32), None)]
        of_rows = isinstance(self.cover, OfRows)
        crossed, opened = (range(self.cells), ()) if of_rows else self._by_tracing(self.cover)
        if not self.cover.names or self.differentiable:
            static = ((False, crossed), (True, opened))
            return [(kind, jnp.asarray(some, jnp.int32), None) for kind, some in static if some]
        numbers = jnp.asarray([*crossed, *opened], jnp.int32)
        if not numbers.size:
            return []
        named = dict(zip(Inputs._fields, zip(arrays, axes, strict=True), strict=False))
        mine = {name: named[name] for name in self.cover.names}
        cover = self.cover

        def look(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            cell = self.cell(number)
            slices = {
                name: self.take(array, names, cell)
                for name, (array, names) in mine.items()
                if array is not None
            }
            closed, is_open = cover.block(cell.starts, self.sizes, slices)
            return jnp.asarray(closed), jnp.asarray(is_open)

        closed, is_open = jax.vmap(look)(numbers)
        passes: list[tuple[bool, jax.Array, jax.Array | None]] = []
        for kind, wanted in ((False, ~closed & ~is_open), (True, ~closed & is_open)):
            first = jnp.argsort(~wanted, stable=True)
            passes.append((kind, numbers[first], jnp.sum(wanted, dtype=jnp.int32)))
        return passes

    def _by_tracing(self, cover: Cover) -> tuple[list[int], list[int]]:
        """Numbers of slices not known to be closed or open, and of open ones, while tracing."""
        crossed: list[int] = []
        opened: list[int] = []
        for number in range(self.cells):
            positions = self._positions(number)
            starts = self._starts_of(positions)
            closed, is_open = cover.block(starts, self.sizes, {})
            if not closed:
                (opened if is_open else crossed).append(number)
        return crossed, opened

    def _starts_of(self, positions: dict[str, Any]) -> dict[str, Any]:
        """First index of a slice along each axis, from its position among the slices of each."""
        starts = {axis: self._start(axis, position) for axis, position in positions.items()}
        if self.follow is not None:
            starts["keys"] = self.follow(starts["rows"])
        return starts

    def _start(self, axis: str, position: Any) -> Any:
        """First index of a slice along an axis, traced if ``position`` is."""
        if self.counts[axis] == 1:
            return 0
        first, last = position * self.sizes[axis], self.lengths[axis] - self.sizes[axis]
        return min(first, last) if isinstance(position, int) else jnp.minimum(first, last)

    def _positions(self, number: Any) -> dict[str, Any]:
        """Which slice along each axis; the last axis varies fastest."""
        positions = {}
        for axis in reversed(list(self.sizes)):
            positions[axis], number = number % self.counts[axis], number // self.counts[axis]
        return positions

    def cell(self, number: Any) -> Cell:
        """The slice of that number."""
        positions = self._positions(number)
        starts = self._starts_of(positions)
        fresh: dict[str, jax.Array] = {}
        for axis, position in positions.items():
            size, count = self.sizes[axis], self.counts[axis]
            if count * size != self.lengths[axis] and count > 1:
                fresh[axis] = starts[axis] + jnp.arange(size) >= position * size
        return Cell(starts, fresh)

    def _sliced(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> list[tuple[int, str]]:
        """The dims of an array to slice; a dim of size one is either whole or broadcast."""
        names = (*batch_axes(len(shape) - len(axes)), *axes)
        return [
            (dim, axis)
            for dim, axis in enumerate(names)
            if self.sizes.get(axis, shape[dim]) != shape[dim] and shape[dim] != 1
        ]

    def take(self, array: jax.Array, axes: tuple[str, ...], cell: Cell) -> jax.Array:
        """An array's part in a slice, head-major."""
        sizes = self._part_sizes(array.shape, axes)
        if sizes != list(array.shape):
            array = jax.lax.dynamic_slice(array, self._starts(array, axes, cell), sizes)
        return head_major(array, axes)

    def _put(
        self, total: jax.Array, piece: jax.Array, axes: tuple[str, ...], cell: Cell
    ) -> jax.Array:
        piece = caller_major(piece.astype(total.dtype), axes)
        return jax.lax.dynamic_update_slice(total, piece, self._starts(total, axes, cell))

    def _starts(self, array: jax.Array, axes: tuple[str, ...], cell: Cell) -> list[Any]:
        """Where a slice begins in each dim of an array."""
        starts: list[Any] = [jnp.int32(0)] * array.ndim
        for dim, axis in self._sliced(array.shape, axes):
            starts[dim] = cell.starts[axis]
        return starts


def _at(finish: Finish, outer: Cell, cell: Cell, parts: Parts, slices: Sequence[Any]) -> Parts:
    return finish(Cell(outer.starts | cell.starts, {}), parts, slices)


def _finished(
    finish: Finish | None,
    totals: Parts,
    outputs: Sequence[Output],
    arrays: Sequence[jax.Array | None],
    axes: Sequence[tuple[str, ...]],
) -> Parts:
    """Whole outputs, from what was joined."""
    if finish is None:
        return totals
    parts = tuple(head_major(one, out.axes) for one, out in zip(totals, outputs, strict=True))
    pairs = zip(arrays, axes, strict=True)
    slices = [None if one is None else head_major(one, names) for one, names in pairs]
    finished = zip(finish(Cell({}, {}), parts, slices), outputs, strict=True)
    return tuple(caller_major(one.astype(out.dtype), out.axes) for one, out in finished)


def _repeat(
    step: Callable[..., tuple[jax.Array, ...]],
    totals: tuple[jax.Array, ...],
    numbers: jax.Array,
    count: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """``step(totals, number)`` for the first ``count`` numbers, all if that is None."""
    if count is None:
        return jax.lax.scan(lambda old, number: (step(old, number), None), totals, numbers)[0]
    repeated = jax.lax.fori_loop(0, count, lambda n, old: step(old, numbers[n]), totals)
    return cast(tuple[jax.Array, ...], repeated)


def batch_axes(count: int) -> tuple[str, ...]:
    """The names of an array's leading dims."""
    return tuple(f"batch{dim}" for dim in range(count))


def vary_alike(arrays: Sequence[jax.Array], like: Sequence[jax.Array | None]) -> list[jax.Array]:
    """The arrays, varying over all mesh axes that any array of ``like`` varies over.

    Inside ``shard_map`` operands and carries must agree.
    """
    axes: frozenset[str] = frozenset().union(
        *(varying_axes(array) for array in like if array is not None)
    )
    return [
        jax.lax.pcast(array, tuple(missing), to="varying")
        if (missing := axes - varying_axes(array))
        else array
        for array in arrays
    ]


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Mesh axes of a ``shard_map`` that an array differs along, as far as JAX is told."""
    return jax.typeof(array).manual_axis_type.varying  # type: ignore[no-any-return, unused-ignore]


def sum_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the dims that ``shape`` broadcasts."""
    dims = tuple(dim for dim, size in enumerate(shape) if size == 1 and array.shape[dim] != 1)
    return jnp.sum(array, axis=dims, keepdims=True) if dims else array
