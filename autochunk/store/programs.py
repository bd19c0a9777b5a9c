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
from collections.abc import Mapping
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
        """Keeps a program, and what it takes as JSON data.

        Raises:
          StoreError: it is larger than MOST_BYTES, there are too many, or nothing can be written.
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
            if sum(1 for _ in self.folder.glob("*.program")) >= _MOST_TOGETHER:
                raise StoreError(
                    f"{self.folder} has {_MOST_TOGETHER} programs already; `autochunk tune "
                    "--missed` measures them, `autochunk forget --missed` deletes them"
                )
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

    def forget(self, call: FunctionCall) -> None:
        """Deletes a call's program, if there is one."""
        with contextlib.suppress(OSError):
            self.path(call).unlink(missing_ok=True)


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
