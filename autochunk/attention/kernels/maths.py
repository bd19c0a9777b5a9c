"""The arithmetic of one slice."""

from __future__ import annotations

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import Cell, batch_axes
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.problem import Problem

# With fewer rows, transposing the keys costs more than it gains.
_LONG = 256


def masked_logit(dtype: Any) -> float:
    """Added to logits that take no part.

    So large that it absorbs any logit, and a fully masked row comes out uniform; finite, so that no
    NaN arises.
    """
    return -0.7 * float(jnp.finfo(dtype).max)


def merge(array: jax.Array) -> jax.Array:
    """[..., G, T', K] to [..., G * T', K].

    Query heads that share a key head are more rows of one product.
    """
    *leading, groups, rows, size = array.shape
    return array.reshape((*leading, groups * rows, size))


def folds_scale(query: jax.Array) -> bool:
    """Scaling the query costs less than scaling the logits, but rounds half precision once more."""
    return query.dtype.itemsize >= 4


def scaled_query(query: jax.Array, call: Call) -> jax.Array:
    """The query, scaled where that is the place to do it."""
    return query * jnp.asarray(call.scale, query.dtype) if folds_scale(query) else query


def _product(spec: str, one: jax.Array, other: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(spec, one, other, preferred_element_type=dtype)


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

    def product(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
        """[..., G * T', K] by [..., T, K] to the logits' shape."""
        if self.transposed:
            return _product("...sk,...tk->...st", keys, rows, self.dtype)
        return _product("...tk,...sk->...ts", rows, keys, self.dtype)

    def over_keys(self, weights: jax.Array, keys: jax.Array) -> jax.Array:
        """Sums over keys: [..., G * T', V]."""
        weights = weights.astype(keys.dtype)
        if not self.transposed:
            return _product("...ts,...sv->...tv", weights, keys, self.dtype)
        if self.groups * self.rows < _LONG:
            return _product("...st,...sv->...tv", weights, keys, self.dtype)
        # XLA:CPU multiplies by a transposed left side at half the speed, so the narrow arrays are
        # transposed instead; barriers keep XLA from undoing that.
        narrow = jax.lax.optimization_barrier(jnp.swapaxes(keys, -1, -2))
        summed = _product("...vs,...st->...vt", narrow, weights, self.dtype)
        return jnp.swapaxes(jax.lax.optimization_barrier(summed), -1, -2)

    def over_rows(self, weights: jax.Array, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Sums over rows, and over dims that ``shape`` [..., T, K] broadcasts."""
        dims = string.ascii_uppercase[: len(shape) - 2]
        sizes = zip(dims, weights.shape, shape, strict=False)
        kept = "".join(dim for dim, size, own in sizes if size == own)
        spec = f"{dims}{'st' if self.transposed else 'ts'},{dims}tk->{kept}sk"
        return _product(spec, weights.astype(rows.dtype), rows, self.dtype).reshape(shape)

    def by_row(self, stat: jax.Array) -> jax.Array:
        """[..., G, T'] to something that broadcasts against the logits."""
        flat = stat.reshape((*stat.shape[:-2], self.groups * self.rows))
        return flat[..., None, :] if self.transposed else flat[..., :, None]

    def logits(self) -> jax.Array:
        """Scaled logits with bias and mask."""
        logits = self.product(self.query, self.inputs.key)
        if not folds_scale(self.inputs.query):
            logits = logits * jnp.asarray(self.call.scale, self.dtype)
        if self.inputs.bias is not None:
            logits = self.add(logits, self.inputs.bias.astype(self.dtype))
        allowed = self.allowed()
        if allowed is None:
            return logits
        masked = jnp.asarray(masked_logit(self.dtype), self.dtype)
        if self.differentiable:
            # JAX's own derivative follows: the logits of a row that is masked throughout are then
            # constant, as they should be.
            open_to = self.add(jnp.zeros_like(logits), allowed.astype(self.dtype)) > 0
            return jnp.where(open_to, logits, masked)
        return self.add(logits, jnp.where(allowed, jnp.zeros((), self.dtype), masked))

    def allowed(self) -> jax.Array | None:
        """Where a query may look, broadcast against [..., H, G, T', T]; None means everywhere."""
        allowed = self.inputs.mask
        if self.call.is_causal and not self.cell.below:
            starts, sizes = self.cell.starts, (self.rows, self.inputs.key.shape[-2])
            row = starts.get("rows", 0) + jax.lax.broadcasted_iota(jnp.int32, sizes, 0)
            column = starts.get("keys", 0) + jax.lax.broadcasted_iota(jnp.int32, sizes, 1)
            causal = jnp.expand_dims(row >= column, range(self.inputs.query.ndim - 2))
            allowed = causal if allowed is None else jnp.logical_and(allowed, causal)
        return allowed

    def add(self, logits: jax.Array, term: jax.Array) -> jax.Array:
        """Adds a term of axes [..., H, G, T', T]; dims of size one broadcast."""
        if self.groups == 1:  # without the extra axis XLA sees a plain softmax and may fuse it
            term = term[..., 0, :, :]
            return logits + (jnp.swapaxes(term, -1, -2) if self.transposed else term)
        if self.transposed:
            spread = logits.reshape((*logits.shape[:-1], self.groups, self.rows))
            return (spread + jnp.moveaxis(term, -1, -3)).reshape(logits.shape)
        return (self.by_axes(logits) + term).reshape(logits.shape)

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

    def live_rows(self, maximum: jax.Array) -> jax.Array | None:
        """Zero for rows [..., G, T'] that are masked throughout.

        No logit of theirs has a gradient. None where there is no mask.
        """
        if self.inputs.mask is None and not self.call.is_causal:
            return None
        return (maximum > 0.5 * masked_logit(self.dtype)).astype(self.dtype)

    def spread(self, rows: jax.Array) -> jax.Array:
        """[..., G * T', V] to [..., G, T', V]."""
        return rows.reshape((*rows.shape[:-2], self.groups, self.rows, rows.shape[-1]))

    def fresh_rows(self) -> jax.Array | None:
        """One for elements of [..., H, G, T'] that no earlier slice had, zero for the others.

        None where that is all.
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
