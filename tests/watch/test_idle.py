"""When a device is idle, and at which hours it may be used: decided by what was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autochunk.errors import ArgumentError
from autochunk.watch.idle import Hours, Look, Quiet, Threshold

CPU = Threshold.of("cpu", 8)
GPU = Threshold.of("gpu", 8)


@pytest.mark.parametrize(
    ("threshold", "look", "measuring", "why"),
    [
        (CPU, Look(cores=0.1, free=0.9), False, ""),
        (CPU, Look(cores=0.5, free=0.9), False, "0.5 cores"),
        (CPU, Look(cores=0.5, free=0.9), True, "0.5 cores"),
        (CPU, Look(cores=0.0, free=0.1), False, "10% of the memory"),
        (CPU, Look(cores=0.0, free=0.1), True, ""),
        (Threshold.of("cpu", 8, 2.0), Look(cores=1.9), False, ""),
        (Threshold.of("cpu", 8, 2.0), Look(cores=2.1), False, "2.1 cores"),
        (GPU, Look(cores=3.0, programs=0, utilization=0.0, free=0.99), False, ""),
        (GPU, Look(cores=5.0, programs=0), False, "5.0 cores"),
        (GPU, Look(programs=1), False, "1 programs"),
        (GPU, Look(programs=1, utilization=1.0, free=0.1), True, ""),
        (GPU, Look(programs=2), True, "2 programs"),
        (GPU, Look(programs=0, utilization=0.5), False, "50% of the time"),
        (GPU, Look(programs=0, free=0.5), False, "50% of the memory"),
    ],
)
def test_who_is_at_work(threshold: Threshold, look: Look, measuring: bool, why: str) -> None:
    """While it measures, a service's own use of the GPU and of memory is no other's work."""
    found = threshold.busy(look, measuring=measuring)
    assert why in found
    assert bool(found) == bool(why)


def test_what_cannot_be_told() -> None:
    """A CPU's load, or a GPU's programs: without those nobody can say that it is idle."""
    assert CPU.tells(Look(cores=0.0))
    assert not CPU.tells(Look(programs=0))
    assert GPU.tells(Look(programs=0))
    assert not GPU.tells(Look(cores=0.0))


def test_it_is_quiet_since_nobody_was_seen() -> None:
    """Whoever is seen in between, for a moment, begins it anew."""
    quiet = Quiet()
    seen = [("", 10.0), ("", 15.0), ("work", 16.0), ("", 17.0), ("", 20.0)]
    assert [quiet.saw(*one) for one in seen] == [0.0, 5.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22-6", (22 * 60, 0, 5 * 60 + 59), (21 * 60 + 59, 6 * 60, 12 * 60)),
        ("9-17", (9 * 60, 16 * 60), (17 * 60, 8 * 60 + 59, 0)),
        ("22:30-6:15", (22 * 60 + 30, 6 * 60 + 14), (22 * 60, 6 * 60 + 15)),
        ("0-24", (0, 720, 1439), ()),
        ("18-24", (18 * 60, 1439), (0, 17 * 60)),
    ],
)
def test_hours(text: str, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    """They may go on after midnight."""
    hours = Hours.parse(text)
    assert all(map(hours.include, inside))
    assert not any(map(hours.include, outside))


@pytest.mark.parametrize("text", ["", "22", "22-", "25-3", "24:30-6", "22-6:60", "a-b", "22-6-7"])
def test_hours_that_are_none(text: str) -> None:
    """Are an error that says what they should be."""
    with pytest.raises(ArgumentError, match=r"22|24 hours"):
        Hours.parse(text)


@given(st.integers(0, 1439), st.integers(0, 1439))
def test_hours_are_as_they_are_written(start: int, end: int) -> None:
    """And from the one to the other they are as long as the way round the clock."""
    hours = Hours(start, end)
    assert Hours.parse(str(hours)) == hours
    length = sum(map(hours.include, range(24 * 60)))
    assert length == ((end - start) % (24 * 60) or 24 * 60)
