"""One measuring process as its parent sees it: requests and replies, and how it ended."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autochunk.errors import ProbeError
from autochunk.store.measurement import Status

_PACKAGE_PARENT = str(Path(__file__).absolute().parents[2])


def worker_command(module: str) -> tuple[str, ...]:
    """The command that starts a worker: a module's ``main``.

    With -P a user's copy.py or queue.py in the working directory is not imported; what is,
    installed or not, is the autochunk that runs here.
    """
    run = (
        "import sys; sys.path.insert(0, sys.argv[1]); import autochunk; del sys.path[0]; "
        f"from {module} import main; main()"
    )
    return (sys.executable, "-P", "-c", run, _PACKAGE_PARENT)


WORKER = worker_command("autochunk.tuner.worker")
"""Starts one that measures attention."""

_STOP_SECONDS = 5.0
_NICEST_SESSION = 10


class WorkerFailure(Exception):
    """The worker did not answer a request; carries the result that this is."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail


class WorkerProcess:
    """One worker process and the lines that it has answered.

    Raises:
      ProbeError: the command cannot be run.
    """

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
        _make_likelier_victim(self.process.pid)
        weigh_session(self.process.pid)
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
        self._send(request)
        try:
            line = self._lines.get(timeout=within)
        except queue.Empty:
            raise WorkerFailure("timeout", f"no answer within {within:g} s") from None
        if line is None:
            raise self._death()
        return _parsed(line)

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._death() from None

    def _death(self) -> WorkerFailure:
        try:
            code = self.process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerFailure(
                "crashed", "the measuring process closed its output and went on running"
            )
        self._readers[1].join(timeout=1)
        said = "; ".join([line for line in self._complaints if line.strip()][-3:])[-500:]
        last_words = f": {said}" if said else ""
        return WorkerFailure("crashed", f"the measuring process {_ending(code)}{last_words}")

    def stop(self) -> None:
        """Ends the process, by force if it does not go."""
        if self.process.poll() is None:
            self.process.kill()  # it holds nothing that wants saving
        self.process.wait()
        for reader in self._readers:
            reader.join(timeout=1)
        streams = (self.process.stdin, self.process.stdout, self.process.stderr)
        for stream in filter(None, streams):
            with contextlib.suppress(OSError):  # what was still to be written goes nowhere
                stream.close()


def _make_likelier_victim(process: int) -> None:
    """Makes the kernel kill this process first when memory runs out.

    Its death is a result; that of its parent, or of another program, a loss.
    """
    with contextlib.suppress(OSError):  # another system, or the process has ended
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")


def weigh_session(process: int, niceness: int | None = None) -> None:
    """Gives the session that a process leads the share of the cores that a niceness says.

    None is the process's own, 10 at most: a tenth of what another program has, for one that has
    less does not get to storing what it measured.

    Linux shares cores among sessions first (autogroups, see sched(7)) and by niceness only within
    one: of a session of its own the nicest process takes half of what another program needs.
    """
    with contextlib.suppress(OSError):  # another system, no autogroups, or the process has ended
        if niceness is None and hasattr(os, "getpriority"):
            niceness = min(os.getpriority(os.PRIO_PROCESS, process), _NICEST_SESSION)
        Path(f"/proc/{process}/autogroup").write_text(str(niceness or 0))


def _parsed(line: str) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise WorkerFailure(
            "crashed", f"the measuring process wrote {line[:200]!r} instead of a reply"
        )
    return reply


def _ending(code: int) -> str:
    """How a process ended that has this exit code, as subprocess gives it."""
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    # The kernel's out-of-memory killer sends SIGKILL; a person may too, and nothing in the process
    # can tell them apart.
    why = " (most likely the kernel, out of memory)" if code == -signal.SIGKILL else ""
    return f"was ended by {name}{why}"
