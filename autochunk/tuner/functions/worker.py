"""The measuring process of functions, with the requests and replies of ``tuner/worker.py``.

The program is the file that PROGRAM_VARIABLE names, the workload its call; a plan has sizes of
chunks as a third item.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from autochunk import device as devices
from autochunk.functions import FunctionCall
from autochunk.plan import Plan
from autochunk.store import programs
from autochunk.tuner.functions.subject import Subject, as_numbers, deviation, of_program
from autochunk.tuner.measure import (
    Timed,
    available_bytes,
    compiled,
    measure_growth,
    program_bytes,
    repeated,
    working_bytes,
)
from autochunk.tuner.worker import keep_programs, run_worker

PROGRAM_VARIABLE = "AUTOCHUNK_PROGRAM"

MIXES = (
    "results differ from those of the whole call by {error:.2g} of their size, where "
    "{allowed:.2g} is allowed: the function mixes positions along the chunked axis (as a "
    "normalisation over it does), or reduces in another way than `reduce` says"
)


class Session:
    """Answers requests about one function."""

    def __init__(self) -> None:
        self.subject: Subject | None = None
        self.prepared: dict[Plan, Timed] = {}
        self.expected: list[np.ndarray[Any, Any]] | None = None

    def hello(self) -> dict[str, Any]:
        """Where this process computes."""
        return {"device": devices.detect().model_dump()}

    def load(self, workload: str, programs: str, ahead: Sequence[Any] = ()) -> dict[str, Any]:
        """Reads the program and makes its arguments."""
        del ahead  # nothing is compiled before it is asked for
        call = FunctionCall.parse(workload)
        available = available_bytes()
        self._configure(call, programs)
        self.subject = self._make(call)
        self.expected, self.prepared = None, {}
        taken = sum(one.nbytes for one in jax.tree.leaves(self.subject.passed))
        return {"available_bytes": available - taken, "ahead": []}

    def _configure(self, call: FunctionCall, programs: str) -> None:
        keep_programs(programs)
        jax.config.update("jax_enable_x64", "64[" in call.arguments)

    def _make(self, call: FunctionCall) -> Subject:
        path = Path(os.environ[PROGRAM_VARIABLE])
        return Subject(*of_program(*programs.read(path)), call.mode)

    def prepare(self, plan: list[Any], budget_bytes: int) -> dict[str, Any]:
        """Compiles a plan, and if it should fit runs it, and compares with the first that ran."""
        subject, chosen = self._loaded(), plan_of(plan)
        function = subject.function(chosen)
        result: dict[str, Any] = {}
        try:
            program, seconds = compiled(function, subject.passed)
            temp, out = program_bytes(program)
            result = {"compile_seconds": seconds, "temp_bytes": temp, "predicted_bytes": temp}
            if temp + out > budget_bytes:
                allowed = f"{budget_bytes / 1e6:.0f} MB may be used"
                detail = f"needs about {(temp + out) / 1e6:.0f} MB, {allowed}"
                return result | {"status": "over_budget", "detail": detail}
            start = time.perf_counter()
            run = lambda: jax.block_until_ready(program(*subject.passed))  # noqa: E731
            results, grown = measure_growth(run)
            first = time.perf_counter() - start
            numbers = as_numbers(results)
            del results
            repeating = functools.partial(repeated, function, subject.passed)
            timed = Timed.of(program, repeating, subject.passed, first)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            return result | {"status": "oom", "detail": str(error)[:500]}
        if grown is not None:
            measured = max(0, grown - out)
            result |= {"measured_bytes": measured, "temp_bytes": working_bytes(temp, measured)}
        if self.expected is None:
            self.expected = numbers
        apart, allowed_error = deviation(numbers, self.expected), subject.tolerance
        result["error"] = min(apart, 1e30)
        if not apart <= allowed_error:
            detail = MIXES.format(error=apart, allowed=allowed_error)
            return result | {"status": "inaccurate", "detail": detail}
        self.prepared[chosen] = timed
        return result | {"status": "ok", "detail": ""}

    def time(self, plans: list[list[Any]]) -> dict[str, Any]:
        """One round."""
        arguments = self._loaded().passed
        return {"seconds": [self.prepared[plan_of(one)].seconds(arguments) for one in plans]}

    def drop(self, plan: list[Any]) -> dict[str, Any]:
        """Lets a plan's program go."""
        self.prepared.pop(plan_of(plan), None)
        return {}

    def _loaded(self) -> Subject:
        if self.subject is None:
            raise ValueError("no function is loaded")
        return self.subject


def plan_of(data: Sequence[Any]) -> Plan:
    """The plan of what ``Plan.as_data`` gives, read from JSON."""
    name, limit, *sizes = data
    return Plan(name, limit, tuple(sizes[0])) if sizes else Plan(name, limit)


def main() -> None:
    """Serves what the parent asks for."""
    run_worker(Session())
