"""Slices: where they lie, how the parts are taken and put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import Inputs, caller_major, head_major, in_head_major
from autochunk.plan import slice_count


class Output(NamedTuple):
    """An output of the sliced computation: its axes, whole shape, dtype and first content."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    fill: float = 0.0


class Cell(NamedTuple):
    """Where one slice lies.

    Its first index along each axis, which of its elements no earlier slice had, and whether every
    row of it is known to see every key.
    """

    starts: dict[str, Any]
    fresh: dict[str, jax.Array]
    is_open: bool = False


class Cover(Protocol):
    """What is known of blocks of rows and keys: see ``Terms.block``."""

    names: tuple[str, ...]
    """The inputs that it depends on; without them it is known while tracing."""

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """Whether a block is closed, and whether it is open, with the slices of those inputs.

        Without them, what is known while tracing.
        """
        ...


Join = Callable[[tuple[jax.Array, ...], tuple[jax.Array, ...]], tuple[jax.Array, ...]]


def add(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Parts that are summed."""
    return tuple(one + other for one, other in zip(old, new, strict=True))


class Grid:
    """Runs a computation on every slice in turn and puts the parts together.

    Slices along an axis have one size; where it does not divide the axis, the last one begins
    earlier and overlaps its neighbour. Results written twice are equal; results that are joined
    must weigh the repeated elements with ``Cell.fresh``, zero for those. With ``follow`` each slice
    of rows has one slice of keys, which begins where that says of its first row.
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
        compute: Callable[..., tuple[jax.Array, ...]],
        arrays: Sequence[jax.Array | None],
        axes: Sequence[tuple[str, ...]],
        outputs: Sequence[Output],
        join: Join | None = None,
    ) -> tuple[jax.Array, ...]:
        """``compute(cell, *slices)`` gives one part per output.

        Parts are written in place, or joined with what is there. Slices and parts are head-major.
        """
        inner = {axis: size for axis, size in self.sizes.items() if axis in ("rows", "keys")}
        outer = {axis: size for axis, size in self.sizes.items() if axis not in inner}
        # Keys, values and their cotangents are taken and put once for each batch element and head,
        # not for each slice of its rows: unless an output, such as the cotangent of a broadcast
        # bias, is shared by all, and would be joined whole each time.
        groups = Grid(outer, self.lengths, cover=None, differentiable=False)
        shared = any(not groups._sliced(output.shape, output.axes) for output in outputs)
        if self.differentiable or shared or self._cells(outer) == 1 or self._cells(inner) == 1:
            return self._scan(compute, arrays, axes, outputs, join)
        within = Grid(inner, self.lengths, self.cover, differentiable=False, follow=self.follow)

        def group(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
            def one(place: Cell, *slices: Any) -> tuple[jax.Array, ...]:
                starts, fresh = cell.starts | place.starts, cell.fresh | place.fresh
                return compute(Cell(starts, fresh, place.is_open), *slices)

            parts = [groups.part(output) for output in outputs]
            return within._scan(one, arrays, [in_head_major(names) for names in axes], parts, join)

        return groups._scan(group, arrays, axes, outputs, join)

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
    ) -> tuple[jax.Array, ...]:

        def part(is_open: bool, index: Any, arrays: Sequence[Any]) -> tuple[jax.Array, ...]:
            cell = self.cell(index)._replace(is_open=is_open)
            pairs = zip(arrays, axes, strict=True)
            taken = [None if one is None else self.take(one, names, cell) for one, names in pairs]
            return compute(cell, *taken)

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

        None is all. Closed ones are left out; of those that are open nothing need be excluded.
        Where it is symbolic how many there are, they cannot be looked at one by one.
        """
        if self.cover is None or not isinstance(self.cells, int):
            return [(False, jnp.arange(self.cells, dtype=jnp.int32), None)]
        crossed, opened = self._by_tracing(self.cover)
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
        """Numbers of the slices that may be crossed, and of the open ones, by what is static."""
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
        """First index of a slice along each axis, by which slice along each it is."""
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
