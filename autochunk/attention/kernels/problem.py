"""Problem: what one lowering works on, and the slices that its plan gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.cells import Output
from autochunk.attention.kernels.grid import Grid, batch_axes
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.terms import (
    Block,
    Span,
    Terms,
    covering,
    excludes,
    may_see_nothing,
    reach_block,
)
from autochunk.blocks import band_keys, block_form, block_shape
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import (
    Plan,
    Slices,
    balanced,
    runs_dense,
    slice_count,
    slice_logits,
)


def check_slices(inputs: Inputs, call: Call) -> None:
    """Cuts a call into slices only to see whether that works.

    Raises:
      InconclusiveDimensionOperation: the slices depend on symbolic sizes.
      ArgumentError: a limit is less than one logit.
    """
    for plan in (call.plans.forward, call.plans.training):
        if not runs_dense(plan, inputs.logits):
            Problem(inputs, call, plan.sliced(), differentiable=False).grid()


class Problem:
    """One lowering: inputs with their leading dims prepared for slicing, and the slices."""

    def __init__(self, inputs: Inputs, call: Call, plan: Plan, differentiable: bool) -> None:
        self.leading = inputs.query.shape[:-4]
        self.dtype = jnp.promote_types(inputs.query.dtype, jnp.float32)
        self.shape = inputs.logits
        self.cover = BlockCover(inputs, call)
        form = self.cover.form
        block = block_shape(self.shape, form)
        self.slices: Slices = slice_logits(plan, block)
        self.cover.look_at_blocks(self.slices)
        self._follow: Callable[[Any], Any] | None = None
        if form and form.band is not None and self.slices.keys == block.keys < self.shape.keys:
            band = band_keys(self.slices.rows, form.band, self.shape.keys)
            self.slices = self.slices._replace(keys=band)
            # A static number, or one that is traced.
            moved = 0 if inputs.query_offset is None else inputs.query_offset.reshape(())
            self._follow = functools.partial(
                _first_key, call.reach, call.offset + moved, self.shape.keys - band
            )
        self.differentiable = differentiable
        self.excludes = excludes(inputs, call)
        self.may_see_nothing = may_see_nothing(inputs, call)
        # Flattening leading dims that are sharded would make XLA gather them; only slicing over
        # them needs it.
        batch_first = IMPLEMENTATIONS[plan.implementation].slicing[:1] == ("batch",)
        self.flatten = self.slices.batch != self.shape.batch or batch_first
        leading = [array.shape[: len(self.leading)] for array in inputs.present.values()]
        self.runs = _flattenable_runs(leading)
        self.inputs = inputs.map(self.fit)

    def fit(self, array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Flattens the leading dims, if they are to be sliced.

        Into one dim, or into as few as possible where an array broadcasts over some of them.
        """
        own = array.ndim - len(axes)
        leading, rest = array.shape[:own], array.shape[own:]
        return array.reshape((*self._flat(leading), *rest)) if self.flatten else array

    def _flat(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(leading[dim] for dim in run) for run in self.runs)

    def output(
        self, axes: tuple[str, ...], dtype: Any, features: int = 1, fill: float = 0.0
    ) -> Output:
        """A whole output of these axes; its leading dims are like those of the inputs here."""
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
            along = _sizes_along_dims(self.slices.batch, flat)
            sizes = dict(zip(names, along, strict=True)) | sizes
            lengths |= dict(zip(names, flat, strict=True))
        cover = self.cover if self.cover.form else None
        return Grid(sizes, lengths, cover, self.differentiable, self._follow)

    @property
    def whole_rows(self) -> bool:
        """Whether a slice has all keys that its rows see."""
        return self._follow is not None or self.slices.keys == self.shape.keys

    def restore(self, array: jax.Array, trailing: int) -> jax.Array:
        """An output with the leading dims that the caller knows."""
        return array.reshape(self.leading + array.shape[-trailing:]) if self.flatten else array


class BlockCover:
    """What the terms of a call say about blocks.

    Attributes:
      names: of the arrays that say it.
      form: what decides how blocks are cut; None where nothing says anything about blocks.
    """

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self._call = call
        self._leading = inputs.query.ndim - 4
        self.names = covering(inputs.present, call)
        offset, mask = inputs.query_offset, inputs.mask
        one_offset = offset is None or math.prod(offset.shape) == 1
        # Beside positions, which are known while tracing, a mask seldom hides more blocks.
        has_row_mask = call.reach == (None, None) and mask is not None and 1 not in mask.shape[-2:]
        self.form = block_form(call.reach, self.names, one_offset, has_row_mask)
        self._mask = mask if has_row_mask else None
        self._seen: Block | None = None
        if has_row_mask:
            self.names += ("mask",)

    def look_at_blocks(self, slices: Slices) -> None:
        """Which blocks of a mask of each row's own are closed for all heads, or open."""
        if self._mask is None:
            return
        found: list[jax.Array] = []
        for reduce in (jnp.any, jnp.all):
            of_all = reduce(self._mask, tuple(range(self._mask.ndim - 2)))
            of_rows = _of_blocks(reduce, of_all, 0, slices.rows)
            found.append(_of_blocks(reduce, of_rows, 1, slices.keys))
        self._seen = ~found[0], found[1]

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """As ``Cover`` says."""
        rows, keys = (Span(starts.get(axis, 0), sizes[axis]) for axis in ("rows", "keys"))
        if arrays and self._seen is not None:
            return self._by_mask(self._seen, rows, keys, arrays)
        if arrays:
            return Terms(arrays, rows, keys, self._call, self._leading, self.names).block()
        if "query_offset" in self.names:
            return False, False
        first, last = (row + self._call.offset for row in (rows.start, rows.last))
        closed, is_open = reach_block(self._call, first, last, keys)
        return closed, is_open and not self.names

    def _by_mask(self, seen: Block, rows: Span, keys: Span, arrays: dict[str, jax.Array]) -> Block:
        """What a mask of each row's own says of a block, and all else."""
        # rounded up: the last block overlaps
        row, key = (-(-span.start // span.size) for span in (rows, keys))
        closed, is_open = (one[row, key] for one in seen)
        rest = {name: one for name, one in arrays.items() if name != "mask"}
        if not rest:
            return closed, is_open
        others = Terms(rest, rows, keys, self._call, self._leading, tuple(rest)).block()
        return closed | others[0], is_open & others[1]


def _of_blocks(reduce: Callable[..., jax.Array], array: jax.Array, axis: int, size: int) -> Any:
    """An array reduced over each block along an axis, of which the last may overlap."""
    length = array.shape[axis]
    count = slice_count(length, size)
    first = jax.lax.slice_in_dim(array, 0, (count - 1) * size, axis=axis)
    shape = (*array.shape[:axis], count - 1, size, *array.shape[axis + 1 :])
    last = jax.lax.slice_in_dim(array, length - size, length, axis=axis)
    return jnp.concatenate(
        [reduce(first.reshape(shape), axis + 1), reduce(last, axis, keepdims=True)], axis
    )


def _first_key(reach: tuple[int | None, int | None], offset: Any, last: int, row: Any) -> Any:
    """Where the keys of a slice begin whose first row is ``row``: at ``last`` at most."""
    first = row + offset - (reach[0] or 0)
    return max(0, min(first, last)) if isinstance(first, int) else jnp.clip(first, 0, last)


def _flattenable_runs(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Runs of neighbouring leading dims over which each array is either whole or broadcast.

    Those can be flattened without a copy.
    """
    runs: list[list[int]] = []
    before = None
    for dim, sizes in enumerate(zip(*shapes, strict=True)):
        own = [size != 1 for size in sizes]
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
        # Of symbolic sizes only equality may be known.
        whole = length == batch
        size = length if whole else 1 if batch == 1 else balanced(length, min(length, batch))
        sizes.insert(0, size)
        batch = batch // length if not whole and size == length else 1
    return sizes
