"""The answer of a neighbour: the tuned workload of this device whose sizes differ least."""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from autochunk.device import Device
from autochunk.errors import BundleError, StoreError, WorkloadError
from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import BYTES_PER_MB, Plan
from autochunk.resolution.answer import Request, Resolution, from_profile
from autochunk.resolution.layers import Layer
from autochunk.workload import Workload, split_key

_MOST_NEIGHBOURS = 10  # that are looked at for a plan that fits
# A tuned workload is near if no size is further than this factor away.
_FARTHEST = 4.0


def nearest(
    layers: Sequence[Layer], request: Request, asked: list[tuple[str, str]]
) -> Resolution | None:
    """The answer of the nearest workload, of whichever layer, or of the next that has a plan.

    ``asked`` is told what the layers had.
    """
    for layer, near in nearest_workloads(request.workload, layers, request.device):
        # A layer that cannot be read was told of when it was asked for the exact workload.
        with contextlib.suppress(StoreError, BundleError):
            profile = layer.get(request.device, near)
            if profile is None:
                continue
            answer = from_profile(profile, _scaled(request, near), layer.name)
            if answer is None:
                asked.append((layer.name, "its profile has no plan that fits"))
                continue
            asked.append((layer.name, f"nearest tuned workload: {near.key}"))
            reason = f"{answer.reason} for the nearest tuned workload, {near.shape}"
            return replace(answer, plan=_memory_safe(answer.plan, near, request), reason=reason)
    return None


def _scaled(request: Request, near: Workload) -> Request:
    """A request whose budget is for the plans of a neighbour.

    What a smaller one took does not show what fits here.
    """
    if request.memory_budget_mb is None:
        return request
    share = min(1.0, near.logits_bytes / request.workload.logits_bytes)
    return request._replace(memory_budget_mb=request.memory_budget_mb * share)


def nearest_workloads(
    workload: Workload, layers: Sequence[Layer], device: Device
) -> list[tuple[Layer, Workload]]:
    """Other workloads that are near, by the sum of |log2| of the ratios of sizes, nearest first.

    Of equally near ones the earlier layer's.
    """
    near = heapq.nsmallest(_MOST_NEIGHBOURS, _candidates(workload.key, layers, device))
    return [
        (layers[number], other) for _, number, key in near if (other := _parse(key)) is not None
    ]


def _candidates(
    asked: str, layers: Sequence[Layer], device: Device
) -> Iterator[tuple[float, int, str]]:
    """(distance, number of the layer, key) of what is near the workload of a key."""
    for number, layer in enumerate(layers):
        with contextlib.suppress(StoreError, BundleError):
            for key in layer.workloads(device):
                if key != asked and (apart := distance(asked, key)) is not None:
                    yield apart, number, key


def _parse(key: str) -> Workload | None:
    """The workload of a key; None for one that this version cannot read."""
    try:
        return Workload.parse(key)
    except WorkloadError:
        return None


def distance(one: str, other: str) -> float | None:
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


def _memory_safe(plan: Plan, tuned: Workload, request: Request) -> Plan:
    """A neighbour's plan, never letting more logits live at once than did there.

    A limit that it did not reach becomes the neighbour's whole size.
    """
    pinned = request.implementation is not None and not is_sliced(request.implementation)
    smaller = request.workload.logits_bytes <= tuned.logits_bytes
    if smaller or pinned or is_fused(plan.implementation):
        return plan
    most = tuned.logits_bytes / BYTES_PER_MB
    limit = most if plan.max_chunk_size_mb is None else min(most, plan.max_chunk_size_mb)
    return Plan(plan.implementation if is_sliced(plan.implementation) else "xla", limit)
