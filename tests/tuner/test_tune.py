"""The loop over workloads: what is measured, skipped, stored, resumed."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device, start_python

from autochunk.device import Device
from autochunk.errors import ArgumentError, ProbeError, StoreError
from autochunk.host import usable_cores
from autochunk.plan import Plan, candidate_plans
from autochunk.store.bundle import dump
from autochunk.store.profile import Effort, sliced_shape
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.effort import EFFORT_SETTINGS, standard_presets
from autochunk.tuner.events import (
    DeviceFound,
    Event,
    Failed,
    Finished,
    LeftOut,
    Measured,
    OtherWork,
    OutOfTime,
    SharedGpu,
    Skipped,
    SlowedGpu,
    Started,
    Subject,
)
from autochunk.tuner.load import GpuWatch
from autochunk.tuner.presets import PRESETS, workloads_of
from autochunk.tuner.study import Storage
from autochunk.tuner.task import Task
from autochunk.tuner.tune import tune, usual_wishes
from autochunk.workload import MODES, Workload

WORKLOADS = [Workload.parse(shape) for shape in ("t=512,h=4,k=8", "t=600,h=4,k=8", "t=700,h=4,k=8")]


def kinds(events: list[Event]) -> list[type[Event]]:
    left_out = Measured | DeviceFound | OtherWork | LeftOut
    return [type(event) for event in events if not isinstance(event, left_out)]


def plans_of(events: list[Event]) -> list[tuple[Workload, Plan]]:
    """What was measured."""
    return [(e.workload, e.measurement.plan) for e in events if isinstance(e, Measured)]


def measured(command: tuple[str, ...], workloads: list[Workload], **options: Any) -> list[Event]:
    """What is told, but for how busy this machine is otherwise."""
    events: list[Event] = []
    options = {"effort": "quick", **options}
    tune(workloads, worker_command=command, on_event=events.append, **options)
    return [event for event in events if not isinstance(event, OtherWork)]


def test_a_real_tune_is_read_back_by_auto(small: Workload) -> None:
    """The main road on this machine: tune, store, resolve; nothing unfinished stays behind."""
    from autochunk.resolution.resolve import resolve

    (profile,) = tune([small], effort="quick")
    resolution = resolve(small)
    choice = profile.choose()
    assert choice is not None
    assert resolution.plan == choice.plan
    assert resolution.match == "exact"
    assert profile.complete
    assert not list(ProfileStore().path.with_name("profiles.sqlite.unfinished").iterdir())


def test_what_is_tuned_is_not_tuned_again(scripted: Scripted) -> None:
    """The same effort or a weaker one skips.

    A stronger one, --force, and another jaxlib measure again.
    """
    command = scripted()
    assert kinds(measured(command, WORKLOADS[:1])) == [Started, Finished]
    assert kinds(measured(command, WORKLOADS[:1])) == [Skipped]
    assert kinds(measured(command, WORKLOADS[:1], effort="standard")) == [Started, Finished]
    assert kinds(measured(command, WORKLOADS[:1], effort="quick")) == [Skipped]
    assert kinds(measured(command, WORKLOADS[:1], force=True)) == [Started, Finished]
    newer = make_device(kind="scripted", cores=2, jax="0.13.0", jaxlib="0.13.0")
    command = scripted(device=newer.model_dump())
    assert kinds(measured(command, WORKLOADS[:1])) == [Started, Finished]


def test_quick_does_not_measure_what_auto_knows(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another layer, if that is complete and fresh; told with its name, and stored nowhere."""
    command, bundle = scripted(), tmp_path / "site.json"
    (profile,) = tune(WORKLOADS[:1], effort="quick", worker_command=command)
    bundle.write_text(dump([profile]))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(bundle))
    other = ProfileStore(tmp_path / "other.sqlite")
    (skipped,) = (
        one
        for one in measured(command, WORKLOADS[:1], store=other)
        if not isinstance(one, DeviceFound)
    )
    assert isinstance(skipped, Skipped)
    assert str(bundle) in skipped.layer
    assert skipped.profile == profile
    assert other.profiles() == []
    assert kinds(measured(command, WORKLOADS[:1], store=other, effort="standard"))[0] == Started
    newer = make_device(kind="scripted", cores=2, jax="0.13.0", jaxlib="0.13.0")
    stale = scripted(device=newer.model_dump())
    assert kinds(measured(stale, WORKLOADS[:1], store=other))[0] == Started


def test_a_share_that_was_too_short_is_followed_by_another(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is time left, once, for those that were not finished; but on a CPU."""
    shares: list[tuple[Workload, float]] = []

    def attempt(task: Task, subject: Subject, *_: Any) -> bool:
        shares.append((subject.workload, _[-1]))
        unfinished = subject.workload != WORKLOADS[1]
        (task.spent if unfinished else task.finished).add(subject.workload)
        return False

    monkeypatch.setattr("autochunk.tuner.sharing.attempt", attempt)
    measured(scripted(), WORKLOADS, timeout=60.0)
    assert [workload for workload, _ in shares] == WORKLOADS
    shares.clear()
    gpu = make_device(platform="gpu", kind="scripted", cores=0)
    measured(scripted(device=gpu.model_dump()), WORKLOADS, timeout=60.0)
    assert [workload for workload, _ in shares] == [*WORKLOADS, WORKLOADS[0], WORKLOADS[2]]
    assert shares[0][1] == pytest.approx(20.0, abs=2.0)
    assert shares[3][1] == pytest.approx(30.0, abs=2.0)


def test_a_workload_that_cannot_be_measured_does_not_stop_the_others(
    scripted: Scripted, tmp_path: Path
) -> None:
    """Failing to load, or every plan failing, is told; the next workload is measured."""
    events = measured(scripted(load=f"once:{tmp_path / 'flag'}:exit 7"), WORKLOADS[:2])
    assert kinds(events) == [Started, Failed, Started, Finished]
    assert "exit status 7" in next(event.detail for event in events if isinstance(event, Failed))
    assert kinds(measured(scripted(default={"do": "oom"}), WORKLOADS[2:])) == [Started, Failed]
    assert [profile.workload for profile in ProfileStore().profiles()] == [WORKLOADS[1].key]


@pytest.mark.parametrize("options", [{}, {"force": True}, {"gpus": ["0", "1"]}])
def test_what_failed_is_tried_again(options: dict[str, Any], scripted_gpu: Scripted) -> None:
    """That no plan could be timed is not kept.

    The reason may pass, such as another process on the GPU.
    """
    failing = scripted_gpu(default={"do": "oom"})
    assert kinds(measured(failing, WORKLOADS[:1], **options))[-1] == Failed
    assert kinds(measured(scripted_gpu(), WORKLOADS[:1], **options))[-1] == Finished


def test_what_was_measured_before_a_failure_is_stored(scripted: Scripted, tmp_path: Path) -> None:
    """Where no worker can be started any more, that is told, and what there is answers.

    The next call goes on.
    """
    flag = tmp_path / "flag"
    command = scripted(plans={"xla_rows, 1.05 MB": {"do": f"once:{flag}:die 9"}})
    refusing = ("sh", "-c", f'[ -e {flag} ] && exit 3; exec "$@"', "sh", *command)
    events = measured(refusing, WORKLOADS[:1])
    assert kinds(events) == [Started, Failed]
    (profile,) = ProfileStore().profiles()
    assert isinstance(events[-1], Failed)
    assert re.search("exit status 3.*what was measured before is kept", events[-1].detail)
    assert events[-1].profile == profile
    assert not profile.complete
    assert kinds(measured(command, WORKLOADS[:1])) == [Started, Finished]
    assert ProfileStore().profiles()[0].complete


def test_a_workload_that_fails_is_left_by_all_gpus(scripted_gpu: Scripted) -> None:
    """It is told once."""
    events = measured(scripted_gpu(load="exit 7"), WORKLOADS[:1], gpus=["0", "1", "2"])
    assert kinds(events).count(Failed) == 1


def test_gpus_need_a_jax_that_finds_them(scripted: Scripted) -> None:
    """Otherwise several processes would measure one CPU at the same time."""
    said = (
        r"GPUs 0, 1 are to be tuned, and all that jax finds in the measuring process is cpu "
        r"scripted .*leave out --devices"
    )
    with pytest.raises(ProbeError, match=said):
        measured(scripted(), WORKLOADS, gpus=["0", "1"])


def test_gpus_are_started_at_the_same_time(scripted_gpu: Scripted, tmp_path: Path) -> None:
    """Here each waits for the other."""
    meet = f"""
touch {tmp_path}/$CUDA_VISIBLE_DEVICES
until [ -e {tmp_path}/0 ] && [ -e {tmp_path}/1 ]; do sleep 0.1; done
exec "$@"
"""
    command = ("sh", "-c", meet, "sh", *scripted_gpu())
    events = measured(command, WORKLOADS[:1], gpus=["0", "1"], timeout=30.0)
    assert Finished in kinds(events)


def test_gpus_that_run_out_of_time_have_begun_all_workloads(scripted_gpu: Scripted) -> None:
    """Each has its share of the time."""
    workloads = [Workload.parse(f"b=2,t={length},h=4,k=8") for length in (2048, 1024, 1500, 1800)]
    options = {"effort": "thorough", "gpus": ["0", "1"], "timeout": 5.0}
    events = measured(scripted_gpu(delay=0.1), workloads, **options)
    assert {event.workload for event in events if isinstance(event, Started)} == set(workloads)


def test_a_share_too_short_for_a_plan_is_overrun(scripted: Scripted) -> None:
    """Otherwise nothing would ever be measured, however often it is tried."""
    workloads = [Workload.parse(f"t={length},h=4,k=8") for length in range(512, 552)]
    events = measured(scripted(delay=0.2), workloads, timeout=4.0)
    assert kinds(events)[:2] == [Started, Finished]
    assert kinds(events)[-1] == OutOfTime


def test_several_gpus_share_the_work(scripted_gpu: Scripted, tmp_path: Path) -> None:
    """Each plan is measured once, on whichever is free.

    Every worker sees the GPU that is its own; nothing unfinished stays behind.
    """
    log = tmp_path / "log"
    workloads = [Workload.parse(f"t={length},h=4,k=8") for length in (512, 600, 700, 800, 900)]
    events: list[Event] = []
    options: dict[str, Any] = {"worker_command": scripted_gpu(log=str(log)), "gpus": ["3", "7"]}
    profiles = tune(workloads, effort="quick", on_event=events.append, **options)
    assert [profile.workload for profile in profiles] == [workload.key for workload in workloads]
    assert all(profile.complete for profile in profiles)
    plans = plans_of(events)
    assert len(set(plans)) == len(plans) == sum(len(one.measurements) for one in profiles)
    assert {json.loads(line)["gpu"] for line in log.read_text().splitlines()} == {"3", "7"}
    assert not list(ProfileStore().path.with_name("profiles.sqlite.unfinished").iterdir())


def test_several_gpus_begin_with_what_takes_longest(scripted_gpu: Scripted) -> None:
    """Training comes before forward, long before short, so that no long one is left for the end.

    Each workload is told of as begun and finished once.
    """
    shapes = [f"t={length},h=4,k=8" for length in (512, 700, 600)]
    workloads = [Workload.parse(shape, mode=mode) for shape in shapes for mode in MODES]
    events = measured(scripted_gpu(), workloads, effort="quick", gpus=["3", "7"])
    started = [event.workload for event in events if isinstance(event, Started)]
    begun = [(workload.mode, workload.query_length) for workload in started]
    # One worker may be through with its first before the other one's is told of.
    assert {("training", 700), ("training", 600)} <= set(begun[:3])
    assert len(begun) == len(set(begun)) + begun.count(begun[-1]) - 1  # the last one may be shared
    assert kinds(events).count(Finished) <= len(workloads) + 1


def test_several_gpus_share_the_last_workload(scripted_gpu: Scripted, tmp_path: Path) -> None:
    """The GPU that has nothing left to do helps the other with its plans."""
    log, workloads = tmp_path / "log", [Workload.parse("b=2,t=2048,h=4,k=8")]
    command = scripted_gpu(log=str(log), delay=0.05)
    measured(command, workloads, effort="standard", gpus=["3", "7"])
    prepared = [json.loads(line) for line in log.read_text().splitlines() if '"prepare"' in line]
    assert min(sum(request["gpu"] == gpu for request in prepared) for gpu in ("3", "7")) > 3


def test_tunes_with_one_store_do_not_take_each_other_s_work_away(scripted_gpu: Scripted) -> None:
    """One that finishes another workload, or the same, leaves what a second one has begun."""
    first, second = ([Workload.parse(f"b=2,t={length},h=4,k=8")] for length in (2048, 1024))
    options = {"effort": "thorough", "gpus": ["0", "1"]}
    begun = measured(scripted_gpu(delay=0.1), first, **options, timeout=5.0)
    measured(scripted_gpu(), second, **options)
    rest = measured(scripted_gpu(), first, **options)
    plans = plans_of(begun + rest)
    assert len(plans) == len(set(plans))
    assert plans_of(begun)


def test_an_interrupted_force_goes_on(scripted: Scripted) -> None:
    """What was measured anew is not measured a third time."""
    workload = [Workload.parse("b=2,t=2048,h=4,k=8")]
    measured(scripted(), workload, effort="thorough")
    first = measured(scripted(delay=0.1), workload, effort="thorough", force=True, timeout=4.0)
    second = measured(scripted(), workload, effort="thorough", force=True)
    plans = plans_of(first + second)
    assert len(plans) == len(set(plans)) == len(ProfileStore().profiles()[0].measurements)


def test_the_first_worker_s_start_counts_as_time(tmp_path: Path) -> None:
    """A machine that takes longer to start a worker than there is time is told so, in time."""
    begun = time.monotonic()
    with pytest.raises(ProbeError, match="time ran out before a measuring process was up"):
        tune(WORKLOADS, timeout=1.0, worker_command=("sleep", "30"))
    assert time.monotonic() - begun < 15


def test_out_of_time_before_a_worker_is_up_is_told(scripted: Scripted, tmp_path: Path) -> None:
    """The deadline may come while a worker starts.

    Each workload is said to be unmeasured, and nothing fails.
    """
    up = tmp_path / "up"
    slow = f'[ -e {up} ] && exec sleep 30; touch {up}; exec "$@"'
    command = ("sh", "-c", slow, "sh", *scripted(load="exit 1"))
    events = measured(command, WORKLOADS, timeout=4.0)
    assert kinds(events)[:1] + kinds(events)[2:] == [Started, *[Started, OutOfTime] * 2]
    assert kinds(events)[1] in (OutOfTime, Failed)


def test_one_gpu_failing_stops_the_others_with_what_they_have(
    scripted_gpu: Scripted, tmp_path: Path
) -> None:
    """An error that is no workload's own ends all; what was stored before stays."""

    def fail(event: Event) -> None:
        if isinstance(event, Finished):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"effort": "quick", "gpus": ["0", "1"], "force": True}
    with pytest.raises(KeyboardInterrupt):
        tune(WORKLOADS, worker_command=scripted_gpu(), on_event=fail, **options)
    assert 1 <= len(ProfileStore().profiles()) < 3
    unfinished = ProfileStore().path.with_name("profiles.sqlite.unfinished").glob("*.journal")
    # A second --force would take them for its own.
    assert not any(Storage(journal).profiles()[0] for journal in unfinished)


def test_gpus_must_be_alike(tmp_path: Path) -> None:
    """Profiles of different devices are not made under one name."""
    code = """
import json, os, sys
for line in sys.stdin:
    kind = "GPU " + os.environ["CUDA_VISIBLE_DEVICES"]
    device = {"platform": "gpu", "kind": kind, "cores": 0, "memory_gib": 8}
    print(json.dumps({"ok": True, "device": device}), flush=True)
"""
    these = "gpu GPU 0 memory=~8GiB, gpu GPU 1 memory=~8GiB"
    said = f"GPUs that are tuned together must be alike; these are {these}"
    with pytest.raises(ProbeError, match=said):
        tune(WORKLOADS, worker_command=(sys.executable, "-c", code), gpus=["0", "1"])


def test_an_unfinished_profile_is_stored_and_finished_by_the_next_call(scripted: Scripted) -> None:
    """When time runs out, what there is answers and is marked.

    The same call then completes it without measuring anything twice.
    """
    slow, workload = scripted(delay=0.1), Workload.parse("b=2,t=2048,h=4,k=8")
    first = measured(slow, [workload], effort="thorough", timeout=4.0)
    assert kinds(first) == [Started, Finished]
    (profile,) = ProfileStore().profiles()
    assert not profile.complete
    assert profile.choose() is not None
    second = measured(scripted(), [workload], effort="thorough")
    plans = plans_of(first + second)
    assert len(plans) == len(set(plans))
    (profile,) = ProfileStore().profiles()
    assert profile.complete
    assert len(profile.measurements) == len(plans)


@pytest.mark.parametrize(("sleep", "timeout", "expected"), [(30, 2.0, 0), (0, 5.0, 1)])
def test_a_time_too_short_for_a_choice_is_told(
    sleep: int, timeout: float, expected: int, scripted: Scripted
) -> None:
    """With how many plans were measured: with none, the same command would end the same way."""
    first = {"xla, 1.05 MB": {"do": f"sleep {sleep}"}}
    command = scripted(default={"do": "sleep 30"}, plans=first)
    *_, last = measured(command, WORKLOADS[:1], timeout=timeout)
    assert isinstance(last, OutOfTime)
    assert (last.profile, last.measured) == (None, expected)
    assert ProfileStore().profiles() == []


def test_an_unfinished_profile_never_replaces_a_finished_one(scripted: Scripted) -> None:
    """A stronger effort that is cut short leaves the weaker, complete profile, and returns it."""
    workload = Workload.parse("b=2,t=2048,h=4,k=8")
    measured(scripted(), [workload])
    events: list[Event] = []
    options: dict[str, Any] = {"worker_command": scripted(delay=0.5), "effort": "thorough"}
    profiles = tune([workload], timeout=3.0, on_event=events.append, **options)
    assert kinds(events) == [Started, OutOfTime]
    assert profiles == ProfileStore().profiles()
    assert [(profile.complete, profile.effort) for profile in profiles] == [(True, "quick")]


def interrupted(command: tuple[str, ...], after: int, **options: Any) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Measured) and event.done == after:
            raise KeyboardInterrupt

    workloads = [Workload.parse("b=2,t=2048,h=4,k=8")]
    with pytest.raises(KeyboardInterrupt):
        tune(workloads, worker_command=command, on_event=interrupt, **options)


@pytest.mark.parametrize(
    ("options", "after", "stored"),
    [
        ({"effort": "quick"}, 3, ("standard", 2)),
        ({"effort": "standard", "force": True}, 1, ("standard", 2)),
        ({"effort": "standard"}, 3, ("standard", 3)),
        ({"effort": "thorough"}, 3, ("thorough", 3)),
    ],
)
def test_of_two_unfinished_profiles_the_better_stays(
    options: dict[str, Any], after: int, stored: tuple[str, int], scripted: Scripted
) -> None:
    """That of more effort, then the one that has more plans."""
    interrupted(scripted(), 2, effort="standard")
    interrupted(scripted(), after, **options)
    (profile,) = ProfileStore().profiles()
    assert (profile.effort, len(profile.measurements)) == stored


def test_what_a_budget_left_out_is_measured_without_it(scripted: Scripted) -> None:
    """An interrupted tune with a budget is not gone on with by one without."""
    command = scripted(plans={"dense": {"do": "over_budget"}})
    interrupted(command, 3, effort="quick", memory_budget_mb=1.0)
    assert "over_budget" in {m.status for m in ProfileStore().profiles()[0].measurements}
    workloads = [Workload.parse("b=2,t=2048,h=4,k=8")]
    (profile,) = tune(workloads, effort="quick", worker_command=scripted())
    assert {m.status for m in profile.measurements} <= {"ok", "pruned", "skipped"}


_FORCED = """
import json, os, sys
from autochunk.tuner.events import Finished
from autochunk.tuner.tune import tune
from autochunk.workload import Workload
shape, command = json.loads(sys.argv[1])
tell = lambda event: isinstance(event, Finished) and os.kill(os.getpid(), 9)
options = {"worker_command": command, "on_event": tell, "force": True}
tune([Workload.parse(shape)], effort="quick", gpus=["0", "1"], **options)
"""


def test_what_a_killed_tune_left_goes_when_nobody_went_on_with_it(scripted_gpu: Scripted) -> None:
    """For a month, whichever command is given then; younger work stays, to be gone on with."""
    command = scripted_gpu()
    start_python(_FORCED, json.dumps([WORKLOADS[0].shape, command])).communicate(timeout=60)
    folder = ProfileStore().path.with_name("profiles.sqlite.unfinished")
    (left,) = folder.glob("*.journal")
    young = folder / "young.journal"
    young.touch()
    month_ago = time.time() - 31 * 86_400
    os.utime(left, (month_ago, month_ago))
    measured(command, WORKLOADS[1:2])
    assert list(folder.iterdir()) == [young]


def test_interrupting_stores_what_was_measured(scripted: Scripted) -> None:
    """Ctrl-C stores the profile at hand as unfinished, and goes on to the caller."""

    def interrupt(event: Event) -> None:
        if isinstance(event, Measured) and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(WORKLOADS[:1], effort="quick", worker_command=scripted(), on_event=interrupt)
    (profile,) = ProfileStore().profiles()
    assert len(profile.measurements) == 2
    assert not profile.complete


_DRIVER = """
import json, sys
from autochunk.tuner.tune import tune
from autochunk.workload import MODES, Workload
shapes, command = json.loads(sys.argv[1])
for number, shape in enumerate(shapes):
    tune([Workload.parse(shape)], effort="quick", worker_command=command)
    print("finished", shape, flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
def test_kill_at_any_moment_loses_nothing(seed: int, scripted: Scripted, tmp_path: Path) -> None:
    """The same command goes on after kill -9, and the store opens.

    What was finished is there and is not measured again, the rest completes.
    """
    log = tmp_path / "log"
    shapes = [workload.shape for workload in WORKLOADS]
    driver = start_python(_DRIVER, json.dumps([shapes, scripted(delay=0.02, log=str(log))]))
    time.sleep(random.Random(seed).uniform(0.8, 4.0))
    driver.kill()
    out, _ = driver.communicate(timeout=30)
    finished = [line.removeprefix("finished ").strip() for line in out.splitlines()]
    stored = {profile.workload for profile in ProfileStore().profiles()}
    assert {Workload.parse(shape).key for shape in finished} <= stored
    log.unlink(missing_ok=True)
    events = measured(scripted(log=str(log)), WORKLOADS)
    assert all(profile.complete for profile in ProfileStore().profiles())
    assert len(ProfileStore().profiles()) == len(WORKLOADS)
    assert kinds(events)[: len(finished)] == [Skipped] * len(finished)


def test_a_store_that_cannot_be_written_is_found_out_first(
    scripted: Scripted, tmp_path: Path
) -> None:
    """Not after hours of measuring."""
    (tmp_path / "file").write_text("in the way")
    log, store = tmp_path / "log", ProfileStore(tmp_path / "file" / "profiles.sqlite")
    with pytest.raises(StoreError, match="AUTOCHUNK_STORE"):
        measured(scripted(log=str(log)), WORKLOADS, store=store)
    assert not log.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effort": "heroic"}, "effort must be one of quick, standard, thorough; got 'heroic'"),
        ({"timeout": 0.0}, "timeout must be a positive finite number of seconds"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": -1.0}, "timeout must be"),
        ({"memory_budget_mb": float("inf")}, "memory_budget_mb must be"),
    ],
)
def test_bad_arguments_are_told(options: dict[str, Any], words: str, scripted: Scripted) -> None:
    """Before anything starts, with what was required and what came."""
    with pytest.raises(ArgumentError, match=words):
        measured(scripted(), WORKLOADS, **options)


def test_without_workloads_what_was_missed_and_the_standard_set_are_tuned() -> None:
    """On this device, with how often it was missed."""
    device = Device(platform="cpu", kind="scripted", cores=2, memory_gib=8)
    store = ProfileStore()
    store.record_miss(device, WORKLOADS[0])
    wishes = usual_wishes(store, device, "quick")
    assert wishes.missed == {WORKLOADS[0]: 1}
    assert len(wishes.standard) == 2 * len(EFFORT_SETTINGS["quick"].presets)
    assert len(wishes.all) == 1 + len(wishes.standard)


@pytest.mark.parametrize(
    ("platform", "effort", "dtypes"),
    [
        ("cpu", "quick", {"float32"}),
        ("cpu", "standard", {"float32"}),
        ("gpu", "quick", {"bfloat16"}),
        ("gpu", "standard", {"bfloat16", "float32"}),
        ("cpu", "thorough", {"bfloat16", "float32", "float16"}),
        ("gpu", "thorough", {"bfloat16", "float32", "float16"}),
    ],
)
def test_the_standard_set_is_in_the_dtypes_that_models_use_there(
    platform: str, effort: Effort, dtypes: set[str]
) -> None:
    """Half precision on GPUs; all dtypes where time is no matter; those named where some are.

    Where time is no matter, every preset, too; on GPUs, where plans take less, more of them.
    """
    device = Device(platform=platform, kind="scripted", cores=0, memory_gib=8)
    todo = usual_wishes(ProfileStore(), device, effort).all
    assert {workload.dtype for workload in todo} == dtypes
    assert len(todo) == len(set(todo)) == 2 * len(dtypes) * len(standard_presets(effort, platform))
    named = usual_wishes(ProfileStore(), device, effort, ["float64"], ["forward"]).all
    assert {(workload.dtype, workload.mode) for workload in named} == {("float64", "forward")}


def test_what_to_tune_may_depend_on_the_device(scripted: Scripted) -> None:
    """A function is told the device that the measuring process found.

    So this process need not look for one.
    """
    told = []

    def choose(device: Device) -> list[Workload]:
        told.append(device)
        return WORKLOADS[:1]

    (profile,) = tune(choose, effort="quick", worker_command=scripted())
    assert told == [profile.device]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_shapes(name: str) -> None:
    """Each can be read, and has something to choose between."""
    for workload in workloads_of([PRESETS[name]]):
        assert len(candidate_plans(sliced_shape(workload))) > 1


@pytest.mark.parametrize("name", ["profiles.sqlite", "other.sqlite"])
def test_a_hint_comes_from_the_nearest_profile(
    name: str, scripted: Scripted, store_path: Path
) -> None:
    """A workload like a tuned one begins with the plan that was best there.

    The store is the one that the tune has, not always the user's.
    """
    best, store = "xla_rows, 1.05 MB", ProfileStore(store_path.with_name(name))
    command = scripted(plans={best: {"seconds": 0.005}}, default={"seconds": 0.01})
    measured(command, WORKLOADS[:1], store=store)
    events = measured(command, WORKLOADS[1:2], store=store)
    assert plans_of(events)[0] == (WORKLOADS[1], Plan("xla_rows", 1.05))


def test_machines_do_not_begin_with_the_same_workload(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers neither, in each of which the process has number 1."""
    begun: set[Any] = set()

    def first(event: Event) -> None:
        if isinstance(event, Started):
            begun.add(event.workload)
            raise KeyboardInterrupt

    monkeypatch.setattr("os.getpid", lambda: 1)
    command, journal = scripted(), str(tmp_path / "journal")
    for pod in range(6):
        name = f"pod-{pod} boot pid:[1] 1"
        monkeypatch.setattr("autochunk.tuner.sharing.worker_name", lambda name=name: name)
        with pytest.raises(KeyboardInterrupt):
            tune(WORKLOADS, worker_command=command, storage=journal, on_event=first)
    assert len(begun) > 1


def test_other_work_is_told(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, where it was more than any system does by itself; not where none was measured."""
    cores = iter([0.9, 0.01, 0.9, None])
    monkeypatch.setattr("autochunk.tuner.load.LoadOfOthers.cores", lambda _: next(cores))
    for told, force in ((True, False), (False, True), (False, False), (False, False)):
        events: list[Event] = []
        options: dict[str, Any] = {"effort": "quick", "force": force, "on_event": events.append}
        tune(WORKLOADS[:1], worker_command=scripted(), **options)
        assert (OtherWork(0.9, usable_cores()) == events[-1]) is told


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_what_disturbs_a_gpu_is_told(
    platform: str, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs on it, and clocks that were held down for long; where one is measured."""
    monkeypatch.setattr("autochunk.tuner.load.LoadOfOthers.cores", lambda _: None)
    monkeypatch.setattr(GpuWatch, "_count_programs", lambda watch: setattr(watch, "programs", 2))
    held = {"power cap": 0.6, "thermal slowdown": 0.05}
    monkeypatch.setattr(GpuWatch, "slowed", lambda _: held)
    device = make_device(platform=platform, kind="scripted")
    events: list[Event] = []
    command = scripted(device=device.model_dump())
    tune(WORKLOADS[:1], worker_command=command, effort="quick", on_event=events.append)
    told = [event for event in events if isinstance(event, SharedGpu | SlowedGpu)]
    expected = [SharedGpu(2), SlowedGpu("power cap", 0.6)]
    assert told == (expected if platform == "gpu" else [])


def test_what_is_unsure_is_timed_again(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """With time that is left, once each, the widest first; the joint rounds become more."""
    monkeypatch.setattr("autochunk.tuner.sharing.SHARE_OF_TIME", 5.0)
    for module in ("standing", "unsure"):  # so that no number of rounds is enough
        monkeypatch.setattr(f"autochunk.tuner.{module}.SURE", -1.0)
    events: list[Event] = []
    plans = {name: {"seconds": 0.01} for name in ("dense", "xla, do not chunk")}
    command = scripted(plans=plans, jitter=0.2, default={"seconds": 0.05})
    profiles = tune(WORKLOADS[:2], worker_command=command, on_event=events.append)
    steps = [(type(event), event.workload) for event in events if isinstance(event, Started)]
    assert len(steps) == 4
    assert {workload for _, workload in steps[2:]} == set(WORKLOADS[:2])
    stored = {profile.key: profile for profile in ProfileStore().profiles()}
    most = EFFORT_SETTINGS["standard"].joint_rounds
    for profile in profiles:
        assert stored[profile.key] == profile
        assert profile.complete
        joint = max(measurement.joint for measurement in profile.measurements)
        assert most < joint <= 2 * most
