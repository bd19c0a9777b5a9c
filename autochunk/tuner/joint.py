"""Joint rounds: the plans that are close, timed together until it is clear which to choose."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Mapping, Sequence

from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.tuner.effort import EffortSettings
from autochunk.tuner.probe import OutOfTime, Probe, seconds_left
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.standing import undecided


class JointRounds:
    """Rounds in which all plans that are still in question are timed, and the anchor.

    Each has them in a new random order: a plan that follows one that takes much memory may be
    slower for it. On CPUs they are held in several processes: where memory lies in one favours some
    plan in all its rounds. Those that are clear leave, and do not come back, so that two plans'
    rounds are the same ones from the first on.
    """

    def __init__(
        self,
        probe: Probe,
        settings: EffortSettings,
        measured: Mapping[Plan, Measurement],
        anchor: Plan,
    ) -> None:
        self.probe, self.settings, self.measured, self.anchor = probe, settings, measured, anchor
        self._rounds: list[dict[Plan, float]] = []
        self._per_process = settings.joint_rounds
        self.cut_short = False

    def run(self, finalists: Sequence[Plan]) -> list[Measurement]:
        """The finalists' and the anchor's measurements with joint rounds added.

        Of finalists, best first, no more take part than can have the fewest rounds in the time that
        is left. Where that ends even so, ``cut_short`` says that there are fewer.

        Raises:
          OutOfTime: time ran out before there was one round.
        """
        self._per_process = self._rounds_per_process(finalists[:2])
        finalists = self._that_fit(finalists)
        playing = list(dict.fromkeys([self.anchor, *finalists]))
        start, look = time.monotonic(), self.settings.least_joint
        with contextlib.suppress(WorkerFailure):  # what was measured before stands
            while playing and len(self._rounds) < self.settings.joint_rounds:
                if self._rounds and len(self._rounds) % self._per_process == 0:
                    self.probe.restart()
                random.shuffle(playing)
                if not self._add_round(playing):
                    break
                if len(self._rounds) == look:
                    # Not after each round: who looks often enough sees what is not there.
                    look = math.ceil(1.5 * look)
                    late = time.monotonic() - start > self.settings.joint_seconds
                    playing = [] if late else self._in_question(playing, finalists)
        return [self._measurement(plan) for plan in dict.fromkeys([*finalists, self.anchor])]

    def _rounds_per_process(self, finalists: Sequence[Plan]) -> int:
        """All in one process where there is no time for a second one."""
        anew = self.settings.rounds_per_process
        if self.probe.connect().platform == "cpu" and self._lasts(finalists, anew):
            return anew
        return self.settings.joint_rounds

    def _that_fit(self, finalists: Sequence[Plan]) -> list[Plan]:
        """The first of the finalists, two at least."""
        return next(
            (
                list(finalists[:count])
                for count in range(len(finalists), 2, -1)
                if self._lasts(finalists[:count], self._per_process)
            ),
            list(finalists[:2]),
        )

    def _lasts(self, finalists: Sequence[Plan], per_process: int) -> bool:
        """Whether there is time for the fewest rounds of these plans and the anchor."""
        timed = [self.measured[plan] for plan in dict.fromkeys([self.anchor, *finalists])]
        one_round = sum(measurement.seconds_median for measurement in timed)
        # A new process compiles every plan, and runs it twice.
        compiling = sum(measurement.compile_seconds or 0.0 for measurement in timed)
        anew = self.probe.seconds_to_start + compiling + 2 * one_round
        fewest = self.settings.least_joint
        needed = fewest * one_round + (math.ceil(fewest / per_process) - 1) * anew
        return needed <= seconds_left(self.probe.deadline)

    def _add_round(self, playing: Sequence[Plan]) -> bool:
        """Times plans once more; returns False if time ran out, with enough rounds before."""
        try:
            times = self.probe.time(playing)
        except OutOfTime:
            if not self._rounds:
                raise
            self.cut_short = len(self._rounds) < self.settings.least_joint
            return False
        self._rounds.append(dict(zip(playing, times, strict=True)))
        return True

    def _in_question(self, playing: Sequence[Plan], finalists: Sequence[Plan]) -> list[Plan]:
        """Of the plans in the last round those that the choice is between, and the anchor."""
        between = undecided(self._measurement(plan) for plan in playing if plan in finalists)
        return list(dict.fromkeys([self.anchor, *between])) if between else []

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
