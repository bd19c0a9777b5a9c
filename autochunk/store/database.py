"""ProfileStore: the user's own profiles and missed workloads, in one SQLite file.

sqlitedict is the table format and writes. Rows are JSON: its pickle default would run whatever a
file tells it to (CVE-2024-35515). The file is opened for each operation and closed again, so that
nothing is held across a fork. autocommit=True, because with False a commit that fails leaves
sqlitedict waiting for ever; DELETE journal, because WAL was seen to lose concurrent opens.
sqlitedict ignores its ``timeout`` and turns ``synchronous`` off; both are set by pragma on its
connection. EXTRA, which outlasts a power cut right after the commit too, makes the statement that
stores a profile 10 times as slow as OFF: 1.4 ms on an SSD, of 3 for a whole ``put``.

Reading goes through sqlite3 itself: sqlitedict waits for ever on a damaged page. A look-up must not
take longer as the store grows, so that only writers look the whole file over first; one that finds
damage sets the file aside and goes on with all rows that are whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import sqlitedict
from platformdirs import user_data_path
from pydantic import BaseModel, Field, StrictInt, ValidationError

from autochunk.device import Device
from autochunk.errors import StoreError, StoreWarning, WorkloadError
from autochunk.store import rescue
from autochunk.store.profile import SCHEMA_VERSION, Profile, utc_now
from autochunk.store.rescue import Row
from autochunk.workload import Workload

STORE_VARIABLE = "AUTOCHUNK_STORE"
_FILE_NAME = "profiles.sqlite"
_PROFILES, _MISSED = _TABLES = "profiles", "missed"
_BUSY_MILLISECONDS = 30_000

_CURE = (
    f"set {STORE_VARIABLE} to a file in a folder you may write, or move this file away to start "
    "anew"
)

_T = TypeVar("_T")

# sqlitedict logs the stack of every failed statement; the same failures reach the caller as
# StoreError.
logging.getLogger("sqlitedict").setLevel(logging.CRITICAL + 1)


class _Miss(BaseModel):
    """The value of a row of a missed workload."""

    when: str


class _Newer(BaseModel):
    """What there is to know about a profile that a newer version wrote."""

    schema_version: Annotated[StrictInt, Field(gt=SCHEMA_VERSION)]


def default_path() -> Path:
    """The store's file.

    ``AUTOCHUNK_STORE`` (a file, or a folder to put it in), else in the user's data directory.

    Raises:
      StoreError: the user has no home directory.
    """
    chosen = os.environ.get(STORE_VARIABLE)
    try:
        if not chosen:
            return user_data_path("autochunk") / _FILE_NAME
        path = Path(chosen).expanduser()
    except RuntimeError as error:
        raise StoreError(
            f"profiles have no place to be stored ({error}); set {STORE_VARIABLE} to a file"
        ) from error
    return path / _FILE_NAME if path.is_dir() or chosen.endswith(os.sep) else path


class ProfileStore:
    """Profiles by device and workload, and the workloads that "auto" missed.

    Every method raises StoreError where the file cannot be read or written; nothing already stored
    is changed then. Whatever stores or forgets profiles, and ``check_writable``, first sees to the
    file: one that is damaged, or no database, is kept as ``<name>.damaged-<UTC time>`` beside
    itself, what is whole in it makes a new store, a StoreWarning says so, and the operation goes
    on. The other methods leave a damaged file where it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = default_path() if path is None else Path(path)

    def __repr__(self) -> str:
        return f"ProfileStore({str(self.path)!r})"

    # --- Reading ------------------------------------------------------------------------------------------------------

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """The profile of a workload on a device; None if there is none.

        Raises:
          StoreError: also where the row is there and cannot be read.
        """
        rows = self._select(
            _PROFILES,
            f'SELECT {rescue.ROW} FROM "{_PROFILES}" WHERE key = ?',
            _row_key(device.key, workload.key),
        )
        return self._profile(Row(*rows[0])) if rows else None

    def profiles(self, device: Device | None = None) -> list[Profile]:
        """All profiles, or those of one device, by key.

        Rows that cannot be read are left out, with one StoreWarning that counts them.
        """
        rows = self._rows(device)
        found = [profile for row in rows if (profile := self._readable(row))]
        if len(found) < len(rows):
            text = (
                f"{len(rows) - len(found)} of {len(rows)} profiles in {self.path} cannot be read "
                "and were left out"
            )
            cure = (
                "ProfileStore.unreadable() names those that no version can read, "
                "forget_unreadable() deletes them"
            )
            warnings.warn(f"{text}; {cure}", StoreWarning, stacklevel=2)
        return found

    def workloads(self, device: Device) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        return self._workload_keys(_PROFILES, device)

    def keys(self) -> list[tuple[str, str]]:
        """Device key and workload key of every profile, in order.

        Of rows under keys that are neither, nothing.
        """
        rows = self._select(_PROFILES, f'SELECT CAST(key AS BLOB) FROM "{_PROFILES}" ORDER BY key')
        return [names for (key,) in rows if (names := _names(key))]

    def missed(self, device: Device) -> list[Workload]:
        """Workloads that "auto" missed on a device, by key."""
        workloads = []
        for key in self._workload_keys(_MISSED, device):
            with contextlib.suppress(WorkloadError):  # written by a newer version, or by hand
                workloads.append(Workload.parse(key))
        return workloads

    def newer(self) -> set[tuple[str, str]]:
        """(device key, workload key) of the profiles that a newer version of autochunk wrote, which
        this one cannot read.
        """
        return {names for row in self._rows() if (names := _names(row.key)) and _fits(_Newer, row)}

    def unreadable(self) -> list[str]:
        """Keys of the profiles' rows that no version can read.

        Their value is no JSON, no profile, or another key's. A newer version's are none of these.
        """
        return [(row.key or b"").decode(errors="backslashreplace") for row in self._unreadable()]

    def version(self) -> tuple[int, int, int] | None:
        """Changes whenever the file does; None while there is no file."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    # --- Writing ------------------------------------------------------------------------------------------------------

    def put(self, profile: Profile) -> None:
        """Stores a profile in place of an earlier one of the same workload and device.

        If it is complete, the workload is no longer one that was missed.
        """
        key = _row_key(*profile.key)
        self._write(_PROFILES, lambda table: table.update({key: profile.model_dump_json()}))
        if profile.complete:
            self._forget_missed([key])

    def put_all(
        self,
        profiles: Iterable[Profile],
        *,
        expected: Mapping[tuple[str, str], Profile | None] | None = None,
    ) -> None:
        """Stores many profiles: all of them, or on an error none.

        Args:
          profiles: what to store; of two for one workload and device the last.
          expected: by device key and workload key, what ``profiles()`` or ``get`` said was there
            (None: nothing, or nothing that could be read). Unless all of it still is when the
            profiles are stored, nothing is stored.

        Raises:
          StoreError: also where the rows are no longer as ``expected``.
        """
        by_key = {_row_key(*profile.key): profile for profile in profiles}
        rows = {key: profile.model_dump_json() for key, profile in by_key.items()}
        known = self._values(expected or {})
        stored = self._write(
            _PROFILES,
            lambda table: _change(
                table, _REPLACE_UNLESS_CHANGED, json.dumps(rows), json.dumps(known)
            ),
        )
        if rows and not stored:
            raise self._changed()
        self._forget_missed([key for key, profile in by_key.items() if profile.complete])

    def forget(self, profiles: Iterable[Profile]) -> int:
        """Deletes what is stored for the workloads and devices of these profiles, all or none.

        Returns how many there were.
        """
        keys = json.dumps([_row_key(*profile.key) for profile in profiles])
        return self._delete(_PROFILES, _AMONG, lambda: [(keys,)])

    def forget_unreadable(self) -> int:
        """Deletes the rows that ``unreadable`` names, each only if it is still as it was.

        Returns how many there were.
        """
        # One by one, because bytes that are no text fit no JSON.
        return self._delete(
            _PROFILES,
            "WHERE rowid = ? AND CAST(value AS BLOB) IS ?",
            lambda: [(row.rowid, row.value) for row in self._unreadable()],
        )

    def forget_missed(self, device: Device) -> int:
        """Forgets every workload that "auto" missed on a device; returns how many there were."""
        return self._delete(_MISSED, _OF_DEVICE, lambda: [_prefix_range(device)])

    def record_miss(self, device: Device, workload: Workload) -> None:
        """Remembers that "auto" found no profile for a workload.

        It happens while a model is traced, so that a damaged file is left where it is.
        """
        key = _row_key(device.key, workload.key)
        if not self._select(_MISSED, f'SELECT 1 FROM "{_MISSED}" WHERE key = ?', key):
            self._write(
                _MISSED,
                lambda table: table.update({key: _Miss(when=utc_now()).model_dump_json()}),
                mend=False,
            )

    def check_writable(self) -> None:
        """Raises StoreError now rather than after hours of measuring, if a profile could not be
        stored.
        """
        self._write(_PROFILES, lambda _: None)
        with self._errors("write"), contextlib.closing(self._connect()) as file:
            # the folder must take a journal, too
            for statement in ("BEGIN IMMEDIATE", "PRAGMA user_version = 1", "ROLLBACK"):
                file.execute(statement)

    def _forget_missed(self, keys: list[str]) -> None:
        text = json.dumps(keys)
        if self._select(_MISSED, f'SELECT 1 FROM "{_MISSED}" {_AMONG} LIMIT 1', text):
            self._delete(_MISSED, _AMONG, lambda: [(text,)])

    def _delete(
        self, name: str, where: str, values: Callable[[], Iterable[tuple[object, ...]]]
    ) -> int:
        """Deletes rows by a condition, once for each tuple of values in it; how many there were."""
        delete = f'DELETE FROM "{name}" {where}'
        return (
            self._write(name, lambda table: sum(_change(table, delete, *each) for each in values()))
            if self._exists()
            else 0
        )

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _profile(self, row: Row) -> Profile:
        try:
            profile = Profile.model_validate_json(row.value or b"")
        except ValidationError as error:
            raise StoreError(
                f"a profile in {self.path} cannot be read ({error.error_count()} problems, first: "
                f"{_first(error)}); {_CURE}"
            ) from error
        if _row_key(*profile.key).encode() != row.key:
            raise StoreError(
                f"a profile in {self.path} cannot be read (under the key {row.key!r} is the "
                f"profile of {_row_key(*profile.key)}); {_CURE}"
            )
        return profile

    def _readable(self, row: Row | None) -> Profile | None:
        try:
            return row and self._profile(row)
        except StoreError:
            return None

    def _whole(self, table: str, row: Row) -> bool:
        """Whether a row is what some version stored."""
        try:
            named = bool((row.key or b"").decode())
        except UnicodeDecodeError:
            return False
        return named and (
            (table == _PROFILES and self._readable(row) is not None)
            or _fits(_Miss if table == _MISSED else _Newer, row)
        )

    def _unreadable(self) -> list[Row]:
        return [row for row in self._rows() if not self._whole(_PROFILES, row)]

    def _values(self, expected: Mapping[tuple[str, str], Profile | None]) -> dict[str, str]:
        """By key the bytes of each expected row, as SQLite's hex() writes them.

        StoreError where it is another one by now.
        """
        rows = {row.key: row for row in self._rows()} if expected else {}
        values = {}
        for names, profile in expected.items():
            key = _row_key(*names)
            row = rows.get(key.encode())
            if self._readable(row) != profile:
                raise self._changed()
            values[key] = ((row and row.value) or b"").hex().upper()
        return values

    def _changed(self) -> StoreError:
        return StoreError(
            f"nothing was stored in {self.path}: another process changed the same profiles "
            "meanwhile; read them again and try again"
        )

    def _rows(self, device: Device | None = None) -> list[Row]:
        where, values = (_OF_DEVICE, _prefix_range(device)) if device else ("", ())
        select = f'SELECT {rescue.ROW} FROM "{_PROFILES}" {where} ORDER BY key'
        return [Row(*row) for row in self._select(_PROFILES, select, *values)]

    def _workload_keys(self, table: str, device: Device) -> list[str]:
        first, end = _prefix_range(device)
        rows = self._select(
            table, f'SELECT CAST(key AS BLOB) FROM "{table}" {_OF_DEVICE} ORDER BY key', first, end
        )
        return [key.decode(errors="backslashreplace").removeprefix(first) for (key,) in rows]

    # --- The file -----------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        return rescue.connect(self.path, _seconds())

    def _exists(self) -> bool:
        with self._errors("read"):
            return self.path.exists()

    def _select(self, table: str, statement: str, *values: str) -> list[Any]:
        """All rows of a query, as of one moment; none where there is no such table, or no file."""
        if not self._exists():
            return []
        with self._errors("read"), contextlib.closing(self._connect()) as file:
            file.execute("BEGIN")
            there = file.execute(
                "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)
            ).fetchone()
            return file.execute(statement, values).fetchall() if there else []

    def _write(self, name: str, action: Callable[[Any], _T], *, mend: bool = True) -> _T:
        """What an action comes to on the table as a sqlitedict.

        Done again where others had the file for long or put a new one in its place.
        """
        deadline = time.monotonic() + _seconds()
        with self._errors("write"):
            while True:
                self._make()
                if damage := rescue.damage(self.path, _seconds()):
                    if not mend:
                        raise sqlite3.DatabaseError(f"it is damaged ({damage})")
                    self._mend()
                try:
                    rescue.make_tables(self.path, _TABLES, _seconds())
                    with _table(self.path, name) as table:
                        return action(table)
                except sqlite3.Error as error:
                    # Damage that quick_check does not see, in an index, is seen by who walks into
                    # it.
                    repaired = mend and rescue.is_damage(error) and self._mend()
                    if not repaired and (
                        not rescue.must_reopen(error) or time.monotonic() > deadline
                    ):
                        raise

    def _make(self) -> None:
        """Makes the file, for its owner alone (SQLite gives its journal the same permissions), if
        there is none.
        """
        path = self.path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _making, contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            path.chmod(0o600)  # whatever the umask

    def _mend(self) -> bool:
        """Sets a damaged file aside and goes on with its whole rows.

        False if the file is sound, as after another process did it.
        """
        mended = rescue.mend(self.path, _TABLES, self._whole, _seconds())
        if mended:
            text = (
                f"the profile store {self.path} was damaged ({mended.damage}); it is kept as "
                f"{mended.aside}"
            )
            warnings.warn(
                f"{text}, and {mended.rows[_PROFILES]} profiles were rescued from it into a new "
                "store",
                StoreWarning,
                stacklevel=2,
            )
        return mended is not None

    @contextlib.contextmanager
    def _errors(self, task: Literal["read", "write"]) -> Iterator[None]:
        """Says what SQLite and the system say as a StoreError with a cure."""
        try:
            yield
        except StoreError:
            raise
        except (OSError, sqlite3.Error, RuntimeError) as error:
            # sqlitedict's thread has left its connection in one, which would stay open
            traceback.clear_frames(error.__traceback__)
            cure = (
                f"`autochunk tune` sets it aside and rescues what is whole in it; or {_CURE}"
                if rescue.is_damage(error) and task == "read"
                else _CURE
            )
            raise StoreError(
                f"cannot {task} the profile store {self.path}: {error}; {cure}"
            ) from error


# Closing a file drops all locks that SQLite has on it in this process: nobody else may have a file
# open that is being made.
_making = threading.Lock()

# No device's name has it.
_BETWEEN = " | "
_OF_DEVICE = "WHERE key >= ? AND key < ?"
_AMONG = "WHERE key IN (SELECT value FROM json_each(?))"
# A list is one statement, because sqlitedict commits after each.
_REPLACE_UNLESS_CHANGED = f"""
    REPLACE INTO "{_PROFILES}" (key, value) SELECT key, value FROM json_each(?) WHERE NOT EXISTS (
        SELECT 1 FROM json_each(?) AS was LEFT JOIN "{_PROFILES}" AS now ON now.key = was.key WHERE hex(now.value) != was.value)
"""


@contextlib.contextmanager
def _table(path: Path, name: str) -> Iterator[Any]:
    """A table as a sqlitedict, closed on leaving."""
    options = {
        "autocommit": True,
        "journal_mode": "DELETE",
        "encode": str,
        "decode": str,
        "outer_stack": False,
    }
    with sqlitedict.SqliteDict(str(path), tablename=name, flag="c", **options) as table:
        table.conn.select_one(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
        table.conn.select_one("PRAGMA synchronous = EXTRA")
        yield table


def _change(table: Any, statement: str, *values: object) -> int:
    """Runs one statement, a transaction of its own; the number of rows that it stored or deleted."""
    # RETURNING would be asked for rows after the commit, and an error then stops sqlitedict for
    # ever
    table.conn.select_one(statement, values)
    (count,) = table.conn.select_one("SELECT changes()")
    return int(count)


def _seconds() -> float:
    return _BUSY_MILLISECONDS / 1000


def _prefix_range(device: Device) -> tuple[str, str]:
    """The keys of a device's rows lie from the first, included, to the second."""
    prefix = _row_key(device.key, "")
    return prefix, prefix + "\U0010ffff"


def _names(row_key: bytes | None) -> tuple[str, str] | None:
    """Device key and workload key of a row; None of one that has neither."""
    device_key, between, workload_key = (
        (row_key or b"").decode(errors="backslashreplace").partition(_BETWEEN)
    )
    return (device_key, workload_key) if between else None


def _fits(kind: type[BaseModel], row: Row) -> bool:
    try:
        kind.model_validate_json(row.value or b"")
    except ValidationError:
        return False
    return True


def _row_key(device_key: str, workload_key: str) -> str:
    return f"{device_key}{_BETWEEN}{workload_key}"


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
