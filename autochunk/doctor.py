"""The doctor: looks over the whole set-up, and says of each thing that it finds how to cure it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shlex
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import autochunk
from autochunk import device as devices
from autochunk.device import Device
from autochunk.errors import BundleError, DeviceError, ProbeError, StoreError
from autochunk.resolution import layers, places
from autochunk.resolution.layers import BundleLayer, Layer
from autochunk.store.interval import Interval
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.page_faults import HEAP_KEPT
from autochunk.tuner.process import WorkerFailure
from autochunk.tuner.tune import stale_functions
from autochunk.tuner.verify import Verification, verify
from autochunk.workload import Workload

Level = Literal["ok", "note", "problem"]

_PACKAGES = ("jax", "jaxlib", "dm-haiku", "optuna", "sqlitedict", "pydantic")
_EXTRAS = {
    "fsspec": 'pip install "autochunk[remote]" to read bundles from URLs',
    "psycopg": 'pip install "autochunk[postgresql]" to tune through PostgreSQL',
    "matplotlib": 'pip install "autochunk[report]" to draw what was measured',
}
_JAX_INSTALLATION = "https://docs.jax.dev/en/latest/installation.html"
_COSTLY = 0.10  # what page faults may cost before a cure is worth its trouble
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
    page_faults: Callable[[], Interval] | None = None,
) -> Iterator[Finding]:
    """Everything there is to find: versions, device, layers, store, profiles. Changes nothing.

    Args:
      store: the user's store; None is the default one.
      verify_count: so many of this device's profiles, the oldest first, are timed again here.
      verifier: times one.
      page_faults: measures what page faults cost on a CPU; None leaves it.
    """
    yield from _versions()
    try:
        device = devices.detect()
    except DeviceError as error:
        yield Finding("problem", "device", str(error), f"see {_JAX_INSTALLATION}")
        return
    yield from _device(device)
    every = places.all_layers(store)
    for layer in every:
        yield _layer(layer, device)
        if isinstance(layer, BundleLayer):
            yield from _open_to_all(layer.name, map(_writable_by_all, layer.paths()))
    user_store = ProfileStore(store)
    yield from _store(user_store)
    yield from _profiles(user_store, device)
    if verify_count:  # all profiles are read for it
        for profile in _oldest(every, device)[:verify_count]:
            yield _verified(verifier(profile))
    if page_faults is not None and device.allocator.startswith("glibc"):
        yield _page_faults(page_faults)


# --- Versions and device --------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    versions = {"Python": platform.python_version(), "autochunk": autochunk.__version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    yield Finding("ok", "versions", ", ".join(" ".join(item) for item in versions.items()))
    for name, cure in _EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("ok", "extras", f"{name} is not installed", cure)


def _device(device: Device) -> Iterator[Finding]:
    found = {name: getattr(device, name) for name in ("driver", "cuda", "cudnn")}
    versions = [f"{name} {version}" for name, version in found.items() if version]
    memory = f"{device.memory_gib} GiB of memory"
    yield Finding("ok", "device", f"{device.key}; {', '.join([memory, *versions])}")
    if device.platform != "gpu" and _nvidia_gpu_here():
        detail = f"this machine has an NVIDIA GPU, and jax computes on {device.platform}"
        yield Finding("problem", "GPU", detail, _gpu_cure())
    if device.platform == "gpu" and not device.cudnn:
        detail = "the version of cuDNN is not known, so that profiles do not go stale with it"
        yield Finding("note", "GPU", detail, "install jax[cuda13] with pip")


def _page_faults(measure: Callable[[], Interval]) -> Finding:
    try:
        found = measure()
    except (ProbeError, WorkerFailure) as error:
        return Finding("note", "page faults", f"what they cost cannot be measured: {error}")
    detail = (
        f"a short attention call, not sliced, takes more time ({found}) than in a process that "
        "keeps its freed memory"
    )
    if found.low <= _COSTLY:
        return Finding("ok", "page faults", detail)
    settings = " ".join(f"{name}={value}" for name, value in HEAP_KEPT.items())
    cure = f"start programs, `autochunk tune` too, with {settings} (takes 1 GB more memory)"
    return Finding("note", "page faults", detail, cure)


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
        cure = "mend it, or take it out: until then it answers nothing"
        return Finding("problem", layer.name, str(error), cure)
    if damaged := _damaged_profiles(layer, device):
        more = f", and {len(damaged) - 1} more" if damaged[1:] else ""
        cure = "export it again where it was made: until then those profiles answer nothing"
        return Finding("problem", layer.name, f"{damaged[0]}{more}", cure)
    here = sum(key == device.key for key, _ in keys)
    counts = f"{len(keys)} profiles, {here} of this device" if keys else "empty"
    return Finding("ok", layer.name, counts)


def _open_to_all(subject: str, places: Iterable[Iterable[Path]]) -> Iterator[Finding]:
    """Where everybody may write files, or put others in their place."""
    found = dict.fromkeys(itertools.chain.from_iterable(places))
    for place in itertools.islice(found, 3):  # a folder's files are mostly all alike
        detail = f"everybody may write {place}, and so decide what you run"
        yield Finding("problem", subject, detail, f"chmod o-w {shlex.quote(str(place))}")


def _writable_by_all(path: Path) -> Iterator[Path]:
    """Of a file or folder, and all that it is in; of one that is not there, of where it would be.

    In a folder that is sticky, such as /tmp, nobody replaces what is another's.
    """
    if os.name != "posix":
        return
    with contextlib.suppress(OSError, RuntimeError):
        path = path.resolve()
        around = [one for one in (path, *path.parents) if one.exists()]
        for place in around:
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and (place == around[0] or not mode & stat.S_ISVTX):
                yield place


def _damaged_profiles(layer: Layer, device: Device) -> list[StoreError | BundleError]:
    damaged: list[StoreError | BundleError] = []
    if not isinstance(layer, ProfileStore):  # whose rows are looked at one by one
        list(layers.readable_profiles(layer, device, damaged.append))
    return damaged


def _store(store: ProfileStore) -> Iterator[Finding]:
    try:
        yield from _store_file(store)
    except OSError as error:
        yield Finding("problem", "store", f"{store.path}: {error.strerror or error}", _ELSEWHERE)


def _store_file(store: ProfileStore) -> Iterator[Finding]:
    if store.path.is_dir():
        yield Finding("problem", "store", f"{store.path} is a folder", _ELSEWHERE)
    elif store.path.exists():
        yield from _permissions(store.path)
        yield from _unreadable_rows(store)
    elif obstacle := store.obstacle():
        detail = f"{store.path} cannot be made: {obstacle}"
        yield Finding("problem", "store", detail, _ELSEWHERE)


def _permissions(path: Path) -> Iterator[Finding]:
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        detail = f"{path} cannot be written: it answers, and nothing can be tuned"
        yield Finding("note", "store", detail, _ELSEWHERE)
    status = path.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        detail = f"others may write {path} and so decide what you run"
        yield Finding("problem", "store", detail, f"chmod 600 {path}")
    if os.name == "posix" and status.st_uid not in (0, os.geteuid()):
        detail = f"{path} is another user's ({status.st_uid}), who so decides what you run"
        yield Finding("problem", "store", detail, _ELSEWHERE)
    around = [place for place in _writable_by_all(path) if place != path.resolve()]
    yield from _open_to_all("store", [around])


def _unreadable_rows(store: ProfileStore) -> Iterator[Finding]:
    try:
        rows = store.unreadable()
    except StoreError:
        return  # said of the layer
    if rows:
        detail = f"{len(rows)} rows cannot be read, the first of {rows[0]}"
        yield Finding("problem", "store", detail, "autochunk forget --unreadable")


# --- Profiles -------------------------------------------------------------------------------------


def _profiles(store: ProfileStore, device: Device) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unreadable rows are a finding of their own
            mine = [one for one in store.profiles(device) if not one.function]
            missed, functions = store.misses(device), store.missed_functions(device)
            old = stale_functions(store, device)
    except StoreError:
        return  # said of the layer
    if not mine:
        yield Finding("note", "profiles", "this device was not tuned here", "autochunk tune")
    if stale := [profile for profile in mine if profile.stale_reasons(device)]:
        reasons = "; ".join(stale[0].stale_reasons(device))
        detail = f"{len(stale)} of {len(mine)} may no longer hold ({reasons})"
        yield Finding("note", "profiles", detail, "autochunk show --stale; autochunk tune --stale")
    if unfinished := [profile for profile in mine if not profile.complete]:
        detail = f"{len(unfinished)} of {len(mine)} were cut short"
        yield Finding("note", "profiles", detail, unfinished[0].parsed_workload().tune_command)
    if old:
        names = ", ".join(sorted({one.subject.shape for one in old}))
        detail = f"{len(old)} profiles of functions may no longer hold, or were cut short: {names}"
        cure = "run the programs that call them, then autochunk tune --missed"
        yield Finding("note", "profiles", detail[:1000], cure)
    if missed:
        yield Finding("note", "profiles", _misses(missed), "autochunk tune --missed")
    if functions:
        names = ", ".join(sorted({call.name for call in functions}))
        detail = (
            f'"auto" has no profile that holds for {len(functions)} calls of functions: {names}'
        )
        yield Finding("note", "profiles", detail[:1000], "autochunk tune --missed")


def _misses(missed: Mapping[Workload, int]) -> str:
    families = len({workload.family for workload in missed})
    kinds = "one family" if families == 1 else f"{families} families"
    most = max(missed, key=lambda workload: missed[workload])
    return (
        f'"auto" found nothing for {len(missed)} workloads of {kinds}, which differ only in sizes; '
        f"{most.shape} was asked for most, by {missed[most]} processes"
    )


def _oldest(every: Sequence[Layer], device: Device) -> list[Profile]:
    """Profiles of this device that "auto" would use; the user's own first, of them the oldest."""
    found: dict[str, tuple[bool, str, str, Profile]] = {}
    for layer in every:
        not_own = not isinstance(layer, ProfileStore)
        for profile in layers.readable_profiles(layer, device):
            if profile.function or profile.workload in found:
                continue  # what measures a function is beside the tuner of attention
            if profile.choose() is not None:
                found[profile.workload] = (not_own, profile.created, profile.workload, profile)
    # No two have the same workload, so that profiles themselves are not compared.
    return [profile for *_, profile in sorted(found.values())]


def _verified(found: Verification) -> Finding:
    workload = found.profile.parsed_workload()
    subject = f"{workload.shape} {workload.dtype} {workload.mode}"
    again = f"{workload.tune_command} --force"
    if found.failure:
        detail = f"{found.plan} cannot be timed here any more: {found.failure}"
        return Finding("problem", subject, detail, again)
    detail = (
        f"{found.plan} takes {1 + found.now.middle:.2f} of the time of {found.baseline}, "
        f"{1 + found.then.middle:.2f} when tuned ({found.change})"
    )
    if found.drifted:
        return Finding("problem", subject, detail, again)
    if not found.tellable:
        few = "too few rounds were stored of it to tell a change by"
        return Finding("ok", subject, f"{detail}; {few}", f"{again} --effort thorough")
    if not found.clear:
        unclear = "times scatter too much to tell; run it again when the machine has less to do"
        return Finding("note", subject, detail, unclear)
    return Finding("ok", subject, detail)
