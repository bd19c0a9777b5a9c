"""One error of all that a storage can fail with: users have one cure for them, another storage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from autochunk.errors import StorageError
from autochunk.store.remote import without_password

_FAILURES = (
    SQLAlchemyError,
    StorageInternalError,
    OSError,
    ImportError,  # of a database's driver
    json.JSONDecodeError,
    UnicodeDecodeError,
)


@contextlib.contextmanager
def one_error(place: str) -> Iterator[None]:
    """Makes a StorageError of whatever the storage in ``place`` fails with."""
    try:
        yield
    except _FAILURES as error:
        raise StorageError(
            f"the storage {without_password(place)} cannot be used: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says in short; its type if that is nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
