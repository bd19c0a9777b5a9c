"""What a fused kernel gives for rows without a key, and where excluded values spoil it, put right.

Rows without a key give the mean of all values. Kernels multiply excluded values by a weight of
zero, and zero times infinity is NaN, in all rows that were computed together. Setting such values
to zero is a pass over all values, a sixth of the time of a short call. So the kernel is given them
as they are, and a small one (see ``in_place``) looks at what it made of them: one row of those that
are computed together tells. Only what is spoilt is computed again (``tile_call``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.in_place import can_run, in_place
from autochunk.attention.kernels.inputs import Inputs, Settings
from autochunk.attention.kernels.libraries import has_lengths
from autochunk.attention.kernels.tile_call import ROWS, TileCall, any_of, is_nan

# Of a row of queries, keys or values: small GPUs share 99 KB of memory, and three tiles must fit.
_MOST_BYTES = 512
# Programs, if rows do: more of them put more right at a time, fewer look sooner. Most rows of one.
_PROGRAMS, _MOST_ROWS = 256, 4096
# Keys of a mask of one row that each program looks at.
_MOST_MASKED = 4096
# Bytes of memory that an element of an output takes to read.
_ELEMENT_BYTES = 64


def can_mend(inputs: Inputs) -> bool:
    """Whether ``mended`` can be used here for a call."""
    row_bytes = max(array.shape[-1] * array.dtype.itemsize for array in inputs[:3])
    return row_bytes <= _MOST_BYTES and can_run(*inputs.present.values())


def mask_tells(inputs: Inputs, settings: Settings) -> bool:
    """Whether rows without a key are those of sequences of which a mask hides all keys.

    Each program then looks for itself, which saves a reduction before.
    """
    if inputs.mask is None or has_lengths(inputs) or settings[1:3] != (None, None):
        return False
    return inputs.mask.shape[1:3] == (1, 1) and inputs.mask.shape[3] <= _MOST_MASKED


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
        With ``tells`` it need not have those of which a bias hides all. None where ``mask_tells``.
      tells: whether others may be blind, too, by the bias; the output is then zero or NaN there.
      interpret: run anywhere, if slowly.
    """
    from jax.experimental import pallas as pl  # takes a moment

    batch, rows, heads, _ = out.shape
    arrays = inputs.present if blind is None else {**inputs.present, "blind": blind}
    sizes = {name: array.shape for name, array in arrays.items()}
    share = _share(out.shape, inputs.bias if tells else None)

    def kernel(indices: Sequence[Any], *refs: Any) -> None:
        named = dict(zip((*arrays, "out"), refs, strict=True))
        starts = [index * size for index, size in zip(indices, share[:3], strict=True)]

        def of(one: Any) -> TileCall:
            return TileCall(named, sizes, settings, one, tells)

        @pl.when(_is_suspect(of, share, *starts))
        def _look() -> None:
            @pl.loop(0, share.sequences)
            def _of_sequence(one: Any) -> None:
                @pl.loop(0, share.heads)
                def _of_head(head: Any) -> None:
                    of(starts[2] + one).put_right(starts[0], share.rows, starts[1] + head)

    counts = zip((rows, heads, batch), share[:3], strict=True)
    grid = tuple(pl.cdiv(count, size) for count, size in counts)
    return in_place(kernel, grid, out, *arrays.values(), interpret=interpret, num_stages=1)


class _Share(NamedTuple):
    """How many rows of how many heads of how many sequences a program has, powers of two.

    With ``of_bias`` it looks at the bias of its rows for what that hides, not at all its output.
    """

    rows: int
    heads: int
    sequences: int
    of_bias: bool = False


def _share(out: tuple[int, ...], bias: jax.Array | None) -> _Share:
    """That of an output's shape [B, T', H, V], for a bias that may hide keys."""
    from jax.experimental import pallas as pl

    batch, rows, heads, _ = out
    most = pl.next_power_of_2(pl.cdiv(batch * rows * heads, _PROGRAMS))
    most = max(ROWS, min(most, _MOST_ROWS))
    if bias is not None and bias.shape[0] == 1 < bias.shape[2]:
        sequences = min(most // ROWS, pl.next_power_of_2(batch))
        if bias.shape[3] * bias.dtype.itemsize < sequences * _ELEMENT_BYTES:
            return _Share(ROWS, 1, sequences, of_bias=True)
    count = max(ROWS, min(most, pl.next_power_of_2(rows)))
    return _Share(count, min(most // count, pl.next_power_of_2(heads)), 1)


def _is_suspect(
    of: Callable[[Any], TileCall], share: _Share, row: Any, head: Any, one: Any
) -> jax.Array:
    """Whether anything may be wrong in a program's share, which starts there.

    By first elements: of one row of those that are computed together, or of all.
    """
    many = share.rows * share.heads

    def each(step: int) -> tuple[TileCall, jax.Array, jax.Array]:
        """One row in so many."""
        number = step * jnp.arange(many * share.sequences // step)
        # No quotients by one, which Triton's lowering does not take.
        heads = head if share.heads == 1 else head + number // share.rows % share.heads
        call = of(one if share.sequences == 1 else one + number // many)
        return call, row + number % share.rows, heads

    def are_told() -> jax.Array:
        call, *rows = each(1)
        if not call.mask_tells:
            return call.are_blind(*rows)
        return of(one + jnp.arange(share.sequences)).hides_all()

    def may_be_blind() -> jax.Array:
        call, *rows = each(1)
        return call.may_be_blind(*rows)

    call, *rows = each(ROWS)
    told = any_of(are_told())
    if call.tells and not share.of_bias:
        return any_of(may_be_blind()) | told
    suspect = any_of(is_nan(call.output(*rows))) | told
    if not share.of_bias:
        return suspect
    hides = of(one).bias_hides(row + jnp.arange(ROWS), head)
    found: jax.Array = jax.lax.cond(hides, lambda: any_of(may_be_blind()), lambda: hides)
    return suspect | found
