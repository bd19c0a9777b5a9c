"""The answer of a prediction: from the curves that layers hold, of this device and like ones."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from autochunk.device import Device, device_of, likeness
from autochunk.errors import BundleError, StoreError, WorkloadError
from autochunk.functions import is_function
from autochunk.implementations import IMPLEMENTATIONS, is_fused, is_sliced
from autochunk.plan import BYTES_PER_MB
from autochunk.predict.curves import KINDS, Curve, curve, kinds_of, sizes_of
from autochunk.predict.prediction import (
    Cost,
    Prediction,
    Source,
    first_of,
    plans_of,
    predict,
    tells,
)
from autochunk.predict.process import alike, of_seconds
from autochunk.resolution.answer import Request, Resolution, most_memory
from autochunk.resolution.layers import Layer, find
from autochunk.resolution.rule import usual_kernel
from autochunk.workload import Workload

# What is less like the workload and device asked about than this says too little of it.
_LEAST_ALIKE = 0.25
# Fused kernels are of one kind of accelerator: what is not much like another says nothing of it.
_LEAST_LIKENESS = {"cpu": 0.1}
_LEAST_LIKENESS_ELSE = 0.5
# Of fewer the nearest alone says as much: what it did not try is not known.
_FEWEST = 3
_SHOWN = 8  # other plans


class _Subject(NamedTuple):
    """What one profile is of, and the layer that has it."""

    layer: Layer
    device: str
    workload: Workload
    likeness: float


class Curves:
    """The curves of some layers, for one device; each is read when it is first needed."""

    def __init__(self, layers: Sequence[Layer], device: Device) -> None:
        self._device = device
        self._subjects = list(_subjects(layers, device))
        places = [_place(one.workload.key) for one in self._subjects]
        self._sizes = np.array([sizes for _, sizes, _ in places]).reshape(-1, 4)
        self._kinds = np.array([kinds for _, _, kinds in places]).reshape(-1, KINDS)
        self._likeness = np.array([one.likeness for one in self._subjects])
        self._sources: dict[int, Source | None] = {}

    def near(self, workload: Workload) -> list[Source]:
        """Those that tell most of a workload, the most alike first."""
        asked = sizes_of(workload), kinds_of(workload)
        covariance = of_seconds(self._device.platform)
        close = alike(covariance, asked, self._sizes, self._kinds, self._likeness)
        order = [n for n in np.argsort(-close, kind="stable") if close[n] >= _LEAST_ALIKE]
        found = (self._source(number) for number in order)
        return first_of(one for one in found if one is not None)

    def _source(self, number: int) -> Source | None:
        if number not in self._sources:
            self._sources[number] = self._made(self._subjects[number])
        return self._sources[number]

    def _made(self, subject: _Subject) -> Source | None:
        read = _read.setdefault(subject.layer, {})
        key = (subject.device, subject.workload.key)
        if key not in read:
            profile = find(subject.layer, *key)
            found = curve(profile) if profile is not None else None
            read[key] = (found, profile.device) if profile and found else None
        known = read[key]
        return known and Source(known[0], tells(known[1], self._device))


# What was read of a layer, as long as that is as it was: then a new one takes its place.
_read: WeakKeyDictionary[Layer, dict[tuple[str, str], tuple[Curve, Device] | None]]
_read = WeakKeyDictionary()


@functools.lru_cache(maxsize=10_000)
def _place(key: str) -> tuple[Workload, np.ndarray, np.ndarray]:
    """The workload of a key, and where it lies."""
    workload = Workload.parse(key)
    return workload, sizes_of(workload), kinds_of(workload)


def _subjects(layers: Sequence[Layer], device: Device) -> Iterator[_Subject]:
    """What there is of like devices; of one device and workload the first layer's."""
    least = _LEAST_LIKENESS.get(device.platform, _LEAST_LIKENESS_ELSE)
    known: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    for layer in layers:
        for key, text in _keys(layer):
            if key not in known:
                other = device_of(key)
                known[key] = likeness(device, other) if other else 0.0
            if (key, text) in seen or known[key] < least or is_function(text):
                continue
            seen.add((key, text))
            with contextlib.suppress(WorkloadError):  # written by a newer version
                yield _Subject(layer, key, _place(text)[0], known[key])


def _keys(layer: Layer) -> list[tuple[str, str]]:
    # A layer that cannot be read was told of when it was asked for the exact workload.
    with contextlib.suppress(StoreError, BundleError):
        return layer.keys()
    return []


def predicted(curves: Curves, request: Request) -> Resolution | None:
    """What the nearest curves speak for.

    None if there are too few, no plan fits the budget, a kernel that they know nothing of is
    installed, or an implementation was asked for that does not slice.
    """
    wanted, platform = request.implementation, request.device.platform
    if wanted is not None and not is_sliced(wanted):
        return None
    sources = curves.near(request.workload)
    if len(sources) < _FEWEST:
        return None
    names = {wanted} if wanted else IMPLEMENTATIONS.keys() - request.without
    found = predict(
        request.workload,
        platform,
        sources,
        plans_of(request.workload, platform, names),
        memory_budget_mb=most_memory(request),
    )
    if found is None or (wanted is None and _knows_no_kernel(found, sources, request)):
        return None
    return Resolution(
        workload=request.workload,
        device=request.device,
        plan=found.cost.plan,
        match="predicted",
        layer="prediction",
        reason=_reason(found, request),
        rejected=tuple((str(one.plan), _against(one, found)) for one in found.others[:_SHOWN]),
        prediction=found,
    )


def _knows_no_kernel(found: Prediction, sources: Sequence[Source], request: Request) -> bool:
    """Whether there is a fused kernel, which mostly wins, of which the curves say nothing."""
    if is_fused(found.cost.plan.implementation):
        return False
    kernel = usual_kernel(request.workload, request.device, request.without)
    known = {number for source in sources for number in source.curve.sites.names}
    return kernel is not None and list(IMPLEMENTATIONS).index(kernel) not in known


def _reason(found: Prediction, request: Request) -> str:
    here = found.curves - found.elsewhere
    by = [f"{here} measured here"] if here else []
    by += [f"{found.elsewhere} on other devices or by other versions"] if found.elsewhere else []
    memory = found.cost.temp_bytes / BYTES_PER_MB
    costs = f"{found.cost.seconds * 1e3:.3g} ms and {memory:.3g} MB"
    told = f"predicted to be the fastest, from other workloads, {' and '.join(by)}: {costs}"
    return told if here else f"{told}; tune with: {request.workload.tune_command}"


def _against(other: Cost, found: Prediction) -> str:
    slower = other.seconds / found.cost.seconds - 1
    memory = (other.temp_bytes - found.cost.temp_bytes) / BYTES_PER_MB
    return f"predicted {slower:+.0%} time, {memory:+.0f} MB of working memory"
