"""NVIDIA GPUs by their driver's library: which there are, their memory, and the versions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import re
import uuid
from typing import Any

from autochunk.errors import DeviceError
from autochunk.host import read

# Compute capability of each product, which is the first word with a digit in a GPU's name.
_CAPABILITIES = {
    "6": r"P\d+|10\d\d",
    "7.0": r"V100S?",
    "7.5": r"T\d+G?|20\d\d|16\d\d",
    "8.0": r"A100X?|A800|A30X?",
    "8.6": r"A2|A10G?|A16|A40|A[2-6]000|A[45]500|30\d\d",
    "8.9": r"L\d+[SG]?|40\d\d",
    "9.0": r"G?H\d+",
    "10": r"G?B\d+",
    "12": r"50\d\d",
}
# Products whose numbers an older generation had, too.
_NAMED_CAPABILITIES = {"Ada": "8.9", "Blackwell": "12"}


def product(kind: str) -> str:
    """The product among the words of a GPU's name: "A100" of "NVIDIA A100-SXM4-40GB MIG 1g.5gb".

    "" where no word has a digit.
    """
    return next((word for word in re.findall(r"[^\W_]+", kind) if re.search(r"\d", word)), "")


def capability(kind: str) -> str:
    """The compute capability that a GPU of this name has, by its product; "" if not known.

    From the name alone, since the GPU that a result is from need not be at hand.
    """
    for word, named in _NAMED_CAPABILITIES.items():
        if word in kind.split():
            return named
    name = product(kind)
    found = (number for number, names in _CAPABILITIES.items() if re.fullmatch(names, name))
    return next(found, "")


def gpu_memory(index: int) -> tuple[int, int] | None:
    """(all, free) bytes of a GPU, counting every process's use, from CUDA's driver library.

    None where that is not there.

    ``index`` counts the GPUs that this process sees. The process must have the GPU in use already,
    as it has once jax has started its backend.
    """
    driver = cuda_driver()
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
    driver, count = cuda_driver(), ctypes.c_int()
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


def gpu_uuids() -> dict[str, str]:
    """UUIDs of the GPUs that this process sees, by the names that ``visible_gpus`` gives them."""
    with contextlib.suppress(DeviceError):
        return {name: _uuid(index) for index, name in enumerate(visible_gpus())}
    return {}


def _uuid(index: int) -> str:
    driver, device, raw = cuda_driver(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetUuid(raw, device):
        return ""
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


@functools.cache
def cuda_driver() -> Any:
    """CUDA's driver library, initialised; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def driver_version() -> str:
    """Of the kernel's driver; "" without one."""
    found = re.search(
        r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)", read("/proc/driver/nvidia/version")
    )
    return found[1] if found else ""


def cuda_version(jax_device: Any) -> str:
    """Of the CUDA that jaxlib runs on, such as "13.0"."""
    found = re.search(
        r"cuda (\d+)", str(getattr(jax_device.client, "platform_version", "")).lower()
    )
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""


def cudnn_version() -> str:
    """Of the cuDNN package that jax's CUDA plugin installs; "" where cuDNN came another way."""
    for major in ("13", "12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(f"nvidia-cudnn-cu{major}")
    return ""
