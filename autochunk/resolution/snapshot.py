"""Snapshots: the layers, and what they answered, as of one moment.

One is thrown away when a layer changes. In a program of several processes all have that of process
0, for as long as the program runs.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

from autochunk import device as devices
from autochunk.device import Device
from autochunk.resolution import agree, places
from autochunk.resolution.answer import Request, Resolution
from autochunk.resolution.layers import Layer, MemoryLayer, readable_profiles
from autochunk.resolution.predicted import Curves
from autochunk.resolution.reporting import warn_of_layer
from autochunk.store.profile import Profile

lock = threading.RLock()
"""Held by whoever asks the layers: programs may be traced in several threads."""


class Snapshot:
    """Layers and answers.

    ``device`` is where the answers are for, if that is not for the caller to say.
    """

    def __init__(
        self, places: tuple[tuple[str, str], ...], layers: list[Layer], device: Device | None = None
    ) -> None:
        self.places = places
        self.layers = layers
        self.device = device
        self.versions = [layer.version() for layer in layers]
        self.answers: dict[Request, Resolution] = {}
        self._curves: dict[str, Curves] = {}

    def current(self, places: tuple[tuple[str, str], ...]) -> bool:
        """Whether these are the places, and none has changed."""
        return places == self.places and self.versions == [layer.version() for layer in self.layers]

    def curves(self, device: Device) -> Curves:
        """What predictions for a device are made from."""
        if device.key not in self._curves:
            self._curves[device.key] = Curves(self.layers, device)
        return self._curves[device.key]


_snapshot: Snapshot | None = None
# By kind and place, with the version that was read.
_layers: dict[tuple[str, str], tuple[Layer, Any]] = {}


def own_snapshot(store: Path | None) -> Snapshot:
    """The layers as this process finds them now; ``store`` stands in for the user's own."""
    global _snapshot
    where = places.places(store)
    if _snapshot is None or not _snapshot.current(where):
        _snapshot = Snapshot(where, [_layer(kind, place) for kind, place in where])
    return _snapshot


def _layer(kind: str, place: str) -> Layer:
    """The layer as it was read before, unless it has changed."""
    layer, version = _layers.get((kind, place), (None, None))
    if layer is None or layer.version() != version:
        layer = places.make_layer(kind, place)
        _layers[kind, place] = (layer, layer.version())
    return layer


class _Agreed:
    """What the processes of one program have agreed upon."""

    def __init__(self) -> None:
        self.runtime: Any = None
        # In the order of their first use, the same on every process, where each may have a path of
        # its own.
        self.stores: list[Path | None] = []
        self.snapshots: dict[tuple[Path | None, str], Snapshot] = {}

    def forget(self) -> None:
        """Lets it be agreed upon anew, by all processes."""
        self.stores.clear()
        self.snapshots.clear()

    def snapshot(self, store: Path | None) -> Snapshot:
        runtime, platform = agree.runtime(), devices.detect().platform
        if runtime is not self.runtime:
            self.forget()
            self.runtime = runtime
        if store not in self.stores:
            self.stores.append(store)
        key = (store, platform)
        if key not in self.snapshots:
            topic = f"{platform} profiles {self.stores.index(store)}"
            content = agree.agreed(topic, lambda: _to_publish(own_snapshot(store)))
            self.snapshots[key] = _as_published(content)
        return self.snapshots[key]


_agreed = _Agreed()


def agreed_snapshot(store: Path | None) -> Snapshot:
    """Process 0's layers as they were at its first "auto", on every process."""
    return _agreed.snapshot(store)


def _to_publish(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot's device and layers as JSON data, without what cannot be read, which is told."""
    device = devices.detect()
    published = []
    for layer in snapshot.layers:
        found = readable_profiles(layer, device, functools.partial(warn_of_layer, layer))
        profiles = [profile.model_dump(mode="json") for profile in found]
        published.append((f"process 0's {layer.name}", profiles))
    return {"device": device.model_dump(mode="json"), "layers": published}


def _as_published(content: dict[str, Any]) -> Snapshot:
    shared: list[Layer] = [
        MemoryLayer(name, [Profile.model_validate(profile) for profile in profiles])
        for name, profiles in content["layers"]
    ]
    return Snapshot((), shared, Device.model_validate(content["device"]))


def forget() -> None:
    """Lets the layers be read, and agreed upon, anew."""
    global _snapshot
    _agreed.forget()
    _layers.clear()
    _snapshot = None
