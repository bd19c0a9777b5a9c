"""How far apart two plans' times are, as an interval: what a comparison may rest on.

Times are compared as ratios, so the arithmetic is on their logarithms. From six rounds on nothing
is assumed of how they scatter, but that they do so evenly about their middle: the middle is Hodges
and Lehmann's, the median of the averages of all pairs (1963, "Estimates of location based on rank
tests"), and the interval is that of Wilcoxon's signed-rank test (Tukey 1949, "The simplest
signed-rank tests"). Fewer rounds have no such interval; theirs is Student's.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
# Of more rounds than this the last ones are taken: the averages of all pairs are many.
_MOST_ROUNDS = 100
_LARGEST = 700.0  # whose exponential is still a number

# Student's t for CONFIDENCE, by the number of rounds; with one, there is no telling.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


class Interval(NamedTuple):
    """By what fraction something is more than something else (0.1 is 10%).

    The true value lies from ``low`` (at least -1) to ``high`` (infinite, if nothing is known) with
    CONFIDENCE; ``middle`` is the best guess.
    """

    low: float
    middle: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether it says more or less: zero is not in it."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.high > 1:
            return f"{self.middle:+.0%}, but that is little more than a guess"
        return f"{self.middle:+.0%}, from {self.low:+.0%} to {self.high:+.0%}"


def paired(one: Sequence[float], other: Sequence[float]) -> Interval:
    """How much longer one takes than another, from times of both in the same rounds."""
    pairs = zip(_logarithms(one), _logarithms(other), strict=True)
    differences = [own - others for own, others in pairs]
    return _as_fractions(*_center(differences))


def unpaired(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The same from times in rounds of their own."""
    return _apart(_center(_logarithms(one)), _center(_logarithms(other)))


def change(then: Interval, now: Interval) -> Interval:
    """What became more, as a fraction, between two comparisons with the same thing."""
    return _apart(_center_of(now), _center_of(then))


def _center_of(interval: Interval) -> tuple[float, ...]:
    return tuple(math.log1p(value) if value > -1 else -math.inf for value in interval)


def _apart(one: tuple[float, ...], other: tuple[float, ...]) -> Interval:
    """The difference of two centers with their own intervals.

    As Zou and Donner combine them (2008, "Construction of confidence limits about effect
    measures").
    """
    apart = one[1] - other[1]
    below = math.hypot(one[1] - one[0], other[2] - other[1])
    above = math.hypot(one[2] - one[1], other[1] - other[0])
    return _as_fractions(apart - below, apart, apart + above)


def _logarithms(times: Sequence[float]) -> list[float]:
    """Of times that may be zero, as those of a clock that is too coarse are."""
    return [math.log(max(time, 1e-300)) for time in times]


def _as_fractions(low: float, middle: float, high: float) -> Interval:
    return Interval(*map(_as_fraction, (low, middle, high)))


def _as_fraction(logarithm: float) -> float:
    return math.expm1(logarithm) if logarithm < _LARGEST else math.inf


def _center(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, middle, high) of what values scatter about."""
    return _center_of_last(tuple(values[-_MOST_ROUNDS:]))


@functools.lru_cache(maxsize=4096)
def _center_of_last(values: tuple[float, ...]) -> tuple[float, float, float]:
    if len(values) < 2:
        return -math.inf, values[0] if values else 0.0, math.inf
    averages = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    half = len(averages) // 2
    middle = (averages[half] + averages[-1 - half]) / 2
    if len(values) in _STUDENT:
        error = statistics.stdev(values) / math.sqrt(len(values))
        reach = _STUDENT[len(values)] * error
        return middle - reach, middle, middle + reach
    dropped = _dropped(len(values))
    return averages[dropped], middle, averages[-1 - dropped]


@functools.cache
def _dropped(count: int) -> int:
    """How many averages lie outside the interval at either end.

    The largest signed-rank sum of ``count`` values that is not exceeded with at most the chance
    that CONFIDENCE leaves to one side, counted exactly; of many values approximately.
    """
    chance = (1 - CONFIDENCE) / 2
    if count > 60:
        normal = statistics.NormalDist(count * (count + 1) / 4, _deviation(count))
        return int(normal.inv_cdf(chance))
    ways = [1]  # by sum, the sets of ranks that add up to it
    for rank in range(1, count + 1):
        longer = ways + [0] * rank
        ways = [n + (longer[i - rank] if i >= rank else 0) for i, n in enumerate(longer)]
    below = itertools.accumulate(ways)
    return sum(total <= chance * 2.0**count for total in below) - 1


def _deviation(count: int) -> float:
    return math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
