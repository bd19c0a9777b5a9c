"""Chunks of arrays that are spread over devices take of each device's share."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import devices_on_cpu, run_python


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
def test_nothing_is_communicated(kind: str) -> None:
    """Along a sharded axis each device computes its own positions, and results stay where they are.

    Whether XLA partitions the program, JAX's types say how, or it is inside ``jax.shard_map``. In
    the last two the gradients of what is shared are summed over devices once, after all chunks.
    """
    script = Path(__file__).with_name("on_devices.py")
    printed = run_python(script, kind, timeout=300, **devices_on_cpu(4))
    in_loops, along = printed.strip().split("\n")
    assert along.startswith("P('i'")
    assert along.endswith("[]")
    # what XLA partitions by itself, which says nothing to JAX, sums weights' gradients in the loop
    assert in_loops == f"in loops {['all-reduce'] if kind == 'Auto' else []}"
