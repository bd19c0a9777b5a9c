"""What disturbs a GPU: the library's answers, read; without a library nothing is told."""

from __future__ import annotations

from typing import Any

import pytest

from autochunk import nvml


class Library:
    """Answers as NVIDIA's library does: a status, and the answer in what a pointer points to."""

    def __init__(self, bits: int = 0, processes: int = 0, status: int = 0) -> None:
        self.bits, self.processes, self.status = bits, processes, status

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, _: Any) -> int:  # noqa: N802
        """Knows one GPU."""
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: Any, bits: Any) -> int:  # noqa: N802
        """As told."""
        bits._obj.value = self.bits
        return self.status

    def nvmlDeviceGetComputeRunningProcesses_v3(  # noqa: N802
        self, _: Any, count: Any, infos: Any
    ) -> int:
        """As told; there is room for as many as it was asked for."""
        assert len(infos) == count._obj.value > self.processes
        count._obj.value = self.processes
        return self.status

    def nvmlDeviceGetUtilizationRates(self, _: Any, rates: Any) -> int:  # noqa: N802
        """A fixed answer."""
        rates._obj.gpu, rates._obj.memory = 40, 7
        return self.status

    def nvmlDeviceGetMemoryInfo(self, _: Any, memory: Any) -> int:  # noqa: N802
        """A fixed answer."""
        memory._obj.total, memory._obj.free, memory._obj.used = 80, 60, 20
        return self.status


def use(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_library", lambda: library)


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0x0, set()),
        (0x1, None),
        (0x5, None),
        (0x2, set()),
        (0x4, {"power cap"}),
        (0x68, {"hardware slowdown", "thermal slowdown"}),
        (0x1F4, {"power cap", "power brake", "thermal slowdown"}),
    ],
)
def test_why_clocks_are_held_down(
    bits: int, reasons: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle GPU is not held down, nor is one whose owner set its clocks."""
    use(Library(bits), monkeypatch)
    assert nvml.Gpu("GPU-1").slowed_by() == reasons


def test_programs_on_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whosever they are."""
    use(Library(processes=3), monkeypatch)
    assert nvml.Gpu("GPU-1").processes() == 3


def test_what_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the time that it computes, and its memory: free, and all."""
    use(Library(), monkeypatch)
    gpu = nvml.Gpu("GPU-1")
    assert (gpu.utilization(), gpu.memory()) == (0.4, (60, 80))


@pytest.mark.parametrize(
    ("library", "uuid"),
    [(None, "GPU-1"), (object(), "GPU-1"), (Library(4, 2), "GPU-2"), (Library(4, 2, 3), "GPU-1")],
)
def test_what_cannot_be_told(library: Any, uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, its functions, such a GPU, or where it refuses."""
    if library is not None and not isinstance(library, Library):
        library = type("Old", (), {"nvmlDeviceGetHandleByUUID": lambda *_: 0})()
    use(library, monkeypatch)
    gpu = nvml.Gpu(uuid)
    assert gpu.slowed_by() is None
    assert gpu.processes() is None
    assert gpu.utilization() is None
    assert gpu.memory() is None


def test_a_machine_without_the_library() -> None:
    """Asking is no error anywhere."""
    nvml.Gpu("GPU-00000000-0000-0000-0000-000000000000").slowed_by()
