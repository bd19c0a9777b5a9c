"""Does a profile still hold? Its chosen plan is timed here and now, beside the baseline it was
compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autochunk.errors import ArgumentError, ProbeError
from autochunk.plan import Plan
from autochunk.store.profile import DEFAULT, DENSE, Measurement, Profile, relative_spread
from autochunk.tuner.probe import WORKER, Probe, WorkerFailure

# A ratio of two times has drifted if it changed by more than this and by more than twice its
# spread.
DRIFT = 0.10


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
        """By what fraction the plan became slower (0.1 is 10%) or, negative, faster, in relation to
        the baseline.
        """
        return self.now / self.then - 1

    @property
    def drifted(self) -> bool:
        """Whether it became slower beyond noise: tuning again may find a better plan."""
        return self.change > max(DRIFT, 2 * self.spread)


def verify(
    profile: Profile, *, rounds: int = 7, worker_command: Sequence[str] = WORKER
) -> Verification:
    """Times a profile's chosen plan and its baseline in alternating rounds, in a process of their
    own.

    Raises:
      ArgumentError: the profile chooses no plan.
    """
    choice = profile.choose()
    if choice is None:
        raise ArgumentError(
            f"the profile of {profile.workload} chooses no plan, so that there is none to verify"
        )
    best, baseline = choice.measurement, _baseline(profile, choice.measurement)
    try:
        with Probe(worker_command) as probe:
            probe.load(profile.parsed_workload())
            ratios = [_ratio(probe, best.plan, baseline.plan, number) for number in range(rounds)]
    except (ProbeError, WorkerFailure) as error:
        return Verification(profile, best.plan, baseline.plan, failure=str(error))
    if not best.ratio or not baseline.ratio:
        return Verification(
            profile,
            best.plan,
            baseline.plan,
            failure="the profile has times of zero, which nothing can be compared with",
        )
    then = best.ratio / baseline.ratio
    return Verification(
        profile,
        best.plan,
        baseline.plan,
        then,
        statistics.median(ratios),
        relative_spread(ratios) or 0.0,
    )


def _baseline(profile: Profile, best: Measurement) -> Measurement:
    """Another plan that was timed, to compare with.

    Of the baselines and the rest the fastest, for it takes the least time and memory.
    """
    others = [
        found
        for plan in (DEFAULT, DENSE)
        if (found := profile.baseline(plan)) is not None and found.plan != best.plan
    ]
    others = others or [m for m in profile.measurements if m.timed and m.plan != best.plan]
    return min(others, key=lambda m: (m.ratio, str(m.plan)), default=best)


def _ratio(probe: Probe, plan: Plan, baseline: Plan, number: int) -> float:
    if plan == baseline:
        probe.time([plan])
        return 1.0
    times = probe.time([baseline, plan] if number % 2 else [plan, baseline])
    return times[1] / times[0] if number % 2 else times[0] / times[1]
