"""The attention itself, slice by slice, as JAX primitives.

Shapes here are head-major: query [..., H, G, T', K], key [..., H, T, K], value [..., H, T, V], bias and mask [..., H, G, T', T] with any dim of size one
broadcasting; H counts key/value heads and G the query heads that share one. ``attention`` is the entry.

Why primitives: attention, its tangent map and its cotangent map each see their operands' full shapes when they are lowered, vmapped axes included, so
the limit on the logits holds under ``vmap``; and the differentiation rule knows that a call is differentiated, so that forward and training can run
different plans. A ``custom_vjp`` offers neither, nor forward mode. Derivatives beyond the first fall back to plain JAX over checkpointed slices.

Backward: the row maximum and the sum of exponentials are saved and the weights recomputed per slice (Dao et al. 2022, FlashAttention,
https://arxiv.org/abs/2205.14135). A row of keys too long for the limit is taken in pieces with a running maximum and sum (Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682).

What was tried on CPU (f32, T=4096, 8 heads of 64; ratios to haiku's dense attention on the same machine): head-major order with the division after the second
product 6.8x forward, with the division before it 4.6x; masks as an added term 3.1x against 1.2x for ``where``, which keeps XLA from fusing; backward with
transposed logits 2.8x against 2.3x for the plain orientation; slices of a Python loop save no memory under ``jit``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autochunk.plan import SLICING_ORDER, LogitsShape, Plan, Plans, Slices, slice_logits


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    scale: float
    is_causal: bool
    has_bias: bool
    has_mask: bool
    plans: Plans


def attention(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, mask: jax.Array | None, call: Call) -> jax.Array:
    """Attention by the call's plans: [..., H, G, T', V] in the query's dtype.

    Args:
      query: [..., H, G, T', K], with at least one leading dim, no dim of size zero.
      key: [..., H, T, K].
      value: [..., H, T, V].
      bias: added to the scaled logits; same rank as the logits, dims of size one broadcast.
      mask: boolean, False takes no part; same rank as the logits, dims of size one broadcast.
      call: scale, causality and the plans; says whether bias and mask are there.
    """
    operands = _operands(query, key, value, bias, mask)
    (out,) = attention_p.bind(*_vary_alike(operands, operands), call=call)
    return cast(jax.Array, out)


def _operands(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(array for array in arrays if array is not None)


class _Inputs(NamedTuple):
    """The arrays that every computation starts from, whole or one slice of each."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None

    def map(self, function: Callable[[jax.Array, tuple[str, ...]], jax.Array]) -> _Inputs:
        """``function(array, its axes)`` of each array that is there."""
        return _Inputs(*(array if array is None else function(array, axes) for array, axes in zip(self, _INPUT_AXES, strict=True)))  # type: ignore[arg-type]


# Trailing axes of each kind of array, by name; an axis that the plan slices is sliced in the array.
_QUERY = ("heads", "groups", "rows", "features")
_KEY = ("heads", "keys", "features")
_LOGITS = ("heads", "groups", "rows", "keys")
_STATS = ("heads", "groups", "rows")
_INPUT_AXES = (_QUERY, _KEY, _KEY, _LOGITS, _LOGITS)


def _split(operands: Sequence[Any], call: Call) -> tuple[_Inputs, list[Any]]:
    """Separates the inputs from what a primitive takes besides."""
    rest = list(operands)
    query, key, value = rest[:3]
    del rest[:3]
    bias = rest.pop(0) if call.has_bias else None
    mask = rest.pop(0) if call.has_mask else None
    return _Inputs(query, key, value, bias, mask), rest


# --- The grid of slices -----------------------------------------------------------------------------------------------


class _Array(NamedTuple):
    """An output of the sliced computation: its axes, whole shape and dtype."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any


class _Cell(NamedTuple):
    """Where one slice lies: its first index along each axis, and which of its elements no earlier slice had."""

    starts: dict[str, Any]
    fresh: dict[str, jax.Array]


class _Grid:
    """Runs a computation on every slice in turn and puts the parts together.

    Slices along an axis have one size; where it does not divide the axis, the last one begins earlier and overlaps its neighbour. Results written twice
    are equal; results that are summed must weigh the repeated elements with ``_Cell.fresh``, zero for those.
    """

    def __init__(self, sizes: dict[str, int], shape: LogitsShape, differentiable: bool) -> None:
        self.differentiable = differentiable
        self.lengths = {axis: getattr(shape, axis) for axis in sizes}
        self.sizes = sizes
        self.counts = {axis: -(-self.lengths[axis] // size) for axis, size in sizes.items()}
        self.cells = math.prod(self.counts.values())

    def run(self, compute: Callable[..., tuple[jax.Array, ...]], arrays: Sequence[jax.Array | None], axes: Sequence[tuple[str, ...]],
            outputs: Sequence[_Array], add: bool) -> tuple[jax.Array, ...]:  # fmt: skip
        """``compute(cell, *slices)`` gives one part per output; parts are written in place, or added where ``add``."""

        def part(index: Any, arrays: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
            cell = self.cell(index)
            slices = [None if array is None else self.take(array, names, cell) for array, names in zip(arrays, axes, strict=True)]
            return compute(cell, *slices)

        if self.cells == 1:
            return tuple(piece.astype(output.dtype) for piece, output in zip(part(0, arrays), outputs, strict=True))
        if self.differentiable:
            # Arrays enter whole: what the checkpoint keeps is then the same for every slice, and kept once.
            part = jax.checkpoint(part, prevent_cse=False)

        def step(totals: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            pieces = part(index, arrays)
            cell = self.cell(index)
            return tuple(self._put(total, piece, output.axes, cell, add) for total, piece, output in zip(totals, pieces, outputs, strict=True)), None

        initial = tuple(_vary_alike([jnp.zeros(output.shape, output.dtype) for output in outputs], arrays))
        totals, _ = jax.lax.scan(step, initial, jnp.arange(self.cells, dtype=jnp.int32))
        return totals

    def cell(self, index: Any) -> _Cell:
        """The slice of that number."""
        starts: dict[str, Any] = {}
        fresh: dict[str, jax.Array] = {}
        for axis in reversed(list(self.sizes)):  # the last axis varies fastest
            count, size, length = self.counts[axis], self.sizes[axis], self.lengths[axis]
            if count == 1:
                starts[axis] = 0
                continue
            position, index = (index % count, index // count) if self.cells > count else (index, 0)
            starts[axis] = jnp.minimum(position * size, length - size)
            if count * size != length:
                fresh[axis] = starts[axis] + jnp.arange(size) >= position * size
        return _Cell(starts, fresh)

    def _sliced(self, array: jax.Array, axes: tuple[str, ...]) -> list[tuple[int, str]]:
        """The dims of an array to slice; a dim of size one is either whole or broadcast."""
        first = array.ndim - len(axes)
        dims = [(first + position, axis) for position, axis in enumerate(axes)]
        if first == 1:
            dims.insert(0, (0, "batch"))
        return [(dim, axis) for dim, axis in dims if self.counts.get(axis, 1) > 1 and array.shape[dim] > 1]

    def take(self, array: jax.Array, axes: tuple[str, ...], cell: _Cell) -> jax.Array:
        """An array's part in a slice."""
        dims = self._sliced(array, axes)
        starts: list[Any] = [jnp.int32(0)] * array.ndim
        sizes = list(array.shape)
        for dim, axis in dims:
            starts[dim], sizes[dim] = cell.starts[axis], self.sizes[axis]
        return jax.lax.dynamic_slice(array, starts, sizes) if dims else array

    def _put(self, total: jax.Array, piece: jax.Array, axes: tuple[str, ...], cell: _Cell, add: bool) -> jax.Array:
        starts: list[Any] = [jnp.int32(0)] * total.ndim
        for dim, axis in self._sliced(total, axes):
            starts[dim] = cell.starts[axis]
        if add:
            piece = jax.lax.dynamic_slice(total, starts, piece.shape) + piece
        return jax.lax.dynamic_update_slice(total, piece.astype(total.dtype), starts)


def _vary_alike(arrays: Sequence[jax.Array], like: Sequence[jax.Array | None]) -> list[jax.Array]:
    """The arrays, varying over all mesh axes that any array of ``like`` varies over: inside ``shard_map`` operands and carries must agree."""
    axes: frozenset[str] = frozenset().union(*(_varying_axes(array) for array in like if array is not None))
    return [jax.lax.pcast(array, tuple(missing), to="varying") if (missing := axes - _varying_axes(array)) else array for array in arrays]


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying  # type: ignore[no-any-return, unused-ignore]


class _Problem:
    """One lowering: inputs with their leading dims made fit for slicing, and the slices."""

    def __init__(self, inputs: _Inputs, plan: Plan, differentiable: bool) -> None:
        query = inputs.query
        self.leading = query.shape[:-4]
        heads, groups, rows, _ = query.shape[-4:]
        self.dtype = jnp.promote_types(query.dtype, jnp.float32)
        self.shape = LogitsShape(math.prod(self.leading), heads, groups, rows, inputs.key.shape[-2], self.dtype.itemsize)
        self.slices: Slices = slice_logits(plan, self.shape)
        self.differentiable = differentiable
        # Flattening leading dims that are sharded would make XLA gather them; only slicing over them needs it.
        self.flatten = self.slices.batch < self.shape.batch or SLICING_ORDER[plan.implementation][:1] == ("batch",)
        self.inputs = inputs.map(self.fit)

    def fit(self, array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Flattens the leading dims into one, if they are to be sliced."""
        leading, rest = array.shape[: -len(axes)], array.shape[-len(axes) :]
        if not self.flatten:
            return array
        if math.prod(leading) not in (1, self.shape.batch):
            array = jnp.broadcast_to(array, self.leading + rest)
            leading = self.leading
        return array.reshape((math.prod(leading), *rest))

    def output(self, axes: tuple[str, ...], dtype: Any, features: int = 1) -> _Array:
        sizes = {**self.shape._asdict(), "features": features}
        leading = (self.shape.batch,) if self.flatten else self.leading
        return _Array(axes, (*leading, *(sizes[axis] for axis in axes)), dtype)

    def grid(self, *axes: str) -> _Grid:
        return _Grid({axis: getattr(self.slices, axis) for axis in axes}, self.shape, self.differentiable)

    def unfit(self, total: jax.Array, operand: jax.Array) -> jax.Array:
        """A cotangent in its operand's own shape and dtype; what ``fit`` broadcast is summed."""
        if total.size != operand.size:
            total = _sum_to(total.reshape(self.leading + total.shape[1:]), operand.shape)
        return total.reshape(operand.shape).astype(operand.dtype)

    def restore(self, array: jax.Array, trailing: int) -> jax.Array:
        return array.reshape(self.leading + array.shape[-trailing:]) if self.flatten else array


# --- One slice --------------------------------------------------------------------------------------------------------


def _masked(dtype: Any) -> float:
    """Added to logits that take no part: so large that it absorbs any logit, and a fully masked row comes out uniform; finite, so that no NaN arises."""
    return -0.7 * float(jnp.finfo(dtype).max)


def _merge(array: jax.Array) -> jax.Array:
    """[..., G, T', K] to [..., G * T', K]: query heads that share a key head are more rows of one product."""
    *leading, groups, rows, size = array.shape
    return array.reshape((*leading, groups * rows, size))


def _folds_scale(query: jax.Array) -> bool:
    """Scaling the query costs less than scaling the logits, but rounds once more in half precision."""
    return query.dtype.itemsize >= 4


def _scaled(query: jax.Array, call: Call) -> jax.Array:
    return query * jnp.asarray(call.scale, query.dtype) if _folds_scale(query) else query


def _product(spec: str, one: jax.Array, other: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(spec, one, other, preferred_element_type=dtype)


class _SliceMath:
    """Logits and weights of one slice, in either orientation: [..., H, G * T', T], or transposed [..., H, T, G * T']."""

    def __init__(self, inputs: _Inputs, cell: _Cell, call: Call, problem: _Problem, transposed: bool) -> None:
        self.inputs, self.cell, self.call, self.transposed = inputs, cell, call, transposed
        self.dtype, self.differentiable = problem.dtype, problem.differentiable
        self.groups, self.rows = inputs.query.shape[-3:-1]
        self.query = _merge(_scaled(inputs.query, call))

    def product(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
        """[..., G * T', K] by [..., T, K] to the logits' shape."""
        if self.transposed:
            return _product("...sk,...tk->...st", keys, rows, self.dtype)
        return _product("...tk,...sk->...ts", rows, keys, self.dtype)

    def over_keys(self, weights: jax.Array, keys: jax.Array) -> jax.Array:
        """Sums over keys: [..., G * T', V]."""
        weights = weights.astype(keys.dtype)
        return _product("...st,...sv->...tv" if self.transposed else "...ts,...sv->...tv", weights, keys, self.dtype)

    def over_rows(self, weights: jax.Array, rows: jax.Array) -> jax.Array:
        """Sums over rows: [..., T, K]."""
        weights = weights.astype(rows.dtype)
        return _product("...st,...tk->...sk" if self.transposed else "...ts,...tk->...sk", weights, rows, self.dtype)

    def by_row(self, stat: jax.Array) -> jax.Array:
        """[..., G, T'] to something that broadcasts against the logits."""
        flat = stat.reshape((*stat.shape[:-2], self.groups * self.rows))
        return flat[..., None, :] if self.transposed else flat[..., :, None]

    def logits(self) -> jax.Array:
        logits = self.product(self.query, self.inputs.key)
        if not _folds_scale(self.inputs.query):
            logits = logits * jnp.asarray(self.call.scale, self.dtype)
        if self.inputs.bias is not None:
            logits = self.add(logits, self.inputs.bias.astype(self.dtype))
        allowed = self.allowed()
        if allowed is None:
            return logits
        masked = jnp.asarray(_masked(self.dtype), self.dtype)
        if self.differentiable:  # by JAX: the logits of a row that is masked throughout are then constant, as they should be
            return jnp.where(self.add(jnp.zeros_like(logits), allowed.astype(self.dtype)) > 0, logits, masked)
        return self.add(logits, jnp.where(allowed, jnp.zeros((), self.dtype), masked))

    def allowed(self) -> jax.Array | None:
        """Where a query may look, broadcast against [..., H, G, T', T]; None means everywhere."""
        allowed = self.inputs.mask
        if self.call.is_causal:
            starts = self.cell.starts
            row = starts.get("rows", 0) + jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.inputs.key.shape[-2]), 0)
            column = starts.get("keys", 0) + jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
            causal = jnp.expand_dims(row >= column, range(self.inputs.query.ndim - 2))
            allowed = causal if allowed is None else jnp.logical_and(allowed, causal)
        return allowed

    def add(self, logits: jax.Array, term: jax.Array) -> jax.Array:
        """Adds a term of axes [..., H, G, T', T]; dims of size one broadcast."""
        if self.groups == 1:  # without the extra axis XLA sees a plain softmax and may fuse it
            term = term[..., 0, :, :]
            return logits + (jnp.swapaxes(term, -1, -2) if self.transposed else term)
        if self.transposed:
            spread = logits.reshape((*logits.shape[:-1], self.groups, self.rows))
            return (spread + jnp.moveaxis(term, -1, -3)).reshape(logits.shape)
        return (self.by_axes(logits) + term).reshape(logits.shape)

    def by_axes(self, logits: jax.Array) -> jax.Array:
        """Back to the axes [..., H, G, T', T]."""
        if self.transposed:
            return jnp.moveaxis(logits.reshape((*logits.shape[:-1], self.groups, self.rows)), -3, -1)
        return logits.reshape((*logits.shape[:-2], self.groups, self.rows, logits.shape[-1]))

    def weights(self, maximum: jax.Array) -> jax.Array:
        """exp(logits - maximum), zero for keys that an earlier slice had."""
        weights = jnp.exp(self.logits() - self.by_row(maximum))
        return self.fresh_keys(weights)

    def fresh_keys(self, weights: jax.Array) -> jax.Array:
        """The weights, zero for keys that an earlier slice had."""
        fresh = self.cell.fresh.get("keys")
        if fresh is None:
            return weights
        return weights * _along(fresh, -2 if self.transposed else -1, weights.ndim).astype(weights.dtype)

    def live_rows(self, maximum: jax.Array) -> jax.Array | None:
        """Zero for rows [..., G, T'] that are masked throughout: no logit of theirs has a gradient. None where there is no mask."""
        if self.inputs.mask is None and not self.call.is_causal:
            return None
        return (maximum > 0.5 * _masked(self.dtype)).astype(self.dtype)

    def spread(self, rows: jax.Array) -> jax.Array:
        """[..., G * T', V] to [..., G, T', V]."""
        return rows.reshape((*rows.shape[:-2], self.groups, self.rows, rows.shape[-1]))

    def fresh_rows(self) -> jax.Array | None:
        """One for elements of [batch, H, G, T'] that no earlier slice had, zero for the others; None where that is all."""
        rank = self.inputs.query.ndim - 1
        factors = [_along(self.cell.fresh[axis], dim, rank) for axis, dim in (("batch", -4), ("heads", -3), ("rows", -1)) if axis in self.cell.fresh]
        return functools.reduce(jnp.logical_and, factors).astype(self.dtype) if factors else None


def _along(vector: jax.Array, dim: int, rank: int) -> jax.Array:
    """A vector along one dim (counted from the end) of an array of a rank, size one elsewhere."""
    return vector.reshape((1,) * (rank + dim) + (-1,) + (1,) * (-dim - 1))


def _weigh(array: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Rows [..., G, T', V] times a weight for each, [..., G, T']; None weighs nothing."""
    return array if weight is None else array * weight[..., None]


def _forward_slice(inputs: _Inputs, cell: _Cell, call: Call, problem: _Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised output, row maximum and sum of exponentials of one slice of keys."""
    maths = _SliceMath(inputs, cell, call, problem, transposed=False)
    logits = maths.logits()
    # A maximum of -inf, where a bias takes all keys of a slice out, would make NaN of the differences.
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=float(jnp.finfo(logits.dtype).min)))
    weights = maths.fresh_keys(jnp.exp(logits - maximum[..., None]))
    total = jnp.sum(weights, axis=-1)
    stats = (*maximum.shape[:-1], maths.groups, maths.rows)
    return maths.spread(maths.over_keys(weights, inputs.value)), maximum.reshape(stats), total.reshape(stats)


def _forward_over_keys(problem: _Problem, call: Call, cell: _Cell, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same over all keys, a piece at a time, with a running maximum and sum."""
    grid = problem.grid("keys")

    def step(carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        out, maximum, total = carry

        def part(index: jax.Array, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
            piece = grid.cell(index)
            taken = inputs.map(lambda array, axes: grid.take(array, axes, piece))
            both = _Cell(cell.starts | piece.starts, piece.fresh)
            return _forward_slice(taken, both, call, problem)

        part = jax.checkpoint(part, prevent_cse=False) if problem.differentiable else part
        new_out, new_maximum, new_total = part(index, inputs)
        largest = jnp.maximum(maximum, new_maximum)
        old, new = jnp.exp(maximum - largest), jnp.exp(new_maximum - largest)
        return (out * old[..., None] + new_out * new[..., None], largest, total * old + new_total * new), None

    first = _nothing_seen(inputs, problem.dtype)
    (out, maximum, total), _ = jax.lax.scan(step, first, jnp.arange(grid.cells, dtype=jnp.int32))
    return out, maximum, total


def _nothing_seen(inputs: _Inputs, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, maximum and sum before the first piece of keys; no logit is below the maximum."""
    stats = inputs.query.shape[:-1]
    empty = [jnp.zeros((*stats, inputs.value.shape[-1]), dtype), jnp.full(stats, jnp.finfo(dtype).min, dtype), jnp.zeros(stats, dtype)]
    out, maximum, total = _vary_alike(empty, inputs)
    return out, maximum, total


# --- Attention, its tangent map and its cotangent map ---------------------------------------------------------------------


def _forward(*operands: jax.Array, call: Call, plan: Plan, differentiable: bool = False) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials]"""
    inputs, _ = _split(operands, call)
    problem = _Problem(inputs, plan, differentiable)

    def compute(cell: _Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken = _Inputs(*arrays)
        if problem.slices.keys < problem.shape.keys:
            out, maximum, total = _forward_over_keys(problem, call, cell, taken)
        else:
            out, maximum, total = _forward_slice(taken, cell, call, problem)
        return (out / total[..., None]).astype(inputs.query.dtype), maximum, total

    stats = problem.output(_STATS, problem.dtype)
    out = problem.output(_QUERY, inputs.query.dtype, inputs.value.shape[-1])
    parts = problem.grid("batch", "heads", "rows").run(compute, problem.inputs, _INPUT_AXES, (out, stats, stats), add=False)
    return [problem.restore(part, trailing) for part, trailing in zip(parts, (4, 3, 3), strict=True)]


def _only_output(*operands: jax.Array, call: Call) -> list[jax.Array]:
    plan = call.plans.forward
    call.plans.used("forward")
    if plan.implementation == "dense":
        return [dense(*_split(operands, call)[0], call)]
    return _forward(*operands, call=call, plan=plan)[:1]


def _with_stats(*operands: jax.Array, call: Call, differentiable: bool = False) -> list[jax.Array]:
    return _forward(*operands, call=call, plan=call.plans.training, differentiable=differentiable)


def _tangent(*operands: jax.Array, call: Call, differentiable: bool = False) -> list[jax.Array]:
    """The output's tangent, linear in the inputs' tangents; operands are inputs, out, maximum, total, then tangents of query, key, value and bias."""
    inputs, (out, maximum, total, *tangents) = _split(operands, call)
    problem = _Problem(inputs, call.plans.training, differentiable)
    extra_axes = (_QUERY, _STATS, _STATS, _QUERY, _KEY, _KEY, _LOGITS)[: 6 + call.has_bias]
    extra = [problem.fit(array, axes) for array, axes in zip((out, maximum, total, *tangents), extra_axes, strict=True)]

    def compute(cell: _Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, d_query, d_key, d_value, *d_bias) = _Inputs(*arrays[:5]), arrays[5:]
        maths = _SliceMath(taken, cell, call, problem, transposed=False)
        weights = maths.weights(maximum)
        d_logits = maths.product(_merge(_scaled(d_query, call)), taken.key) + maths.product(maths.query, d_key)
        if not _folds_scale(d_query):
            d_logits = d_logits * jnp.asarray(call.scale, problem.dtype)
        if d_bias:
            d_logits = maths.add(d_logits, d_bias[0].astype(problem.dtype))
        moved = weights * d_logits
        d_out = maths.spread(maths.over_keys(moved, taken.value))
        d_out -= _weigh(out.astype(problem.dtype), jnp.sum(maths.by_axes(moved), axis=-1))
        d_out = _weigh(d_out, maths.live_rows(maximum)) + maths.spread(maths.over_keys(weights, d_value))
        return (_weigh(d_out / total[..., None], maths.fresh_rows()),)

    output = problem.output(_QUERY, problem.dtype, inputs.value.shape[-1])
    grid = problem.grid("batch", "heads", "rows", "keys")
    (d_out,) = grid.run(compute, (*problem.inputs, *extra), (*_INPUT_AXES, *extra_axes), (output,), add=True)
    return [problem.restore(d_out, 4).astype(inputs.query.dtype)]


def _cotangent(*operands: jax.Array, call: Call, wanted: tuple[bool, ...], differentiable: bool = False) -> list[jax.Array]:
    """Cotangents of those of query, key, value and bias that are wanted; operands are inputs, out, maximum, total, then the output's cotangent."""
    inputs, (out, maximum, total, d_out) = _split(operands, call)
    problem = _Problem(inputs, call.plans.training, differentiable)
    extra_axes = (_QUERY, _STATS, _STATS, _QUERY)
    extra = [problem.fit(array, axes) for array, axes in zip((out, maximum, total, d_out), extra_axes, strict=True)]

    def compute(cell: _Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, d_out) = _Inputs(*arrays[:5]), arrays[5:]
        maths = _SliceMath(taken, cell, call, problem, transposed=True)
        weights = maths.weights(maximum)
        # The sum of exponentials divides the rows' cotangents, not the weights: T' * V divisions instead of T' * T.
        scaled = _weigh(d_out.astype(problem.dtype) / total[..., None], maths.fresh_rows())
        live = _weigh(scaled, maths.live_rows(maximum))
        offset = jnp.sum(out.astype(problem.dtype) * live, axis=-1)
        d_weights = maths.product(_merge(live).astype(taken.value.dtype), taken.value)
        d_logits = weights * (d_weights - maths.by_row(offset))
        scale = jnp.asarray(call.scale, problem.dtype)
        query_factor = 1 if _folds_scale(taken.query) else scale
        gradients: tuple[Callable[[], jax.Array], ...] = (
            lambda: maths.spread(maths.over_keys(d_logits, taken.key)) * scale,
            lambda: maths.over_rows(d_logits, maths.query) * query_factor,
            lambda: maths.over_rows(weights, _merge(scaled).astype(taken.value.dtype)),
            lambda: _sum_to(maths.by_axes(d_logits), arrays[3].shape),
        )
        return tuple(itertools.compress((gradient() for gradient in gradients[: len(wanted)]), wanted))

    primals = _operands(*problem.inputs[:4])
    outputs = [_Array(axes, array.shape, problem.dtype) for array, axes in zip(primals, _INPUT_AXES[: len(primals)], strict=True)]
    grid = problem.grid("batch", "heads", "rows", "keys")
    totals = grid.run(compute, (*problem.inputs, *extra), (*_INPUT_AXES, *extra_axes), list(itertools.compress(outputs, wanted)), add=True)
    return [problem.unfit(total, like) for total, like in zip(totals, itertools.compress(_operands(*inputs[:4]), wanted), strict=True)]


def _sum_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the dims that ``shape`` broadcasts."""
    dims = tuple(dim for dim, size in enumerate(shape) if size == 1 and array.shape[dim] != 1)
    return jnp.sum(array, axis=dims, keepdims=True) if dims else array


def dense(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, mask: jax.Array | None, call: Call) -> jax.Array:
    """Attention in haiku's order of operations, all logits at once, in the input dtype: what everything else is measured against.

    Shapes as in ``attention``. Softmax is in the input dtype, masked logits are -1e30, as in ``hk.MultiHeadAttention``; in float16, where that would be
    -inf, they are its least number.
    """
    *leading, heads, groups, length, size = query.shape
    flat = query.reshape((*leading, heads * groups, length, size))
    queries, keys, values = (jnp.swapaxes(x, -2, -3) for x in (flat, key, value))  # [..., T, H, K]
    if groups > 1:
        keys, values = jnp.repeat(keys, groups, axis=-2), jnp.repeat(values, groups, axis=-2)
    logits = jnp.einsum("...thd,...Thd->...htT", queries, keys) * jnp.asarray(call.scale, query.dtype)
    if bias is not None:
        logits = logits + _ungrouped(bias, heads, groups).astype(logits.dtype)
    if call.is_causal:
        causal = jnp.expand_dims(jnp.tril(jnp.ones(logits.shape[-2:], bool)), range(logits.ndim - 2))
        mask = causal[..., None, :, :] if mask is None else jnp.logical_and(mask, causal[..., None, :, :])
    if mask is not None:
        logits = jnp.where(_ungrouped(mask, heads, groups), logits, jnp.asarray(max(-1e30, float(jnp.finfo(logits.dtype).min)), logits.dtype))
    out = jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(logits), values)
    return jnp.swapaxes(out, -2, -3).reshape((*query.shape[:-1], value.shape[-1]))


def _ungrouped(term: jax.Array, heads: int, groups: int) -> jax.Array:
    """[..., H, G, T', T] to [..., H * G, T', T]; dims of size one broadcast."""
    *leading, own_heads, own_groups, rows, keys = term.shape
    if own_heads != own_groups:
        term = jnp.broadcast_to(term, (*leading, heads, groups, rows, keys))
    return term.reshape((*leading, term.shape[-4] * term.shape[-3], rows, keys))


# --- Primitives -------------------------------------------------------------------------------------------------------


def _primitive(name: str, function: Callable[..., list[jax.Array]], shapes: Callable[..., list[tuple[tuple[int, ...], Any]]]) -> Primitive:
    """A primitive that runs ``function``, and batches by giving every operand one more leading dim; ``shapes`` gives its outputs' shapes and dtypes."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    statics = [parameter for parameter in ("call", "wanted") if parameter in inspect.signature(function).parameters]
    primitive.def_impl(jax.jit(function, static_argnames=statics))

    def abstract_eval(*avals: Any, **params: Any) -> list[Any]:
        # Updating an input's aval keeps what it knows of meshes; a new one would lose it.
        return [avals[0].update(shape=shape, dtype=dtype) for shape, dtype in shapes(*avals, **params)]

    def batch(operands: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, **params: Any) -> tuple[list[jax.Array], list[int]]:
        size = next(operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None)
        shared = _shared(call, **params)

        def move(position: int, operand: jax.Array, dim: int | None) -> jax.Array:
            if dim is not None:
                return jnp.moveaxis(operand, dim, 0)
            return jnp.broadcast_to(operand, (1 if position in shared else size, *operand.shape))

        moved = [move(position, operand, dim) for position, (operand, dim) in enumerate(zip(operands, dims, strict=True))]
        outs = primitive.bind(*moved, call=call, **params)
        return outs, [0] * len(outs)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))
    batching.primitive_batchers[primitive] = batch
    return primitive


def _shared(call: Call, wanted: tuple[bool, ...] = ()) -> set[int]:
    """Positions of operands that a batch may share by broadcasting: bias and mask, unless each element needs its own cotangent."""
    bias = {3} if call.has_bias and not wanted[3:] else set()
    return bias | ({3 + call.has_bias} if call.has_mask else set())


def _output_shape(query: Any, _key: Any, value: Any, *_rest: Any, **_params: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [((*query.shape[:-1], value.shape[-1]), query.dtype)]


def _stats_shapes(query: Any, key: Any, value: Any, *_rest: Any, **_params: Any) -> list[tuple[tuple[int, ...], Any]]:
    stats = (query.shape[:-1], jnp.promote_types(query.dtype, jnp.float32))
    return [*_output_shape(query, key, value), stats, stats]


def _cotangent_shapes(*operands: Any, wanted: tuple[bool, ...], **_params: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(operand.shape, operand.dtype) for operand in itertools.compress(operands, wanted)]


def _differentiate_plainly(primitive: Primitive, function: Callable[..., list[jax.Array]]) -> None:
    """Derivatives of a derivative: JAX's own, through slices that are recomputed."""

    def rule(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> Any:
        plain = functools.partial(function, differentiable=True, **params)
        return jax.jvp(plain, tuple(primals), tuple(ad.instantiate_zeros(tangent) for tangent in tangents))

    ad.primitive_jvps[primitive] = rule


def _attention_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call) -> Any:
    call.plans.used("training")
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    if call.plans.training.implementation == "dense":
        return jax.jvp(lambda *operands: [dense(*_split(operands, call)[0], call)], tuple(primals), tuple(tangents))
    out, maximum, total = attention_with_stats_p.bind(*primals, call=call)
    moving = tangents[: 3 + call.has_bias]  # a mask does not move
    return [out], tangent_p.bind(*primals, out, maximum, total, *moving, call=call)


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> list[Any]:
    moving = 3 + call.has_bias
    residuals, tangents = operands[:-moving], operands[-moving:]
    wanted = tuple(ad.is_undefined_primal(tangent) for tangent in tangents)
    none: list[Any] = [None] * len(residuals)
    if type(cotangents[0]) is ad.Zero:
        return none + [ad.Zero(tangent.aval) if want else None for tangent, want in zip(tangents, wanted, strict=True)]
    gradients = iter(cotangent_p.bind(*residuals, cotangents[0], call=call, wanted=wanted))
    return none + [next(gradients) if want else None for want in wanted]


attention_p = _primitive("autochunk_attention", _only_output, _output_shape)
attention_with_stats_p = _primitive("autochunk_attention_with_stats", _with_stats, _stats_shapes)
tangent_p = _primitive("autochunk_attention_tangent", _tangent, _output_shape)
cotangent_p = _primitive("autochunk_attention_cotangent", _cotangent, _cotangent_shapes)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
_differentiate_plainly(attention_with_stats_p, _with_stats)
_differentiate_plainly(tangent_p, _tangent)
_differentiate_plainly(cotangent_p, _cotangent)
