"""What the store promises when things go wrong.

Much data, many writers, kill -9, full disks, damage: every test here takes seconds.
AUTOCHUNK_TEST_KILLS and AUTOCHUNK_TEST_PROFILES (of each of 8 writers) make the longest ones as
long as one likes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

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
from autochunk.store import database, rescue
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

HERE, THERE = make_device(kind="here"), make_device(kind="there")
KILLS = int(os.environ.get("AUTOCHUNK_TEST_KILLS", "15"))
PROFILES = int(os.environ.get("AUTOCHUNK_TEST_PROFILES", "40"))
PAGE = 4096

no_mounts = sys.platform != "linux" or os.geteuid() != 0
needs_root_on_linux = pytest.mark.skipif(no_mounts, reason="mounting needs root on Linux")


def profile_of(t: int, kind: str = "here", measurements: int = 4) -> Profile:
    measured = [make_measurement("xla", float(n + 1)) for n in range(measurements)]
    return make_profile(make_workload(f"t={t},k=8"), make_device(kind=kind), measured)


def lengths(profiles: list[Profile]) -> list[int]:
    return sorted(profile.parsed_workload().query_length for profile in profiles)


def fill(path: Path, count: int, measurements: int = 4) -> ProfileStore:
    store = ProfileStore(path)
    store.put_all([profile_of(t, measurements=measurements) for t in range(1, count + 1)])
    store.record_miss(HERE, make_workload("t=5000,k=8"))
    return store


@pytest.fixture
def store(store_path: Path) -> ProfileStore:
    """A store of 200 profiles, whose tables and indexes have levels of pages, and of one miss."""
    return fill(store_path, 200)


# --- Much data ------------------------------------------------------------------------------------

FIRST_GET = """
import re, sys
from pathlib import Path
from factories import make_device, make_workload
from autochunk.store.profiles import ProfileStore
def read(): return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])
device, workload = make_device(kind="here"), make_workload("t=77,k=8")
store = ProfileStore(sys.argv[1])
before = read()
assert store.get(device, workload)
print(read() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not tell how much a process reads"
)
def test_look_ups_read_a_few_pages_however_large_the_store(tmp_path: Path) -> None:
    """The first one of a process, too."""
    fill(tmp_path / "large.sqlite", 1500, measurements=20)
    size = (tmp_path / "large.sqlite").stat().st_size
    assert int(run_python(FIRST_GET, tmp_path / "large.sqlite")) < size / 50


@pytest.mark.parametrize("condition", ["WHERE key = ?", database.IN_RANGE])
def test_look_ups_use_the_index(store: ProfileStore, condition: str) -> None:
    """Neither one profile nor a device's keys are found by reading all rows."""
    with closing(sqlite3.connect(store.path)) as file:
        query = f"EXPLAIN QUERY PLAN SELECT CAST(key AS BLOB) FROM profiles {condition}"
        ((*_, plan),) = file.execute(query, ["x"] * condition.count("?"))
    assert "SEARCH profiles USING COVERING INDEX" in plan


# --- Durability -----------------------------------------------------------------------------------


def test_commits_are_synchronous(store: ProfileStore) -> None:
    """The connection that writes, which sqlitedict opens, waits for the disk at each commit.

    Of SQLite's settings that is 3, EXTRA.
    """
    with database._table(store.path, "profiles", 30.0) as table:
        assert table.conn.select_one("PRAGMA synchronous") == (3,)
        table["key"] = "value"
        assert table.conn.select_one("PRAGMA synchronous") == (3,)
        assert table.conn.select_one("PRAGMA busy_timeout") == (30_000,)


WRITE = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_hardening import profile_of
from autochunk.store.profiles import ProfileStore
store, first, count = ProfileStore(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for t in range(first, first + count):
    store.put(profile_of(t))
    print(t, flush=True)
"""


def start_writer(path: Path, first: int, count: int) -> subprocess.Popen[str]:
    return start_python(WRITE, path, first, count)


def test_eight_writers_lose_and_double_nothing(store_path: Path) -> None:
    """Eight processes that begin with no file and write at once leave every profile once.

    No writer fails, and readers see whole profiles, ever more.
    """
    writers = [start_writer(store_path, 1 + number * PROFILES, PROFILES) for number in range(8)]
    seen = [0]
    while any(writer.poll() is None for writer in writers):
        # A row that is not whole would be a warning, which is an error here.
        seen.append(len(ProfileStore(store_path).profiles()))
    for writer in writers:
        out, err = writer.communicate(timeout=600)
        assert writer.returncode == 0, err
        assert err == ""
        assert len(out.split()) == PROFILES
    assert seen == sorted(seen)
    assert lengths(ProfileStore(store_path).profiles()) == list(range(1, 8 * PROFILES + 1))


def test_kill_at_random_moments(store_path: Path) -> None:
    """After each kill -9 the store opens, without a warning, with every acknowledged profile."""
    chance, acknowledged = random.Random(0), set[int]()
    for number in range(KILLS):
        start = 1 + 100_000 * (number % 20) + 2000 * (number // 20)
        with start_writer(store_path, start, 2000) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
            acknowledged |= {int(line) for line in (first + writer.stdout.read()).split("\n")[:-1]}
        stored = set(lengths(ProfileStore(store_path).profiles()))
        assert stored >= acknowledged
        assert len(stored - acknowledged) <= number + 1  # stored, and killed before it could say so
    assert rescue.damage(store_path, 1, "integrity_check") == ""
    ProfileStore(store_path).put(profile_of(10_000_000))
    # The last journal is used again, and then goes.
    assert list(store_path.parent.iterdir()) == [store_path]


# --- Permissions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_new_file_is_its_owner_s_alone(tmp_path: Path, umask: int) -> None:
    """0600, whatever the umask; the journal of a commit grants no more."""
    path, stop, seen = tmp_path / "new.sqlite", threading.Event(), set[int]()

    def watch() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                seen.add(stat.S_IMODE(os.stat(f"{path}-journal").st_mode))

    watcher = threading.Thread(target=watch)
    watcher.start()
    old = os.umask(umask)
    try:
        for t in range(1, 21):
            ProfileStore(path).put(profile_of(t))
    finally:
        os.umask(old)
        stop.set()
        watcher.join()
    assert oct(stat.S_IMODE(path.stat().st_mode)) == "0o600"
    assert not any(mode & ~0o600 for mode in seen)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_an_existing_file_keeps_its_permissions(store: ProfileStore, mode: int) -> None:
    """Also where it is damaged and another one takes its place."""
    store.path.chmod(mode)
    store.put(profile_of(300))
    assert stat.S_IMODE(store.path.stat().st_mode) == mode
    store.path.write_bytes(b"no database" * 1000)
    with pytest.warns(StoreWarning):
        store.put(profile_of(301))
    assert stat.S_IMODE(store.path.stat().st_mode) == mode


# --- Disks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory; skips where this sandbox mounts none."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@needs_root_on_linux
def test_full_disk(tmp_path: Path) -> None:
    """Writing ends in a StoreError; what was acknowledged is there, and goes on being read.

    With room again writing goes on.
    """
    with mounted(tmp_path / "small", "size=200k") as folder:
        store, stored = ProfileStore(folder / "profiles.sqlite"), set[int]()
        for first in (1000, 2000):

            def fill_up(numbers: Iterable[int] = range(first, first + 1000)) -> None:
                for t in numbers:
                    store.put(profile_of(t))
                    stored.add(t)

            with pytest.raises(StoreError, match=r"full.*AUTOCHUNK_STORE"):
                fill_up()
        with pytest.raises(StoreError, match=r"full.*AUTOCHUNK_STORE"):
            store.put_all([profile_of(t) for t in range(500, 1000)])
        assert len(stored) > 5
        assert set(lengths(store.profiles())) == stored
        subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)
        store.put(profile_of(1))
        assert store.get(HERE, make_workload("t=1,k=8"))


@needs_root_on_linux
def test_full_disk_while_mending(tmp_path: Path) -> None:
    """Where the damaged file cannot be kept nothing is mended.

    Writing is a StoreError, and the file is as it was, alone.
    """
    with mounted(tmp_path / "small", "size=2m") as folder:
        store = fill(folder / "profiles.sqlite", 200)
        spoil(store.path, pages(store.path, 13)[3])
        content = store.path.read_bytes()
        room = (len(content) * 3 // 2) // 1024
        subprocess.run(["mount", "-o", f"remount,size={room}k", str(folder)], check=True)
        with pytest.raises(StoreError, match=r"No space left.*AUTOCHUNK_STORE"):
            store.check_writable()
        assert store.path.read_bytes() == content
        assert list(folder.iterdir()) == [store.path]


@needs_root_on_linux
def test_read_only_disk(tmp_path: Path) -> None:
    """Profiles are read; writing is a StoreError, and known before anything is measured.

    A damaged file stays, and is told.
    """
    with mounted(tmp_path / "ro", "size=4m") as folder:
        fill(folder / "profiles.sqlite", 20)
        (folder / "damaged.sqlite").write_bytes(b"no database" * 1000)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        store = ProfileStore(folder / "profiles.sqlite")
        damaged = ProfileStore(folder / "damaged.sqlite")
        assert lengths(store.profiles()) == list(range(1, 21))
        assert store.get(HERE, make_workload("t=7,k=8"))
        for write in (
            store.check_writable,
            lambda: store.put(profile_of(1)),
            lambda: store.forget([profile_of(1)]),
            damaged.check_writable,
        ):
            with pytest.raises(StoreError, match=r"(?i)read-?only.*AUTOCHUNK_STORE"):
                write()
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["damaged.sqlite", "profiles.sqlite"]


# --- Damage ---------------------------------------------------------------------------------------


def pages(path: Path, kind: int, table: str = "profiles") -> list[int]:
    """Numbers, from 1, of a tree's pages of a kind, the root first.

    Kinds 2 and 10 are interior and leaf of an index; 5 and 13 those of a table.
    """
    tree = table if kind in (5, 13) else f"sqlite_autoindex_{table}_1"
    with closing(sqlite3.connect(path)) as file:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (root,) = file.execute(query, (tree,)).fetchone()
    content = path.read_bytes()
    found, queue = [], [int(root)]
    while queue:
        number = queue.pop(0)
        page = content[(number - 1) * PAGE : number * PAGE]
        if page[0] == kind:
            found.append(number)
        if page[0] in (2, 5):
            starts = range(12, 12 + 2 * int.from_bytes(page[3:5]), 2)
            pointers = [int.from_bytes(page[start : start + 2]) for start in starts]
            queue += [int.from_bytes(page[at : at + 4]) for at in (*pointers, 8)]
    return found


def spoil(path: Path, *numbers: int, with_: bytes = b"\xa5") -> None:
    content = bytearray(path.read_bytes())
    for number in numbers:
        content[(number - 1) * PAGE : number * PAGE] = with_ * PAGE
    path.write_bytes(content)


def spoil_the_schema(path: Path) -> None:
    """Page 1 but for the file's header."""
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(PAGE - 100) + content[PAGE:])


# What is done to a store of 200 profiles, and how many of them can be expected to be rescued.
DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "no database": (lambda path: path.write_bytes(b"no database" * 1000), 0),
    "schema page": (lambda path: spoil(path, 1), 200),
    "schema page of zeros": (lambda path: spoil(path, 1, with_=b"\0"), 200),
    "schema page's tree": (spoil_the_schema, 200),
    "schema page and a leaf": (lambda path: spoil(path, 1, pages(path, 13)[20]), 190),
    "schema page and the top": (lambda path: spoil(path, 1, pages(path, 5)[0]), 200),
    "header": (lambda path: path.write_bytes(b"\xa5" * 100 + path.read_bytes()[100:]), 200),
    "first leaf": (lambda path: spoil(path, pages(path, 13)[0]), 190),
    "last leaf": (lambda path: spoil(path, pages(path, 13)[-1]), 190),
    "two leaves": (lambda path: spoil(path, pages(path, 13)[20], pages(path, 13)[70]), 185),
    "leaf of zeros": (lambda path: spoil(path, pages(path, 13)[9], with_=b"\0"), 190),
    "index page": (lambda path: spoil(path, pages(path, 10)[1]), 200),
    "index root": (lambda path: spoil(path, pages(path, 2)[0]), 200),
    "other table's page": (lambda path: spoil(path, pages(path, 13, "missed")[0]), 200),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), 60),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_writer_sets_damage_aside_and_rescues(store: ProfileStore, damage: str) -> None:
    """A writer copies the file aside, says so once, brings over all whole profiles, and goes on.

    The damaged file keeps every byte.
    """
    harm, least = DAMAGE[damage]
    harm(store.path)
    content = store.path.read_bytes()
    with pytest.warns(StoreWarning) as caught:
        store.put(profile_of(300))
    (aside,) = store.path.parent.glob("profiles.sqlite.damaged-*")
    assert aside.read_bytes() == content
    kept = lengths(store.profiles())
    assert len(caught) == 1
    assert f"{aside}, and {len(kept) - 1} profiles were rescued" in str(caught[0].message)
    assert len(kept) - 1 >= least
    assert kept[-1] == 300
    assert rescue.damage(store.path, 1, "integrity_check") == ""
    assert len(list(store.path.parent.iterdir())) == 2
    if least == 200 and damage != "other table's page":
        assert store.missed(HERE) == [make_workload("t=5000,k=8")]


def test_interior_page_of_a_large_store(store_path: Path) -> None:
    """Where a page is lost that leads to others, what it led to is rescued all the same."""
    store = fill(store_path, 4000)
    interior = pages(store_path, 5)
    assert len(interior) > 3
    spoil(store_path, interior[2])
    with pytest.warns(StoreWarning, match="were rescued"):
        store.check_writable()
    assert len(store.profiles()) == 4000


def test_what_was_deleted_does_not_come_back(store: ProfileStore) -> None:
    """Its pages stay in the file as they were; a first page that is lost cannot tell them."""
    store.forget([profile_of(t) for t in range(1, 121)])
    store.put(profile_of(150, measurements=40))
    spoil(store.path, 1)
    with pytest.warns(StoreWarning, match="80 profiles were rescued"):
        store.check_writable()
    assert lengths(store.profiles()) == list(range(121, 201))
    assert measured(store, 150) == [40]


def test_rows_that_are_not_whole_are_not_rescued(store: ProfileStore) -> None:
    """Bytes that SQLite reads and that are no profile, or another key's, stay behind.

    A newer version's profile comes along.
    """
    newer = json.dumps({"schema_version": 7, "what": "ever"})
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE profiles SET value = 'no json' WHERE key LIKE '%t=100,%'")
        other = "(SELECT value FROM profiles WHERE key LIKE '%t=102,%')"
        file.execute(f"UPDATE profiles SET value = {other} WHERE key LIKE '%t=101,%'")
        file.execute("UPDATE profiles SET value = ? WHERE key LIKE '%t=103,%'", (newer,))
        file.execute("UPDATE missed SET value = 'no json'")
    spoil(store.path, pages(store.path, 10)[0])
    with pytest.warns(StoreWarning, match="198 profiles were rescued"):
        store.check_writable()
    with pytest.warns(StoreWarning, match="^1 of 198 profiles"):
        assert lengths(store.profiles()) == [t for t in range(1, 201) if t not in (100, 101, 103)]
    assert store.missed(HERE) == []


def test_setting_aside_never_overwrites(store_path: Path) -> None:
    """Damaged again within the second: another name."""
    store = ProfileStore(store_path)
    store_path.parent.mkdir()
    for number in range(4):
        store_path.write_bytes(b"no database %d" % number * 100)
        with pytest.warns(StoreWarning):
            store.check_writable()
    aside = list(store_path.parent.glob("profiles.sqlite.damaged-*"))
    beginnings = sorted(path.read_bytes()[:13] for path in aside)
    assert beginnings == [b"no database %d" % number for number in range(4)]


def test_a_link_to_the_file_stays_a_link(store: ProfileStore, tmp_path: Path) -> None:
    """Where the store's name is a symbolic link the file that it leads to is mended, or made."""
    link, dangling = tmp_path / "link.sqlite", tmp_path / "dangling.sqlite"
    link.symlink_to(store.path)
    dangling.symlink_to(tmp_path / "made.sqlite")
    store.path.write_bytes(b"no database" * 100)
    with pytest.warns(StoreWarning, match=str(store.path.parent)):
        ProfileStore(link).put(profile_of(1))
    ProfileStore(dangling).put(profile_of(2))
    assert link.is_symlink()
    assert lengths(store.profiles()) == [1]
    assert lengths(ProfileStore(tmp_path / "made.sqlite").profiles()) == [2]


@pytest.mark.parametrize("damage", ["two leaves", "no database"])
def test_several_find_the_damage_at_once(store: ProfileStore, damage: str) -> None:
    """One sets the file aside, all go on; nothing that was rescued or written is lost."""
    DAMAGE[damage][0](store.path)
    writers = [start_writer(store.path, 1000 * (number + 1), 5) for number in range(6)]
    told = 0
    for writer in writers:
        _, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
        told += "profiles were rescued" in err
    assert told == 1
    assert len(list(store.path.parent.glob("*.damaged-*"))) == 1
    kept = lengths(store.profiles())
    assert kept[-30:] == [1000 * number + t for number in range(1, 7) for t in range(5)]
    assert len(kept) >= 30 + DAMAGE[damage][1]


def test_writer_whose_file_is_replaced_goes_on_with_the_new_one(
    store: ProfileStore, tmp_path: Path
) -> None:
    """Who opened the file before it was set aside must not write into the old one."""
    other, calls = fill(tmp_path / "other.sqlite", 3), 0

    def write(table: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.link(store.path, tmp_path / "aside")
            os.replace(other.path, store.path)
        table.update({"here | there": "written"})

    store._database._write("profiles", write)
    assert calls == 2
    assert store.unreadable() == ["here | there"]
    assert ProfileStore(tmp_path / "aside").unreadable() == []


KILLED_WHILE_MENDING = """
import os, signal, sys
from autochunk.store import rescue
from autochunk.store.profiles import ProfileStore
rescue._refill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ProfileStore(sys.argv[1]).check_writable()
"""


def test_killed_while_mending(store: ProfileStore) -> None:
    """The damaged file is where it was, and the next writer mends it."""
    DAMAGE["two leaves"][0](store.path)
    with start_python(KILLED_WHILE_MENDING, store.path) as process:
        assert process.wait(60) == -9
    with pytest.raises(StoreError, match="`autochunk tune` sets it aside"):
        store.profiles()
    with pytest.warns(StoreWarning, match="were rescued"):
        store.check_writable()
    assert len(store.profiles()) >= 185


def test_damage_that_cannot_be_set_aside(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that cannot be set aside is a StoreError, and the file stays as it was.

    Here because another process does not end its own mending.
    """
    DAMAGE["two leaves"][0](store.path)
    content = store.path.read_bytes()
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 100)
    said = r"another process has been rescuing.*AUTOCHUNK_STORE"
    with rescue._alone(store.path.parent, 1), pytest.raises(StoreError, match=said):
        store.put(profile_of(1))
    assert store.path.read_bytes() == content
    assert list(store.path.parent.iterdir()) == [store.path]


def test_random_damage_never_hangs(store_path: Path) -> None:
    """Wherever bytes are overwritten, reading is an answer or a StoreError.

    Afterwards a writer goes on with a sound file of whole rows.
    """
    store, chance = fill(store_path, 60), random.Random(1)
    content, new = store_path.read_bytes(), profile_of(300)
    allowed = {profile.workload for profile in [*store.profiles(), new]}
    reads: tuple[Callable[[], object], ...] = (
        store.profiles,
        store.unreadable,
        lambda: store.workloads(HERE),
        lambda: store.missed(HERE),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        for size in [1, 40, 600] * 13:
            at = chance.randrange(len(content) - size)
            store_path.write_bytes(content[:at] + chance.randbytes(size) + content[at + size :])
            for read in reads:
                with contextlib.suppress(StoreError):
                    read()
            store.put(new)
            assert store.get(HERE, make_workload("t=300,k=8")) == new
            assert {profile.workload for profile in store.profiles()} <= allowed
            assert rescue.damage(store_path, 1) == ""


# --- Forgetting -----------------------------------------------------------------------------------


def test_forget(store: ProfileStore) -> None:
    """Only what is named goes, by device and workload, and what was there is counted."""
    store.put(profile_of(1, "there"))
    assert store.forget([profile_of(t, measurements=1) for t in (1, 2, 2, 999)]) == 2
    assert lengths(store.profiles(HERE)) == list(range(3, 201))
    assert lengths(store.profiles(THERE)) == [1]
    assert store.forget([]) == 0


def test_forget_is_all_or_nothing(store: ProfileStore) -> None:
    """Where one row cannot be deleted none is."""
    with closing(sqlite3.connect(store.path)) as file, file:
        action = "WHEN OLD.key LIKE '%t=150,%' BEGIN SELECT RAISE(ABORT, 'disk on fire'); END"
        file.execute(f"CREATE TRIGGER no BEFORE DELETE ON profiles {action}")
    with pytest.raises(StoreError, match="disk on fire"):
        store.forget(store.profiles())
    assert len(store.profiles()) == 200


def test_forget_missed(store: ProfileStore) -> None:
    """A device's own, and no other's."""
    store.record_miss(THERE, make_workload("t=1,k=8"))
    store.record_miss(HERE, make_workload("t=1,k=8"))
    assert store.forget_missed(HERE) == 2
    assert store.missed(HERE) == []
    assert store.missed(THERE) == [make_workload("t=1,k=8")]
    assert store.forget_missed(HERE) == 0


def test_forget_unreadable(store: ProfileStore) -> None:
    """Rows that no version can read are named and deleted; a newer version's are not, and stay."""
    bad: list[tuple[object, object]] = [
        *[("b | nonsense", "no json"), ("c", "{}"), ("d", b"\xff"), ("e", None), ("f", 2.5)],
        *[("g | other", profile_of(1).model_dump_json()), (b"\xff", "3"), (None, "x")],
    ]
    newer = json.dumps({"schema_version": 7, "profile": "of the future"})
    rows = [*bad, (f"{HERE.key} | newer", newer)]
    with closing(sqlite3.connect(store.path)) as file, file:
        file.executemany("INSERT INTO profiles VALUES (?, ?)", rows)
    keys = ["", "\\xff", *(key for key, _ in bad if isinstance(key, str))]
    assert sorted(store.unreadable()) == sorted(keys)
    said = f"^{len(rows)} of {200 + len(rows)} profiles .* forget_unreadable"
    with pytest.warns(StoreWarning, match=said):
        store.profiles()
    assert store.forget_unreadable() == len(bad)
    assert store.unreadable() == []
    assert store.forget_unreadable() == 0
    with pytest.warns(StoreWarning, match="^1 of 201"):
        assert len(store.profiles()) == 200


# --- Storing unless changed -----------------------------------------------------------------------


def read(store: ProfileStore, *ts: int) -> dict[tuple[str, str], Profile | None]:
    """What is stored of these workloads, as ``put_all`` is told it."""
    workloads = [make_workload(f"t={t},k=8") for t in ts]
    return {(HERE.key, workload.key): store.get(HERE, workload) for workload in workloads}


def measured(store: ProfileStore, *ts: int) -> list[int]:
    """How many measurements these workloads' profiles have, of those that can be read."""
    workloads = {make_workload(f"t={t},k=8").key for t in ts}
    return [len(one.measurements) for one in store.profiles() if one.workload in workloads]


def test_put_all_where_all_is_as_expected(store: ProfileStore) -> None:
    """All is stored where all is still as it was read: there, not there, or not to be read."""
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE profiles SET value = '{\"created\": 3}' WHERE key LIKE '%t=2,%'")
    expected = {**read(store, 1, 500), (HERE.key, profile_of(2).workload): None}
    store.put_all([profile_of(t, measurements=1) for t in (1, 2, 500)], expected=expected)
    assert measured(store, 1, 2, 500) == [1, 1, 1]


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda store: store.put(profile_of(1, measurements=2)),
        lambda store: store.forget([profile_of(1)]),
        lambda store: store.put(profile_of(500)),
    ],
    ids=["replaced", "deleted", "new"],
)
def test_put_all_where_something_changed(
    store: ProfileStore, meanwhile: Callable[[ProfileStore], object]
) -> None:
    """Nothing is stored, and a StoreError says so."""
    expected = read(store, 1, 500)
    meanwhile(store)
    before = store.profiles()
    with pytest.raises(StoreError, match="another process changed the same profiles meanwhile"):
        store.put_all([profile_of(t, measurements=1) for t in (1, 2, 500)], expected=expected)
    assert store.profiles() == before


def test_put_all_where_something_changes_in_between(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and storing, too: the comparison is part of the statement that stores."""
    expected = read(store, 1)
    make_tables = rescue.make_tables

    def interfere(path: Path, tables: tuple[str, ...], seconds: float) -> None:
        monkeypatch.setattr(rescue, "make_tables", make_tables)
        store.put(profile_of(1, measurements=2))
        make_tables(path, tables, seconds)

    monkeypatch.setattr(rescue, "make_tables", interfere)
    new = [profile_of(t, measurements=1) for t in (1, 2)]
    with pytest.raises(StoreError, match="changed the same profiles meanwhile"):
        store.put_all(new, expected=expected)
    assert measured(store, 1) == [2]
    assert measured(store, 2) == [4]
