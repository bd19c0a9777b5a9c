"""Attention, its tangent map and its cotangent map, slice by slice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import fused
from autochunk.attention.kernels.cells import Cell, Output, Parts, add
from autochunk.attention.kernels.dense import (
    before,
    dense,
    log_sum_exp,
    mean_value,
    within_lengths,
)
from autochunk.attention.kernels.grid import sum_to
from autochunk.attention.kernels.inputs import (
    AXES,
    INPUT_AXES,
    QUERY,
    STATS,
    Call,
    Inputs,
    along_rows,
    split,
)
from autochunk.attention.kernels.maths import SliceMath, folds_scale, merge, scaled_query, weigh
from autochunk.attention.kernels.problem import Problem
from autochunk.attention.kernels.terms import may_see_nothing
from autochunk.plan import Plan, runs_dense

_NO_SOFTMAX_KERNEL = {"cpu"}
# In keys. GPUs seen so far (H100, H200) take 0.87-0.93 of that kernel's time for longer rows in
# three passes, for shorter ones up to 1.2 times of it.
_LONGEST_SOFTMAX = 16384
# XLA:CPU sums a product with fewer rows than this one element after the other, so that transposed
# logits of fewer keys would differ from those that the row's sum is of by several roundings. With
# so few rows, or keys, another pass over the logits takes no time.
_FEW = 16


def _row_maximum(logits: jax.Array, may_be_infinite: bool) -> jax.Array:
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    # A row may see no key, or have a bias of -inf for all: that as the maximum would make NaN of
    # the differences.
    if may_be_infinite:
        maximum = jnp.maximum(maximum, jnp.finfo(logits.dtype).min)
    return maximum


def _divisor(total: jax.Array, problem: Problem) -> jax.Array:
    """Sums of exponentials to divide by: one for rows that see nothing, whose sum is zero."""
    return jnp.where(total == 0, jnp.ones_like(total), total) if problem.may_see_nothing else total


class _Forward:
    """What becomes of one slice's logits, and of rows after all of theirs: (out, maximum, sum)."""

    def __init__(self, inputs: Inputs, call: Call, problem: Problem, divides_weights: bool) -> None:
        self.inputs, self.call, self.problem = inputs, call, problem
        self.divides_weights = divides_weights
        # Slices of rows that see nothing are left out.
        self.skips = problem.may_see_nothing and problem.cover.form is not None

    def of_slice(self, cell: Cell, *arrays: Any) -> Parts:
        taken, _ = _of_slice(arrays)
        maths = SliceMath(taken, cell, self.call, self.problem, transposed=False)
        parts = self._of_keys(maths)
        if self.problem.whole_rows:
            parts = parts if self.divides_weights else self._divided(parts)
            return parts if self.skips else self._restored(cell, parts, arrays)
        (out, maximum, total), fresh = parts, maths.fresh_rows()
        return weigh(out, fresh), maximum, total if fresh is None else total * fresh

    def finished(self, cell: Cell, parts: Parts, arrays: Sequence[Any]) -> Parts:
        """Of rows all of whose slices were computed, or left out."""
        parts = parts if self.problem.whole_rows else self._divided(parts)
        return self._restored(cell, parts, arrays)

    def _of_keys(self, maths: SliceMath) -> Parts:
        logits = maths.logits()
        maximum = _row_maximum(logits, self.problem.excludes or self.problem.may_see_nothing)
        weights = maths.fresh_keys(jnp.exp(logits - maximum[..., None]))
        total = jnp.sum(weights, axis=-1)
        if self.divides_weights:
            weights = weights / _divisor(total, self.problem)[..., None]
        stats = (*maximum.shape[:-1], maths.groups, maths.rows)
        return (
            maths.spread(maths.over_keys(maths.dropped(weights), maths.inputs.value)),
            maximum.reshape(stats),
            total.reshape(stats),
        )

    def _divided(self, parts: Parts) -> Parts:
        out, maximum, total = parts
        return out / _divisor(total, self.problem)[..., None], maximum, total

    def _restored(self, cell: Cell, parts: Parts, arrays: Sequence[Any]) -> Parts:
        """With the mean of all values in rows without a key, zeros beyond the rows' lengths."""
        (out, maximum, total), (taken, mean) = parts, _of_slice(arrays)
        out = out.astype(self.inputs.query.dtype)
        if mean:
            out = jnp.where((total == 0)[..., None], mean[0], out)
        if taken.query_seq_lengths is not None:
            inside = before(taken.query_seq_lengths, cell.starts.get("rows", 0), out.shape[-2])
            out = jnp.where(inside[..., None, None, :, None], out, jnp.zeros((), out.dtype))
        return out, maximum, total


def forward(
    *operands: jax.Array,
    call: Call,
    plan: Plan,
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
    need_stats: bool = True,
) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials]; the sum of a row that sees nothing is zero."""
    inputs, _ = split(operands, call)
    problem = Problem(inputs, call, plan, differentiable)
    whole_rows = problem.whole_rows
    # Dividing the output costs less than dividing the weights, except where XLA makes one kernel of
    # a plain softmax, which tells no sums.
    fits_kernel = whole_rows and problem.slices.keys <= _LONGEST_SOFTMAX
    has_kernel = bool(platforms) and not set(platforms) & _NO_SOFTMAX_KERNEL
    mine = _Forward(inputs, call, problem, fits_kernel and has_kernel and not need_stats)
    by_row = problem.output(QUERY, inputs.query.dtype, inputs.value.shape[-1])
    outputs = (
        by_row._replace(joined=problem.dtype),
        problem.output(STATS, problem.dtype, fill=float(jnp.finfo(problem.dtype).min)),
        problem.output(STATS, problem.dtype),
    )
    mean = [problem.fit(mean_value(inputs.value), QUERY)] if problem.may_see_nothing else []
    arrays, axes = (*problem.inputs, *mean), (*INPUT_AXES, *(QUERY for _ in mean))
    join = None if whole_rows else _join
    finish = None if whole_rows and not mine.skips else mine.finished
    found = problem.grid().run(mine.of_slice, arrays, axes, outputs, join, finish)
    pairs = zip(found, outputs, strict=True)
    return [problem.restore(part, len(output.axes)) for part, output in pairs]


def _join(old: Parts, new: Parts) -> Parts:
    """Output, maximum and sum over two sets of keys, from those of each."""
    largest = jnp.maximum(old[1], new[1])
    one, other = jnp.exp(old[1] - largest), jnp.exp(new[1] - largest)
    return weigh(old[0], one) + weigh(new[0], other), largest, old[2] * one + new[2] * other


def only_output(
    *operands: jax.Array, call: Call, platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    """[out], or [out, log-sum-exp], by the plan for calls that are not differentiated."""
    plan = call.plans.forward
    call.plans.used("forward")
    inputs, _ = split(operands, call)
    if runs_dense(plan, inputs.logits):
        return dense(inputs, call)
    if fused.runs(plan, platforms):
        return fused.attend(plan.implementation, inputs, call)
    out, maximum, total = forward(
        *operands,
        call=call,
        plan=plan.sliced(),
        platforms=platforms,
        need_stats=call.residual,
    )
    return [out, log_sum_exp(maximum, total)] if call.residual else [out]


def with_stats(
    *operands: jax.Array, call: Call, differentiable: bool = False, platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials] by the plan for calls that are."""
    plan = call.plans.training
    call.plans.used("training")
    if fused.runs(plan, platforms) and not differentiable:
        return fused.with_stats(plan.implementation, split(operands, call)[0], call)
    return forward(
        *operands, call=call, plan=plan.sliced(), differentiable=differentiable, platforms=platforms
    )


def tangent(*operands: jax.Array, call: Call, differentiable: bool = False) -> list[jax.Array]:
    """Tangents of the output, and of the log-sum-exp if that is asked for, linear in the inputs'.

    Operands are inputs, out, maximum, total, then a tangent of each of ``call.moving``.
    """
    inputs, rest = split(operands, call)
    problem = Problem(inputs, call, call.plans.training.sliced(), differentiable)
    extra_axes = (QUERY, STATS, STATS, *(AXES[name] for name in call.moving))
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> Parts:
        taken, (out, maximum, total, *tangents) = _of_slice(arrays)
        moved = Inputs(**dict(zip(call.moving, tangents, strict=True)))
        maths = SliceMath(taken, cell, call, problem, transposed=False)
        total = _divisor(total, problem)
        weights = maths.weights(maximum)
        d_logits = maths.product(merge(scaled_query(moved.query, call)), taken.key)
        d_logits = d_logits + maths.product(maths.query, moved.key)
        if not folds_scale(moved.query):
            d_logits = d_logits * jnp.asarray(call.scale, problem.dtype)
        moved_terms = moved._replace(query_offset=taken.query_offset)
        for term in maths.terms.of(moved_terms.present).added(problem.dtype):
            d_logits = maths.combine(jnp.add, d_logits, term)
        d_weights = weights * maths.seen(maths.through_cap(d_logits))
        d_sum = jnp.sum(maths.by_axes(d_weights), axis=-1)
        d_out = maths.spread(maths.over_keys(maths.dropped(d_weights), taken.value))
        d_out -= weigh(out.astype(problem.dtype), d_sum)
        d_out = d_out + maths.spread(maths.over_keys(maths.dropped(weights), moved.value))
        fresh = maths.fresh_rows()
        d_sum = d_sum / total
        return weigh(d_out / total[..., None], fresh), d_sum if fresh is None else d_sum * fresh

    outputs = (
        problem.output(QUERY, problem.dtype, inputs.value.shape[-1]),
        problem.output(STATS, problem.dtype),
    )
    arrays, axes = (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes)
    d_out, d_lse = problem.grid().run(compute, arrays, axes, outputs, add)
    d_out, d_lse = problem.restore(d_out, len(QUERY)), problem.restore(d_lse, len(STATS))
    if problem.may_see_nothing:
        d_value = dict(zip(call.moving, rest[3:], strict=True))["value"]
        d_out = jnp.where(along_rows(rest[2] == 0), mean_value(d_value), d_out)
    d_out = within_lengths(d_out.astype(inputs.query.dtype), inputs)
    return [d_out, d_lse] if call.residual else [d_out]


def cotangent(
    *operands: jax.Array,
    call: Call,
    wanted: tuple[bool, ...],
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
) -> list[jax.Array]:
    """Cotangents of those of ``call.moving`` that are wanted.

    Operands are inputs, out, maximum, total, then the output's cotangent, and that of the
    log-sum-exp if that is asked for.
    """
    inputs, rest = split(operands, call)
    plan, names = call.plans.training, call.wanted(wanted)
    rest[3] = within_lengths(rest[3], inputs)
    if fused.runs(plan, platforms) and not differentiable:
        kernel = plan.implementation
        if set(names) <= set(fused.differentiated(kernel)):
            found = _by_kernel(kernel, inputs, call, *rest)
            return [found[name] for name in names]
    problem, value_size = Problem(inputs, call, plan.sliced(), differentiable), rest[0].shape[-1]
    is_half = inputs.query.dtype.itemsize < 4
    sees_all = problem.slices.keys == problem.shape.keys and not call.some_keys
    extra_axes = (QUERY, STATS, STATS, QUERY, STATS)[: len(rest)]
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> Parts:
        taken, (out, maximum, total, d_out, *d_lse) = _of_slice(arrays)
        keys, rows = taken.key.shape[-2], math.prod(taken.query.shape[-3:-1])
        maths = SliceMath(taken, cell, call, problem, transposed=min(keys, rows) >= _FEW)
        total = _divisor(total, problem)
        weights, d_out = maths.weights(maximum), d_out.astype(problem.dtype)
        # The sum of exponentials divides the rows' cotangents, not the weights: T' * V divisions
        # instead of T' * T. In half precision those would be rounded once more, or too small.
        if is_half:
            weights = weights / maths.by_row(total)
        else:
            d_out = d_out / total[..., None]
            d_lse = [one / total for one in d_lse]
        fresh = maths.fresh_rows()
        scaled = weigh(d_out, fresh)
        d_weights = maths.product(merge(scaled).astype(taken.value.dtype), taken.value)
        d_weights = maths.dropped(d_weights)
        if sees_all and (keys <= value_size or rows < _FEW):
            offset = _cotangent_of_sum(maths, weights * d_weights, total)
        else:
            offset = jnp.sum(out.astype(problem.dtype) * scaled, axis=-1)
        for one in d_lse:
            offset = offset - (one if fresh is None else one * fresh)
        d_logits = weights * (d_weights - maths.by_row(offset))
        d_logits = maths.through_cap(d_logits)
        scale = jnp.asarray(call.scale, problem.dtype)
        query_factor = 1 if folds_scale(taken.query) else scale

        def d_value() -> jax.Array:
            rows = merge(scaled).astype(taken.value.dtype)
            return maths.over_rows(maths.dropped(weights), rows, taken.value.shape)

        # Of long rows logits have cotangents that are too small for float16. GPUs multiply halves
        # several times as fast, CPUs do not.
        is_wide = inputs.query.dtype == jnp.float16 or "cpu" in platforms
        wide = problem.dtype if is_wide else inputs.query.dtype
        query, key = maths.query.astype(wide), taken.key.astype(wide)
        gradients: dict[str, Callable[[], jax.Array]] = {
            "query": lambda: maths.spread(maths.over_keys(d_logits, key)) * scale,
            "key": lambda: maths.over_rows(d_logits, query, key.shape) * query_factor,
            "value": d_value,
            "bias": functools.partial(_d_bias, maths, d_logits),
            "alibi_slopes": functools.partial(_d_slopes, maths, d_logits),
        }
        return tuple(gradients[name]() for name in names)

    whole = problem.inputs.present
    outputs = [Output(AXES[name], whole[name].shape, problem.dtype) for name in names]
    arrays, axes = (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes)
    totals = dict(zip(names, problem.grid().run(compute, arrays, axes, outputs, add), strict=True))
    found = {name: total.reshape(inputs.present[name].shape) for name, total in totals.items()}
    if problem.may_see_nothing and "value" in names:
        found["value"] += of_means(inputs, rest[2], rest[3], problem.dtype)
    return [found[name].astype(inputs.present[name].dtype) for name in names]


def _d_bias(maths: SliceMath, d_logits: jax.Array) -> jax.Array:
    return sum_to(maths.by_axes(maths.seen(d_logits)), maths.inputs.present["bias"].shape)


def _d_slopes(maths: SliceMath, d_logits: jax.Array) -> jax.Array:
    by_distance = maths.by_axes(maths.seen(d_logits)) * maths.terms.slope_factor(maths.dtype)
    shape = (*maths.inputs.present["alibi_slopes"].shape, 1, 1)
    return sum_to(by_distance, shape)[..., 0, 0]


def _cotangent_of_sum(maths: SliceMath, product: jax.Array, total: jax.Array) -> jax.Array:
    """What is taken from the weights' cotangents of a row, from the products of both.

    The output's product with its cotangent is the same but for rounding, which shows where the
    cotangents of keys nearly cancel; the way over it costs less but for few rows or keys.
    """
    summed = jnp.sum(maths.by_axes(maths.seen(product)), axis=-1)
    return summed if maths.inputs.query.dtype.itemsize < 4 else summed / total


def _by_kernel(
    name: str,
    inputs: Inputs,
    call: Call,
    out: jax.Array,
    maximum: jax.Array,
    total: jax.Array,
    d_out: jax.Array,
) -> dict[str, jax.Array]:
    """Cotangents by a fused kernel, whoever computed the row maximum and sum."""
    found = fused.cotangent(name, inputs, call, out, log_sum_exp(maximum, total), d_out)
    if may_see_nothing(inputs, call):
        wide = jnp.promote_types(inputs.value.dtype, jnp.float32)
        mean = of_means(inputs, total, d_out, wide)
        found["value"] = (found["value"].astype(wide) + mean).astype(inputs.value.dtype)
    return found


def of_means(inputs: Inputs, total: jax.Array, d_out: jax.Array, dtype: Any) -> jax.Array:
    """What the values' cotangents have of rows that see nothing, whose output is their mean."""
    blind = jnp.where(along_rows(total == 0), d_out.astype(dtype), 0)
    shared = jnp.sum(blind, axis=(-4, -2))[..., None, :, :] / inputs.key.shape[-3]
    return sum_to(shared, (*inputs.value.shape[:-3], 1, *inputs.value.shape[-2:]))


def _of_slice(arrays: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The inputs' slices, and those of what else was sliced."""
    count = len(Inputs._fields)
    return Inputs(*arrays[:count]), arrays[count:]
