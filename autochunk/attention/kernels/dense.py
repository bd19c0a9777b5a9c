"""Attention without slices, in haiku's order of operations: the baseline."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import Call, Inputs


def dense(inputs: Inputs, call: Call) -> jax.Array:
    """Attention in haiku's order of operations, all logits at once, in the input dtype.

    It is what everything else is measured against. Shapes as in ``attention``. Softmax is in the
    input dtype, masked logits are -1e30, as in ``hk.MultiHeadAttention``; in float16, where that
    would be -inf, they are its least number.
    """
    query, key, value, bias, mask = inputs
    *leading, length, heads, groups, size = query.shape
    flat = query.reshape((*leading, length, heads * groups, size))
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=-2), jnp.repeat(value, groups, axis=-2)
    logits = jnp.einsum("...thd,...Thd->...htT", flat, key) * jnp.asarray(call.scale, query.dtype)
    if bias is not None:
        logits = logits + _ungrouped(bias, heads, groups).astype(logits.dtype)
    if call.is_causal:
        causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        causal = jnp.expand_dims(causal, range(logits.ndim - 2))[..., None, :, :]
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        masked = max(-1e30, float(jnp.finfo(logits.dtype).min))
        allowed = _ungrouped(mask, heads, groups)
        logits = jnp.where(allowed, logits, jnp.asarray(masked, logits.dtype))
    out = jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(logits), value)
    return out.reshape((*query.shape[:-1], value.shape[-1]))


def _ungrouped(term: jax.Array, heads: int, groups: int) -> jax.Array:
    """[..., H, G, T', T] to [..., H * G, T', T]; dims of size one broadcast."""
    *leading, own_heads, own_groups, rows, keys = term.shape
    if own_heads != own_groups:
        term = jnp.broadcast_to(term, (*leading, heads, groups, rows, keys))
    return term.reshape((*leading, term.shape[-4] * term.shape[-3], rows, keys))
