"""How "auto" is answered.

Layers of profiles (``layers.py``), asked in turn, give a Resolution that also says why.

First ``use(...)`` around the call; then the layers in their order, in each the exact workload on
the exact device; then the nearest tuned workload of this device; then the documented default. It
happens while JAX traces: nothing is left of it in the compiled program, which keeps its plan until
it is traced again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import heapq
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from autochunk import device as devices
from autochunk.device import Device
from autochunk.errors import (
    ArgumentError,
    BudgetWarning,
    BundleError,
    MissWarning,
    StaleWarning,
    StoreError,
    StoreWarning,
    WorkloadError,
)
from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import (
    BYTES_PER_MB,
    DEFAULT_MAX_CHUNK_SIZE_MB,
    Plan,
    Plans,
    check_implementation,
    check_max_chunk_size_mb,
    check_positive,
)
from autochunk.store import agree, layers
from autochunk.store.database import ProfileStore
from autochunk.store.layers import Layer, MemoryLayer
from autochunk.store.profile import Profile
from autochunk.workload import Mode, Workload, split_key

Match = Literal["exact", "nearest", "default", "pinned"]

# of which no line tells a user where to look
_FRAMEWORKS = frozenset({"autochunk", "jax", "haiku", "flax", "contextlib", "functools"})
_MOST_NEIGHBOURS = 10  # that are looked at for a plan that fits
# A tuned workload is near if no size is further than this factor away.
_FARTHEST = 4.0
# Without measurements, one slice of logits takes at most this share of a memory budget: weights and
# their cotangents live beside it.
_SHARE_OF_BUDGET = 0.25


@dataclass(frozen=True)
class Resolution:
    """The answer to "auto", and why.

    Attributes:
      workload: what was asked for.
      device: where.
      plan: the answer.
      match: "exact", "nearest" (another shape's profile), "default" (nothing known) or "pinned" (by
        ``use``).
      layer: where the answer came from.
      reason: why this plan, in words.
      source: key of the workload whose profile answered; "" for none.
      stale: why the profile may no longer hold; empty if it does.
      asked: each layer that was asked and what it had.
      rejected: the profile's other plans and what spoke against each.
      profile: the profile that answered.
    """

    workload: Workload
    device: Device
    plan: Plan
    match: Match
    layer: str
    reason: str
    source: str = ""
    stale: tuple[str, ...] = ()
    asked: tuple[tuple[str, str], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    profile: Profile | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Settings:
    """What ``use`` sets.

    None leaves a setting alone. ``plan`` answers every "auto", ``implementation`` narrows the
    choice.
    """

    plan: Plan | None = None
    implementation: str | None = None
    memory_budget_mb: float | None = None
    store: Path | None = None


_settings: contextvars.ContextVar[Settings] = contextvars.ContextVar(
    "autochunk_settings", default=Settings()
)
_UNSET: Any = object()


@contextlib.contextmanager
def use(
    *,
    max_chunk_size_mb: float | None = _UNSET,
    implementation: str | None = None,
    memory_budget_mb: float | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Settings for every "auto" that is resolved inside, that is, while functions are traced.

    A function compiled before keeps its plan.

    Args:
      max_chunk_size_mb: answers "auto" with this limit (MB, or None to never slice), whatever the
        profiles say.
      implementation: leaves "auto" only this one to choose; with ``max_chunk_size_mb``, what runs
        (``"xla"`` if left out).
      memory_budget_mb: "auto" chooses among plans whose measured working memory fits (10^6 bytes).
        Where none does, what takes least runs, and a BudgetWarning says how much that is.
      store: a profile store's file, in place of the user's own.

    Raises:
      ArgumentError: a value is not usable.
    """
    changes: dict[str, Any] = {
        "implementation": check_implementation(implementation),
        "memory_budget_mb": check_positive("memory_budget_mb", memory_budget_mb, "MB"),
        "store": None if store is None else Path(store),
    }
    if max_chunk_size_mb is not _UNSET:
        limit = check_max_chunk_size_mb(max_chunk_size_mb)
        if limit == "auto":
            raise ArgumentError(
                'use(max_chunk_size_mb=...) answers "auto", so it must be a number or None; got '
                '"auto"'
            )
        outer = _settings.get().implementation
        changes["plan"] = Plan(implementation or (outer if is_sliced(outer) else "xla"), limit)
    given = {name: value for name, value in changes.items() if value is not None}
    token = _settings.set(replace(_settings.get(), **given))
    try:
        yield
    finally:
        _settings.reset(token)


# --- Resolution -----------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What is asked of the layers."""

    workload: Workload
    implementation: str | None
    memory_budget_mb: float | None
    device: Device


class _Snapshot:
    """Layers and answers as of one moment; thrown away when a layer changes.

    ``device`` is where the answers are for, if that is not for the caller to say.
    """

    def __init__(
        self, places: tuple[tuple[str, str], ...], layers: list[Layer], device: Device | None = None
    ) -> None:
        self.places = places
        self.layers = layers
        self.device = device
        self.versions = [layer.version() for layer in layers]
        self.answers: dict[_Request, Resolution] = {}

    def current(self, places: tuple[tuple[str, str], ...]) -> bool:
        return places == self.places and all(
            layer.version() == version
            for layer, version in zip(self.layers, self.versions, strict=True)
        )


_lock = threading.RLock()
_snapshot: _Snapshot | None = None
# by kind and place, with the version that was read
_layers: dict[tuple[str, str], tuple[Layer, Any]] = {}
_reported: set[Any] = set()


def resolve(
    workload: Workload, implementation: str | None = None, *, device: Device | None = None
) -> Resolution:
    """What "auto" means for a workload, on jax's default device unless another is given.

    Same profiles, same answer.

    In a program of several JAX processes the profiles are those of process 0, and so is the device,
    unless one is given.

    Raises:
      ArgumentError: no such implementation.
      AgreementError: several processes run this program and do not come to one set of profiles.
    """
    settings = _settings.get()
    implementation = check_implementation(implementation) or settings.implementation
    if pinned := _pinned(settings, implementation):
        return Resolution(
            workload,
            device or devices.detect(),
            pinned,
            "pinned",
            "autochunk.use",
            "set by autochunk.use(...)",
        )
    with _lock:
        snapshot = (
            _agreed.snapshot(settings)
            if device is None and agree.several_processes()
            else _own_snapshot(settings)
        )
        device = device or snapshot.device or devices.detect()
        request = _Request(workload, implementation, settings.memory_budget_mb, device)
        if request not in snapshot.answers:
            snapshot.answers[request] = _resolve(request, snapshot.layers)
        return snapshot.answers[request]


def _pinned(settings: Settings, implementation: str | None) -> Plan | None:
    """The plan that ``use`` sets.

    Its limit also for a call that asks for slices of another implementation.
    """
    if settings.plan is None or implementation in (None, settings.plan.implementation):
        return settings.plan
    return (
        Plan(implementation, settings.plan.max_chunk_size_mb) if is_sliced(implementation) else None
    )


def _own_snapshot(settings: Settings) -> _Snapshot:
    global _snapshot
    places = layers.places(settings.store)
    if _snapshot is None or not _snapshot.current(places):
        _snapshot = _Snapshot(places, [_layer(kind, place) for kind, place in places])
    return _snapshot


def _layer(kind: str, place: str) -> Layer:
    """The layer as it was read before, unless it has changed."""
    layer, version = _layers.get((kind, place), (None, None))
    if layer is None or layer.version() != version:
        layer = layers.make_layer(kind, place)
        _layers[kind, place] = (layer, layer.version())
    return layer


class _Agreed:
    """What the processes of one program have agreed upon."""

    def __init__(self) -> None:
        self.runtime: Any = None
        # in the order of their first use, the same on every process, where each may have a path of
        # its own
        self.stores: list[Path | None] = []
        self.snapshots: dict[tuple[Path | None, str], _Snapshot] = {}

    def forget(self) -> None:
        """Lets it be agreed upon anew, by all processes."""
        self.stores.clear()
        self.snapshots.clear()

    def snapshot(self, settings: Settings) -> _Snapshot:
        """Process 0's layers as they were at its first "auto", on every process and for as long as
        the program runs.
        """
        runtime, platform = agree.runtime(), devices.detect().platform
        if runtime is not self.runtime:
            self.forget()
            self.runtime = runtime
        if settings.store not in self.stores:
            self.stores.append(settings.store)
        key = (settings.store, platform)
        if key not in self.snapshots:
            content = agree.agreed(
                f"{platform} profiles {self.stores.index(settings.store)}",
                lambda: _to_publish(_own_snapshot(settings)),
            )
            shared = [
                MemoryLayer(name, [Profile.model_validate(profile) for profile in profiles])
                for name, profiles in content["layers"]
            ]
            self.snapshots[key] = _Snapshot(
                (), list(shared), Device.model_validate(content["device"])
            )
        return self.snapshots[key]


_agreed = _Agreed()


def _to_publish(snapshot: _Snapshot) -> dict[str, Any]:
    """A snapshot's device and layers as JSON data; what cannot be read is left out, with a warning."""
    device = devices.detect()
    published = []
    for layer in snapshot.layers:
        profiles = layers.readable_profiles(layer, device, functools.partial(_warn_of_layer, layer))
        published.append(
            (f"process 0's {layer.name}", [profile.model_dump(mode="json") for profile in profiles])
        )
    return {"device": device.model_dump(mode="json"), "layers": published}


def _resolve(request: _Request, asked_layers: list[Layer]) -> Resolution:
    asked: list[tuple[str, str]] = []
    too_large: Resolution | None = None
    for layer in asked_layers:
        profile = _ask(layer, request, asked)
        answer = profile and _from_profile(profile, request, layer, asked)
        if answer:
            return replace(answer, asked=tuple(asked))
        if profile and request.memory_budget_mb is not None:
            too_large = too_large or _over_budget(profile, request, request.memory_budget_mb)
    if answer := _nearest(asked_layers, request, asked) or too_large:
        return replace(answer, asked=tuple(asked))
    reason = f"no profile; tune with: {request.workload.tune_command}"
    return Resolution(
        request.workload,
        request.device,
        _default(request),
        "default",
        "default",
        reason,
        asked=tuple(asked),
    )


def _over_budget(profile: Profile, request: _Request, budget: float) -> Resolution | None:
    """The answer where none of the plans that were measured fits a budget.

    The one that takes least, or smaller slices; None if none was measured.
    """
    least = profile.least_memory(request.implementation)
    if least is None:
        return None
    plan = _default(request)
    if (
        least.max_chunk_size_mb is not None
        and plan.max_chunk_size_mb is not None
        and least.max_chunk_size_mb <= plan.max_chunk_size_mb
    ):
        plan = least.plan
    memory = (least.temp_bytes or 0) / BYTES_PER_MB
    reason = (
        f"no measured plan fits the memory budget of {budget:g} MB; the one that takes least, "
        f"{least.plan}, takes {memory:.3g} MB"
    )
    return Resolution(
        request.workload,
        request.device,
        plan,
        "default",
        "default",
        reason,
        source=profile.workload,
        profile=profile,
    )


def _ask(layer: Layer, request: _Request, asked: list[tuple[str, str]]) -> Profile | None:
    try:
        profile = layer.get(request.device, request.workload)
    except (StoreError, BundleError) as error:
        asked.append((layer.name, f"left out: {error}"))
        _warn_of_layer(layer, error)
        return None
    asked.append(
        (layer.name, "exact match" if profile else "nothing for this workload on this device")
    )
    return profile


def _warn_of_layer(layer: Layer, error: Exception) -> None:
    _warn_once(StoreWarning, str(error), f'"auto" goes on without {layer.name}: {error}')


def _from_profile(
    profile: Profile, request: _Request, layer: Layer, asked: list[tuple[str, str]]
) -> Resolution | None:
    choice = profile.choose(
        memory_budget_mb=request.memory_budget_mb, implementation=request.implementation
    )
    if choice is None:
        asked.append((layer.name, "its profile has no plan that fits"))
        return None
    return Resolution(
        workload=request.workload,
        device=request.device,
        plan=choice.plan,
        match="exact" if profile.workload == request.workload.key else "nearest",
        layer=layer.name,
        reason=choice.reason if profile.complete else f"{choice.reason}; its tuning was cut short",
        source=profile.workload,
        stale=tuple(profile.device.stale_reasons(request.device)),
        rejected=choice.rejected,
        profile=profile,
    )


def _nearest(
    asked_layers: list[Layer], request: _Request, asked: list[tuple[str, str]]
) -> Resolution | None:
    """The answer for the tuned workload, of whichever layer, whose sizes differ least.

    For the next nearest where that has no plan that fits.
    """
    for layer, near in _nearest_workloads(request.workload, asked_layers, request.device):
        # said when it was asked for the exact workload
        with contextlib.suppress(StoreError, BundleError):
            profile = layer.get(request.device, near)
            answer = profile and _from_profile(profile, _scaled(request, near), layer, asked)
            if answer:
                asked.append((layer.name, f"nearest tuned workload: {near.key}"))
                plan = _memory_safe(answer.plan, near, request)
                return replace(
                    answer,
                    plan=plan,
                    reason=f"{answer.reason} for the nearest tuned workload, {near.shape}",
                )
    return None


def _scaled(request: _Request, near: Workload) -> _Request:
    """A request whose budget is for the plans of a neighbour.

    What a smaller one took does not show what fits here.
    """
    if request.memory_budget_mb is None:
        return request
    share = min(1.0, near.logits_bytes / request.workload.logits_bytes)
    return request._replace(memory_budget_mb=request.memory_budget_mb * share)


def _nearest_workloads(
    workload: Workload, asked_layers: Sequence[Layer], device: Device
) -> list[tuple[Layer, Workload]]:
    """Other workloads that are near, by the sum of |log2| of the ratios of sizes, nearest first.

    Of equally near ones the earlier layer's.
    """
    asked, candidates = workload.key, []
    for number, layer in enumerate(asked_layers):
        with contextlib.suppress(StoreError, BundleError):
            keys = layer.workloads(device)
            candidates += [
                (distance, number, key)
                for key in keys
                if key != asked and (distance := _distance(asked, key)) is not None
            ]
    return [
        (asked_layers[number], other)
        for _, number, key in heapq.nsmallest(_MOST_NEIGHBOURS, candidates)
        if (other := _parse(key)) is not None
    ]


def _parse(key: str) -> Workload | None:
    """The workload of a key; None for one that this version cannot read."""
    try:
        return Workload.parse(key)
    except WorkloadError:
        return None


def _distance(one: str, other: str) -> float | None:
    """How far apart the sizes of two workloads are, by their keys.

    None if too far, or if they differ in more than sizes.
    """
    (sizes, rest), (other_sizes, other_rest) = split_key(one), split_key(other)
    if rest != other_rest or len(sizes) != len(other_sizes) or not all(other_sizes):
        return None
    factors = [size / other_size for size, other_size in zip(sizes, other_sizes, strict=True)]
    if not all(1 / _FARTHEST <= factor <= _FARTHEST for factor in factors):
        return None
    return sum(abs(math.log2(factor)) for factor in factors)


def _memory_safe(plan: Plan, tuned: Workload, request: _Request) -> Plan:
    """A neighbour's plan, never letting more logits live at once than did there.

    A limit that it did not reach becomes the neighbour's whole size.
    """
    pinned = request.implementation is not None and not is_sliced(request.implementation)
    if (
        request.workload.logits_bytes <= tuned.logits_bytes
        or is_fused(plan.implementation)
        or pinned
    ):
        return plan
    most = tuned.logits_bytes / BYTES_PER_MB
    limit = most if plan.max_chunk_size_mb is None else min(most, plan.max_chunk_size_mb)
    return Plan(plan.implementation if is_sliced(plan.implementation) else "xla", limit)


def _default(request: _Request) -> Plan:
    implementation = request.implementation or "xla"
    if not is_sliced(implementation):
        return Plan(implementation, None)
    if request.memory_budget_mb is None:
        return Plan(implementation, DEFAULT_MAX_CHUNK_SIZE_MB)
    return Plan(
        implementation, min(DEFAULT_MAX_CHUNK_SIZE_MB, request.memory_budget_mb * _SHARE_OF_BUDGET)
    )


# --- For the op -----------------------------------------------------------------------------------


def plans(workload: Workload, implementation: str | None) -> Plans:
    """The plans of a call, for either mode; which of them came to run is reported when it is known."""
    both: dict[Mode, Resolution] = {
        "forward": resolve(workload.with_mode("forward"), implementation),
        "training": resolve(workload.with_mode("training"), implementation),
    }
    return Plans(
        _bounded(both["forward"]), _bounded(both["training"]), lambda mode: _report(both[mode])
    )


def _bounded(resolution: Resolution) -> Plan:
    """The plan, for a call that ``vmap`` may make larger than what was measured.

    It may have at once the logits that were, or the default's.
    """
    plan = resolution.plan
    if (
        plan.max_chunk_size_mb is not None
        or is_fused(plan.implementation)
        or resolution.match == "pinned"
    ):
        return plan
    return replace(
        plan,
        max_chunk_size_mb=max(
            resolution.workload.logits_bytes / BYTES_PER_MB, DEFAULT_MAX_CHUNK_SIZE_MB
        ),
    )


def _report(resolution: Resolution) -> None:
    """Warns of a miss or of a stale profile, once for each workload, and records a miss for
    ``autochunk tune --missed``.
    """
    subject = (resolution.workload, resolution.device)
    if agree.several_processes() and not agree.is_first():
        return  # process 0 says it for all
    missed = resolution.match == "default" and resolution.profile is None
    if (missed or resolution.match == "nearest") and subject not in _reported:
        _reported.add(subject)
        # Nothing to be done in a place where nothing can be written: the warning stands.
        with contextlib.suppress(StoreError):
            ProfileStore(_settings.get().store).record_miss(resolution.device, resolution.workload)
    if missed:
        _warn_once(
            MissWarning,
            subject,
            f'max_chunk_size_mb="auto" found no profile for {resolution.workload.key} and uses '
            f"{resolution.plan}. "
            f"To tune it on this machine: {resolution.workload.tune_command}",
        )
    elif resolution.match == "default":
        _warn_once(
            BudgetWarning,
            subject,
            f'max_chunk_size_mb="auto" uses {resolution.plan} for {resolution.workload.key}: '
            f"{resolution.reason}",
        )
    if resolution.stale:
        _warn_once(
            StaleWarning,
            subject,
            f'max_chunk_size_mb="auto" uses a profile of {resolution.source} that may no longer '
            "hold: "
            f"{'; '.join(resolution.stale)}. To measure again: {resolution.workload.tune_command}",
        )


def _warn_once(category: type[Warning], subject: Any, text: str) -> None:
    if (category, subject) in _reported:
        return
    _reported.add((category, subject))
    warnings.warn(text, category, stacklevel=_users_level())


def _users_level() -> int:
    """How far up from its caller the user's own code is: beyond this package and what traces it."""
    level, frame = 1, sys._getframe(1)
    while (
        frame.f_back is not None
        and str(frame.f_globals.get("__name__")).partition(".")[0] in _FRAMEWORKS
    ):
        level, frame = level + 1, frame.f_back
    return level


def forget_all() -> None:
    """Lets every warning be given again, and reads the layers anew."""
    global _snapshot
    with _lock:
        _reported.clear()
        _agreed.forget()
        _layers.clear()
        _snapshot = None
