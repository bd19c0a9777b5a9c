"""Where a report's profiles come from: a store, a bundle, a folder of these, or a storage.

A place's URL or its first bytes tell which of these it is.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from autochunk.device import Device
from autochunk.errors import BundleError, StoreWarning
from autochunk.functions import Tunable
from autochunk.store import bundle, remote
from autochunk.store.bundle import Bundle
from autochunk.store.files import name_of
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.text import one_line

_SQLITE = b"SQLite format 3\0"
_JOURNAL = b'{"op_code"'
_DATABASES = {"postgresql", "postgres", "mysql", "mariadb", "sqlite", "oracle", "mssql"}

Kind = Literal["store", "bundle", "folder", "storage"]


class Source(NamedTuple):
    """What a place has.

    Attributes:
      name: what the place is called, in one line.
      kind: what it is.
      profiles: all of them that can be read.
      misses: by device key, what "auto" missed there and how many processes did; of stores only.
      note: the line that a bundle's author left in it.
    """

    name: str
    kind: Kind
    profiles: tuple[Profile, ...]
    misses: dict[str, dict[Tunable, int]]
    note: str = ""


def read(place: str, now: Device) -> Source:
    """Reads a place; ``now`` is this device, whose misses are of interest even if nothing is tuned.

    Raises:
      StoreError, BundleError, StorageError: it cannot be read.
    """
    kind = kind_of(place)
    if kind == "store":
        return read_store(ProfileStore(place), now)
    if kind == "storage":
        return _read_storage(place)
    bundles = _of_folder(Path(place)) if kind == "folder" else [bundle.read(place)]
    found = {profile.key: profile for one in bundles for profile in one.profiles}
    note = "; ".join(one.provenance.note for one in bundles if one.provenance.note)
    return Source(name_of(place), kind, tuple(found.values()), {}, note)


def _of_folder(folder: Path) -> list[Bundle]:
    """The bundles in a folder; as for "auto" a bad one does not take the others along."""
    found = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")]):
        try:
            found.append(bundle.read(file))
        except BundleError as error:
            text = f"{folder} is read without one of its files: {error}"
            warnings.warn(one_line(text), StoreWarning, stacklevel=2)
    return found


def kind_of(place: str) -> Kind:
    """What a place is; where nothing is, a bundle, which reading will complain of."""
    if remote.is_url(place):
        scheme = place.partition("://")[0].partition("+")[0]
        return "storage" if scheme in _DATABASES else "bundle"
    path = Path(place)
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "bundle"
    with path.open("rb") as file:
        start = file.read(len(_SQLITE))
    if start == _SQLITE:
        return "store"
    return "storage" if start.startswith(_JOURNAL) else "bundle"


def read_store(store: ProfileStore, now: Device) -> Source:
    """What a store has.

    Raises:
      StoreError: it cannot be read.
    """
    profiles = tuple(store.profiles())
    devices = {profile.device.key: profile.device for profile in profiles} | {now.key: now}
    misses: dict[str, dict[Tunable, int]] = {}
    for key, device in devices.items():
        both = store.misses(device).items(), store.missed_functions(device).items()
        misses[key] = dict(itertools.chain(*both))
    return Source(name_of(store.path), "store", profiles, {k: v for k, v in misses.items() if v})


def _read_storage(place: str) -> Source:
    from autochunk.tuner.study import Storage  # which loads optuna

    profiles, unfinished = Storage(place, make=False).profiles()
    note = f"{unfinished} workloads are not finished" if unfinished else ""
    return Source(remote.without_password(place), "storage", tuple(profiles), {}, note)


def miss_records(misses: dict[Tunable, int]) -> list[dict[str, Any]]:
    """What was missed as plain data, most wanted first."""
    wanted: Iterable[tuple[Tunable, int]] = sorted(
        misses.items(), key=lambda one: (-one[1], one[0].key)
    )
    return [
        {
            "workload": workload.key,
            "shape": workload.shape,
            "dtype": workload.dtype,
            "mode": workload.mode,
            "processes": count,
            "command": workload.tune_command,
        }
        for workload, count in wanted
    ]
