"""What else the machine did while something was measured on it, and what slowed it down."""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from autochunk import host
from autochunk.nvml import Gpu

NOTABLE_CORES = 0.2
"""Less than this share of a core is what any system does by itself."""

NOTABLE_SHARE = 0.1
"""Clocks that are held down for less of the time than this change no choice."""

_SAMPLE_SECONDS = 0.5


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


class GpuWatch:
    """Looks at GPUs, by their UUIDs, every now and then while the ``with`` block runs.

    The block is to take them into use, and to let go of them before it ends: others' programs are
    those that are there before and after.

    Attributes:
      programs: most programs of others that were seen on one of them.
    """

    def __init__(self, uuids: Iterable[str]) -> None:
        self._gpus = [Gpu(uuid) for uuid in uuids if uuid]
        self.programs = 0
        self._looks = 0
        self._slowed: collections.Counter[str] = collections.Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> GpuWatch:
        self._count_programs()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._count_programs()

    def slowed(self) -> dict[str, float]:
        """Why their clocks were held down, and for what share of the time that they were busy."""
        return {reason: count / self._looks for reason, count in self._slowed.most_common()}

    def _look(self) -> None:
        while self._gpus and not self._ended.wait(_SAMPLE_SECONDS):
            for gpu in self._gpus:
                if (reasons := gpu.slowed_by()) is not None:
                    self._looks += 1
                    self._slowed.update(reasons)

    def _count_programs(self) -> None:
        self.programs = max([self.programs, *(gpu.processes() or 0 for gpu in self._gpus)])
