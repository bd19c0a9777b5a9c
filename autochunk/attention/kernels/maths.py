"""The arithmetic of one slice."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.cells import Cell
from autochunk.attention.kernels.grid import batch_axes, vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.problem import Problem
from autochunk.attention.kernels.terms import Span, Terms
from autochunk.plan import slice_count

# With fewer rows, transposing the keys costs more than it gains.
_LONG = 256
# Into how many parts keys are cut, to compute a product without what is excluded.
_PARTS = 16


def merge(array: jax.Array) -> jax.Array:
    """[..., G, T', K] to [..., G * T', K].

    Query heads that share a key head are more rows of one product.
    """
    *leading, groups, rows, size = array.shape
    return array.reshape((*leading, groups * rows, size))


def folds_scale(query: jax.Array) -> bool:
    """Whether to scale the query: cheaper than scaling logits, but half precision rounds again."""
    return query.dtype.itemsize >= 4


def scaled_query(query: jax.Array, call: Call) -> jax.Array:
    """The query, scaled if ``folds_scale`` says so."""
    return query * jnp.asarray(call.scale, query.dtype) if folds_scale(query) else query


class SliceMath:
    """Logits and weights of one slice, in either orientation.

    [..., H, G * T', T], or transposed [..., H, T, G * T'].
    """

    def __init__(
        self, inputs: Inputs, cell: Cell, call: Call, problem: Problem, transposed: bool
    ) -> None:
        self.inputs, self.cell, self.call, self.transposed = inputs, cell, call, transposed
        self.dtype, self.differentiable = problem.dtype, problem.differentiable
        self.groups, self.rows = inputs.query.shape[-3:-1]
        self.query = merge(scaled_query(inputs.query, call))
        rows = Span(cell.starts.get("rows", 0), self.rows)
        keys = Span(cell.starts.get("keys", 0), inputs.key.shape[-2])
        leading, names = inputs.query.ndim - 4, problem.cover.names
        self.terms = Terms(inputs.present, rows, keys, call, leading, names)
        self.visible = self.terms.visible(cell.is_open)
        worked_out = self.visible is not None and inputs.mask is None
        if worked_out and not self.differentiable:
            # Otherwise XLA:CPU computes it again in each pass over the logits, for every head.
            self.visible = jax.lax.optimization_barrier(self.visible)
        self.kept = self.terms.kept(self.dtype)

    def _product(self, spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
        precision = self.call.precision
        return jnp.einsum(spec, one, other, precision=precision, preferred_element_type=self.dtype)

    def product(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
        """[..., G * T', K] by [..., T, K] to the logits' shape."""
        if self.transposed:
            return self._product("...sk,...tk->...st", keys, rows)
        return self._product("...tk,...sk->...ts", rows, keys)

    def over_keys(self, weights: jax.Array, keys: jax.Array) -> jax.Array:
        """Sums over keys: [..., G * T', V]."""
        return self._excluding(self._over_keys, weights, keys, sums_keys=True)

    def _over_keys(self, weights: jax.Array, keys: jax.Array) -> jax.Array:
        weights = weights.astype(keys.dtype)
        if not self.transposed:
            return self._product("...ts,...sv->...tv", weights, keys)
        if self.groups * self.rows < _LONG:
            return self._product("...st,...sv->...tv", weights, keys)
        # XLA:CPU multiplies by a transposed left side at half the speed, so the narrow arrays are
        # transposed instead; barriers keep XLA from undoing that.
        narrow = jax.lax.optimization_barrier(jnp.swapaxes(keys, -1, -2))
        summed = self._product("...vs,...st->...vt", narrow, weights)
        return jnp.swapaxes(jax.lax.optimization_barrier(summed), -1, -2)

    def sum_over_keys(self, weights: jax.Array) -> jax.Array:
        """The sum of each row, [..., G, T'], by a product with ones."""
        keys = weights.shape[-2 if self.transposed else -1]
        ones = jnp.ones((*weights.shape[:-2], keys, 1), weights.dtype)
        return self.spread(self._over_keys(weights, ones))[..., 0]

    def over_rows(self, weights: jax.Array, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Sums over rows, and over dims that ``shape`` [..., T, K] broadcasts."""
        dims = string.ascii_uppercase[: len(shape) - 2]
        sizes = zip(dims, weights.shape, shape, strict=False)
        kept = "".join(dim for dim, size, own in sizes if size == own)
        spec = f"{dims}{'st' if self.transposed else 'ts'},{dims}tk->{kept}sk"

        def summed(weights: jax.Array, rows: jax.Array) -> jax.Array:
            product = self._product(spec, weights.astype(rows.dtype), rows)
            return product.reshape((*shape[:-2], -1, shape[-1]))

        return self._excluding(summed, weights, rows, sums_keys=False)

    def _excluding(
        self,
        product: Callable[..., jax.Array],
        weights: jax.Array,
        array: jax.Array,
        sums_keys: bool,
    ) -> jax.Array:
        """A product without what is excluded, even if that is infinite or NaN.

        Its weight is zero, but zero times infinity is NaN. What is not excluded and not finite
        makes NaN of every sum that it is in. Either shows in the result, which is small: only that
        is checked. Derivatives of derivatives go without: their programs would become several times
        as long.
        """
        plain, visible = product(weights, array), self.visible
        if visible is None or self.differentiable:
            return plain

        right = jnp.all(jnp.isfinite(plain))
        exact = functools.partial(self._exact, product, weights, array, visible, plain, sums_keys)
        return cast(jax.Array, jax.lax.cond(right, lambda: plain, exact))

    def _exact(
        self,
        product: Callable[..., jax.Array],
        weights: jax.Array,
        array: jax.Array,
        visible: jax.Array,
        plain: jax.Array,
        sums_keys: bool,
    ) -> jax.Array:
        """The product without what is excluded, a few keys at a time to save memory."""
        axis = -2 if self.transposed else -1
        length = weights.shape[axis]
        size = slice_count(length, _PARTS)

        def part(number: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = jnp.minimum(number * size, length - size)

            def taken(whole: jax.Array, axis: int) -> jax.Array:
                if whole.shape[axis] == 1:
                    return whole
                return jax.lax.dynamic_slice_in_dim(whole, start, size, axis)

            some, seen, other = taken(weights, axis), taken(visible, -1), array
            if sums_keys:
                fresh = start + jnp.arange(size) >= number * size
                other = jnp.where(_along(fresh, -2, array.ndim), taken(array, -2), 0)
            finite = jnp.isfinite(other)
            spoilt = product(
                self.where(seen, jnp.ones_like(some), 0.0), (~finite).astype(other.dtype)
            )
            kept = product(self.where(seen, some, 0.0), jnp.where(finite, other, 0))
            if sums_keys:
                return totals[0] + kept, totals[1] + spoilt
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
            return put(totals[0], kept, start), put(totals[1], spoilt, start)

        empty = vary_alike([jnp.zeros_like(plain)] * 2, [plain])
        count = slice_count(length, size)
        kept, spoilt = jax.lax.fori_loop(0, count, part, tuple(empty))
        return jnp.where(spoilt > 0, jnp.nan, kept)

    def by_row(self, stat: jax.Array) -> jax.Array:
        """[..., G, T'] to something that broadcasts against the logits."""
        flat = stat.reshape((*stat.shape[:-2], self.groups * self.rows))
        return flat[..., None, :] if self.transposed else flat[..., :, None]

    def logits(self) -> jax.Array:
        """Logits with all added terms, minus infinity where a row does not see a key."""
        logits = self.capped()
        return logits if self.visible is None else self.where(self.visible, logits, -jnp.inf)

    def capped(self) -> jax.Array:
        """Logits with all added terms, capped if there is a cap."""
        logits = self.product(self.query, self.inputs.key)
        if not folds_scale(self.inputs.query):
            logits = logits * jnp.asarray(self.call.scale, self.dtype)
        for term in self.terms.added(self.dtype):
            logits = self.combine(jnp.add, logits, term)
        cap = self.call.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def through_cap(self, d_logits: jax.Array) -> jax.Array:
        """Tangents of capped logits from those of the logits, or cotangents the other way."""
        if self.call.soft_cap is None:
            return d_logits
        return d_logits * (1 - jnp.square(self.capped() / self.call.soft_cap))

    def seen(self, logits: jax.Array) -> jax.Array:
        """An array of the logits' shape, zero where a row does not see a key."""
        return logits if self.visible is None else self.where(self.visible, logits, 0.0)

    def dropped(self, weights: jax.Array) -> jax.Array:
        """Weights, or their cotangents, after dropout."""
        return weights if self.kept is None else self.combine(jnp.multiply, weights, self.kept)

    def where(self, condition: jax.Array, logits: jax.Array, otherwise: float) -> jax.Array:
        """Logits where a condition of axes [..., H, G, T', T] holds."""
        other = jnp.asarray(otherwise, logits.dtype)
        return self.combine(lambda one, given: jnp.where(given, one, other), logits, condition)

    def combine(
        self, function: Callable[..., jax.Array], logits: jax.Array, term: jax.Array
    ) -> jax.Array:
        """``function`` of logits and a term of axes [..., H, G, T', T]; ones broadcast."""
        if self.groups == 1:  # without the extra axis XLA sees a plain softmax and may fuse it
            term = term[..., 0, :, :]
            return function(logits, jnp.swapaxes(term, -1, -2) if self.transposed else term)
        if self.transposed:
            spread = logits.reshape((*logits.shape[:-1], self.groups, self.rows))
            return function(spread, jnp.moveaxis(term, -1, -3)).reshape(logits.shape)
        return function(self.by_axes(logits), term).reshape(logits.shape)

    def by_axes(self, logits: jax.Array) -> jax.Array:
        """Back to the axes [..., H, G, T', T]."""
        if self.transposed:
            by_group = logits.reshape((*logits.shape[:-1], self.groups, self.rows))
            return jnp.moveaxis(by_group, -3, -1)
        return logits.reshape((*logits.shape[:-2], self.groups, self.rows, logits.shape[-1]))

    def weights(self, maximum: jax.Array) -> jax.Array:
        """exp(logits - maximum), zero for keys that an earlier slice had."""
        weights = jnp.exp(self.logits() - self.by_row(maximum))
        return self.fresh_keys(weights)

    def fresh_keys(self, weights: jax.Array) -> jax.Array:
        """The weights, zero for keys that an earlier slice had."""
        fresh = self.cell.fresh.get("keys")
        if fresh is None:
            return weights
        along = _along(fresh, -2 if self.transposed else -1, weights.ndim)
        return weights * along.astype(weights.dtype)

    def spread(self, rows: jax.Array) -> jax.Array:
        """[..., G * T', V] to [..., G, T', V]."""
        return rows.reshape((*rows.shape[:-2], self.groups, self.rows, rows.shape[-1]))

    def fresh_rows(self) -> jax.Array | None:
        """One for elements of [..., H, G, T'] that no earlier slice had, zero for the others.

        None where that is one for all.
        """
        rank = self.inputs.query.ndim - 1
        dims = {axis: dim - rank for dim, axis in enumerate(batch_axes(rank - 3))}
        dims |= {"heads": -3, "rows": -1}
        fresh = self.cell.fresh
        factors = [_along(fresh[axis], dim, rank) for axis, dim in dims.items() if axis in fresh]
        return functools.reduce(jnp.logical_and, factors).astype(self.dtype) if factors else None


def _along(vector: jax.Array, dim: int, rank: int) -> jax.Array:
    """A vector along one dim (counted from the end) of an array of a rank, size one elsewhere."""
    return vector.reshape((1,) * (rank + dim) + (-1,) + (1,) * (-dim - 1))


def weigh(array: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Rows [..., G, T', V] times a weight for each, [..., G, T']; None weighs nothing."""
    return array if weight is None else array * weight[..., None]
