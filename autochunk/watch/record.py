"""What a service has done, does and will do: a file beside its store, for whoever asks.

A store may have a service for each GPU, and so a file of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autochunk.store.profile import utc_now
from autochunk.watch.todo import Job, Memory

_MOST_EVENTS = 100
_MOST_JOBS = 50


class Record:
    """The file, which is whole at any moment; one that cannot be read begins anew.

    Args:
      path: the file, by ``path_of``.
      say: told of each event as it is written down.

    Attributes:
      memory: what is remembered from one run to the next.
    """

    def __init__(self, path: Path, say: Callable[[dict[str, Any]], None]) -> None:
        self.path = path
        self._say = say
        found = read(path)
        self.memory = _memory(found.get("memory"))
        events = found.get("events")
        self._events: list[Any] = events if isinstance(events, list) else []
        self._state: dict[str, Any] = {}

    def event(self, name: str, **fields: Any) -> None:
        """Tells of something that happened, and writes it down."""
        event = {"time": utc_now(), "event": name, **fields}
        self._say(event)
        self._events = [*self._events, event][-_MOST_EVENTS:]
        self.write()

    def now(self, state: str, jobs: Sequence[Job] | None = None, **fields: Any) -> None:
        """Notes what is going on and what is to be done; None leaves that as it was."""
        waiting = self._state.get("todo", [])
        if jobs is not None:
            waiting = [dataclasses.asdict(job) for job in jobs[:_MOST_JOBS]]
        self._state = {"state": state, **fields, "todo": waiting}
        self.write()

    def write(self) -> None:
        """Writes the file; where that fails nothing is lost but the telling."""
        content = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "written": utc_now(),
            **self._state,
            "events": self._events,
            "memory": dataclasses.asdict(self.memory),
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            # Like the store for its owner only: it names what models are made of.
            with open(os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                file.write(json.dumps(content, indent=1) + "\n")
            beside.replace(self.path)


def path_of(store: Path, which: str) -> Path:
    """Where the file is of a service that watches this one of the devices that a store is for."""
    return store.with_name(f"{store.name}.watch-{which}.json")


def read_all(store: Path) -> list[dict[str, Any]]:
    """What the files of a store's services have, and whether those run (``runs``)."""
    found = [read(path) for path in sorted(store.parent.glob(f"{store.name}.watch-*.json"))]
    return [{**one, "runs": runs(one)} for one in found if one]


def read(path: Path) -> dict[str, Any]:
    """What is in a file; nothing where there is none, or no such one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("written"), str) else {}


def runs(found: dict[str, Any]) -> bool | None:
    """Whether the service that wrote a file runs; None where that is another machine's to tell."""
    if found.get("state") == "ended":
        return False
    if found.get("host") != socket.gethostname():
        return None
    try:
        os.kill(int(found["process"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return True


def _memory(found: Any) -> Memory:
    """What was remembered, as far as it is what it should be."""
    memory = Memory()
    for field in dataclasses.fields(Memory) if isinstance(found, dict) else ():
        value, kind = found.get(field.name), type(getattr(memory, field.name))
        items = value.values() if isinstance(value, dict) else value
        wanted = str if kind is list else int | float
        if isinstance(value, kind) and all(isinstance(item, wanted) for item in items):
            setattr(memory, field.name, value)
    return memory
