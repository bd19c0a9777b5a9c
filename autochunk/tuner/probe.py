"""The parent's half of measuring.

Starts a worker process, sends it plans, and makes a result of whatever comes back, its death
included.

The parent never touches a device itself: a plan that takes the process down takes the worker down.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autochunk.device import Device
from autochunk.errors import ProbeError
from autochunk.plan import Plan
from autochunk.store.profile import Status
from autochunk.workload import Workload

# With -P a user's copy.py or queue.py in the working directory is not imported; what is, installed
# or not, is the autochunk that runs here.
_RUN_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); import autochunk; del sys.path[0]; from "
    "autochunk.tuner.worker import main; main()"
)
WORKER = (sys.executable, "-P", "-c", _RUN_WORKER, str(Path(__file__).absolute().parents[2]))

# Share of the free memory that a plan may take: the rest is for what cannot be predicted.
SHARE_OF_FREE_MEMORY = 0.8

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Prepared:
    """What became of compiling, checking and running a plan once; fields as in ``Measurement``."""

    status: Status
    detail: str = ""
    temp_bytes: int | None = None
    measured_bytes: int | None = None
    compile_seconds: float | None = None
    error: float | None = None


class WorkerFailure(Exception):
    """The worker did not answer a request; carries the result that this is."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail


class OutOfTime(Exception):
    """The deadline came while a worker was busy; what it was busy with is not to blame."""


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
        # A worker that took most of the GPU's memory at once could not tell what a plan needs, and
        # would leave none for other processes.
        self.environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (environment or {})
        self.deadline: float | None = None
        self.workload: Workload | None = None
        self.device: Device | None = None
        self._worker: _Worker | None = None
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

    def load(self, workload: Workload) -> None:
        """Turns to another workload, in a worker that had none before.

        The last one's programs and memory are gone.

        Raises:
          ProbeError: not even its arguments fit, or the worker fails on them.
        """
        # or it has died while it had nothing to do
        if self.workload is not None or (
            self._worker is not None and self._worker.process.poll() is not None
        ):
            self.close()
        self.workload = workload
        self._start()

    def prepare(self, plan: Plan) -> Prepared:
        """Compiles, checks and runs a plan once, unless the worker has it ready.

        A failure is a result, not an error.
        """
        prepared = self._prepare(plan)
        if (
            prepared.status == "oom"
            and prepared.temp_bytes is not None
            and self.device is not None
            and self.device.platform != "cpu"
        ):
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
            budget = (
                self.memory_budget_bytes
                if self.memory_budget_bytes is not None
                else int(self._available * SHARE_OF_FREE_MEMORY)
            )
            reply = self._ask("prepare", plan=wire(plan), budget_bytes=budget)
        except WorkerFailure as failure:
            return Prepared(failure.status, failure.detail)
        reply.pop("ok")
        prepared = Prepared(**reply)
        if prepared.status == "ok":
            self._ready[plan] = prepared
        return prepared

    def time(self, plans: Sequence[Plan]) -> list[float]:
        """Times each plan once, in this order.

        Seconds per call. Plans that a new worker does not know are prepared first.

        Raises:
          WorkerFailure: the worker was lost, or a plan no longer runs.
        """
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
        return [
            float(seconds)
            for seconds in self._ask("time", plans=[wire(plan) for plan in plans])["seconds"]
        ]

    def drop(self, plan: Plan) -> None:
        """Lets a plan's program go."""
        if plan in self._ready and self._worker is not None:
            del self._ready[plan]
            self._ask("drop", plan=wire(plan))

    def _start(self) -> None:
        if self._worker is None:
            self._worker, self._ready = _Worker(self.command, self.environment), {}
        try:
            hello = self._ask("hello", within=_START_SECONDS)
            self.device, self._available = (
                Device.model_validate(hello["device"]),
                int(hello["available_bytes"]),
            )
            if self.workload is not None:
                loaded = self._ask(
                    "load", workload=self.workload.key, programs=self._folder_of_programs()
                )
                self._available -= int(loaded["argument_bytes"])
        except WorkerFailure as failure:
            what = (
                f"cannot measure {self.workload.key}"
                if self.workload
                else "cannot start a measuring process"
            )
            raise ProbeError(f"{what}: {failure.detail}") from failure

    def _folder_of_programs(self) -> str:
        """Where workers leave what they compiled for the next one.

        Empty where compiling is quick, or there is no place.
        """
        if self._programs is None and self.device is not None and self.device.platform != "cpu":
            with contextlib.suppress(OSError):
                self._programs = tempfile.TemporaryDirectory(
                    prefix="autochunk-", ignore_cleanup_errors=True
                )
        return self._programs.name if self._programs else ""

    def _ask(self, action: str, *, within: float | None = None, **request: Any) -> dict[str, Any]:
        assert self._worker is not None
        if self.abandoned:
            raise OutOfTime
        left = seconds_left(self.deadline)
        try:
            reply = self._worker.ask(
                {"do": action, **request}, max(0.0, min(within or self.seconds_per_request, left))
            )
        except WorkerFailure as failure:
            self._stop()
            if self.abandoned or (failure.status == "timeout" and seconds_left(self.deadline) <= 0):
                raise OutOfTime from None
            raise
        except BaseException:  # an interrupted worker may still answer the old request
            self._stop()
            raise
        if not reply.get("ok"):
            raise WorkerFailure("crashed", str(reply.get("error", "the worker gave no reason")))
        return reply


def wire(plan: Plan) -> list[Any]:
    """A plan as JSON data."""
    return [plan.implementation, plan.max_chunk_size_mb]


class _Worker:
    """One worker process and the lines that it has answered."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        except OSError as error:
            raise ProbeError(f"cannot start {command[0]}: {error}") from error
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._complaints: collections.deque[str] = collections.deque(maxlen=20)
        self._readers = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read_lines, self._read_complaints)
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        self._complaints.extend(line.rstrip() for line in self.process.stderr)

    def ask(self, request: dict[str, Any], within: float) -> dict[str, Any]:
        """Sends a request and waits for its reply.

        Raises:
          WorkerFailure: it died, took too long, or wrote something else.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._death() from None
        try:
            line = self._lines.get(timeout=within)
        except queue.Empty:
            raise WorkerFailure("timeout", f"no answer within {within:g} s") from None
        if line is None:
            raise self._death()
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise WorkerFailure(
                "crashed", f"the measuring process wrote {line[:200]!r} instead of a reply"
            )
        return reply

    def _death(self) -> WorkerFailure:
        try:
            code = self.process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerFailure(
                "crashed", "the measuring process closed its output and went on running"
            )
        self._readers[1].join(timeout=1)
        said = "; ".join([line for line in self._complaints if line.strip()][-3:])[-500:]
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            # The kernel's out-of-memory killer sends SIGKILL; a person may too, and nothing in the
            # process can tell them apart.
            why = " (most likely the kernel, out of memory)" if code == -signal.SIGKILL else ""
            return WorkerFailure(
                "crashed",
                f"the measuring process was ended by {name}{why}{': ' + said if said else ''}",
            )
        return WorkerFailure(
            "crashed",
            f"the measuring process ended with exit status {code}{': ' + said if said else ''}",
        )

    def stop(self) -> None:
        """Ends the process, by force if it does not go."""
        if self.process.poll() is None:
            self.process.kill()  # it holds nothing that wants saving
        self.process.wait()
        for reader in self._readers:
            reader.join(timeout=1)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            # what was still to be written goes nowhere
            with contextlib.suppress(OSError, AttributeError):
                stream.close()  # type: ignore[union-attr]


def seconds_left(deadline: float | None) -> float:
    """Seconds until a ``time.monotonic()`` deadline; infinite without one."""
    return float("inf") if deadline is None else deadline - time.monotonic()
