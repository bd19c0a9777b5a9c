"""Cells of a grid of slices: where each lies, what is known of it, how its parts are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax


class Output(NamedTuple):
    """An output of the sliced computation: its axes, whole shape and dtype.

    Joined parts begin as ``fill``. Until they are finished they have the dtype ``joined``, if there
    is one.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    fill: float = 0.0
    joined: Any = None

    def unfinished(self) -> Output:
        """The output as it is while its parts are joined."""
        return self if self.joined is None else self._replace(dtype=self.joined)


class Cell(NamedTuple):
    """Where one slice lies.

    Its first index along each axis (``starts``), which of its elements no earlier slice had
    (``fresh``), and whether every row of it is known to see every key (``is_open``).
    """

    starts: dict[str, Any]
    fresh: dict[str, jax.Array]
    is_open: bool = False


class Cover(Protocol):
    """What is known of blocks of rows and keys: see ``Terms.block``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that it depends on; if there are none, it is known while tracing."""
        ...

    def block(
        self, starts: dict[str, Any], sizes: dict[str, int], arrays: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """Whether a block is closed, and whether it is open, given the slices of those inputs.

        Given no slices, only what is known while tracing.
        """
        ...


Parts = tuple[jax.Array, ...]
Join = Callable[[Parts, Parts], Parts]
Finish = Callable[[Cell, Parts, Sequence[Any]], Parts]


def add(old: Parts, new: Parts) -> Parts:
    """Sums the parts."""
    return tuple(one + other for one, other in zip(old, new, strict=True))


class OfRows(NamedTuple):
    """What is known of the blocks of keys for one slice of rows."""

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
