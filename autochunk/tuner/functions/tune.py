"""Functions that were missed, measured and stored: candidates, rounds, and what is told of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import autochunk
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

WORKER = worker_command("autochunk.tuner.functions.worker")

Say = Callable[[str], None]

_MOST_PLANS = 60


@dataclass(frozen=True)
class Limits:
    """How a function is measured: see ``tune``."""

    effort: Effort = "standard"
    deadline: float | None = None
    memory_budget_mb: float | None = None


def candidates(lengths: Sequence[int], settings: EffortSettings) -> list[Plan]:
    """The plans worth measuring, the whole call first, then from large chunks to small.

    Along one axis sizes are powers of two, and between each and the next the largest that divides
    the length, so that no smaller chunk is left; of several axes each alone, and all together in
    about as many chunks.
    """
    ladders = [_ladder(length, settings) for length in lengths]
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


def _ladder(length: int, settings: EffortSettings) -> list[int]:
    """Sizes below a length, from large to small."""
    sizes = []
    top = (length - 1).bit_length() - 1
    for exponent in range(top, -1, -settings.step // 2):
        low = 1 << exponent
        divisors = (n for n in range(min(2 * low, length) - 1, low, -1) if length % n == 0)
        sizes += [*itertools.islice(divisors, 1), low]
    return sizes


def tune_missed(
    store: ProfileStore, limits: Limits, say: Say = lambda _: None, *, known_only: bool = False
) -> Tuned:
    """Measures functions that "auto" missed on this machine's device, those asked for most first.

    What is stored and stale, or unfinished, is missed where it answers; with ``known_only`` nothing
    else is measured but functions that have changed since.

    Raises:
      ProbeError: no measuring process can be started.
      StoreError: the store cannot be read or written.
    """
    kept = Programs(store.path)
    with Probe(WORKER) as probe:
        probe.deadline = limits.deadline
        try:
            device = probe.connect()
        except OutOfTime:
            return Tuned([], 0, 0)
    missed = store.missed_functions(device)
    if known_only:
        known = {unchanging(one.workload) for one in store.profiles(device) if one.function}
        missed = {one: count for one, count in missed.items() if unchanging(one.key) in known}
    ordered = sorted(missed, key=lambda call: -missed[call])
    found = []
    for number, call in enumerate(ordered, 1):
        if limits.deadline is not None and time.monotonic() > limits.deadline:
            say(f"{len(ordered) - number + 1} functions are left out for want of time")
            break
        label = f"[{number}/{len(ordered)}] {call.shape} {call.mode}"
        say(f"{label} ...")
        profile, told = _tune_one(call, kept, device, limits)
        say(f"{label}: {told}")
        if profile is not None:
            store.put(profile)
            found.append(profile)
    store.forget_programs()
    finished = sum(profile.complete for profile in found)
    return Tuned(found, len(ordered), len(ordered) - finished)


def _tune_one(
    call: FunctionCall, kept: Programs, device: Device, limits: Limits
) -> tuple[Profile | None, str]:
    """A profile, if anything could be measured, and what is said of it."""
    cure = "run the program that calls it once more, or use autochunk.tune_chunks(fn, args)"
    if not kept.has(call):
        return None, f"not measured: it left no program; {cure}"
    try:
        kept.read(call)
    except StoreError as error:
        return None, f"not measured: {error}; {cure}"
    budget = limits.memory_budget_mb
    settings = EFFORT_SETTINGS[limits.effort]
    with Probe(
        WORKER,
        memory_budget_bytes=None if budget is None else int(budget * BYTES_PER_MB),
        seconds_per_request=settings.seconds_per_request,
        environment={PROGRAM_VARIABLE: str(kept.path(call))},
    ) as probe:
        probe.deadline = limits.deadline
        return measured(call, probe, device, limits.effort)


def measured(
    call: FunctionCall, probe: Probe, device: Device, effort: Effort
) -> tuple[Profile | None, str]:
    """Measures a function by a probe of it; see ``_tune_one``."""
    search = _Search(call, probe, EFFORT_SETTINGS[effort])
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

    def __init__(self, call: FunctionCall, probe: Probe, settings: EffortSettings) -> None:
        self.call, self.probe, self.settings = call, probe, settings
        self.found: dict[Plan, Measurement] = {}
        self.failure = ""
        self._anchor: Plan | None = None

    def run(self) -> bool:
        """Measures all; whether time was enough."""
        try:
            self.probe.load(self.call)
            for plan in candidates(self.call.sizes, self.settings):
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
