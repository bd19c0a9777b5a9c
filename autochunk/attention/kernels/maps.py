"""Attention, its tangent map and its cotangent map, slice by slice."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels import fused
from autochunk.attention.kernels.blind import of_means, with_cotangents_of_means
from autochunk.attention.kernels.cells import Cell, Output, Parts, add
from autochunk.attention.kernels.dense import (
    dense,
    log_sum_exp,
    mean_value,
    within_lengths,
)
from autochunk.attention.kernels.inputs import (
    AXES,
    INPUT_AXES,
    KEY,
    QUERY,
    STATS,
    Call,
    Inputs,
    along_rows,
    kept_dtype,
    split,
)
from autochunk.attention.kernels.maths import SliceMath, folds_scale, merge, scaled_query, weigh
from autochunk.attention.kernels.passes import Backward, Forward, divisor, taken_of
from autochunk.attention.kernels.problem import Problem
from autochunk.attention.kernels.terms import may_see_nothing
from autochunk.plan import Plan, runs_dense

_NO_SOFTMAX_KERNEL = {"cpu"}
# In keys. On the GPUs seen so far (H100, H200) three passes take 0.87-0.93 of that kernel's time
# for longer rows, and up to 1.2 times of it for shorter ones.
_LONGEST_SOFTMAX = 16384


def forward(
    *operands: jax.Array,
    call: Call,
    plan: Plan,
    differentiable: bool = False,
    platforms: tuple[str, ...] = (),
    need_stats: bool = True,
    dtype: Any = None,
) -> list[jax.Array]:
    """[out, row maximum, row sum of exponentials]; the sum of a row that sees nothing is zero.

    The output is in the query's dtype, or another ``dtype``.
    """
    inputs, _ = split(operands, call)
    problem = Problem(inputs, call, plan, differentiable)
    whole_rows = problem.whole_rows
    # Dividing the output costs less than dividing the weights, except where XLA makes one kernel of
    # a plain softmax. That kernel does not give the sums.
    fits_kernel = whole_rows and problem.slices.keys <= _LONGEST_SOFTMAX
    has_kernel = bool(platforms) and not set(platforms) & _NO_SOFTMAX_KERNEL
    mine = Forward(inputs, call, problem, fits_kernel and has_kernel and not need_stats)
    by_row = problem.output(QUERY, dtype or inputs.query.dtype, inputs.value.shape[-1])
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
    """[out, row maximum, row sum of exponentials] by the plan for calls that are differentiated.

    The output is in ``kept_dtype``.
    """
    plan, (inputs, _) = call.plans.training, split(operands, call)
    call.plans.used("training")
    if fused.runs(plan, platforms) and not differentiable:
        return fused.with_stats(plan.implementation, inputs, call)
    return forward(
        *operands,
        call=call,
        plan=plan.sliced(),
        differentiable=differentiable,
        platforms=platforms,
        dtype=kept_dtype(inputs.query.dtype, call),
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
        taken, (out, maximum, total, *tangents) = taken_of(arrays)
        moved = Inputs(**dict(zip(call.moving, tangents, strict=True)))
        maths = SliceMath(taken, cell, call, problem, transposed=False)
        total = divisor(total, problem)
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
    """Cotangents of the wanted inputs of ``call.moving``.

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
    problem = Problem(inputs, call, plan.sliced(), differentiable)
    mine = Backward(inputs, call, problem, names, platforms)
    extra_axes = (*(KEY for _ in mine.centre), *(QUERY, STATS, STATS, QUERY, STATS)[: len(rest)])
    given = zip([*mine.centre, *rest], extra_axes, strict=True)
    extra = [problem.fit(array, axes) for array, axes in given]
    whole = problem.inputs.present
    outputs = [Output(AXES[name], whole[name].shape, problem.dtype) for name in names]
    arrays, axes = (*problem.inputs, *extra), (*INPUT_AXES, *extra_axes)
    totals = problem.grid().run(mine.of_slice, arrays, axes, outputs, add)
    found = {
        name: total.reshape(inputs.present[name].shape)
        for name, total in zip(names, totals, strict=True)
    }
    if problem.may_see_nothing and "value" in names:
        found["value"] += of_means(rest[3], inputs.value, rest[2] == 0, problem.dtype)
    return [found[name].astype(inputs.present[name].dtype) for name in names]


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
    out = out.astype(inputs.query.dtype)
    found = fused.cotangent(name, inputs, call, out, log_sum_exp(maximum, total), d_out)
    if may_see_nothing(inputs, call):
        found["value"] = with_cotangents_of_means(found["value"], d_out, total == 0)
    return found
