"""A job that runs: started, listened to, and ended within a second."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from typing import Any

from autochunk import host
from autochunk.tuner.process import weigh_session, worker_command
from autochunk.watch.eyes import descendants

JOB = worker_command("autochunk.watch.job")

_MEASURING_ENDS_SECONDS = 0.4
_STORED_SECONDS = 20.0


class RunningJob:
    """A job's process.

    Args:
      job: what it is to do; goes by its input, for a storage's URL may have a password.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            JOB,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is the service's to handle
        )
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which is found out soon
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._results.put(json.loads(line))

    def ended(self, within: float) -> bool:
        """Whether it has ended, after waiting so many seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within)
        return self._process.poll() is not None

    def result(self) -> dict[str, Any]:
        """What came of it, once it has ended."""
        self._reader.join(timeout=5)
        self._close()
        results = list(self._results.queue)
        lost = {"result": "failed", "detail": f"its process ended with {self._process.returncode}"}
        return results[-1] if results else lost

    def end(self) -> float:
        """Ends what measures, lets the job store what was measured, and ends that, too.

        Returns the seconds after which nothing was measured any more.
        """
        start = time.monotonic()
        measuring = descendants(self._process.pid)
        for process in (*measuring, self._process.pid):
            # To end takes cores, too: one that whoever came leaves none keeps its memory.
            weigh_session(process, 0)
        self._process.terminate()
        while any(map(_runs, measuring)):
            if time.monotonic() - start > _MEASURING_ENDS_SECONDS:
                for process in measuring:
                    _kill(process)
            time.sleep(0.01)
        taken = time.monotonic() - start
        if not self.ended(_STORED_SECONDS):
            self._process.kill()
            self._process.wait()
        return taken

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _runs(process: int) -> bool:
    """Whether a process is there, and no zombie."""
    state = host.read(f"/proc/{process}/stat").rpartition(")")[2].split()[:1]
    return bool(state) and state != ["Z"]


def _kill(process: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGKILL)
