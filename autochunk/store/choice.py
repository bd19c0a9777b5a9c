"""How a choice follows from measurements.

It is made when a profile is read, not when it is stored, so that a memory budget, or a better rule
in a later version, needs no new measurement.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import BYTES_PER_MB, CHUNKS, DEFAULT_MAX_CHUNK_SIZE_MB, Plan
from autochunk.store.interval import Interval, paired, unpaired
from autochunk.store.measurement import ENOUGH_JOINT, Measurement, Record

# Times closer than this are equal for a user, however many repeats could tell them apart.
SAME_TIME = 0.01
# Times further apart than this are different, however noisy the machine was: a choice for its
# memory may not cost more time.
LARGEST_NOISE = 0.03

# A plan is chosen for its memory only where it is certain to cost no more time than this.
MOST_COST = 0.05

# Fewer rounds than this tell nothing of small differences, whatever they say.
_FEWEST = 3
_GREAT_DIFFERENCE = 0.25

# A choice that may be wrong by this factor is none that anything is known of.
_NO_TELLING = 1.0

# The baselines: what a user would run without autochunk, and without a profile.
DENSE = Plan("dense", None)
DEFAULT = Plan("xla", DEFAULT_MAX_CHUNK_SIZE_MB)


class Choice(Record):
    """The plan that measurements recommend, and why.

    Attributes:
      measurement: what was measured of it.
      reason: why this one, in words.
      rejected: the other plans, each with what spoke against it.
      among: what was measured of all plans that could have been chosen.
    """

    measurement: Measurement
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    among: tuple[Measurement, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.measurement.plan

    @property
    def within(self) -> float | None:
        """How much faster another of those plans could be at most: 0.02 is "within 2%".

        By the intervals of the comparisons with those that were timed to the end; None where these
        are too few rounds to tell.
        """
        best = self.measurement
        others = [m for m in self.among if m.status == "ok" and m is not best]
        largest = max((compare(best, other).high for other in others), default=0.0)
        return max(0.0, largest) if largest < _NO_TELLING else None


def choose(
    measurements: Iterable[Measurement],
    *,
    memory_budget_mb: float | None = None,
    implementation: str | None = None,
    without: Collection[str] = (),
) -> Choice | None:
    """The best plan by its measurements; None if none can be recommended.

    It takes the fastest plan whose working memory fits ``memory_budget_mb`` (10^6 bytes). Among
    plans whose times cannot be told from the fastest's, and are at most MOST_COST longer, it takes
    the one with least memory. It never takes one slower than dense attention where dense fits.
    ``implementation`` narrows the choice to one, ``without`` leaves some out. A plan that was given
    up early was slower than another; it counts only where a budget, these two arguments or missing
    libraries have excluded all plans that were timed to the end.
    """
    measurements = list(measurements)
    unwanted = [_unwanted(m.implementation, implementation, without) for m in measurements]
    narrowed = memory_budget_mb is not None or implementation is not None or any(unwanted)
    judged = [
        (m, why or _objection(m, memory_budget_mb, narrowed=narrowed))
        for m, why in zip(measurements, unwanted, strict=True)
    ]
    fitting = [measurement for measurement, objection in judged if not objection]
    if not fitting:
        return None
    # Those that met in joint rounds were faster than all others, whose ratios are of other rounds,
    # and those that were in most of them than those that left.
    most = max(m.joint for m in fitting)
    finalists = [m for m in fitting if m.joint == most] if most >= ENOUGH_JOINT else fitting
    # Ties end with the plan's name, so that the order of the measurements decides nothing.
    fastest = min(finalists, key=lambda m: (m.ratio, m.spread, str(m.plan)))
    equal = [m for m in fitting if m is fastest or _as_fast(m, fastest)]
    dense = next((m for m in fitting if m.plan == DENSE), None)
    no_slower = [m for m in equal if dense is None or slower_by(m, dense) <= 0]
    # By the rounds that it had with dense even the fastest may be slower than that.
    best = min(no_slower, key=_memory_then_time) if no_slower or dense is None else dense
    others = [(m, _comparison(m, best, fastest)) for m in fitting if m is not best]
    unfit = [(m, _as_measured(m, best, objection)) for m, objection in judged if objection]
    return Choice(
        measurement=best,
        reason=_reason(best, fastest, equal),
        rejected=tuple((str(m.plan), against) for m, against in (*unfit, *others)),
        among=tuple(fitting),
    )


def _reason(best: Measurement, fastest: Measurement, equal: list[Measurement]) -> str:
    if best is fastest:
        return "fastest"
    if best in equal:
        return f"least memory of {len(equal)} plans whose times cannot be told apart"
    whole = "the whole call" if fastest.implementation == CHUNKS else "dense attention"
    return f"no other plan is faster than {whole}"


def least_memory(
    measurements: Iterable[Measurement], implementation: str | None = None
) -> Measurement | None:
    """The one, of those that were timed, that takes least working memory; None if there is none.

    ``implementation`` narrows it to one.
    """
    wanted = (m for m in measurements if not _unwanted(m.implementation, implementation))
    timed = [m for m in wanted if not _objection(m, math.inf, narrowed=True)]
    return min(timed, key=_memory_then_time, default=None)


def compare(one: Measurement, other: Measurement) -> Interval:
    """By what fraction ``one`` is slower than ``other``, as far as their rounds can tell.

    From the joint rounds that both were in, if there are enough of them; else from their own.
    """
    together, ratios, others = _rounds(one, other)
    return paired(ratios, others) if together else unpaired(ratios, others)


def _rounds(one: Measurement, other: Measurement) -> tuple[bool, Sequence[float], Sequence[float]]:
    """Whether the rounds to compare by are joint ones, and the ratios of either in them."""
    if (common := min(one.joint, other.joint)) >= ENOUGH_JOINT:
        return True, one.joint_ratios[:common], other.joint_ratios[:common]
    return False, one.own_ratios, other.own_ratios


def slower_by(one: Measurement, other: Measurement) -> float:
    """By what fraction ``one`` is slower (0.1 is 10%); 0 where times cannot be told apart."""
    _, ratios, others = _rounds(one, other)
    least = statistics.median(others)
    difference = statistics.median(ratios) / least - 1 if least else 0.0
    enough = min(len(ratios), len(others)) >= _FEWEST
    # An interval takes a while, and is asked only where it decides.
    if abs(difference) <= SAME_TIME:
        return 0.0
    if abs(difference) > (LARGEST_NOISE if enough else _GREAT_DIFFERENCE):
        return difference
    low, _, high = compare(one, other)
    return difference if (low > 0 and difference > 0) or (high < 0 and difference < 0) else 0.0


def _as_fast(one: Measurement, other: Measurement) -> bool:
    """Whether one is no slower than another, and certainly not by more than MOST_COST."""
    return not slower_by(one, other) and compare(one, other).high <= MOST_COST


def _memory(measurement: Measurement) -> int:
    return measurement.temp_bytes or 0


def _memory_then_time(measurement: Measurement) -> tuple[int, float, str]:
    return _memory(measurement), measurement.ratio, str(measurement.plan)


def _objection(measurement: Measurement, memory_budget_mb: float | None, *, narrowed: bool) -> str:
    """Why a measurement of a plan that may be chosen cannot be; empty if it can.

    ``narrowed`` is whether one that was faster may be left out.
    """
    if measurement.status == "pruned" and not narrowed:
        return f"given up early, {measurement.detail or 'too slow'}"
    if not measurement.timed:
        return ": ".join(filter(None, (measurement.status, measurement.detail)))
    memory = _memory(measurement)
    if memory_budget_mb is not None and memory > memory_budget_mb * BYTES_PER_MB:
        return (
            f"{memory / 1e6:.0f} MB of working memory is over the budget of {memory_budget_mb:g} MB"
        )
    return ""


def _unwanted(name: str, implementation: str | None, without: Collection[str] = ()) -> str:
    """Why an implementation cannot be chosen, however fast; empty if it can."""
    if implementation is not None and name != implementation:
        return f"implementation={implementation!r} was asked for"
    if name == CHUNKS:
        return ""
    if name not in IMPLEMENTATIONS:
        return "this version of autochunk has no such implementation"
    if name in without:
        return "a fused kernel, which does not take this call"
    if not IMPLEMENTATIONS[name].installed:
        return IMPLEMENTATIONS[name].how_to_install
    return ""


def _as_measured(measurement: Measurement, best: Measurement, objection: str) -> str:
    """An objection; for what is not installed also what it would bring."""
    name = measurement.implementation
    missing = name in IMPLEMENTATIONS and not IMPLEMENTATIONS[name].installed
    if not missing or not measurement.timed or not measurement.ratio:
        return objection
    return f"{objection}; it was {best.ratio / measurement.ratio:.2f}x as fast as the choice"


def _comparison(other: Measurement, best: Measurement, fastest: Measurement) -> str:
    """What speaks against a measurement that could have been chosen."""
    memory = f"{(_memory(other) - _memory(best)) / 1e6:+.0f} MB of working memory"
    if slower := slower_by(other, best):
        return f"{slower:+.0%} time, {memory}"
    # two plans may each be near a third and not near each other
    if behind := slower_by(other, fastest):
        return f"{behind:+.0%} time against the fastest, {memory}"
    return f"as fast, {memory}"
