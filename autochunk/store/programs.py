"""Exported programs of functions that were missed, beside a store: what a tuner can measure.

They are of this machine's user alone: a folder and files that nobody else may read, never in a
bundle, and never read unless they are the user's own. One that is too large is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autochunk.errors import StoreError
from autochunk.functions import FunctionCall

VARIABLE = "AUTOCHUNK_PROGRAMS"
"""Set to "no" (or "0", "off", "false") no program is kept."""

MOST_BYTES = 16 * 2**20
_MOST_TOGETHER = 1000  # programs of one store

_NO = {"no", "0", "off", "false"}


def wanted() -> bool:
    """Whether programs are to be kept."""
    return os.environ.get(VARIABLE, "").strip().lower() not in _NO


class Programs:
    """The programs beside the store at a path, one for each function's call in either mode."""

    def __init__(self, store: Path) -> None:
        self.folder = store.with_name(f"{store.name}.programs")

    def path(self, call: FunctionCall) -> Path:
        """Where a call's program is, if it is there."""
        both = call.with_mode("forward").key
        return self.folder / f"{hashlib.sha256(both.encode()).hexdigest()[:32]}.program"

    def has(self, call: FunctionCall) -> bool:
        """Whether there is one."""
        return self.path(call).is_file()

    def put(self, call: FunctionCall, header: Mapping[str, Any], program: bytes) -> None:
        """Keeps a program, and what it takes as JSON data; of very many the oldest go.

        Raises:
          StoreError: it is larger than MOST_BYTES, or nothing can be written.
        """
        text = json.dumps({**header, "call": call.with_mode("forward").key}).encode() + b"\n"
        if len(text) + len(program) > MOST_BYTES:
            raise StoreError(
                f"the exported program of {call.name} takes {len(program) / 1e6:.1f} MB, more than "
                f"the {MOST_BYTES / 1e6:.0f} MB that are kept; measure it from your own script: "
                "autochunk.tune_chunks(fn, args)"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # whatever the umask
            self._make_room()
            number, name = tempfile.mkstemp(dir=self.folder)  # which others may not read
            with os.fdopen(number, "wb") as file:
                file.write(text + program)
            Path(name).replace(self.path(call))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot keep a program in {self.folder}: {error}") from error

    def read(self, call: FunctionCall) -> tuple[dict[str, Any], bytes]:
        """What a program takes, and the program.

        Raises:
          StoreError: there is none, or it is not what ``put`` left: of another owner, open for
            others to write, or damaged.
        """
        return read(self.path(call))

    def forget_all_but(self, calls: Iterable[FunctionCall]) -> None:
        """Deletes the programs of all other calls."""
        kept = set(map(self.path, calls))
        for path in set(self.folder.glob("*.program")) - kept:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Deletes the oldest, as what was missed longest ago is forgotten, too."""
        found = list(self.folder.glob("*.program"))
        if len(found) >= _MOST_TOGETHER:
            found.sort(key=lambda path: path.stat().st_mtime)
            for path in found[: len(found) - _MOST_TOGETHER + 1]:
                path.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """What the program in a file takes, and the program.

    Raises:
      StoreError: there is none, or it is not what ``Programs.put`` left.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if hasattr(os, "getuid") and (
                found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077
            ):
                raise StoreError(
                    f"{path} must be this user's own, which nobody else may read or write, and was "
                    "not run; delete it"
                )
            text, program = file.readline(), file.read(MOST_BYTES)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it has no header")
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the program {path}: {error}") from error
    return header, program
