"""The search over one workload's plans.

The space is small and discrete, so it is searched exhaustively, the likely best first; what makes
it quick is giving up early. Every round times the plan beside one fixed plan, the anchor, in
alternating order: drift of the machine hits both alike, and the ratios of different plans, measured
by different workers too, compare. A plan that is clearly hopeless goes after a round or two, one
that is probably worse by Wilcoxon's signed-rank test over the paired rounds (Optuna's
``WilcoxonPruner``); limits below two that were hopeless, the smaller one more so, are not tried at
all. Those plans that are left and close meet once more in joint rounds.

Who measures what is the study's business (``study.py``): an interrupted search goes on where it
stopped, and several workers share one.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from autochunk.errors import ProbeError, StorageError
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import LogitsShape, Plan, candidate_plans, same_slices
from autochunk.store.profile import DEFAULT, DENSE, LARGEST_NOISE, Effort, Measurement, sliced_shape
from autochunk.tuner.effort import EFFORT_SETTINGS, EffortSettings
from autochunk.tuner.probe import OutOfTime, Prepared, Probe, WorkerFailure
from autochunk.tuner.study import Claim, Study
from autochunk.workload import Workload

# Within this of the best, a plan takes part in the joint rounds.
_CLOSE = 1.08
_MIDDLE_MB = 32.0


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Measurements by whomever, whether everything was looked at, whether other workers are still
    looking, and what put an end to it.
    """

    measurements: tuple[Measurement, ...]
    complete: bool
    awaited: bool = False
    failure: str = ""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was measured before it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


def search(
    probe: Probe,
    workload: Workload,
    effort: Effort,
    study: Study,
    *,
    hints: Iterable[Plan] = (),
    on_measurement: Callable[[Measurement, int, int], None] = lambda *_: None,
) -> Outcome:
    """Measures those of a workload's plans that nobody else does, until none is left, the probe's
    deadline comes, or no worker can go on: see ``Outcome``.

    Args:
      probe: measures; is turned to the workload here.
      workload: what to measure.
      effort: "quick", "standard" or "thorough".
      study: keeps what is measured, for going on after an interruption and for other workers.
      hints: plans to measure first, such as the best of a similar workload.
      on_measurement: told of each measurement, with how many are done and how many there are.

    Raises:
      StorageError: the study cannot be read or written.
      Interrupted: on Ctrl-C.
    """
    try:
        platform = probe.connect().platform
    except (OutOfTime, ProbeError) as error:
        return _cut_short(study.measured(), error)
    running = _Search(
        probe, platform, workload, EFFORT_SETTINGS[effort], study, tuple(hints), on_measurement
    )
    try:
        complete = running.run()
    except (OutOfTime, ProbeError) as error:
        return _cut_short(running.latest(), error)
    except KeyboardInterrupt as error:
        raise Interrupted(_cut_short(running.latest(), error)) from None
    return Outcome(tuple(running.measured.values()), complete, awaited=not complete)


def _cut_short(measured: dict[Plan, Measurement], error: BaseException) -> Outcome:
    return Outcome(
        tuple(measured.values()),
        complete=False,
        failure=str(error) if isinstance(error, ProbeError) else "",
    )


class _Search:
    def __init__(
        self,
        probe: Probe,
        platform: str,
        workload: Workload,
        settings: EffortSettings,
        study: Study,
        hints: tuple[Plan, ...],
        on_measurement: Callable[[Measurement, int, int], None],
    ) -> None:
        self.probe, self.workload, self.settings, self.study, self.on_measurement = (
            probe,
            workload,
            settings,
            study,
            on_measurement,
        )
        self.shape = sliced_shape(workload)
        plans = _all_plans(self.shape, settings, platform)
        first = [
            *(plan for hint in hints if (plan := _equivalent(hint, plans, self.shape))),
            *_likely(plans),
        ]
        self.plans = list(dict.fromkeys([*first, *sorted(plans, key=_from_the_middle)]))
        self.baselines = (DENSE, _equivalent(DEFAULT, plans, self.shape))
        self.measured: dict[Plan, Measurement] = study.measured()
        self.anchor: Plan | None = None
        self._loaded = False
        self._failed: dict[Plan, Prepared] = {}  # while an anchor was looked for

    def run(self) -> bool:
        """Returns whether everything is measured; if not, other workers are at it."""
        while claim := self.study.claim(self.plans):
            with claim:
                self._load()
                self._take(claim)
        if self.study.workers():
            return False
        self.measured = self.study.measured()  # after the others have ended
        if claim := self.study.claim_joint_rounds():
            with claim:
                self._load()
                self._follow_anchor()
                claim.done(self._joint_rounds(), self.anchor)
            self.measured = self.study.measured()
        return not self.study.workers()

    def latest(self) -> dict[Plan, Measurement]:
        """All that is measured, by others since the last claim too.

        Without them where the storage is what failed.
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
        claim.done([measurement], self.anchor)
        self.measured[claim.plan] = measurement
        self.on_measurement(measurement, len(self.measured), len(self.plans))
        self._drop_losers()

    def _measure(self, plan: Plan, claim: Claim) -> Measurement:
        if reason := self._beneath_the_hopeless(plan):
            return _measurement(plan, Prepared("skipped", reason))
        prepared = self._failed.pop(plan, None) or self.probe.prepare(plan)
        if prepared.status != "ok":
            return _measurement(plan, prepared)
        seconds: list[float] = []
        ratios: list[float] = []
        try:
            given_up = self._rounds(plan, claim, seconds, ratios)
        except WorkerFailure as failure:
            self._check_anchor(plan)
            return _measurement(plan, prepared, status=failure.status, detail=failure.detail)
        return _measurement(
            plan,
            prepared,
            status="pruned" if given_up else "ok",
            detail=given_up,
            seconds=seconds,
            ratios=ratios,
        )

    def _rounds(self, plan: Plan, claim: Claim, seconds: list[float], ratios: list[float]) -> str:
        """Times a plan beside the anchor; returns why it was given up, or nothing."""
        start = time.monotonic()
        best = self._best_ratio()
        for step in range(self.settings.rounds):
            own, anchor = self._pair(plan, step)
            seconds.append(own)
            ratios.append(own / anchor)
            claim.report(ratios[-1], step)
            slower = statistics.median(ratios) / best if plan != self.anchor else 1.0
            few = plan in self.baselines and step + 1 < self.settings.least_rounds
            if slower > self.settings.hopeless ** (2 if step == 0 else 1) and not few:
                return f"{slower:.1f}x the best plan's time"
            # A plan that is slower by no more than noise may still win by its memory.
            if step >= 3 and slower > 1 + LARGEST_NOISE and claim.hopeless():
                return f"probably slower than the best plan, {slower:.2f}x its time"
            if (
                step + 1 >= self.settings.least_rounds
                and time.monotonic() - start > self.settings.seconds
            ):
                break
        return ""

    def _pair(self, plan: Plan, step: int) -> tuple[float, float]:
        """(seconds of the plan, seconds of the anchor), in an order that alternates."""
        assert self.anchor is not None
        if step % 2:
            anchor, own = self.probe.time([self.anchor, plan])
        else:
            own, anchor = self.probe.time([plan, self.anchor])
        return own, anchor

    def _drop_losers(self) -> None:
        """Lets the programs go that no later round needs."""
        needed = (self.anchor, *self._best_plans())
        with contextlib.suppress(WorkerFailure):  # the next worker has none of them
            for plan in self.measured:
                if plan not in needed:
                    self.probe.drop(plan)

    def _best_ratio(self) -> float:
        # the anchor's own ratio is one
        return min((m.ratio for m in self.measured.values() if m.status == "ok"), default=1.0)

    def _beneath_the_hopeless(self, plan: Plan) -> str:
        """Why a limit need not be tried, if the two next larger ones say so; else nothing."""
        if plan.max_chunk_size_mb is None:
            return ""
        siblings = [
            m
            for m in self.measured.values()
            if m.implementation == plan.implementation
            and (m.max_chunk_size_mb or 0) > plan.max_chunk_size_mb
        ]
        nearest = sorted(siblings, key=lambda m: m.max_chunk_size_mb or 0)[:2]
        if nearest and nearest[0].status == "skipped":
            return nearest[0].detail
        slower = [m.ratio / self._best_ratio() for m in nearest if m.timed]
        if len(slower) < 2 or not slower[0] > slower[1] > self.settings.hopeless**2:
            return ""
        return (
            f"limits of {nearest[1].max_chunk_size_mb:g} and {nearest[0].max_chunk_size_mb:g} MB "
            f"took {slower[1]:.1f}x and {slower[0]:.1f}x the best time"
        )

    # Comparisons

    def _load(self) -> None:
        """Makes the probe ready: only when there is something to measure, since it takes seconds."""
        if not self._loaded:
            self.probe.load(self.workload)
            self._find_anchor()
            self._loaded = True

    def _find_anchor(self) -> None:
        """The study's anchor, or the first likely plan that runs here, dense last.

        What others are timed beside.
        """
        likely = [*filter(None, [self.study.anchor]), *_likely(self.plans), *self.plans]
        for plan in dict.fromkeys([*(plan for plan in likely if plan != DENSE), DENSE]):
            if plan in self.measured and not self.measured[plan].timed:
                continue
            failed = self._try(plan)
            if failed is None:
                self._follow_anchor(plan)
                return
            self._failed[plan] = failed

    def _try(self, plan: Plan) -> Prepared | None:
        """Prepares a plan and times it once; returns what came in the way."""
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

    def _follow_anchor(self, otherwise: Plan | None = None) -> None:
        """Takes the anchor that the study has, which may be another worker's.

        Sets it if ``otherwise`` is given and differs.
        """
        if otherwise is not None and self.study.anchor != otherwise:
            self.study.anchor = otherwise
        if self.study.anchor != self.anchor:
            self.anchor = self.study.anchor
            self.measured = self.study.measured()  # ratios to another anchor do not compare

    def _best_plans(self) -> list[Plan]:
        """The plans that could still win, best first.

        The second is one of them even if it was given up, lest nobody meets a first that was lucky.
        """
        ranked = sorted((m for m in self.measured.values() if m.timed), key=lambda m: m.ratio)
        best = ranked[0].ratio if ranked else 0.0
        second = [m for m in ranked[1:2] if m.ratio <= self.settings.hopeless**2 * best]
        close = [m for m in ranked if m.status == "ok" and m.ratio <= _CLOSE * best]
        return list(dict.fromkeys(m.plan for m in (*close[:1], *second, *close[1:])))[
            : self.settings.finalists
        ]

    def _joint_rounds(self) -> list[Measurement]:
        """More rounds for the plans that are close, all in each round.

        Returns their measurements with those added.
        """
        finalists = self._best_plans()
        if len(finalists) < 2 or self.anchor is None:
            return []
        everyone = list(dict.fromkeys([self.anchor, *finalists]))
        extra: dict[Plan, list[tuple[float, float]]] = {plan: [] for plan in finalists}
        with contextlib.suppress(WorkerFailure):  # what was measured before stands
            for step in range(self.settings.joint_rounds):
                order = everyone[step % len(everyone) :] + everyone[: step % len(everyone)]
                times = dict(zip(order, self.probe.time(order), strict=True))
                for plan in finalists:
                    # The anchor beside itself would be a ratio of exactly one, and look surer than
                    # it is.
                    if plan != self.anchor:
                        extra[plan].append((times[plan], times[plan] / times[self.anchor]))
        return [_with_rounds(self.measured[plan], pairs) for plan, pairs in extra.items()]


def _with_rounds(old: Measurement, pairs: list[tuple[float, float]]) -> Measurement:
    """A measurement and more rounds, (seconds, ratio) each.

    After them it is no longer one that was given up early.
    """
    if not pairs:
        return old
    seconds, ratios = zip(*pairs, strict=True)
    return old.model_copy(
        update={
            "status": "ok",
            "detail": "",
            "seconds": (*old.seconds, *seconds),
            "ratios": (*old.ratios, *ratios),
        }
    )


def _from_the_middle(plan: Plan) -> tuple[bool, float]:
    """Order in which limits are tried.

    From ``_MIDDLE_MB`` outwards, so that a plan's larger neighbours come before it if it is small.
    """
    limit = plan.max_chunk_size_mb
    return (True, 0.0) if limit is None else (False, abs(math.log(limit / _MIDDLE_MB)))


def _all_plans(shape: LogitsShape, settings: EffortSettings, platform: str) -> list[Plan]:
    """Dense, fused kernels where there may be any, the default limit, and the ladder of limits.

    Plans that come to the same slices once.
    """
    fused = [
        Plan(name) for name, one in IMPLEMENTATIONS.items() if one.fused and one.runs_on(platform)
    ]
    plans = [
        DENSE,
        *fused,
        *candidate_plans(shape, step=settings.step, most_slices=settings.most_slices),
    ]
    return plans if _equivalent(DEFAULT, plans, shape) else [*plans, DEFAULT]


def _equivalent(plan: Plan, plans: list[Plan], shape: LogitsShape) -> Plan | None:
    return next((other for other in plans if same_slices(plan, other, shape)), None)


def _likely(plans: list[Plan]) -> list[Plan]:
    """What to measure first.

    A fused kernel, which wins by far where there is one; a limit near _MIDDLE_MB, which often wins
    and always fits; the baselines.
    """
    sliced = [
        plan
        for plan in plans
        if plan.implementation == "xla" and plan.max_chunk_size_mb is not None
    ]
    middle = min(sliced, key=_from_the_middle, default=None)
    unsliced = [plan for plan in plans if plan.max_chunk_size_mb is None]
    fused = [plan for plan in plans if is_fused(plan.implementation)]
    others = [plan for plan in unsliced if plan not in fused]
    return [
        *fused,
        *([middle] if middle else []),
        *others,
        *(plan for plan in plans if plan == DEFAULT),
    ]


def _measurement(plan: Plan, prepared: Prepared, **changes: object) -> Measurement:
    fields = {
        "implementation": plan.implementation,
        "max_chunk_size_mb": plan.max_chunk_size_mb,
        "status": prepared.status,
        "detail": prepared.detail[:2000],
        "temp_bytes": prepared.temp_bytes,
        "measured_bytes": prepared.measured_bytes,
        "compile_seconds": prepared.compile_seconds,
        "error": prepared.error,
    }
    return Measurement.model_validate(fields | changes)
