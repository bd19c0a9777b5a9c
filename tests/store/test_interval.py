"""Intervals: what rounds of times can tell, and how surely."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autochunk.store.interval import CONFIDENCE, Interval, change, paired, unpaired

times = st.floats(0.2, 5.0)
rounds = st.lists(st.tuples(times, times), min_size=4, max_size=40)


@given(rounds, st.floats(0.1, 10.0))
def test_a_comparison_read_backwards(pairs: list[tuple[float, float]], factor: float) -> None:
    """One against the other is the other against the one, the other way round.

    Neither changes where both take twice as long, as with a slower clock.
    """
    one, other = zip(*pairs, strict=True)
    for compare in (paired, unpaired):
        there, back = compare(one, other), compare(other, one)
        assert there.low <= there.middle <= there.high
        turned = [1 / (1 + value) - 1 for value in reversed(back)]
        assert there == pytest.approx(turned, rel=1e-6, abs=1e-6)
        slower = [[factor * time for time in both] for both in (one, other)]
        assert compare(*slower) == pytest.approx(there, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5, 6, 8, 15, 40, 80])
def test_the_true_difference_is_inside_as_often_as_promised(count: int) -> None:
    """Of times that scatter, some of them far out; a difference of 3%."""
    source = random.Random(count)

    def time() -> float:
        return math.exp(source.gauss(0, 0.3 if source.random() < 0.1 else 0.03))

    trials = 500
    for compare in (paired, unpaired):
        found = (
            compare([1.03 * time() for _ in range(count)], [time() for _ in range(count)])
            for _ in range(trials)
        )
        inside = sum(one.low <= 0.03 <= one.high for one in found)
        # Three standard deviations of a count of so many.
        assert inside >= trials * CONFIDENCE - 3 * math.sqrt(trials * CONFIDENCE * 0.05)


@pytest.mark.parametrize("count", range(2, 13))
def test_the_signed_rank_interval(count: int) -> None:
    """By all signs that the ranks may have, no more than 2.5% lie beyond either end.

    It is the shortest such interval: of six and more rounds one average less would be too few.
    """
    values = [math.exp(2.0**rank) if rank < 9 else math.exp(300.0 + rank) for rank in range(count)]
    sums = sorted(
        sum(itertools.compress(range(1, count + 1), signs))
        for signs in itertools.product((False, True), repeat=count)
    )
    low, _, high = paired(values, [1.0] * count)
    assert low <= high
    if count < 6:
        return
    averages = sorted(
        (math.log(a) + math.log(b)) / 2
        for a, b in itertools.combinations_with_replacement(values, 2)
    )
    outside = sum(average < math.log1p(low) - 1e-9 for average in averages)
    assert sum(total <= outside for total in sums) / len(sums) <= 0.025
    assert sum(total <= outside + 1 for total in sums) / len(sums) > 0.025


def test_one_round_tells_nothing() -> None:
    """Its middle is little more than a guess; of none not even that is there."""
    low, middle, high = paired([2.0], [1.0])
    assert low == -1.0
    assert middle == pytest.approx(1.0)
    assert high > 1e300
    assert not paired([], []).decided


def test_times_of_zero_are_times() -> None:
    """As those of a clock that is too coarse are: equal to each other, less than any other."""
    assert paired([0.0] * 6, [0.0] * 6) == (0.0, 0.0, 0.0)
    assert paired([1.0] * 6, [0.0] * 6).decided


@pytest.mark.parametrize("decided", [(0.1, 0.2, 0.3), (-0.3, -0.2, -0.1)])
def test_decided(decided: tuple[float, float, float]) -> None:
    """Where zero is not inside."""
    assert Interval(*decided).decided
    assert not Interval(-0.1, 0.1, 0.2).decided


def test_change() -> None:
    """From half of something to three quarters of it is half as much again; doubts add up."""
    assert change(Interval(-0.5, -0.5, -0.5), Interval(-0.25, -0.25, -0.25)) == pytest.approx(
        (0.5, 0.5, 0.5)
    )
    one = change(Interval(-0.1, 0.0, 0.1), Interval(0.0, 0.0, 0.0))
    both = change(Interval(-0.1, 0.0, 0.1), Interval(-0.1, 0.0, 0.1))
    assert both.low < one.low < 0 < one.high < both.high
