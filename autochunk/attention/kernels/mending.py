"""What a fused kernel gives for rows without a key, and where excluded values spoil it, put right.

Rows without a key give the mean of all values. Kernels multiply excluded values by a weight of
zero, and zero times infinity is NaN, in all rows that were computed together. Setting such values
to zero is a pass over all values, a sixth of the time of a short call. So the kernel is given them
as they are, and a small one (see ``in_place``) looks at what it made of them: one row of those that
are computed together tells. Only what is spoilt is computed again, as in Dao 2023,
"FlashAttention-2", https://arxiv.org/abs/2307.08691, without what no row of a tile sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.in_place import STEP, can_run, in_place, index, load, store, total
from autochunk.attention.kernels.inputs import Inputs, Settings
from autochunk.attention.kernels.libraries import has_lengths

# Rows of a tile: no more than any kernel computes together (64, a warpgroup's).
_ROWS = 32
# Of keys of a tile, and of a row of queries, keys or values. Small GPUs share 99 KB of memory:
# three tiles fit.
_TILE_BYTES, _MOST_BYTES = 2**14, 512
_MOST_KEYS = 64
# Keys that are looked at, at a time, for one that is seen.
_LOOKED_AT = 128
# Programs, if rows do: more of them put more right at a time, fewer look sooner. Most rows of one.
_PROGRAMS, _MOST_ROWS = 512, 4096
# Keys of a mask of one row that each program looks at.
_MOST_MASKED = 4096
_LEAST_WIDTH = 16  # that Triton multiplies


def can_mend(inputs: Inputs) -> bool:
    """Whether ``mended`` can be used here for a call."""
    return _row_bytes(inputs) <= _MOST_BYTES and can_run(*inputs.present.values())


def mask_tells(inputs: Inputs, settings: Settings) -> bool:
    """Whether rows without a key are those of sequences of which a mask hides all keys.

    Each program then looks for itself, which saves a reduction before.
    """
    if inputs.mask is None or has_lengths(inputs) or settings[1:3] != (None, None):
        return False
    return inputs.mask.shape[1:3] == (1, 1) and inputs.mask.shape[3] <= _MOST_MASKED


def _row_bytes(inputs: Inputs) -> int:
    return max(array.shape[-1] * array.dtype.itemsize for array in inputs[:3])


def mended(
    out: jax.Array,
    inputs: Inputs,
    settings: Settings,
    blind: jax.Array | None,
    *,
    tells: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """A kernel's output [B, T', H, V] with what is spoilt computed again.

    Args:
      out: which is written to.
      inputs: what the kernel was given, with values as they are; the mask may be of bytes.
      settings: with which.
      blind: which rows have no key, [B or 1, H or 1, T' or 1]; these get the mean of all values.
        None where ``mask_tells``.
      tells: whether others may be blind, too, by the bias; the output is then zero or NaN there.
      interpret: run anywhere, if slowly.
    """
    from jax.experimental import pallas as pl  # takes a moment

    batch, rows, heads, _ = out.shape
    arrays = inputs.present if blind is None else {**inputs.present, "blind": blind}
    sizes = {name: array.shape for name, array in arrays.items()}
    # Powers of two: rows of a program, those of one head, and heads.
    share = pl.next_power_of_2(pl.cdiv(batch * rows * heads, _PROGRAMS))
    share = max(_ROWS, min(share, _MOST_ROWS))
    count = max(_ROWS, min(share, pl.next_power_of_2(rows)))
    of_heads = min(share // count, pl.next_power_of_2(heads))

    def kernel(indices: Sequence[Any], *refs: Any) -> None:
        some, group, one = indices
        first, head = some * count, group * of_heads
        named = dict(zip((*arrays, "out"), refs, strict=True))
        call = _Call(named, sizes, settings, one, tells)

        @pl.when(call.is_suspect(first, count, head, of_heads))
        def _look() -> None:
            def of_head(number: Any, _: Any) -> int:
                call.put_right(first, count, head + number)
                return 0

            jax.lax.fori_loop(0, of_heads, of_head, 0)

    grid = (pl.cdiv(rows, count), pl.cdiv(heads, of_heads), batch)
    return in_place(kernel, grid, out, *arrays.values(), interpret=interpret, num_stages=1)


class _Call:
    """The call of one sequence, as a program of the kernel sees it."""

    def __init__(
        self,
        refs: Mapping[str, Any],
        sizes: Mapping[str, tuple[int, ...]],
        settings: Settings,
        one: Any,
        tells: bool,
    ) -> None:
        self._refs, self._sizes, self._settings = refs, sizes, settings
        self._one, self._tells = one, tells
        _, self._rows, self._heads, _ = sizes["query"]
        self._keys = sizes["key"][1]
        self._sees_none = None if "blind" in refs else self._hides_all()

    def is_suspect(self, first: Any, count: int, head: Any, of_heads: int) -> jax.Array:
        """Whether anything may be wrong in some rows of some heads: by their first elements."""

        def each(step: int) -> tuple[jax.Array, jax.Array]:
            number = step * jnp.arange(of_heads * count // step)
            return first + number % count, head + number // count

        blind = self._are_blind(*each(1))
        if self._tells:
            return _any(blind | self._may_be_blind(*each(1)))
        return _any(blind) | _any(_is_nan(self._output(*each(_ROWS))))

    def put_right(self, first: Any, count: int, head: Any) -> None:
        """Does so for some rows of a head."""
        mean = self._mean(head)

        def tile(number: Any, _: Any) -> int:
            self._put_tile_right(first + number * _ROWS + jnp.arange(_ROWS), head, mean)
            return 0

        jax.lax.fori_loop(0, count // _ROWS, tile, 0)

    def _put_tile_right(self, row: jax.Array, head: Any, mean: jax.Array) -> None:
        from jax.experimental import pallas as pl

        blind, spoilt = self._are_blind(row, head), _is_nan(self._output(row, head))
        at, there = self._at_output(row, head)

        def write(new: jax.Array, rows: jax.Array) -> None:
            store(self._refs["out"], at, new.astype(self._refs["out"].dtype), there & rows[:, None])

        @pl.when(_any(blind))
        def _put_means() -> None:
            write(jnp.broadcast_to(mean, at.shape), blind)

        suspect = _any(spoilt & ~blind[:, None])
        if self._tells:
            suspect |= _any(self._may_be_blind(row, head) & ~blind)

        @pl.when(suspect)
        def _compute() -> None:
            sees = self._sees(row, head) if self._tells else ~blind
            write(jnp.broadcast_to(mean, at.shape), ~sees)

            @pl.when(_any(spoilt & sees[:, None]))
            def _anew() -> None:
                write(self._attention(row, head), sees)

    def _mean(self, head: Any) -> jax.Array:
        """Of all values: [1, V], to a power of two."""

        def some(first: Any) -> jax.Array:
            return self._operand("value", first + jnp.arange(STEP), head)

        return total(some, self._keys, self._width("value")) / self._keys

    def _hides_all(self) -> jax.Array:
        """Whether the sequence's mask, of one row, shows no key."""
        from jax.experimental import pallas as pl

        key = jnp.arange(pl.next_power_of_2(self._keys))
        at = index(self._sizes["mask"], (self._one, 0, 0, key))
        shown = load(self._refs["mask"], jnp.broadcast_to(at, key.shape), key < self._keys)
        return ~_any(shown.astype(bool))

    def _are_blind(self, row: jax.Array, head: Any) -> jax.Array:
        """Which rows are told to have no key."""
        there = self._are_rows(row, head)
        if self._sees_none is not None:
            return there & self._sees_none
        at = jnp.zeros_like(row) + index(self._sizes["blind"], (self._one, head, row))
        return load(self._refs["blind"], at, there)

    def _may_be_blind(self, row: jax.Array, head: Any) -> jax.Array:
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

    def _output(self, row: jax.Array, head: Any) -> jax.Array:
        return load(self._refs["out"], *self._at_output(row, head))

    def _width(self, name: str) -> int:
        from jax.experimental import pallas as pl

        return max(_LEAST_WIDTH, pl.next_power_of_2(self._sizes[name][-1]))

    def _operand(self, name: str, row: jax.Array, head: Any) -> jax.Array:
        """Rows of queries, keys or values: [rows, features to a power of two]."""
        _, count, heads, width = self._sizes[name]
        head, column = head // (self._heads // heads), jnp.arange(self._width(name))[None]
        at = ((self._one * count + row) * heads + head)[:, None] * width + column
        return load(
            self._refs[name], at, ((row < count) & (head < heads))[:, None] & (column < width)
        )

    def _term(self, name: str, row: jax.Array, key: jax.Array, head: Any) -> jax.Array:
        """A bias or mask for some rows and keys."""
        at = index(self._sizes[name], (self._one, head, row[:, None], key[None]))
        at = jnp.broadcast_to(at, (row.size, key.size))
        return load(self._refs[name], at, self._are_there(row, key, head))

    def _are_there(self, row: jax.Array, key: jax.Array, head: Any) -> jax.Array:
        return self._are_rows(row, head)[:, None] & (key < self._keys)[None]

    def _are_rows(self, row: jax.Array, head: Any) -> jax.Array:
        """Which are there: programs have powers of two of rows and heads."""
        there: jax.Array = (row < self._rows) & (head < self._heads)
        return there

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
                seen &= indices < load(self._refs[name], at, at >= 0)
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


def _is_nan(array: jax.Array) -> jax.Array:
    return jnp.isnan(array.astype(jnp.float32))


def _any(flags: jax.Array) -> jax.Array:
    found = flags.astype(jnp.int32)
    while found.ndim:  # all at once is an error where JAX's mesh is explicit
        found = jnp.max(found, axis=-1)
    return found > 0


def _tanh(x: jax.Array) -> jax.Array:
    """As Triton has exponentials only."""
    return 1 - 2 / (jnp.exp(2 * x) + 1)
