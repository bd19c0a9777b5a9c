"""The parent's half of measuring: plans go to a worker process, and results come back.

The worker's death is a result, too. The parent never touches a device itself, so that a plan that
kills its process kills only the worker, and another one is started.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autochunk.device import Device
from autochunk.errors import ProbeError
from autochunk.functions import Tunable
from autochunk.plan import Plan
from autochunk.store.measurement import Status
from autochunk.tuner import autotuning
from autochunk.tuner.process import WORKER, WorkerFailure, WorkerProcess

# Share of the free memory that a plan may take: the rest is for what cannot be predicted.
SHARE_OF_FREE_MEMORY = 0.8

_START_SECONDS = 120.0

_ENVIRONMENT = {
    # A worker that took most of the GPU's memory at once could not tell what a plan needs, and
    # would leave none for other processes.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # NumPy computes what results should be while XLA compiles. Threads of a product that wait for
    # each other keep cores busy: with two, on two busy cores, that took three times as long.
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Prepared:
    """What became of compiling, checking and running a plan once; fields as in ``Measurement``."""

    status: Status
    detail: str = ""
    temp_bytes: int | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    compile_seconds: float | None = None
    error: float | None = None


class OutOfTime(Exception):
    """The deadline came while a worker was busy; the plan it was busy with is not to blame."""


class Probe:
    """Measures plans of one workload in a worker process; starts another when one is lost.

    Args:
      command: starts a worker.
      memory_budget_bytes: most working memory that a plan may take; None is a share of what is free
        when it is asked for.
      seconds_per_request: a worker that takes longer over one request is killed.
      environment: variables to set for the worker.

    Attributes:
      deadline: ``time.monotonic()`` time at which a request in progress is given up with OutOfTime;
        None waits as long as a request may take.
      compiled: plans whose programs the worker compiled as it turned to the workload, if any.
      seconds_to_start: that the last worker took until it was ready for a plan.
      abandoned: whether ``abandon`` was called.
    """

    def __init__(
        self,
        command: Sequence[str] = WORKER,
        *,
        memory_budget_bytes: int | None = None,
        seconds_per_request: float = 300.0,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.command = tuple(command)
        self.memory_budget_bytes = memory_budget_bytes
        self.seconds_per_request = seconds_per_request
        self.environment = _ENVIRONMENT | (environment or {})
        self._autotuning = autotuning.environment()
        self.deadline: float | None = None
        self.seconds_to_start = 0.0
        self.workload: Tunable | None = None
        self._ahead: list[Plan] = []
        self.compiled: frozenset[Plan] = frozenset()
        self.device: Device | None = None
        self._worker: WorkerProcess | None = None
        self._ready: dict[Plan, Prepared] = {}
        self._available = 0
        self._programs: tempfile.TemporaryDirectory[str] | None = None
        self.abandoned = False

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker and forgets the programs that it compiled."""
        self._stop()
        if self._programs is not None:
            self._programs.cleanup()
            self._programs = None

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def restart(self) -> None:
        """Has another worker do what is asked for next; plans are prepared in it as they come."""
        self._stop()

    def abandon(self) -> None:
        """Makes a request in progress in another thread, and every later one, raise OutOfTime."""
        self.abandoned = True
        worker = self._worker
        if worker is not None:
            worker.process.kill()

    def connect(self) -> Device:
        """Starts a worker if none runs, and says what device it found.

        Raises:
          ProbeError: no worker can be started.
        """
        if self._worker is None:
            self._start()
        assert self.device is not None
        return self.device

    def load(self, workload: Tunable, ahead: Sequence[Plan] = ()) -> None:
        """Turns to another workload; the last one's programs and memory are gone.

        ``ahead`` are plans that will be asked for: what takes long is begun.

        On a CPU that takes another worker, since what memory the last one used decides how fast a
        plan runs, and what it takes is seen by how the process grows.

        Raises:
          ProbeError: not even its arguments fit, or the worker fails on them.
        """
        died = self._worker is not None and self._worker.process.poll() is not None
        used = self.workload is not None and not self.is_accelerated
        if used or died:  # as one may that has nothing to do
            self.close()
        self.workload = workload
        self._ahead = list(ahead)
        self._start()

    def prepare(self, plan: Plan) -> Prepared:
        """Compiles, checks and runs a plan once, unless the worker has it ready.

        A failure is a result, not an error.
        """
        prepared = self._prepare(plan)
        got_to_run = prepared.temp_bytes is not None
        if prepared.status == "oom" and got_to_run and self.is_accelerated:
            # There should be memory for a program that got as far as being run, but compiling tries
            # kernels out, and jax's allocator then holds memory in pieces. A new worker finds the
            # program compiled.
            self._stop()
            prepared = replace(self._prepare(plan), compile_seconds=prepared.compile_seconds)
        return prepared

    def _prepare(self, plan: Plan) -> Prepared:
        try:
            self.connect()
            if plan in self._ready:
                return self._ready[plan]
            reply = self._ask("prepare", plan=plan.as_data(), budget_bytes=self._budget_bytes())
        except WorkerFailure as failure:
            return Prepared(failure.status, failure.detail)
        reply.pop("ok")
        prepared = Prepared(**reply)
        if prepared.status == "ok":
            self._ready[plan] = prepared
        return prepared

    def _budget_bytes(self) -> int:
        if self.memory_budget_bytes is not None:
            return self.memory_budget_bytes
        return int(self._available * SHARE_OF_FREE_MEMORY)

    def time(self, plans: Sequence[Plan]) -> list[float]:
        """Times each plan once, in this order; returns seconds per call.

        Plans that a new worker does not know are prepared first.

        Raises:
          WorkerFailure: the worker was lost, or a plan no longer runs.
        """
        self._make_ready(plans)
        reply = self._ask("time", plans=[plan.as_data() for plan in plans])
        return [float(seconds) for seconds in reply["seconds"]]

    def time_beside(self, plan: Plan, other: Plan, step: int) -> tuple[float, float]:
        """Times a plan and another in one round; returns the seconds of each.

        Which comes first alternates from step to step, so that what the first does to the second
        hits both alike. Raises as ``time`` does.
        """
        if step % 2:
            others, own = self.time([other, plan])
        else:
            own, others = self.time([plan, other])
        return own, others

    def _make_ready(self, plans: Sequence[Plan]) -> None:
        self.connect()
        # preparing one may take a new worker, which the others must then be prepared in
        for _ in range(2):
            for plan in dict.fromkeys(plans):
                if plan not in self._ready and (prepared := self.prepare(plan)).status != "ok":
                    raise WorkerFailure(prepared.status, prepared.detail)
        if missing := [plan for plan in plans if plan not in self._ready]:
            raise WorkerFailure(
                "oom",
                f"there is memory for {missing[0]}, but not beside the plans that it is timed with",
            )

    def drop(self, plan: Plan) -> None:
        """Lets a plan's program go."""
        if plan in self._ready and self._worker is not None:
            del self._ready[plan]
            self._ask("drop", plan=plan.as_data())

    def _start(self) -> None:
        start = time.monotonic()
        self._ready = {}
        if self._worker is None:
            self._worker = WorkerProcess(self.command, self._autotuning | self.environment)
        try:
            self._greet()
        except WorkerFailure as failure:
            if self.device is None and self._autotuning:
                self._autotuning = {}  # an XLA that does not know a flag ends its process
                self._start()
                return
            what = "start a measuring process"
            if self.workload is not None:
                what = f"measure {self.workload.key}"
            raise ProbeError(f"cannot {what}: {failure.detail}") from failure
        self.seconds_to_start = time.monotonic() - start

    def _greet(self) -> None:
        hello = self._ask("hello", within=_START_SECONDS)
        self.device = Device.model_validate(hello["device"])
        if self.workload is not None:
            programs = self._folder_of_programs()
            ahead = [plan.as_data() for plan in self._ahead]
            # for another worker of this workload there is nothing to hurry for
            self._ahead = []
            key = self.workload.key
            loaded = self._ask("load", workload=key, programs=programs, ahead=ahead)
            self._available = int(loaded["available_bytes"])
            self.compiled = frozenset(Plan(*plan) for plan in loaded["ahead"])

    @property
    def is_accelerated(self) -> bool:
        """Whether the worker computes on something else than a CPU."""
        return self.device is not None and self.device.platform != "cpu"

    def _folder_of_programs(self) -> str:
        """Where workers leave what they compiled for the next one.

        Empty where compiling is quick, or there is no place.
        """
        if self._programs is None and self.is_accelerated:
            with contextlib.suppress(OSError):
                self._programs = tempfile.TemporaryDirectory(
                    prefix="autochunk-", ignore_cleanup_errors=True
                )
        return self._programs.name if self._programs else ""

    def _ask(self, action: str, *, within: float | None = None, **request: Any) -> dict[str, Any]:
        assert self._worker is not None
        if self.abandoned:
            raise OutOfTime
        longest = min(within or self.seconds_per_request, seconds_left(self.deadline))
        try:
            reply = self._worker.ask({"do": action, **request}, max(0.0, longest))
        except WorkerFailure as failure:
            self._stop()
            late = failure.status == "timeout" and seconds_left(self.deadline) <= 0
            if self.abandoned or late:
                raise OutOfTime from None
            raise
        except BaseException:  # an interrupted worker may still answer the old request
            self._stop()
            raise
        if not reply.get("ok"):
            raise WorkerFailure("crashed", str(reply.get("error", "the worker gave no reason")))
        return reply


def seconds_left(deadline: float | None) -> float:
    """Seconds until a ``time.monotonic()`` deadline; infinite without one."""
    return float("inf") if deadline is None else deadline - time.monotonic()
