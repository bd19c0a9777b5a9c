"""With time that is left: workloads whose choices are unsure are timed once more, widest first."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence

from autochunk.errors import ProbeError
from autochunk.plan import Plan
from autochunk.store.profile import Profile
from autochunk.tuner import events
from autochunk.tuner.earlier import anchor_of
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Subject
from autochunk.tuner.joint import JointRounds
from autochunk.tuner.probe import OutOfTime, Probe
from autochunk.tuner.standing import SURE, undecided
from autochunk.tuner.task import Task

SHARE_OF_TIME = 0.1
"""Of the time that a tune took so far, what it may take longer for this."""


def repeat_unsure(task: Task, subjects: Sequence[Subject], probe: Probe, seconds: float) -> None:
    """Adds joint rounds to the profiles of these workloads that are complete and not sure.

    The least sure first, each once, for so many seconds; what is measured by then is stored.
    """
    end = time.monotonic() + seconds
    probe.deadline = end if task.deadline is None else min(end, task.deadline)
    widths = {subject: _width(task.found.get(subject.workload)) for subject in subjects}
    with contextlib.suppress(OutOfTime):
        for subject in sorted(subjects, key=lambda one: widths[one], reverse=True):
            if time.monotonic() > probe.deadline:
                return
            if widths[subject] > SURE and subject.workload in task.finished:
                between = _in_question(task.found[subject.workload])
                if len(between) < 2:
                    continue
                task.on_event(events.Started(*subject.place))
                _repeat(task, subject, probe, between)
                task.on_event(events.Finished(*subject.place, task.found[subject.workload]))


def _width(profile: Profile | None) -> float:
    choice = profile.choose() if profile else None
    if choice is None:
        return 0.0
    return math.inf if choice.within is None else choice.within


def _repeat(task: Task, subject: Subject, probe: Probe, between: Sequence[Plan]) -> None:
    profile = task.found[subject.workload]
    measured = {measurement.plan: measurement for measurement in profile.measurements}
    anchor = anchor_of(profile.measurements)
    if anchor is None:
        return
    try:
        probe.load(subject.workload)
        settings = EFFORT_SETTINGS[task.effort]
        again = JointRounds(probe, settings, measured, anchor).run(between)
    except ProbeError:  # what was measured before stands
        return
    measured |= {measurement.plan: measurement for measurement in again}
    profile = profile.model_copy(update={"measurements": tuple(measured.values())})
    with task.storing:
        task.store.put(profile)
        task.found[subject.workload] = profile


def _in_question(profile: Profile) -> list[Plan]:
    """The plans that the choice is between, of those that were in all joint rounds.

    Others' rounds would not be the same ones any more.
    """
    joint = {measurement.plan: measurement.joint for measurement in profile.measurements}
    most = max(joint.values())
    timed = [measurement for measurement in profile.measurements if measurement.status == "ok"]
    return [plan for plan in undecided(timed) if joint[plan] == most]
