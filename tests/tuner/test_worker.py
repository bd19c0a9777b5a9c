"""The measuring process: what it answers, and when it ends. Mostly in this process, by real JAX."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
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
    """Loading a float64 workload turns float64 on for the whole process, here the tests' own."""
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
    session.load(Workload.parse(shape, dtype=dtype, mode=mode).key, "")
    reply = session.prepare(["xla", 0.001], 10**9)
    assert reply["status"] == "ok", reply
    assert session.expected is not None
    assert 0 <= reply["error"] <= session.expected.result().error_limit
    roundings = worker.ERROR_ROUNDINGS * float(jnp.finfo(dtype).eps)
    assert roundings <= session.expected.result().error_limit < 0.3


def test_a_workload_is_measured_in_its_own_dtype() -> None:
    """Also float64, which jax makes float32 of unless it is enabled.

    The next workload is not float64 for it.
    """
    session = worker.Session()
    for dtype in ("float64", "float32"):
        session.load(Workload.parse("t=8,k=2", dtype=dtype, mode="training").key, "")
        assert session.inputs is not None
        assert {str(x.dtype) for x in session.inputs.arguments.present.values()} == {dtype}


def test_a_wrong_result_is_inaccurate() -> None:
    """A plan whose results differ from the reference cannot win, whatever its speed."""
    session = worker.Session()
    session.load(Workload.parse("b=1,t=16,h=2,k=4", mode="training").key, "")
    # The key's gradient, as a kernel might get it wrong.
    assert session.expected is not None
    session.expected.result().results[2] += 1.0
    reply = session.prepare(["xla", None], 10**9)
    assert reply["status"] == "inaccurate"
    assert "errs by" in reply["detail"]
    with pytest.raises(KeyError):
        session.time([["xla", None]])


@pytest.mark.gpu
def test_rounded_products_are_not_inaccurate() -> None:
    """In float32 the first rows of a window err by TF32 far more in slices than in dense attention.

    So does every fused kernel, and dense attention of long sequences does not fit.
    """
    session = worker.Session()
    session.load(Workload.parse("t=4096,h=4,k=64,window=511:0", mode="training").key, "")
    for plan in (["xla", 16.8], ["dense", None]):
        assert session.prepare(plan, 10**10)["status"] == "ok"


def test_a_plan_over_the_budget_is_not_run() -> None:
    """What would not fit is told from its program alone."""
    session = worker.Session()
    session.load(Workload.parse("b=1,t=512,h=2,k=8").key, "")
    reply = session.prepare(["dense", None], 10_000)
    assert reply["status"] == "over_budget"
    assert "error" not in reply


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


def test_requests_are_answered_line_by_line_and_bad_ones_told() -> None:
    """A request that fails is answered with the error; the session goes on."""
    requests = [
        {"do": "time", "plans": []},
        {"do": "load", "workload": "attention:nonsense"},
        {"do": "fly"},
        {"do": "hello"},
    ]
    replies, lines = io.StringIO(), [json.dumps(request) + "\n" for request in requests]
    worker.serve(io.StringIO("".join(lines)), replies)
    answers: list[dict[str, Any]] = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [answer["ok"] for answer in answers] == [False, False, False, True]
    assert "no workload is loaded" in answers[0]["error"]
    assert answers[3]["device"]["platform"] == jax.default_backend()


def test_a_worker_ends_with_its_parent() -> None:
    """Also one that does not see its input end, as while it is busy with a plan.

    Here it holds the other end itself.
    """
    parent = """
import os, subprocess, sys
from autochunk.tuner.process import WORKER
requests, other_end = os.pipe()
worker = subprocess.Popen(
    WORKER,
    stdin=requests,
    stdout=subprocess.PIPE,
    stderr=sys.stdout,
    pass_fds=[other_end],
    start_new_session=True,
)
os.write(other_end, b'{"do": "hello"}\\n')
print(worker.stdout.readline().decode(), flush=True)
os._exit(0)
"""
    # It reads until the worker, too, has closed the output.
    assert '"ok": true' in run_python(parent)
