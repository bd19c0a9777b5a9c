"""``tune``.

The loop over workloads. Decides what needs measuring, shares out the time, stores what is found.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import autochunk
from autochunk.device import Device
from autochunk.errors import ArgumentError, ProbeError, StorageError
from autochunk.plan import BYTES_PER_MB, Plan, check_positive
from autochunk.store.database import ProfileStore
from autochunk.store.profile import EFFORTS, SCHEMA_VERSION, Effort, Measurement, Profile, utc_now
from autochunk.store.resolve import resolve, use
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.presets import PRESETS, standard_dtypes
from autochunk.tuner.probe import WORKER, OutOfTime, Probe, seconds_left
from autochunk.tuner.search import Interrupted, Outcome, search
from autochunk.tuner.study import Storage, Study, open_private, study_name, worker_name
from autochunk.workload import MODES, DType, Mode, Workload, of_kind, workloads_of

_POLL_SECONDS = 1.0  # between looks at what other workers have measured


@dataclass(frozen=True)
class Event:
    """Progress of a tune.

    ``kind`` is "device" (``device`` is known), "start" (of ``workload``), "measured" (one plan,
    ``done`` of ``total``), "finished" (``profile`` is stored; not ``complete`` if time ran out),
    "awaited" (other workers of a shared storage are still at it), "skipped" (``profile`` was there
    already), "failed" (``detail`` says why; ``profile`` has what was measured before, if anything)
    or "out_of_time" (before there was more than is stored). ``number`` of ``count`` workloads. With
    time to spare, several workers may come back to a workload that was told of as unfinished.
    """

    kind: Literal[
        "device", "start", "measured", "finished", "awaited", "skipped", "failed", "out_of_time"
    ]
    workload: Workload | None = None
    number: int = 0
    count: int = 0
    device: Device | None = None
    measurement: Measurement | None = None
    done: int = 0
    total: int = 0
    profile: Profile | None = None
    detail: str = ""


def tune(
    workloads: Sequence[Workload] | Callable[[Device], Sequence[Workload]] | None = None,
    *,
    effort: Effort = "standard",
    timeout: float | None = None,
    force: bool = False,
    store: ProfileStore | None = None,
    memory_budget_mb: float | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
    worker_command: Sequence[str] = WORKER,
    gpus: Sequence[str] = (),
    storage: str | None = None,
) -> list[Profile]:
    """Measures workloads on this machine's default device, or on several GPUs at once, and stores a
    profile of each.

    Args:
      workloads: what to measure, or a function that says so for the device that the measuring
        processes found; None is what "auto" has missed here, then the standard set.
      effort: "quick", "standard" or "thorough". A workload with a complete, fresh profile of at
        least this effort is not measured again.
      timeout: seconds for all of it; None is the effort's own limit. What is measured by then is
        stored and marked incomplete.
      force: measures anew whatever is stored.
      store: where profiles go; None is the user's store.
      memory_budget_mb: most working memory that a measurement may take (10^6 bytes); None is most
        of what is free. What does not fit is not measured later, with more, unless by force.
      on_event: told of progress.
      worker_command: starts a measuring process.
      gpus: GPUs to measure on, as ``CUDA_VISIBLE_DEVICES`` names them; they share the workloads,
        and the plans of the last ones. They must be alike.
      storage: where to tune together with other machines: a database's URL or the path of a journal
        file that all of them reach. Each workload is shared among the machines whose device is the
        same, and every one of them stores all profiles.

    Returns:
      A profile for each workload that has one now, in order.

    Raises:
      ArgumentError: an argument is not usable.
      StoreError: the store cannot be written; found out before anything is measured.
      StorageError: the storage cannot be reached.
      ProbeError: no measuring process can be started, or the GPUs are not alike, or jax finds none.
    """
    _check(effort, timeout, memory_budget_mb)
    if storage is not None and force:
        raise ArgumentError(
            "what a shared storage has measured cannot be measured again in it: name a new "
            "storage, or leave out force"
        )
    shared = None if storage is None else Storage(storage)
    store = store or ProfileStore()
    store.check_writable()
    limit = timeout if timeout is not None else EFFORT_SETTINGS[effort].timeout
    deadline = None if limit is None else time.monotonic() + limit
    with _probes(worker_command, gpus, effort, memory_budget_mb, deadline) as probes:
        device = _same_device(probes, gpus)
        on_event(Event("device", device=device))
        if workloads is None:
            workloads = standard_workloads(store, device, effort)
        todo = list(dict.fromkeys(workloads(device) if callable(workloads) else workloads))
        stored = (
            {} if force else {w: p for w in todo if (p := _good_enough(store, device, w, effort))}
        )
        events = [
            Event("skipped", workload, number, len(todo), device, profile=stored.get(workload))
            for number, workload in enumerate(todo, 1)
        ]
        for event in events:
            if event.profile is not None:
                on_event(event)
        # Skipping costs nothing, so the time is shared out among those that need measuring.
        waiting = [event for event in events if event.profile is None]
        if shared is not None:
            _contribute(shared, stored, effort)
        task = _Task(
            effort, force, store, device, memory_budget_mb, deadline, on_event, found=stored
        )
        _measure(task, probes, shared, waiting)
    return [task.found[workload] for workload in todo if workload in task.found]


@contextlib.contextmanager
def _probes(
    command: Sequence[str],
    gpus: Sequence[str],
    effort: Effort,
    memory_budget_mb: float | None,
    deadline: float | None,
) -> Iterator[list[Probe]]:
    """A probe for each GPU, or one for the default device; ended on leaving."""
    budget = None if memory_budget_mb is None else int(memory_budget_mb * BYTES_PER_MB)
    with contextlib.ExitStack() as stack:
        probes = []
        for environment in [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]:
            probe = Probe(
                command,
                memory_budget_bytes=budget,
                seconds_per_request=EFFORT_SETTINGS[effort].seconds_per_request,
                environment=environment,
            )
            probe.deadline = deadline
            probes.append(stack.enter_context(probe))
        yield probes


@dataclass(frozen=True)
class _Task:
    """What all workloads of one tune have in common, and what has become of each.

    Attributes:
      found: profiles that are stored.
      begun: some worker has been at it.
      spent: its share of the time is over; more is for it only when all others have had theirs.
      finished: nothing is left to be measured.
      failed: a worker could not go on with it, and no other one is to try.
      storing: held by whoever compares with what is stored, and stores.
    """

    effort: Effort
    force: bool
    store: ProfileStore
    device: Device
    memory_budget_mb: float | None
    deadline: float | None
    on_event: Callable[[Event], None]
    found: dict[Workload, Profile]
    begun: set[Workload] = field(default_factory=set)
    spent: set[Workload] = field(default_factory=set)
    finished: set[Workload] = field(default_factory=set)
    failed: set[Workload] = field(default_factory=set)
    storing: threading.Lock = field(default_factory=threading.Lock)


def _measure(
    task: _Task, probes: Sequence[Probe], shared: Storage | None, waiting: Sequence[Event]
) -> None:
    """Measures what is waiting, by all probes."""
    if shared is not None:
        # Machines that start together should not begin with the same workload.
        first = zlib.crc32(worker_name().encode())
        _on_each(
            probes,
            _sharer(
                task,
                len(probes),
                lambda workload: shared.study(task.device, workload, task.effort),
                waiting,
                first,
            ),
        )
    elif len(probes) > 1:
        _all_together(task, probes, waiting)
    else:
        _in_turn(task, probes[0], waiting)
    for event in waiting:
        if event.workload not in task.begun:
            task.on_event(replace(event, kind="out_of_time"))


def _in_turn(task: _Task, probe: Probe, waiting: Sequence[Event]) -> None:
    """What a lone probe does: one workload after the other, each with its share of the time."""
    for number, event in enumerate(waiting):
        workload = event.workload
        assert workload is not None
        try:
            _tune_one(
                probe,
                _private_study(task, workload),
                task,
                event,
                seconds_left(task.deadline) / (len(waiting) - number),
            )
        except StorageError:
            profile = _good_enough(task.store, task.device, workload, task.effort)
            # otherwise another tune with this store has finished the workload, and thrown its
            # journal away
            if profile is None:
                raise
            task.found[workload] = profile
        finally:
            _tidy(task, workload)


def _all_together(task: _Task, probes: Sequence[Probe], waiting: Sequence[Event]) -> None:
    """What the GPUs of one machine do: they share the workloads, and the plans of the last ones."""
    try:
        _on_each(
            probes, _sharer(task, len(probes), functools.partial(_private_study, task), waiting)
        )
    finally:
        for workload in task.finished:
            _tidy(task, workload)


def _journal(task: _Task, workload: Workload) -> Path:
    """The journal file of a workload, beside the store.

    What is measured by force has one of its own, so that it goes on there when it was interrupted;
    and so has each budget, for what does not fit one may fit another.
    """
    budget = "" if task.memory_budget_mb is None else f" | {task.memory_budget_mb:g} MB"
    name = (
        study_name(task.device, workload, task.effort)
        + budget
        + (" | forced" if task.force else "")
    )
    return (
        task.store.path.with_name(f"{task.store.path.name}.unfinished")
        / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.journal"
    )


def _private_study(task: _Task, workload: Workload) -> Study:
    return open_private(_journal(task, workload)).study(task.device, workload, task.effort)


def _tidy(task: _Task, workload: Workload) -> None:
    """Throws a finished workload's journal away, unless another process is at it.

    If no plan could be timed too: why that is may pass.
    """
    journal = _journal(task, workload)
    if (
        workload in task.finished
        and journal.exists()
        and not _private_study(task, workload).workers()
    ):
        for file in (journal, journal.with_name(journal.name + ".lock")):
            with contextlib.suppress(OSError):
                file.unlink()


def _sharer(
    task: _Task,
    probes: int,
    study_of: Callable[[Workload], Study],
    waiting: Sequence[Event],
    first: int = 0,
) -> Callable[[Probe, int], None]:
    """What each of several workers does.

    Goes to the workload that fewest are at, until none is left to do or to wait for.

    Those that take longest come first, so that none of them is left for the end (Graham 1969,
    "Bounds on multiprocessing timing anomalies"); the order begins anew at number ``first`` plus
    the worker's own. Each has its share of the time that ``probes`` workers have, and the time that
    is left after all had theirs.
    """
    todo = {event.workload: event for event in waiting if event.workload is not None}
    longest_first = sorted(
        todo,
        key=lambda workload: (workload.mode == "training", workload.logits_bytes),
        reverse=True,
    )

    def measure(probe: Probe, number: int) -> None:
        studies = {
            workload: study_of(workload) for workload in _rotated(longest_first, first + number)
        }
        awaited: set[Workload] = set()
        while not probe.abandoned and seconds_left(task.deadline) > 0:
            studies = {
                workload: study
                for workload, study in studies.items()
                if workload not in task.finished | task.failed
            }
            if not studies:
                return
            workers = {workload: study.workers() for workload, study in studies.items()}
            open_to_us = [
                workload for workload in studies if workload not in awaited or not workers[workload]
            ]
            if not open_to_us:
                time.sleep(min(_POLL_SECONDS, max(0.0, seconds_left(task.deadline))))
                continue
            workload = min(
                open_to_us,
                key=lambda workload: (
                    workload in task.spent,
                    workers[workload],
                    workload in task.begun,
                ),
            )
            if _tune_one(
                probe, studies[workload], task, todo[workload], _share(task, workload, todo, probes)
            ):
                awaited.add(workload)

    return measure


def _share(task: _Task, workload: Workload, todo: Iterable[Workload], probes: int) -> float:
    """Seconds that a workload has of one of several probes.

    If all had their shares, those that are left.
    """
    left = seconds_left(task.deadline)
    others = set(todo) - task.spent - task.finished - task.failed - {workload}
    return left if workload in task.spent else left * min(1.0, probes / (1 + len(others)))


def _contribute(storage: Storage, stored: dict[Workload, Profile], effort: Effort) -> None:
    """Gives the other workers what this machine has measured before."""
    for workload, profile in stored.items():
        study = storage.study(profile.device, workload, effort)
        if study.profile is None:
            study.profile = profile


def _rotated(items: list[Workload], by: int) -> list[Workload]:
    """The same in turn from another one on, so that workers that start together do not begin with
    the same.
    """
    start = by % max(1, len(items))
    return items[start:] + items[:start]


def _same_device(probes: Sequence[Probe], gpus: Sequence[str]) -> Device:
    try:
        _on_each(probes, lambda probe, _: probe.connect())
    except OutOfTime:
        raise ProbeError(
            "time ran out before a measuring process was up; give it more with --timeout"
        ) from None
    devices = {probe.device.key: probe.device for probe in probes if probe.device}
    if len(devices) > 1:
        raise ProbeError(
            f"GPUs that are tuned together must be alike; these are {', '.join(devices)}. Tune "
            "each kind by itself"
        )
    (device,) = devices.values()
    if gpus and device.platform != "gpu":
        cure = 'install jax for GPUs (such as "jax[cuda13]"), or leave out --devices'
        raise ProbeError(
            f"GPUs {', '.join(gpus)} are to be tuned, and all that jax finds in the measuring "
            f"process is {device.key}; {cure}"
        )
    return device


def _on_each(probes: Sequence[Probe], measure: Callable[[Probe, int], object]) -> None:
    """Runs ``measure`` on every probe and its number, on several in threads.

    When one fails or Ctrl-C comes, the others keep what they have and stop.
    """
    if len(probes) == 1:
        measure(probes[0], 0)
        return
    with ThreadPoolExecutor(len(probes)) as threads:
        running = [
            threads.submit(contextvars.copy_context().run, measure, probe, number)
            for number, probe in enumerate(probes)
        ]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            for probe in probes:
                probe.abandon()
            raise


def standard_workloads(
    store: ProfileStore,
    device: Device,
    effort: Effort = "standard",
    dtypes: Sequence[DType] = (),
    modes: Sequence[Mode] = MODES,
) -> list[Workload]:
    """What "auto" has missed on a device, then the standard set.

    Of these dtypes and modes; without dtypes what was missed is of any, and the standard set in
    those of ``presets.standard_dtypes``.
    """
    shapes = [PRESETS[name] for name in EFFORT_SETTINGS[effort].presets]
    return [
        *of_kind(store.missed(device), dtypes, modes),
        *workloads_of(shapes, dtypes or standard_dtypes(effort, device.platform), modes),
    ]


def _check(effort: str, timeout: float | None, memory_budget_mb: float | None) -> None:
    if effort not in EFFORTS:
        raise ArgumentError(f"effort must be one of {', '.join(EFFORTS)}; got {effort!r}")
    check_positive("timeout", timeout, "seconds")
    check_positive("memory_budget_mb", memory_budget_mb, "MB")


def _good_enough(
    store: ProfileStore, device: Device, workload: Workload, effort: Effort
) -> Profile | None:
    """The stored profile, if measuring again would tell nothing new."""
    profile = store.get(device, workload)
    if profile is None or not profile.complete or profile.device.stale_reasons(device):
        return None
    return profile if EFFORTS.index(profile.effort) >= EFFORTS.index(effort) else None


def _tune_one(probe: Probe, study: Study, task: _Task, event: Event, share: float) -> bool:
    """Measures a workload as far as this worker can in its share of the time, in seconds.

    Returns whether others are still at it.
    """
    workload = event.workload
    assert workload is not None
    task.begun.add(workload)
    task.on_event(replace(event, kind="start"))
    finished = study.profile  # by others
    outcome = (
        Outcome(finished.measurements, complete=True)
        if finished
        else _search(probe, study, task, event, share)
    )
    profile = _keep(outcome, study, workload, task)
    # of what fails on one GPU, and then on another
    told = bool(outcome.failure) and workload in task.failed
    if not outcome.awaited:
        (task.finished if outcome.complete else task.failed if outcome.failure else task.spent).add(
            workload
        )
    if not told:
        task.on_event(_ending(event, outcome, profile))
    return outcome.awaited


def _search(probe: Probe, study: Study, task: _Task, event: Event, share: float) -> Outcome:
    workload = event.workload
    assert workload is not None
    end = time.monotonic() + share
    # until a plan is measured: a share too short for one would give nothing, however often it is
    # tried
    probe.deadline = task.deadline

    def tell(measurement: Measurement, done: int, total: int) -> None:
        probe.deadline = None if task.deadline is None else min(task.deadline, end)
        task.on_event(
            replace(event, kind="measured", measurement=measurement, done=done, total=total)
        )

    try:
        return search(
            probe, workload, task.effort, study, hints=_hints(workload, task), on_measurement=tell
        )
    except Interrupted as interruption:
        _keep(interruption.outcome, study, workload, task)
        raise


def _ending(event: Event, outcome: Outcome, profile: Profile | None) -> Event:
    """What is told of a workload that a worker leaves, when ``profile`` is stored of it."""
    if outcome.awaited:
        return replace(event, kind="awaited")
    if outcome.failure:
        kept = (
            "; what was measured before is kept, and the same command goes on from there"
            if profile
            else ""
        )
        return replace(event, kind="failed", detail=outcome.failure + kept, profile=profile)
    if outcome.complete:
        return replace(
            event,
            kind="finished" if profile else "failed",
            detail="" if profile else "no plan could be timed",
            profile=profile,
        )
    # A finished profile is an earlier tune's, which this one has not got beyond.
    return replace(
        event,
        kind="out_of_time" if profile is None or profile.complete else "finished",
        profile=profile,
    )


def _keep(outcome: Outcome, study: Study, workload: Workload, task: _Task) -> Profile | None:
    """Stores what was found, unless that is nothing or less than is stored.

    Returns what is stored then, None if nothing was found.
    """
    if not any(measurement.timed for measurement in outcome.measurements):
        return None
    with task.storing:
        # by another worker, which held the joint rounds or ended at the same time
        made = study.profile if outcome.complete else None
        profile = made or _profile(outcome, workload, task)
        old = task.store.get(task.device, workload)
        if old is not None and _stays(old, profile):
            profile = old
        else:
            task.store.put(profile)
        task.found[workload] = profile
        if outcome.complete and made is None:
            study.profile = profile
    return profile


def _profile(outcome: Outcome, workload: Workload, task: _Task) -> Profile:
    return Profile(
        schema_version=SCHEMA_VERSION,
        workload=workload.key,
        device=task.device,
        measurements=outcome.measurements,
        effort=task.effort,
        complete=outcome.complete,
        created=utc_now(),
        autochunk=autochunk.__version__,
    )


def _stays(old: Profile, new: Profile) -> bool:
    """Whether what is stored tells more.

    It is finished, and the new one is not; or of two unfinished ones, it is of more effort, or has
    more plans timed.
    """
    return not new.complete and (
        old.complete or (not old.device.stale_reasons(new.device) and _extent(old) > _extent(new))
    )


def _extent(profile: Profile) -> tuple[int, int]:
    return EFFORTS.index(profile.effort), sum(
        measurement.timed for measurement in profile.measurements
    )


def _hints(workload: Workload, task: _Task) -> list[Plan]:
    """What "auto" would do now, if it knows anything."""
    with use(store=task.store.path):
        known = resolve(workload, device=task.device)
    return [known.plan] if known.match in ("exact", "nearest") else []
