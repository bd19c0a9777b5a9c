"""The Device that a result belongs to.

A profile answers only on a device of the same key, which is made of what decides speed: platform,
kind, cores. Memory bounds which plans fit and is no part of it, but for an accelerator's, roughly:
a slice of a GPU may have the name of the whole. The soft fields (versions, and how memory is handed
out) say whether a profile may have gone stale.

Older versions had more in their keys: the exact memory, and in a CPU's kind a hash of all flags,
whether or not they name instruction sets. What they wrote is read as this version would have
written it, so that nothing else knows of them but the store and studies, which look rows up by key.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from autochunk import host, nvidia
from autochunk.errors import DeviceError

_GIB = 2**30
_MOST = 999_999_999  # cores, or GiB: what a key has room for

# A key of any version.
_KEY = re.compile(
    r"(?P<platform>[a-z_]+) (?P<kind>.+?)(?: cores=(?P<cores>[0-9]{1,9}(?:\.[0-9]{1,2})?))?"
    r"(?: memory=~?(?P<memory_gib>[0-9]{1,9})GiB)?"
)
_CPU_KIND = re.compile(r"(?P<model>.*?)(?: isa=(?P<isa>\S*))?(?: caches=(?P<caches>\S*))?")


class Device(BaseModel):
    """Fingerprint of the device that measurements were taken on.

    Attributes:
      platform: "cpu", "gpu" or "tpu", as in jax.
      kind: the accelerator's name, or for a CPU its model, a hash of its instruction sets and its
        cache sizes, by ``host.cpu_kind``. This machine's CPU as older versions called it is read as
        that.
      cores: CPU cores this process may use (affinity and cgroup quota), in hundredths: 1.5 are
        another device than 2; 0 on accelerators.
      memory_gib: memory of the device in GiB, rounded; on CPU the lesser of the machine's and the
        cgroup's, on a GPU (or a slice of one) all that it has, whoever uses it. It bounds plans; on
        a CPU it names no other device, on others only where it is much more or less (see ``key``).
      jax, jaxlib, driver, cuda, cudnn: versions; recorded, and compared for staleness only. ""
        where there is none.
      allocator, huge_pages: how memory is handed out to programs on a CPU, by ``host.allocator``
        and ``host.huge_pages``; compared for staleness only, where both are known.

    Example:
      >>> import autochunk
      >>> gpu = autochunk.Device(platform="gpu", kind="NVIDIA H100", cores=0, memory_gib=80)
      >>> gpu.key
      'gpu NVIDIA H100 memory=~80GiB'
      >>> gpu.stale_reasons(autochunk.detect())  # of this device, it says nothing
      []
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: str = Field(pattern=r"^[a-z_]{1,100}$")
    # No text that could pass for another part of a key.
    kind: str = Field(min_length=1, max_length=200, pattern=r"^[^|\x00-\x1f\x7f]*$")
    cores: int | float = Field(ge=0, le=_MOST)
    memory_gib: int = Field(ge=0, le=_MOST)
    jax: str = Field(default="", max_length=1000)
    jaxlib: str = Field(default="", max_length=1000)
    driver: str = Field(default="", max_length=1000)
    cuda: str = Field(default="", max_length=1000)
    cudnn: str = Field(default="", max_length=1000)
    allocator: str = Field(default="", max_length=1000)
    huge_pages: str = Field(default="", max_length=100)

    @field_validator("cores")
    @classmethod
    def _in_hundredths(cls, value: float) -> float:
        value = round(value, 2)
        return int(value) if value == int(value) else value

    @field_validator("kind")
    @classmethod
    def _no_key_items(cls, value: str) -> str:
        if "cores=" in value or "memory=" in value:
            raise ValueError(
                f"{value!r} has cores= or memory= in it, which are fields of their own"
            )
        return value

    @field_validator("kind")
    @classmethod
    def _of_today(cls, value: str, others: ValidationInfo) -> str:
        # Equal hashes of all flags mean the same flags, and so the same instruction sets.
        former = _former_kinds() if others.data.get("platform") == "cpu" else {}
        return former.get(value, value)

    @property
    def key(self) -> str:
        """What profiles are filed under; equal texts mean that they are shared.

        An accelerator's memory is named by the size that it is sold in: 38 and 39 GiB are both what
        drivers leave of 40. Of two sizes one may be a slice of the other; memories of which one is
        less than 3/4 of the other have different sizes.
        """
        sized = self.platform != "cpu" and self.memory_gib
        memory = f" memory=~{_sold_as(self.memory_gib)}GiB" if sized else ""
        return f"{self._stem}{memory}"

    @property
    def _stem(self) -> str:
        return self._stem_of(self.kind)

    def _stem_of(self, kind: str) -> str:
        cores = f" cores={self.cores}" if self.cores else ""
        return f"{self.platform} {kind}{cores}"

    @property
    def key_stems(self) -> tuple[str, ...]:
        """What the keys that any version gave this device begin with, before a space.

        Keys of other devices may, too: ``current_key`` tells.
        """
        older = _former_kinds().items() if self.platform == "cpu" else ()
        return self._stem, *(self._stem_of(old) for old, new in older if new == self.kind)

    def stale_reasons(self, now: Device) -> list[str]:
        """Why results of this device may no longer hold on ``now``, the same device today.

        Empty if they do, or if it is another device. Only minor versions of jaxlib and cuDNN count:
        jaxlib's were seen to move the best slice on CPU, and cuDNN's kernels are candidates
        themselves; patch releases, jax and the driver were not seen to matter. Where
        an allocator kept freed buffers the best plan was seen to be another.
        """
        if self.key != now.key:
            return []
        versions = (("jaxlib", self.jaxlib, now.jaxlib), ("cuDNN", self.cudnn, now.cudnn))
        changed = [one for one in versions if _minor(one[1]) != _minor(one[2])]
        conditions = (
            ("allocator", self.allocator, now.allocator),
            ("huge pages", self.huge_pages, now.huge_pages),
        )
        changed += [one for one in conditions if all(one) and one[1] != one[2]]
        return [
            f"measured with {name} {then or 'unknown'}, this is {today or 'unknown'}"
            for name, then, today in changed
        ]


@functools.cache
def _former_kinds() -> dict[str, str]:
    """What older versions called this machine's CPU, and what it is called today."""
    former = host.former_cpu_kind()
    return {former: host.cpu_kind()} if former else {}


def _sold_as(memory_gib: int) -> int:
    """The least size in GiB, of those that memory is sold in, that is no less (but for 2%)."""
    steps = (step << power for power in itertools.count() for step in (8, 9, 10, 12))
    sizes = itertools.chain(range(1, 8), steps)
    return next(size for size in sizes if 100 * memory_gib <= 102 * size)


def device_of(key: str) -> Device | None:
    """The device of a key that any version wrote, without versions; None for another text."""
    found = _KEY.fullmatch(key)
    try:
        return Device.model_validate(found.groupdict("0")) if found else None
    except ValidationError:
        return None


def current_key(key: str) -> str:
    """A device's key that any version wrote, as this version writes it.

    A text that is no device's key stays as it is.
    """
    device = device_of(key)
    return device.key if device else key


def key_items(key: str) -> dict[str, str]:
    """What a device's key says by name: platform, kind, a CPU's isa and caches, cores, memory."""
    platform, _, rest = key.partition(" ")
    kind, *others = re.split(r" (?=isa=|caches=|cores=|memory=)", rest)
    return {"platform": platform, "kind": kind, **dict(one.split("=", 1) for one in others)}


def difference(key: str, here: str) -> dict[str, tuple[str, str]]:
    """Where two devices' keys differ, by name: both values, "none" where one has no value.

    For another platform only the platform and the kind.
    """
    theirs, ours = key_items(key), key_items(here)
    names = [*theirs, *(name for name in ours if name not in theirs)]
    names = names if theirs["platform"] == ours["platform"] else ["platform", "kind"]
    pairs = {name: (theirs.get(name, "none"), ours.get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def detect(jax_device: Any = None) -> Device:
    """The device that jax computes on by default, or the given ``jax.Device``.

    Initialises jax's backend.

    Raises:
      DeviceError: jax has no usable device.

    Example:
      >>> import autochunk
      >>> import jax
      >>> autochunk.detect().platform == jax.default_backend()
      True
    """
    return _describe(jax_device or default_device())


def default_device() -> Any:
    """The ``jax.Device`` that jax computes on where nothing else is asked for.

    ``JAX_DEFAULT_DEVICE`` may set it. Initialises jax's backend.

    Raises:
      DeviceError: jax has no usable device.
    """
    import jax

    config: Any = jax.config  # some versions annotate what it has, others do not
    try:
        chosen = config.jax_default_device or jax.local_devices()[0]
        return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
    except (RuntimeError, AssertionError) as error:  # the latter where it has no such platform
        why = str(error) or f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}"
        raise DeviceError(f"jax finds no device to compute on: {why}") from error


@functools.lru_cache(maxsize=32)
def _describe(jax_device: Any) -> Device:
    versions = {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    if jax_device.platform == "cpu":
        return Device(
            platform="cpu",
            kind=host.cpu_kind(),
            cores=host.usable_cores(),
            memory_gib=round(host.cpu_memory_bytes() / _GIB),
            allocator=host.allocator()[:1000],
            huge_pages=host.huge_pages(),
            **versions,
        )
    memory = (jax_device.memory_stats() or {}).get("bytes_limit", 0)
    if jax_device.platform == "gpu":
        # Jax's own limit follows its settings for preallocation; the GPU's memory does not.
        memory = (nvidia.gpu_memory(jax_device.local_hardware_id or 0) or (memory, 0))[0]
        versions |= {
            "driver": nvidia.driver_version(),
            "cuda": nvidia.cuda_version(jax_device),
            "cudnn": nvidia.cudnn_version(),
        }
    return Device(
        platform=jax_device.platform.lower(),  # plugins may shout: "METAL"
        kind=jax_device.device_kind,
        cores=0,
        memory_gib=round(memory / _GIB),
        **versions,
    )


# --- Devices alike --------------------------------------------------------------------------------


def likeness(one: Device, other: Device) -> float:
    """How far what was measured on one device may tell of another, from 0 to 1.

    1 means the same key; 0 another platform, of which nothing can be told. In between a guess,
    which puts those in order that could answer where a device has no profile; ties are for the
    caller to break. It is symmetric, and the same in every process that runs on one machine.

    - CPUs: up to 0.95 of the same model, as with other cores, caches or flags that a hypervisor
      hides; at most 0.5 of the same vendor; at most 0.2 of another. Up to 12% less for other cores,
      5% each for other caches and instruction sets, 2% for another stepping.
    - Accelerators: up to 0.95 of the same name; at most 0.85 of the same product with another
      suffix (``A100-SXM4-40GB``, ``A100-PCIE-40GB MIG 1g.5gb``); 0.6 of the same compute
      capability; 0.35 of the same vendor; 0.15 of another. Up to 20% less for other memory.
    """
    if one.key == other.key:
        return 1.0
    if one.platform != other.platform:
        return 0.0
    return _like_cpus(one, other) if one.platform == "cpu" else _like_accelerators(one, other)


def _like_cpus(one: Device, other: Device) -> float:
    mine, theirs = _cpu_items(one.kind), _cpu_items(other.kind)
    names, others = mine["model"], theirs["model"]
    known = _known(names)
    if names[:known] == others[: _known(others)]:
        alike = 0.95
    else:
        alike = 0.5 if names[0] == others[0] else 0.2
    less = 0.12 * (1 - _ratio(one.cores, other.cores))
    less += 0.05 * (mine["caches"] != theirs["caches"]) + 0.05 * (mine["isa"] != theirs["isa"])
    less += 0.02 * (names != others)
    return float(alike * (1 - less))


def _cpu_items(kind: str) -> dict[str, Any]:
    found = _CPU_KIND.fullmatch(kind)
    items: dict[str, Any] = found.groupdict("") if found else {"isa": "", "caches": ""}
    return {**items, "model": re.split("[/ ]", items.get("model", kind))}


def _known(names: list[str]) -> int:
    """How many of a CPU's names make its model; the rest are steppings.

    On x86 vendor, family and model, on ARM implementer and part; of others all.
    """
    if len(names) != 4:
        return len(names)
    return 2 if names[0].startswith("0x") else 3


def _like_accelerators(one: Device, other: Device) -> float:
    same_capability = nvidia.capability(one.kind) == nvidia.capability(other.kind)
    product = nvidia.product(one.kind)
    if one.kind == other.kind:
        alike = 0.95
    elif product and product == nvidia.product(other.kind) and same_capability:
        alike = 0.85
    elif nvidia.capability(one.kind) and same_capability:
        alike = 0.6
    else:
        alike = 0.35 if _vendor(one.kind) == _vendor(other.kind) else 0.15
    return alike * (1 - 0.2 * (1 - _ratio(one.memory_gib, other.memory_gib)))


def _vendor(kind: str) -> str:
    """The first word of an accelerator's name; drivers left NVIDIA's out once."""
    first = kind.partition(" ")[0]
    return "NVIDIA" if first in ("Tesla", "Quadro", "GeForce", "GRID") else first


def _ratio(one: float, other: float) -> float:
    return min(one, other) / max(one, other) if one != other else 1.0
