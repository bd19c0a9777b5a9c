"""Studies that several workers share: who measures what, and what becomes of plans of the dead."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from factories import Scripted, make_device, make_measurement, make_profile, start_python
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from autochunk.errors import ArgumentError, StorageError
from autochunk.plan import Plan
from autochunk.store.profile import Effort
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.study import Journals, Storage, Study, liveness, open_private, study_name
from autochunk.tuner.tune import tune
from autochunk.workload import Workload

WORKLOAD = Workload.parse("t=512,h=4,k=8")
PLANS = [Plan("xla", 16.0), Plan("xla_rows", 16.0), Plan("dense", None)]


def open_study(place: str) -> Study:
    return Storage(place).study(make_device(), WORKLOAD, "quick")


def measure(study: Study, plan: Plan, ratio: float = 1.0) -> None:
    claim = study.claim([plan])
    assert claim is not None
    with claim:
        measurement = make_measurement(plan.implementation, plan.max_chunk_size_mb, ratio)
        claim.done([measurement], study.anchor)


def test_each_plan_is_claimed_once(place: str) -> None:
    """Two workers that ask in turn get different plans, then nothing."""
    one, other = open_study(place), open_study(place)
    claims = [study.claim(PLANS) for study in (one, other, one, other)]
    assert [claim and claim.plan for claim in claims] == [*PLANS, None]
    assert one.workers() == 3


def test_what_one_measured_the_other_sees(place: str) -> None:
    """With its times; an unmeasured plan stays free."""
    one, other = open_study(place), open_study(place)
    one.anchor = PLANS[0]
    measure(one, PLANS[0], 0.5)
    assert other.anchor == PLANS[0]
    assert other.measured()[PLANS[0]].ratio == 0.5
    claim = other.claim(PLANS)
    assert claim is not None
    assert claim.plan == PLANS[1]


def test_trials_tell_optunas_own_tools(place: str) -> None:
    """Each has its plan as parameters, on an axis of logarithms, and figures, if it failed, too."""
    study = open_study(place)
    study.anchor = PLANS[0]
    measure(study, PLANS[0], 0.5)
    failed = Plan("xla_rows", 2.0)
    claim = study.claim([failed])
    assert claim is not None
    with claim:
        claim.done([make_measurement("xla_rows", 2.0, status="oom")], study.anchor)
    trials = study._study.get_trials()
    assert [(trial.state.name, trial.value) for trial in trials] == [
        ("COMPLETE", 0.5),
        ("PRUNED", None),
    ]
    assert [trial.params for trial in trials] == [
        {"implementation": "xla", "xla.max_chunk_size_mb": 16.0},
        {"implementation": "xla_rows", "xla_rows.max_chunk_size_mb": 2.0},
    ]
    limits = trials[0].distributions["xla.max_chunk_size_mb"]
    assert isinstance(limits, FloatDistribution)
    assert (limits.log, limits.low, limits.high) == (True, 1e-3, 1e5)
    assert trials[0].user_attrs["memory_mb"] == 100.0
    assert trials[0].user_attrs["seconds"] == pytest.approx(0.05)
    assert [trial.user_attrs["status"] for trial in trials] == ["ok", "oom"]
    assert study._study.metric_names == ["time over that of the anchor"]


def test_a_study_with_other_axes_goes_on(place: str) -> None:
    """An older version's has none of logarithms, and Optuna lets no other in.

    The plan's parameter is left out, its measurement is not.
    """
    study = open_study(place)
    study.anchor = PLANS[0]
    older = FloatDistribution(0.0, 1e12)
    name = "xla.max_chunk_size_mb"
    study._study.add_trial(create_trial(value=1.0, params={name: 4.0}, distributions={name: older}))
    measure(study, PLANS[0], 0.5)
    assert study.measured()[PLANS[0]].ratio == 0.5


@pytest.mark.parametrize("limit", [1e-5, 1e-3, 1e5, 1e9])
def test_limits_of_any_size_are_parameters(limit: float, tmp_path: Path) -> None:
    """Also those beyond what limits mostly are."""
    study = open_study(str(tmp_path / "journal"))
    measure(study, Plan("xla", limit))
    (trial,) = study._study.get_trials()
    assert trial.params["xla.max_chunk_size_mb"] == limit


def test_a_claim_that_is_left_is_free_again(place: str) -> None:
    """An error in the middle of a measurement gives the plan to whoever asks next."""
    study = open_study(place)
    claim = study.claim(PLANS[:1])
    assert claim is not None
    with pytest.raises(ZeroDivisionError), claim:
        _ = 1 / 0
    again = open_study(place).claim(PLANS[:1])
    assert again is not None
    assert again.plan == PLANS[0]


def test_times_beside_another_anchor_do_not_count(place: str) -> None:
    """They are left out and measured again; a plan without times is known whatever the anchor."""
    study = open_study(place)
    study.anchor = PLANS[0]
    measure(study, PLANS[1], 0.5)
    claim = study.claim([PLANS[2]])
    assert claim is not None
    with claim:
        claim.done([make_measurement("dense", None, status="oom")], study.anchor)
    study.anchor = PLANS[2]
    assert list(study.measured()) == [PLANS[2]]
    assert study.claim([PLANS[2]]) is None
    again = study.claim([PLANS[1]])
    assert again is not None
    assert again.plan == PLANS[1]


def test_joint_rounds_are_held_once_and_overwrite(place: str) -> None:
    """Whoever holds them hands in the finalists anew."""
    study = open_study(place)
    study.anchor = PLANS[0]
    measure(study, PLANS[0], 0.5)
    claim = study.claim_joint_rounds()
    assert claim is not None
    assert open_study(place).claim_joint_rounds() is None
    with claim:
        claim.done([make_measurement("xla", 16.0, 0.4)], study.anchor)
    assert open_study(place).claim_joint_rounds() is None
    assert study.measured()[PLANS[0]].ratio == 0.4


_CLAIMER = """
import os, sys
from factories import make_device
from autochunk.plan import Plan
from autochunk.tuner.study import Storage
from autochunk.workload import Workload
study = Storage(sys.argv[1]).study(make_device(), Workload.parse(sys.argv[2]), "quick")
claim = study.claim([Plan("xla", 16.0)])
print(claim.plan, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_dead_of_this_machine_are_found_at_once(place: str) -> None:
    """A process that was killed with a claim in its hands holds it no longer."""
    killed = start_python(_CLAIMER, place, WORKLOAD.shape)
    out, complaints = killed.communicate(timeout=60)
    assert out == "xla, 16 MB\n", complaints
    assert killed.returncode == -signal.SIGKILL
    claim = open_study(place).claim(PLANS[:1])
    assert claim is not None
    assert claim.plan == PLANS[0]


def test_the_silent_of_other_machines_are_given_up(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose process cannot be looked at is dead when it has written nothing for a while.

    What it hands in late is not taken.
    """
    study = open_study(place)
    monkeypatch.setattr(liveness, "worker_name", lambda: "elsewhere boot pid:[1] 1")
    claim = study.claim(PLANS[:1])
    assert claim is not None
    monkeypatch.undo()
    assert open_study(place).claim(PLANS[:1]) is None
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.05)
    time.sleep(0.1)
    second = open_study(place).claim(PLANS[:1])
    assert second is not None
    assert second.plan == PLANS[0]
    claim.report(1.0, 0)
    claim.done([make_measurement("xla", 16.0, 0.1)], None)
    assert study.measured() == {}


def test_a_claim_that_nobody_signed_is_soon_free(place: str) -> None:
    """Whoever asked for it was killed before its name was on it.

    If it is only slow, it finds that out, and claims again. The next worker waits that long: a
    tune that left the plan to the dead would end unfinished.
    """
    study = open_study(place)
    study._queue(str(PLANS[0]), PLANS[0])
    study._study.ask()
    claim = study.claim(PLANS[:1])
    assert claim is not None
    assert claim.plan == PLANS[0]


@pytest.mark.parametrize("signed", [False, True])
def test_a_claim_of_a_time_to_come_keeps_nobody_waiting(place: str, signed: bool) -> None:
    """By a clock that is days ahead, or in a damaged file: nobody waits until that day."""
    study = open_study(place)
    worker = {"worker": "elsewhere boot space 1", "alive": time.time() + 1e6} if signed else {}
    trial = create_trial(state=TrialState.RUNNING, user_attrs={"subject": str(PLANS[0]), **worker})
    trial.datetime_start = datetime.now() + timedelta(days=9)
    study._study.add_trial(trial)
    assert study.workers() == 0
    claim = study.claim(PLANS[:1])
    assert claim is not None
    assert claim.plan == PLANS[0]


def test_a_plan_that_is_only_queued_keeps_nobody_waiting(place: str) -> None:
    """Whoever queued it may have died before taking it.

    It is no work in progress, and the next to claim takes it.
    """
    study = open_study(place)
    study._queue(str(PLANS[0]), PLANS[0])
    assert study.workers() == 0
    claim = study.claim(PLANS[:1])
    assert claim is not None
    assert claim.plan == PLANS[0]


def test_a_living_worker_is_not_silent(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes while it measures, however long that takes."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.05)
    claim = open_study(place).claim(PLANS[:1])
    assert claim is not None
    with claim:
        monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.5)
        time.sleep(1.0)
        assert open_study(place).claim(PLANS[:1]) is None


def test_finished_profiles_are_kept(place: str) -> None:
    """They are kept for the other workers, and for one bundle of the whole cluster.

    Different kinds of device stand side by side.
    """
    devices = [make_device(), make_device(kind="Another/Kind")]
    for device in devices:
        study = Storage(place).study(device, WORKLOAD, "quick")
        assert study.profile is None
        study.profile = make_profile(device=device)
    Storage(place).study(make_device(), Workload.parse("t=1,k=8"), "quick")
    assert Storage(place).profiles()[1] == 1
    assert open_study(place).profile == make_profile(device=devices[0])
    kinds = sorted(profile.device.kind for profile in Storage(place).profiles()[0])
    assert kinds == ["Another/Kind", "Made/Up"]


def test_of_two_efforts_the_better_profile_is_taken_and_a_newer_version_s_is_counted(
    place: str,
) -> None:
    """A storage may hold both; a bundle has one profile of each workload and device."""
    storage = Storage(place)
    efforts: tuple[Effort, ...] = ("standard", "quick")
    for effort in efforts:
        storage.study(make_device(), WORKLOAD, effort).profile = make_profile(effort=effort)
    newer = storage.study(make_device(), Workload.parse("t=1,k=8"), "quick")
    newer._study.set_user_attr("profile", '{"schema_version": 7}')
    profiles, others = storage.profiles()
    assert ([profile.effort for profile in profiles], others) == (["standard"], 1)
    with pytest.raises(StorageError, match="newer autochunk"):
        _ = newer.profile


def test_another_jaxlib_or_cudnn_is_another_study() -> None:
    """Its programs are others, and so are their times."""
    devices = [make_device(), make_device(jaxlib="0.13.0")]
    devices += [make_device(cudnn=version) for version in ("9.1", "9.9")]
    assert len({study_name(device, WORKLOAD, "quick") for device in devices}) == 4


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:1/nothing",
        "nosuchdatabase://me:hunter2@host/name",
        "postgresql://me:hunter2@no port/x",
    ],
)
def test_a_storage_that_cannot_be_reached_is_one_line(url: str) -> None:
    """Without the password."""
    with pytest.raises(StorageError, match="cannot be used") as error:
        Storage(url)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_password_that_is_not_encoded_is_told_and_not_shown() -> None:
    """Half of it would pass for the host's name."""
    with pytest.raises(StorageError, match="%40") as error:
        Storage("postgresql://me:p@ss/w@127.0.0.1/name")
    assert "ss" not in str(error.value).replace("password", "").replace("PGPASSWORD", "")


def test_a_journal_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    """A mistyped name is an error, and leaves nothing behind."""
    with pytest.raises(StorageError, match="there is no storage"):
        Storage(tmp_path / "shared" / "typo.journal", make=False)
    assert not (tmp_path / "shared").exists()


def test_what_was_tuned_before_is_given_to_the_others(scripted: Scripted, tmp_path: Path) -> None:
    """A worker that skips a workload brings its own profile of it."""
    store, place = ProfileStore(), str(tmp_path / "journal")
    tune([WORKLOAD], effort="standard", worker_command=scripted(), store=store)
    tune([WORKLOAD], effort="quick", worker_command=scripted(), store=store, storage=place)
    assert Storage(place).profiles() == (store.profiles(), 0)


def test_a_journal_in_an_impossible_place(tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be used"):
        Storage(tmp_path / "file" / "journal")


def test_workers_may_open_a_new_storage_at_the_same_time(place: str) -> None:
    """All make its file or tables, one after the other or not."""
    code = """
import sys
from autochunk.tuner.study import Storage
Storage(sys.argv[1]).profiles()
print("open")
"""
    opened = [start_python(code, place) for _ in range(6)]
    assert [process.communicate(timeout=120)[0] for process in opened] == ["open\n"] * 6


def test_force_and_a_shared_storage_do_not_mix(tmp_path: Path) -> None:
    """What others measured is not for one worker to throw away."""
    with pytest.raises(ArgumentError, match="name a new storage"):
        tune([WORKLOAD], force=True, storage=str(tmp_path / "journal"))


_WORKER = """
import json, sys
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.events import Measured
from autochunk.tuner.tune import tune
from autochunk.workload import Workload
place, store, shapes, command = json.loads(sys.argv[1])
def tell(event):
    if isinstance(event, Measured):
        print(event.workload.key, event.measurement.plan, sep="; ", flush=True)
tune(
    [Workload.parse(shape) for shape in shapes],
    effort="standard",
    worker_command=command,
    storage=place,
    store=ProfileStore(store),
    on_event=tell,
)
"""


def test_workers_share_and_one_is_killed(place: str, scripted: Scripted, tmp_path: Path) -> None:
    """Three processes share one storage, and one of them is killed half-way.

    Every plan is measured, none twice, and the two others end with the same profiles.
    """
    shapes = ["b=2,t=2048,h=4,k=8", "b=2,t=1024,h=4,k=8", "b=2,t=1500,h=4,k=8"]
    keys = sorted(Workload.parse(shape).key for shape in shapes)
    stores = [ProfileStore(tmp_path / f"store{number}") for number in range(3)]
    command = scripted(delay=0.02)
    workers = [
        start_python(_WORKER, json.dumps([place, str(store.path), shapes, command]))
        for store in stores
    ]
    assert workers[0].stdout is not None
    lines = [workers[0].stdout.readline() for _ in range(3)]
    workers[0].kill()
    lines += workers[0].communicate()[0].splitlines(keepends=True)
    for worker in workers[1:]:
        out, complaints = worker.communicate(timeout=120)
        assert worker.returncode == 0, complaints
        lines += out.splitlines(keepends=True)
    profiles = stores[1].profiles()
    assert profiles == stores[2].profiles()
    assert [profile.workload for profile in profiles] == keys
    assert all(profile.complete for profile in profiles)
    measured = Counter(line.strip() for line in lines)
    assert max(measured.values()) == 1
    plans = {f"{profile.workload}; {m.plan}" for profile in profiles for m in profile.measurements}
    assert set(measured) == plans
    kept, _ = Storage(place).profiles()
    assert {(p.workload, p.created) for p in kept} == {(p.workload, p.created) for p in profiles}


def test_a_study_of_an_older_version_goes_on(place: str) -> None:
    """Its name had the memory in it: what was measured under that is not measured again."""
    today = study_name(make_device(), WORKLOAD, "quick")
    then = today.replace(" jaxlib=", " memory=24GiB jaxlib=")
    older = Study(place, Storage(place)._optuna, then)
    older.anchor = PLANS[0]
    measure(older, PLANS[0], 0.5)
    for study in (open_study(place), open_study(place)):
        assert study.measured()[PLANS[0]].ratio == 0.5
    other = Storage(place).study(make_device(cores=5), WORKLOAD, "quick")
    assert other.measured() == {}


def test_an_unfinished_journal_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its file is named by the digest of a name that had the memory in it."""
    device = make_device(memory_gib=24)
    journals = Journals(tmp_path / "store", device, "quick", memory_budget_mb=None, force=False)
    name = study_name(device, WORKLOAD, "quick").replace(" jaxlib=", " memory=24GiB jaxlib=")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    journal = tmp_path / "store.unfinished" / f"{digest}.journal"
    older = Study(str(journal), open_private(journal)._optuna, name)
    older.anchor = PLANS[0]
    measure(older, PLANS[0], 0.5)
    assert journals.study(WORKLOAD).measured()[PLANS[0]].ratio == 0.5
    assert list(journal.parent.glob("*.journal")) == [journal]
