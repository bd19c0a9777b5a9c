"""Cells of a grid of slices: where each lies, what is known of it, what is made of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax


class Output(NamedTuple):
    """An output of the sliced computation: its axes, whole shape and dtype.

    Parts that are joined begin as ``fill``, and are in the dtype ``joined``, if there is one, until
    they are finished.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    fill: float = 0.0
    joined: Any = None

    def unfinished(self) -> Output:
        """What holds its parts while they are joined."""
        return self if self.joined is None else self._replace(dtype=self.joined)


class Cell(NamedTuple):
    """Where one slice lies.

    Its first index along each axis, which of its elements no earlier slice had, and whether every
    row of it is known to see every key.
    """

    starts: dict[str, Any]
    fresh: dict[str, jax.Array]
    is_open: bool = False


class Cover(Protocol):
    """What is known of blocks of rows and keys: see ``Terms.block``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that it depends on; without them it is known while tracing."""
        ...

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """Whether a block is closed, and whether it is open, with the slices of those inputs.

        Without them, what is known while tracing.
        """
        ...


Parts = tuple[jax.Array, ...]
Join = Callable[[Parts, Parts], Parts]
Finish = Callable[[Cell, Parts, Sequence[Any]], Parts]


def add(old: Parts, new: Parts) -> Parts:
    """Parts that are summed."""
    return tuple(one + other for one, other in zip(old, new, strict=True))


class OfRows(NamedTuple):
    """What is known of blocks of keys, of one slice of rows."""

    cover: Cover
    starts: dict[str, Any]
    sizes: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """As the cover has them."""
        return self.cover.names

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """As the cover says."""
        return self.cover.block(self.starts | starts, self.sizes | sizes, arrays)
