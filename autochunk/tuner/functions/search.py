"""The search over one function's plans: the whole call, then the range coarsely, then the best.

Each plan is timed beside one fixed plan, the anchor. One that is hopeless after a round gets no
second one, and smaller chunks than two that were slower and slower are not tried. Where time is
limited plans have fewer rounds, and no further one is begun after half of it: the other half is for
joint rounds of the best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

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
from autochunk.tuner.standing import best_plans, best_ratio

_SHARE_OF_PLANS = 0.5
"""Of the time, after which no further plan is begun."""

# Chunks cost less to try than slices of attention, of which there are several kinds.
_MORE_CHUNKS = 4
# How many of the best have their neighbours tried: the first may only have been lucky.
_LEADERS = 2
_COARSEST_STEP = 4
"""Of an effort that looks at what is coarse, and at what is beside the best, alone."""


class Search:
    """The measurements of one function, as they come.

    Attributes:
      found: by plan.
      failure: why none could be made, if so.
    """

    def __init__(
        self,
        call: FunctionCall,
        probe: Probe,
        settings: EffortSettings,
        only: Iterable[Sequence[int]] | None = None,
    ) -> None:
        self.call, self.probe = call, probe
        # Of plans with fewer rounds more may be the best.
        self.settings = dataclasses.replace(settings, finalists=2 * settings.finalists)
        self._candidates = Candidates(call.sizes, _MORE_CHUNKS * settings.most_slices, only)
        self.found: dict[Plan, Measurement] = {}
        self.failure = ""
        self._anchor: Plan | None = None
        self._end = self._end_of_all = math.inf
        self._seen: dict[Plan, Prepared] = {}
        self._begun: dict[Plan, Any] = {}  # a first round
        self._preparing: list[float] = []  # seconds that it took for each plan

    def run(self, seconds: float = math.inf) -> bool:
        """Measures what is worth it; whether so much time was enough.

        It was where the whole range, the neighbours of the best and the joint rounds are done.
        """
        start = time.monotonic()
        self._end, self._end_of_all = start + _SHARE_OF_PLANS * seconds, start + seconds
        try:
            self.probe.load(self.call)
            complete = self._measure_plans()
            self._refuse_mixing()
            return self._joint_rounds() and complete
        except OutOfTime:
            return False
        except ProbeError as error:
            self.failure = str(error)
            return False

    # --- Which plans ------------------------------------------------------------------------------

    def _measure_plans(self) -> bool:
        """Whether there was time for all that belongs to a search."""
        coarse = [self._candidates.whole, *self._candidates.coarse()]
        self._find_anchor(coarse)
        coarse.sort(key=lambda sizes: self._plan(sizes) != self._anchor)
        for number, sizes in enumerate(coarse):
            self._measure(sizes, len(coarse) - number - 1)
        while todo := list(self._todo(self._beside_the_best())):
            if self._is_late:
                return False
            self._measure(todo[0], len(todo) - 1)
        if self.settings.step < _COARSEST_STEP:
            todo = list(self._todo(self._candidates.fine()))
            for number, sizes in enumerate(todo):
                if not self._is_late:
                    self._measure(sizes, len(todo) - number - 1)
        return True

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self._end

    def _todo(self, several: Iterable[Sizes]) -> Iterator[Sizes]:
        """Those that are not measured; none, once some are seen to give other results."""
        if not self._wrong():
            yield from (one for one in several if self._plan(one) not in self.found)

    def _beside_the_best(self) -> Iterator[Sizes]:
        timed = [m for m in self.found.values() if m.status == "ok"]
        for one in sorted(timed, key=lambda m: m.ratio)[:_LEADERS]:
            yield from self._candidates.neighbours(one.chunk_sizes or self._candidates.whole)

    def _plan(self, sizes: Sizes) -> Plan:
        return DENSE if sizes == self._candidates.whole else Plan(CHUNKS, None, sizes)

    def _needless(self, sizes: Sizes) -> str:
        """Why it need not be tried, if two larger ones say so; else nothing."""
        timed = {m.chunk_sizes: m for m in self.found.values() if m.timed and m.chunk_sizes}
        nearest = [timed[one] for one in self._candidates.larger(sizes, timed)[:2]]
        slower = [m.ratio / best_ratio(self.found) for m in nearest]
        hopeless = self.settings.hopeless
        if len(slower) < 2 or slower[1] < hopeless or slower[0] < max(hopeless**2, slower[1]):
            return ""
        return (
            f"{nearest[1].plan} and {nearest[0].plan} took {slower[1]:.1f}x and {slower[0]:.1f}x "
            "the best time"
        )

    def _find_anchor(self, coarse: Sequence[Sizes]) -> None:
        """Takes the whole call, or if that is slow or does not fit, chunks in the middle.

        The whole call is computed first in any case: others' results are compared with its.
        """
        plans = map(self._plan, coarse)
        runs = [plan for plan in itertools.islice(plans, 2) if self._prepared(plan).status == "ok"]
        if len(runs) < 2:
            self._anchor = next(iter(runs), None)
            return
        with contextlib.suppress(WorkerFailure):  # which is met again where it is measured
            seconds = self.probe.time(runs)
            whole, middle = seconds
            self._anchor = runs[middle * self.settings.hopeless < whole]
            first = seconds[runs.index(self._anchor)]
            self._begun = {
                plan: (one, one / first) for plan, one in zip(runs, seconds, strict=True)
            }

    # --- One plan ---------------------------------------------------------------------------------

    def _measure(self, sizes: Sizes, left: int) -> None:
        """Measures a plan, after which so many are to follow."""
        if not self._wrong():
            plan = self._plan(sizes)
            why_not = self._needless(sizes)
            skipped = Prepared("skipped", why_not)
            self.found[plan] = (
                _measurement(plan, skipped) if why_not else self._measured(plan, left)
            )

    def _measured(self, plan: Plan, left: int) -> Measurement:
        prepared = self._prepared(plan)
        if prepared.status != "ok":
            self.failure = self.failure or f"{prepared.status}: {prepared.detail}"
            return _measurement(plan, prepared)
        self._anchor = self._anchor or plan
        try:
            seconds, ratios, given_up = self._timed(plan, left)
        except WorkerFailure as failure:
            return _measurement(plan, Prepared(failure.status, failure.detail))
        if given_up:
            self.probe.drop(plan)
            prepared = dataclasses.replace(prepared, status="pruned", detail=given_up)
        return _measurement(plan, prepared, seconds, ratios)

    def _prepared(self, plan: Plan) -> Prepared:
        if plan not in self._seen:
            start = time.monotonic()
            self._seen[plan] = self.probe.prepare(plan)
            self._preparing.append(time.monotonic() - start)
        return self._seen[plan]

    def _timed(self, plan: Plan, left: int) -> tuple[list[float], list[float], str]:
        """Seconds and ratios to the anchor, and why the plan was given up, if it was."""
        rounds: list[tuple[float, float]] = []
        start = time.monotonic()
        while len(rounds) < self.settings.rounds:
            rounds.append(self._begun.pop(plan, ()) or self._round(plan, len(rounds)))
            seconds, ratios = map(list, zip(*rounds, strict=True))
            taken = time.monotonic() - start
            fewest = self._fewest_rounds(left, taken / len(ratios))
            slower = statistics.median(ratios) / best_ratio(self.found)
            most = self.settings.hopeless ** (2 if len(ratios) == 1 else 1)
            few = plan == DENSE and len(ratios) < fewest  # what users compare with
            if slower > most and plan != self._anchor and not few:
                return seconds, ratios, f"{slower:.1f}x the best time"
            short = fewest < self.settings.least_rounds or taken > self.settings.seconds
            if short and len(ratios) >= fewest:
                break
        return seconds, ratios, ""

    def _round(self, plan: Plan, step: int) -> tuple[float, float]:
        """Seconds of a plan, and their ratio to the anchor's."""
        assert self._anchor is not None
        if plan == self._anchor:
            return self.probe.time([plan])[0], 1.0
        own, anchors = self.probe.time_beside(plan, self._anchor, step)
        return own, own / anchors

    def _fewest_rounds(self, left: int, seconds: float) -> int:
        """How many of so many seconds each plan has at least, if time is to do for all."""
        most = self.settings.least_rounds
        if self._end == math.inf:
            return most
        each = (self._end - time.monotonic()) / (left + 1) - statistics.mean(self._preparing)
        return min(most, max(1, int(each / max(seconds, 1e-6))))

    # --- All of them ------------------------------------------------------------------------------

    def _wrong(self) -> list[Measurement]:
        return [one for one in self.found.values() if one.status == "inaccurate"]

    def _refuse_mixing(self) -> None:
        """Where some chunks give other results, others that seem not to are no better."""
        wrong = self._wrong()
        for plan, one in self.found.items():
            if wrong and plan.chunk_sizes is not None and one.timed:
                said = {"status": "inaccurate", "detail": wrong[0].detail, "seconds": ()}
                refused = said | {"ratios": (), "joint": 0}
                self.found[plan] = one.model_copy(update=refused)

    def _joint_rounds(self) -> bool:
        """Whether there was time for them."""
        finalists = best_plans(self.found, self.settings)
        if self._anchor is None or len(finalists) < 2:
            return True
        left = self._end_of_all - time.monotonic()
        more = self.settings.joint_seconds if left == math.inf else max(0.0, left)
        settings = dataclasses.replace(
            self.settings, joint_seconds=max(self.settings.joint_seconds, more)
        )
        end = max(self._end_of_all, time.monotonic() + self.settings.joint_seconds)
        rounds = JointRounds(self.probe, settings, self.found, self._anchor, end)
        self.found |= {one.plan: one for one in rounds.run(finalists)}
        return not rounds.cut_short


def _measurement(
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
