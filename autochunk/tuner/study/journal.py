"""A journal: a file of Optuna's operations, each a line of JSON, that many workers append to.

Optuna's own reader ends for good at a line that is not whole. Such are left by a worker that is
killed in mid-write, or whose disk is full, and what the next one appends is joined to it. Here a
line is looked through for whole operations, and nothing is taken out of the file, which others may
be writing to: all workers see the same operations, in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

# A killed process leaves its lock behind. Nobody holds one for longer than it takes to append a
# line.
_LOCK_SECONDS = 2
_OPERATION = '{"op_code":'
# What a power cut, or a network file system, may leave in place of what was written last.
_NOTHING = b"\0 \t\r\n"


class JournalFile(BaseJournalBackend):
    """The file of a ``JournalStorage``; made, with its folder, where it is not there.

    Raises:
      ValueError: it is the file of something else.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
        self._path = path
        self._lock = JournalFileOpenLock(str(path), grace_period=_LOCK_SECONDS)
        # The line last begun: how many operations precede it, and where it is.
        self._begun = (0, 0)
        self._check()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The whole operations of the file, from that number on.

        A last line without an end is left for later: somebody may be writing it.
        """
        number, offset = self._begun if self._begun[0] <= log_number_from else (0, 0)
        for line in self._lines(offset):
            # Whoever reads may stop in mid-line, and goes on from there.
            self._begun = number, offset
            found = operations(line)
            yield from found[max(0, log_number_from - number) :]
            number, offset = number + len(found), offset + len(line)
        self._begun = number, offset

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds operations at the end, after what another writer may have left there."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._alone():
            begun = b"" if self._ends_whole() else b"\n"
            with self._path.open("ab") as file:
                file.write(begun + lines.encode())
                file.flush()
                os.fsync(file.fileno())

    def _lines(self, offset: int) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        *lines, _ = content.split(b"\n")
        return (line + b"\n" for line in lines)

    def _ends_whole(self) -> bool:
        with self._path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            # Another worker took a slow one's lock for that of a dead one.
            with contextlib.suppress(RuntimeError):
                self._lock.release()

    def _check(self) -> None:
        """Raises ValueError for a file in which there is something, and no sign of an operation."""
        if next(iter(self.read_logs(0)), None) is None:
            content = self._path.read_bytes().strip(_NOTHING)
            begun = _OPERATION.encode()
            if begun not in content and not begun.startswith(content):
                raise ValueError("no line of it is an operation of Optuna's")


def operations(line: bytes) -> list[dict[str, Any]]:
    """The whole operations in a line of a journal: one, if nothing happened to it."""
    # Operations are written in ASCII. No JSON has a NUL in it.
    text = line.decode("ascii", errors="replace").replace("\ufffd", "\0")
    found = []
    start = text.find(_OPERATION)
    while start >= 0:
        end = start + 1
        with contextlib.suppress(ValueError, RecursionError):
            operation, end = json.JSONDecoder().raw_decode(text, start)
            found.append(operation)
        start = text.find(_OPERATION, end)
    return found
