"""How much else the machine did while something was measured on it."""

from __future__ import annotations

import os
import time

from autochunk import host

NOTABLE_CORES = 0.2
"""Less than this share of a core is what any system does by itself."""


class LoadOfOthers:
    """The CPU time that other programs had since this was made, on the cores of this process."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = host.busy_seconds(), _own_seconds(), time.monotonic()

    def cores(self) -> float | None:
        """So many cores they had on average; None where that cannot be told.

        Measuring processes count as this program's own once they have ended.
        """
        busy, elapsed = host.busy_seconds(), time.monotonic() - self._start
        if busy is None or self._busy is None or elapsed < 1:
            return None
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / elapsed)


def _own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
