"""What an earlier tune measured and still stands, so that a stronger effort builds on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import LogitsShape, Plan
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.tuner.candidates import equivalent

# What is not one of these was given up for want of time or of memory, which there may be more of
# now, or unmeasured by rules that a stronger effort has its own of.
_STANDING = frozenset({"ok", "pruned", "oom", "inaccurate", "unsupported"})
# A plan this near to the anchor serves in its place: ratios to it are off by no more, and those
# that are close meet in joint rounds before one is chosen.
_AS_FAST = 0.05


def anchor_of(measurements: Iterable[Measurement]) -> Plan | None:
    """The plan that all others were timed beside, or one as fast; None if that cannot be told.

    In joint rounds it is as fast as itself; in rounds of its own it is timed twice, so that its
    ratios scatter about one.
    """
    timed = [measurement for measurement in measurements if measurement.timed]
    exact = next((one.plan for one in timed if set(one.joint_ratios) == {1.0}), None)
    if exact is not None or not timed:
        return exact
    nearest = min(timed, key=_off_the_anchor)
    return nearest.plan if _off_the_anchor(nearest) <= _AS_FAST else None


def what_stands(profile: Profile, budget_bytes: int | None = None) -> list[Measurement]:
    """What need not be measured again on the device of a profile, with the same libraries.

    Joint rounds are as rounds of a plan's own in it: later ones are of other rounds than these.
    What takes more than ``budget_bytes`` of working memory is left out.
    """
    return [
        _with_own_rounds(measurement)
        for measurement in profile.measurements
        if measurement.status in _STANDING and _fits(measurement, budget_bytes)
        if measurement.implementation in IMPLEMENTATIONS  # not of a newer version's
    ]


def under_names_of(
    plans: Sequence[Plan], shape: LogitsShape, measurements: Iterable[Measurement]
) -> list[Measurement]:
    """The same measurements, each of the one of ``plans`` that comes to the same slices.

    Another effort may call that by another limit. Those of no such plan are as they were.
    """
    return [_renamed(one, _same_among(plans, shape, one.plan)) for one in measurements]


def _renamed(measurement: Measurement, plan: Plan) -> Measurement:
    names = {"implementation": plan.implementation, "max_chunk_size_mb": plan.max_chunk_size_mb}
    return measurement.model_copy(update=names)


def _same_among(plans: Sequence[Plan], shape: LogitsShape, plan: Plan) -> Plan:
    if plan in plans:
        return plan
    try:
        return equivalent(plan, plans, shape) or plan
    except ArgumentError:  # a limit that is too small for these sizes
        return plan


def _off_the_anchor(measurement: Measurement) -> float:
    ratio = measurement.ratio
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def _with_own_rounds(measurement: Measurement) -> Measurement:
    """The same by the rounds that say most of it, all of them its own."""
    told = measurement.telling
    times = {"seconds": measurement.seconds[told], "ratios": measurement.ratios[told]}
    return measurement.model_copy(update={"joint": 0, **times})


def _fits(measurement: Measurement, budget_bytes: int | None) -> bool:
    memory: Iterable[int | None] = (measurement.temp_bytes, measurement.predicted_bytes)
    return budget_bytes is None or max(one or 0 for one in memory) <= budget_bytes
