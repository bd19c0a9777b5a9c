"""What is stored of functions that are not attention: profiles, misses, programs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import (
    make_call,
    make_chunks,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)
from pydantic import ValidationError

from autochunk.errors import StoreError
from autochunk.plan import Plan
from autochunk.store import bundle, programs
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.store.programs import Programs

CALL = make_call()
HEADER = {"lengths": [64], "arrays": []}


def test_a_profile_is_kept_and_travels(store_path: Path) -> None:
    """Of both kinds in one store and one bundle."""
    profiles = [make_profile(), make_function_profile()]
    store = ProfileStore(store_path)
    store.put_all(profiles)
    assert store.profiles() == profiles
    assert store.get(profiles[1].device, CALL) == profiles[1]
    assert list(bundle.load(bundle.dump(profiles)).profiles) == profiles
    assert not store.unreadable()


def test_the_choice_is_by_the_same_rules() -> None:
    """The fastest, within a budget; the whole call is the baseline."""
    profile = make_function_profile()
    chosen = profile.choose()
    assert chosen is not None
    assert chosen.plan == Plan("chunks", None, (16,))
    assert str(chosen.plan) == "chunks of 16"
    assert profile.baseline(Plan("dense")) == profile.measurements[0]
    assert profile.choose(memory_budget_mb=5.0) is None
    assert profile.untried(profile.device) == []


def test_profiles_of_attention_are_as_older_versions_read_them() -> None:
    """Nothing is added to them; a function's say that they are of a newer version."""
    assert "chunk_sizes" not in make_profile().model_dump_json()
    assert '"schema_version":2' in make_profile().model_dump_json()
    assert '"schema_version":3' in make_function_profile().model_dump_json()
    with pytest.raises(ValidationError, match="must be of version"):
        make_function_profile(schema_version=2)
    with pytest.raises(ValidationError, match="must be of version"):
        make_profile(schema_version=3)
    text = make_function_profile().model_dump_json()
    assert Profile.model_validate_json(text) == make_function_profile()


@pytest.mark.parametrize("sizes", [(), (0,), (-1,), (2.5,), tuple(range(1, 10))])
def test_sizes_are_checked(sizes: tuple[int, ...]) -> None:
    """A file may have anything."""
    with pytest.raises(ValidationError):
        make_chunks(*sizes)


def test_misses_are_of_their_kind(store_path: Path) -> None:
    """Functions are missed beside attention, and no longer once they are measured."""
    store, profile = ProfileStore(store_path), make_function_profile()
    store.record_miss(profile.device, CALL)
    store.record_miss(profile.device, CALL)
    store.record_miss(profile.device, make_profile().parsed_workload())
    assert store.missed_functions(profile.device) == {CALL: 2}
    assert store.missed(profile.device) == [make_profile().parsed_workload()]
    store.put(profile)
    assert store.missed_functions(profile.device) == {}
    assert store.missed(profile.device)


def test_a_program_is_its_users_own(store_path: Path) -> None:
    """A folder and a file for nobody else, one for both modes, kept apart from the profiles."""
    kept = Programs(store_path)
    before = os.umask(0)
    try:
        kept.put(CALL, HEADER, b"\x00program\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.path(CALL).stat().st_mode) == 0o600
    header, program = kept.read(CALL.with_mode("training"))
    assert header["lengths"] == [64]
    assert program == b"\x00program\n"
    assert [one.name for one in kept.folder.iterdir()] == [kept.path(CALL).name]
    kept.forget_all_but([CALL.with_mode("training")])
    assert kept.has(CALL)
    kept.forget_all_but([])
    kept.forget_all_but([])
    assert not kept.has(CALL)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_what_others_may_read_or_write_is_not_run(store_path: Path, mode: int) -> None:
    """A program is code: it must not be another's."""
    kept = Programs(store_path)
    kept.put(CALL, HEADER, b"program")
    kept.path(CALL).chmod(mode)
    with pytest.raises(StoreError, match="nobody else may read or write"):
        kept.read(CALL)


def test_programs_that_cannot_be_kept(store_path: Path) -> None:
    """One that is too large, and one that is damaged are told."""
    kept = Programs(store_path)
    with pytest.raises(StoreError, match=r"takes 16.8 MB, more than the 17 MB|more than the"):
        kept.put(CALL, HEADER, bytes(programs.MOST_BYTES))
    with pytest.raises(StoreError, match="cannot read the program"):
        kept.read(CALL)
    kept.put(CALL, HEADER, b"one")
    kept.path(CALL).write_bytes(b"no header")
    with pytest.raises(StoreError, match="cannot read the program"):
        kept.read(CALL)


def test_of_very_many_programs_the_oldest_go(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As misses do: those that are remembered have theirs."""
    monkeypatch.setattr(programs, "_MOST_TOGETHER", 2)
    kept, calls = Programs(store_path), [make_call(name=f"f{number}") for number in range(4)]
    for number, one in enumerate(calls):
        kept.put(one, HEADER, b"program")
        os.utime(kept.path(one), (number, number))
    assert [kept.has(one) for one in calls] == [False, False, True, True]


def test_programs_go_with_what_was_missed(store_path: Path) -> None:
    """Also those of which no miss is known; what another device missed stays."""
    store, kept = ProfileStore(store_path), Programs(store_path)
    device, other = make_function_profile().device, make_device(kind="Another/One")
    calls = [make_call(name=name) for name in ("mine", "others", "nobodys")]
    for one in calls:
        kept.put(one, HEADER, b"program")
    store.record_miss(device, calls[0].with_mode("training"))
    store.record_miss(other, calls[1])
    store.forget_programs()
    assert [kept.has(one) for one in calls] == [True, True, False]
    assert store.forget_missed(device) == 1
    assert [kept.has(one) for one in calls] == [False, True, False]


def test_which_kinds_are_missed(store_path: Path) -> None:
    """On whichever device: functions have all the time of a tune where no attention was missed."""
    store, device = ProfileStore(store_path), make_device(kind="Another/One")

    def kinds() -> tuple[bool, bool]:
        return store.are_missed(functions=True), store.are_missed(functions=False)

    assert kinds() == (False, False)
    store.record_miss(device, CALL)
    assert kinds() == (True, False)
    store.record_miss(device, make_workload())
    assert kinds() == (True, True)


@pytest.mark.parametrize(
    "profile",
    [
        lambda: make_function_profile(measurements=[make_chunks(8, 8)]),
        lambda: make_function_profile(make_call(lengths="8x8"), measurements=[make_chunks(8)]),
        lambda: make_profile(measurements=[make_chunks(8)]),
        lambda: make_profile(measurements=[make_measurement("xla", 16.0, chunk_sizes=(8,))]),
    ],
)
def test_chunks_are_of_the_axes_that_there_are(profile: Callable[[], Profile]) -> None:
    """A profile with others could not be run: nor is it read."""
    with pytest.raises(ValidationError, match="one entry for each of the"):
        profile()


@pytest.mark.parametrize(
    ("value", "wanted"), [("", True), ("no", False), ("0", False), ("Off", False)]
)
def test_opting_out(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable says that no program is kept."""
    monkeypatch.setenv(programs.VARIABLE, value)
    assert programs.wanted() is wanted


def test_forgetting_misses_forgets_their_programs(store_path: Path) -> None:
    """Nothing is left of what nobody waits for."""
    store, device = ProfileStore(store_path), make_profile().device
    store.record_miss(device, CALL)
    Programs(store_path).put(CALL, HEADER, b"program")
    assert store.forget_missed(device) == 1
    assert not Programs(store_path).has(CALL)
