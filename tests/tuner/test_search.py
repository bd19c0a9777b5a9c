"""The search over one workload's plans: what is measured, given up, resumed, chosen."""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device, make_measurement

from autochunk.device import Device
from autochunk.plan import Plan
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Effort
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.joint import JointRounds
from autochunk.tuner.outcome import Interrupted, Outcome
from autochunk.tuner.probe import OutOfTime, Probe
from autochunk.tuner.search import search
from autochunk.tuner.study import Storage, Study
from autochunk.workload import Workload

WORKLOAD = Workload.parse("b=2,t=2048,h=4,k=8")  # 134 MB of logits


def by_plan(outcome: Outcome) -> dict[str, Measurement]:
    return {str(measurement.plan): measurement for measurement in outcome.measurements}


def run(
    command: tuple[str, ...], journal: Path, effort: Effort = "quick", **options: Any
) -> Outcome:
    with Probe(command, seconds_per_request=1.0) as probe:
        return search(probe, WORKLOAD, effort, study(journal, effort), **options)


def study(journal: Path, effort: Effort = "quick", workload: Workload = WORKLOAD) -> Study:
    return Storage(journal).study(make_device(), workload, effort)


def test_a_real_search_measures_every_plan_and_both_baselines(
    small: Workload, tmp_path: Path
) -> None:
    """With a real worker and a real journal dense, the default and the slices are measured.

    They are checked, too, and each plan is measured once.
    """
    with Probe() as probe:
        outcome = search(probe, small, "quick", study(tmp_path / "study.journal", workload=small))
    found = by_plan(outcome)
    assert outcome.complete
    assert len(found) == len(outcome.measurements)
    assert {"dense", "xla, do not chunk"} <= set(found)
    assert all(m.status in ("ok", "pruned") and m.error is not None for m in outcome.measurements)
    assert any(m.status == "ok" for m in outcome.measurements)


def test_the_fastest_plan_is_found_whatever_its_place(scripted: Scripted, tmp_path: Path) -> None:
    """Of noiseless times the exhaustive search finds the fastest, its ratio the least.

    Hopeless plans are given up after a round.
    """
    plans = {
        "xla_rows, 16.8 MB": {"seconds": 0.08, "temp": 500},
        "xla_rows, 4.2 MB": {"seconds": 1.0, "temp": 10**6},
    }
    command = scripted(plans=plans, default={"seconds": 0.1, "temp": 1000})
    found = by_plan(run(command, tmp_path / "study"))
    assert min(found, key=lambda plan: found[plan].ratio) == "xla_rows, 16.8 MB"
    hopeless = found["xla_rows, 4.2 MB"]
    assert hopeless.status == "pruned"
    assert len(hopeless.ratios) == 1
    assert hopeless.ratio == pytest.approx(10.0)
    assert "best plan's time" in hopeless.detail


@pytest.mark.parametrize("first", [2.5, 0.4])
def test_a_single_timing_that_is_off_decides_nothing(
    first: float, scripted: Scripted, tmp_path: Path
) -> None:
    """Of the best plan, or of a slow one."""
    disturbed = {"xla_rows, 16.8 MB" if first > 1 else "xla_rows, 4.2 MB": {"first": first}}
    seconds_of = {"xla_rows, 16.8 MB": 0.08, "xla_rows, 4.2 MB": 0.12}
    plans = {plan: {"seconds": s} | disturbed.get(plan, {}) for plan, s in seconds_of.items()}
    command = scripted(plans=plans, default={"seconds": 0.1})
    found = by_plan(run(command, tmp_path / "study", "standard"))
    assert min(found, key=lambda plan: found[plan].ratio) == "xla_rows, 16.8 MB"


@pytest.mark.parametrize(("effort", "rounds"), [("quick", 2), ("standard", 3), ("thorough", 4)])
def test_the_baselines_are_timed_more_than_once(
    effort: Effort, rounds: int, scripted: Scripted, tmp_path: Path
) -> None:
    """However slow they are: what tuning gained is their time over the best plan's.

    The 1000 MB default slices nothing here.
    """
    baselines = ("dense", "xla, do not chunk")
    command = scripted(plans={plan: {"seconds": 0.5} for plan in baselines})
    found = by_plan(run(command, tmp_path / "study", effort))
    for plan in baselines:
        assert (found[plan].status, len(found[plan].ratios)) == ("pruned", rounds)


@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_a_failing_plan_costs_itself_only(
    effort: Effort, scripted: Scripted, tmp_path: Path
) -> None:
    """A plan that fails while others are measured is a typed result, and nothing else is lost.

    It is killed, hangs, is out of memory or over the budget.
    """
    plans = {
        "dense": {"do": "oom"},
        "xla, do not chunk": {"do": "over_budget"},
        "xla, 16.8 MB": {"do": f"die {int(signal.SIGKILL)}"},
        "xla_rows, 16.8 MB": {"do": f"time:die {int(signal.SIGSEGV)}"},
        "xla_rows, 67.2 MB": {"do": "hang"},
        "xla_rows, 4.2 MB": {"do": "inaccurate"},
    }
    outcome = run(scripted(plans=plans), tmp_path / "study", effort)
    found = by_plan(outcome)
    assert outcome.complete
    statuses = "oom over_budget crashed crashed timeout inaccurate".split()
    assert [found[plan].status for plan in plans] == statuses
    others = [m for plan, m in found.items() if plan not in plans]
    assert others
    assert [m for m in others if not m.timed] == []


def test_the_anchor_is_a_plan_that_runs(scripted: Scripted, tmp_path: Path) -> None:
    """If the likeliest plan fails, another is what the rest is timed beside."""
    plans = {"xla, 16.8 MB": {"do": "oom"}, "xla, 67.2 MB": {"do": "oom"}}
    found = by_plan(run(scripted(plans=plans), tmp_path / "study"))
    assert found["xla, 16.8 MB"].status == "oom"
    assert found["xla, do not chunk"].ratio == 1.0


def test_a_plan_is_not_to_blame_for_the_anchor(scripted: Scripted, tmp_path: Path) -> None:
    """A plan takes the worker down, and the anchor does not run in the next one.

    That ends the search, unfinished, and another one goes on from there.
    """
    flag = tmp_path / "flag"
    plans = {
        "xla_rows, 67.2 MB": {"do": f"once:{flag}:die 9"},
        "xla, 16.8 MB": {"do": f"after:{flag}:oom"},
    }
    outcome = run(scripted(plans=plans), tmp_path / "study")
    said = "which all plans are timed beside, ran before and no longer does (oom: scripted oom)"
    assert f"xla, 16.8 MB, {said}" in outcome.failure
    assert not outcome.complete
    assert {plan for plan, m in by_plan(outcome).items() if not m.timed} == {"xla_rows, 67.2 MB"}
    flag.unlink()
    again = run(scripted(), tmp_path / "study")
    assert again.complete
    assert {plan for plan, m in by_plan(again).items() if not m.timed} == {"xla_rows, 67.2 MB"}


def test_each_plan_is_prepared_once(scripted_gpu: Scripted, tmp_path: Path) -> None:
    """The anchor and the finalists, timed again, stay in the worker; the others do not."""
    log = tmp_path / "log"
    command = scripted_gpu(plans={"xla_rows, 4.2 MB": {"seconds": 0.011}}, log=str(log))
    outcome = run(command, tmp_path / "study", "standard")
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    prepared = [tuple(one["plan"]) for one in requests if one["do"] == "prepare"]
    dropped = [tuple(one["plan"]) for one in requests if one["do"] == "drop"]
    assert len(prepared) == len(set(prepared)) == len(outcome.measurements)
    assert (
        len(dropped)
        == len(set(dropped))
        >= len(prepared) - 1 - EFFORT_SETTINGS["standard"].finalists
    )
    assert ("xla_rows", 4.2) in dropped


def test_what_others_measured_counts_when_time_runs_out(scripted: Scripted, tmp_path: Path) -> None:
    """Since the last claim, too."""
    one = study(tmp_path / "study")

    def measured_elsewhere(*_: object) -> None:
        claim = one.claim([Plan("dense", None)])
        if claim is not None:
            with claim:
                claim.done([make_measurement("dense", None)], one.anchor)
            raise OutOfTime

    other = study(tmp_path / "study")
    with Probe(scripted()) as probe:
        outcome = search(probe, WORKLOAD, "quick", other, on_measurement=measured_elsewhere)
    assert not outcome.complete
    assert set(by_plan(outcome)) == {"xla, 16.8 MB", "dense"}


def test_what_another_hands_in_at_the_very_end_is_not_lost(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks at who is at work the last one ends: the outcome has its plan, or waits."""
    one, other = study(tmp_path / "study"), study(tmp_path / "study")
    dense = Plan("dense", None)
    claim = other.claim([dense])
    assert claim is not None

    def workers() -> int:
        found = Study.workers(one)
        claim.done([make_measurement("dense", None)], other.anchor)
        return found

    monkeypatch.setattr(one, "workers", workers)
    with claim, Probe(scripted()) as probe:
        first = search(probe, WORKLOAD, "quick", one)
        again = search(probe, WORKLOAD, "quick", one)
    assert first.awaited or dense in {m.plan for m in first.measurements}
    assert first.complete != first.awaited
    assert again.complete
    assert by_plan(again)["dense"].timed


def test_a_plan_whose_worker_dies_at_the_very_end_is_measured(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is free again only when nothing else is left to claim: the search goes back for it."""
    one, other = study(tmp_path / "study"), study(tmp_path / "study")
    claim = other.claim([Plan("dense", None)])
    assert claim is not None

    def workers() -> int:
        held.close()  # to others it is a death
        return Study.workers(one)

    monkeypatch.setattr(one, "workers", workers)
    with contextlib.ExitStack() as held, Probe(scripted()) as probe:
        held.enter_context(claim)
        outcome = search(probe, WORKLOAD, "quick", one)
    assert outcome.complete
    assert by_plan(outcome)["dense"].timed


def test_what_was_measured_before_workers_fail_is_kept(scripted: Scripted, tmp_path: Path) -> None:
    """A worker dies and no other can be started: the outcome says why, and has what there is."""
    flag = tmp_path / "flag"
    command = scripted(plans={"dense": {"do": f"once:{flag}:die 9"}})
    refusing = ("sh", "-c", f'[ -e {flag} ] && exit 3; exec "$@"', "sh", *command)
    outcome = run(refusing, tmp_path / "study")
    assert not outcome.complete
    assert "exit status 3" in outcome.failure
    assert by_plan(outcome)["xla, 16.8 MB"].timed


def test_nothing_runs(scripted: Scripted, tmp_path: Path) -> None:
    """Every plan out of memory is an outcome, too."""
    outcome = run(scripted(default={"do": "oom"}), tmp_path / "study")
    assert outcome.complete
    assert {m.status for m in outcome.measurements} == {"oom"}


def test_an_interrupted_search_keeps_what_it_has_and_goes_on(
    scripted: Scripted, tmp_path: Path
) -> None:
    """The three plans measured before Ctrl-C come with the interruption.

    They are not measured again; the others are, once.
    """
    seen: list[str] = []

    def interrupt(measurement: Measurement, done: int, _total: int) -> None:
        seen.append(str(measurement.plan))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as interruption:
        run(scripted(), tmp_path / "study", on_measurement=interrupt)
    assert [str(m.plan) for m in interruption.value.outcome.measurements] == seen
    again: list[str] = []

    def tell(measurement: Measurement, *_: int) -> None:
        again.append(str(measurement.plan))

    outcome = run(scripted(), tmp_path / "study", on_measurement=tell)
    assert outcome.complete
    assert not set(seen) & set(again)
    assert sorted(seen + again) == sorted(by_plan(outcome))


def test_hopeless_limits_end_the_ladder(scripted: Scripted, tmp_path: Path) -> None:
    """Below two limits that were hopeless, the smaller one more so, and between nothing is tried.

    Larger limits and other implementations are.
    """
    slower = {8.4: 1.9, 4.2: 2.1, 2.1: 2.3, 1.05: 2.4, 0.525: 2.45}
    plans = {f"xla_rows, {mb:g} MB": {"seconds": times / 10} for mb, times in slower.items()}
    command = scripted(plans=plans, default={"seconds": 0.1})
    found = by_plan(run(command, tmp_path / "study", "standard"))
    skipped = {plan for plan, m in found.items() if m.status == "skipped"}
    assert skipped == {"xla_rows, 4.2 MB", "xla_rows, 1.05 MB", "xla_rows, 0.525 MB"}
    reason = "limits of 8.4 and 2.1 MB took 1.9x and 2.3x the best time"
    assert found["xla_rows, 0.525 MB"].detail == reason


@pytest.mark.parametrize(("slow", "ends"), [(3.0, True), (2.0, False)])
def test_one_far_slower_limit_ends_the_ladder(
    scripted: Scripted, tmp_path: Path, slow: float, ends: bool
) -> None:
    """Below a limit that took more than one bad timing explains, nothing is tried."""
    plans = {"xla_rows, 8.4 MB": {"seconds": 0.12}, "xla_rows, 2.1 MB": {"seconds": 0.1 * slow}}
    command = scripted(plans=plans, default={"seconds": 0.1})
    found = by_plan(run(command, tmp_path / "study", "standard"))
    assert (found["xla_rows, 0.525 MB"].status == "skipped") == ends


def test_time_running_out_gives_what_there_is(scripted: Scripted, tmp_path: Path) -> None:
    """At the deadline the outcome is incomplete and holds what was measured.

    The rest comes with the next call.
    """
    command = scripted(delay=0.05)
    with Probe(command) as probe:
        probe.deadline = time.monotonic() + 1.5
        outcome = search(probe, WORKLOAD, "thorough", study(tmp_path / "study", "thorough"))
    assert not outcome.complete
    assert time.monotonic() < probe.deadline + 2
    rest = run(scripted(), tmp_path / "study", "thorough")
    assert rest.complete
    assert len(rest.measurements) > len(outcome.measurements)


def test_where_time_is_short_plans_have_fewer_rounds(scripted: Scripted, tmp_path: Path) -> None:
    """So that more of them are tried; the best of those meet all the same."""
    command = scripted(delay=0.05)
    outcomes = {
        seconds: run(command, tmp_path / str(seconds), "standard", seconds=seconds)
        for seconds in (2.0, 600.0)
    }
    rounds = {
        seconds: [len(m.ratios) - m.joint for m in outcome.measurements if m.timed]
        for seconds, outcome in outcomes.items()
    }
    assert min(rounds[2.0]) < EFFORT_SETTINGS["standard"].least_rounds <= min(rounds[600.0])
    assert max(m.joint for m in outcomes[2.0].measurements) > 0


class _Ending:
    """A probe whose time is over after some rounds."""

    def __init__(self, rounds: int, seconds: float | None = None) -> None:
        self.left = rounds
        self.jitter = 0.0
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.seconds_to_start = 10.0
        self.asked: list[list[Plan]] = []
        self.restarts = 0

    def connect(self) -> Device:
        return make_device()

    def restart(self) -> None:
        self.restarts += 1

    def time(self, plans: list[Plan]) -> list[float]:
        if not self.left:
            raise OutOfTime
        self.left -= 1
        self.asked.append(list(plans))
        # each plan is the slower one in every other round
        sides = [(-1) ** (self.left + int(plan.max_chunk_size_mb == 1)) for plan in plans]
        return [0.1 * (1 + self.jitter * side) for side in sides]


def _measured(**changes: Any) -> dict[Plan, Measurement]:
    made = (make_measurement("xla", limit) for limit in (1.0, 2.0, 4.0, 8.0))
    return {one.plan: one.model_copy(update=changes) for one in made}


def _joint_rounds(probe: Any, effort: Effort = "quick", seconds: float = 0.1) -> JointRounds:
    measured = _measured(seconds=(seconds,) * 5)
    return JointRounds(probe, EFFORT_SETTINGS[effort], measured, Plan("xla", 1.0))


@pytest.mark.parametrize(("there", "cut_short"), [(1, True), (2, True), (3, False), (9, False)])
def test_joint_rounds_that_time_cuts_short_count(there: int, cut_short: bool) -> None:
    """Few are better than none; without one there is nothing to tell."""
    joint = _joint_rounds(_Ending(there), seconds=1.0)  # which is looked at soon
    measurements = joint.run([Plan("xla", 1.0), Plan("xla", 2.0)])
    fewest = EFFORT_SETTINGS["quick"].least_joint
    assert [m.joint for m in measurements] == [min(there, fewest)] * 2
    assert joint.cut_short == cut_short
    with pytest.raises(OutOfTime):
        _joint_rounds(_Ending(0)).run([Plan("xla", 1.0), Plan("xla", 2.0)])


@pytest.mark.parametrize(("seconds", "plans"), [(0.1, 2), (1e6, 4), (None, 4)])
def test_as_many_finalists_as_time_is_for(seconds: float | None, plans: int) -> None:
    """The best two at least."""
    probe = _Ending(1, seconds)
    _joint_rounds(probe).run([Plan("xla", limit) for limit in (1.0, 2.0, 4.0, 8.0)])
    assert {plan.max_chunk_size_mb for plan in probe.asked[0]} == {1.0, 2.0, 4.0, 8.0} - (
        {4.0, 8.0} if plans == 2 else set()
    )


@pytest.mark.parametrize(("seconds", "several"), [(5.0, False), (60.0, True), (None, True)])
def test_a_new_process_only_where_there_is_time_for_it(
    seconds: float | None, several: bool
) -> None:
    """More rounds in one process are better than few in two."""
    probe = _Ending(7, seconds)
    probe.seconds_to_start, probe.jitter = 5.0, 0.1
    joint = _joint_rounds(probe, "standard")
    measurements = joint.run([Plan("xla", 1.0), Plan("xla", 2.0)])
    assert (probe.restarts > 0) is several
    assert [m.joint for m in measurements] == [7] * 2


@pytest.mark.parametrize("by", [2.0, 1.0])
@pytest.mark.parametrize(("ample", "disturbed"), [(60.0, 0), (-1.0, 4)])
def test_a_round_in_which_plans_take_longer_is_made_again(
    ample: float, disturbed: int, by: float
) -> None:
    """While there is ample time: what disturbs a machine for seconds slows some plans, or all."""

    class Disturbed(_Ending):
        def time(self, plans: list[Plan]) -> list[float]:
            slow = 5 <= self.left < 9
            found = zip(plans, super().time(plans), strict=True)
            of_anchor, of_other = (by, 2.0) if slow else (1.0, 1.0)
            return [s * (of_anchor if plan == Plan("xla", 1.0) else of_other) for plan, s in found]

    measured, probe = _measured(seconds=(0.1,) * 5), Disturbed(12, 1e6)
    settings, until = EFFORT_SETTINGS["standard"], time.monotonic() + ample
    anyone: Any = probe
    joint = JointRounds(anyone, settings, measured, Plan("xla", 1.0), ample_until=until)
    found = joint.run([Plan("xla", 1.0), Plan("xla", 2.0)])
    slow = [sum(s > 0.15 for s in m.seconds) for m in found]
    assert slow == [disturbed * (by == 2.0), disturbed]
    assert [m.joint for m in found] == [len(probe.asked) - 4 + disturbed] * 2


def test_disturbed_rounds_are_better_than_none() -> None:
    """Where time ends before there were others."""

    class Disturbed(_Ending):
        def time(self, plans: list[Plan]) -> list[float]:
            return [2 * seconds for seconds in super().time(plans)]

    probe: Any = Disturbed(4, 1e6)
    measured = _measured(seconds=(0.1,) * 5)
    joint = JointRounds(probe, EFFORT_SETTINGS["standard"], measured, Plan("xla", 1.0))
    found = joint.run([Plan("xla", 1.0), Plan("xla", 2.0)])
    assert [m.joint for m in found] == [4] * 2
    assert joint.cut_short


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_finalists_meet_in_several_processes(
    platform: str, scripted: Scripted, scripted_gpu: Scripted, tmp_path: Path
) -> None:
    """On CPUs, where a process's memory favours one plan or another in all its rounds."""
    log = tmp_path / "log"
    script = {"plans": {"xla, 16.8 MB": {"seconds": 0.1}}, "default": {"seconds": 0.101}}
    command = {"cpu": scripted, "gpu": scripted_gpu}[platform](**script, log=str(log), jitter=0.3)
    run(command, tmp_path / "study", effort="standard")
    asked = [json.loads(line)["do"] for line in log.read_text().splitlines()]
    assert (asked.count("load") > 1) is (platform == "cpu")
    assert asked[-1] == "time"


def test_a_plan_stays_whose_own_rounds_were_best() -> None:
    """Where half of the plans leave after few joint rounds, those alone do not decide it."""

    class Disturbed(_Ending):
        def time(self, plans: list[Plan]) -> list[float]:
            times = super().time(plans)
            in_turn = zip(times, plans, strict=True)
            return [2 * t if plan == best and self.left >= 6 else t for t, plan in in_turn]

    measured, best = _measured(), Plan("xla", 8.0)
    measured[best] = measured[best].model_copy(update={"ratios": (0.5,) * 5})
    probe: Any = Disturbed(8, 1e6)
    anchor = Plan("xla", 1.0)
    settings, over = EFFORT_SETTINGS["standard"], time.monotonic()
    joint = JointRounds(probe, settings, measured, anchor, ample_until=over)
    joint.run(list(measured))
    assert [best in plans for plans in probe.asked] == [True] * len(probe.asked)
    assert len(probe.asked[-1]) < len(probe.asked[0])


@pytest.mark.parametrize(("share", "half"), [(math.inf, False), (150.0, False), (25.0, True)])
def test_where_time_does_not_do_for_all_half_of_the_plans_leave(
    share: float, half: bool, scripted: Scripted, tmp_path: Path
) -> None:
    """So that the best have most of it; else only those leave that are clear."""
    log, slow = tmp_path / "log", {"seconds": 0.3, "temp": 1000}  # a look is soon
    command = scripted(log=str(log), jitter=0.1, default=slow)  # more would be a disturbance
    with Probe(command, seconds_per_request=9.0) as probe:
        probe.deadline = time.monotonic() + 100.0
        journal = study(tmp_path / "study", "standard")
        outcome = search(probe, WORKLOAD, "standard", journal, seconds=share)
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    timed = [len(request["plans"]) for request in requests if request["do"] == "time"]
    plans = timed[-max(m.joint for m in outcome.measurements) :]
    first = EFFORT_SETTINGS["standard"].least_joint // 2
    assert plans[:first] == [plans[0]] * first
    assert (plans[first] < plans[0]) is half
    assert len(plans) > 2 * first
    if half:
        assert plans[first] <= 2 + plans[0] / 2
        assert plans[-1] in (2, 3), "the best two, and the anchor"


def test_what_is_compiled_is_measured_when_its_time_is_over(
    scripted_gpu: Scripted, tmp_path: Path
) -> None:
    """On an accelerator compiling takes the time: what was compiled together is timed all the same.

    Nothing else is begun then, the best meet in joint rounds, and the worker lives.
    """
    log = tmp_path / "log"
    kernels = ["cudnn", "tokamax_mosaic", "tokamax_triton"]
    ahead = [*kernels, "xla, 16.8 MB", "dense", "xla, do not chunk"]
    first = {"seconds": 0.02, "do": "sleep 0.3"}
    plans = {plan: {"seconds": 0.01} for plan in ahead} | {"xla, 16.8 MB": first}
    slow = {"seconds": 0.011, "do": "sleep 0.3"}
    command = scripted_gpu(plans=plans, default=slow, ahead=ahead, log=str(log))
    outcome = run(command, tmp_path / "study", seconds=0.1)
    found = by_plan(outcome)
    assert not outcome.complete
    assert set(ahead[3:]) <= set(found) <= set(ahead)
    assert {m.status for m in outcome.measurements} <= {"ok", "pruned"}
    assert max(m.joint for m in outcome.measurements) >= EFFORT_SETTINGS["quick"].least_joint
    assert log.read_text().count('"load"') == 1


def test_hints_are_measured_first(scripted: Scripted, tmp_path: Path) -> None:
    """What a similar workload found best comes before anything else.

    A hint that means other slices here is taken for its equivalent.
    """
    order: list[str] = []

    def tell(measurement: Measurement, *_: int) -> None:
        order.append(str(measurement.plan))

    hint = Plan("xla_rows", 4.2)
    run(scripted(), tmp_path / "study", hints=[hint], on_measurement=tell)
    assert order[0] == "xla_rows, 4.2 MB"


@pytest.mark.parametrize("second", [0.101, 0.115])
def test_finalists_meet_in_joint_rounds(second: float, scripted: Scripted, tmp_path: Path) -> None:
    """Plans that are close are timed together at the end, and the first two in any case.

    The others are not.
    """
    log = tmp_path / "log"
    plans = {
        "xla, 16.8 MB": {"seconds": 0.1},
        "xla_rows, 16.8 MB": {"seconds": second},
        "dense": {"seconds": 0.3},
    }
    run(scripted(plans=plans, default={"seconds": 0.2}, log=str(log)), tmp_path / "study")
    last = json.loads(log.read_text().splitlines()[-1])
    assert sorted(map(tuple, last["plans"])) == [("xla", 16.8), ("xla_rows", 16.8)]


def test_joint_rounds_have_a_new_order_each_time(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor is in all of them, and no plan always follows the same other one."""
    # By chance one plan would come first in all of them in one run of a thousand.
    monkeypatch.setattr("autochunk.tuner.joint.random.shuffle", random.Random(0).shuffle)
    log = tmp_path / "log"
    plans = {name: {"seconds": 0.1} for name in ("xla, 16.8 MB", "xla, 8.4 MB", "xla, 4.2 MB")}
    command = scripted(plans=plans, default={"seconds": 0.2}, log=str(log), jitter=0.005)
    outcome = run(command, tmp_path / "study", effort="standard")
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    timed = [request["plans"] for request in requests if request["do"] == "time"]
    rounds = timed[-max(m.joint for m in outcome.measurements) :]
    assert len(rounds) >= EFFORT_SETTINGS["standard"].least_joint
    assert all(["xla", 33.6] in order for order in rounds)
    assert len(rounds[0]) >= 4
    assert {str(order[0]) for order in rounds} != {str(rounds[0][0])}
    for plan in map(str, rounds[0]):
        there = [plan in map(str, order) for order in rounds]
        assert there == sorted(there, reverse=True), "what has left came back"
    followers = {(str(one), str(next_one)) for order in rounds for one, next_one in pairwise(order)}
    assert len(followers) > 2 * (len(rounds[0]) - 1)


def test_joint_rounds_end_when_the_choice_is_clear(scripted_gpu: Scripted, tmp_path: Path) -> None:
    """Noiseless times are clear after the fewest rounds; those that scatter take more."""
    counts = []
    for jitter in (0.0, 0.2):
        close = ("xla, 33.6 MB", "xla, 16.8 MB", "xla, 8.4 MB", "xla_rows, 16.8 MB")
        plans = {plan: {"seconds": 0.1 + 0.001 * n} for n, plan in enumerate(close)}
        command = scripted_gpu(plans=plans, default={"seconds": 0.3}, jitter=jitter)
        outcome = run(command, tmp_path / f"study {jitter}", effort="standard")
        counts.append(max(m.joint for m in outcome.measurements))
    settings = EFFORT_SETTINGS["standard"]
    assert counts[0] == settings.least_joint
    assert counts[0] < counts[1] <= settings.joint_rounds
