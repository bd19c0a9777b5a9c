"""ProfileStore: the user's own profiles and missed workloads, in one SQLite file through sqlitedict.

Rows are JSON: sqlitedict's pickle default would run whatever a file tells it to (CVE-2024-35515). The file is opened for each operation and closed again, so
that nothing is held across a fork. autocommit=True, because with False a commit that fails leaves sqlitedict waiting for ever; DELETE journal, because
WAL was seen to lose concurrent opens. sqlitedict ignores its ``timeout``, so the time to wait for another writer is set by pragma.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlitedict
from platformdirs import user_data_path
from pydantic import ValidationError

from autochunk.device import Device
from autochunk.errors import StoreError, WorkloadError
from autochunk.store.profile import Profile
from autochunk.workload import Workload

STORE_VARIABLE = "AUTOCHUNK_STORE"
_FILE_NAME = "profiles.sqlite"
_PROFILES, _MISSED = "profiles", "missed"
_BUSY_MILLISECONDS = 30_000

# sqlitedict logs the stack of every failed statement; the same failures reach the caller as StoreError.
logging.getLogger("sqlitedict").setLevel(logging.CRITICAL + 1)


def default_path() -> Path:
    """The store's file: ``AUTOCHUNK_STORE`` (a file, or a folder to put it in), else in the user's data directory."""
    chosen = os.environ.get(STORE_VARIABLE)
    if not chosen:
        return user_data_path("autochunk") / _FILE_NAME
    path = Path(chosen).expanduser()
    return path / _FILE_NAME if path.is_dir() or chosen.endswith(os.sep) else path


class ProfileStore:
    """Profiles by device and workload, and the workloads that "auto" missed.

    Every method raises StoreError where the file cannot be read or written; nothing already stored is changed then.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = default_path() if path is None else Path(path)

    def __repr__(self) -> str:
        return f"ProfileStore({str(self.path)!r})"

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """The profile of a workload on a device; None if there is none."""
        with self._open(_PROFILES, write=False) as table:
            text = None if table is None else table.get(_row_key(device.key, workload.key))
        return None if text is None else self._profile(text)

    def put(self, profile: Profile) -> None:
        """Stores a profile in place of an earlier one of the same workload and device, and forgets that the workload was missed."""
        key = _row_key(profile.device.key, profile.workload)
        with self._open(_PROFILES, write=True) as table:
            assert table is not None
            table[key] = profile.model_dump_json()
        self._forget_missed([key])

    def put_all(self, profiles: list[Profile]) -> None:
        """Stores many profiles: all of them, or on an error none."""
        rows = {_row_key(profile.device.key, profile.workload): profile.model_dump_json() for profile in profiles}
        with self._open(_PROFILES, write=True) as table:
            assert table is not None
            # One statement, because sqlitedict commits after each.
            replace = f'REPLACE INTO "{_PROFILES}" (key, value) SELECT key, value FROM json_each(?)'  # noqa: S608  (no input in it)
            table.conn.select_one(replace, (json.dumps(rows),))
        self._forget_missed(list(rows))

    def _forget_missed(self, keys: list[str]) -> None:
        with self._open(_MISSED, write=False) as table:
            if table is not None:
                delete = f'DELETE FROM "{_MISSED}" WHERE key IN (SELECT value FROM json_each(?))'  # noqa: S608  (no input in it)
                table.conn.select_one(delete, (json.dumps(keys),))

    def profiles(self, device: Device | None = None) -> list[Profile]:
        """All profiles, or those of one device, by key."""
        with self._open(_PROFILES, write=False) as table:
            rows = [] if table is None else list(table.items())
        prefix = "" if device is None else _row_key(device.key, "")
        return [self._profile(text) for key, text in sorted((str(key), text) for key, text in rows) if key.startswith(prefix)]

    def workloads(self, device: Device) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        prefix = _row_key(device.key, "")
        with self._open(_PROFILES, write=False) as table:
            if table is None:
                return []
            rows = table.conn.select('SELECT key FROM "profiles" WHERE key >= ? AND key < ? ORDER BY key', (prefix, prefix + "\U0010ffff"))
            return [key.removeprefix(prefix) for (key,) in rows if isinstance(key, str)]

    def record_miss(self, device: Device, workload: Workload) -> None:
        """Remembers that "auto" found no profile for a workload."""
        key = _row_key(device.key, workload.key)
        with self._open(_MISSED, write=False) as table:
            if table is not None and key in table:
                return
        with self._open(_MISSED, write=True) as table:
            assert table is not None
            table[key] = json.dumps({"when": utc_now()})

    def missed(self, device: Device) -> list[Workload]:
        """Workloads that "auto" missed on a device, by key."""
        prefix = _row_key(device.key, "")
        with self._open(_MISSED, write=False) as table:
            keys = [] if table is None else sorted(map(str, table.keys()))
        workloads = []
        for key in keys:
            with contextlib.suppress(WorkloadError):  # written by a newer version, or by hand
                if key.startswith(prefix):
                    workloads.append(Workload.parse(key.removeprefix(prefix)))
        return workloads

    def version(self) -> tuple[int, int, int] | None:
        """Changes whenever the file does; None while there is no file."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _profile(self, text: str) -> Profile:
        try:
            return Profile.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(f"a profile in {self.path} cannot be read ({error.error_count()} problems, first: {_first(error)}); {_CURE}") from error

    def check_writable(self) -> None:
        """Raises StoreError now rather than after hours of measuring, if a profile could not be stored."""
        with self._open(_PROFILES, write=True):
            pass

    @contextlib.contextmanager
    def _open(self, table: str, *, write: bool) -> Iterator[Any]:
        """The table as a sqlitedict, closed on leaving; None for reading where it is not there."""
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            if table not in self._tables() and not write:
                yield None
                return
            options = {"autocommit": True, "journal_mode": "DELETE", "encode": str, "decode": str, "outer_stack": False}
            with sqlitedict.SqliteDict(str(self.path), tablename=table, flag="c", **options) as rows:
                rows.conn.select_one(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
                rows.conn.select_one("PRAGMA synchronous = FULL")  # sqlitedict turns it off
                yield rows
        except StoreError:
            raise
        except (OSError, sqlite3.Error, RuntimeError) as error:
            raise StoreError(f"cannot {'write' if write else 'read'} the profile store {self.path}: {error}; {_CURE}") from error

    def _tables(self) -> list[str]:
        """The tables of a sound file. sqlitedict waits for ever on a damaged one, so it is looked at first.

        Opened for writing but never created: after a crash in mid-commit the first to open the file must be able to roll it back.
        """
        if not self.path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_MILLISECONDS / 1000)) as file:
            (verdict,) = file.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"the file is damaged ({verdict})")
            return [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]


_CURE = f"set {STORE_VARIABLE} to a file in a folder you may write, or move this file away to start anew"


def _row_key(device_key: str, workload_key: str) -> str:
    return f"{device_key} | {workload_key}"


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def utc_now() -> str:
    """The time as an ISO 8601 text in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
