"""Sizes of chunks that are worth a look, from large to small."""

from __future__ import annotations

import itertools


def sizes_below(length: int, step: int) -> list[int]:
    """Sizes below a length: powers of two, a factor of ``step`` apart, and divisors of the length.

    Before each power comes the largest divisor below twice that power: it leaves no smaller chunk.
    """
    sizes = []
    top = (length - 1).bit_length() - 1
    for exponent in range(top, -1, -(step.bit_length() - 1)):
        low = 1 << exponent
        divisors = (n for n in range(min(2 * low, length) - 1, low, -1) if length % n == 0)
        sizes += [*itertools.islice(divisors, 1), low]
    return sizes
