"""The search over one workload's plans.

The space is small and discrete, so it is searched exhaustively, the likely best first; what makes
it quick is giving up early. Every round times the plan beside one fixed plan, the anchor, in
alternating order: drift of the machine hits both alike, and the ratios of different plans, measured
by different workers too, compare. A plan that is clearly hopeless goes after a round or two, one
that is probably worse by Wilcoxon's signed-rank test over the paired rounds (Optuna's
``WilcoxonPruner``); limits below hopeless ones, each the slower the smaller it is, and between two
of them are not tried at all. Where time is short, plans have fewer rounds, so that all are tried.
Those that are left and close meet once more in joint rounds, until it is clear which of them to
choose; where time is shorter still, before all plans were tried.

Who measures what is the study's business: an interrupted search goes on where it stopped, and
several workers share one.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from autochunk.errors import ProbeError, StorageError
from autochunk.plan import Plan
from autochunk.store.choice import DEFAULT, DENSE, LARGEST_NOISE
from autochunk.store.measurement import Measurement, relative_spread
from autochunk.store.profile import Effort, sliced_shape
from autochunk.tuner.candidates import all_plans, equivalent, in_order, likely
from autochunk.tuner.effort import EFFORT_SETTINGS, EffortSettings
from autochunk.tuner.joint import JointRounds
from autochunk.tuner.outcome import Interrupted, Outcome, StorageLost
from autochunk.tuner.probe import OutOfTime, Prepared, Probe
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.standing import (
    beaten_by_a_kernel,
    beneath_the_hopeless,
    best_plans,
    best_ratio,
    between_the_hopeless,
    finalists,
    is_doubtful,
    is_hopeless,
)
from autochunk.tuner.study import JOINT, LOADING, MOST_DEATHS, Claim, Study
from autochunk.workload import Workload

# Of the time for a workload: the rest is for joint rounds of the best, which take seconds on a CPU.
_SHARE_OF_PLANS = 0.8
_SHARE_ON_ACCELERATORS = 0.9
# So long all that are close stay in joint rounds; what short calls leave is for long ones.
_SHARE_OF_AMPLE_ROUNDS = 0.1
# On an accelerator compiling takes what time there is, and rounds next to none: in seconds.
_JOINT_ON_ACCELERATORS = 3.0
# Ratios of so many rounds may be alike by chance.
_FEW = 3


def search(
    probe: Probe,
    workload: Workload,
    effort: Effort,
    study: Study,
    *,
    hints: Iterable[Plan] = (),
    seconds: float = math.inf,
    on_measurement: Callable[[Measurement, int, int], None] = lambda *_: None,
) -> Outcome:
    """Measures those of a workload's plans that nobody else does.

    It ends when none is left, when the time is over or the probe's deadline comes, or when no
    worker can go on: see ``Outcome``.

    Args:
      probe: measures; is turned to the workload here.
      workload: what to measure.
      effort: "quick", "standard" or "thorough".
      study: keeps what is measured, for going on after an interruption and for other workers.
      hints: plans to measure first, such as the best of a similar workload.
      seconds: after most of this time no further plan is begun, and the best so far meet in joint
        rounds: what is measured by then is to be worth a choice.
      on_measurement: told of each measurement, with how many are done and how many there are.

    Raises:
      StorageError: the study cannot be read or written; StorageLost once something is measured.
      Interrupted: on Ctrl-C.
    """
    try:
        platform = probe.connect().platform
    except (OutOfTime, ProbeError) as error:
        return _cut_short(study.measured(), error)
    settings = EFFORT_SETTINGS[effort]
    running = _Search(probe, platform, workload, settings, study, hints, on_measurement)
    try:
        return running.run(seconds)
    except (OutOfTime, ProbeError) as error:
        return _cut_short(running.latest(), error)
    except KeyboardInterrupt as error:
        raise Interrupted(_cut_short(running.latest(), error)) from None
    except StorageError as error:
        raise StorageLost(str(error), _cut_short(running.measured, error)) from error


def _cut_short(measured: dict[Plan, Measurement], error: BaseException) -> Outcome:
    failure = str(error) if isinstance(error, ProbeError) else ""
    return Outcome(tuple(measured.values()), complete=False, failure=failure)


class _Search:
    def __init__(
        self,
        probe: Probe,
        platform: str,
        workload: Workload,
        settings: EffortSettings,
        study: Study,
        hints: Iterable[Plan],
        on_measurement: Callable[[Measurement, int, int], None],
    ) -> None:
        self.probe, self.workload, self.settings = probe, workload, settings
        self.study, self.on_measurement = study, on_measurement
        shape = sliced_shape(workload)
        plans = all_plans(shape, settings, platform)
        self.plans = in_order(plans, hints, shape)
        self.baselines = (DENSE, equivalent(DEFAULT, plans, shape))
        self.measured: dict[Plan, Measurement] = study.measured()
        self.anchor: Plan | None = None
        self._loaded = False
        self._share = self._end = self._end_of_all = math.inf
        self._cut_short = False  # the joint rounds
        self._preparing: list[float] = []  # seconds that it took for each plan
        self._failed: dict[Plan, Prepared] = {}  # while an anchor was looked for

    def run(self, seconds: float) -> Outcome:
        """Begins no plan that takes time after most of it, if there are some to compare."""
        is_accelerated, start = self.probe.is_accelerated, time.monotonic()
        share = _SHARE_ON_ACCELERATORS if is_accelerated else _SHARE_OF_PLANS
        self._share, self._end = seconds, start + share * seconds
        self._end_of_all = start + seconds if is_accelerated else math.inf
        while True:
            while claim := self.study.claim(self.plans):
                with claim:
                    self._load(claim)
                    self._take(claim)
                if time.monotonic() > self._end and self._lacking() and self._takes_time():
                    return self._unfinished(self._joint_rounds())
            if self.study.workers() or self._all_measured():
                break  # else one has died since, and its plan is free again
        if self._all_measured() and (claim := self.study.claim_joint_rounds()):
            with claim:
                measurements = self._last_rounds(claim)
                if self._cut_short:
                    return self._unfinished(measurements)
                claim.done(measurements, self.anchor)
        # In this order: what ends between the two is not waited for.
        others, everything = bool(self.study.workers()), self._all_measured()
        complete = everything and not others
        return Outcome(tuple(self.measured.values()), complete=complete, awaited=not complete)

    def _all_measured(self) -> bool:
        """Whether nothing is left but joint rounds, by what everybody has handed in."""
        self.measured = self.study.measured()
        return all(plan in self.measured for plan in self.plans)

    def _unfinished(self, measurements: list[Measurement]) -> Outcome:
        self.measured |= {measurement.plan: measurement for measurement in measurements}
        return Outcome(tuple(self.measured.values()), complete=False)

    def _lacking(self) -> bool:
        """Whether plans are left to measure, and some are that can be compared."""
        timed = sum(measurement.timed for measurement in self.measured.values())
        return timed > 1 and any(plan not in self.measured for plan in self.plans)

    def _takes_time(self) -> bool:
        """Whether the next plan must be compiled."""
        plan = next(plan for plan in self.plans if plan not in self.measured)
        return plan not in self.probe.compiled and not self._needless(plan)

    def _last_rounds(self, claim: Claim) -> list[Measurement]:
        """The joint rounds of what all have measured, unless workers died of them."""
        if claim.deaths >= MOST_DEATHS:
            return []
        self._load(claim)
        self._follow_anchor()
        claim.runs(JOINT)
        return self._joint_rounds()

    def _joint_rounds(self) -> list[Measurement]:
        """What the best plans' joint rounds make of them; nothing without several."""
        if self.anchor is None or len(close := self._finalists()) < 2:
            return []
        end = max(self._end_of_all, time.monotonic() + _JOINT_ON_ACCELERATORS)
        ample = time.monotonic() + _SHARE_OF_AMPLE_ROUNDS * self._share
        rounds = JointRounds(self.probe, self.settings, self.measured, self.anchor, end, ample)
        measurements = rounds.run(close)
        self._cut_short = rounds.cut_short
        return measurements

    def _finalists(self) -> list[Plan]:
        # Accelerators have no cores to lose, and compile for long.
        close = best_plans if self.probe.is_accelerated else finalists
        return close(self.measured, self.settings)

    def latest(self) -> dict[Plan, Measurement]:
        """All that is measured, by others since the last claim too.

        Without those where the storage is what failed.
        """
        with contextlib.suppress(StorageError):
            self.measured = self.study.measured()
        return self.measured

    # One plan

    def _take(self, claim: Claim) -> None:
        assert claim.plan is not None
        self.measured |= self.study.measured()
        self._follow_anchor()
        measurement = self._measure(claim.plan, claim)
        self.measured[claim.plan] = measurement  # also where it cannot be handed in
        claim.done([measurement], self.anchor)
        self.on_measurement(measurement, len(self.measured), len(self.plans))
        self._drop_losers()

    def _measure(self, plan: Plan, claim: Claim) -> Measurement:
        if reason := self._needless(plan):
            return _measurement(plan, Prepared("skipped", reason))
        if claim.deaths >= MOST_DEATHS:
            return _measurement(plan, Prepared("crashed", _ended_the_tuner(claim.deaths)))
        claim.runs(str(plan))
        start = time.monotonic()
        prepared = self._failed.pop(plan, None) or self.probe.prepare(plan)
        if prepared.status != "ok":
            return _measurement(plan, prepared)
        if plan != self.anchor:  # which was ready
            self._preparing.append(time.monotonic() - start)
        try:
            seconds, ratios, reason = self._rounds(plan, claim)
        except WorkerFailure as failure:
            self._check_anchor(plan)
            return _measurement(plan, prepared, status=failure.status, detail=failure.detail)
        status = "pruned" if reason else "ok"
        times = {"seconds": seconds, "ratios": ratios, "detail": reason}
        return _measurement(plan, prepared, status=status, **times)

    def _needless(self, plan: Plan) -> str:
        """Why a plan need not be tried; empty if it has to be."""
        for neighbours in (beneath_the_hopeless, between_the_hopeless):
            if reason := neighbours(plan, self.measured, self.settings):
                return reason
        if plan in self.baselines or plan == self.anchor:
            return ""
        return beaten_by_a_kernel(plan, self.measured, self.settings)

    def _rounds(self, plan: Plan, claim: Claim) -> tuple[list[float], list[float], str]:
        """Times a plan beside the anchor: seconds, ratios, and why it was given up, or nothing."""
        assert self.anchor is not None
        start = time.monotonic()
        seconds: list[float] = []
        ratios: list[float] = []
        for step in range(self.settings.rounds):
            own, anchors = self.probe.time_beside(plan, self.anchor, step)
            seconds.append(own)
            ratios.append(own / anchors)
            claim.report(ratios[-1], step)
            fewest = self._fewest_rounds((time.monotonic() - start) / len(ratios))
            if is_doubtful(ratios, best_ratio(self.measured), self.settings):
                fewest = max(fewest, _FEW)
            if reason := self._too_slow(plan, claim, ratios, fewest):
                return seconds, ratios, reason
            short = fewest < self.settings.least_rounds
            spread = relative_spread(ratios)
            steady = len(ratios) > _FEW and spread is not None and spread <= self.settings.steady
            enough = short or steady or time.monotonic() - start > self.settings.seconds
            if len(ratios) >= fewest and enough:
                break
        return seconds, ratios, ""

    def _fewest_rounds(self, seconds: float) -> int:
        """How many rounds of so many seconds each plan has at least, if time is to do for all."""
        left = sum(plan not in self.measured for plan in self.plans)
        if self._end == math.inf or not left:
            return self.settings.least_rounds
        preparing = statistics.mean(self._preparing) if self._preparing else 0.0
        each = (self._end - time.monotonic()) / left - preparing
        return min(self.settings.least_rounds, max(1, int(each / seconds)))

    def _too_slow(self, plan: Plan, claim: Claim, ratios: list[float], fewest: int) -> str:
        """Why a plan is given up after these rounds, or nothing."""
        best = best_ratio(self.measured)
        slower = statistics.median(ratios) / best
        few = plan in self.baselines and len(ratios) < fewest
        if plan == self.anchor or few:
            return ""
        if is_hopeless(ratios, best, self.settings):
            return f"{slower:.1f}x the best plan's time"
        # A plan that is slower by no more than noise may still win by its memory.
        if len(ratios) > 3 and slower > 1 + LARGEST_NOISE and claim.hopeless():
            return f"probably slower than the best plan, {slower:.2f}x its time"
        return ""

    def _drop_losers(self) -> None:
        """Lets the programs go that no later round needs."""
        needed = (self.anchor, *self._finalists())
        with contextlib.suppress(WorkerFailure):  # the next worker has none of them
            for plan in self.measured:
                if plan not in needed:
                    self.probe.drop(plan)

    # The anchor

    def _load(self, claim: Claim) -> None:
        """Makes the probe ready, once there is something to measure: it takes seconds."""
        if not self._loaded:
            deaths = self.study.deaths()
            if deaths[LOADING] >= MOST_DEATHS:
                raise ProbeError(
                    f"the inputs of {self.workload.key}, or what its results should be, "
                    f"{_ended_the_tuner(deaths[LOADING])}; where there is more memory, it is tried "
                    "again by --force or in a new storage"
                )
            todo = [plan for plan in self.plans if plan not in self.measured]
            claim.runs(LOADING)
            self.probe.load(self.workload, todo)
            self._find_anchor(claim, deaths)
            self._loaded = True

    def _find_anchor(self, claim: Claim, deaths: Mapping[str, int]) -> None:
        """Takes the study's anchor, or the first likely plan that runs here, dense last.

        Before it those that no worker died of.
        """
        first = [*filter(None, [self.study.anchor]), *likely(self.plans), *self.plans]
        plans = dict.fromkeys([*(plan for plan in first if plan != DENSE), DENSE])
        for plan in sorted(plans, key=lambda plan: deaths[str(plan)]):
            if plan in self.measured and not self.measured[plan].timed:
                continue
            if deaths[str(plan)] >= MOST_DEATHS:
                continue
            claim.runs(str(plan))
            failed = self._try(plan)
            if failed is None:
                self._follow_anchor(plan)
                return
            self._failed[plan] = failed

    def _try(self, plan: Plan) -> Prepared | None:
        """Prepares a plan and times it once; returns why it failed, if it did."""
        prepared = self.probe.prepare(plan)
        if prepared.status != "ok":
            return prepared
        try:
            self.probe.time([plan])
        except WorkerFailure as failure:
            return replace(prepared, status=failure.status, detail=failure.detail)
        return None

    def _check_anchor(self, plan: Plan) -> None:
        """Raises ProbeError if it is the anchor that fails, as in a new worker it may.

        No plan is to blame then, and none can be timed.
        """
        if self.anchor is not None and self.anchor != plan and (failed := self._try(self.anchor)):
            reason = f"{failed.status}: {failed.detail}" if failed.detail else failed.status
            raise ProbeError(
                f"{self.anchor}, which all plans are timed beside, ran before and no longer does "
                f"({reason})"
            )

    def _follow_anchor(self, found: Plan | None = None) -> None:
        """Takes the study's anchor, maybe another worker's; ``found`` becomes it, if given."""
        if found is not None and self.study.anchor != found:
            self.study.anchor = found
        if self.study.anchor != self.anchor:
            self.anchor = self.study.anchor
            self.measured = self.study.measured()  # ratios to another anchor do not compare


def _ended_the_tuner(times: int) -> str:
    return f"ended the tuner itself {times} times (most likely the kernel, out of memory)"


def _measurement(plan: Plan, prepared: Prepared, **changes: object) -> Measurement:
    fields = {
        "implementation": plan.implementation,
        "max_chunk_size_mb": plan.max_chunk_size_mb,
        "status": prepared.status,
        "detail": prepared.detail[:2000],
        "temp_bytes": prepared.temp_bytes,
        "predicted_bytes": prepared.predicted_bytes,
        "measured_bytes": prepared.measured_bytes,
        "compile_seconds": prepared.compile_seconds,
        "error": prepared.error,
    }
    return Measurement.model_validate(fields | changes)
