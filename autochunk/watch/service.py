"""``watch``: waits until the device is idle, does what is to be done, gives way to others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autochunk import host, nvidia
from autochunk.device import Device
from autochunk.errors import BundleError, DeviceError, StorageError
from autochunk.store.profile import Effort
from autochunk.store.profiles import ProfileStore
from autochunk.store.remote import without_password
from autochunk.tuner.probe import Probe
from autochunk.tuner.process import WORKER
from autochunk.tuner.sync import open_hub, sync
from autochunk.watch.eyes import Eyes
from autochunk.watch.idle import ALL_DAY, Hours, Look, Quiet, Threshold
from autochunk.watch.lock import DeviceLock
from autochunk.watch.publish import publish
from autochunk.watch.record import Record, path_of
from autochunk.watch.running import RunningJob
from autochunk.watch.todo import Job, Known, todo
from autochunk.workload import Workload

_LOOK_SECONDS = 1.0  # between looks at a device that is not in use by this service
_WATCHFUL_SECONDS = 0.1  # the same while something is measured
_REST_SECONDS = 60.0  # after which it is looked again what is to be done
_SYNC_SECONDS = 600.0
_FIRST_LOOKS = 0.6  # for which others' cores are counted before anything is said


class Sight(Protocol):
    """What looks at the device."""

    def look(self) -> Look:
        """What is there to be seen now."""


@dataclass(frozen=True)
class Options:
    """How a device is watched.

    Attributes:
      effort: how hard to look at what was missed.
      idle_minutes: for so long the device must be idle before anything is measured.
      hours: of the day, local time, in which something may be measured.
      once: ends when nothing is left to be done, or the device is not idle.
      busy_cores: so many cores of others are work; None is the usual.
      memory_budget_mb: most working memory that a measurement may take; None is most of what is
        free.
      storage: where other machines of the kind are met; None for none.
      publish: a bundle that profiles are added to; None for none.
      worker_command: starts a measuring process.
    """

    effort: Effort = "standard"
    idle_minutes: float = 5.0
    hours: Hours = ALL_DAY
    once: bool = False
    busy_cores: float | None = None
    memory_budget_mb: float | None = None
    storage: str | None = None
    publish: str | None = None
    worker_command: Sequence[str] = WORKER


def watch(
    store: ProfileStore,
    options: Options,
    say: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> bool:
    """Watches jax's default device until ``stop`` is set, or as ``options.once`` says.

    Args:
      store: where profiles go, and what is missed is from.
      options: how.
      say: told of each event, plain data.
      stop: ends it; what is measured by then is kept.

    Returns:
      Whether nothing was left to be done.

    Raises:
      DeviceError: another service has the device, or it cannot be told here whether it is idle.
      ProbeError: no measuring process can be started.
      StoreError: the store cannot be written.
    """
    store.check_writable()
    device, gpu = found_device(options.worker_command)
    with DeviceLock(device, gpu or _which_cores()) as lock:
        record = Record(path_of(store.path, lock.name), say)
        return Watch(store, device, options, record, Eyes(gpu), stop).run()


def found_device(worker_command: Sequence[str] = WORKER) -> tuple[Device, str]:
    """The device that is measured on, and its UUID if it is a GPU; taken into use by no process."""
    with Probe(worker_command) as probe:
        device = probe.connect()
    uuids = nvidia.gpu_uuids() if device.platform == "gpu" else {}
    return device, next(iter(uuids.values()), "")


def _which_cores() -> str:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return ",".join(map(str, sorted(cores)))


class Watch:
    """The service; see ``watch``."""

    def __init__(
        self,
        store: ProfileStore,
        device: Device,
        options: Options,
        record: Record,
        eyes: Sight,
        stop: threading.Event,
    ) -> None:
        self._store, self._device, self._options = store, device, options
        self._record, self._eyes, self._stop = record, eyes, stop
        self._threshold = Threshold.of(device.platform, host.usable_cores(), options.busy_cores)
        self._quiet = Quiet()
        self._wishes: dict[Workload, int] = {}
        self._hub_works = False
        self._next_sync = 0.0
        self._waits_for = ""

    def run(self) -> bool:
        """Until it is told to stop, or as ``once`` says; whether nothing was left to be done."""
        self._record.event("started", device=self._device.key, store=str(self._store.path))
        try:
            self._check_sight()
            done = self._run()
        except Exception as error:
            self._record.now("ended")
            self._record.event("ended", detail=str(error))
            raise
        self._record.now("ended", self._todo())
        left = "told to stop" if self._stop.is_set() else "something is left"
        self._record.event("ended", detail="nothing is left" if done else left)
        return done

    def _check_sight(self) -> None:
        self._eyes.look()
        self._stop.wait(_FIRST_LOOKS)
        if not self._threshold.tells(self._eyes.look()):
            raise DeviceError(
                f"it cannot be told here whether {self._device.key} is idle: on a CPU that takes "
                "whole cores (a cpuset, no quota) of Linux, on a GPU NVIDIA's management library"
            )

    def _run(self) -> bool:
        while not self._stop.is_set():
            if time.monotonic() >= self._next_sync:
                self._meet_others()
            kind, reason = self._why_not_now()
            if kind:
                if self._options.once and kind != "quiet":
                    self._wait(kind, reason, 0.0)
                    return False
                self._wait(kind, reason, _LOOK_SECONDS)
                continue
            jobs = self._todo()
            if jobs:
                self._do(jobs[0], jobs)
                continue
            self._publish()
            if self._options.once:
                return True
            self._wait("nothing", "nothing is to be done", _REST_SECONDS)
        return False

    # --- When -------------------------------------------------------------------------------------

    def _why_not_now(self) -> tuple[str, str]:
        """Of what kind the reason is for which nothing may be measured now, and the reason."""
        busy = self._threshold.busy(self._eyes.look(), measuring=False)
        seconds = self._quiet.saw(busy, time.monotonic())
        now = time.localtime()
        if busy:
            return "busy", busy
        if not self._options.hours.include(60 * now.tm_hour + now.tm_min):
            return "hours", f"it is not {self._options.hours} o'clock"
        needed = 60 * self._options.idle_minutes
        if seconds < needed:
            return "quiet", f"the device must be idle for {self._options.idle_minutes:g} minutes"
        return "", ""

    def _why_give_way(self) -> str:
        now = time.localtime()
        if self._stop.is_set():
            return "told to stop"
        if not self._options.hours.include(60 * now.tm_hour + now.tm_min):
            return f"it is not {self._options.hours} o'clock any more"
        return self._threshold.busy(self._eyes.look(), measuring=True)

    def _wait(self, kind: str, reason: str, seconds: float) -> None:
        if kind != self._waits_for:
            self._waits_for = kind
            self._record.now("waiting", self._todo(), detail=reason)
            self._record.event("waiting", detail=reason)
        self._stop.wait(seconds)

    # --- What -------------------------------------------------------------------------------------

    def _todo(self) -> list[Job]:
        # What others miss was counted with what is missed here when it was told last.
        missed = {**self._wishes, **self._ours()}
        functions = sum(self._store.missed_functions(self._device).values())
        known = Known(self._device, self._store.profiles(self._device), missed, functions)
        return todo(known, self._record.memory, self._options.effort, time.time())

    def _ours(self) -> dict[Workload, int]:
        ours = self._store.misses(self._device)
        return {one: max(count, self._wishes.get(one, 0)) for one, count in ours.items()}

    def _do(self, job: Job, jobs: Sequence[Job]) -> None:
        what = {"kind": job.kind, "workload": job.workload}
        self._waits_for = ""
        self._record.now("measuring", jobs, **what)
        self._record.event("began", **what, wanted=job.wanted)
        running = RunningJob(self._job(job))
        if reason := self._why_ended_early(running):
            seconds = running.end()
            self._quiet.saw(reason, time.monotonic())
            self._record.event("gave way", **what, detail=reason, seconds=round(seconds, 3))
            running.result()
            return
        self._note(job, running.result(), what)

    def _why_ended_early(self, running: RunningJob) -> str:
        """Waits until a job has ended, or is to be ended: why, then.

        What is seen once, as of a measuring process that is ended and another that is started, is
        nobody's work.
        """
        before = ""
        while not running.ended(_WATCHFUL_SECONDS):
            reason = self._why_give_way()
            if reason and before:
                return reason
            before = reason
        return ""

    def _job(self, job: Job) -> dict[str, Any]:
        """What the job's process is told."""
        return {
            "kind": job.kind,
            "workload": job.workload,
            "effort": job.effort,
            "device": self._device.key,
            "store": str(self._store.path),
            "storage": self._options.storage if self._hub_works else None,
            "memory_budget_mb": self._options.memory_budget_mb,
            "worker": list(self._options.worker_command),
        }

    def _note(self, job: Job, found: dict[str, Any], what: dict[str, Any]) -> None:
        memory, result = self._record.memory, found["result"]
        if result in ("verified", "drifted"):
            memory.verified[job.workload] = time.time()
        if result in ("verified", "measured"):
            memory.is_done(job.name)
            # As where another layer has the answer: it would be begun again at once, for ever.
            if job.kind != "functions" and job in self._todo():
                memory.came_to_nothing(job.name, time.time())
        elif result == "drifted":
            memory.drifted.append(job.workload)
        elif result != "stopped":  # by somebody else
            memory.came_to_nothing(job.name, time.time())
        self._record.event(result, **what, detail=found.get("detail", ""))
        if result == "measured":
            self._next_sync = 0.0
            self._publish()

    # --- Others -----------------------------------------------------------------------------------

    def _meet_others(self) -> None:
        """Syncs with the storage, if there is one; that it is away is told, and no more."""
        self._next_sync = time.monotonic() + _SYNC_SECONDS
        place = self._options.storage
        if place is None:
            return
        try:
            found = sync(self._store, open_hub(place), self._device)
        except StorageError as error:
            self._hub_works = False
            self._next_sync = time.monotonic() + _REST_SECONDS
            self._record.event("storage away", detail=str(error))
            return
        self._hub_works, self._wishes = True, found.wishes
        if found.taken or found.handed_in or found.missed:
            self._record.event(
                "synced",
                storage=without_password(place),
                taken=len(found.taken),
                handed_in=len(found.handed_in),
                missed=len(found.missed),
                wishes=len(found.wishes),
            )
            if found.taken:
                self._publish()

    def _publish(self) -> None:
        place = self._options.publish
        if place is None:
            return
        try:
            added = publish(place, self._store.profiles(self._device), self._device)
        except (BundleError, OSError) as error:
            self._record.event("not published", detail=str(error))
            return
        if added is not None:
            self._record.event("published", place=without_password(place), profiles=added)
