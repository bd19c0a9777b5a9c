"""Layers: the places that profiles come from, in the order in which they are asked.

First what ``AUTOCHUNK_PROFILES`` names (bundle files, folders of them, URLs), then the user's own
store, the site's folder of bundles (of all users of a machine or of a cluster's shared file
system), and what is shipped with autochunk. Folders are read without locks, and again only when
they have changed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import platformdirs

from autochunk.device import Device
from autochunk.errors import BundleError, StoreError, WorkloadError
from autochunk.store import bundle, remote
from autochunk.store.database import STORE_VARIABLE, ProfileStore, default_path
from autochunk.store.profile import Profile
from autochunk.workload import Workload, key_items

PROFILES_VARIABLE = "AUTOCHUNK_PROFILES"

# between looks at each file of a folder, of which there may be many, on a slow file system
_LOOK_SECONDS = 1.0

_RETRY_SECONDS = 300.0  # before a URL that failed is tried again

STORE, SITE, SHIPPED = "user store", "site", "shipped"


class Layer(Protocol):
    """One place that profiles come from. Whatever cannot be read raises StoreError or BundleError."""

    name: str

    def version(self) -> Any:
        """Changes whenever the layer's content may have."""

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """The profile of exactly this workload on exactly this device."""

    def workloads(self, device: Device) -> list[str]:
        """Keys of all workloads that have a profile on this device."""

    def keys(self) -> list[tuple[str, str]]:
        """(device key, workload key) of every profile."""


class StoreLayer(ProfileStore):
    """The user's own store."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.name = f"{STORE} {path}"


class BundleLayer:
    """A bundle file, a folder of them (``*.json``, ``*.json.gz``), or a URL."""

    def __init__(self, place: str, label: str) -> None:
        self.place = place
        self.label = label
        self.name = f"{label} {place}"
        self._seen: tuple[Any, Any] = (None, None)
        self._look_again = self._retry_at = 0.0
        self._loaded: list[bundle.Index] | BundleError | None = None

    def version(self) -> Any:
        """Times and sizes of the files.

        None where there is none. What is shipped or far away does not change while a process runs.
        """
        if self.label == SHIPPED or remote.is_url(self.place):
            return None
        try:
            status = os.stat(self.place)
            # A file that is put in, taken out or replaced as `autochunk export` does it changes the
            # folder's own time; one that is written over does not.
            if _identity(status) != self._seen[0] or time.monotonic() > self._look_again:
                self._seen = (
                    _identity(status),
                    tuple(_identity(os.stat(file)) for file in self._files()),
                )
                self._look_again = time.monotonic() + _LOOK_SECONDS
            return self._seen
        except OSError:
            return None

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """Of several files with one, the last by name."""
        key = (device.key, workload.key)
        return next((index[key] for index in reversed(self._indexes()) if key in index), None)

    def workloads(self, device: Device) -> list[str]:
        """Those of all files."""
        return sorted(
            {workload for index in self._indexes() for workload in index.workloads(device.key)}
        )

    def keys(self) -> list[tuple[str, str]]:
        """Those of all files."""
        return sorted({key for index in self._indexes() for key in index})

    def _files(self) -> list[str]:
        folder = Path(self.place)
        if self.label in (SITE, SHIPPED) and not folder.exists():
            return []  # nobody named it
        if remote.is_url(self.place) or not folder.is_dir():
            return [self.place]
        return sorted(
            str(file) for pattern in ("*.json", "*.json.gz") for file in folder.glob(pattern)
        )

    def _indexes(self) -> list[bundle.Index]:
        failed = isinstance(self._loaded, BundleError)
        if self._loaded is None or (
            failed and remote.is_url(self.place) and time.monotonic() > self._retry_at
        ):
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            try:
                self._loaded = [bundle.scan(bundle.fetch(file), file) for file in self._files()]
            except BundleError as error:
                self._loaded = error
        if isinstance(self._loaded, BundleError):  # said each time: half a layer must not answer
            raise self._loaded
        return self._loaded


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does; its time and size may be kept by who replaces it."""
    return status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


class MemoryLayer:
    """Profiles of one device that another process has read."""

    def __init__(self, name: str, profiles: Iterable[Profile]) -> None:
        self.name = name
        self._profiles = {profile.key: profile for profile in profiles}

    def version(self) -> Any:
        """They do not change."""
        return None

    def get(self, device: Device, workload: Workload) -> Profile | None:
        """Those given."""
        return self._profiles.get((device.key, workload.key))

    def workloads(self, device: Device) -> list[str]:
        """Those given."""
        return sorted(workload for key, workload in self._profiles if key == device.key)

    def keys(self) -> list[tuple[str, str]]:
        """Those given."""
        return sorted(self._profiles)


def readable_profiles(
    layer: Layer,
    device: Device,
    complain: Callable[[StoreError | BundleError], None] = lambda _: None,
) -> Iterator[Profile]:
    """A layer's profiles of a device, without those that cannot be read.

    ``complain`` is told of each error.
    """
    try:
        keys = layer.workloads(device)
    except (StoreError, BundleError) as error:
        complain(error)
        return
    for key in keys:
        try:
            profile = layer.get(device, Workload.parse(key))
        except WorkloadError:  # written by a newer version
            continue
        except (StoreError, BundleError) as error:
            complain(error)
            continue
        if profile is not None:
            yield profile


def account(layer: Layer, device: Device, workload: Workload) -> str:
    """What a layer has, and in which fields the nearest of that differs from a workload on a
    device. It reads all keys: for people, not for tracing.
    """
    try:
        keys = layer.keys()
    except (StoreError, BundleError) as error:
        return f"cannot be read: {error}"
    if not keys:
        return "empty"
    here = [other for device_key, other in keys if device_key == device.key]
    text = [f"{len(keys)} profiles, {len(here)} of them of this device"]
    if workload.key in here:
        return f"{text[0]}, and of this workload"
    if here:
        text.append(f"the nearest differs in {_least_difference(here, workload.key, key_items)}")
    if elsewhere := [device_key for device_key, other in keys if other == workload.key]:
        text.append(
            "this workload on a device that differs in "
            f"{_least_difference(elsewhere, device.key, _device_items)}"
        )
    return "; ".join(text)


def _least_difference(
    keys: Iterable[str], asked: str, items: Callable[[str], dict[str, str]]
) -> str:
    """The fields, with what was asked, in which the most similar of the keys differs."""
    wanted = items(asked)
    differences = [
        {name: value for name, value in items(key).items() if value != wanted.get(name)}
        for key in keys
    ]
    fewest = min(differences, key=lambda fields: (len(fields), sorted(fields.items())))
    return ", ".join(
        f"{name} ({value}, asked was {wanted.get(name, 'none')})" for name, value in fewest.items()
    )


def _device_items(key: str) -> dict[str, str]:
    platform, _, rest = key.partition(" ")
    kind = re.split(r" (?=cores=|memory=)", rest)
    return {"platform": platform, "kind": kind[0]} | dict(
        item.partition("=")[::2] for item in kind[1:]
    )


# --- Where they are -------------------------------------------------------------------------------


def shipped_profiles() -> Path:
    """The folder of profiles that come with autochunk.

    Inside the wheel, or beside the package in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "shipped_profiles"
    return inside if inside.is_dir() else package.parent / "profiles"


def site_profiles() -> Path:
    """The folder of bundles for all users of a machine, such as ``/usr/local/share/autochunk``.

    ``XDG_DATA_DIRS`` moves it.
    """
    return Path(platformdirs.site_data_path("autochunk"))


def places(store: Path | None) -> tuple[tuple[str, str], ...]:
    """(kind, place) of each layer, first asked first; ``store`` stands in for the user's own."""
    return _places(
        store,
        *map(
            os.environ.get,
            (PROFILES_VARIABLE, STORE_VARIABLE, "XDG_DATA_HOME", "XDG_DATA_DIRS", "HOME"),
        ),
    )


@functools.lru_cache(maxsize=64)
def _places(
    store: Path | None, profiles: str | None, *_environment: str | None
) -> tuple[tuple[str, str], ...]:
    """The same, from all that it depends on."""
    own = []
    # who has no home directory has no store, and says so when one is to be written
    with contextlib.suppress(StoreError):
        own = [(STORE, str(store or default_path()))]
    return (
        *(
            (
                PROFILES_VARIABLE,
                part if remote.is_url(part) else str(Path(os.path.expanduser(part)).absolute()),
            )
            for part in _split(profiles or "")
        ),
        *own,
        (SITE, str(site_profiles())),
        (SHIPPED, str(shipped_profiles())),
    )


def _split(text: str) -> list[str]:
    """The places in a list like PATH.

    In a URL the colons after the scheme, before a port and in a user's name separate nothing.
    """
    parts: list[str] = []
    for piece in text.split(os.pathsep):
        scheme = bool(parts) and piece.startswith("//")
        in_host = (
            bool(parts)
            and "://" in parts[-1]
            and "/" not in parts[-1].partition("://")[2]
            and piece[:1] not in ("/", "~", ".", "")
        )
        if scheme or in_host:
            parts[-1] += os.pathsep + piece
        else:
            parts.append(piece)
    return [part for part in parts if part]


def make_layer(kind: str, place: str) -> Layer:
    """The layer of one of ``places``."""
    return StoreLayer(Path(place)) if kind == STORE else BundleLayer(place, kind)


def all_layers(store: Path | None) -> list[Layer]:
    """Every layer, first asked first, to be read anew."""
    return [make_layer(kind, place) for kind, place in places(store)]
