"""The sizes of chunks where nothing was measured.

A whole call runs as it is while its memory is a modest share of the device's, or within a budget.
Else it runs in the largest chunks, by powers of two, that keep to that. Memory is estimated from
two programs, one of the whole and one of half of each axis: a part that is always there, and one
that grows with the positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autochunk.plan import BYTES_PER_MB

# The share of a device's memory that one call may take. A model has several calls, and parameters,
# and whatever their backward passes keep. It is a share of all memory, not of what is free at the
# moment: the same program then has the same plan in every process.
SHARE_OF_MEMORY = 1 / 8
# Of the part that is always there, what a chunk may add to it: to save the last of that costs more
# time than all before.
_LITTLE = 0.25


def usual_sizes(
    lengths: Sequence[int], needed: Callable[[tuple[int, ...]], int], most: float
) -> tuple[int, ...]:
    """Sizes of chunks along each axis that should take no more than ``most`` bytes.

    If none do, little more than the part that is always there.

    Args:
      lengths: of the axes; they are the answer if the whole call fits.
      needed: the bytes that a chunk of such sizes takes; called two or three times.
      most: bytes.
    """
    whole = tuple(lengths)
    if (all_of_it := needed(whole)) <= most:
        return whole
    half = tuple(-(-length // 2) for length in lengths)
    fixed, each = _line(math.prod(half), needed(half), math.prod(whole), all_of_it)
    fits = fixed + each <= most
    if not fits:  # not even the smallest chunk, which would cost time and save nothing
        most = (1 + _LITTLE) * fixed
    sizes = whole
    while max(sizes) > 1 and fixed + each * math.prod(sizes) > most:
        sizes = _smaller(sizes)
    # the line is a guess where several axes make parts of their own
    while fits and max(sizes) > 1 and needed(sizes) > most:
        sizes = _smaller(sizes)
    return sizes


def _line(x: int, y: int, x2: int, y2: int) -> tuple[float, float]:
    """Start and slope of a line through two points, neither of them below zero."""
    slope = max(0.0, (y2 - y) / (x2 - x)) if x2 > x else 0.0
    start = y2 - slope * x2
    return (start, slope) if start >= 0 else (0.0, y2 / x2)


def _smaller(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes, with the longest one reduced to the next power of two."""
    longest = max(range(len(sizes)), key=lambda number: sizes[number])
    smaller = 1 << (sizes[longest] - 1).bit_length() - 1
    return tuple(smaller if n == longest else size for n, size in enumerate(sizes))


def most_bytes(memory_gib: int, memory_budget_mb: float | None) -> float:
    """What one call may take on a device of this memory, within a budget."""
    share = memory_gib * 2**30 * SHARE_OF_MEMORY or math.inf  # 0 is of a device that does not say
    return share if memory_budget_mb is None else min(share, memory_budget_mb * BYTES_PER_MB)
