"""What ``autochunk tune`` does about functions that are not attention, and says of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from autochunk.cli.printing import say
from autochunk.device import Device
from autochunk.plan import check_positive
from autochunk.store.profile import Effort
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.outcome import Tuned
from autochunk.workload import DType, Mode


def tune_missed_functions(
    store: ProfileStore,
    effort: Effort,
    timeout: float | None,
    memory_budget_mb: float | None,
    *,
    known_only: bool = False,
    dtypes: Sequence[DType] = (),
    modes: Sequence[Mode] = (),
    gpus: Sequence[str] = (),
    shared: bool = False,
    alone: bool = False,
) -> tuple[Tuned, float | None]:
    """Tunes functions that are not attention, which "auto" missed, in at most half of the time.

    In all of it if they are ``alone``, with nothing else to measure.

    Returns:
      What became of them, and how many seconds of the time are left; None is no limit.
    """
    from autochunk.tuner.functions.tune import Limits, tune_missed

    check_positive("timeout", timeout, "seconds")
    limit = timeout if timeout is not None else EFFORT_SETTINGS[effort].timeout
    if not store.are_missed(functions=True):
        return Tuned([], 0, 0), limit
    if shared:
        say(
            "Functions that are not attention are measured by this machine alone, and kept in its "
            "own store: their programs never leave it, so that no other machine could share in it. "
            "Each machine measures what it missed; profiles travel by `autochunk export`.",
            err=True,
        )
    start = time.monotonic()
    deadline = None if limit is None else start + limit * (1.0 if alone else 0.5)
    limits = Limits(effort, deadline, memory_budget_mb, dtypes, modes)
    tell = functools.partial(say, err=True)
    found = tune_missed(store, limits, tell, known_only=known_only, gpus=gpus)
    return found, None if limit is None else max(1.0, limit - (time.monotonic() - start))


def say_of_stale_functions(store: ProfileStore, device: Device) -> bool:
    """Tells of stale functions that this command cannot measure; whether there are any."""
    from autochunk.tuner.tune import stale_functions

    old = stale_functions(store, device)
    if old:
        again = "run the programs that call them, then `autochunk tune --missed`"
        say(f"{len(old)} calls of functions are stale or unfinished: {again}.", err=True)
    return bool(old)
