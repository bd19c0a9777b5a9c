"""What is measured, and how: errors, memory and devices, by real JAX in this process."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from factories import run_python

from autochunk.plan import Plan
from autochunk.tuner import measure
from autochunk.tuner.inputs import WorkloadInputs, sample_rows
from autochunk.tuner.reference import relative_error
from autochunk.workload import Workload


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_infinite(bad: float) -> None:
    """NaN compares as false, so it must not pass for a small error."""
    assert relative_error([np.array([1.0, bad])], [np.array([1.0, 2.0])]) == math.inf


def test_memory_is_at_least_what_the_process_grew_by() -> None:
    """Growth of the process is seen to within a few MB, whatever was allocated and freed before."""
    np.ones(2**26)  # freed at once
    array, grown = measure.measure_growth(lambda: np.ones(2**23))
    if grown is None:
        pytest.skip("this system does not tell a process its high-water mark")
    assert 0.9 * array.nbytes <= grown <= array.nbytes + 2**23


POOL = {"bytes_limit": 60, "bytes_in_use": 10, "pool_bytes": 30}


@pytest.mark.parametrize(
    ("stats", "free_on_gpu", "free"),
    [
        (POOL, None, 50),
        (POOL, 100, 50),
        (POOL, 5, 25),  # what the pool holds unused is free, too
        ({"bytes_limit": 60, "bytes_in_use": 10}, 5, 5),
        ({}, 70, 70),  # XLA_PYTHON_CLIENT_ALLOCATOR=platform
        ({}, None, 0),
    ],
)
def test_free_memory_is_the_least_that_is_known(
    stats: dict[str, int], free_on_gpu: int | None, free: int
) -> None:
    """Of jax's allocator and the GPU's driver either may have nothing to tell.

    That is not a GPU without memory.
    """
    assert measure.free_bytes(stats, free_on_gpu) == free


def test_the_sample_has_the_ends_and_fits() -> None:
    """First and last query rows are always checked: slices begin and end there."""
    for shape in ("t=1,k=1", "t=2,k=1", "t=3,k=1", "b=64,t=256,h=16,s=65536,k=1"):
        rows = sample_rows(Workload.parse(shape))
        length = Workload.parse(shape).query_length
        assert {0, length - 1} <= set(rows.tolist()) <= set(range(length))


def test_what_is_lowered_once_is_the_same_program() -> None:
    """A plan's program and that for short timings are made from one tracing.

    Results and memory are those of the function itself.
    """
    inputs = WorkloadInputs(Workload.parse("b=2,t=96,h=4,k=8,kv_lengths=yes", mode="training"))
    plain, traced = inputs.function(Plan("xla", 0.1)), 0

    def function(*arguments: Any) -> Any:
        nonlocal traced
        traced += 1
        return plain(*arguments)

    once = measure.LoweredOnce(function, inputs.passed)
    compiled, _ = measure.compiled(once, inputs.passed)
    repeating = measure.repeated(once, inputs.passed)
    assert traced == 1
    expected = jax.jit(plain).lower(*inputs.passed).compile()
    assert measure.program_bytes(compiled) == measure.program_bytes(expected)
    wanted = expected(*inputs.passed)
    for program in (compiled, repeating):
        jax.tree.map(np.testing.assert_array_equal, program(*inputs.passed), wanted)


def test_xla_knows_how_repeats_are_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option for GPUs that this version does not know would be an error, here as there."""
    monkeypatch.setattr(measure, "_platform", lambda: "gpu")
    program = measure.repeated(lambda x: x + 1, (jax.numpy.ones(3),))
    np.testing.assert_array_equal(program(jax.numpy.ones(3)), np.full(3, 2.0))


def test_plans_run_as_they_are_where_jax_sees_several_devices() -> None:
    """The op slices over rows first there, lest sharded heads be gathered.

    What is measured is stored as the plan that it is.
    """
    code = """
import jax
from autochunk.plan import Plan
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.workload import Workload

assert jax.device_count() == 3
inputs = WorkloadInputs(Workload.parse("b=1,t=64,h=8,k=4", mode="training"))
for name in ("xla", "xla_rows"):
    function = inputs.function(Plan(name, 0.05))
    print("'xla'" in str(jax.make_jaxpr(function)(*inputs.passed)))
"""
    flags = "--xla_force_host_platform_device_count=3"
    assert run_python(code, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").split() == ["True", "False"]


def test_the_default_device_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is jax's default device is measured as a CPU, whatever else jax has."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        _, grown = measure.measure_growth(lambda: np.ones(2**24))
    assert grown is None or grown >= 8 * 2**24


def test_a_gpus_allocator_may_hand_out_more_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 128 MiB, where it would not split a piece; on a CPU what was taken counts in full."""
    assert measure.working_bytes(143, 268) == measure.working_bytes(268, 143) == 268
    monkeypatch.setattr(measure, "_platform", lambda: "gpu")
    assert measure.working_bytes(143 * 10**6, 268 * 10**6) == 143 * 10**6
    assert measure.working_bytes(143 * 10**6, 500 * 10**6) == 500 * 10**6 - 2**27
