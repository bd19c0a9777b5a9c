"""Attention without slices: the baseline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.terms import excludes, may_see_nothing, terms_of


def dense(
    inputs: Inputs, call: Call, careful: bool = True, differentiable: bool = False
) -> list[jax.Array]:
    """[out], or [out, log-sum-exp], with all logits at once, in haiku's order of operations.

    Shapes are those of ``attention``. Logits of half-precision inputs are float32, or with
    ``call.half_logits`` in the inputs' dtype, as in ``hk.MultiHeadAttention``. Without ``careful``
    excluded values must be finite. ``differentiable`` says whether JAX may differentiate this.
    """
    return dense_with_weights(inputs, call, careful, differentiable)[:-1]


def dense_with_weights(
    inputs: Inputs, call: Call, careful: bool = True, differentiable: bool = False
) -> list[jax.Array]:
    """What ``dense`` returns, and the weights [..., H * G, T', T] before dropout."""
    whole = _Whole(inputs, call)
    seen = whole.seen
    logits = whole.capped(seen if careful and differentiable else None)
    if whole.blind is not None:  # -inf by overflow must not look like an excluded key
        logits = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    blind: jax.Array | None
    stats: list[jax.Array] = []
    if call.residual or (differentiable and (seen is not None or whole.may_see_nothing)):
        weights, blind, *stats = _weights_and_stats(logits)
    else:
        weights, blind = _weights(whole, logits)
    if seen is not None:  # their cotangents may overflow, and zero times that is NaN
        weights = jnp.where(seen, weights, jnp.zeros((), logits.dtype))
    value = whole.value
    kept = whole.dropped(weights).astype(value.dtype)
    out = _sums(kept, value, seen if careful else None, call)
    if blind is not None:
        out = jnp.where(jnp.swapaxes(blind, -2, -3), mean_over_keys(value), out)
    out = whole.rows(out)
    return [out, weights] if not call.residual else [out, whole.stats(log_sum_exp(*stats)), weights]


def _weights(whole: _Whole, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Weights, and which rows see nothing [..., T', 1]; the weights of such rows may be NaN.

    On a GPU ``jax.nn.softmax`` is one kernel of XLA's, if nothing else uses its maxima.
    """
    weights, blind = jax.nn.softmax(logits), whole.blind
    if whole.may_see_nothing and blind is None:
        blind = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
        weights = jnp.where(blind, jnp.zeros((), logits.dtype), weights)
    return weights, blind


def _weights_and_stats(logits: jax.Array) -> list[jax.Array]:
    """Weights, which rows see nothing [..., T', 1], the maxima and sums of exponentials of rows."""
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    maximum = jnp.maximum(maximum, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    blind = total == 0
    return [weights / jnp.where(blind, 1, total), blind, maximum, total]


def dense_tangent(
    inputs: Inputs,
    call: Call,
    weights: jax.Array,
    tangents: Mapping[str, jax.Array],
    platforms: tuple[str, ...] = (),
) -> list[jax.Array]:
    """Tangents of what ``dense`` returns, linear in the tangents of some inputs, by name.

    On CPUs the weights' cotangents keep the logits' dtype. XLA:CPU computes half precision in
    float32 anyway, and rounds it at the end of a fusion: of ``jax.nn``'s, which has all of a row's
    derivatives in one, less is rounded.
    """
    if excludes(inputs, call):  # no product of the saved weights may meet what is excluded
        finite = {name: _finite(inputs.present[name]) for name in _HEADS}
        inputs = inputs._replace(**finite)
    whole = _Whole(inputs, call)
    moved = {name: whole.by_head(name, tangents[name]) for name in _HEADS if name in tangents}
    dtype = whole.dtype
    d_logits = []
    if "query" in moved:
        d_logits.append(_product(moved["query"], whole.key, call, dtype))
    if "key" in moved:
        d_logits.append(_product(whole.query, moved["key"], call, dtype))
    d_logits = [one * jnp.asarray(call.scale, dtype) for one in d_logits]
    d_logits += whole.added(tangents)
    d_out, d_lse = [], jnp.zeros(weights.shape[:-1], dtype)
    wide = dtype if "cpu" in platforms else whole.value.dtype
    if d_logits:
        change = whole.through_cap(functools.reduce(jnp.add, d_logits))
        change = weights * whole.visible(change)
        d_sum = jnp.sum(change, axis=-1, keepdims=True)
        d_lse = d_sum[..., 0]
        change = whole.visible(whole.dropped(change - weights * d_sum))
        d_out.append(_sum(change.astype(wide), whole.value.astype(wide), call))
    if "value" in moved:
        d_value = _sum(whole.dropped(weights).astype(whole.value.dtype), moved["value"], call)
        if whole.may_see_nothing:
            blind = whole.blind
            if blind is None:
                blind = jnp.max(weights, axis=-1, keepdims=True) == 0
            d_value = jnp.where(
                jnp.swapaxes(blind, -2, -3), mean_over_keys(moved["value"]), d_value
            )
        d_out.append(d_value.astype(wide))
    outs = [whole.rows(functools.reduce(jnp.add, d_out))]
    return [*outs, whole.stats(d_lse)] if call.residual else outs


_HEADS = ("query", "key", "value")


class _Whole:
    """All of a call's logits [..., H * G, T', T], and the arrays that they come from."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self._inputs, self._call = inputs, call
        query = inputs.query
        *self._leading, self._rows, self._heads, self._groups, _ = query.shape
        self.dtype = jnp.promote_types(
            query.dtype, query.dtype if call.half_logits else jnp.float32
        )
        self.query, self.key, self.value = (
            self.by_head(name, inputs.present[name]) for name in _HEADS
        )
        self._terms = terms_of(inputs, call)
        visible = self._terms.visible()
        self.seen = None if visible is None else self._ungrouped(visible)
        self.may_see_nothing = may_see_nothing(inputs, call)
        self.blind: jax.Array | None = None
        """Rows that see nothing [..., T', 1], where ``seen`` alone tells it: without a bias."""
        if self.seen is not None and self.may_see_nothing and inputs.bias is None:
            self.blind = ~jnp.any(self.seen, axis=-1, keepdims=True)

    def by_head(self, name: str, array: jax.Array) -> jax.Array:
        """A query, key or value, or a tangent of it, with the axes [..., T, H * G, K]."""
        if name == "query":
            *leading, rows, heads, groups, size = array.shape
            return array.reshape((*leading, rows, heads * groups, size))
        return jnp.repeat(array, self._groups, axis=-2) if self._groups > 1 else array

    def _ungrouped(self, term: jax.Array) -> jax.Array:
        """[..., H, G, T', T] to [..., H * G, T', T]; dims of size one broadcast."""
        *leading, heads, groups, rows, keys = term.shape
        if heads != groups:
            heads, groups = self._heads, self._groups
            term = jnp.broadcast_to(term, (*leading, heads, groups, rows, keys))
        return term.reshape((*leading, heads * groups, rows, keys))

    def capped(self, guarded: jax.Array | None = None) -> jax.Array:
        """Logits with all added terms, capped if there is a cap."""
        scale = jnp.asarray(self._call.scale, self.dtype)
        logits = _products(self.query, self.key, guarded, self._call, self.dtype) * scale
        for term in self._terms.added(self.dtype):
            logits = logits + self._ungrouped(term)
        cap = self._call.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def through_cap(self, d_logits: jax.Array) -> jax.Array:
        """Tangents of capped logits, from those of the logits."""
        cap = self._call.soft_cap
        return d_logits if cap is None else d_logits * (1 - jnp.square(self.capped() / cap))

    def added(self, tangents: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Tangents of what is added to the logits, from those of some inputs."""
        kept = {name: array for name, array in tangents.items() if name not in _HEADS}
        if not kept:
            return []
        of = Inputs(*self._inputs[:3], **kept, query_offset=self._inputs.query_offset)
        return [self._ungrouped(one) for one in terms_of(of, self._call).added(self.dtype)]

    def visible(self, weights: jax.Array) -> jax.Array:
        """Tangents of weights, zero where they are excluded; so are the cotangents that flow back.

        Those may overflow, and zero times infinity is NaN.
        """
        return weights if self.seen is None else jnp.where(self.seen, weights, 0)

    def dropped(self, weights: jax.Array) -> jax.Array:
        """Weights, or their tangents, after dropout."""
        kept = self._terms.kept(self.dtype)
        return weights if kept is None else weights * self._ungrouped(kept)

    def rows(self, out: jax.Array) -> jax.Array:
        """[..., T', H * G, V] as the output is."""
        query = self._inputs.query
        out = out.astype(query.dtype).reshape((*query.shape[:-1], out.shape[-1]))
        return within_lengths(out, self._inputs)

    def stats(self, rows: jax.Array) -> jax.Array:
        """A number for each row, [..., H * G, T'] or [..., H * G, T', 1], as [..., H, G, T']."""
        wide = jnp.promote_types(self._inputs.query.dtype, jnp.float32)
        return rows.reshape((*self._leading, self._heads, self._groups, self._rows)).astype(wide)


def log_sum_exp(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Of each row, from its maximum and sum; for rows that see nothing a large negative number."""
    least = -0.7 * float(jnp.finfo(maximum.dtype).max)
    blind = total == 0
    return jnp.where(blind, least, maximum + jnp.log(jnp.where(blind, 1, total)))


def mean_value(value: jax.Array) -> jax.Array:
    """What a row that sees no key gives: the mean of all values [..., 1, H, 1, V]."""
    return mean_over_keys(value)[..., None, :]


def mean_over_keys(array: jax.Array) -> jax.Array:
    """The mean [..., 1, H, K] of [..., T, H, K]."""
    wide = jnp.promote_types(array.dtype, jnp.float32)
    return jnp.mean(array, axis=-3, keepdims=True, dtype=wide).astype(array.dtype)


def within_lengths(rows: jax.Array, inputs: Inputs) -> jax.Array:
    """Rows [..., T', H, G, V], zero beyond ``query_seq_lengths``."""
    lengths = inputs.query_seq_lengths
    if lengths is None:
        return rows
    inside = before(lengths, 0, rows.shape[-4])
    return jnp.where(inside[..., None, None, None], rows, jnp.zeros((), rows.dtype))


def before(lengths: jax.Array, first: Any, count: int) -> jax.Array:
    """Which of ``count`` rows from the ``first`` on come before the lengths: [..., count]."""
    row = jax.lax.broadcasted_iota(lengths.dtype, (*lengths.shape, count), lengths.ndim)
    return row < lengths[..., None] - jnp.asarray(first, lengths.dtype)


def _product(query: jax.Array, key: jax.Array, call: Call, dtype: Any) -> jax.Array:
    """Queries by keys: [..., H, T', T]."""
    spec, precision = "...thd,...Thd->...htT", call.precision
    return jnp.einsum(spec, query, key, precision=precision, preferred_element_type=dtype)


def _products(
    query: jax.Array, key: jax.Array, seen: jax.Array | None, call: Call, dtype: Any
) -> jax.Array:
    """``_product``, with derivatives that do not see what is excluded."""
    if seen is None:
        return _product(query, key, call, dtype)

    def careful() -> jax.Array:
        fixed_query, fixed_key = map(jax.lax.stop_gradient, (query, key))
        whole = _product(fixed_query, fixed_key, call, dtype)
        finite = _product(_finite(query), _finite(key), call, dtype)
        return jnp.where(jnp.isfinite(whole), finite, whole)

    finite = jnp.all(jnp.isfinite(query)) & jnp.all(jnp.isfinite(key))
    plain = functools.partial(_product, query, key, call, dtype)
    return cast(jax.Array, jax.lax.cond(finite, plain, careful))


def _sum(weights: jax.Array, value: jax.Array, call: Call) -> jax.Array:
    """Weights by values: [..., T', H, V]."""
    return jnp.einsum("...htT,...Thd->...thd", weights, value, precision=call.precision)


def _sums(weights: jax.Array, value: jax.Array, seen: jax.Array | None, call: Call) -> jax.Array:
    """``_sum``, without values that are excluded."""
    if seen is None:
        return _sum(weights, value, call)

    def careful() -> jax.Array:
        wrong = jnp.where(jnp.isfinite(value), 0, 1).astype(value.dtype)
        seen_ones = jnp.broadcast_to(seen, weights.shape).astype(value.dtype)
        spoilt = _sum(seen_ones, wrong, call) > 0
        return jnp.where(spoilt, jnp.nan, _sum(weights, _finite(value), call))

    finite = jnp.all(jnp.isfinite(value))
    return cast(jax.Array, jax.lax.cond(finite, lambda: _sum(weights, value, call), careful))


def _finite(array: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(array), array, jnp.zeros((), array.dtype))
