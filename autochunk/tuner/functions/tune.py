"""Functions that were missed, measured and stored: candidates, rounds, and what is told of them."""

from __future__ import annotations

import collections
import contextvars
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import autochunk
from autochunk.chunks.ladder import sizes_below
from autochunk.device import Device
from autochunk.errors import ProbeError, StoreError
from autochunk.functions import FunctionCall, unchanging
from autochunk.plan import BYTES_PER_MB, CHUNKS, Plan
from autochunk.store.choice import DENSE
from autochunk.store.measurement import Measurement
from autochunk.store.profile import SCHEMA_VERSION, Effort, Profile, utc_now
from autochunk.store.profiles import ProfileStore
from autochunk.store.programs import Programs
from autochunk.tuner.effort import EFFORT_SETTINGS, EffortSettings
from autochunk.tuner.functions.worker import PROGRAM_VARIABLE
from autochunk.tuner.joint import JointRounds
from autochunk.tuner.outcome import Tuned
from autochunk.tuner.probe import OutOfTime, Prepared, Probe
from autochunk.tuner.process import WorkerFailure, worker_command
from autochunk.tuner.standing import best_plans, best_ratio
from autochunk.workload import Mode

WORKER = worker_command("autochunk.tuner.functions.worker")

Say = Callable[[str], None]

_MOST_PLANS = 60


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


def candidates(lengths: Sequence[int], settings: EffortSettings) -> list[Plan]:
    """The plans worth measuring, the whole call first, then from large chunks to small.

    Along one axis sizes are powers of two, and between each and the next the largest that divides
    the length, so that no smaller chunk is left; of several axes each alone, and all together in
    about as many chunks.
    """
    ladders = [sizes_below(length, settings.step) for length in lengths]
    whole = tuple(lengths)
    found = {whole}
    for number, ladder in enumerate(ladders):
        found |= {(*whole[:number], size, *whole[number + 1 :]) for size in ladder}
    if len(lengths) > 1:
        found |= set(itertools.islice(zip(*ladders, strict=False), _MOST_PLANS))
    fitting = [
        sizes for sizes in found if math.prod(map(_chunks, lengths, sizes)) <= settings.most_slices
    ]
    ordered = sorted(fitting, key=lambda sizes: (-math.prod(sizes), sizes))[:_MOST_PLANS]
    return [DENSE if sizes == whole else Plan(CHUNKS, None, sizes) for sizes in ordered]


def _chunks(length: int, size: int) -> int:
    return -(-length // size)


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
    queue = _Queue(ordered, store, device, limits, say)
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
    ) -> None:
        self._waiting = collections.deque(enumerate(calls, 1))
        self._count = len(calls)
        self._store, self._device, self._limits, self._say = store, device, limits, say
        self._probes: set[Probe] = set()
        self._stopped = False
        self._lock = threading.Lock()
        self.found: list[Profile] = []

    def work(self, place: dict[str, str]) -> None:
        """Measures one after the other, as long as there are any and there is time."""
        while (taken := self._next()) is not None:
            number, call = taken
            label = f"[{number}/{self._count}] {call.shape} {call.mode}"
            self._say(f"{label} ...")
            profile, told = self._tune_one(call, place)
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

    def _next(self) -> tuple[int, FunctionCall] | None:
        with self._lock:
            if self._stopped or not self._waiting:
                return None
            deadline = self._limits.deadline
            if deadline is not None and time.monotonic() > deadline:
                self._say(f"{len(self._waiting)} functions are left out for want of time")
                self._waiting.clear()
                return None
            return self._waiting.popleft()

    def _tune_one(self, call: FunctionCall, place: dict[str, str]) -> tuple[Profile | None, str]:
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
                return measured(call, probe, *how)
            finally:
                with self._lock:
                    self._probes.discard(probe)


def measured(
    call: FunctionCall,
    probe: Probe,
    device: Device,
    effort: Effort,
    sizes: Sequence[Sequence[int]] | None = None,
) -> tuple[Profile | None, str]:
    """Measures a function by a probe of it, in chunks of any sizes or of these."""
    plans = candidates(call.sizes, EFFORT_SETTINGS[effort])
    if sizes is not None:
        plans = [DENSE, *(Plan(CHUNKS, None, tuple(one)) for one in sizes)]
    search = _Search(call, probe, EFFORT_SETTINGS[effort], plans)
    complete = search.run()
    if not any(one.timed for one in search.found.values()):
        return None, f"not measured: {search.failure or 'out of time'}"
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
        return f"{text}; chunks are refused: {tried[-1].status}: {tried[-1].detail}"
    return text if profile.complete else f"{text} (unfinished)"


class _Search:
    """The measurements of one function, as they come.

    Attributes:
      found: by plan.
      failure: why none could be made, if so.
    """

    def __init__(
        self, call: FunctionCall, probe: Probe, settings: EffortSettings, plans: Sequence[Plan]
    ) -> None:
        self.call, self.probe, self.settings = call, probe, settings
        self._plans = plans
        self.found: dict[Plan, Measurement] = {}
        self.failure = ""
        self._anchor: Plan | None = None

    def run(self) -> bool:
        """Measures all; whether time was enough."""
        try:
            self.probe.load(self.call)
            for plan in self._plans:
                self.found[plan] = self._measurement(plan)
            self._refuse_mixing()
            self._joint_rounds()
        except OutOfTime:
            return False
        except ProbeError as error:
            self.failure = str(error)
            return False
        return True

    def _measurement(self, plan: Plan) -> Measurement:
        prepared = self.probe.prepare(plan)
        if prepared.status != "ok":
            self.failure = self.failure or f"{prepared.status}: {prepared.detail}"
            return _as_measurement(plan, prepared)
        self._anchor = self._anchor or plan
        try:
            seconds, ratios, given_up = self._timed(plan)
        except WorkerFailure as failure:
            return _as_measurement(plan, Prepared(failure.status, failure.detail))
        found = _as_measurement(plan, prepared, seconds, ratios)
        if given_up:
            self.probe.drop(plan)
            return found.model_copy(update={"status": "pruned", "detail": given_up})
        return found

    def _timed(self, plan: Plan) -> tuple[list[float], list[float], str]:
        """Seconds and ratios to the anchor, and why the plan was given up, if it was."""
        assert self._anchor is not None
        seconds: list[float] = []
        ratios: list[float] = []
        start = time.monotonic()
        for step in range(self.settings.rounds):
            own, anchors = self.probe.time_beside(plan, self._anchor, step)
            seconds.append(own)
            ratios.append(own / anchors)
            slower = statistics.median(ratios) / best_ratio(self.found)
            if len(ratios) < self.settings.least_rounds:
                continue
            if slower > self.settings.hopeless and plan != self._anchor:
                return seconds, ratios, f"{slower:.1f}x the best time"
            if time.monotonic() - start > self.settings.seconds:
                break
        return seconds, ratios, ""

    def _refuse_mixing(self) -> None:
        """Where some chunks give other results, others that seem not to are no better."""
        wrong = [one for one in self.found.values() if one.status == "inaccurate"]
        for plan, one in self.found.items():
            if wrong and plan.chunk_sizes is not None and one.timed:
                said = {"status": "inaccurate", "detail": wrong[0].detail, "seconds": ()}
                refused = said | {"ratios": (), "joint": 0}
                self.found[plan] = one.model_copy(update=refused)

    def _joint_rounds(self) -> None:
        finalists = best_plans(self.found, self.settings)
        if self._anchor is None or len(finalists) < 2:
            return
        rounds = JointRounds(self.probe, self.settings, self.found, self._anchor)
        self.found |= {one.plan: one for one in rounds.run(finalists)}


def _as_measurement(
    plan: Plan,
    prepared: Prepared,
    seconds: Sequence[float] = (),
    ratios: Sequence[float] = (),
) -> Measurement:
    return Measurement(
        implementation=plan.implementation,
        max_chunk_size_mb=None,
        chunk_sizes=plan.chunk_sizes,
        seconds=tuple(seconds),
        ratios=tuple(ratios),
        **asdict(prepared),
    )
