"""What a fused kernel is given to see, and what replaces its output in rows without a key."""

from __future__ import annotations

import string

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.dense import mean_value, within_lengths
from autochunk.attention.kernels.inputs import Call, Inputs, KeyRange, along_rows
from autochunk.attention.kernels.libraries import Kernel
from autochunk.attention.kernels.terms import may_see_nothing, terms_of


class Seen:
    """Inputs without what is excluded, and which rows see no key.

    Kernels multiply what is excluded by a weight of zero, and zero times infinity is NaN. So what
    no row sees is set to zero for them, where what it spoils is not put right afterwards. What only
    some rows see must be finite.

    Attributes:
      inputs: with zeros for queries, keys and values that take no part.
      blind: rows without a key [..., H, G, T'], sizes of one broadcast; None where none can be.
      hidden: those of them that have none whatever a bias says.
    """

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self.inputs, self.blind, self.hidden, self._given = inputs, None, None, inputs
        if not may_see_nothing(inputs, call):
            return
        visible = terms_of(inputs, call).visible()
        if visible is None:
            self.hidden = jnp.zeros((1,) * (inputs.query.ndim - 1), bool)
        else:  # as ``key_range_of``, so that what both need is computed once
            self.hidden = _ends(visible) == 0
        self.blind = self.hidden
        if inputs.bias is not None:
            seen = ~jnp.isneginf(inputs.bias)
            self.blind = ~(_have_a_key(seen) if visible is None else _have_a_key(visible, seen))
        if visible is None:
            return
        keys = jnp.any(visible, axis=(-3, -2)).swapaxes(-1, -2)[..., None]
        self.inputs = inputs._replace(
            query=jnp.where(along_rows(self.blind), 0, inputs.query),
            key=jnp.where(keys, inputs.key, 0),
            value=jnp.where(keys, inputs.value, 0),
        )

    def for_output(self, kernel: Kernel, *, mends: bool) -> Inputs:
        """Inputs for the output alone: each zero that it does not need, left out, saves a pass.

        With ``mends`` what excluded values spoil is put right afterwards.
        """
        kept = {"query": self._given.query}  # of rows that see nothing, which are restored
        if kernel.selects:
            kept["key"] = self._given.key
        if mends:
            kept["value"] = self._given.value
        return self.inputs._replace(**kept)

    def restored(self, out: jax.Array) -> jax.Array:
        """A kernel's output [B, T', H * G, V] as ours: the mean of all values for blind rows."""
        if self.blind is None:
            return self.whole(out)
        out = out.reshape(self._shape)
        return self.whole(jnp.where(along_rows(self.blind), mean_value(self._given.value), out))

    def whole(self, out: jax.Array) -> jax.Array:
        """An output of any shape as [..., T', H, G, V], zero beyond rows' lengths."""
        return within_lengths(out.reshape(self._shape), self._given)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self._given.query.shape[:-1], self._given.value.shape[-1])


def key_range_of(inputs: Inputs, call: Call) -> KeyRange | None:
    """Between which keys the rows of a call see any; None if nothing is excluded."""
    visible = terms_of(inputs, call).visible()
    if visible is None or visible.shape[-1] != (keys := inputs.key.shape[-3]):
        return None
    end = _ends(visible)
    if inputs.query_segment_ids is None:
        return KeyRange(None, end)
    # The last one, as seen from the end.
    first = keys - jnp.max(jnp.where(visible, keys - _indices(visible), 0), axis=-1)
    return KeyRange(jnp.where(end == 0, 0, first), end)


def _ends(visible: jax.Array) -> jax.Array:
    """One more than the index of the last key that each row sees, or zero: [..., H, G, T']."""
    return jnp.max(jnp.where(visible, _indices(visible) + 1, 0), axis=-1)


def _indices(visible: jax.Array) -> jax.Array:
    return jnp.arange(visible.shape[-1], dtype=jnp.int32)


def _have_a_key(visible: jax.Array, *others: jax.Array) -> jax.Array:
    """Which rows [..., H, G, T'] have a key that all of [..., H, G, T', T], broadcast, allow.

    Two arrays that broadcast along different dims, combined, are as large as all logits; a product
    of the two that sums over keys is not.
    """
    for other in others:
        sizes = list(zip(visible.shape[:-1], other.shape[:-1], strict=True))
        if any(one < two for one, two in sizes) and any(one > two for one, two in sizes):
            return _product_over_keys(visible, other) > 0
        visible = visible & other
    return jnp.any(visible, axis=-1)


def _product_over_keys(one: jax.Array, other: jax.Array) -> jax.Array:
    """How many keys two boolean arrays [..., T] share; dims of size one broadcast."""
    dims = range(one.ndim - 1)
    letters = string.ascii_lowercase[: one.ndim]

    def without_ones(array: jax.Array) -> tuple[jax.Array, str]:
        ones = tuple(dim for dim in dims if array.shape[dim] == 1)
        kept = "".join(letter for dim, letter in enumerate(letters) if dim not in ones)
        return jnp.squeeze(array, ones).astype(jnp.bfloat16), kept

    (first, its), (second, theirs) = without_ones(one), without_ones(other)
    both = "".join(letter for letter in letters[:-1] if letter in its + theirs)
    count = jnp.einsum(f"{its},{theirs}->{both}", first, second, preferred_element_type=jnp.float32)
    return count.reshape(jnp.broadcast_shapes(one.shape[:-1], other.shape[:-1]))
