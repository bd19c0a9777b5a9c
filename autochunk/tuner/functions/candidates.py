"""The sizes of chunks that a function may be measured in, and which of them are looked at first.

They lie on lines, each from the whole call to ever smaller chunks: along one axis alone, and along
all together in about as many chunks. What is coarse is a factor of four apart and comes first, from
the middle of each line, so that the whole range is seen however soon the time ends; then come the
neighbours of what is best, in whichever direction, and down to whatever size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from autochunk.chunks.ladder import sizes_below

Sizes = tuple[int, ...]
"""Of a chunk along each axis; ``lengths`` is the whole call."""

_COARSE = 4
_MOST = 60


class Candidates:
    """Those of one function.

    Attributes:
      whole: the call as it is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        most_chunks: int,
        only: Iterable[Sequence[int]] | None = None,
    ) -> None:
        """``only`` are the sizes of which there are programs, where there are not of all."""
        self.whole: Sizes = tuple(lengths)
        self._most_chunks = most_chunks
        self._only = None if only is None else {tuple(one) for one in only}
        self._ladders = [[length, *sizes_below(length, 2)] for length in lengths]

    def coarse(self) -> list[Sizes]:
        """A few over the whole range, without the whole call."""
        if self._only is not None:
            return _from_the_middle([sorted(self._only, key=math.prod, reverse=True)])
        powers = [[size for size in ladder[1:] if _is_power(size)] for ladder in self._ladders]
        return self._on_lines([ladder[:: _COARSE // 2] for ladder in powers])

    def fine(self) -> list[Sizes]:
        """All on the lines, without the whole call."""
        return self._on_lines([ladder[1:] for ladder in self._ladders])

    def neighbours(self, sizes: Sizes) -> list[Sizes]:
        """The next larger and smaller ones, along each axis and along all."""
        moves = filter(_is_step, itertools.product((-1, 0, 1), repeat=len(sizes)))
        found = [tuple(map(_next, self._ladders, sizes, move)) for move in moves]
        several = [one for one in found if one not in (self.whole, sizes)]
        return [one for one in dict.fromkeys(several) if self._is_there(one)]

    def larger(self, sizes: Sizes, others: Iterable[Sizes]) -> list[Sizes]:
        """Of others those that chunk the same axes, none of them smaller, the nearest first."""
        found = [one for one in others if one != sizes and self._contains(one, sizes)]
        return sorted(found, key=math.prod)

    def _contains(self, outer: Sizes, inner: Sizes) -> bool:
        alike = all(
            (one == length) == (other == length)
            for one, other, length in zip(outer, inner, self.whole, strict=True)
        )
        return alike and all(one >= other for one, other in zip(outer, inner, strict=True))

    def _on_lines(self, ladders: Sequence[Sequence[int]]) -> list[Sizes]:
        whole, count = self.whole, len(self.whole)
        lines: list[list[Sizes]] = [
            [(*whole[:axis], size, *whole[axis + 1 :]) for size in ladder]
            for axis, ladder in enumerate(ladders)
        ]
        if count > 1:
            lines.append(list(zip(*ladders, strict=False)))
        return _from_the_middle([list(filter(self._is_possible, line)) for line in lines])[:_MOST]

    def _is_possible(self, sizes: Sizes) -> bool:
        chunks = math.prod(-(-one // size) for one, size in zip(self.whole, sizes, strict=True))
        return chunks <= self._most_chunks and self._is_there(sizes)

    def _is_there(self, sizes: Sizes) -> bool:
        return self._only is None or sizes in self._only


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


def _is_step(move: Sequence[int]) -> bool:
    """Whether it is along one axis, or along all of them in one direction."""
    return sum(map(abs, move)) == 1 or (len(set(move)) == 1 and any(move))


def _next(ladder: Sequence[int], size: int, step: int) -> int:
    """The size that is so many steps further down a ladder, which has an end at either side."""
    place = ladder.index(size) + step
    return ladder[min(max(place, 0), len(ladder) - 1)]


def _from_the_middle(lines: Sequence[Sequence[Sizes]]) -> list[Sizes]:
    """The middle of each line, then what is next to it on all of them, and so on."""
    ordered = []
    for line in lines:
        middle = (len(line) - 1) / 2
        ordered.append(sorted(line, key=lambda one: abs(line.index(one) - middle)))
    turns = itertools.zip_longest(*ordered)
    return list(dict.fromkeys(one for turn in turns for one in turn if one is not None))
