"""How plans stand by what is measured so far."""

from __future__ import annotations

import dataclasses

import pytest
from factories import make_measurement

from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.standing import (
    beaten_by_a_kernel,
    beneath_the_hopeless,
    best_plans,
    best_ratio,
    between_the_hopeless,
    finalists,
    is_doubtful,
    is_hopeless,
)

SETTINGS = dataclasses.replace(EFFORT_SETTINGS["quick"], beaten=1.5)
KERNEL = make_measurement("cudnn", None, 1.0)
DENSE = make_measurement("dense", None, 4.0)
SLICES = make_measurement("xla", 32.0, 3.0, status="pruned")


def beaten(plan: Plan, *measured: Measurement) -> str:
    return beaten_by_a_kernel(plan, {one.plan: one for one in measured}, SETTINGS)


def test_slices_that_a_kernel_beats_by_far_need_not_be_tried() -> None:
    """By the factor of the effort, over dense attention and all slices so far; it says so."""
    said = beaten(Plan("xla_rows", 8.0), KERNEL, DENSE, SLICES)
    assert said == "cudnn is 3.0x as fast as dense attention and slices"
    assert beaten(Plan("xla", None), KERNEL, DENSE, SLICES) == said


@pytest.mark.parametrize(
    ("plan", "measured"),
    [
        (Plan("xla", 8.0), ()),
        (Plan("xla", 8.0), (KERNEL, SLICES)),
        (Plan("xla", 8.0), (KERNEL, DENSE)),
        (Plan("xla", 8.0), (DENSE, SLICES)),
        (Plan("xla", 8.0), (KERNEL, DENSE, SLICES, make_measurement("xla", 16.0, 1.4))),
        (Plan("xla", 8.0), (make_measurement("cudnn", status="unsupported"), DENSE, SLICES)),
        (Plan("tokamax_triton"), (KERNEL, DENSE, SLICES)),
        (Plan("dense"), (KERNEL, DENSE, SLICES)),
    ],
)
def test_what_still_has_to_be_tried(plan: Plan, measured: tuple[Measurement, ...]) -> None:
    """Anything while a kernel, dense attention or slices were not measured, or are close."""
    assert beaten(plan, *measured) == ""


def test_a_dense_attention_that_does_not_fit_is_beaten() -> None:
    """Its having been tried is enough."""
    too_large = make_measurement("dense", status="over_budget")
    assert beaten(Plan("xla", 8.0), KERNEL, too_large, SLICES)


def test_thorough_leaves_nothing_out() -> None:
    """Slices are what a memory budget, or a call that the kernel refuses, falls back to."""
    measured = {one.plan: one for one in (KERNEL, DENSE, SLICES)}
    assert beaten_by_a_kernel(Plan("xla", 8.0), measured, EFFORT_SETTINGS["thorough"]) == ""


@pytest.mark.parametrize(
    ("ratios", "hopeless", "doubtful"),
    [
        pytest.param([1.2], False, False, id="close"),
        pytest.param([2.0], False, True, id="one that may be off"),
        pytest.param([0.5], False, True, id="one that may be off the other way"),
        pytest.param([4.0], True, False, id="one by far"),
        pytest.param([2.0, 1.5], True, False, id="two"),
        pytest.param([2.0, 1.1], False, True, id="one of two"),
        pytest.param([2.0, 1.1, 1.4], True, False, id="most of three"),
        pytest.param([2.0, 1.1, 1.2], False, True, id="one of three"),
    ],
)
def test_a_single_ratio_is_hardly_believed(
    ratios: list[float], *, hopeless: bool, doubtful: bool
) -> None:
    """Whatever else runs meanwhile can double either time; it takes two to give a plan up."""
    assert is_hopeless([2 * ratio for ratio in ratios], 2.0, SETTINGS) is hopeless
    assert is_doubtful([2 * ratio for ratio in ratios], 2.0, SETTINGS) is doubtful


def test_disturbed_plans_may_be_better_than_they_look() -> None:
    """Those beside which the anchor took far longer than it can, unless they are slow by far."""
    ratios = {64.0: 1.0, 32.0: 1.6, 16.0: 1.4, 8.0: 5.0, 4.0: 1.5}

    def by_anchors(*seconds: float) -> dict[Plan, Measurement]:
        every = [make_measurement("xla", limit, ratio) for limit, ratio in ratios.items()]
        return {
            one.plan: one.model_copy(update={"seconds": tuple(took * r for r in one.ratios)})
            for one, took in zip(every, seconds, strict=True)
        }

    measured = by_anchors(0.1, 0.16, 0.17, 0.2, 0.12)
    found = finalists(measured, SETTINGS)
    assert found == [Plan("xla", limit) for limit in (64.0, 16.0, 32.0)]
    failed = {found[1]: make_measurement("xla", 16.0, status="crashed")}
    assert found[1] not in finalists(measured | failed, SETTINGS)
    for undisturbed in (by_anchors(*[0.2] * 5), {}):
        assert finalists(undisturbed, SETTINGS) == best_plans(undisturbed, SETTINGS)


def test_who_was_flattered_makes_no_other_hopeless() -> None:
    """A ratio is that of the plan's own time where the anchor took twice what it can.

    Seen: a plan of 1.2 times the anchor's time had ten rounds in which the anchor took 30 ms, not
    13, and so a ratio of 0.5; beside that the best plan, 0.7, was given up as 1.4 times slower.
    """
    rounds = {64.0: (1.0, 13.0), 32.0: (1.36, 13.2), 16.0: (1.29, 13.5), 0.07: (0.5, 31.0)}
    measured = {
        Plan("xla", limit): make_measurement(
            "xla", limit, ratio, seconds=(ratio * anchor / 1000,) * 5
        )
        for limit, (ratio, anchor) in rounds.items()
    }
    settings = EFFORT_SETTINGS["standard"]
    assert best_ratio(measured) == pytest.approx(1.0)
    assert not is_hopeless([0.7, 0.71], best_ratio(measured), settings)
    rows = make_measurement("xla_rows", 2.1, 0.71, seconds=(0.0096,) * 5)
    assert rows.plan in finalists(measured | {rows.plan: rows}, settings)
    flattered = measured[Plan("xla", 0.07)]
    together = flattered.model_copy(
        update={"ratios": (0.5,) * 6, "seconds": flattered.seconds[:1] * 6, "joint": 6}
    )
    assert best_ratio(measured | {flattered.plan: together}) == 0.5


def test_below_two_hopeless_limits_nothing_is_tried() -> None:
    """Those between them that were skipped for the same reason do not stand in the way."""
    best = make_measurement("xla", 4.0, 1.0)
    ladder = [make_measurement("xla_rows", 64.0 / 2**step, 1.0 + step) for step in range(5)]
    found: dict[Plan, Measurement] = {one.plan: one for one in (best, ladder[1], ladder[3])}
    lowest = Plan("xla_rows", 2.0)
    assert "limits of 32 and 8 MB" in beneath_the_hopeless(lowest, found, SETTINGS)
    skipped = make_measurement("xla_rows", 16.0, status="skipped")
    found[skipped.plan] = skipped
    assert "limits of 32 and 8 MB" in beneath_the_hopeless(lowest, found, SETTINGS)
    assert beneath_the_hopeless(Plan("xla", 2.0), found, SETTINGS) == ""


@pytest.mark.parametrize(
    ("larger", "next_larger", "tried"),
    [
        pytest.param(1.1, 1.4, True, id="hardly slower"),
        pytest.param(1.1, 2.1, True, id="one bad timing"),
        pytest.param(1.8, 1.4, True, id="no trend"),
        pytest.param(1.4, 1.8, False, id="both slower, and more so"),
        pytest.param(1.1, 3.0, False, id="one by far"),
        pytest.param(2.0, 2.1, False, id="both by far"),
    ],
)
def test_a_trend_takes_two_timings(larger: float, next_larger: float, *, tried: bool) -> None:
    """A smaller limit is tried unless both of the next larger ones say that it is slower still."""
    measurements = (
        make_measurement("xla", 4.0, 1.0),
        make_measurement("xla_rows", 4.0, larger),
        make_measurement("xla_rows", 2.0, next_larger),
    )
    settings = dataclasses.replace(SETTINGS, hopeless=1.3)
    found = {one.plan: one for one in measurements}
    assert (beneath_the_hopeless(Plan("xla_rows", 1.0), found, settings) == "") is tried


@pytest.mark.parametrize(
    ("larger", "smaller", "tried"),
    [
        pytest.param(1.2, 2.0, True, id="beside a good one"),
        pytest.param(1.5, 1.4, False, id="between two"),
        pytest.param(None, 2.0, True, id="the largest"),
        pytest.param(2.0, None, True, id="the smallest"),
    ],
)
def test_between_two_hopeless_limits_nothing_is_tried(
    larger: float | None, smaller: float | None, *, tried: bool
) -> None:
    """Of the same implementation: time changes little from one limit to the next."""
    sides = ((larger, 16.0), (smaller, 4.0))
    near = [make_measurement("xla_rows", mb, one) for one, mb in sides if one is not None]
    far = [make_measurement("xla", mb, 3.0) for mb in (16.0, 4.0)]
    best = make_measurement("xla", 64.0, 1.0)
    settings = dataclasses.replace(SETTINGS, hopeless=1.3)
    found = {one.plan: one for one in (best, *near, *far)}
    said = between_the_hopeless(Plan("xla_rows", 8.0), found, settings)
    assert (said == "") is tried
    assert tried or "limits of 4 and 16 MB took 1.4x and 1.5x" in said
    assert between_the_hopeless(Plan("xla_rows", None), found, settings) == ""
