"""Who measures what, and for how long: a lone worker, the GPUs of one machine, several machines."""

from __future__ import annotations

import collections
import contextvars
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from autochunk.errors import StorageError
from autochunk.tuner.attempt import attempt
from autochunk.tuner.events import Subject
from autochunk.tuner.probe import Probe, seconds_left
from autochunk.tuner.study import Journals, Storage, Study, worker_name
from autochunk.tuner.task import Task
from autochunk.tuner.unsure import SHARE_OF_TIME, repeat_unsure
from autochunk.workload import Workload

_POLL_SECONDS = 1.0  # between looks at what other workers have measured
# Less time than this is not enough to load a workload and measure another plan of it.
_WORTH_GOING_ON = 5.0


def on_this_machine(
    task: Task, probes: Sequence[Probe], journals: Journals, waiting: Sequence[Subject]
) -> None:
    """Measures what is waiting, with one worker or one for each GPU; then what is unsure again."""
    start = time.monotonic()
    if len(probes) > 1:
        _all_together(task, probes, journals, waiting)
    else:
        _in_turn(task, probes[0], journals, waiting)
    more = SHARE_OF_TIME * (time.monotonic() - start)

    def again(probe: Probe, number: int) -> None:
        repeat_unsure(task, waiting[number :: len(probes)], probe, more)

    on_each(probes, again)


def _in_turn(task: Task, probe: Probe, journals: Journals, waiting: Sequence[Subject]) -> None:
    """What a lone worker does: one workload after the other, each with its share of the time.

    Then once more those for which that was too short, while there is time left; but on a CPU, where
    few rounds tell little, that is for those that are unsure.
    """
    _one_after_the_other(task, probe, journals, waiting)
    rest = [one for one in waiting if one.workload in task.spent - task.finished - task.failed]
    worth_it = task.device.platform != "cpu" and seconds_left(task.deadline) > _WORTH_GOING_ON
    if rest and worth_it:
        task.spent.clear()
        _one_after_the_other(task, probe, journals, rest)


def _one_after_the_other(
    task: Task, probe: Probe, journals: Journals, waiting: Sequence[Subject]
) -> None:
    queue = collections.deque(waiting)
    while queue:
        subject = queue.popleft()
        workload, todo = subject.workload, [subject.workload, *(one.workload for one in queue)]
        if not task.takes_up(workload):
            if not task.is_over(workload):
                queue.append(subject)
            continue
        try:
            study = journals.study(workload)
            attempt(task, subject, study, probe, _share(task, workload, todo, workers=1))
        except StorageError:
            # Another tune with this store may have finished it, and thrown its journal away.
            profile = task.good_enough(workload)
            if profile is None:
                raise
            task.found[workload] = profile
        finally:
            if workload in task.finished:
                journals.throw_away(workload)


def _all_together(
    task: Task, probes: Sequence[Probe], journals: Journals, waiting: Sequence[Subject]
) -> None:
    """What the GPUs of one machine do: they share the workloads, and the plans of the last ones."""
    try:
        on_each(probes, _Sharing(task, journals.study, waiting, workers=len(probes)).work)
    finally:
        for workload in task.finished:
            journals.throw_away(workload)


def with_other_machines(
    task: Task, probes: Sequence[Probe], storage: Storage, waiting: Sequence[Subject]
) -> None:
    """What each of several machines does: the same, in a storage that all of them reach."""

    def study(workload: Workload) -> Study:
        return storage.study(task.device, workload, task.effort)

    # Machines that start together should not begin with the same workload.
    first = zlib.crc32(worker_name().encode())
    on_each(probes, _Sharing(task, study, waiting, workers=len(probes), first=first).work)


class _Sharing:
    """Several workers, each of which goes to the workload that fewest are at.

    Those that take longest come first, so that none of them is left for the end (Graham 1969,
    "Bounds on multiprocessing timing anomalies"); the order begins anew at number ``first`` plus
    the worker's own. Each has its share of the time that ``workers`` have, and the time that is
    left after all had theirs.
    """

    def __init__(
        self,
        task: Task,
        study: Callable[[Workload], Study],
        waiting: Sequence[Subject],
        *,
        workers: int,
        first: int = 0,
    ) -> None:
        self._task = task
        self._study = study
        self._subjects = {subject.workload: subject for subject in waiting}
        self._workers = workers
        self._first = first

    def work(self, probe: Probe, number: int) -> None:
        """What one worker does, until nothing is left to do or to wait for."""
        task = self._task
        spare = [one for one in self._subjects if one in task.agenda.spare]
        first = [one for one in self._subjects if one not in task.agenda.spare]
        order = [*_rotated(_longest_first(first), self._first + number), *spare]
        studies = {workload: self._study(workload) for workload in order}
        awaited: set[Workload] = set()
        while not probe.abandoned and seconds_left(task.deadline) > 0:
            studies = {one: study for one, study in studies.items() if not task.is_over(one)}
            if not studies:
                return
            workload = self._next(studies, awaited)
            if workload is None:
                time.sleep(min(_POLL_SECONDS, max(0.0, seconds_left(task.deadline))))
                continue
            if not task.takes_up(workload):
                continue
            share = _share(task, workload, self._subjects, self._workers)
            if attempt(task, self._subjects[workload], studies[workload], probe, share):
                awaited.add(workload)

    def _next(self, studies: dict[Workload, Study], awaited: set[Workload]) -> Workload | None:
        """Where a worker is needed most; not where it has to wait for others."""
        task = self._task
        workers = {workload: study.workers() for workload, study in studies.items()}

        def late(one: Workload) -> tuple[bool, bool, int, bool]:
            is_spare = one in task.agenda.spare
            return one in task.spent, is_spare, workers[one], one in task.begun

        free = (one for one in studies if one not in awaited or not workers[one])
        return min(free, key=late, default=None)


def _share(task: Task, workload: Workload, todo: Iterable[Workload], workers: int) -> float:
    """Seconds that a workload has of one of several workers: as long as each that is still to do.

    If it had its share before, as all others had then, it has all that is left. Those that are
    begun only when time is left share that, as many as it is enough for.
    """
    left, spare = seconds_left(task.deadline), task.agenda.spare
    if workload in task.spent:
        return left
    is_spare = workload in spare
    rivals = {one for one in todo if (one in spare) is is_spare and not task.is_over(one)}
    equal = left * min(1.0, workers / len((rivals - task.spent) | {workload}))
    return max(equal, min(left, task.agenda.least)) if is_spare else equal


def _longest_first(workloads: Iterable[Workload]) -> list[Workload]:
    return sorted(
        workloads, key=lambda one: (one.mode == "training", one.logits_bytes), reverse=True
    )


def _rotated(items: list[Workload], by: int) -> list[Workload]:
    """The same in turn from another one on, so that workers that start together begin apart."""
    start = by % max(1, len(items))
    return items[start:] + items[:start]


def on_each(probes: Sequence[Probe], work: Callable[[Probe, int], object]) -> None:
    """Runs ``work`` on every probe and its number, on several in threads.

    When one fails or Ctrl-C comes, the others keep what they have and stop.
    """
    if len(probes) == 1:
        work(probes[0], 0)
        return
    with ThreadPoolExecutor(len(probes)) as threads:
        running = [
            threads.submit(contextvars.copy_context().run, work, probe, number)
            for number, probe in enumerate(probes)
        ]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            for probe in probes:
                probe.abandon()
            raise
