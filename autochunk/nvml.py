"""NVIDIA's management library: what disturbs a GPU. It takes none into use.

Of its documentation: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

# Reasons for clocks below what was asked for, by their bit; what a GPU that has nothing to do, or
# one whose owner set its clocks for good, gives for a reason is none.
_SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "thermal slowdown",
    0x80: "power brake",
}
_IDLE = 0x1
_MOST_PROCESSES = 256


class _ProcessInfo(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Gpu:
    """One GPU, by its UUID such as "GPU-2f0e..."."""

    def __init__(self, uuid: str) -> None:
        self._handle = ctypes.c_void_p()
        self._library = _library()
        found = self._library is not None and not self._library.nvmlDeviceGetHandleByUUID(
            uuid.encode(), ctypes.byref(self._handle)
        )
        if not found:
            self._library = None

    def slowed_by(self) -> set[str] | None:
        """Why its clocks are held down now; None if it is idle, or where that cannot be told."""
        ask = getattr(self._library, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
        bits = ctypes.c_ulonglong()
        if ask is None or ask(self._handle, ctypes.byref(bits)) or bits.value & _IDLE:
            return None
        return {reason for bit, reason in _SLOWED.items() if bits.value & bit}

    def processes(self) -> int | None:
        """How many programs compute on it; None where that cannot be told."""
        ask = getattr(self._library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        count = ctypes.c_uint(_MOST_PROCESSES)
        infos = (_ProcessInfo * _MOST_PROCESSES)()
        if ask is None or ask(self._handle, ctypes.byref(count), infos):
            return None
        return count.value

    def utilization(self) -> float | None:
        """For what share of the last moment a kernel ran on it; None where that cannot be told."""
        ask = getattr(self._library, "nvmlDeviceGetUtilizationRates", None)
        rates = _Utilization()
        if ask is None or ask(self._handle, ctypes.byref(rates)):
            return None
        return int(rates.gpu) / 100

    def memory(self) -> tuple[int, int] | None:
        """(free, all) bytes; None where that cannot be told."""
        ask = getattr(self._library, "nvmlDeviceGetMemoryInfo", None)
        found = _Memory()
        if ask is None or ask(self._handle, ctypes.byref(found)):
            return None
        return int(found.free), int(found.total)


@functools.cache
def _library() -> Any:
    """The library, initialised; None without one."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return None if library.nvmlInit_v2() else library
    return None
