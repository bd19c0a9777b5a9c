"""Two sets of profiles: what got slower must be seen, and chance must not."""

from __future__ import annotations

from typing import Any

import pytest
from factories import (
    CURVE,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)

from autochunk.report.comparison import comparison, earlier, slower
from autochunk.report.curve import curve_record
from autochunk.report.drawing import curve_figure
from autochunk.store.profile import Profile

STEADY = tuple(1 + 0.001 * step for step in range(-5, 6))
NOISY = tuple(1 + 0.3 * (-1) ** step for step in range(11))


def timed(seconds: float, scatter: tuple[float, ...] = STEADY, **fields: Any) -> Profile:
    """A profile whose only plan takes so long."""
    times = tuple(seconds * one for one in scatter)
    one = make_measurement("xla", 16.0, seconds=times, ratios=times)
    return make_profile(measurements=(one,), **fields)


FAILED = make_profile(measurements=(make_measurement("xla", 16.0, status="crashed"),))


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        (timed(0.1), timed(0.2), "slower"),
        (timed(0.2), timed(0.1), "faster"),
        (timed(0.1), timed(0.104), "same"),
        (timed(0.1), timed(0.112, NOISY), "unclear"),
        (timed(0.1), FAILED, "no plan"),
        (FAILED, FAILED, "same"),
        (FAILED, timed(0.1), "new"),
        (timed(0.1), None, "gone"),
        (None, timed(0.1), "new"),
    ],
)
def test_verdicts(then: Profile | None, now: Profile | None, verdict: str) -> None:
    """Surely, and by more than 5%; what fails a check is slower, or has no plan any more."""
    (record,) = comparison(filter(None, [then]), filter(None, [now]))
    assert record["verdict"] == verdict
    assert bool(slower([record])) == (verdict in ("slower", "no plan"))


def test_the_limit_is_the_callers() -> None:
    """8% more is slower than 5%, and not than 10%."""
    verdicts = [comparison([timed(0.1)], [timed(0.108)], one)[0]["verdict"] for one in (0.05, 0.1)]
    assert verdicts == ["slower", "same"]


def test_the_worst_comes_first() -> None:
    """A reader of one line sees what is most wrong."""
    shapes = [make_workload(f"t={length},k=8") for length in (8, 9, 10)]
    then = [timed(0.1, workload=one) for one in shapes]
    now = [
        timed(seconds, workload=one) for one, seconds in zip(shapes, (0.1, 0.3, 0.2), strict=True)
    ]
    assert [record["shape"] for record in comparison(then, now)] == [
        shapes[place].shape for place in (1, 2, 0)
    ]


def test_two_machines_of_different_kinds() -> None:
    """Where each side has one device of its own these are compared, and both are named."""
    other = make_device(kind="Another/One")
    (record,) = comparison([timed(0.1, device=other)], [timed(0.2)])
    assert record["verdict"] == "slower"
    assert (record["device_then"], record["device"]) == (other.key, make_device().key)


def test_more_devices_are_compared_by_name_only() -> None:
    """With two on one side it would be a guess which to compare."""
    others = [timed(0.1, device=make_device(kind=kind)) for kind in ("A/1", "B/1")]
    assert {one["verdict"] for one in comparison(others, [timed(0.2)])} == {"gone", "new"}


def test_a_curve_shows_what_it_is_compared_with() -> None:
    """What budgets picked before, and by which version, beside what they pick now."""
    older = make_device(jaxlib="0.10.2")
    then = make_profile(device=older, measurements=CURVE[:3])
    now = make_profile(measurements=CURVE)
    before = earlier([then], [now])
    assert before == {now.key: then}
    curve = curve_record(now, before=before[now.key])
    assert curve["before"]["label"] == "jaxlib 0.10.2"
    assert curve["before"]["steps"] == [(40e6, pytest.approx(0.05))]
    assert "before: jaxlib 0.10.2" in curve_figure(curve, "title", "device")
    assert curve_record(now, before=now)["before"]["label"] == "2026-01-02"


def test_versions_and_choices_of_both_sides_are_told() -> None:
    """Two jaxlib versions side by side."""
    then = timed(0.1, device=make_device(jaxlib="0.10.2"))
    (record,) = comparison([then], [timed(0.1)])
    assert (record["then"]["jaxlib"], record["now"]["jaxlib"]) == ("0.10.2", "0.12.0")
    assert record["then"]["plan"] == "xla, 16 MB"


def test_functions_are_compared() -> None:
    """As attention is; what is in no chunks is whole."""
    whole = make_function_profile(measurements=(make_measurement("dense"),))
    (record,) = comparison([whole], [make_function_profile()])
    assert record["shape"] == "model.transition 64"
    assert (record["then"]["plan"], record["now"]["plan"]) == ("whole", "chunks of 16")
