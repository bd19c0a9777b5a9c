"""How results of chunks that are not joined are merged: sum, mean, max, min, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from autochunk.errors import ArgumentError

Arrays = list[jax.Array]


class Reduction(Protocol):
    """Merges results, as lists of arrays, into a total."""

    def start(self, like: Sequence[Any]) -> Arrays:
        """The total of no positions; ``like`` have the results' shapes and dtypes."""

    def add(self, total: Arrays, results: Arrays, share: float) -> Arrays:
        """A total with the results of a chunk, which has a share of all positions."""

    def end(self, total: Arrays, like: Sequence[Any]) -> Arrays:
        """The results that a total stands for."""


@dataclass(frozen=True)
class _Sum:
    """A sum, or mean, in float32 at least."""

    mean: bool = False

    def start(self, like: Sequence[Any]) -> Arrays:
        return [jnp.zeros(one.shape, _wide(one.dtype)) for one in like]

    def add(self, total: Arrays, results: Arrays, share: float) -> Arrays:
        factor = share if self.mean else None
        return [
            old + (new.astype(old.dtype) if factor is None else new.astype(old.dtype) * factor)
            for old, new in zip(total, results, strict=True)
        ]

    def end(self, total: Arrays, like: Sequence[Any]) -> Arrays:
        return [one.astype(was.dtype) for one, was in zip(total, like, strict=True)]


@dataclass(frozen=True)
class _Extreme:
    """The largest, or smallest, of each element; NaN wherever one is."""

    largest: bool

    def start(self, like: Sequence[Any]) -> Arrays:
        return [jnp.full(one.shape, self._least(one.dtype), one.dtype) for one in like]

    def _least(self, dtype: Any) -> Any:
        if jnp.issubdtype(dtype, jnp.bool_):
            return not self.largest
        if jnp.issubdtype(dtype, jnp.floating):
            return -jnp.inf if self.largest else jnp.inf
        limits = jnp.iinfo(dtype)
        return limits.min if self.largest else limits.max

    def add(self, total: Arrays, results: Arrays, share: float) -> Arrays:  # noqa: ARG002
        merge = jnp.maximum if self.largest else jnp.minimum
        return [merge(old, new) for old, new in zip(total, results, strict=True)]

    def end(self, total: Arrays, like: Sequence[Any]) -> Arrays:  # noqa: ARG002
        return total


@dataclass(frozen=True)
class Merge:
    """By a function of a total and a chunk's results, both as the user has them.

    Attributes:
      initial: the total of no positions.
      merge: the function.
      results: the structure of what a chunk returns.
    """

    initial: Any
    merge: Callable[[Any, Any], Any]
    results: Any

    def start(self, like: Sequence[Any]) -> Arrays:
        """The first total, with the dtypes that merging gives it."""
        first = [jnp.asarray(one) for one in jax.tree.leaves(self.initial)]
        after = jax.eval_shape(lambda old, new: self.add(old, new, 1.0), first, list(like))
        was, now = [one.shape for one in first], [one.shape for one in after]
        if was != now:
            raise ArgumentError(
                "merge must return what has the shapes of reduce's first value, to which the next "
                f"chunk is merged; that has {was}, and merge returned {now}"
            )
        return [one.astype(then.dtype) for one, then in zip(first, after, strict=True)]

    def add(self, total: Arrays, results: Arrays, share: float) -> Arrays:  # noqa: ARG002
        """What the function returns, as a list."""
        structure: Any = jax.tree.structure(self.initial)
        merged = self.merge(
            jax.tree.unflatten(structure, total), jax.tree.unflatten(self.results, results)
        )
        if jax.tree.structure(merged) != structure:
            raise ArgumentError(
                f"merge must return what has the structure of reduce's first value, {structure}; "
                f"got {jax.tree.structure(merged)}"
            )
        pairs = zip(jax.tree.leaves(merged), total, strict=True)
        return [jnp.asarray(new, jnp.result_type(new, old)) for new, old in pairs]

    def end(self, total: Arrays, like: Sequence[Any]) -> Arrays:  # noqa: ARG002
        """The total as it is."""
        return total


NAMED: dict[str, Reduction] = {
    "sum": _Sum(),
    "mean": _Sum(mean=True),
    "max": _Extreme(largest=True),
    "min": _Extreme(largest=False),
}


def _wide(dtype: Any) -> Any:
    """A dtype in which many values can be summed."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def check_reduce(reduce: Any) -> Any:
    """A name of NAMED, a pair (first value, merge), or None.

    Raises:
      ArgumentError: it is none of these.
    """
    if reduce is None or (isinstance(reduce, str) and reduce in NAMED):
        return reduce
    if isinstance(reduce, tuple | list) and len(reduce) == 2 and callable(reduce[1]):
        return tuple(reduce)
    raise ArgumentError(
        f"reduce must be None, one of {', '.join(map(repr, NAMED))}, or a pair (first value, "
        f"merge) with merge(total, results) a function; got {reduce!r}"
    )


def check_results(reduce: Any, name: str, dtype: Any) -> None:
    """Raises ArgumentError for results that ``reduce`` cannot reduce."""
    numeric = jnp.issubdtype(dtype, jnp.number)
    allowed = {"mean": jnp.issubdtype(dtype, jnp.inexact), "sum": numeric}
    ordered = (numeric or jnp.issubdtype(dtype, jnp.bool_)) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    )
    if isinstance(reduce, str) and not allowed.get(reduce, ordered):
        kinds = {"mean": "floating-point or complex", "sum": "numeric"}.get(reduce, "real")
        raise ArgumentError(f"reduce={reduce!r} needs {kinds} results; {name} is {dtype}")
