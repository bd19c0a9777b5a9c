"""The measuring process, which ``process.py`` starts: one JSON object a line in and out.

It compiles, checks and times plans of one workload, and may die doing so: the parent (``probe.py``)
takes a death for a result. Requests, in the order of a session, each with its reply, which is an
object with ``ok``, or ``error`` where the request itself was wrong; compiled programs are kept in
the folder ``programs`` for the next worker; ``time`` is one round, in the order given::

    {"do": "hello"}
        {"device": {...}, "available_bytes": n}
    {"do": "load", "workload": key, "programs": folder}
        {"argument_bytes": n, "dense_error": x}
    {"do": "prepare", "plan": [name, mb], "budget_bytes": n}
        {"status": ..., "detail": ..., "temp_bytes": n, "predicted_bytes": n, "measured_bytes": n,
         "compile_seconds": x, "error": x}
    {"do": "time", "plans": [[name, mb], ...]}
        {"seconds": [x, ...]}
    {"do": "drop", "plan": [name, mb]}
        {}
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from autochunk import device as devices
from autochunk.plan import Plan, slice_logits
from autochunk.store.profile import sliced_shape
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.tuner.measure import (
    Timed,
    available_bytes,
    measure_growth,
    program_bytes,
    working_bytes,
)
from autochunk.tuner.reference import dense_on_sample, reference, relative_error
from autochunk.workload import Workload

# A plan may err this many times as much as dense attention in the same dtype does, plus a few
# roundings.
ERROR_FACTOR = 4.0
ERROR_ROUNDINGS = 16.0


class Session:
    """Answers requests about one workload."""

    def __init__(self) -> None:
        self.inputs: WorkloadInputs | None = None
        self.references: list[np.ndarray[Any, Any]] = []
        self.error_limit = 0.0
        self.prepared: dict[Plan, Timed] = {}

    def hello(self) -> dict[str, Any]:
        """Where this process computes, and the memory it finds."""
        return {"device": devices.detect().model_dump(), "available_bytes": available_bytes()}

    def load(self, workload: str, programs: str) -> dict[str, Any]:
        """Makes a workload's arguments and what its results should be."""
        keep_programs(programs)
        parsed = Workload.parse(workload)
        # Without it jax computes in float32, with a warning at most.
        jax.config.update("jax_enable_x64", parsed.dtype == "float64")
        self.inputs = WorkloadInputs(parsed)
        self.references = reference(self.inputs)
        dense_error = relative_error(dense_on_sample(self.inputs), self.references)
        rounding = float(jnp.finfo(parsed.dtype).eps)
        self.error_limit = ERROR_FACTOR * dense_error + ERROR_ROUNDINGS * rounding
        argument_bytes = sum(x.nbytes for x in jax.tree.leaves(self.inputs.passed))
        return {"argument_bytes": argument_bytes, "dense_error": dense_error}

    def prepare(self, plan: list[Any], budget_bytes: int) -> dict[str, Any]:
        """Compiles a plan, and if it should fit runs and checks it once."""
        inputs = self._loaded()
        chosen = Plan(*plan)
        if refusal := inputs.refusal(chosen):
            return {"status": "unsupported", "detail": refusal[:2000]}
        result: dict[str, Any] = {}
        try:
            start = time.perf_counter()
            compiled = jax.jit(inputs.function(chosen)).lower(*inputs.passed).compile()
            compile_seconds = time.perf_counter() - start
            temp, out = program_bytes(compiled)
            result = {
                "compile_seconds": compile_seconds,
                "temp_bytes": temp,
                "predicted_bytes": temp,
            }
            needed = max(temp, self._least_working_bytes(chosen)) + out
            if needed > budget_bytes:
                allowed = f"{budget_bytes / 1e6:.0f} MB may be used"
                detail = f"needs about {needed / 1e6:.0f} MB, {allowed}"
                return result | {"status": "over_budget", "detail": detail}
            start = time.perf_counter()
            run = lambda: jax.block_until_ready(compiled(*inputs.passed))  # noqa: E731
            results, grown = measure_growth(run)
            first = time.perf_counter() - start
            deviation = relative_error(inputs.on_sample(results), self.references)
            del results
            timed = Timed.of(compiled, inputs.function(chosen), inputs.passed, first)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            return result | {"status": "oom", "detail": str(error)[:500]}
        if grown is not None:
            measured = max(0, grown - out)
            working = working_bytes(temp, measured)
            result |= {"measured_bytes": measured, "temp_bytes": working}
        result["error"] = min(deviation, 1e30)
        if not deviation <= self.error_limit:
            errs = f"errs by {deviation:.2g} of the largest value"
            detail = f"{errs}; {self.error_limit:.2g} is allowed"
            return result | {"status": "inaccurate", "detail": detail}
        self.prepared[chosen] = timed
        return result | {"status": "ok", "detail": ""}

    def _least_working_bytes(self, plan: Plan) -> int:
        """A guess from below at what XLA:CPU's fused kernels allocate without saying so.

        A quarter of a slice's logits.
        """
        shape = sliced_shape(self._loaded().workload)
        return slice_logits(plan, shape).chunk_bytes(shape) // 4

    def time(self, plans: list[list[Any]]) -> dict[str, Any]:
        """One round."""
        arguments = self._loaded().passed
        return {"seconds": [self.prepared[Plan(*plan)].seconds(arguments) for plan in plans]}

    def drop(self, plan: list[Any]) -> dict[str, Any]:
        """Lets a plan's program go."""
        self.prepared.pop(Plan(*plan), None)
        return {}

    def _loaded(self) -> WorkloadInputs:
        if self.inputs is None:
            raise ValueError("no workload is loaded")
        return self.inputs


def keep_programs(folder: str) -> None:
    """Keeps every program that is compiled in a folder, if one is given.

    One that another process has compiled is taken from there.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answers requests until there are no more."""
    session = Session()
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "hello": session.hello,
        "load": session.load,
        "prepare": session.prepare,
        "time": session.time,
        "drop": session.drop,
    }
    for line in requests:
        request = json.loads(line)
        try:
            reply = {"ok": True} | actions[request.pop("do")](**request)
        except Exception as error:  # a failure of one plan is the parent's to classify
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended.

    Busy with a plan, it would not see for long that no more requests come.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Keeps the real standard output for replies; what else is printed goes to standard error."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Set for debugging a model, it would have every plan run operation by operation.
    jax.config.update("jax_disable_jit", False)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
