"""What is computed of one slice, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.cells import Cell, Parts
from autochunk.attention.kernels.dense import before, mean_over_keys
from autochunk.attention.kernels.grid import sum_to
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.maths import SliceMath, folds_scale, merge, weigh
from autochunk.attention.kernels.problem import Problem
from autochunk.attention.kernels.terms import HIDING, terms_of

# XLA:CPU sums a product with fewer rows than this one element after the other. Transposed logits of
# fewer keys would then differ by several roundings from the logits that the row's sum came from.
# With so few rows, or keys, another pass over the logits takes no time.
_FEW = 16
# Keys are far from their mean if they are this many times as large.
_FAR = 16


def _row_maximum(logits: jax.Array, may_be_infinite: bool) -> jax.Array:
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    # A row may see no key, or have a bias of -inf for all keys. With -inf as the maximum the
    # differences would be NaN.
    if may_be_infinite:
        maximum = jnp.maximum(maximum, jnp.finfo(logits.dtype).min)
    return maximum


def divisor(total: jax.Array, problem: Problem) -> jax.Array:
    """Sums of exponentials to divide by: one for rows that see nothing, whose sum is zero."""
    return jnp.where(total == 0, jnp.ones_like(total), total) if problem.may_see_nothing else total


class Forward:
    """One slice of the forward pass, and rows whose slices are all done: (out, maximum, sum)."""

    def __init__(self, inputs: Inputs, call: Call, problem: Problem, divides_weights: bool) -> None:
        self.inputs, self.call, self.problem = inputs, call, problem
        self.divides_weights = divides_weights
        # Slices of rows that see nothing are left out.
        self.skips = problem.may_see_nothing and problem.cover.form is not None

    def of_slice(self, cell: Cell, *arrays: Any) -> Parts:
        """The parts of one slice; finished, if it has all keys that its rows see."""
        taken, _ = taken_of(arrays)
        maths = SliceMath(taken, cell, self.call, self.problem, transposed=False)
        parts = self._of_keys(maths)
        if self.problem.whole_rows:
            parts = parts if self.divides_weights else self._divided(parts)
            return parts if self.skips else self._restored(cell, parts, arrays)
        (out, maximum, total), fresh = parts, maths.fresh_rows()
        return weigh(out, fresh), maximum, total if fresh is None else total * fresh

    def finished(self, cell: Cell, parts: Parts, arrays: Sequence[Any]) -> Parts:
        """The results of rows whose slices were all computed, or skipped."""
        parts = parts if self.problem.whole_rows else self._divided(parts)
        return self._restored(cell, parts, arrays)

    def _of_keys(self, maths: SliceMath) -> Parts:
        logits = maths.logits()
        maximum = _row_maximum(logits, self.problem.excludes or self.problem.may_see_nothing)
        weights = maths.fresh_keys(jnp.exp(logits - maximum[..., None]))
        total = jnp.sum(weights, axis=-1)
        if self.divides_weights:
            weights = weights / divisor(total, self.problem)[..., None]
        stats = (*maximum.shape[:-1], maths.groups, maths.rows)
        return (
            maths.spread(maths.over_keys(maths.dropped(weights), maths.inputs.value)),
            maximum.reshape(stats),
            total.reshape(stats),
        )

    def _divided(self, parts: Parts) -> Parts:
        out, maximum, total = parts
        return out / divisor(total, self.problem)[..., None], maximum, total

    def _restored(self, cell: Cell, parts: Parts, arrays: Sequence[Any]) -> Parts:
        """With the mean of all values in rows without a key, zeros beyond the rows' lengths."""
        (out, maximum, total), (taken, mean) = parts, taken_of(arrays)
        if mean:
            out = jnp.where((total == 0)[..., None], mean[0], out)
        if taken.query_seq_lengths is not None:
            inside = before(taken.query_seq_lengths, cell.starts.get("rows", 0), out.shape[-2])
            out = jnp.where(inside[..., None, None, :, None], out, jnp.zeros((), out.dtype))
        return out, maximum, total


class Backward:
    """What one slice adds to the cotangents of the inputs ``names``.

    Attributes:
      centre: what keys have in common, if it is subtracted from keys for the query's cotangent.
    """

    def __init__(
        self,
        inputs: Inputs,
        call: Call,
        problem: Problem,
        names: tuple[str, ...],
        platforms: tuple[str, ...],
    ) -> None:
        self.call, self.problem, self.names = call, problem, names
        self.dtype = problem.dtype
        self.is_half = inputs.query.dtype.itemsize < 4
        self.on_cpu = "cpu" in platforms
        self.sees_all = problem.whole_rows and not call.some_keys
        # In long rows the logits' cotangents are too small for float16. GPUs multiply half
        # precision several times as fast, CPUs do not.
        is_wide = inputs.query.dtype == jnp.float16 or self.on_cpu
        self.wide = problem.dtype if is_wide else inputs.query.dtype
        self.centre = _in_common(inputs, call, self.is_half and self.sees_all)

    def of_slice(self, cell: Cell, *arrays: Any) -> Parts:
        """One for each of ``names``, in their order."""
        taken, given = taken_of(arrays)
        centre, given = given[: len(self.centre)], given[len(self.centre) :]
        out, maximum, total, d_out, *d_lse = given
        keys, rows = taken.key.shape[-2], math.prod(taken.query.shape[-3:-1])
        maths = SliceMath(taken, cell, self.call, self.problem, transposed=min(keys, rows) >= _FEW)
        total = divisor(total, self.problem)
        weights, d_out = maths.weights(maximum), d_out.astype(self.dtype)
        # The sum of exponentials divides the rows' cotangents, not the weights: T' * V divisions
        # instead of T' * T. In half precision these quotients would be rounded again, or too small.
        if self.is_half:
            weights = weights / maths.by_row(total)
        else:
            d_out = d_out / total[..., None]
            d_lse = [one / total for one in d_lse]
        fresh = maths.fresh_rows()
        scaled = weigh(d_out, fresh)
        by_row = merge(scaled).astype(taken.value.dtype)
        d_weights = maths.dropped(maths.product(by_row, taken.value))
        is_rounded = self.is_half and not self.centre
        if self.sees_all and (is_rounded or keys <= out.shape[-1] or rows < _FEW):
            offset = self._cotangent_of_sum(maths, weights * d_weights, total)
        else:
            offset = jnp.sum(out.astype(self.dtype) * scaled, axis=-1)
        for one in d_lse:
            offset = offset - (one if fresh is None else one * fresh)
        d_logits = maths.through_cap(weights * (d_weights - maths.by_row(offset)))
        gradients: dict[str, Callable[[], jax.Array]] = {
            "query": functools.partial(self._d_query, maths, d_logits, centre),
            "key": functools.partial(self._d_key, maths, d_logits),
            "value": lambda: maths.over_rows(maths.dropped(weights), by_row, taken.value.shape),
            "bias": functools.partial(_d_bias, maths, d_logits),
            "alibi_slopes": functools.partial(_d_slopes, maths, d_logits),
        }
        return tuple(gradients[name]() for name in self.names)

    def _cotangent_of_sum(
        self, maths: SliceMath, product: jax.Array, total: jax.Array
    ) -> jax.Array:
        """What to subtract from a row's cotangents of weights: the sum of weights times cotangents.

        The output times its cotangent is the same but for rounding. The rounding shows where the
        cotangents of keys nearly cancel, unless what keys have in common is subtracted. To use the
        output costs less, except with few rows or keys.
        """
        product = maths.seen(product)
        if not self.is_half:
            return jnp.sum(maths.by_axes(product), axis=-1) / total
        # Along transposed rows XLA:CPU of jax 0.10 sums, and multiplies, ten times as slowly.
        return maths.sum_over_keys(product) if self.on_cpu else jnp.sum(maths.by_axes(product), -1)

    def _d_query(
        self, maths: SliceMath, d_logits: jax.Array, centre: Sequence[jax.Array]
    ) -> jax.Array:
        key = maths.inputs.key.astype(self.wide)
        for mean in centre:
            key = key - mean.astype(self.wide)
        summed = maths.spread(maths.over_keys(d_logits, key))
        return summed * jnp.asarray(self.call.scale, self.dtype)

    def _d_key(self, maths: SliceMath, d_logits: jax.Array) -> jax.Array:
        summed = maths.over_rows(d_logits, maths.query.astype(self.wide), maths.inputs.key.shape)
        is_scaled = folds_scale(maths.inputs.query)
        return summed * (1 if is_scaled else jnp.asarray(self.call.scale, self.dtype))


def _in_common(inputs: Inputs, call: Call, by_weights: bool) -> list[jax.Array]:
    """What keys have in common [..., 1, H, K], to leave out of the query's cotangent; or nothing.

    The cotangents of a row's logits sum to zero, but for the rounding of the row's own sum. If what
    keys have in common is subtracted from them, that rounding is not multiplied by it. The sum is
    not zero over some of the keys, where logits are capped, or with a cotangent of the log-sum-exp.
    A key that no row sees may be anything, and must not count. Such keys are not looked for where
    the row's sum is taken ``by_weights``: in half precision that is as exact.
    """
    if call.some_keys or call.residual or call.soft_cap is not None:
        return []
    shape = inputs.logits
    reached = call.reach == (None, None) or (call.offset == 0 and shape.rows >= shape.keys)
    key, share = inputs.key, None
    if not reached or inputs.terms.keys() & HIDING:
        if by_weights:
            return []
        seen = _seen_keys(inputs, call)
        share = mean_over_keys(seen.astype(jnp.float32))
        key = jnp.where(seen, key, jnp.zeros((), key.dtype))
    mean = mean_over_keys(key)
    mean = mean if share is None else (mean / share).astype(key.dtype)
    # A key that few rows see, and that is far from the others, must not matter to other rows.
    largest = jnp.max(jnp.abs(key), axis=-3, keepdims=True)
    return [jnp.where(largest < _FAR * jnp.abs(mean), mean, jnp.zeros((), mean.dtype))]


def _seen_keys(inputs: Inputs, call: Call) -> jax.Array:
    """Which keys any row sees: [..., T, H, 1]."""
    visible = terms_of(inputs, call).visible()
    if inputs.bias is not None:
        finite = ~jnp.isneginf(inputs.bias)
        visible = finite if visible is None else visible & finite
    assert visible is not None
    return jnp.any(visible, axis=(-3, -2)).swapaxes(-1, -2)[..., None]


def _d_bias(maths: SliceMath, d_logits: jax.Array) -> jax.Array:
    return sum_to(maths.by_axes(maths.seen(d_logits)), maths.inputs.present["bias"].shape)


def _d_slopes(maths: SliceMath, d_logits: jax.Array) -> jax.Array:
    by_distance = maths.by_axes(maths.seen(d_logits)) * maths.terms.slope_factor(maths.dtype)
    shape = (*maths.inputs.present["alibi_slopes"].shape, 1, 1)
    return sum_to(by_distance, shape)[..., 0, 0]


def taken_of(arrays: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The inputs' slices, and the slices of the other arrays."""
    count = len(Inputs._fields)
    return Inputs(*arrays[:count]), arrays[count:]
