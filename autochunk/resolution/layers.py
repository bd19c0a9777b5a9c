"""Layers: what profiles are read from, each kind asked in one way.

The user's own store is one as it is. Folders of bundles are read without locks, and again only when
they have changed. Which layers there are, and in which order, is told by ``places.py``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from autochunk import device as devices
from autochunk.device import Device, device_of
from autochunk.errors import BundleError, StoreError, WorkloadError
from autochunk.functions import Tunable, is_function, parsed
from autochunk.store import bundle, files, remote
from autochunk.store.profile import Profile
from autochunk.workload import key_items

# Between looks at each file of a folder, of which there may be many, on a slow file system.
_LOOK_SECONDS = 1.0

_RETRY_SECONDS = 300.0  # before a URL that failed is tried again

SITE, SHIPPED = "site", "shipped"
"""Labels of folders that nobody named: there may be none."""


class Layer(Protocol):
    """What profiles are read from; whatever cannot be read raises StoreError or BundleError."""

    @property
    def name(self) -> str:
        """What it is called in answers and warnings."""

    def version(self) -> Any:
        """Changes whenever the layer's content may have."""

    def get(self, device: Device, workload: Tunable) -> Profile | None:
        """The profile of exactly this workload on exactly this device."""

    def workloads(self, device: Device) -> list[str]:
        """Keys of all workloads that have a profile on this device."""

    def keys(self) -> list[tuple[str, str]]:
        """(device key, workload key) of every profile."""


class BundleLayer:
    """A bundle file, a folder of them (``*.json``, ``*.json.gz``), or a URL.

    A file in a folder that cannot be read does not take the others along.

    Attributes:
      left_out: why files and profiles of a folder are not used, as far as that was seen.
    """

    def __init__(self, place: str, label: str) -> None:
        self.place = place
        self.label = label
        self.name = f"{label} {files.name_of(place)}"
        self._seen: tuple[Any, Any] = (None, None)
        self._look_again = self._retry_at = 0.0
        self._loaded: list[bundle.Index] | BundleError | None = None
        self.left_out: list[BundleError] = []

    def version(self) -> Any:
        """Times and sizes of the files.

        None where there is none. What is shipped or far away does not change while a process runs.
        """
        if self.label == SHIPPED or remote.is_url(self.place):
            return None
        # A file that is put in, taken out or replaced as `autochunk export` does it changes the
        # folder's own identity; one that is written over does not.
        own = files.file_identity(self.place)
        if own is not None and (own != self._seen[0] or time.monotonic() > self._look_again):
            with contextlib.suppress(BundleError):  # said when it is read
                self._seen = (own, tuple(map(files.file_identity, self._files())))
            self._look_again = time.monotonic() + _LOOK_SECONDS
        return self._seen if own is not None else None

    def get(self, device: Device, workload: Tunable) -> Profile | None:
        """Of several files with one that can be read, the last by name."""
        key, wrong = (device.key, workload.key), None
        for index in reversed(self._indexes()):
            try:
                if key in index:
                    return index[key]
            except BundleError as error:
                wrong = error
                self._leave_out(error)
        if wrong is not None:
            raise wrong
        return None

    def workloads(self, device: Device) -> list[str]:
        """Those of all files."""
        return sorted(
            {workload for index in self._indexes() for workload in index.workloads(device.key)}
        )

    def keys(self) -> list[tuple[str, str]]:
        """Those of all files."""
        return sorted({key for index in self._indexes() for key in index})

    def paths(self) -> list[Path]:
        """The file, or the folder and what is read of it; nothing at a URL."""
        if remote.is_url(self.place):
            return []
        with contextlib.suppress(BundleError):
            return list(dict.fromkeys(map(Path, (self.place, *self._files()))))
        return [Path(self.place)]

    def _files(self) -> list[str]:
        folder = Path(self.place)
        if self.label in (SITE, SHIPPED) and not folder.exists():
            return []  # nobody named it
        if remote.is_url(self.place) or not folder.is_dir():
            return [self.place]
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise BundleError(f"{self.place}: {error.strerror}") from error
        return sorted(str(folder / name) for name in names if name.endswith((".json", ".json.gz")))

    def _indexes(self) -> list[bundle.Index]:
        failed = isinstance(self._loaded, BundleError) and remote.is_url(self.place)
        if self._loaded is None or (failed and time.monotonic() > self._retry_at):
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            try:
                self._loaded = list(self._scanned())
            except BundleError as error:
                self._loaded = error
        if isinstance(self._loaded, BundleError):  # said each time
            raise self._loaded
        return self._loaded

    def _scanned(self) -> Iterator[bundle.Index]:
        for file in self._files():
            try:
                in_folder = file != self.place
                if in_folder and os.path.exists(file) and not os.path.isfile(file):
                    raise BundleError(f"{file}: this is no file")  # opening a pipe may never return
                yield bundle.scan(files.fetch(file), files.name_of(file))
            except BundleError as error:
                if not in_folder:
                    raise
                if os.path.lexists(file):  # it was not taken out meanwhile
                    self._leave_out(error)

    def _leave_out(self, error: BundleError) -> None:
        if str(error) not in map(str, self.left_out):
            self.left_out.append(error)


class MemoryLayer:
    """Profiles of one device that another process has read."""

    def __init__(self, name: str, profiles: Iterable[Profile]) -> None:
        self.name = name
        self._profiles = {profile.key: profile for profile in profiles}

    def version(self) -> Any:
        """They do not change."""
        return None

    def get(self, device: Device, workload: Tunable) -> Profile | None:
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
    for wrong in left_out(layer):
        complain(wrong)
    for key in keys:
        try:
            profile = layer.get(device, parsed(key))
        except WorkloadError:  # written by a newer version
            continue
        except (StoreError, BundleError) as error:
            complain(error)
            continue
        if profile is not None:
            yield profile


def left_out(layer: Layer) -> list[BundleError]:
    """Why a layer that was read goes without some of its files."""
    return list(layer.left_out) if isinstance(layer, BundleLayer) else []


def every_profile(layers: Sequence[Layer]) -> list[Profile]:
    """All profiles of all devices that can be read; of one device and workload the first layer's.

    It reads everything: for people, not for tracing.
    """
    found: dict[tuple[str, str], Profile] = {}
    for layer in layers:
        with contextlib.suppress(StoreError, BundleError):
            for key in set(layer.keys()) - found.keys():
                if profile := find(layer, *key):
                    found[key] = profile
    return [found[key] for key in sorted(found)]


def find(layer: Layer, device_key: str, workload_key: str) -> Profile | None:
    """A layer's profile by the keys that it names; None if it cannot be read."""
    device = device_of(device_key)
    # written by a newer version, or damaged
    with contextlib.suppress(WorkloadError, StoreError, BundleError):
        return layer.get(device, parsed(workload_key)) if device else None
    return None


def account(layer: Layer, device: Device, workload: Tunable) -> str:
    """What a layer has, and which fields of the nearest differ from a workload on a device.

    It reads all keys: for people, not for tracing.
    """
    try:
        keys = layer.keys()
    except (StoreError, BundleError) as error:
        return f"cannot be read: {error}"
    without = [f"without {error}" for error in left_out(layer)]
    if not keys:
        return "; ".join(["empty", *without])
    keys = [one for one in keys if is_function(one[1]) == is_function(workload.key)]
    here = [other for device_key, other in keys if device_key == device.key]
    text = [f"{len(keys)} profiles, {len(here)} of them of this device"]
    if workload.key in here:
        return "; ".join([f"{text[0]}, and of this workload", *without])
    if here:
        text.append(f"the nearest differs in {_least_difference(here, workload.key, key_items)}")
    if elsewhere := [device_key for device_key, other in keys if other == workload.key]:
        difference = _least_difference(elsewhere, device.key, devices.key_items)
        text.append(f"this workload on a device that differs in {difference}")
    return "; ".join([*text, *without])


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
