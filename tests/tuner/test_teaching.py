"""Which few of many missed workloads are measured."""

from __future__ import annotations

import itertools
import math

from factories import make_workload
from hypothesis import given
from hypothesis import strategies as st

from autochunk.tuner.teaching import representatives
from autochunk.workload import Workload

_SHAPES = st.builds(
    lambda t, b, causal, mode: make_workload(f"b={b},t={t},k=32,causal={causal}", mode=mode),
    st.integers(1, 5000),
    st.integers(1, 40),
    st.sampled_from(["yes", "no"]),
    st.sampled_from(["forward", "training"]),
)
_WANTED = st.dictionaries(_SHAPES, st.integers(1, 1000), max_size=20)


def lengths(*wanted: int) -> dict[Workload, int]:
    return {make_workload(f"t={t},k=32"): 1 for t in wanted}


def radius(chosen: list[Workload], wanted: dict[Workload, int]) -> float:
    """Of workloads that differ in length only, how many doublings the farthest is from any."""
    return max(
        min(abs(math.log2(one.query_length / other.query_length)) for other in chosen)
        for one in wanted
    )


@given(wanted=_WANTED, most=st.integers(0, 25), data=st.data())
def test_they_are_of_the_wanted_and_no_order_decides(
    wanted: dict[Workload, int], most: int, data: st.DataObject
) -> None:
    """Each once, as many as there may be; with time for fewer, the first of them."""
    chosen = representatives(wanted, most)
    assert len(chosen) == len(set(chosen)) == min(most, len(wanted))
    assert set(chosen) <= set(wanted)
    other_order = dict(data.draw(st.permutations(list(wanted.items()))))
    assert representatives(other_order, most) == chosen
    assert representatives(wanted, most - 1) == chosen[: max(0, most - 1)]


@given(wanted=_WANTED)
def test_each_family_comes_before_a_second_of_any(wanted: dict[Workload, int]) -> None:
    """What is known of one tells nothing of another; the most wanted is first."""
    families = [one.family for one in representatives(wanted, len(wanted))]
    count = len(set(families))
    assert len(set(families[:count])) == count
    totals = [sum(n for one, n in wanted.items() if one.family == name) for name in families]
    assert totals[:count] == sorted(totals[:count], reverse=True)


@given(lengths_=st.sets(st.integers(1, 10_000), min_size=1, max_size=9), most=st.integers(1, 4))
def test_none_is_more_than_twice_as_far_as_it_must_be(lengths_: set[int], most: int) -> None:
    """Gonzalez's bound, against the best of all choices."""
    wanted = lengths(*lengths_)
    chosen = representatives(wanted, most)
    every = itertools.combinations(wanted, min(most, len(wanted)))
    best = min(radius(list(one), wanted) for one in every)
    assert radius(chosen, wanted) <= 2 * best + 1e-9


def test_they_are_spread_geometrically() -> None:
    """Of lengths from 64 to 4096 five leave none a doubling and a half away, most are long."""
    wanted = lengths(*range(64, 4097, 32))
    assert radius(representatives(wanted, 5), wanted) < 1.5


def test_what_is_asked_for_more_often_comes_before_what_is_a_little_farther() -> None:
    """Not before what is much farther."""
    known, short = [make_workload("t=512,k=32")], make_workload("t=128,k=32")
    for count, length, first in ((1, 2304, 2304), (4, 2304, 128), (4, 2**17, 2**17)):
        wanted = lengths(128, length) | {short: count}
        assert representatives(wanted, 1, known)[0].query_length == first


def test_what_is_near_to_what_is_known_comes_last() -> None:
    """A second tune goes on where the first one left gaps."""
    wanted = lengths(100, 1000, 3000)
    known = [make_workload("t=110,k=32"), make_workload("t=3000,k=64,causal=yes")]
    assert [one.query_length for one in representatives(wanted, 3, known)][-1] == 100
    assert representatives(wanted, 1, known) == [make_workload("t=3000,k=32")]
