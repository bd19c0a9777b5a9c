"""What others do on a device: looked at, without taking it into use."""

from __future__ import annotations

import collections
import os
import time
from pathlib import Path

from autochunk import host
from autochunk.nvml import Gpu
from autochunk.watch.idle import Look

_WINDOW_SECONDS = 0.5  # over which the cores of others are counted: clocks tick every hundredth


class Eyes:
    """Looks at this machine, and at a GPU by its UUID, "" for none."""

    def __init__(self, gpu: str = "") -> None:
        self._gpu = Gpu(gpu) if gpu else None
        self._counts: collections.deque[tuple[float, float]] = collections.deque()

    def look(self) -> Look:
        """What is there to be seen now; cores from the second look on."""
        cores = self._cores()
        if self._gpu is None:
            return Look(cores, free=_share(host.available_cpu_bytes(), host.cpu_memory_bytes()))
        memory = self._gpu.memory()
        return Look(
            cores,
            self._gpu.processes(),
            self._gpu.utilization(),
            _share(*memory) if memory else None,
        )

    def _cores(self) -> float | None:
        """Cores that others had, on average of the last half second at least."""
        busy, now = host.busy_seconds(), time.monotonic()
        if busy is None:
            return None
        counts = self._counts
        counts.append((now, busy - own_seconds()))
        while len(counts) > 2 and counts[1][0] <= now - _WINDOW_SECONDS:
            counts.popleft()
        elapsed = now - counts[0][0]
        if elapsed < _WINDOW_SECONDS:
            return 0.0
        return max(0.0, (counts[-1][1] - counts[0][1]) / elapsed)


def own_seconds() -> float:
    """CPU time of this process, of its children that have ended, and of all that still run."""
    spent = os.times()
    total = spent.user + spent.system + spent.children_user + spent.children_system
    seconds, children = _processes()
    return total + sum(seconds[one] for one in _below(os.getpid(), children))


def descendants(process: int) -> list[int]:
    """Those that a process started, and that those did, which still run."""
    return _below(process, _processes()[1])


def _processes() -> tuple[dict[int, float], dict[int, list[int]]]:
    """CPU seconds of each process, its children that have ended included, and its children."""
    seconds: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        # After the name, which may have anything in it: state, parent, ... user and system time.
        fields = host.read(file).rpartition(")")[2].split()
        if len(fields) > 14:
            number = int(file.parent.name)
            children.setdefault(int(fields[1]), []).append(number)
            seconds[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds, children


def _below(process: int, children: dict[int, list[int]]) -> list[int]:
    found: list[int] = []
    waiting = list(children.get(process, ()))
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += children.get(one, ())
    return found


def _share(free: int, total: int) -> float | None:
    return free / total if total else None
