"""The answer to "auto" of a function that is not attention: the sizes of its chunks, and why.

In the order of the layers; in each the very call, then one of another name that computes the same.
A function that has changed since it was measured is answered by the user's own store alone: what
travels says nothing of a function that it was not measured of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autochunk import device as devices
from autochunk.device import Device
from autochunk.errors import BundleError, StoreError, WorkloadError
from autochunk.functions import FunctionCall, is_function, nameless, unchanging
from autochunk.plan import BYTES_PER_MB, Plan
from autochunk.resolution import agree, reporting, settings, snapshot
from autochunk.resolution.layers import Layer
from autochunk.store.choice import Choice
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore


@dataclass(frozen=True)
class FunctionResolution:
    """The answer to "auto", and why.

    Attributes:
      workload: what was asked for.
      device: where.
      sizes: most positions along each axis; None where nothing is known, for a rule to say.
      match: "exact", "changed" (the function computed something else when it was measured) or
        "default".
      layer: where the answer came from.
      reason: why these, in words.
      source: key of the call whose profile answered; "" for none.
      stale: why the profile may no longer hold; empty if it does.
      asked: each layer that was asked and what it had.
      over_budget: whether no plan that was measured fits the memory budget; ``sizes`` are then of
        the one that takes least.
      memory: then, bytes by sizes, of each plan that was measured.
      mixes: whether chunks are refused, because the function mixes positions.
      choice: what the profile chose.
    """

    workload: FunctionCall
    device: Device
    sizes: tuple[int, ...] | None = None
    match: str = "default"
    layer: str = "default"
    reason: str = "no profile: what fits a share of the memory; tune with: autochunk tune --missed"
    source: str = ""
    stale: tuple[str, ...] = ()
    asked: tuple[tuple[str, str], ...] = ()
    over_budget: bool = False
    memory: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    mixes: bool = False
    choice: Choice | None = None


def resolve_function(
    call: FunctionCall, memory_budget_mb: float | None = None, *, device: Device | None = None
) -> FunctionResolution:
    """What "auto" means for a call of a function, on jax's default device unless one is given.

    Raises:
      AgreementError: as for attention.
    """
    with snapshot.lock:
        return _resolved(call, memory_budget_mb, device)


def _resolved(
    call: FunctionCall, memory_budget_mb: float | None, device: Device | None
) -> FunctionResolution:
    now = settings.current()
    agreed = device is None and agree.several_processes()
    view = (snapshot.agreed_snapshot if agreed else snapshot.own_snapshot)(now.store)
    device = device or view.device or devices.detect()
    budget = memory_budget_mb if memory_budget_mb is not None else now.memory_budget_mb
    asked: list[tuple[str, str]] = []
    for layer in view.layers:
        found = _ask(layer, device, call, asked)
        if found is None:
            continue
        answer = _answer(call, device, found, budget)
        if answer is None:
            asked.append((layer.name, "its profile has no plan that was timed"))
            continue
        return replace(answer, layer=layer.name, asked=tuple(asked))
    return FunctionResolution(call, device, asked=tuple(asked))


def _ask(
    layer: Layer, device: Device, call: FunctionCall, asked: list[tuple[str, str]]
) -> Profile | None:
    try:
        found = layer.get(device, call) or _alike(layer, device, call)
    except (StoreError, BundleError) as error:
        asked.append((layer.name, f"left out: {error}"))
        reporting.warn_of_layer(layer, error)
        return None
    reporting.warn_of_files(layer)
    had = "nothing for this call on this device"
    if found:
        had = "exact match" if found.workload == call.key else f"one for {found.workload}"
    asked.append((layer.name, had))
    return found


def _alike(layer: Layer, device: Device, call: FunctionCall) -> Profile | None:
    """A profile of another name's, or of what the function was; the last by key."""
    keys = list(filter(is_function, layer.workloads(device)))  # of which there may be very many
    same = [key for key in keys if nameless(key) == nameless(call.key)]
    if not same and isinstance(layer, ProfileStore):
        same = [key for key in keys if unchanging(key) == unchanging(call.key)]
    with contextlib.suppress(WorkloadError):  # written by a newer version
        return layer.get(device, FunctionCall.parse(same[-1])) if same else None
    return None


def mixing(profile: Profile) -> str:
    """Why chunks of a function are refused, as far as it was measured; empty if they are not."""
    found = [one for one in profile.measurements if one.chunk_sizes is not None]
    return next((one.detail for one in found if one.status == "inaccurate"), "")


def _answer(
    call: FunctionCall, device: Device, profile: Profile, budget: float | None
) -> FunctionResolution | None:
    """What a profile answers; where nothing fits the budget what takes least."""
    choice, least = profile.choose(memory_budget_mb=budget), profile.least_memory()
    if least is None:
        return None
    refused, reason = mixing(profile), choice.reason if choice else ""
    sizes = sizes_of(choice.plan if choice else least.plan, call)
    if refused:
        sizes, reason = call.sizes, f"chunks are refused: {refused}"
    elif choice is None:
        memory = (least.temp_bytes or 0) / BYTES_PER_MB
        reason = (
            f"no measured plan fits the memory budget of {budget:g} MB; the one that takes least, "
            f"{least.plan}, takes {memory:.3g} MB; smaller chunks are used if they should take less"
        )
    changed = profile.function is not None and profile.function.fingerprint != call.fingerprint
    stale = profile.stale_reasons(device)
    if changed:
        stale = ["the function computed something else when it was measured", *stale]
    return FunctionResolution(
        workload=call,
        device=device,
        sizes=sizes,
        match="changed" if changed else "exact",
        over_budget=choice is None,
        memory={} if choice else _memory(profile, call),
        mixes=bool(refused),
        reason=reason if profile.complete else f"{reason}; its tuning was cut short",
        source=profile.workload,
        stale=tuple(stale),
        choice=choice,
    )


def _memory(profile: Profile, call: FunctionCall) -> dict[tuple[int, ...], int]:
    timed = [one for one in profile.measurements if one.timed and one.temp_bytes is not None]
    return {sizes_of(one.plan, call): one.temp_bytes or 0 for one in timed}


def sizes_of(plan: Plan, call: FunctionCall) -> tuple[int, ...]:
    """A plan's sizes for a call; the whole lengths of one that does not chunk."""
    return plan.chunk_sizes or call.sizes
