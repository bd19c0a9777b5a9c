"""Blocks of logits: where positions, lengths or segments leave some out, slices are of one block.

Plain integer arithmetic, no jax, as in ``plan``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from autochunk.plan import LogitsShape, slice_count


class BlockForm(NamedTuple):
    """How logits are cut into blocks of which some may be left out.

    Attributes:
      rows, keys: how many a block has at least.
      most: blocks along rows, and along keys, at most; None is any number.
      band: how many more keys than rows a block has, where those that its rows see are so many in
        one piece; None where rows and keys are cut alike.
    """

    rows: int
    keys: int
    most: int | None
    band: int | None = None


# n by n of causal attention compute (n + 1) / 2n of the logits. More gain little; in shorter ones
# products are less efficient.
_CAUSAL = BlockForm(256, 256, 8)
# Where few keys are seen, smaller blocks leave more out: 256 was 1.3x as fast as 384 and 512.
_WINDOW = BlockForm(256, 256, 32)
# Of packed sequences of 500 and 1000, 256 rows take 0.9-1.0 of the time of 384 with jax 0.12, and
# 1.1-1.3 of it with 0.10, whose small products are slower.
_PACKED = BlockForm(384, 256, 32)
# Where only the ends of sequences are left out, joining the parts of a row costs most.
_ENDS = BlockForm(1024, 1024, 8)
_FARTHEST = 2**30  # no key is further from a query, and sums of positions fit 32 bits


def reach_of(window: tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """How many positions to its left and right a query sees; None is all."""
    far = [None if side is None or side > _FARTHEST else side for side in window or (None, None)]
    return far[0], 0 if is_causal else far[1]


def block_form(
    reach: tuple[int | None, int | None],
    names: Collection[str],
    one_offset: bool = True,
    has_row_mask: bool = False,
) -> BlockForm | None:
    """How blocks are cut, of whose logits some are known to take no part; None if not at all.

    Args:
      reach: how many positions to its left and right a query sees; None is all.
      names: of the arrays by which blocks are known to be closed, such as "query_segment_ids".
      one_offset: whether a row has one position, whatever the batch element.
      has_row_mask: whether there is a mask of each row's own; most of these are causal.
    """
    left, right = reach
    if left is not None and right is not None:
        half = max(_WINDOW.keys, (left + right) // 2)
        form = _WINDOW._replace(rows=half, keys=half)
        return form._replace(most=None, band=left + right) if one_offset else form
    if "query_segment_ids" in names:
        return _PACKED
    if reach != (None, None) or has_row_mask:
        return _CAUSAL
    return _ENDS if names else None


def block_shape(shape: LogitsShape, form: BlockForm | None) -> LogitsShape:
    """What slicing works on: one block, where there are blocks."""
    if form is None:
        return shape

    def cut(length: int, fewest: int) -> int:
        count = max(1, length // fewest)
        return slice_count(length, count if form.most is None else min(form.most, count))

    rows = cut(shape.rows, form.rows)
    if form.band is None:
        return shape._replace(rows=rows, keys=cut(shape.keys, form.keys))
    keys = band_keys(rows, form.band, shape.keys)
    return shape if keys == shape.keys else shape._replace(rows=rows, keys=keys)


def band_keys(rows: int, band: int, keys: int) -> int:
    """How many of the keys a block of that many rows has, in one piece."""
    return min(keys, -(-(rows + band) // 8) * 8)  # matrix units work in eights
