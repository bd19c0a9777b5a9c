"""Settings for every "auto" that is resolved inside a ``with autochunk.use(...)``."""

from __future__ import annotations

import contextlib
import contextvars
import numbers
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autochunk.errors import ArgumentError
from autochunk.implementations import is_sliced
from autochunk.plan import Plan, check_implementation, check_max_chunk_size_mb, check_positive

UNSET: Any = object()
"""Not given; for settings in which None has a meaning of its own."""


@dataclass(frozen=True)
class Settings:
    """What ``use`` sets.

    None leaves a setting alone. ``plan`` answers every "auto" of attention, ``implementation``
    narrows the choice; ``chunk_size`` answers every "auto" of other functions.
    """

    plan: Plan | None = None
    implementation: str | None = None
    memory_budget_mb: float | None = None
    store: Path | None = None
    chunk_size: Any = UNSET

    def pinned(self, implementation: str | None) -> Plan | None:
        """The plan that answers a call; its limit also where that asks for other slices."""
        if self.plan is None or implementation in (None, self.plan.implementation):
            return self.plan
        if not is_sliced(implementation):
            return None
        return Plan(implementation, self.plan.max_chunk_size_mb)


_settings = contextvars.ContextVar("autochunk_settings", default=Settings())  # noqa: B039 (frozen)


def current() -> Settings:
    """The settings of the innermost ``use`` around the caller, with what it leaves alone."""
    return _settings.get()


@contextlib.contextmanager
def use(
    *,
    max_chunk_size_mb: float | None = UNSET,
    implementation: str | None = None,
    memory_budget_mb: float | None = None,
    store: str | os.PathLike[str] | None = None,
    chunk_size: int | Sequence[int | None] | None = UNSET,
) -> Iterator[None]:
    """Sets how every "auto" inside is resolved, that is, while JAX traces.

    A function compiled before keeps its plan.

    Args:
      max_chunk_size_mb: answers "auto" with this limit (MB of 10^6 bytes, or None to never slice),
        whatever the profiles say.
      implementation: leaves "auto" only this one to choose; with ``max_chunk_size_mb``, what runs
        (``"xla"`` if left out).
      memory_budget_mb: "auto" chooses among plans whose measured working memory fits (10^6 bytes).
        Where none does, what takes least runs, and a BudgetWarning says how much that is.
      store: a profile store's file, in place of the user's own.
      chunk_size: answers the "auto" of ``autochunk.chunked``: most positions at once, None for all,
        or a tuple of these.

    Raises:
      ArgumentError: a value is not usable.

    Example:
      >>> import jax
      >>> import autochunk
      >>> x = jax.numpy.ones((2, 64, 4, 8))
      >>> with autochunk.use(max_chunk_size_mb=0.01):
      ...     attend = jax.jit(autochunk.dot_product_attention).lower(x, x, x).compile()
      >>> attend(x, x, x).shape
      (2, 64, 4, 8)
    """
    changes: dict[str, Any] = {
        "implementation": check_implementation(implementation),
        "memory_budget_mb": check_positive("memory_budget_mb", memory_budget_mb, "MB"),
        "store": None if store is None else Path(store),
    }
    if max_chunk_size_mb is not UNSET:
        limit = check_max_chunk_size_mb(max_chunk_size_mb)
        if limit == "auto":
            raise ArgumentError(
                'use(max_chunk_size_mb=...) answers "auto", so it must be a number or None; '
                'got "auto"'
            )
        outer = current().implementation
        slices = outer if outer is not None and is_sliced(outer) else "xla"
        changes["plan"] = Plan(implementation or slices, limit)
    given = {name: value for name, value in changes.items() if value is not None}
    if chunk_size is not UNSET:
        changed = check_chunk_size(chunk_size)
        if changed == "auto":
            raise ArgumentError(
                'use(chunk_size=...) answers "auto", so it must be a number, a tuple or None; got '
                '"auto"'
            )
        given["chunk_size"] = changed
    token = _settings.set(replace(current(), **given))
    try:
        yield
    finally:
        _settings.reset(token)


def check_chunk_size(value: Any) -> Any:
    """An int, None, "auto", or a tuple of ints and None.

    Raises:
      ArgumentError: it is none of these.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, tuple | list) and value:
        if all(one is None or _is_size(one) for one in value):
            return tuple(None if one is None else int(one) for one in value)
    elif _is_size(value):
        return int(value)
    raise ArgumentError(
        "chunk_size must be a whole number of positions from 1 on, None (all at once), a tuple of "
        f'these with one for each chunked axis, or "auto"; got {value!r}'
    )


def _is_size(value: Any) -> bool:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_whole and int(value) >= 1
