"""What machines of one kind tell each other by way of a storage: profiles, and what they missed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from factories import make_device, make_function_profile, make_profile, make_workload, run_python

from autochunk.device import detect
from autochunk.errors import StorageError
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.study import Hub, Storage
from autochunk.tuner.study.storage import MISSES
from autochunk.tuner.sync import Synced, machine_name, open_hub, sync, worth_taking

DEVICE = make_device()
ONE, OTHER = make_workload("t=512,h=4,k=8"), make_workload("t=1024,h=4,k=8")


def store_at(folder: Path) -> ProfileStore:
    return ProfileStore(folder / "profiles.sqlite")


def synced(store: ProfileStore, place: str) -> Synced:
    """As a machine whose process begins anew."""
    return sync(store, Hub(place), DEVICE)


def test_what_one_has_the_other_takes(place: str, tmp_path: Path) -> None:
    """Attention and functions, finished and cut short; a second time nothing moves."""
    a, b = store_at(tmp_path / "a"), store_at(tmp_path / "b")
    profiles = [make_profile(ONE), make_profile(OTHER, complete=False), make_function_profile()]
    a.put_all(profiles)
    assert len(synced(a, place).handed_in) == 3
    found = synced(b, place)
    assert {profile.key for profile in found.taken} == {profile.key for profile in profiles}
    assert found.handed_in == ()
    assert b.profiles() == a.profiles()
    for store in (a, b):
        again = synced(store, place)
        assert (again.taken, again.handed_in, again.missed) == ((), (), {})


def test_another_kind_of_device_takes_nothing(place: str, tmp_path: Path) -> None:
    """Nor are its misses anybody else's; of what it imported from others it hands in nothing."""
    a, b = store_at(tmp_path / "a"), store_at(tmp_path / "b")
    a.put(make_profile(ONE))
    a.put(make_profile(ONE, make_device(kind="Another/Kind")))
    a.record_miss(DEVICE, OTHER)
    assert len(synced(a, place).handed_in) == 1
    found = sync(b, Hub(place), make_device(kind="Another/Kind"))
    assert (found.taken, found.wishes) == ((), {})


def test_misses_of_all_machines_are_wishes(place: str, tmp_path: Path) -> None:
    """With counts that add up, once for each machine however often it tells them; most first."""
    a, b = store_at(tmp_path / "a"), store_at(tmp_path / "b")
    for store, times in ((a, 1), (b, 2)):
        store.record_miss(DEVICE, ONE)
        for _ in range(times):
            store.record_miss(DEVICE, OTHER)
    assert synced(a, place).missed == {ONE: 1, OTHER: 1}
    assert synced(b, place).missed == {ONE: 1, OTHER: 2}
    assert list(synced(a, place).wishes.items()) == [(OTHER, 3), (ONE, 2)]
    a.record_miss(DEVICE, ONE)
    found = synced(a, place)
    assert found.missed == {ONE: 2}
    assert found.wishes == {OTHER: 3, ONE: 3}


def test_what_another_measured_is_missed_no_more(place: str, tmp_path: Path) -> None:
    """A misses, B measures, A has it after its next sync; nobody wishes for it then."""
    a, b = store_at(tmp_path / "a"), store_at(tmp_path / "b")
    a.record_miss(DEVICE, ONE)
    synced(a, place)
    assert synced(b, place).wishes == {ONE: 1}
    b.put(make_profile(ONE))
    assert synced(b, place).wishes == {}
    assert synced(a, place).wishes == {}
    assert a.get(DEVICE, ONE) == make_profile(ONE)
    assert a.misses(DEVICE) == {}
    assert Hub(place).shared(DEVICE).misses == {machine_name(a): {}}


@pytest.mark.parametrize(
    ("ours", "theirs", "takes"),
    [
        ({"effort": "quick"}, {"effort": "thorough"}, True),
        ({"effort": "thorough"}, {"effort": "quick"}, False),
        ({"complete": True}, {"complete": False, "effort": "thorough"}, False),
        ({"complete": False}, {"complete": True, "effort": "quick"}, True),
        ({"created": "2026-01-03T00:00:00Z"}, {}, False),
        ({}, {"created": "2026-01-03T00:00:00Z"}, True),
    ],
)
def test_nothing_better_is_overwritten(
    ours: dict[str, Any], theirs: dict[str, Any], takes: bool, tmp_path: Path
) -> None:
    """Neither in the store nor in the storage, whoever comes first."""
    place = str(tmp_path / "journal")
    a, b = store_at(tmp_path / "a"), store_at(tmp_path / "b")
    mine, others = make_profile(ONE, **ours), make_profile(ONE, **theirs)
    a.put(mine)
    b.put(others)
    for store in (b, a, b, a):
        synced(store, place)
    best = others if takes else mine
    assert [store.get(DEVICE, ONE) for store in (a, b)] == [best, best]


def test_what_is_stale_here_stands_in_place_of_nothing_fresh() -> None:
    """However thorough: it would be measured again and taken again for ever."""
    older = make_device(jaxlib="0.9.0")
    old, new = make_profile(ONE, older, effort="thorough"), make_profile(ONE, effort="quick")
    assert old.stale_reasons(DEVICE)
    assert worth_taking([old], [new], DEVICE) == []
    assert worth_taking([old], [], DEVICE) == [old]
    assert worth_taking([old, new], [], DEVICE) == [new]
    assert worth_taking([old], [make_profile(ONE, older, effort="quick")], DEVICE) == [old]


def test_a_newer_autochunks_is_left_alone(place: str, tmp_path: Path) -> None:
    """It is counted; what this version has of the same stays at home."""
    study = Storage(place).study(DEVICE, ONE, "standard")
    newer = json.dumps({**json.loads(make_profile(ONE).model_dump_json()), "schema_version": 9})
    study.set_attribute("profile", newer)
    store = store_at(tmp_path / "a")
    store.put(make_profile(ONE))
    found = synced(store, place)
    assert (found.newer, found.taken, found.handed_in) == (1, (), ())
    assert Storage(place).study(DEVICE, ONE, "standard").attribute("profile") == newer


def test_misses_that_others_wrote_are_read_with_care(place: str) -> None:
    """Of a newer version, or of whatever else has the database: what is understood counts."""
    hub = Hub(place)
    hub.tell_missed(DEVICE, "a", {ONE: 3})
    study = optuna.load_study(study_name=DEVICE.key + MISSES, storage=hub._optuna)
    study.set_user_attr("b", {"op=unheard of": 3, ONE.key: -1, OTHER.key: "many"})
    study.set_user_attr("c", ["no", "counts"])
    assert hub.shared(DEVICE).wishes() == {ONE: 4, OTHER: 1}


def test_misses_are_no_workload_that_is_not_finished(place: str) -> None:
    """Of a storage's profiles, as they are exported."""
    Hub(place).tell_missed(DEVICE, "a", {ONE: 3})
    assert Storage(place).profiles() == ([], 0)


def test_what_was_handed_in_is_found_by_a_shared_tune(place: str, tmp_path: Path) -> None:
    """A finished profile is its study's; one that was cut short ends no search."""
    store = store_at(tmp_path / "a")
    store.put_all([make_profile(ONE), make_profile(OTHER, complete=False)])
    synced(store, place)
    assert Storage(place).study(DEVICE, ONE, "standard").profile == make_profile(ONE)
    assert Storage(place).study(DEVICE, OTHER, "standard").profile is None


def test_many_at_once(place: str, tmp_path: Path) -> None:
    """From every node's prolog: all end with all that was there, and each miss is counted."""
    stores = [store_at(tmp_path / str(number)) for number in range(4)]
    workloads = [make_workload(f"t={128 * number},h=4,k=8") for number in range(1, 5)]
    for store, workload in zip(stores, workloads, strict=True):
        store.put(make_profile(workload))
        store.record_miss(DEVICE, OTHER)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda store: synced(store, place), stores))
    for store in stores:
        synced(store, place)
        assert store.workloads(DEVICE) == sorted(workload.key for workload in workloads)
    assert synced(stores[0], place).wishes == {OTHER: 4}


def run_sync(place: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autochunk.cli", "sync", "--storage", place, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_says_what_moved(tmp_path: Path) -> None:
    """As a line, or as JSON."""
    here, place = detect(), str(tmp_path / "journal")
    store = ProfileStore()
    store.put(make_profile(ONE, here))
    store.record_miss(here, OTHER)
    done = run_sync(place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 profiles taken, 1 handed in, 1 misses told; 1 workloads are missed" in done.stdout
    other = tmp_path / "other.sqlite"
    done = run_sync(place, "--store", str(other), "--json")
    found = json.loads(done.stdout)
    assert [one["workload"] for one in found["taken"]] == [ONE.key]
    assert found["wishes"] == {OTHER.key: 1}


def test_a_storage_that_is_away_is_one_line_and_a_status(tmp_path: Path) -> None:
    """Without its password; a shared folder that is not there is not made."""
    with pytest.raises(StorageError, match="there is no folder"):
        open_hub(str(tmp_path / "not mounted" / "journal"))
    with socket.socket() as one:  # nobody listens on it
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        done = run_sync(f"postgresql://me:hunter2@127.0.0.1:{port}/autochunk")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "hunter2" not in done.stderr
    assert "cannot be used" in done.stderr


def test_nothing_is_asked_of_a_storage_while_a_model_traces() -> None:
    """What answers "auto" does not even load what would ask it."""
    loaded = run_python(
        "import sys, jax.numpy as jnp, autochunk\n"
        "x = jnp.ones((1, 8, 2, 4))\n"
        "autochunk.dot_product_attention(x, x, x)\n"
        "print(*sys.modules)"
    ).split()
    assert [name for name in loaded if name.startswith(("optuna", "autochunk.tuner"))] == []
