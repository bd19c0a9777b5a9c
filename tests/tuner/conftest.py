"""Scripted measuring processes for the tuner's tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autochunk.workload import Workload

Command = tuple[str, ...]


@pytest.fixture
def scripted() -> Callable[..., Command]:
    """``scripted(**script)`` is the command of a worker that follows the script; see scripted_worker.py."""

    def make(**script: Any) -> Command:
        return (sys.executable, str(Path(__file__).with_name("scripted_worker.py")), json.dumps(script))

    return make


@pytest.fixture
def small() -> Workload:
    """A workload that takes a real worker milliseconds, and still has something to slice."""
    return Workload.parse("b=2,t=96,s=80,h=4,kv_heads=2,k=8,v=16", mode="training")
