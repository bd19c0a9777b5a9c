"""Storages that cannot be used, or that are away for a while: what is told, and what is kept."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import Scripted, make_device, make_measurement

from autochunk.errors import StorageError
from autochunk.plan import Plan
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.events import Event, Measured
from autochunk.tuner.study import Storage, failures
from autochunk.tuner.tune import tune
from autochunk.workload import Workload

WORKLOAD = Workload.parse("b=2,t=2048,h=4,k=8")


def one_line(place: str | Path, use: Callable[[Storage], object] = lambda _: None) -> str:
    """What is said of a storage that cannot be used; its use fails the test if it succeeds."""
    with pytest.raises(StorageError, match=r"cannot be used|is no storage") as error:
        use(Storage(place))
    assert "\n" not in str(error.value)
    return str(error.value)


def open_study(storage: Storage) -> object:
    return storage.study(make_device(), WORKLOAD, "quick")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE alembic_version SET version_num = 'v2.6.0.a'", "optuna storage upgrade"),
        ("UPDATE alembic_version SET version_num = 'v9.0.0.a'", "pip install -U optuna"),
        ("INSERT INTO alembic_version VALUES ('v3.0.0.a')", "alembic_version"),
        ("DROP TABLE studies; CREATE TABLE studies (x)", "no such column"),
        ("DROP TABLE version_info; CREATE TABLE version_info (x)", "no such column"),
    ],
)
def test_a_storage_of_another_optuna_or_program(change: str, said: str, tmp_path: Path) -> None:
    """It is told what to do, in one line, of whatever kind Optuna's error is."""
    path = tmp_path / "studies.sqlite"
    Storage(f"sqlite:///{path}")
    with sqlite3.connect(path) as file:
        file.executescript(change)
    assert said in one_line(f"sqlite:///{path}", open_study)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    """Without a traceback."""
    place = f"sqlite:///{tmp_path / 'studies.sqlite'}"
    Storage(place)
    with sqlite3.connect(tmp_path / "studies.sqlite") as file:
        file.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    command = [sys.executable, "-m", "autochunk.cli", "export", "-", "--storage", place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def run_sql(url: str, *statements: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as server:
        for statement in statements:
            server.execute(statement.encode())


def test_who_may_only_read_a_database(database: str) -> None:
    """Exports, and cannot tune; whose role or database is not there is told that."""
    open_study(Storage(database))
    reader = database.replace("autochunk:secret", "reader")
    run_sql(database, "DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN")
    run_sql(database, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    assert Storage(reader, make=False).profiles() == ([], 1)
    other = make_device(kind="Another/Kind")
    said = one_line(reader, lambda storage: storage.study(other, WORKLOAD, "quick"))
    assert "permission denied for table studies" in said
    run_sql(database, "DROP OWNED BY reader", "DROP ROLE reader")
    assert 'role "reader" does not exist' in one_line(reader)
    assert "does not exist" in one_line(database + "_not")


def go_away(server: str, place: str) -> None:
    """Ends all that use a database, and lets nobody in."""
    name = place.rpartition("/")[2]
    gone = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    run_sql(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", gone)


def come_back(server: str, place: str) -> None:
    run_sql(server, f"ALTER DATABASE {place.rpartition('/')[2]} ALLOW_CONNECTIONS true")


def tuned_through(
    place: str, command: tuple[str, ...], after: int, act: Callable[[], object]
) -> list[Plan]:
    """Tunes, and acts when so many plans are measured; returns what was measured."""
    plans: list[Plan] = []

    def tell(event: Event) -> None:
        if isinstance(event, Measured):
            plans.append(event.measurement.plan)
            if event.done == after:
                act()

    options: dict[str, Any] = {"worker_command": command, "storage": place, "on_event": tell}
    tune([WORKLOAD], effort="standard", **options)
    return plans


def test_a_server_that_is_away_for_a_while_costs_waiting(
    postgresql: str, database: str, scripted: Scripted
) -> None:
    """Each plan is measured once, and the profile is complete, as if nothing had happened."""
    back = threading.Timer(1.0, come_back, (postgresql, database))

    def away() -> None:
        go_away(postgresql, database)
        back.start()

    plans = tuned_through(database, scripted(), 3, away)
    assert len(plans) == len(set(plans))
    (profile,) = ProfileStore().profiles()
    assert profile.complete
    assert set(plans) == {measurement.plan for measurement in profile.measurements}


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_what_is_measured_is_kept_when_the_storage_is_lost(
    kind: str,
    request: pytest.FixtureRequest,
    scripted: Scripted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the tuner's own store, unfinished; the error says so."""
    monkeypatch.setattr("autochunk.tuner.study.storage.PATIENCE_SECONDS", 0.3)
    place = str(tmp_path / "shared" / "studies.journal")
    lose: Callable[[], object] = lambda: shutil.rmtree(tmp_path / "shared")  # noqa: E731
    if kind == "postgresql":
        server = request.getfixturevalue("postgresql")
        place = request.getfixturevalue("database")
        lose = lambda: go_away(server, place)  # noqa: E731
    with pytest.raises(StorageError, match=r"cannot be used: .*; what was measured before is kept"):
        tuned_through(place, scripted(), 4, lose)
    (profile,) = ProfileStore().profiles()
    assert not profile.complete
    assert len(profile.measurements) >= 4


def test_what_may_pass_is_waited_for() -> None:
    """As long as it is said, and no longer; when that is over is known."""
    left = [OSError("stale file handle")] * 3

    def fail() -> str:
        if left:
            raise left.pop()
        return "answer"

    patience = failures.Patience(60.0)
    start = time.time()
    assert patience.ask(fail) == "answer"
    assert start < patience.returned <= time.time()
    left.extend([OSError("stale file handle")] * 1000)
    patience = failures.Patience(0.5)
    with pytest.raises(OSError, match="stale"):
        patience.ask(fail)
    rest = len(left)
    with pytest.raises(OSError, match="stale"):  # nor is all that follows waited for
        patience.ask(fail)
    assert len(left) == rest - 1


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, ValueError, AssertionError])
def test_what_does_not_pass_is_not_waited_for(error: type[Exception]) -> None:
    """It is told at once."""
    asked = []

    def fail() -> None:
        asked.append(1)
        raise error

    with pytest.raises(error):
        failures.Patience(60.0).ask(fail)
    assert len(asked) == 1


def test_who_could_not_write_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the storage was away nobody could; silence counts from when it was back."""
    monkeypatch.setattr("autochunk.tuner.study.liveness.SILENT_SECONDS", 0.3)
    monkeypatch.setattr("autochunk.tuner.study.liveness.worker_name", lambda: "other boot pid 1")
    storage = Storage(tmp_path / "journal")
    study = storage.study(make_device(), WORKLOAD, "quick")
    claim = study.claim([Plan("dense", None)])
    assert claim is not None
    monkeypatch.undo()
    monkeypatch.setattr("autochunk.tuner.study.liveness.SILENT_SECONDS", 0.3)
    time.sleep(0.4)
    storage._patience.returned = time.time()
    assert study.claim([Plan("dense", None)]) is None
    claim.done([make_measurement("dense", None)], None)
    assert list(study.measured()) == [Plan("dense", None)]
