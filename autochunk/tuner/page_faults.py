"""What page faults cost attention on this machine's CPU, and which settings avoid them.

glibc hands a large buffer back to the system when it is freed, so that the next one is of fresh
pages, each of which the kernel fills with zeros at its first touch. A short attention call that is
not sliced was seen to take two to three times as long for it; slices, whose buffers are small or
stay within one program, hardly any longer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from autochunk.plan import Plan
from autochunk.store.interval import Interval, paired
from autochunk.tuner.probe import Probe
from autochunk.tuner.process import WORKER
from autochunk.workload import Workload

HEAP_KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
"""Settings of glibc's allocator with which freed buffers stay in the process."""

_WORKLOAD = Workload.parse("t=64,s=8192,h=8,k=64")
_PLAN = Plan("xla", None)
_ROUNDS = 9


def cost(
    workload: Workload = _WORKLOAD, *, rounds: int = _ROUNDS, worker_command: Sequence[str] = WORKER
) -> Interval:
    """By what fraction a call is slower here than in a process that keeps its heap.

    Args:
      workload: what is computed, not sliced.
      rounds: how often it is timed in either process.
      worker_command: starts a measuring process.

    Raises:
      ProbeError, WorkerFailure: it cannot be measured.
    """
    with Probe(worker_command) as here, Probe(worker_command, environment=HEAP_KEPT) as kept:
        probes = [here, kept]
        times: dict[Probe, list[float]] = {probe: [] for probe in probes}
        for probe in probes:
            probe.load(workload)
            probe.time([_PLAN])
        for _ in range(rounds):
            random.shuffle(probes)
            for probe in probes:
                times[probe] += probe.time([_PLAN])
        return paired(times[here], times[kept])
