"""What older versions stored under keys with more in them: found, kept, and one with today's.

Rows and bundles are written as those versions did, whose keys had the exact memory, and in a CPU's
kind a hash of all its flags.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import jax
import pytest
from factories import make_device, make_profile, make_workload

from autochunk import host
from autochunk.device import Device, detect
from autochunk.errors import BundleError, StoreError
from autochunk.resolution.layers import BundleLayer
from autochunk.resolution.resolve import resolve
from autochunk.store import bundle, merge
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

RELEASED = Path(__file__).parent / "released"
WORKLOAD = make_workload("t=1,k=8")
HERE = make_device(memory_gib=999)
FORMER_KIND = host.former_cpu_kind()

needs_flags = pytest.mark.skipif(FORMER_KIND is None, reason="this CPU's flags are not told")


def older(profile: Profile) -> tuple[str, str]:
    """A profile's key and text as older versions had them; this machine's CPU by its old kind."""
    data = profile.model_dump(mode="json")
    device = data["device"]
    if device["kind"] == host.cpu_kind():
        device["kind"] = FORMER_KIND
    cores = f" cores={device['cores']}" if device["cores"] else ""
    key = f"{device['platform']} {device['kind']}{cores} memory={device['memory_gib']}GiB"
    return key, json.dumps(data)


def older_store(path: Path, *profiles: Profile, missed: str = "") -> ProfileStore:
    """A store with profiles, and a missed workload, under older versions' keys."""
    ProfileStore(path).check_writable()
    with closing(sqlite3.connect(path)) as file, file:
        for profile in profiles:
            key, text = older(profile)
            row = (f"{key} | {profile.workload}", text)
            file.execute("INSERT INTO profiles (key, value) VALUES (?, ?)", row)
            if missed:
                row = (f"{key} | {missed}", '{"when": "2026-01-01T00:00:00Z"}')
                file.execute("REPLACE INTO missed (key, value) VALUES (?, ?)", row)
    return ProfileStore(path)


def older_bundle(*profiles: Profile) -> str:
    """A bundle with profiles as older versions wrote it, provenance included."""
    content = json.loads(bundle.dump([])) | {"schema_version": 3}
    pairs = [older(profile) for profile in profiles]
    entries = [bundle._entry(json.loads(text)) for _, text in pairs]
    created = sorted(profile.created for profile in profiles)
    content["provenance"] |= {
        "devices": sorted({key for key, _ in pairs}),
        "oldest": created[0],
        "newest": created[-1],
        "profiles": len(profiles),
    }
    checksum = bundle._checksum(entry["digest"] for entry in entries)
    return json.dumps(content | {"checksum": checksum, "profiles": entries})


def row_keys(store: ProfileStore, table: str = "profiles") -> list[str]:
    """What is in the file."""
    with closing(sqlite3.connect(store.path)) as file:
        return sorted(key for (key,) in file.execute(f'SELECT key FROM "{table}"'))


def profile_of(memory_gib: int, day: int = 1, *, complete: bool = True) -> Profile:
    """A profile that was made on a day, on a machine with this memory."""
    device, created = make_device(memory_gib=memory_gib), f"2026-01-{day:02}T00:00:00Z"
    return make_profile(WORKLOAD, device, created=created, complete=complete)


# --- The store ------------------------------------------------------------------------------------


def test_a_released_store_answers(tmp_path: Path) -> None:
    """Under each device's key of today, whatever memory this machine has; misses as well."""
    store = ProfileStore(shutil.copy(RELEASED / "store-1.sqlite", tmp_path))
    gpu = make_device(platform="gpu", kind="Made Up 80GB", cores=0, memory_gib=79)
    assert sorted(store.keys()) == sorted(profile.key for profile in store.profiles())
    assert {profile.device.key for profile in store.profiles()} == {HERE.key, gpu.key}
    for device, count in ((HERE, 2), (gpu, 1)):
        assert len(store.workloads(device)) == len(store.profiles(device)) == count
        for profile in store.profiles(device):
            assert store.get(device, profile.parsed_workload()) == profile
    assert [workload.query_length for workload in store.missed(HERE)] == [77]
    assert store.unreadable() == []


def test_a_released_store_is_rewritten_row_by_row(tmp_path: Path) -> None:
    """What is put again is under today's key alone; the rest stays as it is until then."""
    store = ProfileStore(shutil.copy(RELEASED / "store-1.sqlite", tmp_path))
    before, (first, second) = row_keys(store), store.profiles(HERE)
    store.put(first)
    assert [key for key in row_keys(store) if key not in before] == [" | ".join(first.key)]
    assert len(row_keys(store)) == len(before)
    store.put_all([second], expected={second.key: second})
    assert store.profiles(HERE) == [first, second]
    assert sum(" memory=" in key for key in row_keys(store)) == 1


@needs_flags
def test_this_machine_s_rows_under_its_former_kind_answer() -> None:
    """With them the workloads that were missed, and what asks the store."""
    here = detect(jax.devices("cpu")[0])
    device = here.model_copy(update={"memory_gib": here.memory_gib + 1})
    other = make_workload("t=7,k=8")
    profile = make_profile(WORKLOAD, device)
    store = older_store(ProfileStore().path, profile, missed=other.key)
    assert FORMER_KIND is not None
    assert FORMER_KIND in row_keys(store)[0]
    assert store.get(here, WORKLOAD) == profile
    assert store.missed(here) == [other]
    assert resolve(WORKLOAD, device=here).match == "exact"
    store.record_miss(here, other)
    assert len(row_keys(store, "missed")) == 1
    store.put(profile)
    assert row_keys(store) == [" | ".join((here.key, WORKLOAD.key))]
    assert store.forget_missed(here) == 1
    assert store.missed(here) == []


def test_of_two_that_were_two_devices_the_later_answers(tmp_path: Path) -> None:
    """Containers with different limits: both are there until one is put in their place."""
    earlier, later = profile_of(8, day=1), profile_of(24, day=2)
    store = older_store(tmp_path / "old.sqlite", later, earlier)
    assert store.get(HERE, WORKLOAD) == later
    assert store.profiles() == store.profiles(HERE) == [later]
    assert store.workloads(HERE) == [WORKLOAD.key]
    assert store.keys() == [later.key]
    assert len(row_keys(store)) == 2
    with pytest.raises(StoreError, match="another process changed"):
        store.put_all([earlier], expected={earlier.key: earlier})
    store.put_all([earlier], expected={later.key: later})
    assert store.profiles() == [earlier]
    assert row_keys(store) == [" | ".join(earlier.key)]


def test_today_s_row_comes_before_older_ones(tmp_path: Path) -> None:
    """As where an older version shares the store; they are forgotten together."""
    now = profile_of(8)
    ProfileStore(tmp_path / "store.sqlite").put(now)
    store = older_store(tmp_path / "store.sqlite", profile_of(24, day=9))
    assert store.get(HERE, WORKLOAD) == now
    assert store.profiles() == [now]
    assert store.forget([now]) == 2
    assert row_keys(store) == []


def test_a_finished_profile_ends_what_was_missed_before(tmp_path: Path) -> None:
    """Under whichever key the miss was recorded."""
    store = older_store(tmp_path / "old.sqlite", profile_of(8), missed=WORKLOAD.key)
    store.put(profile_of(8, complete=False))
    assert store.missed(HERE) == [WORKLOAD]
    store.put(profile_of(8))
    assert store.missed(HERE) == []


def test_an_older_row_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """As one under today's key is, unless another can."""
    store = older_store(tmp_path / "old.sqlite", profile_of(8))
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE profiles SET value = '{}'")
    with pytest.raises(StoreError, match="cannot be read"):
        store.get(HERE, WORKLOAD)
    older_store(store.path, profile_of(24))
    assert store.get(HERE, WORKLOAD) == profile_of(24)


# --- Bundles --------------------------------------------------------------------------------------


def test_an_older_bundle_is_loaded_whole() -> None:
    """Its provenance names the devices as they were named then."""
    gpu = make_device(platform="gpu", kind="NVIDIA H200", cores=0, memory_gib=140)
    profiles = [make_profile(WORKLOAD, device) for device in (make_device(), gpu)]
    text = older_bundle(*profiles)
    assert "memory=140GiB" in text
    loaded = bundle.load(text)
    assert list(loaded.profiles) == profiles
    assert loaded.provenance.devices == (HERE.key, gpu.key)
    assert bundle.load(bundle.dump(loaded.profiles)).profiles == loaded.profiles


@needs_flags
def test_a_bundle_of_this_machine_s_former_kind_answers(tmp_path: Path) -> None:
    """As a layer, and imported."""
    here = detect(jax.devices("cpu")[0])
    profile = make_profile(WORKLOAD, here)
    (tmp_path / "old.json").write_text(older_bundle(profile))
    layer = BundleLayer(str(tmp_path / "old.json"), "file")
    assert layer.get(here, WORKLOAD) == profile
    assert layer.workloads(here) == [WORKLOAD.key]
    merge.merge(ProfileStore(), bundle.read(tmp_path / "old.json"))
    assert ProfileStore().get(here, WORKLOAD) == profile


def test_of_two_in_a_bundle_that_were_two_devices_one_is_taken() -> None:
    """The complete one, else the one made later, in either order; the same twice is an error."""
    unfinished = profile_of(16, day=3, complete=False)
    profiles = [profile_of(8, day=1), profile_of(24, day=2), unfinished]
    for order in (profiles, profiles[::-1]):
        assert bundle.load(older_bundle(*order)).profiles == (profiles[1],)
        assert dict(bundle.scan(older_bundle(*order))) == {profiles[1].key: profiles[1]}
    with pytest.raises(BundleError, match=r"there are two of .* the other at profiles\.0"):
        bundle.scan(older_bundle(profiles[0], profile_of(8, day=9)))


@pytest.mark.parametrize("memory", [78, 79, 80])
def test_shipped_profiles_answer_whatever_the_driver_leaves(memory: int) -> None:
    """A GPU's memory is rounded, and a little of it is kept by the driver."""
    folder = Path(__file__).parents[2] / "profiles"
    layer = BundleLayer(str(folder / "nvidia-h100.json"), "file")
    h100 = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3", cores=0, memory_gib=memory)
    assert len(layer.workloads(h100)) == len(layer.keys()) > 0
