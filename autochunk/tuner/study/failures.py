"""Turns all that a storage can fail with into one error, after waiting for what may pass.

What does not pass has one cure for a user, another storage. A server that restarts, or a file
system that is away for a moment, costs no more than the time that it is away.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy import exc

from autochunk.errors import AutochunkError, StorageError
from autochunk.store.remote import without_password

PATIENCE_SECONDS = 120.0
"""How long what may pass is waited for."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0

_MAY_PASS = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, OSError)
_DOES_NOT_PASS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

_LASTING_CODES = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_READONLY)

_OPERATIONS: frozenset[str] = BaseStorage.__abstractmethods__

_T = TypeVar("_T")


@contextlib.contextmanager
def one_error(place: str) -> Iterator[None]:
    """Makes a StorageError of whatever the storage in ``place`` fails with.

    That is all kinds: of Optuna, SQLAlchemy, Alembic, a database's driver, the system, and what
    these say of content that they did not write.
    """
    try:
        yield
    except AutochunkError:
        raise
    except Exception as error:
        raise StorageError(
            f"the storage {without_password(place)} cannot be used: {first_line(error)}"
        ) from error


class Patience:
    """Does again what failed and may pass, for so many seconds from the first failure on.

    All that is asked of one storage, in whichever thread, has that time together.

    Attributes:
      returned: ``time.time()`` when it last did not fail any more.
    """

    def __init__(self, seconds: float) -> None:
        self.returned = 0.0
        self._seconds = seconds
        self._failing_since: float | None = None

    def ask(self, action: Callable[[], _T]) -> _T:
        """What an action comes to; raises what it fails with in the end."""
        since, pause = math.inf, _FIRST_PAUSE
        while True:
            try:
                answer = action()
            except Exception as error:
                if not may_pass(error):
                    raise
                self._failing_since = self._failing_since or time.monotonic()
                since = min(since, self._failing_since)  # another thread's may succeed meanwhile
                left = since + self._seconds - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._failing_since is not None:
                    self._failing_since = None
                    self.returned = time.time()
                return answer


def patient(storage: BaseStorage, patience: Patience) -> BaseStorage:
    """A storage each of whose operations is done again when it fails for what may pass.

    All may be: one that is done twice leaves at most a trial that nobody is at.
    """

    def delegate(name: str) -> Callable[..., Any]:
        operation = getattr(storage, name)
        return lambda _, *args, **kwargs: patience.ask(lambda: operation(*args, **kwargs))

    operations = {name: delegate(name) for name in (*_OPERATIONS, "remove_session")}
    made: BaseStorage = type("PatientStorage", (BaseStorage,), operations)()
    return made


def may_pass(error: BaseException) -> bool:
    """Whether what a storage failed with may be over soon: a server or file system is away."""
    error = _cause(error)
    # SQLite calls a statement that it does not understand operational, too.
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    lasting = isinstance(error, _DOES_NOT_PASS) or code in _LASTING_CODES
    return isinstance(error, _MAY_PASS) and not lasting


def _cause(error: BaseException) -> BaseException:
    """What Optuna says it has met, in place of what it guesses about it."""
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def first_line(error: BaseException) -> str:
    """What an error says in short; its type if that is nothing."""
    error = _cause(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
