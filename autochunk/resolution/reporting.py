"""What users are told, once, of an answer that could be better, and what is remembered of it."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from autochunk.errors import BudgetWarning, MissWarning, StaleWarning, StoreError, StoreWarning
from autochunk.resolution import agree, settings
from autochunk.resolution.answer import Resolution
from autochunk.resolution.layers import Layer, left_out
from autochunk.store.profiles import ProfileStore
from autochunk.text import one_line

# Of these no line tells a user where to look.
_FRAMEWORKS = frozenset({"autochunk", "jax", "haiku", "flax", "contextlib", "functools"})

_ALL_MISSED = "autochunk tune --missed"
_ALL_STALE = "autochunk tune --stale"

_reported: set[Any] = set()
_muted = contextvars.ContextVar("autochunk_muted", default=False)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, no answer is told of: programs are made that will not be run."""
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)


def report(resolution: Resolution, no_choice: bool = False) -> None:
    """Tells of an answer that came to run, and records a miss for ``autochunk tune --missed``.

    ``no_choice``: the caller named an implementation that has only one plan, so there is nothing to
    tune, and nothing is missed.
    """
    if _muted.get() or (agree.several_processes() and not agree.is_first()):
        return  # process 0 says it for all
    subject = (resolution.workload, resolution.device)
    missed, recorded = (False, False) if no_choice else _is_missed(resolution)
    if recorded and subject not in _reported:
        _reported.add(subject)
        _record_miss(resolution)
    workload, auto = resolution.workload, 'max_chunk_size_mb="auto"'
    if missed:
        by = ", predicted from other devices or versions" if resolution.prediction else ""
        text = f"{auto} found no profile for {workload.key} and uses {resolution.plan}{by}. "
        # A model of many lengths is told of one of them.
        family = (workload.family, resolution.device)
        warn_once(MissWarning, family, lambda: text + _cure_of_miss(resolution))
    elif resolution.match == "default" and resolution.profile is not None:
        text = f"{auto} uses {resolution.plan} for {workload.key}: {resolution.reason}"
        warn_once(BudgetWarning, subject, text)
    if resolution.stale:
        # An update makes all of a store's profiles stale, which is told of one of them.
        text = (
            f"{auto} uses a profile of {resolution.source} that may no longer hold: "
            f"{'; '.join(resolution.stale)}. Others of which the same is true are not told of; to "
            f"measure all such in your store again: {_ALL_STALE}; this one: {workload.tune_command}"
        )
        warn_once(StaleWarning, (resolution.stale, resolution.device), text)


def _is_missed(resolution: Resolution) -> tuple[bool, bool]:
    """Whether an answer is of nothing that was measured here; and whether it could be better."""
    if found := resolution.prediction:
        return not found.here, not found.sure
    missed = resolution.match == "default" and resolution.profile is None
    return missed, missed or resolution.match == "nearest"


def _cure_of_miss(resolution: Resolution) -> str:
    """How to tune what was missed, and all that was missed of its family, here or earlier."""
    workload, family = resolution.workload, 0
    with contextlib.suppress(StoreError):
        store = ProfileStore(settings.current().store, briefly=True)
        family = store.missed_like(resolution.device, workload)
    alone = f"To tune it on this machine: {workload.tune_command}"
    if not family:  # nor will others be remembered
        return alone
    if family == 1:
        others = "Others that differ only in sizes are counted without a warning"
        return f"{others}; to tune for all of them: {_ALL_MISSED}. {alone}"
    return (
        f"It is one of {family} workloads missed here that differ only in sizes, with one warning "
        f"for all. To tune for all of them on this machine: {_ALL_MISSED}"
    )


def _record_miss(resolution: Resolution) -> None:
    # Nothing to be done in a place where nothing can be written: the warning stands.
    with contextlib.suppress(StoreError):
        store = ProfileStore(settings.current().store, briefly=True)
        store.record_miss(resolution.device, resolution.workload)


def warn_of_layer(layer: Layer, error: Exception) -> None:
    """Says that a layer cannot be read."""
    warn_once(StoreWarning, str(error), f'"auto" goes on without {layer.name}: {error}')


def warn_of_files(layer: Layer) -> None:
    """Says which of a folder's files are left out."""
    for error in left_out(layer):
        text = f'"auto" leaves out a file of {layer.name}, and uses the others: {error}'
        warn_once(StoreWarning, str(error), text)


def warn_once(category: type[Warning], subject: Any, text: str | Callable[[], str]) -> None:
    """Gives a warning, unless one of this category and subject was given.

    A text that takes time is a function, which is called only for a warning.
    """
    if (category, subject) in _reported:
        return
    _reported.add((category, subject))
    # A version or an error in it may come from somebody else's file.
    said = one_line(text if isinstance(text, str) else text())
    warnings.warn(said, category, stacklevel=_users_level())


def _users_level() -> int:
    """How far up from its caller the user's own code is: beyond this package and what traces it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    return level


def _package(module: dict[str, Any]) -> str:
    return str(module.get("__name__")).partition(".")[0]


def forget() -> None:
    """Lets everything be told again."""
    _reported.clear()
