"""How plans stand by what is measured so far: which may still win, and which need not be tried."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from operator import truediv

from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import Plan
from autochunk.store.choice import DENSE, choose, compare
from autochunk.store.measurement import ENOUGH_JOINT, Measurement
from autochunk.tuner.effort import EffortSettings

# A single ratio is hopeless from this power of what several are.
_SINGLE = 3
# Within this of the best, a plan takes part in the joint rounds: three rounds each were seen to err
# by a tenth, and the best of many plans is one that was lucky.
_CLOSE = 1.2
DISTURBED = 1.25
"""Where something takes so many times as long as it can, something else has the machine's cores.

Virtual ones of a host that others use were seen to halve the speed of some plans, not of all, for
seconds.
"""
SURE = 0.02
"""A choice is clear when no other plan can be faster by more than this."""

Measurements = Mapping[Plan, Measurement]


def best_ratio(measured: Measurements) -> float:
    """The ratio to compare with; the anchor's own, if nothing is measured, is one."""
    ratios = believed(measured)
    finished = (plan for plan, m in measured.items() if m.status == "ok" and m.timed)
    return min((ratios[plan] for plan in finished), default=1.0)


def believed(measured: Measurements) -> dict[Plan, float]:
    """The ratio of each plan that was timed.

    Where the anchor took far longer beside a plan than it can, the ratio flatters the plan: it is
    no less than the plan's own time over what the anchor takes. Joint rounds flatter none.
    """
    flattered = _beside_a_slow_anchor(measured)
    return {
        plan: max(m.ratio, flattered[plan])
        if plan in flattered and m.joint < ENOUGH_JOINT
        else m.ratio
        for plan, m in measured.items()
        if m.timed
    }


def _beside_a_slow_anchor(measured: Measurements) -> dict[Plan, float]:
    """Plans beside which the anchor took far longer than it can: their time over what it can."""
    timed = {plan: m for plan, m in measured.items() if m.timed and all(m.ratios)}  # files have any
    if not timed:
        return {}
    anchors = {
        plan: statistics.median(map(truediv, m.seconds, m.ratios)) for plan, m in timed.items()
    }
    usual = can_take(anchors.values())
    slow = [plan for plan, took in anchors.items() if took > DISTURBED * usual > 0]
    return {plan: timed[plan].seconds_median / usual for plan in slow}


def best_plans(measured: Measurements, settings: EffortSettings) -> list[Plan]:
    """The plans that could still win, best first.

    The second is among them even if it was given up: the first may only have been lucky.
    """
    ranked = sorted((m for m in measured.values() if m.timed), key=lambda m: m.ratio)
    best = min(believed(measured).values(), default=0.0)
    second = [m for m in ranked[1:2] if m.ratio <= settings.hopeless**2 * best]
    close = [m for m in ranked if m.status == "ok" and m.ratio <= _CLOSE * best]
    plans = [m.plan for m in (*close[:1], *second, *close[1:])]
    return list(dict.fromkeys(plans))[: settings.finalists]


def finalists(measured: Measurements, settings: EffortSettings) -> list[Plan]:
    """The best plans, and those that may be as good, since their rounds were disturbed.

    The anchor took far longer in these than it can.
    """
    most = settings.hopeless**2 * best_ratio(measured)
    disturbed = [measured[plan] for plan in _beside_a_slow_anchor(measured)]
    maybe = sorted((m for m in disturbed if m.ratio <= most), key=lambda m: m.ratio)
    return list(dict.fromkeys([*best_plans(measured, settings), *(m.plan for m in maybe)]))


def undecided(measured: Iterable[Measurement]) -> list[Plan]:
    """The plan that would be chosen and those that may be faster by more than SURE, if any are.

    The fastest of these come first.
    """
    measured = list(measured)
    chosen = choose(measured)
    if chosen is None:
        return []
    best = chosen.measurement
    others = [m for m in measured if m is not best and compare(best, m).high > SURE]
    others.sort(key=lambda m: m.ratio)
    return [best.plan, *(m.plan for m in others)] if others else []


def is_hopeless(ratios: Sequence[float], best: float, settings: EffortSettings) -> bool:
    """Whether a plan of these ratios is given up, all but its last having been too few for that.

    After one it takes more, for something else that runs meanwhile was seen to double the time of
    either plan; after two, both.
    """
    lower = min(ratios) if len(ratios) == 2 else statistics.median(ratios)
    return lower > best * settings.hopeless ** (_SINGLE if len(ratios) == 1 else 1)


def is_doubtful(ratios: Sequence[float], best: float, settings: EffortSettings) -> bool:
    """Whether the first ratio is so far from the best plan's that more are needed to believe it."""
    far = max(ratios[0] / best, best / ratios[0]) > settings.hopeless
    return far and not is_hopeless(ratios, best, settings)


def can_take(seconds: Iterable[float]) -> float:
    """What something takes where nothing disturbs it: a quarter of its times are no longer."""
    known = sorted(seconds)
    return known[len(known) // 4]


def beneath_the_hopeless(plan: Plan, measured: Measurements, settings: EffortSettings) -> str:
    """Why a limit need not be tried, if the two next larger that were timed say so; else nothing.

    They get slower as they get smaller, and both are hopeless, or the next larger one is by so much
    that no single bad timing explains it.
    """
    larger = _larger(plan, measured)
    if larger and larger[0].status == "skipped":
        return larger[0].detail
    nearest = [m for m in larger if m.timed][:2]
    slower = [m.ratio / best_ratio(measured) for m in nearest]
    if len(slower) < 2 or slower[0] <= slower[1]:
        return ""
    trend = slower[1] > settings.hopeless and slower[0] > settings.hopeless**2
    if not trend and slower[0] <= settings.hopeless**3:
        return ""
    return _too_slow(nearest[1], nearest[0], measured)


def between_the_hopeless(plan: Plan, measured: Measurements, settings: EffortSettings) -> str:
    """Why a limit need not be tried, if the next larger and the next smaller say so; else nothing.

    Of 1157 such threes in curves of CPUs both neighbours were slower than the best plan by a third
    in 390; of the limits between them one was within a tenth of the best.
    """
    smaller = [m for m in _smaller(plan, measured) if m.timed]
    larger = [m for m in _larger(plan, measured) if m.timed]
    if not smaller or not larger:
        return ""
    around = smaller[-1], larger[0]
    if min(m.ratio for m in around) <= settings.hopeless * best_ratio(measured):
        return ""
    return _too_slow(*around, measured)


def _too_slow(one: Measurement, other: Measurement, measured: Measurements) -> str:
    best = best_ratio(measured)
    return (
        f"limits of {one.max_chunk_size_mb:g} and {other.max_chunk_size_mb:g} MB "
        f"took {one.ratio / best:.1f}x and {other.ratio / best:.1f}x the best time"
    )


def beaten_by_a_kernel(plan: Plan, measured: Measurements, settings: EffortSettings) -> str:
    """Why slices need not be tried, if a fused kernel is that much faster; else nothing.

    Than dense attention, and than all slices so far.
    """
    finished = (m for m in measured.values() if m.status == "ok")
    best = min(finished, key=lambda m: m.ratio, default=None)
    if best is None or not is_fused(best.implementation) or not is_sliced(plan.implementation):
        return ""
    others = [m for m in measured.values() if m.timed and not is_fused(m.implementation)]
    sliced = any(is_sliced(m.implementation) for m in others)
    if not sliced or DENSE not in measured:
        return ""
    least = min(m.ratio for m in others) / best.ratio
    if least < settings.beaten:
        return ""
    return f"{best.plan} is {least:.1f}x as fast as dense attention and slices"


def _larger(plan: Plan, measured: Measurements) -> list[Measurement]:
    """Of the same implementation the larger limits, the smallest first."""
    return [m for limit, m in _limits(plan, measured) if limit > (plan.max_chunk_size_mb or limit)]


def _smaller(plan: Plan, measured: Measurements) -> list[Measurement]:
    """The smaller limits, in the same order."""
    return [m for limit, m in _limits(plan, measured) if limit < (plan.max_chunk_size_mb or limit)]


def _limits(plan: Plan, measured: Measurements) -> list[tuple[float, Measurement]]:
    same = [m for m in measured.values() if m.implementation == plan.implementation]
    limits = [(m.max_chunk_size_mb, m) for m in same if m.max_chunk_size_mb is not None]
    return sorted(limits, key=lambda one: one[0])
