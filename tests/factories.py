"""Devices, workloads, measurements and profiles with every field filled in; Python processes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from hypothesis import strategies as st

from autochunk.device import Device
from autochunk.functions import FunctionCall
from autochunk.plan import LogitsShape
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.workload import Workload

TESTS = Path(__file__).resolve().parent

# Compiling takes most of the tests' time; how well the machine code is optimised makes no
# difference to most of them.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

axis_sizes = st.one_of(
    st.integers(1, 9), st.integers(1, 300), st.sampled_from([512, 1024, 4096, 16000])
)
logits_shapes = st.builds(
    LogitsShape,
    batch=axis_sizes,
    heads=axis_sizes,
    groups=st.integers(1, 16),
    rows=axis_sizes,
    keys=axis_sizes,
    itemsize=st.sampled_from([4, 8]),
)

Scripted = Callable[..., tuple[str, ...]]
"""What the fixture ``scripted`` of the tuner's tests is: makes a worker's command of its script."""


def make_device(**fields: Any) -> Device:
    """A CPU that no profile was ever shipped for."""
    size: dict[str, Any] = {"cores": 4, "memory_gib": 8}
    versions: dict[str, Any] = {"jax": "0.12.0", "jaxlib": "0.12.0"}
    return Device(**{"platform": "cpu", "kind": "Made/Up", **size, **versions, **fields})


def make_workload(shape: str = "b=2,t=1024,s=1024,h=8,k=64", **defaults: Any) -> Workload:
    """A workload from a shape text."""
    return Workload.parse(shape, **defaults)


def make_measurement(
    implementation: str = "xla",
    limit: float | None = None,
    ratio: float = 1.0,
    memory_mb: float = 100.0,
    *,
    status: str = "ok",
    noise: float = 0.0,
    **fields: Any,
) -> Measurement:
    """A plan measured in five rounds.

    The quartiles of its ratios lie ``noise`` (a fraction) to either side of ``ratio``.
    """
    timed = status in ("ok", "pruned")
    ratios = tuple(ratio * (1 + step * noise) for step in (-2, -1, 0, 1, 2)) if timed else ()
    given = {
        "implementation": implementation,
        "max_chunk_size_mb": limit,
        "status": status,
        "seconds": tuple(0.1 * one for one in ratios),
        "ratios": ratios,
        "temp_bytes": int(memory_mb * 1e6) if timed else None,
        "compile_seconds": 0.5,
        "error": 1e-6,
    }
    return Measurement(**{**given, **fields})


CURVE = (
    make_measurement("dense", None, 1.0, 400.0),
    make_measurement("xla", None, 0.9, 300.0),
    make_measurement("xla", 16.0, 0.5, 40.0),
    make_measurement("xla_rows", 4.0, 0.7, 10.0),
)
"""Three plans and dense; ``xla`` at 16 MB is the fastest by far."""


def make_profile(
    workload: Workload | str | None = None,
    device: Device | None = None,
    measurements: Sequence[Measurement] = CURVE,
    **fields: Any,
) -> Profile:
    """A complete profile; by default "xla, 16 MB" is its choice."""
    key = workload.key if isinstance(workload, Workload) else workload or make_workload().key
    given = {
        "schema_version": 1,
        "workload": key,
        "device": device or make_device(),
        "measurements": tuple(measurements),
        "effort": "standard",
        "complete": True,
        "created": "2026-01-02T03:04:05Z",
        "autochunk": "0.1.0",
    }
    return Profile(**{**given, **fields})


def make_call(**fields: Any) -> FunctionCall:
    """A call of a function over 64 rows."""
    given = {
        "name": "model.transition",
        "lengths": "64",
        "arguments": "float32[64.8]@0;float32[8.16]",
        "fingerprint": "0123456789abcdef",
    }
    return FunctionCall.make(**{**given, **fields})


def make_chunks(*sizes: int, **fields: Any) -> Measurement:
    """A function measured in chunks of these sizes."""
    return make_measurement("chunks", None, **{"chunk_sizes": sizes, **fields})


def make_function_profile(
    call: FunctionCall | None = None,
    measurements: Sequence[Measurement] = (),
    **fields: Any,
) -> Profile:
    """A complete profile of a function; by default chunks of 16 are its choice."""
    curve = (make_measurement("dense"), make_chunks(16, ratio=0.5, memory_mb=10.0))
    key = (call or make_call()).key
    given = {"measurements": measurements or curve, "schema_version": 3}
    return make_profile(key, **{**given, **fields})


def one_plan(limit: float | None, implementation: str = "xla") -> tuple[Measurement, ...]:
    """Measurements that leave no choice but this plan."""
    return (make_measurement(implementation, limit),)


def devices_on_cpu(count: int) -> dict[str, str]:
    """The environment of a process that has so many devices, and else compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def start_python(code: str | Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts a Python process of code or a file, which can import this module.

    It has this environment and more.
    """
    what = [str(code)] if isinstance(code, Path) else ["-c", code]
    command = [sys.executable, *what, *map(str, arguments)]
    found = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(found), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def run_python(
    code: str | Path, *arguments: object, timeout: float = 60.0, **environment: str
) -> str:
    """What a Python process of its own prints; fails the test where it fails or hangs."""
    with start_python(code, *arguments, **environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{code}") from None
    assert process.returncode == 0, f"exit status {process.returncode}:\n{err}"
    return out
