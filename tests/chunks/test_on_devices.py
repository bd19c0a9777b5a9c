"""Chunks of arrays that are spread over devices take of each device's share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
def test_nothing_is_communicated(kind: str) -> None:
    """Along a sharded axis each device computes its own positions, and results stay where they are.

    Whether XLA partitions the program, JAX's types say how, or it is inside ``jax.shard_map``.
    """
    script = Path(__file__).with_name("on_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0].startswith("P('i'")
    assert done.stdout.strip().endswith("[]")
