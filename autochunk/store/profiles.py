"""ProfileStore: the user's own profiles and missed workloads, in one file.

Each is a row of JSON in a ``Database``. Rows may come from a newer version, another program or a
damaged file, so that every one is checked when it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from platformdirs import user_data_path
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
)

from autochunk.device import Device
from autochunk.errors import StoreError, StoreWarning, WorkloadError
from autochunk.store.database import AMONG, IN_RANGE, OF_KEY, UNCHANGED, Database
from autochunk.store.files import file_identity
from autochunk.store.profile import SCHEMA_VERSION, Profile, utc_now
from autochunk.store.rescue import Row
from autochunk.workload import Workload, split_key

STORE_VARIABLE = "AUTOCHUNK_STORE"
_FILE_NAME = "profiles.sqlite"
_PROFILES, _MISSED = _TABLES = "profiles", "missed"

_CURE = (
    f"set {STORE_VARIABLE} to a file in a folder you may write, or move this file away to start "
    "anew"
)


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
        self._database = Database(self.path, _TABLES, _whole, _CURE)

    def __repr__(self) -> str:
        return f"ProfileStore({str(self.path)!r})"

    @property
    def name(self) -> str:
        """What it is called among the places that profiles come from."""
        return f"user store {self.path}"

    # --- Reading ----------------------------------------------------------------------------------

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """The profile of a workload on a device; None if there is none.

        Raises:
          StoreError: also where the row is there and cannot be read.
        """
        rows = self._database.rows(_PROFILES, OF_KEY, _row_key(device.key, workload.key))
        try:
            return _profile(rows[0]) if rows else None
        except ValueError as error:
            raise StoreError(
                f"a profile in {self.path} cannot be read ({error}); {_CURE}"
            ) from error

    def profiles(self, device: Device | None = None) -> list[Profile]:
        """All profiles, or those of one device, by key.

        Rows that cannot be read are left out, with one StoreWarning that counts them.
        """
        where, values = (IN_RANGE, _key_range(device)) if device else ("", ())
        rows = self._database.rows(_PROFILES, where, *values)
        found = [profile for row in rows if (profile := _readable(row))]
        if len(found) < len(rows):
            warnings.warn(
                f"{len(rows) - len(found)} of {len(rows)} profiles in {self.path} cannot be read "
                "and were left out; ProfileStore.unreadable() names those that no version can "
                "read, forget_unreadable() deletes them",
                StoreWarning,
                stacklevel=2,
            )
        return found

    def workloads(self, device: Device) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        return self._workload_keys(_PROFILES, device)

    def keys(self) -> list[tuple[str, str]]:
        """Device key and workload key of every profile, in order.

        Of rows under keys that are neither, nothing.
        """
        return [names for key in self._database.keys(_PROFILES) if (names := _names(key))]

    def missed(self, device: Device) -> list[Workload]:
        """Workloads that "auto" missed on a device, by key."""
        return list(self.misses(device))

    def misses(self, device: Device) -> dict[Workload, int]:
        """How many processes missed each of those workloads, as far as that was counted."""
        first, end = _key_range(device)
        found = {}
        for row in self._database.rows(_MISSED, IN_RANGE, first, end):
            with contextlib.suppress(WorkloadError):  # written by a newer version, or by hand
                miss = _miss(row)
                workload = Workload.parse(_text(row.key).removeprefix(first))
                found[workload] = miss.count if miss else 1
        return found

    def missed_like(self, device: Device, workload: Workload) -> int:
        """How many workloads of this one's family "auto" missed on a device.

        None where this one is not among those that are remembered.
        """
        keys = self._workload_keys(_MISSED, device)
        if workload.key not in keys:
            return 0
        return sum(split_key(key)[1] == workload.family for key in keys)

    def newer(self) -> set[tuple[str, str]]:
        """(device key, workload key) of the profiles that only a newer autochunk can read."""
        rows = self._database.rows(_PROFILES)
        return {names for row in rows if (names := _names(row.key)) and _fits(_Newer, row)}

    def unreadable(self) -> list[str]:
        """Keys of the profiles' rows that no version can read.

        Their value is no JSON, no profile, or another key's. A newer version's are none of these.
        """
        return [_text(row.key) for row in self._unreadable()]

    def version(self) -> tuple[int, ...] | None:
        """Changes whenever the file does; None while there is no file."""
        return file_identity(self.path)

    def _unreadable(self) -> list[Row]:
        return [row for row in self._database.rows(_PROFILES) if not _whole(_PROFILES, row)]

    def _workload_keys(self, table: str, device: Device) -> list[str]:
        first, end = _key_range(device)
        keys = self._database.keys(table, IN_RANGE, first, end)
        return [_text(key).removeprefix(first) for key in keys]

    # --- Writing ----------------------------------------------------------------------------------

    def put(self, profile: Profile) -> None:
        """Stores a profile in place of an earlier one of the same workload and device.

        If it is complete, the workload is no longer one that was missed.
        """
        key = _row_key(*profile.key)
        self._database.put(_PROFILES, key, profile.model_dump_json())
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
        stored = self._database.replace(_PROFILES, rows, self._values(expected or {}))
        if rows and not stored:
            raise self._changed()
        self._forget_missed([key for key, profile in by_key.items() if profile.complete])

    def forget(self, profiles: Iterable[Profile]) -> int:
        """Deletes what is stored for these profiles' workloads and devices, all or none.

        Returns how many there were.
        """
        keys = json.dumps([_row_key(*profile.key) for profile in profiles])
        return self._database.delete(_PROFILES, AMONG, lambda: [(keys,)])

    def forget_unreadable(self) -> int:
        """Deletes the rows that ``unreadable`` names, each only if it is still as it was.

        Returns how many there were.
        """
        # One by one, because bytes that are no text fit no JSON.
        return self._database.delete(
            _PROFILES, UNCHANGED, lambda: [(row.rowid, row.value) for row in self._unreadable()]
        )

    def forget_missed(self, device: Device) -> int:
        """Forgets every workload that "auto" missed on a device; returns how many there were."""
        return self._database.delete(_MISSED, IN_RANGE, lambda: [_key_range(device)])

    def record_miss(self, device: Device, workload: Workload) -> None:
        """Remembers that "auto" found no profile for a workload, and how often that was told.

        It happens while a model is traced, so that a damaged file is left where it is, and that a
        miss which is known already need not be counted where nothing can be written.
        """
        key = _row_key(device.key, workload.key)
        rows = self._database.rows(_MISSED, OF_KEY, key)
        miss = _miss(rows[0]) if rows else _Miss(when=utc_now(), count=0)
        if miss is None:  # nothing that this version should change
            return
        miss = miss.model_copy(update={"count": miss.count + 1})
        try:
            self._database.put(_MISSED, key, miss.model_dump_json(), mend=False)
        except StoreError:
            if not rows:
                raise

    def check_writable(self) -> None:
        """Raises StoreError now, not after hours of measuring, if a profile could not be stored."""
        self._database.check_writable()

    def _forget_missed(self, keys: list[str]) -> None:
        text = json.dumps(keys)
        if self._database.keys(_MISSED, AMONG, text):
            self._database.delete(_MISSED, AMONG, lambda: [(text,)])

    def _values(self, expected: Mapping[tuple[str, str], Profile | None]) -> dict[str, bytes]:
        """The value of each expected row, by key; StoreError where it is another by now."""
        rows = {row.key: row for row in self._database.rows(_PROFILES)} if expected else {}
        values = {}
        for names, profile in expected.items():
            key = _row_key(*names)
            row = rows.get(key.encode())
            if (row and _readable(row)) != profile:
                raise self._changed()
            values[key] = (row and row.value) or b""
        return values

    def _changed(self) -> StoreError:
        return StoreError(
            f"nothing was stored in {self.path}: another process changed the same profiles "
            "meanwhile; read them again and try again"
        )


# --- Rows -----------------------------------------------------------------------------------------

_LARGEST_COUNT = 2**53  # which every reader of JSON has exactly

# No device's name has it.
_BETWEEN = " | "


class _Miss(BaseModel):
    """The value of a row of a missed workload: when that was first, and how often since.

    What a newer version adds is kept.
    """

    model_config = ConfigDict(extra="allow")

    when: str
    count: int = 1

    @field_validator("count", mode="before")
    @classmethod
    def _some_number(cls, value: object) -> object:
        # A count that is none is no reason to lose the miss.
        return value if type(value) is int and 0 <= value <= _LARGEST_COUNT else 1


class _Newer(BaseModel):
    """What there is to know about a profile that a newer version wrote."""

    schema_version: Annotated[StrictInt, Field(gt=SCHEMA_VERSION)]


def _row_key(device_key: str, workload_key: str) -> str:
    return f"{device_key}{_BETWEEN}{workload_key}"


def _key_range(device: Device) -> tuple[str, str]:
    """The keys of a device's rows lie from the first, included, to the second."""
    prefix = _row_key(device.key, "")
    return prefix, prefix + "\U0010ffff"


def _names(row_key: bytes | None) -> tuple[str, str] | None:
    """Device key and workload key of a row; None of one that has neither."""
    device_key, between, workload_key = _text(row_key).partition(_BETWEEN)
    return (device_key, workload_key) if between else None


def _text(row_key: bytes | None) -> str:
    """A row's key, which need be no text, for people."""
    return (row_key or b"").decode(errors="backslashreplace")


def _profile(row: Row) -> Profile:
    """The profile of a row; ValueError, which says why, where it is none or another key's."""
    try:
        profile = Profile.model_validate_json(row.value or b"")
    except ValidationError as error:
        raise ValueError(f"{error.error_count()} problems, first: {_first(error)}") from error
    if _row_key(*profile.key).encode() != row.key:
        raise ValueError(f"under the key {row.key!r} is the profile of {_row_key(*profile.key)}")
    return profile


def _miss(row: Row) -> _Miss | None:
    try:
        return _Miss.model_validate_json(row.value or b"")
    except ValidationError:
        return None


def _readable(row: Row) -> Profile | None:
    try:
        return _profile(row)
    except ValueError:
        return None


def _whole(table: str, row: Row) -> bool:
    """Whether a row is what some version stored."""
    try:
        named = bool((row.key or b"").decode())
    except UnicodeDecodeError:
        return False
    if table == _MISSED:
        return named and _fits(_Miss, row)
    return named and (_readable(row) is not None or _fits(_Newer, row))


def _fits(kind: type[BaseModel], row: Row) -> bool:
    try:
        kind.model_validate_json(row.value or b"")
    except ValidationError:
        return False
    return True


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
