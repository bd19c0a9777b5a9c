"""What a workload's results should be: textbook formulas in float64, on a sample of query rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk import device as devices
from autochunk.attention.arguments import Arguments
from autochunk.tuner.inputs import WorkloadInputs, as_float, by_op, make_function

_Floats = np.ndarray[Any, Any]


def reference(
    inputs: WorkloadInputs, rounded: Callable[[_Floats], _Floats] | None = None
) -> list[_Floats]:
    """Output, residual if asked for, and in training the gradients, on the sampled rows, by numpy.

    The residual's cotangent is zero. With ``rounded`` the weights' cotangents are products of
    operands that this rounds, but not their sum over a row, which fused kernels take from the
    output.
    """
    w, (arguments, cotangent) = inputs.workload, inputs.sampled()
    bias = arguments.bias
    q, g = _heads_first(arguments.query), _heads_first(cotangent)  # [B, H, rows, K]
    k, v = _heads_first(arguments.key), _heads_first(arguments.value)  # [B, N, T, K]

    def grouped(rows: _Floats) -> _Floats:
        """[B, H, rows, ...] as [B, N, rows of all heads that share keys, ...]"""
        return rows.reshape((w.batch, w.num_kv_heads, -1, rows.shape[-1]))

    def by_head(rows: _Floats) -> _Floats:
        return rows.reshape((w.batch, w.num_heads, -1, rows.shape[-1]))

    scale = 1 / math.sqrt(w.key_size)
    logits = by_head(grouped(q) @ np.swapaxes(k, -1, -2)) * scale  # [B, H, rows, T]
    if bias is not None:
        logits += _float64(bias)
    distance = np.abs(np.asarray(inputs.positions()) - np.arange(w.key_length))
    if arguments.alibi_slopes is not None:
        logits = logits - _float64(arguments.alibi_slopes)[..., None, None] * distance
    through_cap = np.ones(())
    if arguments.soft_cap is not None:
        logits = arguments.soft_cap * np.tanh(logits / arguments.soft_cap)
        through_cap = 1 - np.square(logits / arguments.soft_cap)
    seen, inside = _seen(arguments, logits.shape)
    live = seen.any(-1, keepdims=True)
    logits = np.where(live, np.where(seen, logits, -np.inf), 0.0)
    highest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - highest)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    # A row that sees nothing is the mean of all values, with nothing dropped.
    kept = np.where(live, _kept(arguments, w.key_length), 1.0)
    out, g = by_head(grouped(weights * kept) @ v) * inside, g * inside
    results = [_heads_last(out)]
    if w.residual:
        lse = np.where(live, highest + np.log(total), -0.7 * np.finfo(np.float32).max)
        results.append(_heads_last(lse[..., 0]))
    if w.mode == "forward":
        return results
    d_weights = by_head(grouped(g) @ np.swapaxes(v, -1, -2)) * kept
    of_row = (weights * d_weights).sum(-1, keepdims=True)
    if rounded is not None:
        d_weights = by_head(grouped(rounded(g)) @ rounded(np.swapaxes(v, -1, -2))) * kept
    d_logits = weights * (d_weights - of_row) * live * through_cap
    d_query = by_head(grouped(d_logits) @ k) * scale
    d_key = np.swapaxes(grouped(d_logits), -1, -2) @ grouped(q) * scale
    d_value = np.swapaxes(grouped(weights * kept), -1, -2) @ grouped(g)
    results += [_heads_last(one) for one in (d_query, d_key, d_value)]
    if bias is not None:
        results.append(_sum_to(d_logits, bias.shape))
    if arguments.alibi_slopes is not None:
        shape = (*arguments.alibi_slopes.shape, 1, 1)
        results.append(_sum_to(-d_logits * distance, shape)[..., 0, 0])
    return results


def _seen(arguments: Arguments, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Which keys a row sees, and which rows are within their sequence: [B, H, rows, T or 1]."""
    seen = np.ones(shape, bool)
    inside: Any = np.ones((1, 1, 1, 1))
    if arguments.mask is not None:
        seen &= np.asarray(arguments.mask)
    if arguments.key_value_seq_lengths is not None:
        lengths = np.asarray(arguments.key_value_seq_lengths)[:, None, None, None]
        seen &= np.arange(shape[-1]) < lengths
    if arguments.query_seq_lengths is not None:
        lengths = np.asarray(arguments.query_seq_lengths)[:, None, None, None]
        inside = np.arange(shape[-2])[:, None] < lengths
        seen &= inside
    if arguments.query_segment_ids is not None:
        own = np.asarray(arguments.query_segment_ids)[:, None, :, None]
        seen &= own == np.asarray(arguments.key_value_segment_ids)[:, None, None, :]
    return seen, inside


def _kept(arguments: Arguments, keys: int) -> Any:
    """Dropout's factors [B, H, rows, T]; one without it."""
    if arguments.dropout_bits is None:
        return 1.0
    bits = np.asarray(arguments.dropout_bits)[..., None]
    with np.errstate(over="ignore"):
        mixed = bits + (np.arange(keys, dtype=np.uint32) * np.uint32(0x9E3779B9))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    rate = arguments.dropout_rate
    return np.where(mixed >= np.uint32(round(rate * 2**32)), 1 / (1 - rate), 0.0)


def _sum_to(array: _Floats, shape: tuple[int, ...]) -> _Floats:
    sizes = zip(shape, array.shape, strict=True)
    broadcast = tuple(dim for dim, (own, size) in enumerate(sizes) if own == 1 < size)
    return np.asarray(array.sum(broadcast, keepdims=True))


def _float64(array: jax.Array) -> _Floats:
    return as_float(array).astype(np.float64)


def _heads_first(array: jax.Array) -> _Floats:
    """[B, T, H, K] to [B, H, T, K]."""
    return np.moveaxis(_float64(array), 2, 1)


def _heads_last(array: _Floats) -> _Floats:
    """[B, H, T, ...] to [B, T, H, ...]"""
    return np.ascontiguousarray(np.moveaxis(array, 1, 2))


def dense_on_sample(inputs: WorkloadInputs) -> list[_Floats]:
    """The same by haiku's dense attention in the workload's dtype: how much error is usual."""
    arguments, cotangent = inputs.sampled()

    def attend(given: Arguments) -> Any:
        if given.alibi_slopes is not None:  # whose distances are not those of the sampled rows
            distance = jnp.abs(inputs.positions() - inputs.key_indices())
            added = -given.alibi_slopes[..., None, None] * distance
            bias = added if given.bias is None else given.bias + added
            given = given.replace(alibi_slopes=None, bias=bias)
        return by_op(given, None, "dense")

    function = make_function(inputs.workload, attend)
    training = inputs.workload.mode == "training"
    run = jax.jit(function, compiler_options=_untried())
    results = run(arguments, *([cotangent] if training else []))
    return [as_float(result) for result in results]


def _untried() -> dict[str, Any]:
    """Options by which XLA tries nothing out on a GPU, which takes seconds: this is run once."""
    on_gpu = devices.default_device().platform == "gpu"
    return {"xla_gpu_autotune_level": 0} if on_gpu else {}


def error_of_products(inputs: WorkloadInputs) -> float:
    """The error of a product in the workload's dtype and precision, relative to its largest value.

    A GPU may round the operands of products of float32 (to TF32), but that of a single query, which
    dense attention may have in full.
    """
    w = inputs.workload
    return error_of_product(w.dtype, multiplying(w.precision))


def error_of_rounded_products(
    inputs: WorkloadInputs, expected: list[_Floats], of_products: float
) -> float:
    """How much gradients err by rounded products alone, as every fused kernel's do.

    Where a row sees few keys, the weights' cotangents should cancel with their sum over the row,
    and do not where a GPU rounds the operands of the one: for the first rows of a causal call, or
    of a window, that is far more than what dense attention errs by, whose sum is of the same
    products.
    """
    w = inputs.workload
    is_exact = of_products < _MOST_BY_FLOAT32
    if w.mode == "forward" or w.dtype != "float32" or is_exact:
        return 0.0
    return relative_error(reference(inputs, _as_tf32), expected)


# Products of float32 were seen to err by 2e-7 of the largest value, of TF32 by 4e-4.
_MOST_BY_FLOAT32 = 2e-5


def _as_tf32(array: _Floats) -> _Floats:
    """Rounded to the ten bits of mantissa that tensor cores multiply."""
    mantissa, exponent = np.frexp(array)
    rounded: _Floats = np.ldexp(np.rint(mantissa * 2**11) / 2**11, exponent)
    return rounded


def multiplying(precision: str) -> Callable[..., jax.Array]:
    """What multiplies matrices in a precision."""
    return functools.partial(jnp.matmul, precision=None if precision == "default" else precision)


def error_of_product(dtype: str, multiply: Callable[..., jax.Array]) -> float:
    """The same of two random matrices of a dtype, as they are multiplied."""
    left, right = jax.random.normal(jax.random.key(0), (2, 256, 256), dtype)
    product = jax.jit(multiply)(left, right)
    return relative_error([as_float(product)], [_float64(left) @ _float64(right)])


# Values that are compared at a time: results may have gigabytes, and whole differences of them, or
# copies in float64, would have as much.
_BLOCK = 1 << 17


def blocks(size: int) -> list[slice]:
    """Of so many values the parts that are compared at a time."""
    return [slice(start, start + _BLOCK) for start in range(0, size, _BLOCK)]


def relative_error(results: list[_Floats], references: list[_Floats]) -> float:
    """Largest error over the results, each relative to its reference's largest value.

    It is infinite where a result is not finite. A reference may be zero throughout (the query's
    gradient of a single key): a hundredth of the largest value of all is the least to compare with.
    """
    largest = [max(expected.max(), -expected.min()) for expected in references]
    worst = 0.0
    for result, expected, size in zip(results, references, largest, strict=True):
        error = _largest_difference(result.ravel(), expected.ravel())
        error /= max(size, 0.01 * max(largest), 1e-30)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _largest_difference(result: _Floats, expected: _Floats) -> float:
    """NaN if any is."""
    parts = blocks(expected.size)
    return float(np.max([np.abs(result[part] - expected[part]).max() for part in parts]))
