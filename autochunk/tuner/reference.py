"""What a workload's results should be: textbook formulas in float64, on a sample of query rows."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from autochunk.tuner.inputs import WorkloadInputs, as_float, by_op, make_function


def reference(inputs: WorkloadInputs) -> list[np.ndarray[Any, Any]]:
    """Output, and in training the gradients, on the sampled rows, by numpy."""
    w, (arguments, cotangent) = inputs.workload, inputs.sampled()
    groups, bias, mask = w.num_heads // w.num_kv_heads, arguments.bias, arguments.mask
    q, g = _heads_first(arguments.query), _heads_first(cotangent)  # [B, H, rows, K]
    k, v = (np.repeat(_heads_first(x), groups, axis=1) for x in (arguments.key, arguments.value))
    scale = 1 / math.sqrt(w.key_size)
    logits = q @ np.swapaxes(k, -1, -2) * scale  # [B, H, rows, T]
    if bias is not None:
        logits += _float64(bias)
    if mask is not None:
        logits = np.where(np.asarray(mask), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    if w.mode == "forward":
        return [np.moveaxis(out, 1, 2)]
    d_weights = g @ np.swapaxes(v, -1, -2)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_query = d_logits @ k * scale
    d_key, d_value = np.swapaxes(d_logits, -1, -2) @ q * scale, np.swapaxes(weights, -1, -2) @ g
    # Query heads that share a key head add up there.
    shared = [one.reshape((w.batch, -1, groups, *one.shape[2:])).sum(2) for one in (d_key, d_value)]
    results = [np.moveaxis(one, 1, 2) for one in (out, d_query, *shared)]
    if bias is not None:
        sizes = zip(bias.shape, d_logits.shape, strict=True)
        broadcast = tuple(dim for dim, (own, size) in enumerate(sizes) if own == 1 < size)
        results.append(d_logits.sum(broadcast, keepdims=True))
    return results


def _float64(array: jax.Array) -> np.ndarray[Any, Any]:
    return as_float(array).astype(np.float64)


def _heads_first(array: jax.Array) -> np.ndarray[Any, Any]:
    """[B, T, H, K] to [B, H, T, K]."""
    return np.moveaxis(_float64(array), 2, 1)


def dense_on_sample(inputs: WorkloadInputs) -> list[np.ndarray[Any, Any]]:
    """The same by haiku's dense attention in the workload's dtype: how much error is usual."""
    arguments, cotangent = inputs.sampled()
    function = make_function(inputs.workload, lambda given: by_op(given, None, "dense"))
    training = inputs.workload.mode == "training"
    results = jax.jit(function)(arguments, *([cotangent] if training else []))
    return [as_float(result) for result in results]


def relative_error(
    results: list[np.ndarray[Any, Any]], references: list[np.ndarray[Any, Any]]
) -> float:
    """Largest error over the results, each relative to its reference's largest value.

    It is infinite where a result is not finite. A reference may be zero throughout (the query's
    gradient of a single key): a hundredth of the largest value of all is the least to compare with.
    """
    largest = [float(np.abs(expected).max()) for expected in references]
    worst = 0.0
    for result, expected, size in zip(results, references, largest, strict=True):
        error = float(np.abs(result - expected).max() / max(size, 0.01 * max(largest), 1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
