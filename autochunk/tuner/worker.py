"""The measuring process, which ``process.py`` starts: one JSON object a line in and out.

It compiles, checks and times plans of a workload, and may die doing so: the parent (``probe.py``)
takes a death for a result. Requests, in the order of a session, each with its reply, which is an
object with ``ok``, or ``error`` where the request itself was wrong; compiled programs are kept in
the folder ``programs`` for the next worker; ``time`` is one round, in the order given::

    {"do": "hello"}
        {"device": {...}}
    {"do": "load", "workload": key, "programs": folder, "ahead": [[name, mb], ...]}
        {"available_bytes": n, "ahead": [[name, mb], ...]}
    {"do": "prepare", "plan": [name, mb], "budget_bytes": n}
        {"status": ..., "detail": ..., "temp_bytes": n, "predicted_bytes": n, "measured_bytes": n,
         "compile_seconds": x, "error": x}
    {"do": "time", "plans": [[name, mb], ...]}
        {"seconds": [x, ...]}
    {"do": "drop", "plan": [name, mb]}
        {}
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from autochunk import device as devices
from autochunk.implementations import IMPLEMENTATIONS, is_fused
from autochunk.plan import Plan, slice_logits
from autochunk.store.profile import sliced_shape
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.tuner.measure import (
    LoweredOnce,
    Timed,
    available_bytes,
    compiled,
    measure_growth,
    program_bytes,
    repeated,
    working_bytes,
)
from autochunk.tuner.reference import (
    dense_on_sample,
    error_of_products,
    error_of_rounded_products,
    reference,
    relative_error,
)
from autochunk.workload import Workload

# A plan may err this many times as much as dense attention in the same dtype does, plus what fused
# kernels' rounded products come to and a few roundings.
ERROR_FACTOR = 4.0
ERROR_ROUNDINGS = 16.0

# Of the plans that are no fused kernels, so many are measured whatever the others come to: the
# likely slices, and what users compare with.
_OTHERS_AHEAD = 3
# What has no more logits may take so little time on a GPU (an H100 was measured) that a program is
# timed that repeats it; what has more may, too, but then that is compiled when it is seen.
_SHORT_LOGITS_BYTES = 256 * 2**20
_SHORT_LOGITS_BYTES_OF_KERNELS = 2560 * 2**20
_TIMES = {"forward": 1, "training": 4}  # as much


_Compiled = tuple[Any, float]
"""A program, and the seconds that it took to compile."""
_Compilers = tuple[Callable[[], _Compiled], Callable[[], Any]]
"""What gives a plan's program, and that for short timings."""


class _Expected:
    """What a workload's results should be, and by how much they may err."""

    def __init__(self, inputs: WorkloadInputs) -> None:
        self.results = reference(inputs)
        of_dense = relative_error(dense_on_sample(inputs), self.results)
        of_products = error_of_products(inputs)
        of_kernels = error_of_rounded_products(inputs, self.results, of_products)
        usual = ERROR_FACTOR * max(of_dense, of_products) + of_kernels
        rounding = float(jnp.finfo(inputs.workload.dtype).eps)
        self.error_limit = usual + ERROR_ROUNDINGS * rounding


class Session:
    """Answers requests about one workload after the other."""

    def __init__(self) -> None:
        self.inputs: WorkloadInputs | None = None
        self.prepared: dict[Plan, Timed] = {}
        self.expected: Future[_Expected] | None = None
        # Where an accelerator computes there are cores left for what can be done meanwhile.
        self._aside = ThreadPoolExecutor(16)
        self._ahead: dict[Plan, _Compilers] = {}
        self._begun: list[Future[Any]] = []

    def hello(self) -> dict[str, Any]:
        """Where this process computes."""
        device = devices.detect()
        here = (one for one in IMPLEMENTATIONS.values() if one.runs_on(device.platform))
        for library in {one.extra for one in here if one.extra and one.installed}:
            self._aside.submit(importlib.import_module, library)  # takes seconds
        return {"device": device.model_dump()}

    def load(self, workload: str, programs: str, ahead: Sequence[list[Any]] = ()) -> dict[str, Any]:
        """Makes a workload's arguments and what its results should be; the last one's go.

        Programs of the plans ``ahead`` that are surely asked for are compiled meanwhile, or found
        to be refused; the reply says which.
        """
        self._settle()
        self.inputs, self.expected, self.prepared = None, None, {}
        self._ahead, self._begun = {}, []
        jax.clear_caches()
        available = available_bytes()
        keep_programs(programs)
        parsed = Workload.parse(workload)
        # Without it jax computes in float32, with a warning at most.
        jax.config.update("jax_enable_x64", parsed.dtype == "float64")
        self.inputs = WorkloadInputs(parsed)
        self.expected = self._aside.submit(_Expected, self.inputs)
        if self._is_accelerated():
            self._compile_ahead([Plan(*plan) for plan in ahead])
        else:
            self.expected.result()
        argument_bytes = sum(x.nbytes for x in jax.tree.leaves(self.inputs.passed))
        begun = [plan.as_data() for plan in self._ahead]
        return {"available_bytes": available - argument_bytes, "ahead": begun}

    def _is_accelerated(self) -> bool:
        return str(devices.default_device().platform) != "cpu"

    def _compile_ahead(self, plans: list[Plan]) -> None:
        """Begins fused kernels, which take seconds of Python, and then what XLA does beside.

        Later ones would be tried out by XLA on the device that another is measured on.
        """
        inputs = self._loaded()
        logits_bytes = inputs.workload.logits_bytes * _TIMES[inputs.workload.mode]
        for plan in plans:
            if is_fused(plan.implementation):
                self._begin(plan, is_short=logits_bytes < _SHORT_LOGITS_BYTES_OF_KERNELS)
        others = [plan for plan in plans if not is_fused(plan.implementation)]
        for plan in others[:_OTHERS_AHEAD]:
            self._begin(plan, is_short=logits_bytes < _SHORT_LOGITS_BYTES)

    def _begin(self, plan: Plan, *, is_short: bool) -> None:
        inputs, (once, repeating) = self._loaded(), self._compilers(plan)

        def both() -> tuple[_Compiled, Any]:
            # A kernel that refuses the call late is lowered for that, which takes seconds.
            if refusal := inputs.refusal(plan):
                raise ValueError(refusal)
            # One after the other: the second finds what XLA tried out for the first.
            return once(), repeating() if is_short else None

        begun = self._aside.submit(both)
        self._begun.append(begun)
        several = (lambda: begun.result()[1]) if is_short else repeating
        self._ahead[plan] = (lambda: begun.result()[0]), several

    def _settle(self) -> None:
        """Waits until nothing is compiled aside, which would disturb what is timed."""
        wait(self._begun)

    def prepare(self, plan: list[Any], budget_bytes: int) -> dict[str, Any]:
        """Compiles a plan, and if it should fit runs and checks it once."""
        inputs = self._loaded()
        chosen = Plan(*plan)
        if refusal := inputs.refusal(chosen):
            return {"status": "unsupported", "detail": refusal[:2000]}
        result: dict[str, Any] = {}
        once, repeating = self._programs(chosen)
        assert self.expected is not None
        try:
            program, compile_seconds = once()
            temp, out = program_bytes(program)
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
            expected = self.expected.result()
            start = time.perf_counter()
            run = lambda: jax.block_until_ready(program(*inputs.passed))  # noqa: E731
            results, grown = measure_growth(run)
            first = time.perf_counter() - start
            deviation = relative_error(inputs.on_sample(results), expected.results)
            del results
            timed = Timed.of(program, repeating, inputs.passed, first)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            return result | {"status": "oom", "detail": str(error)[:500]}
        if grown is not None:
            measured = max(0, grown - out)
            working = working_bytes(temp, measured)
            result |= {"measured_bytes": measured, "temp_bytes": working}
        result["error"] = min(deviation, 1e30)
        if not deviation <= expected.error_limit:
            errs = f"errs by {deviation:.2g} of the largest value"
            detail = f"{errs}; {expected.error_limit:.2g} is allowed"
            return result | {"status": "inaccurate", "detail": detail}
        self.prepared[chosen] = timed
        return result | {"status": "ok", "detail": ""}

    def _programs(self, plan: Plan) -> _Compilers:
        """What gives a plan's program, and that for short timings, with nothing compiled aside."""
        self._settle()  # all that was begun, before any of it is taken
        return self._ahead.pop(plan) if plan in self._ahead else self._compilers(plan)

    def _compilers(self, plan: Plan) -> _Compilers:
        inputs = self._loaded()
        function: Callable[..., Any] = inputs.function(plan)
        if is_fused(plan.implementation):
            function = LoweredOnce(function, inputs.passed)
        return (
            functools.partial(compiled, function, inputs.passed),
            functools.partial(repeated, function, inputs.passed),
        )

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


def serve(requests: TextIO, replies: TextIO, session: Any = None) -> None:
    """Answers requests until there are no more, by a session's methods of the same names."""
    session = session or Session()
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
    """Serves what the parent asks for of attention."""
    run_worker(Session())


def run_worker(session: Any) -> None:
    """Keeps the real standard output for replies; what else is printed goes to standard error."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Set for debugging a model, it would have every plan run operation by operation.
    jax.config.update("jax_disable_jit", False)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies, session)
