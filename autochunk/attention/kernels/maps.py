"""Attention, its tangent map and its cotangent map, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import fused
from autochunk.attention.kernels.dense import dense
from autochunk.attention.kernels.grid import Cell, Output, add, sum_to
from autochunk.attention.kernels.inputs import (
    AXES,
    INPUT_AXES,
    QUERY,
    STATS,
    Call,
    Inputs,
    caller_major,
    split,
)
from autochunk.attention.kernels.maths import SliceMath, folds_scale, merge, scaled_query, weigh
from autochunk.attention.kernels.problem import Problem
from autochunk.plan import Plan, runs_dense

_NO_SOFTMAX_KERNEL = {"cpu"}
# In keys. GPUs seen so far (H100, H200) take 0.87-0.93 of that kernel's time for longer rows in
# three passes, for shorter ones up to 1.2 times of it.
_LONGEST_SOFTMAX = 16384


def _row_maximum(logits: jax.Array, may_be_infinite: bool) -> jax.Array:
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    # A bias may be -inf for all keys: that as the maximum would make NaN of the differences.
    if may_be_infinite:
        maximum = jnp.maximum(maximum, jnp.finfo(logits.dtype).min)
    return maximum


def _forward_slice(
    inputs: Inputs, cell: Cell, call: Call, problem: Problem, divided: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, row maximum and sum of exponentials of one slice of keys.

    The output is of weights ``divided`` by their sum, or has yet to be.
    """
    maths = SliceMath(inputs, cell, call, problem, transposed=False)
    logits = maths.logits()
    maximum = _row_maximum(logits, inputs.bias is not None)
    weights = maths.fresh_keys(jnp.exp(logits - maximum[..., None]))
    total = jnp.sum(weights, axis=-1)
    if divided:
        weights = weights / total[..., None]
    stats = (*maximum.shape[:-1], maths.groups, maths.rows)
    return (
        maths.spread(maths.over_keys(weights, inputs.value)),
        maximum.reshape(stats),
        total.reshape(stats),
    )


def forward(
    *operands: jax.Array,
    call: Call,
    plan: Plan,
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
    need_stats: bool = True,
) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials]"""
    inputs, _ = split(operands, call)
    problem = Problem(inputs, call, plan, differentiable)
    whole_rows = problem.slices.keys == problem.shape.keys
    # Dividing the output costs less than dividing the weights, except where XLA makes one kernel of
    # a plain softmax, which tells no sums.
    fits_kernel = whole_rows and problem.shape.keys <= _LONGEST_SOFTMAX
    has_kernel = bool(platforms) and not set(platforms) & _NO_SOFTMAX_KERNEL
    divided = fits_kernel and has_kernel and not need_stats

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken = Inputs(*arrays)
        out, maximum, total = _forward_slice(taken, cell, call, problem, divided)
        if whole_rows:
            out = out if divided else out / total[..., None]
            return out.astype(inputs.query.dtype), maximum, total
        fresh = SliceMath(taken, cell, call, problem, transposed=False).fresh_rows()
        return weigh(out, fresh), maximum, total if fresh is None else total * fresh

    dtype = inputs.query.dtype if whole_rows else problem.dtype
    outputs = (
        problem.output(QUERY, dtype, inputs.value.shape[-1]),
        problem.output(STATS, problem.dtype, fill=float(jnp.finfo(problem.dtype).min)),
        problem.output(STATS, problem.dtype),
    )
    join = None if whole_rows else _join
    parts = problem.grid().run(compute, problem.inputs, INPUT_AXES, outputs, join)
    if not whole_rows:
        if problem.triangular and inputs.bias is not None:
            # A bias of -inf may leave a row none of the keys that it sees: its sum is zero, and so
            # is its output; the keys above the diagonal are left out.
            parts = (*parts[:2], jnp.where(parts[2] > 0, parts[2], jnp.ones_like(parts[2])))
        out = parts[0] / caller_major(parts[2][..., None], QUERY)
        parts = (out.astype(inputs.query.dtype), *parts[1:])
    ranks = (len(QUERY), len(STATS), len(STATS))
    return [problem.restore(part, rank) for part, rank in zip(parts, ranks, strict=True)]


def _join(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Output, maximum and sum over two sets of keys, from those of each."""
    largest = jnp.maximum(old[1], new[1])
    one, other = jnp.exp(old[1] - largest), jnp.exp(new[1] - largest)
    return weigh(old[0], one) + weigh(new[0], other), largest, old[2] * one + new[2] * other


def only_output(
    *operands: jax.Array, call: Call, platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    """[out] by the plan for calls that are not differentiated."""
    plan = call.plans.forward
    call.plans.used("forward")
    inputs, _ = split(operands, call)
    if runs_dense(plan, inputs.logits):
        return [dense(inputs, call)]
    if fused.runs(plan, platforms):
        return [fused.attend(plan.implementation, inputs, call)]
    sliced = plan.sliced()
    return forward(*operands, call=call, plan=sliced, platforms=platforms, need_stats=False)[:1]


def with_stats(
    *operands: jax.Array, call: Call, differentiable: bool = False, platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials] by the plan for calls that are."""
    plan = call.plans.training
    if fused.runs(plan, platforms) and not differentiable:
        return fused.with_stats(plan.implementation, split(operands, call)[0], call)
    return forward(
        *operands, call=call, plan=plan.sliced(), differentiable=differentiable, platforms=platforms
    )


def tangent(*operands: jax.Array, call: Call, differentiable: bool = False) -> list[jax.Array]:
    """The output's tangent, linear in the inputs' tangents.

    Operands are inputs, out, maximum, total, then a tangent of each of ``call.moving``.
    """
    inputs, rest = split(operands, call)
    problem = Problem(inputs, call, call.plans.training.sliced(), differentiable)
    extra_axes = (QUERY, STATS, STATS, *(AXES[name] for name in call.moving))
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, *tangents) = _of_slice(arrays)
        moved = Inputs(**dict(zip(call.moving, tangents, strict=True)))
        maths = SliceMath(taken, cell, call, problem, transposed=False)
        weights = maths.weights(maximum)
        d_logits = maths.product(merge(scaled_query(moved.query, call)), taken.key)
        d_logits = d_logits + maths.product(maths.query, moved.key)
        if not folds_scale(moved.query):
            d_logits = d_logits * jnp.asarray(call.scale, problem.dtype)
        if moved.bias is not None:
            d_logits = maths.add(d_logits, moved.bias.astype(problem.dtype))
        d_weights = weights * d_logits
        d_out = maths.spread(maths.over_keys(d_weights, taken.value))
        d_out -= weigh(out.astype(problem.dtype), jnp.sum(maths.by_axes(d_weights), axis=-1))
        d_out = weigh(d_out, maths.live_rows(maximum))
        d_out = d_out + maths.spread(maths.over_keys(weights, moved.value))
        return (weigh(d_out / total[..., None], maths.fresh_rows()),)

    output = problem.output(QUERY, problem.dtype, inputs.value.shape[-1])
    arrays, axes = (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes)
    (d_out,) = problem.grid().run(compute, arrays, axes, (output,), add)
    return [problem.restore(d_out, 4).astype(inputs.query.dtype)]


def cotangent(
    *operands: jax.Array,
    call: Call,
    wanted: tuple[bool, ...],
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
) -> list[jax.Array]:
    """Cotangents of those of ``call.moving`` that are wanted.

    Operands are inputs, out, maximum, total, then the output's cotangent.
    """
    inputs, rest = split(operands, call)
    plan, names = call.plans.training, call.wanted(wanted)
    by_kernel = fused.runs(plan, platforms) and set(names) <= set(fused.DIFFERENTIATED)
    if by_kernel and not differentiable:
        out, maximum, _, d_out = rest
        found = fused.cotangent(plan.implementation, inputs, call, out, maximum, d_out)
        return [found[name] for name in names]
    problem = Problem(inputs, call, plan.sliced(), differentiable)
    extra_axes = (QUERY, STATS, STATS, QUERY)
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, d_out) = _of_slice(arrays)
        maths = SliceMath(taken, cell, call, problem, transposed=True)
        weights, d_out = maths.weights(maximum), d_out.astype(problem.dtype)
        # The sum of exponentials divides the rows' cotangents, not the weights: T' * V divisions
        # instead of T' * T. In float16 those would be too small.
        if inputs.query.dtype == jnp.float16:
            weights = weights / maths.by_row(total)
        else:
            d_out = d_out / total[..., None]
        scaled = weigh(d_out, maths.fresh_rows())
        live = weigh(scaled, maths.live_rows(maximum))
        offset = jnp.sum(out.astype(problem.dtype) * live, axis=-1)
        d_weights = maths.product(merge(live).astype(taken.value.dtype), taken.value)
        d_logits = weights * (d_weights - maths.by_row(offset))
        scale = jnp.asarray(call.scale, problem.dtype)
        query_factor = 1 if folds_scale(taken.query) else scale

        def d_value() -> jax.Array:
            rows = merge(scaled).astype(taken.value.dtype)
            return maths.over_rows(weights, rows, taken.value.shape)

        gradients: dict[str, Callable[[], jax.Array]] = {
            "query": lambda: maths.spread(maths.over_keys(d_logits, taken.key)) * scale,
            "key": lambda: maths.over_rows(d_logits, maths.query, taken.key.shape) * query_factor,
            "value": d_value,
            "bias": lambda: sum_to(maths.by_axes(d_logits), taken.present["bias"].shape),
        }
        return tuple(gradients[name]() for name in names)

    whole = problem.inputs.present
    outputs = [Output(AXES[name], whole[name].shape, problem.dtype) for name in names]
    arrays, axes = (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes)
    totals = problem.grid().run(compute, arrays, axes, outputs, add)
    likes = [inputs.present[name] for name in names]
    return [
        total.reshape(like.shape).astype(like.dtype)
        for total, like in zip(totals, likes, strict=True)
    ]


def _of_slice(arrays: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The inputs' slices, and those of what else was sliced."""
    count = len(Inputs._fields)
    return Inputs(*arrays[:count]), arrays[count:]
