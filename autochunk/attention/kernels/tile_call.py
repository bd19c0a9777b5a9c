"""The call of one sequence, as a program of ``mending``'s kernel sees it: a tile at a time.

Attention of a tile is as in Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691, without
what no row of a tile sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.in_place import STEP, index, load, store, total
from autochunk.attention.kernels.inputs import Settings

ROWS = 32
"""Rows of a tile: no more than any kernel computes together (64, a warpgroup's)."""
# Of keys of a tile, of which a small GPU's 99 KB hold three.
_TILE_BYTES = 2**14
_MOST_KEYS = 64
# Keys that are looked at, at a time, for one that is seen; and of a bias.
_LOOKED_AT, _LOOKED_AT_OF_BIAS = 128, 512
_LEAST_WIDTH = 16  # that Triton multiplies


class TileCall:
    """The call of one sequence; or of several, to look at."""

    def __init__(
        self,
        refs: Mapping[str, Any],
        sizes: Mapping[str, tuple[int, ...]],
        settings: Settings,
        one: Any,
        tells: bool,
    ) -> None:
        self._refs, self._sizes, self._settings = refs, sizes, settings
        self._one, self.tells, self.mask_tells = one, tells, "blind" not in refs
        self._batch, self._rows, self._heads, _ = sizes["query"]
        self._keys = sizes["key"][1]

    def put_right(self, first: Any, count: int, head: Any) -> None:
        """Does so for some rows of a head."""
        from jax.experimental import pallas as pl

        row = first + jnp.arange(count)
        suspect = any_of(is_nan(self.output(first + jnp.arange(0, count, ROWS), head)))
        suspect |= any_of(self.are_blind(row, head))
        if self.tells:
            suspect |= any_of(self.may_be_blind(row, head))

        @pl.when(suspect)
        def _put_right() -> None:
            mean = self._mean(head)

            def tile(number: Any, _: Any) -> int:
                self._put_tile_right(first + number * ROWS + jnp.arange(ROWS), head, mean)
                return 0

            jax.lax.fori_loop(0, count // ROWS, tile, 0)

    def _put_tile_right(self, row: jax.Array, head: Any, mean: jax.Array) -> None:
        from jax.experimental import pallas as pl

        blind, spoilt = self.are_blind(row, head), is_nan(self.output(row, head))
        at, there = self._at_output(row, head)

        def write(new: jax.Array, rows: jax.Array) -> None:
            store(self._refs["out"], at, new.astype(self._refs["out"].dtype), there & rows[:, None])

        @pl.when(any_of(blind))
        def _put_means() -> None:
            write(jnp.broadcast_to(mean, at.shape), blind)

        suspect = any_of(spoilt & ~blind[:, None])
        if self.tells:
            suspect |= any_of(self.may_be_blind(row, head) & ~blind)

        @pl.when(suspect)
        def _compute() -> None:
            sees = self._sees(row, head) if self.tells else ~blind
            write(jnp.broadcast_to(mean, at.shape), ~sees)

            @pl.when(any_of(spoilt & sees[:, None]))
            def _anew() -> None:
                write(self._attention(row, head), sees)

    def _mean(self, head: Any) -> jax.Array:
        """Of all values: [1, V], to a power of two."""

        def some(first: Any) -> jax.Array:
            return self._operand("value", first + jnp.arange(STEP), head)

        return total(some, self._keys, self._width("value")) / self._keys

    def hides_all(self) -> jax.Array:
        """Whether a mask of one row shows no key, of the sequence or of each of some."""
        from jax.experimental import pallas as pl

        key, one = jnp.arange(pl.next_power_of_2(self._keys)), self._one
        if jnp.ndim(one):
            key, one = key[None], one[:, None]
        at = index(self._sizes["mask"], (one, 0, 0, key))
        there = (key < self._keys) & (one < self._batch)
        shown = load(self._refs["mask"], jnp.broadcast_to(at, there.shape), there)
        hides: jax.Array = jnp.max(shown.astype(jnp.int32), axis=-1) == 0
        return jnp.logical_and(hides, self._one < self._batch)

    def bias_hides(self, row: jax.Array, head: Any) -> jax.Array:
        """Whether a bias hides any key from some rows."""
        from jax.experimental import pallas as pl

        at_a_time = min(_LOOKED_AT_OF_BIAS, pl.next_power_of_2(self._keys))

        def step(number: Any, found: jax.Array) -> jax.Array:
            bias = self._term("bias", row, number * at_a_time + jnp.arange(at_a_time), head)
            return found | any_of(bias.astype(jnp.float32) == -jnp.inf)

        steps = pl.cdiv(self._keys, at_a_time)
        found: jax.Array = jax.lax.fori_loop(0, steps, step, jnp.asarray(False))
        return found

    def are_blind(self, row: jax.Array, head: Any) -> jax.Array:
        """Which rows are told to have no key."""
        there = self._are_rows(row, head)
        if self.mask_tells:
            return there & self.hides_all()
        at = jnp.zeros_like(row) + index(self._sizes["blind"], (self._one, head, row))
        return load(self._refs["blind"], at, there)

    def may_be_blind(self, row: jax.Array, head: Any) -> jax.Array:
        """By their first elements, those without a key and hardly any others."""
        there = self._are_rows(row, head)
        at = ((self._one * self._rows + row) * self._heads + head) * self._sizes["value"][-1]
        element = load(self._refs["out"], at, there).astype(jnp.float32)
        return there & ((element == 0) | jnp.isnan(element))

    def _at_output(self, row: jax.Array, head: Any) -> tuple[jax.Array, jax.Array]:
        """Where elements of some rows of the output are, and which there are."""
        width = self._sizes["value"][-1]
        column = jnp.arange(self._width("value"))[None]
        at: jax.Array = ((self._one * self._rows + row) * self._heads + head)[:, None] * width
        return at + column, self._are_rows(row, head)[:, None] & (column < width)

    def output(self, row: jax.Array, head: Any) -> jax.Array:
        """Some rows of the output, [rows, V to a power of two]."""
        return load(self._refs["out"], *self._at_output(row, head))

    def _width(self, name: str) -> int:
        from jax.experimental import pallas as pl

        return max(_LEAST_WIDTH, pl.next_power_of_2(self._sizes[name][-1]))

    def _operand(self, name: str, row: jax.Array, head: Any) -> jax.Array:
        """Rows of queries, keys or values: [rows, features to a power of two]."""
        _, count, heads, width = self._sizes[name]
        head, column = head // (self._heads // heads), jnp.arange(self._width(name))[None]
        at = ((self._one * count + row) * heads + head)[:, None] * width + column
        there = (row < count) & (head < heads) & (self._one < self._batch)
        return load(self._refs[name], at, there[:, None] & (column < width))

    def _term(self, name: str, row: jax.Array, key: jax.Array, head: Any) -> jax.Array:
        """A bias or mask for some rows and keys."""
        at = index(self._sizes[name], (self._one, head, row[:, None], key[None]))
        at = jnp.broadcast_to(at, (row.size, key.size))
        return load(self._refs[name], at, self._are_there(row, key, head))

    def _are_there(self, row: jax.Array, key: jax.Array, head: Any) -> jax.Array:
        return self._are_rows(row, head)[:, None] & (key < self._keys)[None]

    def _are_rows(self, row: jax.Array, head: Any) -> jax.Array:
        """Which are there: programs have powers of two of rows, heads and sequences."""
        there = (row < self._rows) & (head < self._heads) & (self._one < self._batch)
        return jnp.asarray(there)

    def _visible(self, row: jax.Array, key: jax.Array, head: Any) -> jax.Array:
        """Which keys some rows see."""
        ahead = key[None] - row[:, None]
        seen = self._are_there(row, key, head)
        left, right = self._settings.left, self._settings.right
        if right is not None:
            seen &= ahead <= right
        if left is not None:
            seen &= ahead >= -left
        for name, indices in (
            ("query_seq_lengths", row[:, None]),
            ("key_value_seq_lengths", key[None]),
        ):
            if name in self._refs:
                at = self._one + jnp.zeros_like(indices)
                seen &= indices < load(self._refs[name], at, at < self._batch)
        if "mask" in self._refs:
            seen &= self._term("mask", row, key, head).astype(bool)
        if "bias" in self._refs:
            seen &= self._term("bias", row, key, head).astype(jnp.float32) != -jnp.inf
        return seen

    def _sees(self, row: jax.Array, head: Any) -> jax.Array:
        """Which rows see a key."""
        from jax.experimental import pallas as pl

        def step(number: Any, sees: jax.Array) -> jax.Array:
            seen = self._visible(row, number * _LOOKED_AT + jnp.arange(_LOOKED_AT), head)
            return jnp.maximum(sees, jnp.max(seen.astype(jnp.int32), axis=1))

        steps = pl.cdiv(self._keys, _LOOKED_AT)
        found: jax.Array = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(row))
        return found > 0

    def _attention(self, row: jax.Array, head: Any) -> jax.Array:
        """The output of some rows, [rows, V to a power of two]."""
        from jax.experimental import pallas as pl

        query = self._operand("query", row, head)
        widest = max(self._width(name) for name in ("query", "value"))
        at_a_time = min(_MOST_KEYS, _TILE_BYTES // (widest * query.dtype.itemsize))

        def step(number: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            maximum, sums, out = carry
            key = number * at_a_time + jnp.arange(at_a_time)
            logits = self._product(query, self._operand("key", key, head), 1) * self._settings.scale
            if (cap := self._settings.soft_cap) is not None:
                logits = cap * _tanh(logits / cap)
            if "bias" in self._refs:
                logits += self._term("bias", row, key, head).astype(jnp.float32)
            seen = self._visible(row, key, head)
            logits = jnp.where(seen, logits, -jnp.inf)
            higher = jnp.maximum(maximum, jnp.max(logits, axis=1))
            finite = jnp.where(higher == -jnp.inf, 0.0, higher)
            weights, kept = jnp.exp(logits - finite[:, None]), jnp.exp(maximum - finite)
            by_any = jnp.max(seen.astype(jnp.int32), axis=0) > 0
            value = jnp.where(by_any[:, None], self._operand("value", key, head), 0)
            added = self._product(weights.astype(value.dtype), value, 0)
            return higher, sums * kept + jnp.sum(weights, axis=1), out * kept[:, None] + added

        none = jnp.full((row.size,), -jnp.inf), jnp.zeros((row.size,), jnp.float32)
        zeros = jnp.zeros((row.size, self._width("value")), jnp.float32)
        steps = pl.cdiv(self._keys, at_a_time)
        found: tuple[jax.Array, ...] = jax.lax.fori_loop(0, steps, step, (*none, zeros))
        return found[2] / found[1][:, None]

    def _product(self, one: jax.Array, other: jax.Array, dim: int) -> jax.Array:
        """Of rows with a dim of the other, in float32."""
        return jax.lax.dot_general(
            one,
            other,
            (((1,), (dim,)), ((), ())),
            precision=self._settings.precision,
            preferred_element_type=jnp.float32,
        )


def is_nan(array: jax.Array) -> jax.Array:
    """Which elements are, of any dtype."""
    return jnp.isnan(array.astype(jnp.float32))


def any_of(flags: jax.Array) -> jax.Array:
    """Whether any flag is set."""
    found = flags.astype(jnp.int32)
    while found.ndim:  # all at once is an error where JAX's mesh is explicit
        found = jnp.max(found, axis=-1)
    return found > 0


def _tanh(x: jax.Array) -> jax.Array:
    """As Triton has exponentials only."""
    return 1 - 2 / (jnp.exp(2 * x) + 1)
