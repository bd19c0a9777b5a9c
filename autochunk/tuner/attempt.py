"""What one worker does about one workload: it searches, stores what is found, and tells of it."""

from __future__ import annotations

import time

from autochunk.errors import StorageError
from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.events import (
    Awaited,
    Event,
    Failed,
    Finished,
    Measured,
    OutOfTime,
    Started,
    Subject,
)
from autochunk.tuner.outcome import Interrupted, Outcome, StorageLost
from autochunk.tuner.probe import Probe
from autochunk.tuner.search import search
from autochunk.tuner.study import Study
from autochunk.tuner.task import FEWEST_TIMED, Task

_KEPT = "; what was measured before is kept, and the same command goes on from there"


def attempt(task: Task, subject: Subject, study: Study, probe: Probe, share: float) -> bool:
    """Measures a workload as far as this worker can in its share of the time, in seconds.

    Returns whether others are still at it.
    """
    workload = subject.workload
    task.begun.add(workload)
    task.on_event(Started(*subject.place))
    finished = study.profile  # by others
    if finished:
        outcome = Outcome(finished.measurements, complete=True)
    else:
        outcome = _search(task, subject, study, probe, share)
    profile = task.keep(outcome, study, workload)
    # of what fails on one GPU, and then on another
    told = bool(outcome.failure) and workload in task.failed
    _note(task, subject, outcome)
    if not told:
        task.on_event(_ending(subject, outcome, profile))
    return outcome.awaited


def _search(task: Task, subject: Subject, study: Study, probe: Probe, share: float) -> Outcome:
    end = time.monotonic() + share
    task.build_on_earlier(study, subject.workload, probe.memory_budget_bytes)
    # Until plans are measured: a share too short for that would give nothing, however often tried.
    probe.deadline = task.deadline
    timed = sum(measurement.timed for measurement in study.measured().values())

    def tell(measurement: Measurement, done: int, total: int) -> None:
        nonlocal timed
        timed += measurement.timed
        # A worker on an accelerator takes longer to start than it may be busy when its share ends.
        if task.deadline is not None and not probe.is_accelerated and timed >= FEWEST_TIMED:
            probe.deadline = min(task.deadline, end)
        task.on_event(Measured(*subject.place, measurement, done, total))

    hints = _hints(task, subject)
    try:
        return search(
            probe,
            subject.workload,
            task.effort,
            study,
            hints=hints,
            seconds=share,
            on_measurement=tell,
        )
    except Interrupted as interruption:
        task.keep(interruption.outcome, study, subject.workload)
        raise
    except StorageLost as loss:
        profile = task.keep(loss.outcome, study, subject.workload)
        raise StorageError(f"{loss}{_KEPT if profile else ''}") from loss


def _hints(task: Task, subject: Subject) -> list[Plan]:
    """What "auto" would do now, if it knows anything."""
    known = task.known(subject.workload)
    return [known.plan] if known.match in ("exact", "predicted", "nearest") else []


def _note(task: Task, subject: Subject, outcome: Outcome) -> None:
    """Notes how far the workload has come."""
    if outcome.awaited:
        return
    if outcome.complete:
        task.finished.add(subject.workload)
    elif outcome.failure:
        task.failed.add(subject.workload)
    else:
        task.spent.add(subject.workload)


def _ending(subject: Subject, outcome: Outcome, profile: Profile | None) -> Event:
    """What is told of a workload that a worker leaves, when ``profile`` is stored of it."""
    place = subject.place
    if outcome.awaited:
        return Awaited(*place)
    if outcome.failure:
        return Failed(*place, outcome.failure + (_KEPT if profile else ""), profile)
    if outcome.complete:
        if profile is None:
            return Failed(*place, "no plan could be timed", None)
        return Finished(*place, profile)
    if profile is None or profile.complete:
        # A finished profile is an earlier tune's, which this one has not got beyond.
        return OutOfTime(*place, profile, len(outcome.measurements))
    return Finished(*place, profile)
