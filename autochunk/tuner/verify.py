"""Does a profile still hold?

Its chosen plan is timed here and now, beside the baseline that it was compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autochunk.errors import ArgumentError, ProbeError
from autochunk.plan import Plan
from autochunk.store.choice import DEFAULT, DENSE
from autochunk.store.measurement import Measurement, relative_spread
from autochunk.store.profile import Profile
from autochunk.tuner.probe import Probe
from autochunk.tuner.process import WORKER, WorkerFailure

DRIFT = 0.10
"""A ratio of two times has drifted if it changed by more, and by more than twice its spread."""


@dataclass(frozen=True)
class Verification:
    """What became of a profile's choice.

    Attributes:
      profile: what was verified.
      plan: its chosen plan.
      baseline: the plan it was timed beside; the plan itself where nothing else was measured.
      then, now: time of the plan over the baseline's.
      spread: half the interquartile range of ``now``'s rounds, relative to it.
      failure: why it could not be timed; empty if it was.
    """

    profile: Profile
    plan: Plan
    baseline: Plan
    then: float = 1.0
    now: float = 1.0
    spread: float = 0.0
    failure: str = ""

    @property
    def change(self) -> float:
        """By what fraction the plan became slower beside the baseline (0.1 is 10%, < 0 faster)."""
        return self.now / self.then - 1

    @property
    def drifted(self) -> bool:
        """Whether it became slower beyond noise: tuning again may find a better plan."""
        return self.change > max(DRIFT, 2 * self.spread)


def verify(
    profile: Profile, *, rounds: int = 7, worker_command: Sequence[str] = WORKER
) -> Verification:
    """Times a profile's chosen plan and its baseline in turn, in a process of their own.

    Raises:
      ArgumentError: the profile chooses no plan.
    """
    choice = profile.choose()
    if choice is None:
        raise ArgumentError(
            f"the profile of {profile.workload} chooses no plan, so that there is none to verify"
        )
    best, baseline = choice.measurement, _baseline(profile, choice.measurement)
    timed = Verification(profile, best.plan, baseline.plan)
    try:
        with Probe(worker_command) as probe:
            probe.load(profile.parsed_workload())
            ratios = [_ratio(probe, best.plan, baseline.plan, step) for step in range(rounds)]
    except (ProbeError, WorkerFailure) as error:
        return replace(timed, failure=str(error))
    if not best.ratio or not baseline.ratio:
        return replace(
            timed, failure="the profile has times of zero, which nothing can be compared with"
        )
    return replace(
        timed,
        then=best.ratio / baseline.ratio,
        now=statistics.median(ratios),
        spread=relative_spread(ratios) or 0.0,
    )


def _baseline(profile: Profile, best: Measurement) -> Measurement:
    """Another plan that was timed, to compare with: the fastest, which takes least time and memory.

    It is one of those that users compare with, if one of them was timed and is not the plan itself.
    """
    usual = [found for plan in (DEFAULT, DENSE) if (found := profile.baseline(plan))]
    timed = [measurement for measurement in profile.measurements if measurement.timed]
    others = _without(best, usual) or _without(best, timed)
    return min(others, key=lambda m: (m.ratio, str(m.plan)), default=best)


def _without(best: Measurement, measurements: list[Measurement]) -> list[Measurement]:
    return [measurement for measurement in measurements if measurement.plan != best.plan]


def _ratio(probe: Probe, plan: Plan, baseline: Plan, step: int) -> float:
    """The plan's time over the baseline's in one round."""
    if plan == baseline:
        probe.time([plan])
        return 1.0
    own, others = probe.time_beside(plan, baseline, step)
    return own / others
