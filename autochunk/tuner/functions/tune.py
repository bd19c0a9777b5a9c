"""Functions that were missed, measured and stored: which comes when, and what is told of them."""

from __future__ import annotations

import collections
import contextvars
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import autochunk
from autochunk.device import Device
from autochunk.errors import StoreError
from autochunk.functions import FunctionCall, unchanging
from autochunk.plan import BYTES_PER_MB
from autochunk.store.choice import DENSE
from autochunk.store.profile import SCHEMA_VERSION, Effort, Profile, utc_now
from autochunk.store.profiles import ProfileStore
from autochunk.store.programs import Programs
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.functions.search import Search
from autochunk.tuner.functions.worker import PROGRAM_VARIABLE
from autochunk.tuner.outcome import Tuned
from autochunk.tuner.probe import OutOfTime, Probe, seconds_left
from autochunk.tuner.process import worker_command
from autochunk.workload import Mode

WORKER = worker_command("autochunk.tuner.functions.worker")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """How functions are measured, and of which dtypes and modes, none being any: see ``tune``."""

    effort: Effort = "standard"
    deadline: float | None = None
    memory_budget_mb: float | None = None
    dtypes: Sequence[str] = ()
    modes: Sequence[Mode] = ()

    def let_through(self, call: FunctionCall) -> bool:
        """Whether a call is of the dtypes and modes."""
        by_dtype = not self.dtypes or call.dtype in self.dtypes
        return by_dtype and (not self.modes or call.mode in self.modes)


def tune_missed(
    store: ProfileStore,
    limits: Limits,
    say: Say = lambda _: None,
    *,
    known_only: bool = False,
    gpus: Sequence[str] = (),
) -> Tuned:
    """Measures functions that "auto" missed on this machine's device, those asked for most first.

    What is stored and stale, or unfinished, is missed where it answers; with ``known_only`` nothing
    else is measured but functions that have changed since. GPUs, as ``CUDA_VISIBLE_DEVICES`` names
    them, share the functions; without any it is the default device.

    Raises:
      ProbeError: no measuring process can be started.
      StoreError: the store cannot be read or written.
    """
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]
    with Probe(WORKER, environment=places[0]) as probe:
        probe.deadline = limits.deadline
        try:
            device = probe.connect()
        except OutOfTime:
            return Tuned([], 0, 0)
    missed = {c: n for c, n in store.missed_functions(device).items() if limits.let_through(c)}
    if known_only:
        known = {unchanging(one.workload) for one in store.profiles(device) if one.function}
        missed = {one: count for one, count in missed.items() if unchanging(one.key) in known}
    ordered = sorted(missed, key=lambda call: -missed[call])
    queue = _Queue(ordered, store, device, limits, say, len(places))
    with ThreadPoolExecutor(len(places)) as threads:
        running = [
            threads.submit(contextvars.copy_context().run, queue.work, place) for place in places
        ]
        try:
            for one in running:
                one.result()
        except BaseException:
            queue.stop()
            raise
    store.forget_programs()
    finished = sum(profile.complete for profile in queue.found)
    return Tuned(queue.found, len(ordered), len(ordered) - finished)


class _Queue:
    """Functions that wait to be measured, and who takes the next.

    Attributes:
      found: the profiles of those that were measured, all of them stored.
    """

    def __init__(
        self,
        calls: Sequence[FunctionCall],
        store: ProfileStore,
        device: Device,
        limits: Limits,
        say: Say,
        workers: int,
    ) -> None:
        self._waiting = collections.deque(enumerate(calls, 1))
        self._count, self._workers = len(calls), workers
        self._store, self._device, self._limits, self._say = store, device, limits, say
        self._probes: set[Probe] = set()
        self._stopped = False
        self._lock = threading.Lock()
        self.found: list[Profile] = []

    def work(self, place: dict[str, str]) -> None:
        """Measures one after the other, as long as there are any and there is time."""
        while (taken := self._next()) is not None:
            number, call, seconds = taken
            label = f"[{number}/{self._count}] {call.shape} {call.mode}"
            self._say(f"{label} ...")
            profile, told = self._tune_one(call, place, seconds)
            self._say(f"{label}: {told}")
            if profile is not None:
                with self._lock:
                    self._store.put(profile)
                    self.found.append(profile)

    def stop(self) -> None:
        """Gives up what is measured, and begins nothing more."""
        with self._lock:
            self._stopped = True
            for probe in self._probes:
                probe.abandon()

    def _next(self) -> tuple[int, FunctionCall, float] | None:
        """The next one's number, and how many seconds it should take at most."""
        with self._lock:
            if self._stopped or not self._waiting:
                return None
            deadline = self._limits.deadline
            if deadline is not None and time.monotonic() > deadline:
                self._say(f"{len(self._waiting)} functions are left out for want of time")
                self._waiting.clear()
                return None
            waiting = len(self._waiting)
            share = seconds_left(deadline) * min(self._workers, waiting) / waiting
            least = EFFORT_SETTINGS[self._limits.effort].least_share
            return *self._waiting.popleft(), max(share, least)

    def _tune_one(
        self, call: FunctionCall, place: dict[str, str], seconds: float
    ) -> tuple[Profile | None, str]:
        """A profile, if anything could be measured, and what is said of it."""
        cure = "run the program that calls it once more, or use autochunk.tune_chunks(fn, args)"
        kept, limits = Programs(self._store.path), self._limits
        if not kept.has(call):
            return None, f"not measured: it left no program; {cure}"
        try:
            header, _ = kept.read(call)
        except StoreError as error:
            return None, f"not measured: {error}; {cure}"
        if call.mode == "training" and not header.get("gradients", True):
            return None, "not measured: JAX cannot differentiate it"
        budget = limits.memory_budget_mb
        with Probe(
            WORKER,
            memory_budget_bytes=None if budget is None else int(budget * BYTES_PER_MB),
            seconds_per_request=EFFORT_SETTINGS[limits.effort].seconds_per_request,
            environment={**place, PROGRAM_VARIABLE: str(kept.path(call))},
        ) as probe:
            probe.deadline = limits.deadline
            with self._lock:
                self._probes.add(probe)
            try:
                how = self._device, limits.effort, header.get("plans")
                return measured(call, probe, *how, seconds=seconds)
            finally:
                with self._lock:
                    self._probes.discard(probe)


def measured(
    call: FunctionCall,
    probe: Probe,
    device: Device,
    effort: Effort,
    sizes: Sequence[Sequence[int]] | None = None,
    *,
    seconds: float = math.inf,
) -> tuple[Profile | None, str]:
    """Measures a function by a probe of it, in chunks of any sizes or of these, in about a time."""
    search = Search(call, probe, EFFORT_SETTINGS[effort], sizes)
    complete = search.run(seconds)
    if not any(one.timed for one in search.found.values()):
        failures = (f"{one.status}: {one.detail}" for one in search.found.values())
        return None, f"not measured: {search.failure or next(failures, 'out of time')}"
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        workload=call.key,
        device=device,
        measurements=tuple(search.found.values()),
        effort=effort,
        complete=complete,
        created=utc_now(),
        autochunk=autochunk.__version__,
    )
    return profile, _told(profile)


def _told(profile: Profile) -> str:
    choice = profile.choose()
    plan = "no plan could be chosen" if choice is None else str(choice.plan)
    text = "whole" if choice is not None and choice.plan == DENSE else plan
    tried = [one for one in profile.measurements if one.chunk_sizes is not None]
    if tried and not any(one.timed for one in tried):
        first = tried[0]
        return f"{text}; chunks are refused: {first.status}: {first.detail}"
    return text if profile.complete else f"{text} (unfinished)"
