"""What a call says of its logits beside products: which keys a row sees, what is added, dropped.

A term has small arrays with named axes. From the indices of rows and keys it says what it allows or
adds; nothing of the size of the logits is stored. It can say that a block of logits is closed (no
row sees a key: it is left out) or open (every row sees every key: nothing to exclude).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.inputs import AXES, LOGITS, Call, Inputs, head_major

# An integer hash with little bias: Wellons 2018, "Prospecting for Hash Functions". It is taken of a
# sequence that begins anywhere, in steps of the golden ratio: Steele, Lea and Flood 2014, "Fast
# Splittable Pseudorandom Number Generators".
# The hash's last step, which mixes high bits into low ones, is left out: the comparison depends on
# high ones. With one product alone, keys thousands apart were seen to be dropped together.
_HASH = ((16, 0x7FEB352D), (15, 0x846CA68B))
_GOLDEN = 0x9E3779B9

HIDING = frozenset({"bias", "mask", "query_offset"}) | {
    f"{whose}_{what}" for whose in ("query", "key_value") for what in ("seq_lengths", "segment_ids")
}
"""The arrays that may hide all keys from a row, or a key from all rows (a bias by -inf)."""


Block = tuple[Any, Any]
"""Whether a block is closed, and whether it is open: bools, traced where they depend on arrays."""


def bits_from(bits: jax.Array, key: Any) -> jax.Array:
    """A row's random bits for key number ``key``, and so for keys counted from there."""
    moved: jax.Array = bits + jnp.asarray(key, jnp.uint32) * jnp.uint32(_GOLDEN)
    return moved


class Span(NamedTuple):
    """A range of rows or keys: its first index, traced or not, and how many there are."""

    start: Any
    size: int

    @property
    def last(self) -> Any:
        """The last index."""
        return self.start + self.size - 1

    def indices(self, dtype: Any = jnp.int32) -> jax.Array:
        """All of them."""
        return jnp.asarray(self.start, dtype) + jax.lax.iota(dtype, self.size)


class Terms:
    """The terms of a slice of the logits [..., H, G, T', T], or of all of them.

    Args:
      arrays: the small arrays, head-major, by name: ``Inputs.present`` will do.
      rows, keys: which the slice has.
      call: scale, causality, window.
      leading: how many leading dims the logits have.
      covering: the names of arrays that say whether blocks are closed or open.
    """

    def __init__(
        self,
        arrays: Mapping[str, jax.Array],
        rows: Span,
        keys: Span,
        call: Call,
        leading: int,
        covering: tuple[str, ...] = (),
    ) -> None:
        self._arrays, self._rows, self._keys, self._call = arrays, rows, keys, call
        self._leading, self._covering = leading, covering

    def of(self, arrays: Mapping[str, jax.Array]) -> Terms:
        """The same slice with other arrays."""
        return Terms(arrays, self._rows, self._keys, self._call, self._leading)

    def _at(self, array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """An array of some axes, with dims of size one for those of LOGITS that it lacks."""
        lead = array.ndim - len(axes)
        own = dict(zip(axes, array.shape[lead:], strict=True))
        sizes = (own.get(axis, 1) for axis in LOGITS)
        before = array.shape[:lead] if lead else (1,) * self._leading
        return array.reshape((*before, *sizes))

    def _array(self, name: str) -> jax.Array | None:
        array = self._arrays.get(name)
        return None if array is None else self._at(array, AXES[name])

    def _positions(self) -> jax.Array:
        """Where each row stands among the keys: [..., 1, 1, T', 1]."""
        rows = self._at(self._rows.indices() + self._call.offset, ("rows",))
        offset = self._array("query_offset")
        return rows if offset is None else rows + offset

    def _key_indices(self, dtype: Any = jnp.int32) -> jax.Array:
        return self._at(self._keys.indices(dtype), ("keys",))

    def visible(self, is_open: bool = False) -> jax.Array | None:
        """Which keys a row sees, broadcast against the logits; None is all.

        In an open block only a mask that differs by row is left to apply.
        """
        parts = [] if is_open else list(self._conditions())
        mask = self._array("mask")
        if mask is not None and not (is_open and "mask" in self._covering):
            parts.append(mask)
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def _conditions(self) -> Iterator[jax.Array]:
        left, right = self._call.reach
        if (left, right) != (None, None):
            ahead = self._key_indices() - self._positions()
            if right is not None:
                yield ahead <= right
            if left is not None:
                yield ahead >= -left
        if (lengths := self._array("key_value_seq_lengths")) is not None:
            yield self._key_indices() < lengths
        if (lengths := self._array("query_seq_lengths")) is not None:
            yield self._at(self._rows.indices(), ("rows",)) < lengths
        rows, keys = self._array("query_segment_ids"), self._array("key_value_segment_ids")
        if rows is not None and keys is not None:
            yield rows == keys

    def added(self, dtype: Any) -> Iterator[jax.Array]:
        """What is added to the logits, each broadcast against them."""
        if (bias := self._array("bias")) is not None:
            yield bias.astype(dtype)
        if (slopes := self._array("alibi_slopes")) is not None:
            yield slopes.astype(dtype) * self.slope_factor(dtype)

    def slope_factor(self, dtype: Any) -> jax.Array:
        """What ``alibi_slopes`` are multiplied by: minus the distance of row and key."""
        return -jnp.abs(self._positions() - self._key_indices()).astype(dtype)

    def kept(self, dtype: Any) -> jax.Array | None:
        """Dropout's factor of each weight: 0 or 1 / (1 - rate); None is one for all.

        It depends on the row's random bits and the key's index alone.
        """
        bits = self._array("dropout_bits")
        if bits is None:
            return None
        mixed = bits_from(bits, self._key_indices(jnp.uint32))
        for shift, factor in _HASH:
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        rate = self._call.dropout_rate
        kept = mixed >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
        return jnp.where(kept, jnp.asarray(1 / (1 - rate), dtype), jnp.zeros((), dtype))

    def block(self) -> Block:
        """Whether the slice is closed, and whether it is open, as far as ``covering`` tells."""
        found = list(self._blocks())
        closed = functools.reduce(operator.or_, (one for one, _ in found))
        return closed, functools.reduce(operator.and_, (one for _, one in found))

    def _blocks(self) -> Iterator[Block]:
        rows, keys, arrays = self._rows, self._keys, self._arrays
        if self._call.reach != (None, None):
            first, last = rows.start + self._call.offset, rows.last + self._call.offset
            if (offset := arrays.get("query_offset")) is not None:
                first, last = first + jnp.min(offset), last + jnp.max(offset)
            yield reach_block(self._call, first, last, keys)
        for name, span in (("key_value_seq_lengths", keys), ("query_seq_lengths", rows)):
            if (lengths := arrays.get(name)) is not None:
                yield span.start >= jnp.max(lengths), span.last < jnp.min(lengths)
        if "query_segment_ids" in arrays:
            own, others = arrays["query_segment_ids"], arrays["key_value_segment_ids"]
            least, most = jnp.min(own, -1), jnp.max(own, -1)
            low, high = jnp.min(others, -1), jnp.max(others, -1)
            same = (least == most) & (low == high) & (least == low)
            yield jnp.all((most < low) | (high < least)), jnp.all(same)
        if "mask" in self._covering:
            yield ~jnp.any(arrays["mask"]), jnp.all(arrays["mask"])


def terms_of(inputs: Inputs, call: Call) -> Terms:
    """The terms of all logits of a call."""
    small = {name: head_major(one, AXES[name]) for name, one in inputs.terms.items()}
    rows, keys = Span(0, inputs.query.shape[-4]), Span(0, inputs.key.shape[-3])
    return Terms(small, rows, keys, call, inputs.query.ndim - 4)


def reach_block(call: Call, first: Any, last: Any, keys: Span) -> Block:
    """``Terms.block`` by causality and window alone, of rows at positions ``first`` to ``last``."""
    left, right = call.reach
    closed, is_open = False, True
    if right is not None:
        closed, is_open = (
            closed | (keys.start > last + right),
            is_open & (keys.last <= first + right),
        )
    if left is not None:
        closed, is_open = closed | (keys.last < first - left), is_open & (keys.start >= last - left)
    return closed, is_open


def covering(arrays: Mapping[str, Any], call: Call) -> tuple[str, ...]:
    """Names of the arrays that say whether whole blocks are closed or open.

    A mask is one of them if it is the same for all rows: it is then small.
    """
    names = ["query_seq_lengths", "key_value_seq_lengths"]
    names += ["query_segment_ids", "key_value_segment_ids"]
    if call.reach != (None, None):
        names.append("query_offset")
    if "mask" in arrays and arrays["mask"].shape[-2] == 1:
        names.append("mask")
    return tuple(name for name in names if name in arrays)


def may_see_nothing(inputs: Inputs, call: Call) -> bool:
    """Whether a row may be left without any key."""
    if inputs.terms.keys() & HIDING:
        return True
    (left, right), shape = call.reach, inputs.logits
    before_all = right is not None and call.offset + right < 0
    last = call.offset + shape.rows - 1
    return before_all or (left is not None and last - left > shape.keys - 1)


def excludes(inputs: Inputs, call: Call) -> bool:
    """Whether any row may be kept from seeing any key."""
    arrays = inputs.present
    return call.reach != (None, None) or "mask" in arrays or bool(covering(arrays, call))
