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
from autochunk.tuner.effort import EffortSettings
from autochunk.tuner.probe import OutOfTime, Probe
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.standing import undecided


class JointRounds:
    """Rounds in which all plans that are still in question are timed, and the anchor.

    Each has them in a new random order: a plan that follows one that takes much memory may be
    slower for it. Those that are clear leave, and do not come back, so that two plans' rounds are
    the same ones from the first on.
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
        self.cut_short = False

    def run(self, finalists: Sequence[Plan]) -> list[Measurement]:
        """The finalists' and the anchor's measurements with joint rounds added.

        Of finalists, best first, no more take part than can have the fewest rounds in the time that
        is left. Where that ends even so, ``cut_short`` says that there are fewer.

        Raises:
          OutOfTime: time ran out before there was one round.
        """
        finalists = self._that_fit(finalists)
        playing = list(dict.fromkeys([self.anchor, *finalists]))
        start, look = time.monotonic(), self.settings.least_joint
        with contextlib.suppress(WorkerFailure):  # what was measured before stands
            while playing and len(self._rounds) < self.settings.joint_rounds:
                random.shuffle(playing)
                if not self._add_round(playing):
                    break
                if len(self._rounds) == look:
                    # Not after each round: who looks often enough sees what is not there.
                    look = math.ceil(1.5 * look)
                    late = time.monotonic() - start > self.settings.joint_seconds
                    playing = [] if late else self._in_question(playing, finalists)
        return [self._measurement(plan) for plan in dict.fromkeys([*finalists, self.anchor])]

    def _that_fit(self, finalists: Sequence[Plan]) -> list[Plan]:
        """The first of the finalists, two at least."""
        if self.probe.deadline is None:
            return list(finalists)
        left = self.probe.deadline - time.monotonic()
        fit: list[Plan] = []
        for plan in finalists:
            timed = dict.fromkeys([self.anchor, *fit, plan])
            one_round = sum(statistics.median(self.measured[one].seconds) for one in timed)
            if len(fit) >= 2 and self.settings.least_joint * one_round > left:
                break
            fit.append(plan)
        return fit

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
