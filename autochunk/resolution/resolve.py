"""The answer to "auto", and why: who is asked, in which order.

First ``use(...)`` around the call; then the layers in their order, in each the exact workload on
the exact device; then a prediction from what was measured of others, here and on like devices; then
the nearest tuned workload of this device; then the usual plan. It happens while JAX traces: nothing
is left of it in the compiled program, which keeps its plan until it is traced again.
"""

from __future__ import annotations

from dataclasses import replace

from autochunk import device as devices
from autochunk.device import Device
from autochunk.errors import BundleError, StoreError
from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import (
    BYTES_PER_MB,
    DEFAULT_MAX_CHUNK_SIZE_MB,
    Plan,
    Plans,
    check_implementation,
)
from autochunk.resolution import agree, reporting, settings, snapshot
from autochunk.resolution.answer import Request, Resolution, from_profile, over_budget, unknown
from autochunk.resolution.layers import Layer
from autochunk.resolution.nearest import nearest
from autochunk.resolution.predicted import predicted
from autochunk.resolution.settings import Settings
from autochunk.resolution.snapshot import Snapshot
from autochunk.store.profile import Profile
from autochunk.workload import MODES, Mode, Workload

# An unfinished profile of fewer timed plans says less than what was measured of other workloads.
_WORTH_ANSWERING = 3


def resolve(
    workload: Workload, implementation: str | None = None, *, device: Device | None = None
) -> Resolution:
    """What "auto" means for a workload, on jax's default device unless another is given.

    Same profiles, same answer. In a program of several JAX processes the profiles are those of
    process 0, and so is the device, unless one is given.

    Raises:
      ArgumentError: no such implementation.
      AgreementError: several processes run this program and do not come to one set of profiles.

    Example:
      >>> import autochunk
      >>> workload = autochunk.Workload.parse("b=8,t=2048,h=16,k=64", dtype="bfloat16")
      >>> with autochunk.use(max_chunk_size_mb=64):
      ...     answer = autochunk.resolve(workload)
      >>> print(answer.plan, "|", answer.match, "|", answer.reason)
      xla, 64 MB | pinned | set by autochunk.use(...)
    """
    now = settings.current()
    implementation = check_implementation(implementation) or now.implementation
    return _resolve(workload, implementation, now, device)


def _resolve(
    workload: Workload,
    implementation: str | None,
    now: Settings,
    device: Device | None = None,
    *,
    without: frozenset[str] = frozenset(),
) -> Resolution:
    if plan := now.pinned(implementation):
        where, why = "autochunk.use", "set by autochunk.use(...)"
        return Resolution(workload, device or devices.detect(), plan, "pinned", where, why)
    with snapshot.lock:
        agreed = device is None and agree.several_processes()
        view = (snapshot.agreed_snapshot if agreed else snapshot.own_snapshot)(now.store)
        device = device or view.device or devices.detect()
        request = Request(workload, implementation, now.memory_budget_mb, device, without)
        if request not in view.answers:
            view.answers[request] = _ask_all(request, view)
        return view.answers[request]


def _ask_all(request: Request, view: Snapshot) -> Resolution:
    asked: list[tuple[str, str]] = []
    too_large: Resolution | None = None
    thin: Resolution | None = None
    for layer in view.layers:
        profile = _ask(layer, request, asked)
        if profile is None:
            continue
        answer = from_profile(profile, request, layer.name)
        if answer is None:
            asked.append((layer.name, "its profile has no plan that fits"))
            too_large = too_large or over_budget(profile, request)
        elif profile.complete or sum(m.timed for m in profile.measurements) >= _WORTH_ANSWERING:
            return _possible(answer, asked)
        else:
            asked.append((layer.name, "its profile is hardly begun"))
            thin = thin or answer
    answer = predicted(view.curves(request.device), request) or thin
    answer = answer or nearest(view.layers, request, asked) or too_large or unknown(request)
    return _possible(answer, asked)


def _possible(answer: Resolution, asked: list[tuple[str, str]]) -> Resolution:
    """The answer, of one logit at a time at least.

    A limit that leaves no slice was never measured, or is a neighbour's.
    """
    plan, workload = answer.plan, answer.workload
    if plan.max_chunk_size_mb is not None:
        groups = workload.num_heads // workload.num_kv_heads
        least = groups * workload.logits_itemsize / BYTES_PER_MB
        plan = replace(plan, max_chunk_size_mb=max(least, plan.max_chunk_size_mb))
    return replace(answer, plan=plan, asked=tuple(asked))


def _ask(layer: Layer, request: Request, asked: list[tuple[str, str]]) -> Profile | None:
    try:
        found = (layer.get(request.device, workload) for workload in request.alike)
        profile = next((one for one in found if one is not None), None)
    except (StoreError, BundleError) as error:
        asked.append((layer.name, f"left out: {error}"))
        reporting.warn_of_layer(layer, error)
        return None
    reporting.warn_of_files(layer)
    had = "exact match" if profile else "nothing for this workload on this device"
    asked.append((layer.name, had))
    return profile


def plans(workload: Workload, implementation: str | None) -> Plans:
    """The plans of a call, for either mode; the one that comes to run is reported then."""
    return _plans(workload, check_implementation(implementation), settings.current())


def _plans(workload: Workload, implementation: str | None, now: Settings) -> Plans:
    wanted = implementation or now.implementation
    both = {mode: _resolve(workload.with_mode(mode), wanted, now) for mode in MODES}

    refusing: dict[Mode, frozenset[str]] = dict.fromkeys(MODES, frozenset())

    def instead(kernel: str, mode: Mode) -> Plan:
        if both[mode].match == "pinned":
            return both[mode].plan.sliced()
        refusing[mode] |= {kernel}
        both[mode] = _resolve(workload.with_mode(mode), None, now, without=refusing[mode])
        return _bounded(both[mode])

    def report(mode: Mode) -> None:
        plan = both[mode].plan
        no_choice = plan.implementation == wanted and not is_sliced(plan.implementation)
        reporting.report(both[mode], no_choice)

    return Plans(
        forward=_bounded(both["forward"]),
        training=_bounded(both["training"]),
        on_use=report,
        instead=instead,
        for_share=lambda fields: _plans(
            Workload.make(**{**workload.model_dump(), **fields}), implementation, now
        ),
    )


def _bounded(resolution: Resolution) -> Plan:
    """The plan, for a call that ``vmap`` may make larger than what was measured.

    It may have at once the logits that were, or the default's.
    """
    plan = resolution.plan
    limited = plan.max_chunk_size_mb is not None or is_fused(plan.implementation)
    if limited or resolution.match == "pinned":
        return plan
    measured = resolution.workload.logits_bytes / BYTES_PER_MB
    return replace(plan, max_chunk_size_mb=max(measured, DEFAULT_MAX_CHUNK_SIZE_MB))


def forget_all() -> None:
    """Lets every warning be given again, and reads the layers anew."""
    with snapshot.lock:
        reporting.forget()
        snapshot.forget()
