"""Does a profile still hold?

Its chosen plan is timed here and now, beside the baseline that it was compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autochunk.errors import ArgumentError, ProbeError
from autochunk.plan import Plan
from autochunk.store.choice import DEFAULT, DENSE, LARGEST_NOISE, compare
from autochunk.store.interval import Interval, change, paired
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.probe import Probe
from autochunk.tuner.process import WORKER, WorkerFailure

DRIFT = LARGEST_NOISE
"""A choice has drifted if it surely became slower by more than this beside its baseline."""

_EQUAL = Interval(0.0, 0.0, 0.0)
# After which it is looked whether it has drifted. Not after each: who looks often enough sees what
# is not there.
_LOOKS = (7, 14, 28)


@dataclass(frozen=True)
class Verification:
    """What became of a profile's choice.

    Attributes:
      profile: what was verified.
      plan: its chosen plan.
      baseline: the plan it was timed beside; the plan itself where nothing else was measured.
      then, now: by what fraction the plan is slower than the baseline.
      failure: why it could not be timed; empty if it was.
    """

    profile: Profile
    plan: Plan
    baseline: Plan
    then: Interval = _EQUAL
    now: Interval = _EQUAL
    failure: str = ""

    @property
    def change(self) -> Interval:
        """By what fraction the plan became slower beside the baseline (0.1 is 10%, < 0 faster)."""
        return change(self.then, self.now)

    @property
    def drifted(self) -> bool:
        """Whether it surely became slower: tuning again may find a better plan."""
        return self.change.low > DRIFT

    @property
    def clear(self) -> bool:
        """Whether the rounds were enough to tell."""
        return self.drifted or self.change.high <= DRIFT

    @property
    def tellable(self) -> bool:
        """Whether any number of rounds could be enough, by what was stored of the baseline."""
        exact = Interval(*[self.now.middle] * 3)
        return replace(self, now=exact).clear


def verify(profile: Profile, *, worker_command: Sequence[str] = WORKER) -> Verification:
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
    if not best.ratio or not baseline.ratio:
        failure = "the profile has times of zero, which nothing can be compared with"
        return replace(timed, failure=failure)
    try:
        with Probe(worker_command) as probe:
            probe.load(profile.parsed_workload())
            if best.plan == baseline.plan:
                probe.time([best.plan])
                return timed
            return _timed(probe, replace(timed, then=compare(best, baseline)))
    except (ProbeError, WorkerFailure) as error:
        return replace(timed, failure=str(error))


def _timed(probe: Probe, found: Verification) -> Verification:
    own: list[float] = []
    others: list[float] = []
    for look in _LOOKS:
        while len(own) < look:
            seconds, beside = probe.time_beside(found.plan, found.baseline, len(own))
            own.append(seconds)
            others.append(beside)
        found = replace(found, now=paired(own, others))
        if found.clear or not found.tellable:
            break
    return found


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
