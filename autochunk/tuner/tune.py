"""``tune``: finds out what needs measuring and on what, and has it measured and stored."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from autochunk import host, nvidia
from autochunk.device import Device
from autochunk.errors import ArgumentError, ProbeError
from autochunk.functions import unchanging
from autochunk.plan import BYTES_PER_MB, check_positive
from autochunk.store.profile import EFFORTS, Effort, Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner import events, sharing
from autochunk.tuner.agenda import Wishes, make_agenda
from autochunk.tuner.effort import EFFORT_SETTINGS, standard_presets
from autochunk.tuner.events import Event, Subject
from autochunk.tuner.load import NOTABLE_CORES, NOTABLE_SHARE, GpuWatch, LoadOfOthers
from autochunk.tuner.presets import PRESETS, of_kind, standard_dtypes, workloads_of
from autochunk.tuner.probe import OutOfTime, Probe
from autochunk.tuner.process import WORKER
from autochunk.tuner.study import Journals, Storage
from autochunk.tuner.task import Task
from autochunk.workload import MODES, DType, Mode, Workload


def tune(
    workloads: Sequence[Workload] | Callable[[Device], Sequence[Workload] | Wishes] | None = None,
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
    is_known: Callable[[Workload], bool] | None = None,
) -> list[Profile]:
    """Measures workloads on this machine, and stores a profile of each.

    It measures on the default device, or on several GPUs at once.

    Args:
      workloads: what to measure, or a function that says so for the device that the measuring
        processes found; None is what "auto" has missed here, and the standard set. Of what was
        missed it may name more than there is time for (``Wishes``): those that teach most are
        measured, and an event says what was left out.
      effort: "quick", "standard" or "thorough". A workload with a complete, fresh profile of at
        least this effort is not measured again; by "quick" also not one for which "auto" has such
        a profile from elsewhere, as those that ship.
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
      is_known: asked of a workload that was missed before it is begun; if so, it is not measured.
        By default, whether the profiles measured by then predict its plan within 5%.

    Returns:
      A profile for each workload that has one now, in order.

    Raises:
      ArgumentError: an argument is not usable.
      StoreError: the store cannot be written; found out before anything is measured.
      StorageError: the storage cannot be reached.
      ProbeError: no measuring process can be started, or the GPUs are not alike, or jax finds none.

    Example:
      >>> import autochunk
      >>> workload = autochunk.Workload.parse("t=16,k=8")
      >>> (profile,) = autochunk.tune([workload], effort="quick", timeout=60)
      >>> profile.workload == workload.key
      True
      >>> autochunk.resolve(workload).match
      'exact'
    """
    _check(effort, timeout, memory_budget_mb, force=force, shared=storage is not None)
    shared = None if storage is None else Storage(storage)
    store = store or ProfileStore()
    store.check_writable()
    limit = timeout if timeout is not None else EFFORT_SETTINGS[effort].timeout
    deadline = None if limit is None else time.monotonic() + limit
    others = LoadOfOthers()
    with (
        GpuWatch(_watched(gpus)) as watch,
        _probes(worker_command, gpus, effort, memory_budget_mb, deadline) as probes,
    ):
        device = _same_device(probes, gpus)
        on_event(events.DeviceFound(device))
        wishes = _wishes(workloads, store, device, effort)
        task = Task(effort, store, device, deadline, on_event, force)
        task, waiting = _planned(task, wishes, len(probes), is_known)
        if shared is not None:
            _contribute(task, shared)
            sharing.with_other_machines(task, probes, shared, waiting)
        else:
            journals = Journals(store.path, device, effort, memory_budget_mb, force)
            journals.throw_away_old()
            sharing.on_this_machine(task, probes, journals, waiting)
        for event in _not_begun(task, waiting):
            on_event(event)
        store.forget_missed(device, task.agenda.known)
    if waiting:
        for event in _disturbances(device, others, watch):
            on_event(event)
    return [task.found[workload] for workload in wishes.all if workload in task.found]


def _check(
    effort: str, timeout: float | None, memory_budget_mb: float | None, *, force: bool, shared: bool
) -> None:
    if effort not in EFFORTS:
        raise ArgumentError(f"effort must be one of {', '.join(EFFORTS)}; got {effort!r}")
    check_positive("timeout", timeout, "seconds")
    check_positive("memory_budget_mb", memory_budget_mb, "MB")
    if shared and force:
        raise ArgumentError(
            "what a shared storage has measured cannot be measured again in it: "
            "name a new storage, or leave out force"
        )


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


def _watched(gpus: Sequence[str]) -> list[str]:
    """UUIDs of the GPUs that measuring processes will use: jax's default is the first."""
    uuids = nvidia.gpu_uuids()
    return [uuids[gpu] for gpu in gpus if gpu in uuids] or list(uuids.values())[:1]


def _disturbances(
    device: Device, others: LoadOfOthers, watch: GpuWatch
) -> Iterator[events.Disturbance]:
    """What may have made the times wrong."""
    if device.platform == "cpu":
        cores = others.cores() or 0.0
        if cores > NOTABLE_CORES:
            yield events.OtherWork(cores, host.usable_cores())
    elif device.platform == "gpu":
        if watch.programs:
            yield events.SharedGpu(watch.programs)
        for reason, share in watch.slowed().items():
            if share > NOTABLE_SHARE:
                yield events.SlowedGpu(reason, share)


def _same_device(probes: Sequence[Probe], gpus: Sequence[str]) -> Device:
    """Starts all measuring processes; returns the device that they all found."""
    try:
        sharing.on_each(probes, lambda probe, _: probe.connect())
    except OutOfTime:
        raise ProbeError(
            "time ran out before a measuring process was up; give it more with --timeout"
        ) from None
    devices = {probe.device.key: probe.device for probe in probes if probe.device}
    if len(devices) > 1:
        raise ProbeError(
            f"GPUs that are tuned together must be alike; these are {', '.join(devices)}. "
            "Tune each kind by itself"
        )
    (device,) = devices.values()
    if gpus and device.platform != "gpu":
        cure = 'install jax for GPUs (such as "jax[cuda13]"), or leave out --devices'
        raise ProbeError(
            f"GPUs {', '.join(gpus)} are to be tuned, and all that jax finds in the measuring "
            f"process is {device.key}; {cure}"
        )
    return device


def _wishes(
    workloads: Sequence[Workload] | Callable[[Device], Sequence[Workload] | Wishes] | None,
    store: ProfileStore,
    device: Device,
    effort: Effort,
) -> Wishes:
    if workloads is None:
        return usual_wishes(store, device, effort)
    found = workloads(device) if callable(workloads) else workloads
    return found if isinstance(found, Wishes) else Wishes(named=found)


def usual_wishes(
    store: ProfileStore,
    device: Device,
    effort: Effort = "standard",
    dtypes: Sequence[DType] = (),
    modes: Sequence[Mode] = MODES,
) -> Wishes:
    """What "auto" has missed on a device, and the standard set; both of these dtypes and modes.

    Without dtypes what was missed is of any, and the standard set in those of
    ``presets.standard_dtypes``.
    """
    shapes = [PRESETS[name] for name in standard_presets(effort, device.platform)]
    return Wishes(
        missed=missed(store, device, dtypes, modes),
        standard=workloads_of(shapes, dtypes or standard_dtypes(effort, device.platform), modes),
    )


def missed(
    store: ProfileStore, device: Device, dtypes: Sequence[DType] = (), modes: Sequence[Mode] = MODES
) -> dict[Workload, int]:
    """What "auto" has missed on a device, of these dtypes or any and these modes, how often."""
    counts = store.misses(device)
    return {workload: counts[workload] for workload in of_kind(counts, dtypes, modes)}


def stale_or_unfinished(store: ProfileStore, device: Device) -> list[Workload]:
    """What may no longer hold of a device, or was not finished.

    Unfinished, too, because a tune of what is stale that was interrupted may have left that in its
    place.
    """
    return [
        profile.parsed_workload()
        for profile in store.profiles(device)
        if not profile.function and (profile.stale_reasons(device) or not profile.complete)
    ]


def stale_functions(store: ProfileStore, device: Device) -> list[Profile]:
    """The same of functions that are not attention, but for those that were measured anew since.

    They are measured where they are met again, by ``autochunk tune --missed``.
    """
    every = [profile for profile in store.profiles(device) if profile.function]
    old = [one for one in every if one.stale_reasons(device) or not one.complete]
    keys = {one.workload for one in old}
    anew = {unchanging(one.workload) for one in every if one.workload not in keys}
    return [one for one in old if unchanging(one.workload) not in anew]


def _planned(
    task: Task, wishes: Wishes, workers: int, is_known: Callable[[Workload], bool] | None
) -> tuple[Task, list[Subject]]:
    """The task with its agenda, and all on that."""
    agenda = make_agenda(
        wishes,
        _waiting(task, wishes.all),
        [*task.found, *_finished(task.store, task.device)],
        deadline=task.deadline,
        least=EFFORT_SETTINGS[task.effort].least_share,
        workers=workers,
        is_known=is_known or task.is_known,
    )
    found = len(task.found)
    places = enumerate(agenda.order, found + 1)
    count = found + len(agenda.order)
    subjects = [Subject(workload, number, count) for number, workload in places]
    return dataclasses.replace(task, agenda=agenda), subjects


def _finished(store: ProfileStore, device: Device) -> list[Workload]:
    """What is measured; what was cut short is gone on with, as if nothing were there."""
    every = [one for one in store.profiles(device) if not one.function]
    return [
        one.parsed_workload() for one in every if one.complete and not one.stale_reasons(device)
    ]


def _waiting(task: Task, todo: Sequence[Workload]) -> list[Workload]:
    """What needs measuring; what does not is told of, and found.

    Skipping costs nothing, so the time is shared out among those that wait.
    """
    if task.force:
        return list(todo)
    waiting = []
    for workload in todo:
        layer, profile = "", task.good_enough(workload)
        if profile is None and task.effort == "quick":
            layer, profile = task.answered(workload)
        if profile is None:
            waiting.append(workload)
            continue
        task.found[workload] = profile
        task.on_event(events.Skipped(workload, len(task.found), len(todo), profile, layer))
    return waiting


def _not_begun(task: Task, waiting: Sequence[Subject]) -> Iterator[Event]:
    """What is told of workloads that no worker got to."""
    agenda = task.agenda
    left = agenda.not_begun(task.begun)
    for subject in waiting:
        if subject.workload in left and subject.workload not in agenda.teaching:
            yield events.OutOfTime(*subject.place, None)
    if left or agenda.known:
        only_missed = all(workload in agenda.teaching for workload in left)
        known = [workload for workload in agenda.order if workload in agenda.known]
        yield events.LeftOut(tuple(left), tuple(known), only_missed)


def _contribute(task: Task, storage: Storage) -> None:
    """Gives the other workers what this machine has measured before."""
    for workload, profile in task.found.items():
        study = storage.study(profile.device, workload, task.effort)
        if study.profile is None:
            study.profile = profile
