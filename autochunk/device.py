"""The Device that a result belongs to, and how much memory it has free.

A profile answers only on a device whose hard fields are equal; the soft ones (versions) say whether
it may have gone stale. On CPU ``device_kind`` is just "cpu", so the fingerprint is made from what
decides the speed of a matrix product: the model, its instruction sets, its caches and the cores
that this process may use. All of it comes from ``/proc`` and ``/sys``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform as host
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from autochunk.errors import DeviceError

_GIB = 2**30


class Device(BaseModel):
    """Fingerprint of the device that measurements were taken on.

    Attributes:
      platform: "cpu", "gpu" or "tpu", as in jax.
      kind: the accelerator's name, or for a CPU vendor/family/model/stepping, a hash of its
        instruction-set flags and its cache sizes.
      cores: CPU cores this process may use (affinity and cgroup quota); 0 on accelerators.
      memory_gib: memory of the device in GiB, rounded; on CPU the lesser of the machine's and the
        cgroup's, on a GPU (or a slice of one) all that it has, whoever uses it.
      jax, jaxlib, driver, cuda, cudnn: versions; recorded, and compared for staleness only. ""
        where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: str = Field(pattern=r"^[a-z_]{1,100}$")
    # No text that could pass for another part of a key.
    kind: str = Field(min_length=1, max_length=200, pattern=r"^[^|\x00-\x1f\x7f]*$")
    cores: int = Field(ge=0)
    memory_gib: int = Field(ge=0)
    jax: str = ""
    jaxlib: str = ""
    driver: str = ""
    cuda: str = ""
    cudnn: str = ""

    @field_validator("kind")
    @classmethod
    def _no_key_items(cls, value: str) -> str:
        if "cores=" in value or "memory=" in value:
            raise ValueError(
                f"{value!r} has cores= or memory= in it, which are fields of their own"
            )
        return value

    @property
    def key(self) -> str:
        """The hard fields as one text; equal texts mean that profiles are shared."""
        cores = f" cores={self.cores}" if self.cores else ""
        return f"{self.platform} {self.kind}{cores} memory={self.memory_gib}GiB"

    def stale_reasons(self, now: Device) -> list[str]:
        """Why results of this device may no longer hold on ``now``, the same device today.

        Empty if they do, or if it is another device. Only minor versions of jaxlib and cuDNN count:
        jaxlib's were seen to move the best slice on CPU, and cuDNN's kernels are candidates
        themselves; patch releases, jax and the driver were not seen to matter.
        """
        if self.key != now.key:
            return []
        versions = (("jaxlib", self.jaxlib, now.jaxlib), ("cuDNN", self.cudnn, now.cudnn))
        return [
            f"measured with {name} {then or 'unknown'}, this is {today or 'unknown'}"
            for name, then, today in versions
            if _minor(then) != _minor(today)
        ]


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def detect(jax_device: Any = None) -> Device:
    """The device that jax computes on by default, or the given ``jax.Device``.

    Initialises jax's backend.

    Raises:
      DeviceError: jax has no usable device.
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
    except RuntimeError as error:
        raise DeviceError(f"jax finds no device to compute on: {error}") from error


@functools.lru_cache(maxsize=32)
def _describe(jax_device: Any) -> Device:
    versions = {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    if jax_device.platform == "cpu":
        return Device(
            platform="cpu",
            kind=_cpu_kind(),
            cores=usable_cores(),
            memory_gib=round(cpu_memory_bytes() / _GIB),
            **versions,
        )
    memory = (jax_device.memory_stats() or {}).get("bytes_limit", 0)
    if jax_device.platform == "gpu":
        # Jax's own limit follows its settings for preallocation; the GPU's memory does not.
        memory = (gpu_memory(jax_device.local_hardware_id or 0) or (memory, 0))[0]
        versions |= {
            "driver": _nvidia_driver(),
            "cuda": _cuda_version(jax_device),
            "cudnn": _cudnn_version(),
        }
    return Device(
        platform=jax_device.platform,
        kind=jax_device.device_kind,
        cores=0,
        memory_gib=round(memory / _GIB),
        **versions,
    )


# --- NVIDIA GPUs ----------------------------------------------------------------------------------


def gpu_memory(index: int) -> tuple[int, int] | None:
    """(all, free) bytes of a GPU, counting every process's use, from CUDA's driver library.

    None where that is not there.

    ``index`` counts the GPUs that this process sees. The process must have the GPU in use already,
    as it has once jax has started its backend.
    """
    driver = _cuda_driver()
    if driver is None:
        return None
    device, context, all_bytes, free_bytes = (
        ctypes.c_int(),
        ctypes.c_void_p(),
        ctypes.c_size_t(),
        ctypes.c_size_t(),
    )
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDevicePrimaryCtxRetain(
        ctypes.byref(context), device
    ):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free_bytes), ctypes.byref(all_bytes))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return None if failed else (all_bytes.value, free_bytes.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def visible_gpus(wanted: str = "all") -> list[str]:
    """GPUs as ``CUDA_VISIBLE_DEVICES`` names them.

    All that this process sees, or those of a list such as "0,1", counted among them. Takes none
    into use.

    Raises:
      DeviceError: there are none, or not those.
    """
    driver, count = _cuda_driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise DeviceError(
            "this process sees no NVIDIA GPU; leave --devices out to tune jax's default device"
        )
    named = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    names = (named or [str(index) for index in range(count.value)])[: count.value]
    if wanted == "all":
        return names
    numbers = [part.strip() for part in wanted.split(",")]
    if not all(number.isdecimal() and int(number) < len(names) for number in numbers) or len(
        set(numbers)
    ) < len(numbers):
        raise DeviceError(
            f'devices must be "all" or different numbers from 0 to {len(names) - 1} such as '
            f'"0,1"; got {wanted!r}'
        )
    return [names[int(number)] for number in numbers]


@functools.cache
def _cuda_driver() -> Any:
    """CUDA's driver library, initialised; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def _nvidia_driver() -> str:
    found = re.search(
        r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version")
    )
    return found[1] if found else ""


def _cuda_version(jax_device: Any) -> str:
    """Of the CUDA that jaxlib runs on, such as "13.0"."""
    found = re.search(
        r"cuda (\d+)", str(getattr(jax_device.client, "platform_version", "")).lower()
    )
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""


def _cudnn_version() -> str:
    """Of the cuDNN package that jax's CUDA plugin installs; "" where cuDNN came another way."""
    for major in ("13", "12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(f"nvidia-cudnn-cu{major}")
    return ""


# --- CPU ------------------------------------------------------------------------------------------


def _cpu_kind() -> str:
    info = _first_processor(_read("/proc/cpuinfo"))
    if not info:
        return f"{host.machine() or 'unknown'}/{host.processor() or 'unknown'}"
    names = (
        ("vendor_id", "cpu family", "model", "stepping")
        if "vendor_id" in info
        else ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    )
    flags = " ".join(sorted(info.get("flags", info.get("Features", "")).split()))
    model = "/".join(info.get(name, "unknown") for name in names)
    return (
        f"{model} isa={hashlib.sha256(flags.encode()).hexdigest()[:8]} "
        f"caches={_caches() or 'unknown'}"
    )


def _first_processor(cpuinfo: str) -> dict[str, str]:
    """The first block of ``/proc/cpuinfo``; the others repeat it once per core."""
    block = cpuinfo.strip().partition("\n\n")[0]
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in block.splitlines())
        if colon
    }


def _caches() -> str:
    """Sizes of the data and unified caches that the first core sees: ``48K+2048K+32768K``."""
    indices = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return "+".join(
        _read(index / "size").strip()
        for index in indices
        if _read(index / "type").strip() != "Instruction"
    )


def usable_cores() -> int:
    """CPU cores that this process may use.

    The least of the machine's, its affinity and its cgroup's quota (rounded up).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (
                _read(folder / "cpu.cfs_quota_us").strip(),
                _read(folder / "cpu.cfs_period_us").strip(),
            )
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def cpu_memory_bytes() -> int:
    """Memory that this process could ever have.

    The lesser of the machine's and its cgroups' limits, in bytes.
    """
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroup_memory())])


def available_cpu_bytes() -> int:
    """Memory free for this process now.

    The least of what the machine has available and what its cgroups leave, in bytes.
    """
    return max(
        0, min([_meminfo("MemAvailable"), *(limit - used for limit, used in _cgroup_memory())])
    )


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every cgroup, of either version, that bounds this process."""
    bounds = []
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
            # Version 1 writes a number near 2^63 for "no limit".
            if limit.isdecimal() and int(limit) < 2**60:
                bounds.append(
                    (int(limit), int(used) - _inactive_file(folder) if used.isdecimal() else 0)
                )
    return bounds


def _inactive_file(folder: Path) -> int:
    """Page cache that the kernel gives back on demand, in bytes.

    No reason to think memory is short.
    """
    # In version 1 the plain name leaves out the groups below, whose use counts.
    values: dict[str, str] = dict(
        re.findall(
            r"^(total_inactive_file|inactive_file) ([0-9]+)$",
            _read(folder / "memory.stat"),
            re.MULTILINE,
        )
    )
    return int(values.get("total_inactive_file") or values.get("inactive_file") or 0)


def _cgroup_folders(controller: str) -> list[Path]:
    """The cgroup folders of this process for a controller, from its own up to the root.

    A limit may sit on any of them.
    """
    folders: list[Path] = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _read(path: str | Path) -> str:
    """The file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
