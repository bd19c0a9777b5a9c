"""The doctor: looks over the whole set-up, and says of each thing that it finds how to cure it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import autochunk
from autochunk import device as devices
from autochunk.device import Device
from autochunk.errors import BundleError, DeviceError, StoreError
from autochunk.store import layers
from autochunk.store.database import ProfileStore
from autochunk.store.layers import Layer
from autochunk.store.profile import Profile
from autochunk.tuner.verify import Verification, verify

Level = Literal["ok", "note", "problem"]

_PACKAGES = ("jax", "jaxlib", "dm-haiku", "optuna", "sqlitedict", "pydantic")
_EXTRAS = {
    "fsspec": 'pip install "autochunk[remote]" to read bundles from URLs',
    "psycopg": 'pip install "autochunk[postgresql]" to tune through PostgreSQL',
}
_ELSEWHERE = "set AUTOCHUNK_STORE to a file in a folder you may write"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      level: "ok", "note" (works, and could be better) or "problem".
      subject: what was looked at.
      detail: what was found.
      cure: what to do about it; empty where there is nothing to do.
    """

    level: Level
    subject: str
    detail: str
    cure: str = ""


def examine(
    store: Path | None = None,
    *,
    verify_count: int = 0,
    verifier: Callable[[Profile], Verification] = verify,
) -> Iterator[Finding]:
    """Everything there is to find, in order.

    Versions, device, layers, store, profiles. Changes nothing.

    Args:
      store: the user's store; None is the default one.
      verify_count: so many of this device's profiles, the oldest first, are timed again here.
      verifier: times one.
    """
    yield from _versions()
    try:
        device = devices.detect()
    except DeviceError as error:
        yield Finding(
            "problem", "device", str(error), "see https://docs.jax.dev/en/latest/installation.html"
        )
        return
    yield from _device(device)
    every = layers.all_layers(store)
    for layer in every:
        yield _layer(layer, device)
    user_store = ProfileStore(store)
    yield from _store(user_store)
    yield from _profiles(user_store, device)
    if verify_count:  # all profiles are read for it
        for profile in _oldest(every, device)[:verify_count]:
            yield _verified(verifier(profile))


# --- Versions and device --------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield Finding(
        "ok",
        "versions",
        f"Python {platform.python_version()}, autochunk {autochunk.__version__}, {found}",
    )
    for name, cure in _EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("ok", "extras", f"{name} is not installed", cure)


def _device(device: Device) -> Iterator[Finding]:
    versions = ", ".join(
        f"{name} {getattr(device, name)}"
        for name in ("driver", "cuda", "cudnn")
        if getattr(device, name)
    )
    yield Finding("ok", "device", f"{device.key}{'; ' + versions if versions else ''}")
    if device.platform != "gpu" and _nvidia_gpu_here():
        yield Finding(
            "problem",
            "GPU",
            f"this machine has an NVIDIA GPU, and jax computes on {device.platform}",
            _gpu_cure(),
        )
    if device.platform == "gpu" and not device.cudnn:
        yield Finding(
            "note",
            "GPU",
            "the version of cuDNN is not known, so that profiles do not go stale with it",
            "install jax[cuda13] with pip",
        )


def _nvidia_gpu_here() -> bool:
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _gpu_cure() -> str:
    platforms, visible = os.environ.get("JAX_PLATFORMS", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return f"JAX_PLATFORMS is {platforms!r}: unset it"
    if visible is not None and not visible.strip():
        return "CUDA_VISIBLE_DEVICES is empty: unset it"
    return 'pip install "jax[cuda13]"'


# --- Layers and store -----------------------------------------------------------------------------


def _layer(layer: Layer, device: Device) -> Finding:
    try:
        keys = layer.keys()
    except (StoreError, BundleError) as error:
        return Finding(
            "problem",
            layer.name,
            str(error),
            "mend it, or take it out: until then it answers nothing",
        )
    damaged: list[StoreError | BundleError] = []
    if not isinstance(layer, ProfileStore):  # whose rows are looked at one by one
        list(layers.readable_profiles(layer, device, damaged.append))
    if damaged:
        more = f", and {len(damaged) - 1} more" if damaged[1:] else ""
        return Finding(
            "problem",
            layer.name,
            f"{damaged[0]}{more}",
            "export it again where it was made: until then those profiles answer nothing",
        )
    here = sum(key == device.key for key, _ in keys)
    return Finding(
        "ok", layer.name, f"{len(keys)} profiles, {here} of this device" if keys else "empty"
    )


def _store(store: ProfileStore) -> Iterator[Finding]:
    try:
        yield from _store_file(store)
    except OSError as error:
        yield Finding("problem", "store", f"{store.path}: {error.strerror or error}", _ELSEWHERE)


def _store_file(store: ProfileStore) -> Iterator[Finding]:
    if store.path.is_dir():
        yield Finding("problem", "store", f"{store.path} is a folder", _ELSEWHERE)
        return
    if not store.path.exists():
        folder = next(parent for parent in store.path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            yield Finding(
                "problem",
                "store",
                f"{store.path} cannot be made: {folder} cannot be written",
                _ELSEWHERE,
            )
        return
    if not os.access(store.path, os.W_OK) or not os.access(store.path.parent, os.W_OK):
        yield Finding(
            "note",
            "store",
            f"{store.path} cannot be written: it answers, and nothing can be tuned",
            _ELSEWHERE,
        )
    if store.path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(
            "problem",
            "store",
            f"others may write {store.path} and so decide what you run",
            f"chmod 600 {store.path}",
        )
    try:
        unreadable = store.unreadable()
    except StoreError:
        return  # said of the layer
    if unreadable:
        yield Finding(
            "problem",
            "store",
            f"{len(unreadable)} rows cannot be read, the first of {unreadable[0]}",
            "autochunk forget --unreadable",
        )


# --- Profiles -------------------------------------------------------------------------------------


def _profiles(store: ProfileStore, device: Device) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unreadable rows are a finding of their own
            mine, missed = store.profiles(device), store.missed(device)
    except StoreError:
        return
    if not mine:
        yield Finding("note", "profiles", "this device was not tuned here", "autochunk tune")
    stale = [profile for profile in mine if profile.device.stale_reasons(device)]
    if stale:
        reasons = "; ".join(stale[0].device.stale_reasons(device))
        yield Finding(
            "note",
            "profiles",
            f"{len(stale)} of {len(mine)} may no longer hold ({reasons})",
            "autochunk show --stale; autochunk tune --stale",
        )
    unfinished = [profile for profile in mine if not profile.complete]
    if unfinished:
        yield Finding(
            "note",
            "profiles",
            f"{len(unfinished)} of {len(mine)} were cut short",
            unfinished[0].parsed_workload().tune_command,
        )
    if missed:
        yield Finding(
            "note",
            "profiles",
            f'"auto" found nothing for {len(missed)} workloads, such as {missed[0].shape}',
            "autochunk tune --missed",
        )


def _oldest(every: Sequence[Layer], device: Device) -> list[Profile]:
    """Profiles of this device that "auto" would use, each workload's from the first layer that has
    one; those of the user's own store before others.
    """
    found: dict[str, tuple[bool, str, Profile]] = {}
    for layer in every:
        for profile in layers.readable_profiles(layer, device):
            if profile.choose() is not None:
                found.setdefault(
                    profile.workload,
                    (not isinstance(layer, ProfileStore), profile.created, profile),
                )
    return [
        found[workload][-1]
        for workload in sorted(found, key=lambda workload: (*found[workload][:-1], workload))
    ]


def _verified(found: Verification) -> Finding:
    workload = found.profile.parsed_workload()
    subject = f"{workload.shape} {workload.dtype} {workload.mode}"
    again = f"{workload.tune_command} --force"
    if found.failure:
        return Finding(
            "problem",
            subject,
            f"{found.plan} cannot be timed here any more: {found.failure}",
            again,
        )
    text = (
        f"{found.plan} takes {found.now:.2f} of the time of {found.baseline}, {found.then:.2f} "
        f"when tuned ({found.change:+.0%} ±{found.spread:.0%})"
    )
    return (
        Finding("problem", subject, text, again) if found.drifted else Finding("ok", subject, text)
    )
