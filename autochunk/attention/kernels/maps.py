"""Attention, its tangent map and its cotangent map, slice by slice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import fused
from autochunk.attention.kernels.dense import dense
from autochunk.attention.kernels.grid import Cell, Output, Problem, add, sum_to
from autochunk.attention.kernels.inputs import (
    INPUT_AXES,
    KEY,
    LOGITS,
    QUERY,
    STATS,
    Call,
    Inputs,
    caller_major,
    operands_of,
    split,
)
from autochunk.attention.kernels.maths import SliceMath, folds_scale, merge, scaled_query, weigh
from autochunk.plan import Plan, runs_dense

_NO_SOFTMAX_KERNEL = {"cpu"}
# In keys. GPUs seen so far (H100, H200) take 0.87-0.93 of that kernel's time for longer rows in
# three passes, for shorter ones up to 1.2 times of it.
_LONGEST_SOFTMAX = 16384


def _row_maximum(logits: jax.Array, may_be_infinite: bool) -> jax.Array:
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    # a bias of -inf for all keys: that as the maximum would make NaN of the differences
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
    divided = (
        fits_kernel
        and not need_stats
        and bool(platforms)
        and not set(platforms) & _NO_SOFTMAX_KERNEL
    )

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken = Inputs(*arrays)
        out, maximum, total = _forward_slice(taken, cell, call, problem, divided)
        if whole_rows:
            return (
                (out if divided else out / total[..., None]).astype(inputs.query.dtype),
                maximum,
                total,
            )
        fresh = SliceMath(taken, cell, call, problem, transposed=False).fresh_rows()
        return weigh(out, fresh), maximum, total if fresh is None else total * fresh

    out = problem.output(
        QUERY, inputs.query.dtype if whole_rows else problem.dtype, inputs.value.shape[-1]
    )
    maximum, total = (
        problem.output(STATS, problem.dtype, fill=float(jnp.finfo(problem.dtype).min)),
        problem.output(STATS, problem.dtype),
    )
    grid = problem.grid()
    parts = grid.run(
        compute, problem.inputs, INPUT_AXES, (out, maximum, total), None if whole_rows else _join
    )
    if not whole_rows:
        if problem.triangular and inputs.bias is not None:
            # A bias of -inf may leave a row none of the keys that it sees: its sum is zero, and so
            # is its output; the keys above the diagonal are left out.
            parts = (*parts[:2], jnp.where(parts[2] > 0, parts[2], jnp.ones_like(parts[2])))
        parts = (
            (parts[0] / caller_major(parts[2][..., None], QUERY)).astype(inputs.query.dtype),
            *parts[1:],
        )
    return [
        problem.restore(part, trailing) for part, trailing in zip(parts, (4, 3, 3), strict=True)
    ]


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
        return [dense(*inputs, call)]
    if fused.runs(plan, platforms):
        return [fused.attend(plan.implementation, inputs, call)]
    return forward(*operands, call=call, plan=plan.sliced(), platforms=platforms, need_stats=False)[
        :1
    ]


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

    Operands are inputs, out, maximum, total, then tangents of query, key, value and bias.
    """
    inputs, rest = split(operands, call)
    problem = Problem(inputs, call, call.plans.training.sliced(), differentiable)
    extra_axes = (QUERY, STATS, STATS, QUERY, KEY, KEY, LOGITS)[: 6 + call.has_bias]
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, d_query, d_key, d_value, *d_bias) = (
            Inputs(*arrays[:5]),
            arrays[5:],
        )
        maths = SliceMath(taken, cell, call, problem, transposed=False)
        weights = maths.weights(maximum)
        d_logits = maths.product(merge(scaled_query(d_query, call)), taken.key) + maths.product(
            maths.query, d_key
        )
        if not folds_scale(d_query):
            d_logits = d_logits * jnp.asarray(call.scale, problem.dtype)
        if d_bias:
            d_logits = maths.add(d_logits, d_bias[0].astype(problem.dtype))
        moved = weights * d_logits
        d_out = maths.spread(maths.over_keys(moved, taken.value))
        d_out -= weigh(out.astype(problem.dtype), jnp.sum(maths.by_axes(moved), axis=-1))
        d_out = weigh(d_out, maths.live_rows(maximum)) + maths.spread(
            maths.over_keys(weights, d_value)
        )
        return (weigh(d_out / total[..., None], maths.fresh_rows()),)

    output = problem.output(QUERY, problem.dtype, inputs.value.shape[-1])
    grid = problem.grid()
    (d_out,) = grid.run(
        compute, (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes), (output,), add
    )
    return [problem.restore(d_out, 4).astype(inputs.query.dtype)]


def cotangent(
    *operands: jax.Array,
    call: Call,
    wanted: tuple[bool, ...],
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
) -> list[jax.Array]:
    """Cotangents of those of query, key, value and bias that are wanted.

    Operands are inputs, out, maximum, total, then the output's cotangent.
    """
    inputs, rest = split(operands, call)
    if fused.runs(call.plans.training, platforms) and not differentiable and not any(wanted[3:]):
        out, maximum, _, d_out = rest
        return list(
            itertools.compress(
                fused.cotangent(
                    call.plans.training.implementation, inputs, call, out, maximum, d_out
                ),
                wanted,
            )
        )
    problem = Problem(inputs, call, call.plans.training.sliced(), differentiable)
    extra_axes = (QUERY, STATS, STATS, QUERY)
    extra = [problem.fit(array, axes) for array, axes in zip(rest, extra_axes, strict=True)]

    def compute(cell: Cell, *arrays: Any) -> tuple[jax.Array, ...]:
        taken, (out, maximum, total, d_out) = Inputs(*arrays[:5]), arrays[5:]
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
        gradients: tuple[Callable[[], jax.Array], ...] = (
            lambda: maths.spread(maths.over_keys(d_logits, taken.key)) * scale,
            lambda: maths.over_rows(d_logits, maths.query, taken.key.shape) * query_factor,
            lambda: maths.over_rows(
                weights, merge(scaled).astype(taken.value.dtype), taken.value.shape
            ),
            lambda: sum_to(maths.by_axes(d_logits), arrays[3].shape),
        )
        return tuple(
            itertools.compress((gradient() for gradient in gradients[: len(wanted)]), wanted)
        )

    primals = operands_of(*problem.inputs[:4])
    outputs = [
        Output(axes, array.shape, problem.dtype)
        for array, axes in zip(primals, INPUT_AXES[: len(primals)], strict=True)
    ]
    grid = problem.grid()
    totals = grid.run(
        compute,
        (*problem.inputs, *extra),
        (*INPUT_AXES, *extra_axes),
        list(itertools.compress(outputs, wanted)),
        add,
    )
    return [
        total.reshape(like.shape).astype(like.dtype)
        for total, like in zip(
            totals, itertools.compress(operands_of(*inputs[:4]), wanted), strict=True
        )
    ]
