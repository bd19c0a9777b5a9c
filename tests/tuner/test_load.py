"""How much else the machine did meanwhile: real processes, on this machine."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from autochunk import host
from autochunk.tuner.load import LoadOfOthers

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
