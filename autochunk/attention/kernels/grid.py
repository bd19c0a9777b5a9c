"""Slices: where they lie, how the parts are taken and put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import Call, Inputs, caller_major, head_major, in_head_major
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import (
    Plan,
    Slices,
    balanced,
    causal_block,
    cuts_blocks,
    slice_logits,
)


class Output(NamedTuple):
    """An output of the sliced computation.

    Its axes, whole shape, dtype and what it is filled with at first.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    fill: float = 0.0


class Cell(NamedTuple):
    """Where one slice lies.

    Its first index along each axis, which of its elements no earlier slice had, and whether it is
    known to be below the diagonal.
    """

    starts: dict[str, Any]
    fresh: dict[str, jax.Array]
    below: bool = False


Join = Callable[[tuple[jax.Array, ...], tuple[jax.Array, ...]], tuple[jax.Array, ...]]


def add(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Parts that are summed."""
    return tuple(one + other for one, other in zip(old, new, strict=True))


class Grid:
    """Runs a computation on every slice in turn and puts the parts together.

    Slices along an axis have one size; where it does not divide the axis, the last one begins
    earlier and overlaps its neighbour. Results written twice are equal; results that are joined
    must weigh the repeated elements with ``Cell.fresh``, zero for those.
    """

    def __init__(
        self, sizes: dict[str, int], lengths: dict[str, int], triangular: bool, differentiable: bool
    ) -> None:
        self.sizes, self.lengths, self.triangular, self.differentiable = (
            sizes,
            lengths,
            triangular,
            differentiable,
        )
        self.counts = {axis: -(-lengths[axis] // size) for axis, size in sizes.items()}
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
        outer, inner = (
            {
                axis: size
                for axis, size in self.sizes.items()
                if (axis in ("rows", "keys")) == within
            }
            for within in (False, True)
        )
        # Keys, values and their cotangents are taken and put once for each batch element and head,
        # not for each slice of its rows: unless an output, such as the cotangent of a broadcast
        # bias, is shared by all, and would be joined whole each time.
        groups = Grid(outer, self.lengths, triangular=False, differentiable=False)
        shared = any(not groups._sliced(output.shape, output.axes) for output in outputs)
        if self.differentiable or shared or self._cells(outer) == 1 or self._cells(inner) == 1:
            return self._scan(compute, arrays, axes, outputs, join)
        within = Grid(inner, self.lengths, self.triangular, differentiable=False)

        def group(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
            def one(place: Cell, *slices: Any) -> tuple[jax.Array, ...]:
                return compute(
                    Cell(cell.starts | place.starts, cell.fresh | place.fresh, place.below), *slices
                )

            parts = [
                Output(
                    in_head_major(output.axes), groups.part_shape(output), output.dtype, output.fill
                )
                for output in outputs
            ]
            return within._scan(one, arrays, [in_head_major(names) for names in axes], parts, join)

        return groups._scan(group, arrays, axes, outputs, join)

    def _cells(self, axes: Sequence[str] | dict[str, int]) -> int:
        return math.prod(self.counts[axis] for axis in axes)

    def part_shape(self, output: Output) -> tuple[int, ...]:
        """The shape of an output's part in a slice, head-major."""
        sizes = list(output.shape)
        for dim, axis in self._sliced(output.shape, output.axes):
            sizes[dim] = self.sizes[axis]
        leading = len(sizes) - len(output.axes)
        return (
            *sizes[:leading],
            *(sizes[leading + output.axes.index(axis)] for axis in in_head_major(output.axes)),
        )

    def _scan(
        self,
        compute: Callable[..., tuple[jax.Array, ...]],
        arrays: Sequence[jax.Array | None],
        axes: Sequence[tuple[str, ...]],
        outputs: Sequence[Output],
        join: Join | None,
    ) -> tuple[jax.Array, ...]:

        def part(
            below: bool, index: Any, arrays: Sequence[jax.Array | None]
        ) -> tuple[jax.Array, ...]:
            cell = self.cell(index)._replace(below=below)
            slices = [
                None if array is None else self.take(array, names, cell)
                for array, names in zip(arrays, axes, strict=True)
            ]
            return compute(cell, *slices)

        if self.cells == 1:
            return tuple(
                caller_major(piece.astype(output.dtype), output.axes)
                for piece, output in zip(part(False, 0, arrays), outputs, strict=True)
            )
        if self.differentiable:
            # Arrays enter whole: what the checkpoint keeps is then the same for every slice, and
            # kept once.
            part = jax.checkpoint(part, prevent_cse=False, static_argnums=0)

        def step(
            below: bool, totals: tuple[jax.Array, ...], index: jax.Array
        ) -> tuple[tuple[jax.Array, ...], None]:
            pieces = part(below, index, arrays)
            cell = self.cell(index)
            if join is not None:
                pieces = join(
                    tuple(
                        self.take(total, output.axes, cell)
                        for total, output in zip(totals, outputs, strict=True)
                    ),
                    pieces,
                )
            return tuple(
                self._put(total, piece, output.axes, cell)
                for total, piece, output in zip(totals, pieces, outputs, strict=True)
            ), None

        totals = tuple(
            vary_alike(
                [jnp.full(output.shape, output.fill, output.dtype) for output in outputs], arrays
            )
        )
        for below, numbers in self._passes():
            totals, _ = jax.lax.scan(
                functools.partial(step, below), totals, jnp.asarray(numbers, jnp.int32)
            )
        return totals

    def _passes(self) -> list[tuple[bool, list[int]]]:
        """The slices to compute.

        All at once; or those that the diagonal crosses, then those below it, which need no mask.
        Those above have no logits.
        """
        if not self.triangular:
            return [(False, list(range(self.cells)))]
        crossed, below = [], []
        for number in range(self.cells):
            positions = self._positions(number)
            first_row, first_key = (self._start(axis, positions[axis]) for axis in ("rows", "keys"))
            if first_key + self.sizes["keys"] <= first_row + 1:
                below.append(number)
            elif first_key < first_row + self.sizes["rows"]:
                crossed.append(number)
        return [(kind, numbers) for kind, numbers in ((False, crossed), (True, below)) if numbers]

    def _start(self, axis: str, position: int) -> int:
        start: int = min(position * self.sizes[axis], self.lengths[axis] - self.sizes[axis])
        return start

    def _positions(self, number: Any) -> dict[str, Any]:
        """Which slice along each axis; the last axis varies fastest."""
        positions = {}
        for axis in reversed(list(self.sizes)):
            positions[axis], number = number % self.counts[axis], number // self.counts[axis]
        return positions

    def cell(self, number: Any) -> Cell:
        """The slice of that number."""
        starts: dict[str, Any] = {}
        fresh: dict[str, jax.Array] = {}
        for axis, position in self._positions(number).items():
            count, size, length = self.counts[axis], self.sizes[axis], self.lengths[axis]
            starts[axis] = jnp.minimum(position * size, length - size) if count > 1 else 0
            if count * size != length:
                fresh[axis] = starts[axis] + jnp.arange(size) >= position * size
        return Cell(starts, fresh)

    def _sliced(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> list[tuple[int, str]]:
        """The dims of an array to slice; a dim of size one is either whole or broadcast."""
        names = (*batch_axes(len(shape) - len(axes)), *axes)
        return [
            (dim, axis)
            for dim, axis in enumerate(names)
            if self.counts.get(axis, 1) > 1 and shape[dim] > 1
        ]

    def take(self, array: jax.Array, axes: tuple[str, ...], cell: Cell) -> jax.Array:
        """An array's part in a slice, head-major."""
        sizes = list(array.shape)
        for dim, axis in self._sliced(array.shape, axes):
            sizes[dim] = self.sizes[axis]
        if sizes != list(array.shape):
            array = jax.lax.dynamic_slice(array, self._starts(array, axes, cell), sizes)
        return head_major(array, axes)

    def _put(
        self, total: jax.Array, piece: jax.Array, axes: tuple[str, ...], cell: Cell
    ) -> jax.Array:
        return jax.lax.dynamic_update_slice(
            total, caller_major(piece.astype(total.dtype), axes), self._starts(total, axes, cell)
        )

    def _starts(self, array: jax.Array, axes: tuple[str, ...], cell: Cell) -> list[Any]:
        """Where a slice begins in each dim of an array."""
        starts: list[Any] = [jnp.int32(0)] * array.ndim
        for dim, axis in self._sliced(array.shape, axes):
            starts[dim] = cell.starts[axis]
        return starts


def batch_axes(count: int) -> tuple[str, ...]:
    """The names of an array's leading dims."""
    return tuple(f"batch{dim}" for dim in range(count))


def vary_alike(arrays: Sequence[jax.Array], like: Sequence[jax.Array | None]) -> list[jax.Array]:
    """The arrays, varying over all mesh axes that any array of ``like`` varies over.

    Inside ``shard_map`` operands and carries must agree.
    """
    axes: frozenset[str] = frozenset().union(
        *(_varying_axes(array) for array in like if array is not None)
    )
    return [
        jax.lax.pcast(array, tuple(missing), to="varying")
        if (missing := axes - _varying_axes(array))
        else array
        for array in arrays
    ]


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying  # type: ignore[no-any-return, unused-ignore]


class Problem:
    """One lowering: inputs with their leading dims made fit for slicing, and the slices."""

    def __init__(self, inputs: Inputs, call: Call, plan: Plan, differentiable: bool) -> None:
        self.leading = inputs.query.shape[:-4]
        self.dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
        self.shape = inputs.logits
        self.triangular = cuts_blocks(call.is_causal, call.has_mask)
        self.slices: Slices = slice_logits(
            plan, causal_block(self.shape) if self.triangular else self.shape
        )
        self.differentiable = differentiable
        # Flattening leading dims that are sharded would make XLA gather them; only slicing over
        # them needs it.
        self.flatten = self.slices.batch < self.shape.batch or IMPLEMENTATIONS[
            plan.implementation
        ].slicing[:1] == ("batch",)
        self.runs = _flattenable_runs(
            [array.shape[: len(self.leading)] for array in inputs if array is not None]
        )
        self.inputs = inputs.map(self.fit)

    def fit(self, array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Flattens the leading dims, if they are to be sliced.

        Into one, or, where an array broadcasts over some of them, into as few as will do.
        """
        leading, rest = array.shape[: -len(axes)], array.shape[-len(axes) :]
        return array.reshape((*self._flat(leading), *rest)) if self.flatten else array

    def _flat(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(leading[dim] for dim in run) for run in self.runs)

    def output(
        self, axes: tuple[str, ...], dtype: Any, features: int = 1, fill: float = 0.0
    ) -> Output:
        """A whole output of these axes, its leading dims as those of the inputs here."""
        sizes = {**self.shape._asdict(), "features": features}
        leading = self._flat(self.leading) if self.flatten else self.leading
        return Output(axes, (*leading, *(sizes[axis] for axis in axes)), dtype, fill)

    def grid(self) -> Grid:
        """The slices."""
        sizes = {axis: getattr(self.slices, axis) for axis in ("heads", "rows", "keys")}
        lengths = {axis: getattr(self.shape, axis) for axis in sizes}
        if self.flatten:
            flat = self._flat(self.leading)
            names = batch_axes(len(flat))
            sizes = (
                dict(zip(names, _sizes_along_dims(self.slices.batch, flat), strict=True)) | sizes
            )
            lengths |= dict(zip(names, flat, strict=True))
        return Grid(sizes, lengths, self.triangular, self.differentiable)

    def restore(self, array: jax.Array, trailing: int) -> jax.Array:
        """An output with the leading dims that the caller knows."""
        return array.reshape(self.leading + array.shape[-trailing:]) if self.flatten else array


def _flattenable_runs(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Runs of neighbouring leading dims over which each array is either whole or broadcast.

    Those can be flattened without a copy.
    """
    runs: list[list[int]] = []
    before = None
    for dim, sizes in enumerate(zip(*shapes, strict=True)):
        own = [size > 1 for size in sizes]
        if runs and (before in (None, own) or not any(own)):
            runs[-1].append(dim)
        else:
            runs.append([dim])
        before = own if any(own) else before
    return runs


def _sizes_along_dims(batch: int, flat: Sequence[int]) -> list[int]:
    """A slice's size along each flattened leading dim, for at most ``batch`` elements at once.

    The last dims are sliced last.
    """
    sizes: list[int] = []
    for length in reversed(flat):
        sizes.insert(0, balanced(length, min(length, batch)))
        batch = batch // length if sizes[0] == length else 1
    return sizes


def sum_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the dims that ``shape`` broadcasts."""
    dims = tuple(dim for dim, size in enumerate(shape) if size == 1 and array.shape[dim] != 1)
    return jnp.sum(array, axis=dims, keepdims=True) if dims else array
