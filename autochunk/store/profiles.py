"""ProfileStore: the user's own profiles and missed workloads, in one file.

Each is a row of JSON in a ``Database``. Rows may come from a newer version, another program or a
damaged file, so that every one is checked when it is read. Older versions had more in a device's
key: their rows are found by the key that they would have today, and go when a profile is put in
their place.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from platformdirs import user_data_path

from autochunk.device import Device
from autochunk.errors import StoreError, StoreWarning, WorkloadError
from autochunk.functions import FunctionCall, Tunable, is_function
from autochunk.store.database import (
    AMONG,
    BEYOND_NEWEST,
    ENDING,
    IN_RANGE,
    OF_KEY,
    UNCHANGED,
    Database,
)
from autochunk.store.files import file_identity, obstacle
from autochunk.store.profile import Profile, utc_now
from autochunk.store.programs import Programs
from autochunk.store.rescue import Row
from autochunk.store.rows import (
    MISSED,
    PROFILES,
    TABLES,
    Miss,
    Newer,
    best_of,
    fits,
    is_of,
    key_text,
    miss_of,
    names_of,
    profile_of,
    ranges,
    readable,
    row_key,
    whole,
)
from autochunk.workload import Workload, split_key

STORE_VARIABLE = "AUTOCHUNK_STORE"
MOST_MISSES = 1000
"""So many missed workloads are remembered."""

_FILE_NAME = "profiles.sqlite"
_COUNT_TRIES = 20

_Call = TypeVar("_Call", Workload, FunctionCall)

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
            # Some versions of platformdirs leave "~" where the home directory is unknown.
            return user_data_path("autochunk").expanduser() / _FILE_NAME
        path = Path(chosen).expanduser()
    except RuntimeError as error:
        raise StoreError(
            f"profiles have no place to be stored ({error}); set {STORE_VARIABLE} to a file"
        ) from error
    return path / _FILE_NAME if path.is_dir() or chosen.endswith(os.sep) else path


class Changed(StoreError):
    """What is stored is no longer what it was when it was read: another process was there first."""


class ProfileStore:
    """Profiles by device and workload, and the workloads that "auto" missed.

    Every method raises StoreError where the file cannot be read or written; nothing already stored
    is changed then. Whatever stores or forgets profiles, and ``check_writable``, first sees to the
    file: one that is damaged, or no database, is kept as ``<name>.damaged-<UTC time>`` beside
    itself, what is whole in it makes a new store, a StoreWarning says so, and the operation goes
    on. The other methods leave a damaged file where it is.

    Args:
      path: the file; None is the user's own.
      briefly: while a program is traced: a lock of others that does not go away is waited for once
        in the life of a process, and shortly.

    Example:
      >>> import autochunk
      >>> store = autochunk.ProfileStore()
      >>> for profile in store.profiles(autochunk.detect()):
      ...     print(profile.workload, profile.choose().plan)
      >>> store.missed(autochunk.detect())
      []
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, briefly: bool = False
    ) -> None:
        self.path = default_path() if path is None else Path(path)
        self._database = Database(self.path, TABLES, whole, _CURE, briefly=briefly)

    def __repr__(self) -> str:
        return f"ProfileStore({str(self.path)!r})"

    @property
    def name(self) -> str:
        """What it is called among the places that profiles come from."""
        return f"user store {self.path}"

    # --- Reading ----------------------------------------------------------------------------------

    def get(self, device: Device, workload: Tunable) -> Profile | None:
        """The profile of a workload on a device; None if there is none.

        Raises:
          StoreError: also where the row is there and cannot be read.
        """
        rows = self._database.rows(PROFILES, OF_KEY, row_key(device.key, workload.key))
        rows = rows or self._rows(device, workload.key)
        try:
            return next(iter(best_of(rows)), None) or (profile_of(rows[0]) if rows else None)
        except ValueError as error:
            raise StoreError(
                f"a profile in {self.path} cannot be read ({error}); {_CURE}"
            ) from error

    def profiles(self, device: Device | None = None) -> list[Profile]:
        """All profiles, or those of one device, by key.

        Rows that cannot be read are left out; one StoreWarning says how many.
        """
        rows = self._rows(device) if device else self._database.rows(PROFILES)
        unreadable = sum(readable(row) is None for row in rows)
        if unreadable:
            warnings.warn(
                f"{unreadable} of {len(rows)} profiles in {self.path} cannot be read "
                "and were left out; ProfileStore.unreadable() names those that no version can "
                "read, forget_unreadable() deletes them",
                StoreWarning,
                stacklevel=2,
            )
        return best_of(rows)

    def workloads(self, device: Device) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        return self._workload_keys(PROFILES, device)

    def keys(self) -> list[tuple[str, str]]:
        """Device key and workload key of every profile, in order.

        Rows under other keys are left out.
        """
        keys = self._database.keys(PROFILES)
        return sorted({names for key in keys if (names := names_of(key))})

    def missed(self, device: Device) -> list[Workload]:
        """Workloads that "auto" missed on a device, by key."""
        return list(self.misses(device))

    def misses(self, device: Device) -> dict[Workload, int]:
        """How many processes missed each of those workloads, as far as that was counted."""
        return self._misses(device, Workload.parse)

    def missed_functions(self, device: Device) -> dict[FunctionCall, int]:
        """The same of functions that are not attention."""
        return self._misses(device, FunctionCall.parse)

    def are_missed(self, *, functions: bool) -> bool:
        """Whether functions are, or else attention, on any device: a look that needs none."""
        keys = self._database.keys(MISSED)
        every = (names[1] for key in keys if (names := names_of(key)))
        return any(is_function(one) == functions for one in every)

    def _misses(self, device: Device, parse: Callable[[str], _Call]) -> dict[_Call, int]:
        found: dict[_Call, int] = {}
        for row in self._rows(device, table=MISSED):
            _, key = is_of(row.key, device) or ("", "")
            # of the other kind, written by a newer version, or by hand
            with contextlib.suppress(WorkloadError):
                miss, workload = miss_of(row), parse(key)
                found[workload] = found.get(workload, 0) + (miss.count if miss else 1)
        return dict(sorted(found.items(), key=lambda one: one[0].key))

    def missed_like(self, device: Device, workload: Workload) -> int:
        """How many workloads of this one's family "auto" missed on a device.

        None where this one is not among those that are remembered.
        """
        keys = self._workload_keys(MISSED, device)
        if workload.key not in keys:
            return 0
        return sum(split_key(key)[1] == workload.family for key in keys)

    def newer(self) -> set[tuple[str, str]]:
        """(device key, workload key) of the profiles that only a newer autochunk can read."""
        rows = self._database.rows(PROFILES)
        return {names for row in rows if (names := names_of(row.key)) and fits(Newer, row)}

    def unreadable(self) -> list[str]:
        """Keys of the profiles' rows that no version can read.

        Their value is not JSON, not a profile, or belongs to another key. A newer version's rows
        are not among them.
        """
        return [key_text(row.key) for row in self._unreadable()]

    def obstacle(self) -> str:
        """Why the file cannot be made; "" where it is there, or can be."""
        return obstacle(self.path)

    def version(self) -> tuple[int, ...] | None:
        """Changes whenever the file does; None while there is no file."""
        return file_identity(self.path)

    def _unreadable(self) -> list[Row]:
        return [row for row in self._database.rows(PROFILES) if not whole(PROFILES, row)]

    def _rows(self, device: Device, workload_key: str = "", table: str = PROFILES) -> list[Row]:
        """Rows of a device, or of one workload there, under keys of any version."""
        found = [self._database.rows(table, ENDING, *span, workload_key) for span in ranges(device)]
        return [row for rows in found for row in rows if is_of(row.key, device, workload_key)]

    def _workload_keys(self, table: str, device: Device) -> list[str]:
        names = [is_of(key, device) for key in self._keys(table, device)]
        return sorted({workload for _, workload in filter(None, names)})

    def _keys(self, table: str, device: Device) -> list[bytes | None]:
        """Keys of a device's rows, of any version."""
        found = [self._database.keys(table, IN_RANGE, *span) for span in ranges(device)]
        return [key for keys in found for key in keys if is_of(key, device)]

    def _row_keys(self, table: str, names: Collection[tuple[str, str]]) -> list[str]:
        """Keys of all rows of these devices and workloads, of any version."""
        return [key_text(key) for key in self._database.keys(table) if names_of(key) in names]

    # --- Writing ----------------------------------------------------------------------------------

    def put(self, profile: Profile) -> None:
        """Stores a profile in place of an earlier one of the same workload and device.

        If it is complete, the workload is no longer one that was missed.
        """
        self._database.put(PROFILES, row_key(*profile.key), profile.model_dump_json())
        self._clear_up([profile])

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
          Changed: the rows are no longer as ``expected``.
          StoreError: as everywhere.
        """
        by_key = {row_key(*profile.key): profile for profile in profiles}
        rows = {key: profile.model_dump_json() for key, profile in by_key.items()}
        stored = self._database.replace(PROFILES, rows, self._values(expected or {}))
        if rows and not stored:
            raise self._changed()
        self._clear_up(by_key.values())

    def forget(self, profiles: Iterable[Profile]) -> int:
        """Deletes what is stored for these profiles' workloads and devices, all or none.

        Returns how many there were.
        """
        names = {profile.key for profile in profiles}
        return self._delete(PROFILES, self._row_keys(PROFILES, names))

    def forget_unreadable(self) -> int:
        """Deletes the rows that ``unreadable`` names, each only if it is still as it was.

        Returns how many there were.
        """
        # One by one, because bytes that are no text fit no JSON.
        return self._database.delete(
            PROFILES, UNCHANGED, lambda: [(row.rowid, row.value) for row in self._unreadable()]
        )

    def forget_missed(self, device: Device, workloads: Iterable[Tunable] | None = None) -> int:
        """Forgets workloads that "auto" missed on a device; returns how many there were.

        None is all of them.
        """
        if workloads is None:
            count = self._delete(MISSED, list(map(key_text, self._keys(MISSED, device))))
            self.forget_programs()
            return count
        names = {(device.key, workload.key) for workload in workloads}
        return self._delete(MISSED, self._row_keys(MISSED, names))

    def forget_programs(self) -> None:
        """Deletes the programs of functions that are missed on no device, or no longer."""
        missed = []
        for _, key in filter(None, map(names_of, self._database.keys(MISSED))):
            with contextlib.suppress(WorkloadError):  # attention, or written by a newer version
                missed.append(FunctionCall.parse(key))
        Programs(self.path).forget_all_but(missed)

    def record_miss(self, device: Device, workload: Tunable) -> None:
        """Remembers that "auto" found no profile for a workload, and how often that was told.

        It runs while a model is traced. So a damaged file is left where it is, and a miss that is
        known already need not be counted where nothing can be written. Of very many misses the
        oldest are dropped.
        """
        for _ in range(_COUNT_TRIES):  # others may count the same one meanwhile
            rows = self._rows(device, workload.key, MISSED)
            try:
                if self._count_miss(device, workload, rows[0] if rows else None):
                    break
            except StoreError:
                if not rows:
                    raise
                return
        if not rows and self._database.count(MISSED) > MOST_MISSES:
            where = BEYOND_NEWEST.format(MISSED)
            self._database.delete(MISSED, where, lambda: [(MOST_MISSES,)])

    def _count_miss(self, device: Device, workload: Tunable, row: Row | None) -> bool:
        """Whether a miss is counted now, or this version should not."""
        key = key_text(row.key) if row else row_key(device.key, workload.key)
        miss = miss_of(row) if row else Miss(when=utc_now(), count=0)
        if miss is None:
            return True
        text = miss.model_copy(update={"count": miss.count + 1}).model_dump_json()
        was = (row.value or b"") if row else b""
        return bool(self._database.replace(MISSED, {key: text}, {key: was}, mend=False))

    def check_writable(self) -> None:
        """Raises StoreError now, not after hours of measuring, if a profile could not be stored."""
        self._database.check_writable()

    def _clear_up(self, stored: Collection[Profile]) -> None:
        """Deletes what these profiles replace.

        Rows under older versions' keys, and of finished ones, what was missed.
        """
        names = {profile.key for profile in stored}
        today = {row_key(*one) for one in names}
        self._delete(PROFILES, set(self._row_keys(PROFILES, names)) - today)
        finished = {profile.key for profile in stored if profile.complete}
        self._delete(MISSED, self._row_keys(MISSED, finished))

    def _delete(self, table: str, keys: Collection[str]) -> int:
        text = json.dumps(sorted(keys))
        return self._database.delete(table, AMONG, lambda: [(text,)]) if keys else 0

    def _values(self, expected: Mapping[tuple[str, str], Profile | None]) -> dict[str, bytes]:
        """The value of each expected row, by key; StoreError where it is another by now."""
        rows = self._database.rows(PROFILES) if expected else []
        rows = [row for row in rows if names_of(row.key) in expected]
        found = {profile.key: profile for profile in best_of(rows)}
        if any(found.get(names) != profile for names, profile in expected.items()):
            raise self._changed()
        absent = {row_key(*names): b"" for names in expected}
        return absent | {key_text(row.key): row.value or b"" for row in rows}

    def _changed(self) -> Changed:
        return Changed(
            f"nothing was stored in {self.path}: another process changed the same profiles "
            "meanwhile; read them again and try again"
        )
