"""The profile store: real SQLite files, real processes, real damage."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from factories import (
    make_device,
    make_measurement,
    make_profile,
    make_workload,
    run_python,
    start_python,
)

from autochunk.errors import StoreError, StoreWarning
from autochunk.store import database
from autochunk.store.profile import Profile, utc_now
from autochunk.store.profiles import ProfileStore, default_path
from autochunk.workload import Workload

HERE, THERE = make_device(kind="here"), make_device(kind="there")
WORKLOADS = [make_workload(f"t={t},k=8") for t in (1, 2, 3)]

Operation = Callable[[ProfileStore], object]

# Every method that touches the file.
READERS: dict[str, Operation] = {
    "get": lambda store: store.get(HERE, WORKLOADS[0]),
    "profiles": lambda store: store.profiles(),
    "profiles of one device": lambda store: store.profiles(HERE),
    "workloads": lambda store: store.workloads(HERE),
    "keys": lambda store: store.keys(),
    "missed": lambda store: store.missed(HERE),
    "unreadable": lambda store: store.unreadable(),
}
WRITERS: dict[str, Operation] = {
    "put": lambda store: store.put(make_profile(WORKLOADS[2], HERE)),
    "put_all": lambda store: store.put_all([make_profile(one, HERE) for one in WORKLOADS]),
    "record_miss": lambda store: store.record_miss(HERE, WORKLOADS[2]),
    "check_writable": lambda store: store.check_writable(),
}
FORGETTERS: dict[str, Callable[[ProfileStore], int]] = {
    "forget": lambda store: store.forget([make_profile(WORKLOADS[0], HERE)]),
    "forget_unreadable": lambda store: store.forget_unreadable(),
    "forget_missed": lambda store: store.forget_missed(HERE),
}
# They see to a damaged file before they go on.
MENDERS = ("put", "put_all", "check_writable")


@pytest.fixture
def store(store_path: Path) -> ProfileStore:
    """An empty store that has no file yet."""
    return ProfileStore(store_path)


def sql(path: Path, *statements: str) -> list[Any]:
    """Rows of the last statement, run on the file behind the store's back."""
    rows: list[Any] = []
    with closing(sqlite3.connect(path)) as file, file:
        for statement in statements:
            rows = file.execute(statement).fetchall()
    return rows


def set_on_fire(path: Path, condition: str = "") -> None:
    """From now on a profile cannot be stored where the condition holds."""
    action = "BEGIN SELECT RAISE(ABORT, 'disk on fire'); END"
    sql(path, f"CREATE TRIGGER no BEFORE INSERT ON profiles {condition} {action}")


# --- Keeping --------------------------------------------------------------------------------------


def test_put_and_get(store: ProfileStore) -> None:
    """What was put is got back, equal in every field."""
    profile = make_profile(WORKLOADS[0], HERE)
    store.put(profile)
    assert store.get(HERE, WORKLOADS[0]) == profile


def test_get_of_what_is_not_there(store: ProfileStore) -> None:
    """None for a workload without a profile, before and after there is a file."""
    assert store.get(HERE, WORKLOADS[0]) is None
    store.put(make_profile(WORKLOADS[1], HERE))
    assert store.get(HERE, WORKLOADS[0]) is None


def test_put_replaces(store: ProfileStore) -> None:
    """There is one profile for each workload and device: the last one put."""
    store.put(make_profile(WORKLOADS[0], HERE))
    measurements = [make_measurement("xla", 2.0)]
    later = make_profile(WORKLOADS[0], HERE, measurements, created="2026-05-05T05:05:05Z")
    store.put(later)
    assert store.profiles() == [later]


def test_devices_are_kept_apart(store: ProfileStore) -> None:
    """A device has its own profiles; versions do not make another device of it."""
    for device in (HERE, THERE):
        store.put_all([make_profile(workload, device) for workload in WORKLOADS])
    assert len(store.profiles()) == 6
    assert {profile.device for profile in store.profiles(THERE)} == {THERE}
    assert store.workloads(THERE) == sorted(workload.key for workload in WORKLOADS)
    assert store.get(make_device(kind="nowhere"), WORKLOADS[0]) is None
    assert store.workloads(make_device(kind="her")) == []
    both = (HERE, THERE)
    assert store.keys() == [(one.key, key) for one in both for key in store.workloads(one)]
    assert store.get(make_device(kind="here", jaxlib="9.9"), WORKLOADS[0]) is not None


def test_a_device_whose_name_begins_like_another_s(store: ProfileStore) -> None:
    """Four cores are not 44, nor "here" "here too"."""
    others = [
        make_device(kind="here too"),
        make_device(kind="here", cores=44),
    ]
    store.put_all([make_profile(WORKLOADS[0], device) for device in others])
    assert store.profiles(HERE) == []
    assert store.workloads(HERE) == []


def test_odd_names_survive(store: ProfileStore) -> None:
    """Device names are text, whatever is in them."""
    for kind in ("'; DROP TABLE profiles; --", "100%_*?[a]", "ünï \U0001f600", 'quo"te'):
        profile = make_profile(WORKLOADS[0], make_device(kind=kind))
        store.put(profile)
        assert store.get(profile.device, WORKLOADS[0]) == profile
        assert store.profiles(profile.device) == [profile]
        assert store.workloads(profile.device) == [WORKLOADS[0].key]
    assert len(store.profiles()) == 4


def test_misses_are_counted(store: ProfileStore) -> None:
    """Each time that one is told; of rows from before that was counted, once."""
    for workload in (WORKLOADS[1], WORKLOADS[0], WORKLOADS[1]):
        store.record_miss(HERE, workload)
    with closing(sqlite3.connect(store.path)) as file, file:
        old = (f"{HERE.key} | {WORKLOADS[2].key}", '{"when":"2026-01-02T03:04:05Z"}')
        file.execute("INSERT INTO missed (key, value) VALUES (?, ?)", old)
    assert store.misses(HERE) == dict(zip(WORKLOADS, (1, 2, 1), strict=True))
    store.record_miss(HERE, WORKLOADS[2])
    assert store.misses(HERE)[WORKLOADS[2]] == 2
    assert store.misses(THERE) == {}


def test_no_count_is_lost_among_many_writers(store: ProfileStore) -> None:
    """Of one miss that several processes tell of at once."""

    def record(_: int) -> None:
        own = ProfileStore(store.path)
        for _ in range(10):
            own.record_miss(HERE, WORKLOADS[0])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, range(4)))
    assert store.misses(HERE) == {WORKLOADS[0]: 40}


@pytest.mark.parametrize(
    ("value", "after"),
    [
        ('{"when":"2026-01-02T03:04:05Z","count":"many"}', 2),
        ('{"when":"2026-01-02T03:04:05Z","count":-3}', 2),
        ('{"when":"2026-01-02T03:04:05Z","count":7,"why":"newer"}', 8),
        ("no json", 1),
        ("{}", 1),
    ],
)
def test_a_count_that_cannot_be_read(value: str, after: int, store: ProfileStore) -> None:
    """It is one, and no reason to lose the miss or what a newer version keeps with it."""
    store.record_miss(HERE, WORKLOADS[0])
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE missed SET value = ?", (value,))
    store.record_miss(HERE, WORKLOADS[0])
    assert store.misses(HERE) == {WORKLOADS[0]: after}
    with closing(sqlite3.connect(store.path)) as file:
        ((now,),) = file.execute("SELECT value FROM missed").fetchall()
    assert ("newer" in now) == ("newer" in value)
    assert now == value or json.loads(now)["count"] == after


def test_a_known_miss_is_not_counted_where_nothing_can_be_written(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not known there is an error, which whoever asks may ignore."""
    store.record_miss(HERE, WORKLOADS[0])
    monkeypatch.setattr("autochunk.store.database._BUSY_MILLISECONDS", 10)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.record_miss(HERE, WORKLOADS[0])
        with pytest.raises(StoreError):
            store.record_miss(HERE, WORKLOADS[1])
    assert store.misses(HERE) == {WORKLOADS[0]: 1}


def test_a_family_is_counted(store: ProfileStore) -> None:
    """Of workloads that differ in nothing but sizes, if this one is known to be missed."""
    one, other = make_workload("t=10,k=8"), make_workload("t=20,s=30,h=4,kv_heads=2,k=16,v=8")
    causal = make_workload("t=10,k=8,causal=yes")
    for workload in (one, other, causal):
        store.record_miss(HERE, workload)
    assert store.missed_like(HERE, one) == store.missed_like(HERE, other) == 2
    assert store.missed_like(HERE, causal) == 1
    assert store.missed_like(HERE, make_workload("t=11,k=8")) == 0
    assert store.missed_like(THERE, one) == 0


def test_missed_workloads(store: ProfileStore) -> None:
    """Misses are remembered once, by device, until there is a profile."""
    for workload in (WORKLOADS[1], WORKLOADS[0], WORKLOADS[1]):
        store.record_miss(HERE, workload)
    assert store.missed(HERE) == WORKLOADS[:2]
    assert store.missed(THERE) == []
    store.put(make_profile(WORKLOADS[0], THERE))
    assert store.missed(HERE) == WORKLOADS[:2]
    store.put(make_profile(WORKLOADS[0], HERE))
    assert store.missed(HERE) == WORKLOADS[1:2]


def test_put_all_forgets_misses(store: ProfileStore) -> None:
    """An imported profile ends a miss as a measured one does."""
    store.record_miss(HERE, WORKLOADS[0])
    store.put_all([make_profile(WORKLOADS[0], HERE)])
    assert store.missed(HERE) == []


def test_an_unfinished_profile_does_not_end_a_miss(store: ProfileStore) -> None:
    """What is to be measured is not measured yet: `autochunk tune --missed` goes on with it."""
    for workload in WORKLOADS[:2]:
        store.record_miss(HERE, workload)
    store.put(make_profile(WORKLOADS[0], HERE, complete=False))
    store.put_all([make_profile(WORKLOADS[1], HERE, complete=False)])
    assert store.missed(HERE) == WORKLOADS[:2]


def test_put_all_of_nothing(store: ProfileStore) -> None:
    """No profiles are no error."""
    store.put_all([])
    assert store.profiles() == []


def test_put_all_of_many(store: ProfileStore) -> None:
    """A large bundle is one statement."""
    profiles = [make_profile(make_workload(f"t={t},k=8"), HERE) for t in range(1, 301)]
    store.put_all(profiles)
    assert sorted(store.profiles(), key=lambda one: one.parsed_workload().query_length) == profiles


def test_values_are_json_text(store: ProfileStore, store_path: Path) -> None:
    """Whoever hands someone a store cannot make them run code: rows are JSON text, no pickles."""
    store.put(make_profile(WORKLOADS[0], HERE))
    store.put_all([make_profile(WORKLOADS[1], HERE)])
    store.record_miss(HERE, WORKLOADS[2])
    for table in ("profiles", "missed"):
        rows = sql(store_path, f"SELECT key, value, typeof(key), typeof(value) FROM {table}")
        assert rows
        for key, value, *types in rows:
            assert types == ["text", "text"]
            assert isinstance(json.loads(value), dict)
            assert key.startswith(f"{HERE.key} | attention:")


def test_a_pickle_in_the_file_is_not_run(
    store: ProfileStore, store_path: Path, tmp_path: Path
) -> None:
    """A row that would run code if it were unpickled is a StoreError, and nothing ran."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    store.put(make_profile(WORKLOADS[0], HERE))
    with closing(sqlite3.connect(store_path)) as file, file:
        file.execute("UPDATE profiles SET value = ?", (pickle.dumps(Trap()),))
    with pytest.raises(StoreError):
        store.get(HERE, WORKLOADS[0])
    assert not (tmp_path / "trapped").exists()


def test_time_is_utc_to_the_second() -> None:
    """``utc_now`` is what a profile's ``created`` must be."""
    assert make_profile(created=utc_now()).created.endswith("Z")


# --- Where the file is ----------------------------------------------------------------------------


def test_variable_names_a_file(store_path: Path) -> None:
    """AUTOCHUNK_STORE may name a file that is not there yet."""
    assert default_path() == store_path
    assert ProfileStore().path == store_path
    assert str(store_path) in repr(ProfileStore())


def test_variable_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, there or written with a slash at its end, gets the file put in it."""
    monkeypatch.setenv("AUTOCHUNK_STORE", str(tmp_path))
    assert default_path() == tmp_path / "profiles.sqlite"
    monkeypatch.setenv("AUTOCHUNK_STORE", f"{tmp_path}/not there/")
    assert default_path() == tmp_path / "not there" / "profiles.sqlite"


def test_variable_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AUTOCHUNK_STORE", "~/mine.sqlite")
    assert default_path() == tmp_path / "mine.sqlite"


@pytest.mark.parametrize("value", [None, "~/mine.sqlite"])
def test_without_a_home(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a user whom the system does not know: a StoreError that says what to set."""
    for name in ("HOME", "XDG_DATA_HOME", "AUTOCHUNK_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    if value is not None:
        monkeypatch.setenv("AUTOCHUNK_STORE", value)
    with pytest.raises(StoreError, match=r"no place to be stored.*set AUTOCHUNK_STORE to a file"):
        ProfileStore()


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset or empty: the user's data folder."""
    monkeypatch.delenv("AUTOCHUNK_STORE")
    if value is not None:
        monkeypatch.setenv("AUTOCHUNK_STORE", value)
    assert default_path() == platformdirs.user_data_path("autochunk") / "profiles.sqlite"


@pytest.mark.parametrize(
    "name",
    [
        *("a b.sqlite", "what?.sqlite", "50%20.sqlite", "#1.sqlite"),
        *("ünï.sqlite", "quo'te\".sqlite", "no_suffix"),
    ],
)
def test_odd_paths(tmp_path: Path, name: str) -> None:
    """A path is a path, whatever is in it; the file is exactly there."""
    store = ProfileStore(tmp_path / "sub folder" / name)
    store.put(make_profile(WORKLOADS[0], HERE))
    assert store.workloads(HERE) == [WORKLOADS[0].key]
    assert [path.name for path in (tmp_path / "sub folder").iterdir()] == [name]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    store = ProfileStore("here.sqlite")
    store.put(make_profile(WORKLOADS[0], HERE))
    assert (tmp_path / "here.sqlite").is_file()
    assert len(store.profiles()) == 1


@pytest.mark.parametrize(
    "reader", [*READERS.values(), *FORGETTERS.values()], ids=[*READERS, *FORGETTERS]
)
def test_reading_never_creates_the_file(
    store: ProfileStore, store_path: Path, reader: Operation
) -> None:
    """Who only asks leaves no trace, not even a folder."""
    assert not reader(store)
    assert store.version() is None
    assert not store_path.parent.exists()


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_writing_creates_missing_parents(tmp_path: Path, writer: Operation) -> None:
    """The first write makes the folders, too."""
    store = ProfileStore(tmp_path / "a" / "b" / "c.sqlite")
    writer(store)
    assert [path.name for path in store.path.parent.iterdir()] == ["c.sqlite"]


@pytest.mark.parametrize(
    "operation", [*READERS.values(), *WRITERS.values()], ids=[*READERS, *WRITERS]
)
def test_empty_file_is_an_empty_store(
    store: ProfileStore, store_path: Path, operation: Operation
) -> None:
    """A file of no bytes, as `touch` or a crash at the first write leaves it, is an empty store."""
    store_path.parent.mkdir()
    store_path.touch()
    assert not operation(store)
    store.put(make_profile(WORKLOADS[0], HERE))
    assert store.get(HERE, WORKLOADS[0])


def test_version_changes_with_every_change(store: ProfileStore) -> None:
    """``version`` tells who keeps a copy that the file has changed."""
    versions = {store.version()}
    store.put(make_profile(WORKLOADS[0], HERE))
    versions.add(store.version())
    store.put(make_profile(WORKLOADS[1], HERE))
    versions.add(store.version())
    store.put(make_profile(WORKLOADS[1], HERE, created="2026-05-05T05:05:05Z"))
    versions.add(store.version())
    assert len(versions) == 4
    assert store.get(HERE, WORKLOADS[0])
    assert store.version() in versions


# --- Damage ---------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda _: b"\x00\xffgarbage" * 1000,
    "text": lambda _: b"not a database\n",
    "two bytes": lambda _: b"SQ",
    "cut in the header": lambda content: content[:50],
    "cut after the first page": lambda content: content[:4096],
    "cut in a page": lambda content: content[: len(content) // 2 + 100],
    "header and garbage": lambda content: content[:100] + b"\xa5" * (len(content) - 100),
    "garbage in the middle": lambda content: content[:4096] + b"\xa5" * 4096 + content[8192:],
    "schema overwritten": lambda content: content[:100] + b"\0" * 300 + content[400:],
    "newer file format": lambda content: content[:18] + b"\x09\x09" + content[20:],
}

# Runs operations in a process that can be given up on, and prints what each came to.
OUTCOMES = """
import json, sys, warnings
sys.path.insert(0, sys.argv[2])
import test_database as t
from autochunk.errors import StoreError, StoreWarning
store, outcomes = t.ProfileStore(sys.argv[1]), {}
warnings.simplefilter("ignore", StoreWarning)
for name in sys.argv[3:]:
    try:
        outcomes[name] = repr({**t.READERS, **t.FORGETTERS, **t.WRITERS}[name](store))
    except StoreError as error:
        outcomes[name] = f"StoreError: {error}"
print(json.dumps(outcomes))
"""


def outcomes_of_everything(
    path: Path, names: Iterable[str] = (*READERS, *WRITERS)
) -> dict[str, str]:
    outcomes = json.loads(run_python(OUTCOMES, path, Path(__file__).parent, *names, timeout=40))
    assert set(outcomes) == set(names)
    return dict(outcomes)


@pytest.fixture
def full_store(store: ProfileStore) -> ProfileStore:
    """A store of several pages, with a miss."""
    store.put_all([make_profile(make_workload(f"t={t},k=8"), HERE) for t in range(1, 30)])
    store.record_miss(HERE, make_workload("t=100,k=8"))
    assert store.path.stat().st_size > 5 * 4096
    return store


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(full_store: ProfileStore, damage: Callable[[bytes], bytes]) -> None:
    """In a file that is no sound database, damage that is met is a StoreError with path and cure.

    Nothing hangs, nothing touches the file.
    """
    path, names = full_store.path, [*READERS, "record_miss"]
    sound, content = outcomes_of_everything(path, READERS), damage(path.read_bytes())
    path.write_bytes(content)
    outcomes = outcomes_of_everything(path, names)
    assert outcomes["profiles"].startswith("StoreError: ")
    cure = "set AUTOCHUNK_STORE to a file in a folder you may write, or move this file away"
    for name, outcome in outcomes.items():
        if outcome == sound.get(name):  # what it asked for lies elsewhere in the file
            continue
        assert outcome.startswith("StoreError: ")
        assert str(path) in outcome
        assert cure in outcome
        assert "\n" not in outcome
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    """A folder where the file should be is a StoreError."""
    for outcome in outcomes_of_everything(tmp_path).values():
        assert outcome.startswith("StoreError: ")
        assert str(tmp_path) in outcome
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    """Where the folder cannot be made, there is nothing to read, and writing is a StoreError.

    It is as in a folder that one may not write, which root always may.
    """
    (tmp_path / "file").write_text("mine")
    outcomes = outcomes_of_everything(tmp_path / "file" / "profiles.sqlite")
    assert not any(outcomes[name].startswith("StoreError") for name in READERS)
    for name in WRITERS:
        assert outcomes[name].startswith("StoreError: cannot write the profile store")
        assert "AUTOCHUNK_STORE" in outcomes[name]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_folder_that_cannot_be_written() -> None:
    """Not even root makes files in /proc."""
    path = Path("/proc/autochunk.sqlite")
    outcomes, refusal = outcomes_of_everything(path), f"cannot write the profile store {path}"
    assert all(outcomes[name].startswith(f"StoreError: {refusal}") for name in WRITERS)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root ignores permissions"
)
def test_folder_without_permission(full_store: ProfileStore) -> None:
    """In a read-only folder profiles are read; writing is a StoreError and changes nothing."""
    content = full_store.path.read_bytes()
    full_store.path.parent.chmod(0o500)
    try:
        outcomes = outcomes_of_everything(full_store.path)
    finally:
        full_store.path.parent.chmod(0o700)
    assert not any(outcomes[name].startswith("StoreError") for name in READERS)
    refused = ("put", "put_all", "record_miss")
    assert all(outcomes[name].startswith("StoreError") for name in refused)
    assert full_store.path.read_bytes() == content


GARBAGE_VALUES = [
    "no json",
    "{}",
    "null",
    "3",
    "",
    '{"workload": 3}',
    make_profile().model_dump_json().replace("0.1", "NaN"),
    None,
    b"\x80\x04.",
    b"\xff",
    3,
    2.5,
    make_profile().model_dump_json(),
    "\0" + make_profile(WORKLOADS[0], HERE).model_dump_json(),
    make_profile(WORKLOADS[0], HERE).model_dump_json()[:-1] + "\0}",
]


@pytest.mark.parametrize("value", GARBAGE_VALUES)
def test_garbage_row(full_store: ProfileStore, value: object) -> None:
    """In a sound database a row that is no profile harms no other.

    ``get`` is a StoreError with path and cure, ``profiles`` leaves it out.
    """
    with closing(sqlite3.connect(full_store.path)) as file, file:
        file.execute("UPDATE profiles SET value = ? WHERE key LIKE '%b=1,t=1,%'", (value,))
    with pytest.raises(StoreError, match=r"a profile in .* cannot be read") as error:
        full_store.get(HERE, WORKLOADS[0])
    assert str(full_store.path) in str(error.value)
    assert "AUTOCHUNK_STORE" in str(error.value)
    said = rf"^1 of 29 profiles in {full_store.path} cannot be read and were left out"
    with pytest.warns(StoreWarning, match=said) as caught:
        assert lengths(full_store.profiles()) == list(range(2, 30))
    assert len(caught) == 1
    assert full_store.get(HERE, WORKLOADS[1])
    full_store.put(make_profile(WORKLOADS[0], HERE))
    assert full_store.get(HERE, WORKLOADS[0])


@pytest.mark.parametrize("key", [f"{HERE.key} | nonsense", f"{HERE.key} | ", b"\xff"])
def test_garbage_key(full_store: ProfileStore, key: object) -> None:
    """A row under a key that is none is left out, or a StoreError; nothing else."""
    with closing(sqlite3.connect(full_store.path)) as file, file:
        for table in ("profiles", "missed"):
            file.execute(f"INSERT INTO {table} VALUES (?, '{{}}')", (key,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        for read in READERS.values():
            read(full_store)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE profiles (other TEXT)",
        "CREATE TABLE profiles (key TEXT PRIMARY KEY, value BLOB, more TEXT NOT NULL)",
        "CREATE VIEW profiles AS SELECT 1 AS key, 2 AS value",
        "CREATE TABLE missed (other TEXT)",
    ],
)
def test_another_program_s_tables(full_store: ProfileStore, statement: str) -> None:
    """In a sound database that is not ours, what cannot be read or written is a StoreError.

    Nothing hangs, nothing changes.
    """
    table = statement.split()[2]
    sql(full_store.path, f"DROP TABLE {table}", statement)
    before = sql(full_store.path, "SELECT sql FROM sqlite_master")
    outcomes = outcomes_of_everything(full_store.path)
    wrong = {"profiles": ("put", "put_all"), "missed": ("record_miss",)}[table]
    assert all(outcomes[name].startswith("StoreError: ") for name in wrong)
    assert sql(full_store.path, "SELECT sql FROM sqlite_master") == before


# --- Failing in the middle ------------------------------------------------------------------------


def test_put_all_stores_all_or_none(full_store: ProfileStore) -> None:
    """Where one of many profiles cannot be stored none is, and the file is as it was."""
    set_on_fire(full_store.path, "WHEN NEW.key LIKE '%t=150,%'")
    content, before = full_store.path.read_bytes(), full_store.profiles()
    new = [
        make_profile(make_workload(f"t={t},k=8"), HERE, created="2026-09-09T09:09:09Z")
        for t in range(1, 200)
    ]
    with pytest.raises(StoreError, match="disk on fire"):
        full_store.put_all(new)
    assert full_store.path.read_bytes() == content
    assert full_store.profiles() == before


def test_failed_put_keeps_the_old_profile(full_store: ProfileStore) -> None:
    """A profile that cannot be stored does not cost the one it would have replaced."""
    set_on_fire(full_store.path)
    content = full_store.path.read_bytes()
    with pytest.raises(StoreError, match="disk on fire"):
        full_store.put(make_profile(WORKLOADS[0], HERE, created="2026-09-09T09:09:09Z"))
    assert full_store.path.read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("method", ["put", "put_all"])
def test_full_disk(full_store: ProfileStore, method: str) -> None:
    """On a full disk, here a limit on the size of files, writing is a StoreError.

    All profiles are still there.
    """
    code = """
import resource, sys
from factories import make_profile, make_device, make_workload
from autochunk.errors import StoreError
from autochunk.store.profiles import ProfileStore
store = ProfileStore(sys.argv[1])
here, created = make_device(kind="here"), "2026-09-09T09:09:09Z"
workloads = [make_workload(f"t={t},k=8") for t in range(100, 400)]
profiles = [make_profile(workload, here, created=created) for workload in workloads]
size = store.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    if sys.argv[2] == "put_all":
        store.put_all(profiles)
    else:
        for profile in profiles:
            store.put(profile)
except StoreError as error:
    print(error)
"""
    before = full_store.profiles()
    message = run_python(code, full_store.path, method)
    assert str(full_store.path) in message
    assert "AUTOCHUNK_STORE" in message
    after = full_store.profiles()
    assert [profile for profile in after if profile in before] == before
    if method == "put_all":
        assert after == before


# --- Several processes ----------------------------------------------------------------------------

WRITE = """
import sys
from factories import make_profile, make_device, make_workload
from autochunk.store.profiles import ProfileStore
store = ProfileStore(sys.argv[1])
for t in range(int(sys.argv[2]), int(sys.argv[3])):
    store.put(make_profile(make_workload(f"t={t},k=8"), make_device(kind="here")))
    print(t, flush=True)
"""


def lengths(profiles: list[Profile]) -> list[int]:
    return sorted(profile.parsed_workload().query_length for profile in profiles)


def test_store_outlives_the_process(store: ProfileStore) -> None:
    """What one process stores the next one finds."""
    run_python(WRITE, store.path, 1, 4)
    assert lengths(store.profiles(HERE)) == [1, 2, 3]
    code = "import autochunk; print(len(autochunk.ProfileStore().profiles()))"
    assert run_python(code).strip() == "3"


def test_concurrent_writers_lose_nothing(store: ProfileStore) -> None:
    """Four processes that begin with no store and write 25 profiles each leave all 100.

    No writer fails.
    """
    writers = [start_python(WRITE, store.path, first, first + 25) for first in (1, 26, 51, 76)]
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
        assert len(out.split()) == 25
    assert lengths(store.profiles(HERE)) == list(range(1, 101))


def test_threads_share_a_store(store: ProfileStore) -> None:
    """One ProfileStore may be used by several threads."""
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for t in range(first, first + 5):
                store.put(make_profile(make_workload(f"t={t},k=8"), HERE))
                assert store.get(HERE, make_workload(f"t={t},k=8"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (1, 6, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert lengths(store.profiles()) == list(range(1, 16))


def test_reader_beside_a_writer(store: ProfileStore) -> None:
    """Who reads while another process writes sees whole profiles and no error."""
    with start_python(WRITE, store.path, 1, 30) as writer:
        seen = [len(store.profiles())]
        while writer.poll() is None:
            seen.append(len(store.profiles()))
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert lengths(store.profiles()) == list(range(1, 30))


@pytest.mark.parametrize("acknowledged", [1, 5, 12])
def test_killed_writer_leaves_every_acknowledged_profile(
    store: ProfileStore, acknowledged: int
) -> None:
    """A writer killed at any moment leaves a store that opens.

    Every profile whose ``put`` had returned is in it.
    """
    with start_python(WRITE, store.path, 1, 1000) as writer:
        assert writer.stdout is not None
        for _ in range(acknowledged):
            writer.stdout.readline()
        writer.kill()
        done = acknowledged + len(writer.stdout.read().split())
    stored = lengths(store.profiles(HERE))
    assert stored[:done] == list(range(1, done + 1))
    assert len(stored) <= done + 1
    store.put(make_profile(make_workload("t=5000,k=8"), HERE))
    assert lengths(store.profiles(HERE))[-1] == 5000


HALF_A_COMMIT = """
import os, signal, sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute("PRAGMA cache_size = 1")
file.execute("BEGIN IMMEDIATE")
file.execute("UPDATE profiles SET value = 'half a commit'")
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_a_hot_journal(path: Path) -> None:
    """Lets a process die in the middle of a commit.

    New pages are in the file already, the old ones in the rollback journal.
    """
    with start_python(HALF_A_COMMIT, path) as writer:
        writer.wait(30)
    assert writer.returncode == -signal.SIGKILL
    assert Path(f"{path}-journal").stat().st_size > 0


def test_misses_do_not_grow_for_ever(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program of ever new lengths those are kept that were met last, and profiles all."""
    monkeypatch.setattr("autochunk.store.profiles.MOST_MISSES", 5)
    store.put(make_profile(WORKLOADS[0], HERE))
    lengths_met = [*range(100, 106), 101, *range(106, 109)]
    for length in lengths_met:
        store.record_miss(HERE, make_workload(f"t={length},k=8"))
    assert {workload.query_length for workload in store.missed(HERE)} == {101, 105, 106, 107, 108}
    assert store.profiles() == [make_profile(WORKLOADS[0], HERE)]


@pytest.mark.parametrize("operation", ["get", "profiles", "put", "put_all", "record_miss"])
def test_store_recovers_from_half_a_commit(full_store: ProfileStore, operation: str) -> None:
    """After a process died in the middle of a commit the next one finds what was there before."""
    before = full_store.profiles()
    leave_a_hot_journal(full_store.path)
    {**READERS, **WRITERS}[operation](full_store)
    after = {(profile.workload, profile.created) for profile in full_store.profiles()}
    assert {(profile.workload, profile.created) for profile in before} <= after


HOLD = """
import sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute(f"BEGIN {sys.argv[2]}")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("lock", "readable"), [("IMMEDIATE", True), ("EXCLUSIVE", False)])
def test_lock_that_is_never_released(
    full_store: ProfileStore, monkeypatch: pytest.MonkeyPatch, lock: str, readable: bool
) -> None:
    """Behind a program that holds the file for ever, waiting ends in a StoreError that says so."""
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 200)
    with start_python(HOLD, full_store.path, lock) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StoreError, match="database is locked"):
            full_store.put(make_profile(WORKLOADS[0], HERE))
        if readable:
            assert full_store.get(HERE, WORKLOADS[0])
        else:
            with pytest.raises(StoreError, match="database is locked"):
                full_store.get(HERE, WORKLOADS[0])
        holder.stdin.close()
    full_store.put(make_profile(WORKLOADS[0], HERE))


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_lock_is_waited_for_once_where_nothing_may_be_held_up(
    full_store: ProfileStore, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """Whichever store object of the process waits in vain, no other one does again.

    What can be read beside the lock is; when it has gone, all is as before.
    """
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 3_600_000)
    monkeypatch.setattr(database, "_BRIEF_MILLISECONDS", 100)
    new = make_workload("t=77,k=8")
    with start_python(HOLD, full_store.path, lock) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StoreError, match="database is locked"):
            ProfileStore(full_store.path, briefly=True).record_miss(HERE, new)
        monkeypatch.setattr(database, "_BRIEF_MILLISECONDS", 3_600_000)
        brief = ProfileStore(full_store.path, briefly=True)
        with pytest.raises(StoreError, match="database is locked"):
            brief.record_miss(HERE, new)
        if lock == "IMMEDIATE":
            assert brief.get(HERE, WORKLOADS[0])
        else:
            with pytest.raises(StoreError, match="database is locked"):
                brief.get(HERE, WORKLOADS[0])
        holder.stdin.close()
    brief.record_miss(HERE, new)
    assert new in full_store.missed(HERE)


def test_lock_that_is_released(full_store: ProfileStore) -> None:
    """A writer waits for another one and then goes on."""
    with start_python(HOLD, full_store.path, "IMMEDIATE") as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        threading.Timer(0.5, holder.stdin.close).start()
        full_store.put(make_profile(make_workload("t=77,k=8"), HERE))
    assert 77 in lengths(full_store.profiles())


def test_file_may_be_replaced_between_operations(full_store: ProfileStore) -> None:
    """Each operation opens the file anew.

    Where another program deletes it, the next operation meets no file, and then a new one.
    """
    full_store.profiles()
    full_store.path.unlink()
    assert full_store.profiles() == []
    full_store.put(make_profile(WORKLOADS[0], HERE))
    assert [Workload.parse(key) for key in full_store.workloads(HERE)] == WORKLOADS[:1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    "operation",
    [
        *(pytest.param(read, id=name) for name, read in READERS.items()),
        *(pytest.param(write, id=name) for name, write in {**WRITERS, **FORGETTERS}.items()),
    ],
)
def test_nothing_stays_open(full_store: ProfileStore, operation: Operation) -> None:
    """No descriptor of the file is left after an operation.

    So none is inherited by a forked child, as SQLite's connections must not be.
    """
    gc.collect()
    gc.disable()
    try:
        operation(full_store)
        held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    finally:
        gc.enable()
    assert str(full_store.path) not in held


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
@pytest.mark.parametrize("write", ["put", "put_all"])
def test_nothing_stays_open_after_an_error(full_store: ProfileStore, write: str) -> None:
    """Nor after a statement that failed, while somebody still holds the error."""
    set_on_fire(full_store.path)
    with pytest.raises(StoreError, match="disk on fire") as error:
        WRITERS[write](full_store)
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert str(full_store.path) not in held
    assert error.value.__cause__ is not None
