"""The search over one function's plans, from coarse to fine.

1. The whole call runs first, since others' results are compared with its, and is timed once beside
   chunks of a middle size. Of these two one is the anchor, which all plans are timed beside.
2. Coarse sizes over the whole range have one round each. Chunks smaller than two sizes that were
   slower and slower are skipped; once results differ, no more chunks are tried.
3. What is not hopeless then has more rounds, and so have the neighbours of the best two, and of
   the smallest chunks that are about as fast, until these have none untried; an effort that looks
   closely tries all other sizes, too.
4. After three quarters of the time no plan is begun: the rest is for joint rounds of the best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from autochunk.errors import ProbeError
from autochunk.functions import FunctionCall
from autochunk.plan import CHUNKS, Plan
from autochunk.store.choice import DENSE
from autochunk.store.measurement import Measurement
from autochunk.tuner.effort import EffortSettings
from autochunk.tuner.functions.candidates import Candidates, Sizes
from autochunk.tuner.joint import JointRounds
from autochunk.tuner.probe import OutOfTime, Prepared, Probe
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.standing import best_plans, best_ratio, is_hopeless

# Of the time: after the first no plan is begun, and one that takes the second is given up.
_SHARE_OF_PLANS = 3 / 4
_SHARE_OF_ONE = 1 / 3
# Chunks cost less to try than slices of attention, of which there are several kinds; and of a
# function with many positions the smallest may be best by far (a Gram matrix of 50,000 points on a
# GPU: chunks of 128 take 0.73 of the whole's time, of 512 1.15).
_MORE_CHUNKS = 16
# Of plans with fewer rounds more may be the best.
_MORE_FINALISTS = 2
# How many of the best have their neighbours tried: the first may only have been lucky.
_LEADERS = 2
# The smallest chunks within this of the best time are a leader, too: they take least memory, and
# smaller ones yet may fit a cache.
_ABOUT_AS_FAST = 1.05
# Of an effort that looks at what is coarse, and at what is beside the best, alone.
_COARSEST_STEP = 4


class Search:
    """The measurements of one function, as they come.

    Attributes:
      found: by plan.
      failure: why nothing could be measured, where that is not a plan's.
    """

    def __init__(
        self,
        call: FunctionCall,
        probe: Probe,
        settings: EffortSettings,
        only: Iterable[Sequence[int]] | None = None,
    ) -> None:
        """``only`` are the sizes that may be tried, where not all may."""
        finalists = _MORE_FINALISTS * settings.finalists
        self.call, self.probe = call, probe
        self.settings = dataclasses.replace(settings, finalists=finalists)
        self._candidates = Candidates(call.sizes, _MORE_CHUNKS * settings.most_slices, only)
        self.found: dict[Plan, Measurement] = {}
        self.failure = ""
        self._anchor: Plan | None = None
        self._end = self._end_of_plans = math.inf

    def run(self, seconds: float = math.inf) -> bool:
        """Measures what is worth it; whether so much time was enough.

        It was where the whole range, the neighbours of the best and the joint rounds are done.
        """
        start = time.monotonic()
        self._end_of_plans, self._end = start + _SHARE_OF_PLANS * seconds, start + seconds
        try:
            self.probe.load(self.call)
            with self._limited_requests(_SHARE_OF_ONE * seconds):
                complete = self._measure_plans()
            return self._joint_rounds() and complete
        except OutOfTime:
            return False
        except ProbeError as error:
            self.failure = str(error)
            return False

    @contextlib.contextmanager
    def _limited_requests(self, seconds: float) -> Iterator[None]:
        """Has a plan given up that takes so many seconds."""
        usual = self.probe.seconds_per_request
        self.probe.seconds_per_request = min(usual, seconds)
        try:
            yield
        finally:
            self.probe.seconds_per_request = usual

    # --- Which plans ------------------------------------------------------------------------------

    def _measure_plans(self) -> bool:
        """Whether there was time for all that belongs to a search."""
        coarse = self._candidates.coarse()
        self._compare_whole(coarse[:1])
        for sizes in (self._candidates.whole, *coarse):
            self._try(sizes)
        for one in self._ranked():
            self._repeat(one.plan)
        while not self._is_over and (beside := self._beside_the_best()):
            self._measure(beside[0])
        complete = not self._is_late
        if self.settings.step < _COARSEST_STEP:
            for sizes in self._candidates.fine():
                self._measure(sizes)
        return complete

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._end_of_plans

    @property
    def _mixes(self) -> bool:
        return any(one.status == "inaccurate" for one in self.found.values())

    @property
    def _is_over(self) -> bool:
        return self._is_late or self._mixes

    def _plan(self, sizes: Sizes) -> Plan:
        return DENSE if sizes == self._candidates.whole else Plan(CHUNKS, None, sizes)

    def _ranked(self) -> list[Measurement]:
        """Those that are not given up, best first."""
        timed = [one for one in self.found.values() if one.status == "ok"]
        return sorted(timed, key=lambda one: one.ratio)

    def _beside_the_best(self) -> list[Sizes]:
        ranked = self._ranked()
        leaders = [one.chunk_sizes or self._candidates.whole for one in ranked]
        fast = sum(one.ratio <= _ABOUT_AS_FAST * ranked[0].ratio for one in ranked)
        leading = [*leaders[:_LEADERS], *sorted(leaders[:fast], key=math.prod)[:1]]
        beside = (near for one in leading for near in self._candidates.neighbours(one))
        return [one for one in beside if self._plan(one) not in self.found]

    def _needless(self, sizes: Sizes) -> str:
        """Why it need not be tried, if two larger ones say so, and none that is smaller objects."""
        larger, timed = self._candidates.larger, {}
        for one in self.found.values():
            if one.timed and one.chunk_sizes is not None:
                timed[one.chunk_sizes] = one
        nearest = [timed[one] for one in larger(sizes, timed)[:2]]
        slower = [one.ratio / best_ratio(self.found) for one in nearest]
        hopeless = self.settings.hopeless
        if len(slower) < 2 or not (slower[0] > slower[1] > hopeless and slower[0] > hopeless**2):
            return ""
        smaller = [one for size, one in timed.items() if larger(size, [sizes])]
        if any(one.ratio < nearest[0].ratio for one in smaller):
            return ""
        return (
            f"{nearest[1].plan} and {nearest[0].plan} took {slower[1]:.1f}x and {slower[0]:.1f}x "
            "the best time"
        )

    # --- One plan ---------------------------------------------------------------------------------

    def _compare_whole(self, middle: Sequence[Sizes]) -> None:
        """Runs the whole call and chunks in the middle, and takes one of them as the anchor."""
        plans = [DENSE, *map(self._plan, middle)]
        prepared = {plan: self.probe.prepare(plan) for plan in plans}
        runs = [plan for plan in plans if prepared[plan].status == "ok"]
        for plan in plans:
            if plan not in runs:
                self._record(_measurement(plan, prepared[plan]))
        if not runs:
            return
        with contextlib.suppress(WorkerFailure):  # which of them it is, each shows alone
            seconds = dict(zip(runs, self.probe.time(runs), strict=True))
            slow = self.settings.hopeless * seconds[runs[-1]] < seconds[runs[0]]
            self._anchor = runs[-1 if slow else 0]
            for plan, own in seconds.items():
                ratio = own / seconds[self._anchor]
                self._record(_measurement(plan, prepared[plan], own, ratio))

    def _measure(self, sizes: Sizes) -> None:
        self._try(sizes)
        self._repeat(self._plan(sizes))

    def _try(self, sizes: Sizes) -> None:
        """Has one round of a plan, unless something speaks against it."""
        plan = self._plan(sizes)
        if plan in self.found or self._is_over:
            return
        if why_not := self._needless(sizes):
            self._record(_measurement(plan, Prepared("skipped", why_not)))
            return
        prepared = self.probe.prepare(plan)
        if prepared.status != "ok":
            self._record(_measurement(plan, prepared))
            return
        with self._blamed(plan):
            self._record(_measurement(plan, prepared, *self._round(plan, 0)))

    def _repeat(self, plan: Plan) -> None:
        """Adds rounds until a plan has enough of them, or is hopeless."""
        start = time.monotonic()
        while self._needs_more(plan, time.monotonic() - start):
            one = self.found[plan]
            with self._blamed(plan):
                seconds, ratio = self._round(plan, len(one.seconds))
                more = {"seconds": (*one.seconds, seconds), "ratios": (*one.ratios, ratio)}
                self._record(one.model_copy(update=more))

    def _needs_more(self, plan: Plan, taken: float) -> bool:
        """Whether it does after so many seconds; gives it up if it is hopeless."""
        one = self.found.get(plan)
        if one is None or one.status != "ok" or self._is_over:
            return False
        count = len(one.seconds)
        best = best_ratio(self.found)
        if is_hopeless(one.ratios, best, self.settings) and plan != self._anchor:
            self.probe.drop(plan)
            given_up = {"status": "pruned", "detail": f"{one.ratio / best:.1f}x the best time"}
            self._record(one.model_copy(update=given_up))
            return False
        in_time = count < self.settings.least_rounds or taken < self.settings.seconds
        return in_time and count < self.settings.rounds

    def _round(self, plan: Plan, step: int) -> tuple[float, float]:
        """Seconds of a plan, and their ratio to the anchor's, which is the first that runs."""
        if self._anchor is None or self._anchor == plan:
            seconds = self.probe.time([plan])[0]
            self._anchor = plan
            return seconds, 1.0
        own, anchors = self.probe.time_beside(plan, self._anchor, step)
        return own, own / anchors

    @contextlib.contextmanager
    def _blamed(self, plan: Plan) -> Iterator[None]:
        """A worker that is lost is what became of a plan."""
        try:
            yield
        except WorkerFailure as failure:
            self._record(_measurement(plan, Prepared(failure.status, failure.detail)))

    # --- All of them ------------------------------------------------------------------------------

    def _record(self, one: Measurement) -> None:
        """Where some chunks give other results, others that seem not to are no better."""
        self.found[one.plan] = one
        if one.status == "inaccurate":
            said = {"status": "inaccurate", "detail": one.detail, "seconds": (), "ratios": ()}
            for plan, other in self.found.items():
                if plan != DENSE and other.timed:
                    self.found[plan] = other.model_copy(update=said)
                elif other.status == "pruned":  # beside what is refused now
                    self.found[plan] = other.model_copy(update={"status": "ok", "detail": ""})

    def _joint_rounds(self) -> bool:
        """Whether there was time for them."""
        finalists = best_plans(self.found, self.settings)
        if self._anchor is None or len(finalists) < 2:
            return True
        left = self._end - time.monotonic()
        longest = max(self.settings.joint_seconds, left if left < math.inf else 0.0)
        settings = dataclasses.replace(self.settings, joint_seconds=longest)
        rounds = JointRounds(self.probe, settings, self.found, self._anchor, self._end)
        self.found |= {one.plan: one for one in rounds.run(finalists)}
        return not rounds.cut_short


def _measurement(plan: Plan, prepared: Prepared, *round_: float) -> Measurement:
    """With seconds and a ratio, if it had a round."""
    return Measurement(
        implementation=plan.implementation,
        max_chunk_size_mb=None,
        chunk_sizes=plan.chunk_sizes,
        seconds=round_[:1],
        ratios=round_[1:],
        **asdict(prepared),
    )
