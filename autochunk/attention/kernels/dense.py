"""Attention without slices: the baseline."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.terms import may_see_nothing, terms_of


def dense(inputs: Inputs, call: Call, careful: bool = True) -> list[jax.Array]:
    """[out], or [out, log-sum-exp], with all logits at once, in haiku's order of operations.

    Shapes as in ``attention``. Logits are float32 for half-precision inputs, or with
    ``call.half_logits`` in their dtype, as those of ``hk.MultiHeadAttention`` are. Unless
    ``careful`` excluded values must be finite.
    """
    query, key, value = inputs[:3]
    dtype = jnp.promote_types(query.dtype, query.dtype if call.half_logits else jnp.float32)
    *leading, rows, heads, groups, size = query.shape
    query = query.reshape((*leading, rows, heads * groups, size))
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=-2), jnp.repeat(value, groups, axis=-2)
    terms = terms_of(inputs, call)
    visible = terms.visible()
    seen = None if visible is None else _ungrouped(visible, heads, groups)
    guarded = seen if careful else None
    logits = _products(query, key, guarded, call, dtype) * jnp.asarray(call.scale, dtype)
    for term in terms.added(dtype):
        logits = logits + _ungrouped(term, heads, groups)
    if call.soft_cap is not None:
        logits = call.soft_cap * jnp.tanh(logits / call.soft_cap)
    blind = None
    if seen is None and not may_see_nothing(inputs, call) and not call.residual:
        weights = jax.nn.softmax(logits)
    else:
        logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
        maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        maximum = jnp.maximum(maximum, jnp.finfo(dtype).min)
        weights = jnp.exp(logits - maximum)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        blind = total == 0
        weights = weights / jnp.where(blind, 1, total)
        if seen is not None:  # their cotangents may overflow, and zero times that is NaN
            weights = jnp.where(seen, weights, jnp.zeros((), dtype))
    if (kept := terms.kept(dtype)) is not None:
        weights = weights * _ungrouped(kept, heads, groups)
    out = _sums(weights.astype(value.dtype), value, guarded, call)
    if blind is not None:
        out = jnp.where(jnp.swapaxes(blind, -2, -3), _mean(value), out)
    out = out.astype(inputs.query.dtype).reshape((*inputs.query.shape[:-1], value.shape[-1]))
    out = within_lengths(out, inputs)
    if not call.residual:
        return [out]
    lse = log_sum_exp(maximum, total).reshape((*leading, heads, groups, rows))
    return [out, lse.astype(jnp.promote_types(inputs.query.dtype, jnp.float32))]


def log_sum_exp(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Of rows, by their maxima and sums; of one that sees nothing a large negative number."""
    least = -0.7 * float(jnp.finfo(maximum.dtype).max)
    blind = total == 0
    return jnp.where(blind, least, maximum + jnp.log(jnp.where(blind, 1, total)))


def mean_value(value: jax.Array) -> jax.Array:
    """What a row that sees no key gives: the mean of all values [..., 1, H, 1, V]."""
    return _mean(value)[..., None, :]


def _mean(value: jax.Array) -> jax.Array:
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return jnp.mean(value, axis=-3, keepdims=True, dtype=wide).astype(value.dtype)


def within_lengths(rows: jax.Array, inputs: Inputs) -> jax.Array:
    """Rows [..., T', H, G, V], zero beyond ``query_seq_lengths``."""
    lengths = inputs.query_seq_lengths
    if lengths is None:
        return rows
    row = jax.lax.broadcasted_iota(lengths.dtype, (*lengths.shape, rows.shape[-4]), lengths.ndim)
    inside = row < lengths[..., None]
    return jnp.where(inside[..., None, None, None], rows, jnp.zeros((), rows.dtype))


def _products(
    query: jax.Array, key: jax.Array, seen: jax.Array | None, call: Call, dtype: Any
) -> jax.Array:
    """Queries by keys [..., H, T', T], whose derivatives do not see what is excluded."""

    def product(query: jax.Array, key: jax.Array) -> jax.Array:
        spec, precision = "...thd,...Thd->...htT", call.precision
        return jnp.einsum(spec, query, key, precision=precision, preferred_element_type=dtype)

    if seen is None:
        return product(query, key)

    def careful() -> jax.Array:
        whole = product(*map(jax.lax.stop_gradient, (query, key)))
        return jnp.where(jnp.isfinite(whole), product(_finite(query), _finite(key)), whole)

    finite = jnp.all(jnp.isfinite(query)) & jnp.all(jnp.isfinite(key))
    return cast(jax.Array, jax.lax.cond(finite, lambda: product(query, key), careful))


def _sums(weights: jax.Array, value: jax.Array, seen: jax.Array | None, call: Call) -> jax.Array:
    """Weights by values [..., T', H, V], of which those that are excluded take no part."""

    def product(weights: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.einsum("...htT,...Thd->...thd", weights, value, precision=call.precision)

    if seen is None:
        return product(weights, value)

    def careful() -> jax.Array:
        wrong = jnp.where(jnp.isfinite(value), 0, 1).astype(value.dtype)
        spoilt = product(jnp.broadcast_to(seen, weights.shape).astype(value.dtype), wrong) > 0
        return jnp.where(spoilt, jnp.nan, product(weights, _finite(value)))

    finite = jnp.all(jnp.isfinite(value))
    return cast(jax.Array, jax.lax.cond(finite, lambda: product(weights, value), careful))


def _finite(array: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))


def _ungrouped(term: jax.Array, heads: int, groups: int) -> jax.Array:
    """[..., H, G, T', T] to [..., H * G, T', T]; dims of size one broadcast."""
    *leading, own_heads, own_groups, rows, keys = term.shape
    if own_heads != own_groups:
        term = jnp.broadcast_to(term, (*leading, heads, groups, rows, keys))
    return term.reshape((*leading, term.shape[-4] * term.shape[-3], rows, keys))
