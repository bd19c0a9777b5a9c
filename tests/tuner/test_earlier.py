"""A stronger effort builds on a weaker one: what still stands is not measured again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device, make_measurement, make_profile
from hypothesis import given
from hypothesis import strategies as st

from autochunk.plan import Plan
from autochunk.store.profile import Profile, sliced_shape
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.candidates import all_plans
from autochunk.tuner.earlier import anchor_of, under_names_of, what_stands
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Event, Measured
from autochunk.tuner.study import Storage
from autochunk.tuner.tune import tune
from autochunk.workload import Workload

WORKLOAD = Workload.parse("b=2,t=2048,h=4,k=8")
# Two that are close, some slow without being hopeless, as others are.
PLANS = {
    "xla, 16.8 MB": {"seconds": 0.0125},
    "xla, 33.6 MB": {"seconds": 0.0100},
    "xla_rows, 33.6 MB": {"seconds": 0.0125},
    "xla_rows, 16.8 MB": {"seconds": 0.0097},
    "xla_rows, 67.2 MB": {"seconds": 0.0125},
    "dense": {"do": "oom"},
}


def tuned(command: tuple[str, ...], effort: Any, **options: Any) -> tuple[Profile, list[Plan]]:
    """The profile, and the plans that were measured for it."""
    events: list[Event] = []
    options = {"worker_command": command, "on_event": events.append, **options}
    (profile,) = tune([WORKLOAD], effort=effort, **options)
    return profile, [event.measurement.plan for event in events if isinstance(event, Measured)]


def requests(log: Path, kind: str) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    return [request for request in asked if request["do"] == kind]


@pytest.mark.parametrize(("weaker", "stronger"), [("quick", "standard"), ("standard", "thorough")])
def test_no_plan_that_stands_is_measured_again(
    weaker: str, stronger: str, scripted: Scripted, tmp_path: Path
) -> None:
    """Only those that are new or were left out; prepared again are the anchor and the finalists.

    All meet in joint rounds, and the profile has every plan once.
    """
    log = tmp_path / "log"
    command = scripted(plans=PLANS, jitter=0.02, default={"seconds": 0.03}, log=str(log))
    first, _ = tuned(command, weaker)
    log.unlink()
    second, plans = tuned(command, stronger)
    stood = {one.plan for one in what_stands(first)}
    assert len(stood) > 5
    assert not stood & set(plans)
    assert len(second.measurements) == len({one.plan for one in second.measurements})
    assert {one.plan for one in second.measurements} == stood | set(plans)
    met = {one.plan for one in second.measurements if one.joint}
    prepared = {Plan(*request["plan"]) for request in requests(log, "prepare")}
    assert prepared <= met | set(plans) | {anchor_of(first.measurements)}
    assert {"xla, 33.6 MB", "xla_rows, 16.8 MB"} <= set(map(str, met))
    assert (second.effort, second.complete) == (stronger, True)


def test_figures_that_stood_are_in_the_new_profile(scripted: Scripted) -> None:
    """The times of a plan that no joint round had are those from before."""
    command = scripted(plans=PLANS, jitter=0.02, default={"seconds": 0.03})
    first, _ = tuned(command, "quick")
    second, _ = tuned(command, "standard")
    before = {one.plan: one for one in what_stands(first)}
    after = {one.plan: one for one in second.measurements}
    for plan, measurement in before.items():
        assert after[plan].seconds[: len(measurement.seconds)] == measurement.seconds
        if not after[plan].joint:
            assert after[plan] == measurement


def test_joint_rounds_of_before_are_not_taken_for_new_ones(scripted: Scripted) -> None:
    """All plans that were in the new ones to the end were in as many of them."""
    command = scripted(plans=PLANS, default={"seconds": 0.03})
    tuned(command, "quick")
    second, _ = tuned(command, "standard")
    anchor = anchor_of(second.measurements)
    most = max(one.joint for one in second.measurements)
    assert next(one.joint for one in second.measurements if one.plan == anchor) == most


@pytest.mark.parametrize("status", ["over_budget", "timeout", "crashed"])
def test_what_may_have_passed_is_tried_again(status: str, scripted: Scripted) -> None:
    """Time and memory that there was too little of, and crashes."""
    tuned(scripted(plans={"dense": {"do": status}}), "quick")
    second, plans = tuned(scripted(), "standard")
    assert Plan("dense") in plans
    assert {one.status for one in second.measurements} <= {"ok", "pruned", "skipped"}


def test_force_measures_all_anew(scripted: Scripted) -> None:
    """Whatever stands."""
    first, _ = tuned(scripted(), "quick")
    second, plans = tuned(scripted(), "standard", force=True)
    assert set(plans) == {one.plan for one in second.measurements}
    assert {one.plan for one in first.measurements} <= set(plans)


def test_figures_of_other_libraries_do_not_stand(scripted: Scripted) -> None:
    """Another jaxlib compiles other programs."""
    older = make_device(kind="scripted", cores=2, jax="0.11.0", jaxlib="0.11.0").model_dump()
    tuned(scripted(device=older), "quick")
    second, plans = tuned(scripted(), "standard")
    assert set(plans) == {one.plan for one in second.measurements}


def test_an_unfinished_profile_is_built_on_too(scripted: Scripted) -> None:
    """What a weaker effort had got to before it was interrupted stands as well."""

    def interrupt(event: Event) -> None:
        if isinstance(event, Measured) and event.done == 4:
            raise KeyboardInterrupt

    command = scripted(plans=PLANS, default={"seconds": 0.03})
    with pytest.raises(KeyboardInterrupt):
        tune([WORKLOAD], effort="quick", worker_command=command, on_event=interrupt)
    (first,) = ProfileStore().profiles()
    second, plans = tuned(command, "standard")
    assert not {one.plan for one in what_stands(first)} & set(plans)
    assert second.complete


def test_an_anchor_that_no_longer_runs_makes_all_be_measured(scripted: Scripted) -> None:
    """Ratios to it would compare with none."""
    first, _ = tuned(scripted(plans=PLANS, default={"seconds": 0.03}), "quick")
    anchor = anchor_of(first.measurements)
    second, plans = tuned(scripted(plans={str(anchor): {"do": "oom"}}), "standard")
    timed = {one.plan for one in second.measurements if one.timed}
    assert timed == {plan for plan in plans if plan != anchor}
    assert second.complete


def test_several_workers_build_on_it_once(scripted_gpu: Scripted) -> None:
    """They share one study, to which one of them contributes."""
    command = scripted_gpu(plans=PLANS, default={"seconds": 0.03})
    options: dict[str, Any] = {"gpus": ["0", "1"]}
    first, _ = tuned(command, "quick", **options)
    _, plans = tuned(command, "standard", **options)
    assert not {one.plan for one in what_stands(first)} & set(plans)
    assert set(Counter(plans).values()) == {1}


def test_what_takes_more_than_the_budget_is_left_to_the_worker() -> None:
    """It says so itself, and runs nothing that does not fit."""
    curve = [make_measurement("dense", memory_mb=400.0), make_measurement("xla", memory_mb=40.0)]
    profile = make_profile(measurements=curve)
    assert [one.plan for one in what_stands(profile, 100 * 10**6)] == [Plan("xla")]
    assert [one.plan for one in what_stands(profile)] == [Plan("dense"), Plan("xla")]


def test_a_plan_stands_under_the_name_that_the_stronger_effort_has_for_it() -> None:
    """The 1000 MB default makes the slices of a limit that only the finer ladder has."""
    shape = sliced_shape(Workload.parse("b=2,t=4096,h=8,k=8"))
    plans = all_plans(shape, EFFORT_SETTINGS["standard"], "cpu")
    assert Plan("xla", 1000.0) not in plans
    curve = [make_measurement("xla", 1000.0, 0.7), make_measurement("xla", 67.2)]
    curve.append(make_measurement("newer_kernel"))
    renamed = under_names_of(plans, shape, curve)
    names = [Plan("xla", 537.6), Plan("xla", 67.2), Plan("newer_kernel")]
    assert [one.plan for one in renamed] == names
    assert [one.ratios for one in renamed] == [one.ratios for one in curve]


@given(own=st.integers(1, 8), joint=st.integers(0, 30))
def test_a_plan_stands_as_fast_as_it_was(own: int, joint: int) -> None:
    """By the rounds that its ratio was of, whether they were joint ones or not."""
    ratios = (*(1.0 + i / 10 for i in range(own)), *(2.0 + i / 10 for i in range(joint)))
    measurement = make_measurement("xla", 16.0, seconds=ratios, ratios=ratios, joint=joint)
    (stands,) = what_stands(make_profile(measurements=[measurement]))
    assert stands.joint == 0
    assert stands.ratio == measurement.ratio
    assert len(stands.seconds) == len(stands.ratios)


@pytest.mark.parametrize(
    ("curve", "anchor"),
    [
        # rounds of its own scatter; in joint ones the anchor is as fast as itself
        ([("dense", 0.999, 0), ("xla", 1.0, 4), ("xla_rows", 0.9, 4)], "xla"),
        ([("dense", 1.3, 0), ("xla", 1.02, 0), ("xla_rows", 0.9, 0)], "xla"),
        ([("dense", 1.3, 0), ("xla", 0.8, 0)], None),
        ([], None),
    ],
)
def test_the_anchor_is_known_by_its_ratios(
    curve: list[tuple[str, float, int]], anchor: str | None
) -> None:
    """Exactly by joint rounds, else nearly; where none is near nothing can be built on."""
    measurements = [make_measurement(name, None, ratio, joint=n) for name, ratio, n in curve]
    found = anchor_of(measurements)
    assert found == (Plan(anchor) if anchor else None)


def test_a_study_that_has_something_takes_no_contribution(place: str) -> None:
    """What is measured there is beside an anchor of its own."""
    study = Storage(place).study(make_device(), WORKLOAD, "standard")
    curve = [make_measurement("xla", 16.0), make_measurement("dense", None, status="oom")]
    study.contribute(curve, Plan("xla", 16.0))
    study.contribute([make_measurement("xla_rows", 4.0)], Plan("xla_rows", 4.0))
    assert study.anchor == Plan("xla", 16.0)
    assert list(study.measured().values()) == curve
    claim = study.claim([Plan("xla", 16.0), Plan("dense"), Plan("xla_rows", 4.0)])
    assert claim is not None
    with claim:
        assert claim.plan == Plan("xla_rows", 4.0)
