"""How much else the machine did meanwhile: real processes, on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from autochunk import host
from autochunk.tuner import load
from autochunk.tuner.load import GpuWatch, LoadOfOthers

BUSY = "import time; end = time.monotonic() + {0}\nwhile time.monotonic() < end: pass"


def test_own_work_and_that_of_ended_children_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what all did, that of a child that still runs counts as others'."""
    busy = iter([100.0, 103.0, 103.0])
    monkeypatch.setattr(host, "busy_seconds", lambda: next(busy))
    others = LoadOfOthers()
    start = time.process_time()
    subprocess.run([sys.executable, "-c", BUSY.format(1.1)], check=True)
    elapsed_own = time.process_time() - start
    cores = others.cores()
    assert cores is not None
    # The child's second, or what it had of it, is not among the three.
    assert cores < 3.0 - elapsed_own


def test_what_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on a system that does not say, nor in an instant."""
    monkeypatch.setattr(host, "busy_seconds", lambda: None)
    assert LoadOfOthers().cores() is None
    monkeypatch.setattr(host, "busy_seconds", lambda: 1.0)
    assert LoadOfOthers().cores() is None


class Gpu:
    """One that answers in turn as it is told."""

    def __init__(self, reasons: list[set[str] | None], programs: list[int | None]) -> None:
        self.reasons, self.programs = reasons, programs

    def slowed_by(self) -> set[str] | None:
        """The next answer, the last one for ever."""
        return self.reasons.pop(0) if len(self.reasons) > 1 else self.reasons[0]

    def processes(self) -> int | None:
        """The next answer."""
        return self.programs.pop(0)


def watched(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> GpuWatch:
    monkeypatch.setattr(load, "_SAMPLE_SECONDS", 0.01)
    uuids = dict(zip("abc", gpus, strict=False))
    monkeypatch.setattr(load, "Gpu", lambda uuid: uuids[uuid])
    return GpuWatch(["", *uuids])


def test_gpus_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times do not count; nor do the programs of the measuring itself, in between."""
    first = Gpu([{"power cap"}, None, set(), set(), set(), None], [0, 1])
    with watched(monkeypatch, first, Gpu([None], [2, 0])) as watch:
        while len(first.reasons) > 1:
            time.sleep(0.01)
    assert watch.slowed() == {"power cap": 0.25}
    assert watch.programs == 2


@pytest.mark.parametrize("gpus", [(), (Gpu([None], [None, None]),)])
def test_gpus_that_tell_nothing(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told of them."""
    with watched(monkeypatch, *gpus) as watch:
        time.sleep(0.05)
    assert watch.slowed() == {}
    assert watch.programs == 0
