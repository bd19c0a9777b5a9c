"""Joint rounds: the plans that are close, timed together until it is clear which to choose."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence

from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.tuner.effort import SHORTEST_TIMING, EffortSettings
from autochunk.tuner.probe import OutOfTime, Probe, seconds_left
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.standing import DISTURBED, can_take, undecided

# Of the time that is left, what starting a new process may take.
_SHARE_OF_STARTING = 0.25
# On a CPU, seconds of rounds before plans leave, or a new process goes on, which takes longer.
_LEAST_LOOK = 1.0


class JointRounds:
    """Rounds in which all plans that are still in question are timed, and the anchor.

    Each round has a new random order: a plan may be slower after one that takes much memory. From
    time to time the plans that are decided leave, and where time does not do for all, the slower
    half, so that the best get most of it (Karnin, Koren and Somekh 2013, "Almost optimal
    exploration in multi-armed bandits"). None comes back, so two plans share all rounds from the
    first on. On a CPU the others then go on in a new process: where a process has its memory
    favours some plan in all its rounds. A round in which plans take far longer than they can is
    made again, while time is ample: a host that slows some plans by a third for a few rounds, those
    of many small slices, had them leave.
    """

    def __init__(
        self,
        probe: Probe,
        settings: EffortSettings,
        measured: Mapping[Plan, Measurement],
        anchor: Plan,
        end: float = math.inf,
        ample_until: float = math.inf,
    ) -> None:
        """No further round is begun after ``end``, by ``time.monotonic()``.

        Until ``ample_until`` time is ample: more than half of the plans may stay, as many as have
        more rounds by then.
        """
        self.probe, self.settings, self.measured, self.anchor = probe, settings, measured, anchor
        self._end_of_all, self._ample_until = end, ample_until
        self._rounds: list[dict[Plan, float]] = []
        self._disturbed: list[dict[Plan, float]] = []  # which are better than none
        self._end = math.inf
        self.cut_short = False

    def run(self, finalists: Sequence[Plan]) -> list[Measurement]:
        """The finalists' and the anchor's measurements with joint rounds added.

        Of finalists, best first, no more take part than time is for. Where it ends even so before
        the fewest rounds, ``cut_short`` says that there are fewer.

        Raises:
          OutOfTime: time ran out before there was one round.
        """
        look = self.settings.least_joint
        if self._is_limited:
            look = math.ceil(look / 2)
            finalists = self._that_fit(finalists, look, self._left_of_all())
        playing = list(dict.fromkeys([self.anchor, *finalists]))
        if self._is_on_a_cpu:
            cheap = int(_LEAST_LOOK / self._one_round(playing))
            look = max(look, min(cheap, self.settings.joint_rounds // 2))
        self._end = time.monotonic() + self.settings.joint_seconds
        with contextlib.suppress(WorkerFailure):  # what was measured before stands
            while playing and len(self._rounds) < self.settings.joint_rounds:
                random.shuffle(playing)
                if not self._add_round(playing):
                    break
                if len(self._rounds) == look < self.settings.joint_rounds:
                    # Not after each round: who looks often enough sees what is not there.
                    look = math.ceil(1.5 * look)
                    rounds = look - len(self._rounds)
                    playing = self._in_question(playing, finalists, rounds)
                    self._maybe_restart(playing)
        return [self._measurement(plan) for plan in dict.fromkeys([*finalists, self.anchor])]

    @property
    def _is_on_a_cpu(self) -> bool:
        return self.probe.connect().platform == "cpu"

    @property
    def _is_limited(self) -> bool:
        return self._left_of_all() < math.inf

    def _left_of_all(self) -> float:
        return min(self._end_of_all - time.monotonic(), seconds_left(self.probe.deadline))

    def _left(self) -> float:
        return min(self._end - time.monotonic(), self._left_of_all())

    def _that_fit(self, plans: Sequence[Plan], rounds: int, seconds: float) -> list[Plan]:
        """The first of some plans, two at least, that have so many rounds in half of the time.

        The other half is for the best of them.
        """
        fit: list[Plan] = []
        for plan in plans:
            needed = rounds * self._one_round([*fit, plan])
            if len(fit) >= 2 and 2 * needed > seconds:
                break
            fit.append(plan)
        return fit

    def _one_round(self, plans: Sequence[Plan]) -> float:
        """Seconds of a round of these plans and the anchor."""
        timed = dict.fromkeys([self.anchor, *plans])
        return sum(max(SHORTEST_TIMING, self.measured[plan].seconds_median) for plan in timed)

    def _maybe_restart(self, playing: Sequence[Plan]) -> None:
        """Has the next rounds in a new process, where there is time for it."""
        if not self._is_on_a_cpu:
            return
        compiling = sum(self.measured[plan].compile_seconds or 0.0 for plan in playing)
        # It runs each plan twice before the first round.
        start = self.probe.seconds_to_start + compiling + 2 * self._one_round(playing)
        if playing and start < _SHARE_OF_STARTING * self._left():
            self.probe.restart()

    def _add_round(self, playing: Sequence[Plan]) -> bool:
        """Times plans once more; returns False if time ran out, with enough rounds before."""
        some = bool(self._rounds or self._disturbed)
        over = some and self._end_of_all < time.monotonic()
        try:
            times = [] if over else self.probe.time(playing)
        except OutOfTime:
            if not some:
                raise
            over = True
        if over:
            if len(self._rounds) < self.settings.least_joint:
                self._rounds.extend(self._disturbed)
            self.cut_short = len(self._rounds) < self.settings.least_joint
            return False
        found = dict(zip(playing, times, strict=True))
        in_time = time.monotonic() < min(self._end, self._ample_until)
        disturbed = in_time and self._is_disturbed(found)
        (self._disturbed if disturbed else self._rounds).append(found)
        return True

    def _is_disturbed(self, times: Mapping[Plan, float]) -> bool:
        """Whether two plans, or half of a few, take far longer than they can."""
        slowed = 0
        for plan, seconds in times.items():
            own = (one[plan] for one in (*self._rounds, *self._disturbed) if plan in one)
            slowed += seconds > DISTURBED * can_take((*self.measured[plan].seconds, *own))
        return slowed >= min(2, math.ceil(len(times) / 2))

    def _in_question(
        self, playing: Sequence[Plan], finalists: Sequence[Plan], rounds: int
    ) -> list[Plan]:
        """Of the plans in the last round those that the choice is between, and the anchor.

        They are to have so many rounds before they are looked at again. None where time is over.
        """
        if self._left() <= 0:
            return []
        timed = [plan for plan in playing if plan in finalists]
        if len(self._rounds) < self.settings.least_joint:
            between = sorted(timed, key=self._ratio_so_far)
        else:
            between = undecided(map(self._measurement, timed))
        if self._is_limited:
            ample = min(self._left(), self._ample_until - time.monotonic())
            fit = self._that_fit(between, rounds, ample)
            between = between[: max(len(fit), math.ceil(len(timed) / 2))]
        return list(dict.fromkeys([self.anchor, *between])) if between else []

    def _ratio_so_far(self, plan: Plan) -> float:
        """Of all its rounds: a few joint ones alone may have one that something disturbed."""
        return statistics.median(self._measurement(plan).ratios)

    def _measurement(self, plan: Plan) -> Measurement:
        """With joint rounds it is no longer of a plan that was given up early."""
        old = self.measured[plan]
        own = [times for times in self._rounds if plan in times]
        if not own:
            return old
        seconds = (*old.seconds, *(times[plan] for times in own))
        ratios = (*old.ratios, *(times[plan] / times[self.anchor] for times in own))
        changes = {"seconds": seconds, "ratios": ratios, "joint": old.joint + len(own)}
        return old.model_copy(update={"status": "ok", "detail": "", **changes})
