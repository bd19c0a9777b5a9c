"""Chunks of arrays that are spread over devices take of each device's share."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import run_python


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
def test_nothing_is_communicated(kind: str) -> None:
    """Along a sharded axis each device computes its own positions, and results stay where they are.

    Whether XLA partitions the program, JAX's types say how, or it is inside ``jax.shard_map``.
    """
    script = Path(__file__).with_name("on_devices.py")
    printed = run_python(script, kind, timeout=300, JAX_PLATFORMS="cpu")
    assert printed.split("\n")[0].startswith("P('i'")
    assert printed.strip().endswith("[]")
