"""The measuring process: arguments, the reference, checks, memory and times. In this process, by real JAX."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import run_python

from autochunk.plan import Plan
from autochunk.tuner import worker
from autochunk.workload import Workload

SHAPES = [
    "b=2,t=33,s=17,h=4,kv_heads=2,k=8,v=5",
    "b=1,t=1,s=1,h=1,k=1",
    "b=3,t=20,h=2,k=4,causal=yes",
    "b=2,t=12,s=9,h=2,k=4,mask=b1ts,bias=1hts",
    "b=2,t=12,s=9,h=2,k=4,causal=yes,mask=b11s,bias=b1t1",
]


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """A session that loads a float64 workload turns float64 on for its process, which here is the tests' own."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_agrees_with_the_float64_reference(shape: str, mode: str, dtype: str) -> None:
    """Right plans pass the check, for every kind of mask and bias, in every dtype."""
    if dtype != "float32" and shape not in SHAPES[::3]:
        pytest.skip("one dtype is enough for the others")
    session = worker.Session()
    loaded = session.load(Workload.parse(shape, dtype=dtype, mode=mode).key, "")
    reply = session.prepare(["xla", 0.001], 10**9)
    assert reply["status"] == "ok", reply
    assert 0 <= reply["error"] <= worker.ERROR_FACTOR * loaded["dense_error"] + worker.ERROR_ROUNDINGS * float(jnp.finfo(dtype).eps)


def test_a_workload_is_measured_in_its_own_dtype() -> None:
    """Also float64, which jax makes float32 of unless it is enabled; the next workload is not float64 for it."""
    session = worker.Session()
    for dtype in ("float64", "float32"):
        session.load(Workload.parse("t=8,k=2", dtype=dtype, mode="training").key, "")
        assert session.inputs is not None
        assert {str(x.dtype) for x in session.inputs.arguments} == {dtype}


def test_a_wrong_result_is_inaccurate() -> None:
    """A plan whose results differ from the reference cannot win, whatever its speed."""
    session = worker.Session()
    session.load(Workload.parse("b=1,t=16,h=2,k=4", mode="training").key, "")
    session.references[2] = session.references[2] + 1.0  # the key's gradient, as a kernel might get it wrong
    reply = session.prepare(["xla", None], 10**9)
    assert reply["status"] == "inaccurate"
    assert "errs by" in reply["detail"]
    with pytest.raises(KeyError):
        session.time([["xla", None]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_infinite(bad: float) -> None:
    """NaN compares as false, so it must not pass for a small error."""
    assert worker.relative_error([np.array([1.0, bad])], [np.array([1.0, 2.0])]) == math.inf


def test_a_plan_over_the_budget_is_not_run() -> None:
    """What would not fit is told from its program alone."""
    session = worker.Session()
    session.load(Workload.parse("b=1,t=512,h=2,k=8").key, "")
    reply = session.prepare(["dense", None], 10_000)
    assert reply["status"] == "over_budget"
    assert "error" not in reply


def test_memory_is_at_least_what_the_process_grew_by() -> None:
    """Growth of the process is seen to within a few MB, whatever was allocated and freed before."""
    np.ones(2**26)  # freed at once
    array, grown = worker.measure_growth(lambda: np.ones(2**23))
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
def test_free_memory_is_the_least_that_is_known(stats: dict[str, int], free_on_gpu: int | None, free: int) -> None:
    """Of jax's allocator and the GPU's driver either may have nothing to tell; that is not a GPU without memory."""
    assert worker.free_bytes(stats, free_on_gpu) == free


def test_times_come_in_the_order_asked_for() -> None:
    """One round gives one time for each plan named, repeats included."""
    session = worker.Session()
    session.load(Workload.parse("b=1,t=64,h=2,k=8").key, "")
    for plan in (["xla", None], ["dense", None]):
        assert session.prepare(list(plan), 10**9)["status"] == "ok"
    seconds = session.time([["xla", None], ["dense", None], ["xla", None]])["seconds"]
    assert len(seconds) == 3
    assert all(second > 0 for second in seconds)
    session.drop(["dense", None])
    assert list(session.prepared) == [Plan("xla", None)]


def test_the_sample_has_the_ends_and_fits() -> None:
    """First and last query rows are always checked: slices begin and end there."""
    for shape in ("t=1,k=1", "t=2,k=1", "t=3,k=1", "b=64,t=256,h=16,s=65536,k=1"):
        rows = worker.sample_rows(Workload.parse(shape))
        length = Workload.parse(shape).query_length
        assert {0, length - 1} <= set(rows.tolist()) <= set(range(length))


def test_requests_are_answered_line_by_line_and_bad_ones_told() -> None:
    """A request that fails is answered with the error; the session goes on."""
    requests = [{"do": "time", "plans": []}, {"do": "load", "workload": "attention:nonsense"}, {"do": "fly"}, {"do": "hello"}]
    replies = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    answers: list[dict[str, Any]] = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [answer["ok"] for answer in answers] == [False, False, False, True]
    assert "no workload is loaded" in answers[0]["error"]
    assert answers[3]["device"]["platform"] == jax.default_backend()


def test_a_worker_ends_with_its_parent() -> None:
    """Also one that does not see its input end, as while it is busy with a plan: here it holds the other end itself."""
    parent = """
import os, subprocess, sys
from autochunk.tuner.probe import WORKER
requests, other_end = os.pipe()
worker = subprocess.Popen(WORKER, stdin=requests, stdout=subprocess.PIPE, stderr=sys.stdout, pass_fds=[other_end], start_new_session=True)
os.write(other_end, b'{"do": "hello"}\\n')
print(worker.stdout.readline().decode(), flush=True)
os._exit(0)
"""
    assert '"ok": true' in run_python(parent)  # which reads until the worker, too, has closed the output


def test_plans_run_as_they_are_where_jax_sees_several_devices() -> None:
    """The op slices over rows first there, lest sharded heads be gathered; what is measured is stored as the plan that it is."""
    code = """
import jax
from autochunk.plan import Plan
from autochunk.tuner.worker import Inputs
from autochunk.workload import Workload

assert jax.device_count() == 3
inputs = Inputs(Workload.parse("b=1,t=64,h=8,k=4", mode="training"))
texts = [str(jax.make_jaxpr(inputs.function(Plan(name, 0.05)))(*inputs.arguments)) for name in ("xla", "xla_rows")]
print("'xla'" in texts[0], "'xla'" in texts[1])
"""
    assert run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=3", JAX_PLATFORMS="cpu").split() == ["True", "False"]


def test_the_default_device_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU that is jax's default device memory and time are taken as a CPU's are, whatever else jax has."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        _, grown = worker.measure_growth(lambda: np.ones(2**24))
    assert grown is None or grown >= 8 * 2**24
