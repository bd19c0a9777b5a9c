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
        offset = inputs.query_offset
        one_offset = offset is None or math.prod(offset.shape) == 1
        self.form = block_form(call.reach, self.names, one_offset)

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """As ``Cover`` says."""
        rows, keys = (Span(starts.get(axis, 0), sizes[axis]) for axis in ("rows", "keys"))
        if arrays:
            return Terms(arrays, rows, keys, self._call, self._leading, self.names).block()
        if "query_offset" in self.names:
            return False, False
        first, last = (row + self._call.offset for row in (rows.start, rows.last))
        closed, is_open = reach_block(self._call, first, last, keys)
        return closed, is_open and not self.names


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
