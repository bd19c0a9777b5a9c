"""What ``autochunk tune`` does about functions that are not attention, and says of them."""

from __future__ import annotations

import functools
import time

from autochunk.cli.printing import say
from autochunk.device import Device
from autochunk.store.profile import Effort
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.outcome import Tuned


def tune_missed_functions(
    store: ProfileStore,
    effort: Effort,
    timeout: float | None,
    memory_budget_mb: float | None,
    known_only: bool,
) -> Tuned:
    """Tunes functions that are not attention, which "auto" missed, in at most half of the time."""
    from autochunk.tuner.functions.tune import Limits, tune_missed

    limit = timeout if timeout is not None else EFFORT_SETTINGS[effort].timeout
    deadline = None if limit is None else time.monotonic() + limit / 2
    limits = Limits(effort, deadline, memory_budget_mb)
    tell = functools.partial(say, err=True)
    return tune_missed(store, limits, tell, known_only=known_only)


def say_of_functions(store: ProfileStore, device: Device, missed: bool, stale: bool) -> bool:
    """Tells of functions that are not measured by this command; whether there are any."""
    from autochunk.tuner.tune import stale_functions

    left = store.missed_functions(device) if missed else {}
    old = stale_functions(store, device) if stale else []
    if left:
        alone = "they are measured without --storage and --devices"
        say(f"{len(left)} calls of functions were missed: {alone}.", err=True)
    if old:
        again = "run the programs that call them, then `autochunk tune --missed`"
        say(f"{len(old)} calls of functions are stale or unfinished: {again}.", err=True)
    return bool(left or old)
