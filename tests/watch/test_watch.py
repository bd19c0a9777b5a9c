"""The service: real processes that measure by a script, on a machine that is idle as it is told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from factories import TESTS, make_device, make_profile, make_workload

import autochunk
from autochunk.cli import main
from autochunk.device import Device
from autochunk.errors import DeviceError, MissWarning
from autochunk.plan import Plan
from autochunk.report.text import status_text
from autochunk.store import bundle
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.study import Hub, Journals
from autochunk.tuner.sync import sync
from autochunk.watch import record as records
from autochunk.watch.eyes import Eyes, descendants
from autochunk.watch.idle import Hours, Look
from autochunk.watch.lock import DeviceLock
from autochunk.watch.publish import file_of, publish
from autochunk.watch.record import Record
from autochunk.watch.running import RunningJob
from autochunk.watch.service import Options, Watch, found_device
from autochunk.watch.todo import Job, Memory

SMALL, OTHER = make_workload("t=512,h=4,k=8"), make_workload("t=1024,h=4,k=8")
SCRIPTED = str(TESTS / "tuner" / "scripted_worker.py")
# As the scripted worker says it.
DEVICE = make_device(kind="scripted", cores=2)

Event = dict[str, Any]


def scripted(**script: Any) -> tuple[str, ...]:
    return sys.executable, SCRIPTED, json.dumps(script)


@pytest.fixture
def only_watch() -> Iterator[None]:
    """The one test that watches this machine's device, of all processes that test."""
    with (Path(tempfile.gettempdir()) / "autochunk-tests-watch.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Machine:
    """Eyes for which others' cores are as they are set."""

    def __init__(self, cores: float | None = 0.0) -> None:
        self.cores = cores

    def look(self) -> Look:
        """As set."""
        return Look(cores=self.cores, free=1.0)


class Service:
    """A service in a thread of this process, and what it told."""

    def __init__(
        self, store: ProfileStore, machine: Machine, device: Device = DEVICE, **options: Any
    ) -> None:
        self.events: list[Event] = []
        self.stop = threading.Event()
        given = {"idle_minutes": 0.0, "once": True, "effort": "quick", "worker_command": scripted()}
        record = Record(store.path.with_suffix(".watch.json"), self.events.append)
        self.watch = Watch(
            store, device, Options(**{**given, **options}), record, machine, self.stop
        )

    def names(self) -> list[str]:
        """What was told, in order."""
        return [event["event"] for event in self.events]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs it does, too."""
        thread = threading.Thread(target=self.watch.run)
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join(timeout=30)
            assert not thread.is_alive()

    def wait_for(self, seen: Callable[[], object], seconds: float = 120.0) -> None:
        """Until something is seen."""
        end = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < end, self.events
            time.sleep(0.02)


def store_at(folder: Path) -> ProfileStore:
    return ProfileStore(folder / "profiles.sqlite")


def test_what_was_missed_is_measured_and_published(tmp_path: Path) -> None:
    """Most wanted first; then nothing is left."""
    store, place = store_at(tmp_path), tmp_path / "published.json"
    for workload in (SMALL, OTHER, OTHER):
        store.record_miss(DEVICE, workload)
    service = Service(store, Machine(), publish=str(place))
    assert service.watch.run()
    assert service.names() == ["started", *2 * ["began", "measured", "published"], "ended"]
    assert [one["workload"] for one in service.events if "wanted" in one] == [OTHER.key, SMALL.key]
    assert store.missed(DEVICE) == []
    assert list(bundle.read(place).profiles) == store.profiles()


def test_a_missed_function_is_measured(store_path: Path) -> None:
    """By a real measuring process, from the program that it left."""
    store, device = ProfileStore(store_path), autochunk.detect()
    sine: Any = autochunk.chunked(jnp.sin, name="sine")
    with pytest.warns(MissWarning):
        jax.eval_shape(sine, jnp.ones((64, 8)))
    service = Service(store, Machine(), device)
    assert service.watch.run()
    assert service.names() == ["started", "began", "measured", "ended"]
    assert store.missed_functions(device) == {}
    calls = [profile.function for profile in store.profiles(device)]
    assert {call.name for call in calls if call} == {"sine"}


@pytest.mark.parametrize(
    ("machine", "options", "why"),
    [
        (Machine(1.5), {}, "others use 1.5 cores"),
        (Machine(), {"hours": Hours.parse("0:01-0:02")}, "0:01-0:02"),
    ],
)
def test_once_does_not_wait_for_others(
    machine: Machine, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """It says why, and that something is left."""
    if options and time.localtime()[3:5] == (0, 1):
        pytest.skip("it is that minute")
    store = store_at(tmp_path)
    store.record_miss(DEVICE, SMALL)
    service = Service(store, machine, **options)
    assert not service.watch.run()
    assert service.names() == ["started", "waiting", "ended"]
    assert why in service.events[1]["detail"]


def test_a_machine_that_does_not_tell_is_not_used(tmp_path: Path) -> None:
    """Somebody may be at work on it."""
    service = Service(store_at(tmp_path), Machine(None))
    with pytest.raises(DeviceError, match="cannot be told"):
        service.watch.run()
    assert service.names() == ["started", "ended"]


def test_it_gives_way_and_goes_on(tmp_path: Path) -> None:
    """No plan is being measured when it says so; what was measured is kept, and gone on from."""
    store, log, machine = store_at(tmp_path), tmp_path / "requests", Machine()
    store.record_miss(DEVICE, SMALL)
    worker = scripted(log=str(log), delay=0.02)
    service = Service(store, machine, once=False, worker_command=worker)

    def requests(kind: str) -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        asked = [json.loads(line) for line in lines]
        return [str(one.get("plan")) for one in asked if one["do"] == kind]

    with service.running():
        service.wait_for(lambda: len(requests("prepare")) >= 3)
        machine.cores = 2.0
        service.wait_for(lambda: "gave way" in service.names())
        assert [one for one in descendants(os.getpid()) if SCRIPTED in command_of(one)] == []
        before = len(requests("time"))
        service.wait_for(lambda: "waiting" in service.names())
        assert len(requests("time")) == before
        kept = Journals(store.path, service_device(), "quick", None, False).study(SMALL).measured()
        assert kept
        machine.cores = 0.0
        service.wait_for(lambda: "measured" in service.names())
    names = ["started", "began", "gave way", "waiting", "began", "measured"]
    assert service.names()[: len(names)] == names
    profile = store.get(DEVICE, SMALL)
    assert profile is not None
    dense = next(one for one in profile.measurements if one.plan == Plan("dense", None))
    ratios = kept[dense.plan].ratios
    assert dense.ratios[: len(ratios)] == ratios


def hanging_job(folder: Path) -> dict[str, Any]:
    """A job whose measuring process makes a file, ``measuring``, and hangs."""
    worker = scripted(default={"do": f"once:{folder / 'measuring'}:hang"})
    job = {"kind": "missed", "workload": SMALL.key, "effort": "quick", "worker": worker}
    return job | {"store": str(folder / "store"), "storage": None, "memory_budget_mb": None}


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="needs Linux' autogroups")
def test_a_job_leaves_the_cores_to_others(tmp_path: Path) -> None:
    """It is the nicest, and the sessions that it and its measuring process lead are nice.

    Linux weighs sessions first: their niceness alone would leave others half of the cores, which
    are too few to be seen as work by a service that is told --busy-cores 1.5 on two.
    """
    running = RunningJob(hanging_job(tmp_path))
    try:
        while not (tmp_path / "measuring").exists():
            assert not running.ended(0.05)
        processes = [one for one in descendants(os.getpid()) if os.getsid(one) == one]
        assert len(processes) == 2
        assert {os.getpriority(os.PRIO_PROCESS, one) for one in processes} == {19}
        texts = [Path(f"/proc/{one}/autogroup").read_text() for one in processes]
        assert all(text.split()[1:] == ["nice", "10"] for text in texts), texts
    finally:
        running.end()
        running.result()


def test_a_job_ends_with_its_service(tmp_path: Path) -> None:
    """However that ends; a lock of its own would keep the next one from the device for ever."""
    flag, job = tmp_path / "measuring", hanging_job(tmp_path)
    code = (
        "import json, sys, time\nfrom autochunk.watch.running import RunningJob\n"
        "job = RunningJob(json.loads(sys.argv[1]))\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, json.dumps(job)]) as process:
        while not flag.exists():
            time.sleep(0.05)
        measuring = descendants(process.pid)
        assert len(measuring) == 2
        process.kill()
    end = time.monotonic() + 20
    while any(map(command_of, measuring)):
        assert time.monotonic() < end
        time.sleep(0.05)


def command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def test_what_cannot_be_measured_is_put_off(tmp_path: Path) -> None:
    """The next one is begun; another service remembers."""
    store = store_at(tmp_path)
    store.record_miss(DEVICE, SMALL)
    service = Service(store, Machine(), worker_command=scripted(load="exit 7"))
    service.watch.run()
    assert service.names() == ["started", "began", "failed", "ended"]
    assert Service(store, Machine()).watch.run()
    assert store.missed(DEVICE) == [SMALL]


def test_what_another_layer_answers_is_not_begun_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick tune leaves it alone, and it is missed on, by whoever has not that layer."""
    store, layer = store_at(tmp_path), tmp_path / "layer.json"
    layer.write_text(bundle.dump([make_profile(SMALL, service_device())]))
    monkeypatch.setenv("AUTOCHUNK_PROFILES", str(layer))
    store.record_miss(DEVICE, SMALL)
    service = Service(store, Machine())
    assert service.watch.run()
    assert service.names() == ["started", "began", "measured", "ended"]
    assert "was there" in service.events[2]["detail"]


def test_old_profiles_are_verified_and_measured_again_if_they_drifted(tmp_path: Path) -> None:
    """What still holds is not looked at again for a while."""
    store = store_at(tmp_path)
    (plan,) = {str(one.plan) for one in make_profile().measurements if one.ratio == 0.5}
    slow = {"plans": {plan: {"seconds": 0.1}}, "jitter": 0.01}
    store.put_all([make_profile(SMALL, service_device(), effort="quick")])
    service = Service(store, Machine(), worker_command=scripted(**slow))
    service.watch.run()
    assert service.names() == ["started", "began", "drifted", "began", "measured", "ended"]
    profile = store.get(DEVICE, SMALL)
    assert profile is not None
    assert profile.created != make_profile().created
    assert Service(store, Machine()).watch.run()


def service_device() -> Device:
    return found_device(scripted())[0]


def test_a_node_that_only_reads_is_tuned_by_one_that_has_time(tmp_path: Path) -> None:
    """A misses; B, which takes up the wishes of all, measures; A has it after its next sync."""
    device = service_device()
    a, b, place = store_at(tmp_path / "a"), store_at(tmp_path / "b"), str(tmp_path / "journal")
    a.record_miss(device, SMALL)
    sync(a, Hub(place), device)
    service = Service(b, Machine(), storage=place)
    assert service.watch.run()
    assert [name for name in service.names() if name != "synced"] == [
        "started",
        "began",
        "measured",
        "ended",
    ]
    assert [one.workload for one in sync(a, Hub(place), device).taken] == [SMALL.key]
    assert a.missed(device) == []


def test_a_storage_that_is_away_stops_nothing(tmp_path: Path) -> None:
    """It is told, and what is missed here is measured."""
    store = store_at(tmp_path)
    store.record_miss(DEVICE, SMALL)
    service = Service(store, Machine(), storage=str(tmp_path / "not" / "mounted"))
    assert service.watch.run()
    assert service.names()[:4] == ["started", "storage away", "began", "measured"]


def test_one_service_has_a_device() -> None:
    """Another process's lock goes with it, however it ends; of another device there is another."""
    code = (
        "import sys, time\nfrom autochunk.device import Device\n"
        "from autochunk.watch.lock import DeviceLock\n"
        "lock = DeviceLock(Device.model_validate_json(sys.argv[1]), 'test')\n"
        "print('has it', flush=True)\ntime.sleep(600)"
    )
    device = make_device(kind=f"Lock/{os.getpid()}")
    command = [sys.executable, "-c", code, device.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        with pytest.raises(DeviceError, match="another autochunk watch"):
            DeviceLock(device, "test")
        DeviceLock(device, "another GPU").close()
        process.kill()
    with DeviceLock(device, "test") as lock:
        pass
    lock.path.unlink()


def test_others_are_seen_and_its_own_are_not() -> None:
    """Of processes that keep a core busy; on a machine where much else may be at work."""
    eyes = Eyes()
    assert eyes.look().cores in (0.0, None)
    busy = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    before = set(descendants(os.getpid()))  # such as multiprocessing's resource tracker
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        assert set(descendants(os.getpid())) - before == {process.pid}
        time.sleep(0.7)
        cores = eyes.look().cores
        process.kill()
    assert cores is None or 0.0 <= cores <= (os.cpu_count() or 1)


@pytest.mark.usefixtures("only_watch")
def test_the_command_tells_what_it_did_and_will_do(tmp_path: Path) -> None:
    """With a real measuring process, until it is told to stop; a line an event, JSON if asked."""
    command = [sys.executable, "-m", "autochunk.cli", "watch", "--json", "--busy-cores", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "started"
        assert "idle for 5 minutes" in json.loads(process.stdout.readline())["detail"]
        status = [*command[:4], "--status"]
        told = subprocess.run(status, capture_output=True, text=True, check=True).stdout
        assert f"process {process.pid}" in told
        assert "runs\n" in told
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert again.returncode == 1
        assert "another autochunk watch" in again.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    (found,) = records.read_all(ProfileStore().path)
    assert found["runs"] is False


@pytest.mark.usefixtures("only_watch")
def test_told_to_stop_while_it_starts() -> None:
    """It ends as it does later, with status 0 and a word; starting takes a second or more."""
    run = (
        "import os, signal\nfrom autochunk.cli import main\nfrom autochunk.cli import sharing\n"
        "class Store(sharing.ProfileStore):\n"
        "    def __init__(self, path):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        super().__init__(path)\n"
        "sharing.ProfileStore = Store\nmain(['watch', '--json', '--busy-cores', '1000'])"
    )
    command = [sys.executable, "-c", run]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    told = [json.loads(line) for line in found.stdout.splitlines()]
    assert [one["event"] for one in told] == ["started", "ended"]
    assert told[-1]["detail"] == "told to stop"


@pytest.mark.parametrize("hours", ["", "25-3"])
def test_hours_that_are_none(hours: str) -> None:
    """An empty one, as of a variable that is not set, is not all day."""
    result = CliRunner().invoke(main, ["watch", "--once", "--hours", hours])
    assert result.exit_code == 1
    assert "hours must be two times of day" in str(result.exception) + result.stderr


def test_what_is_told_of_services(tmp_path: Path) -> None:
    """From the first moment on, of each that a store has; of none, too."""
    store = tmp_path / "profiles.sqlite"
    assert "No service" in status_text(records.read_all(store))
    for which in ("one", "two"):
        Record(records.path_of(store, which), lambda _: None).event("started", device="cpu")
    told = status_text(records.read_all(store))
    assert told.count(f"process {os.getpid()} on") == told.count("runs\n") == 2
    record = Record(records.path_of(store, "two"), lambda _: None)
    record.now("waiting", [Job("missed", SMALL.key, "quick", 3)], detail="others use 2 cores")
    told = status_text(records.read_all(store))
    assert "waiting others use 2 cores" in told
    assert f"missed {SMALL.key}, wanted 3" in told


def test_records_that_are_none(tmp_path: Path) -> None:
    """Begin anew; of what is remembered, what is what it should be stays."""
    path = tmp_path / "record.json"
    for text in ("", "[]", '{"memory": 3}', "\0"):
        path.write_text(text)
        assert Record(path, print).memory == Memory()
    memory = {"verified": {"a": 1.0}, "drifted": [3], "tries": [], "not_before": {"a": "b"}}
    path.write_text(json.dumps({"written": "now", "events": 3, "memory": memory}))
    record = Record(path, lambda _: None)
    assert record.memory == Memory(verified={"a": 1.0})
    record.event("started")
    assert path.stat().st_mode & 0o777 == 0o600
    assert Record(path, print).memory == record.memory


def test_nothing_better_is_overwritten_in_what_is_published(tmp_path: Path) -> None:
    """Of another node of the kind, or another kind; a folder has a file for each kind."""
    quick, thorough = make_profile(SMALL, effort="quick"), make_profile(SMALL, effort="thorough")
    place = file_of(str(tmp_path), make_device())
    assert publish(str(tmp_path), [thorough], make_device()) == 1
    assert publish(str(tmp_path), [quick], make_device()) is None
    other = make_profile(SMALL, make_device(kind="Another/Kind"))
    assert publish(place, [quick, other], make_device()) == 1
    assert set(bundle.read(place).profiles) == {thorough, other}
    assert [path.name for path in tmp_path.iterdir()] == [Path(place).name]
