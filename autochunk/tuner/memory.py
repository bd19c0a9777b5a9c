"""``bench --memory``: what plans are predicted to take, and what each takes by itself.

A tune measures all plans of a workload in one process, where memory that one of them left behind,
and that the next one uses again, is not seen to be taken; and a GPU's allocator tells only of the
plan that took most. Here each has a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from autochunk.errors import ProbeError
from autochunk.plan import Plan
from autochunk.tuner.probe import Prepared, Probe
from autochunk.tuner.process import WORKER
from autochunk.workload import Workload

# glibc returns at once what was allocated in this way, so that using it again is seen. Times would
# suffer, which are not looked at.
_RETURN_ALL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_of(
    workload: Workload, plans: Iterable[Plan], *, worker_command: Sequence[str] = WORKER
) -> Iterator[tuple[Plan, Prepared]]:
    """Compiles and runs each plan in a process of its own.

    Yields:
      Each plan with what became of it; ``predicted_bytes`` and ``measured_bytes`` of its working
      memory where they are known.
    """
    for plan in plans:
        with Probe(worker_command, environment=_RETURN_ALL) as probe:
            try:
                probe.load(workload)
                prepared = probe.prepare(plan)
            except ProbeError as error:
                prepared = Prepared("crashed", str(error))
        yield plan, prepared
