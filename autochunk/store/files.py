"""Bytes at a path, a URL, or "-" for a standard stream: where bundles are read and written.

Whatever goes wrong is a BundleError of one line that names the place.
"""

from __future__ import annotations

import gzip
import io
import os
import secrets
import sys
import tempfile
from pathlib import Path

from autochunk.errors import BundleError
from autochunk.store import json_text, remote
from autochunk.store.json_text import checked, refuse_large
from autochunk.text import one_line


def fetch(place: str | os.PathLike[str], timeout: float = remote.TIMEOUT_SECONDS) -> bytes:
    """The bytes of a bundle at a path, a URL (in ``timeout`` seconds) or "-", standard input.

    Compressed they may still be.

    Raises:
      BundleError: they cannot be read, or are more than a bundle has.
    """
    path, name = os.fspath(place), name_of(place)
    try:
        if remote.is_url(path):
            data = remote.read(path, json_text.MOST_BYTES + 1, timeout)
        elif path == "-":
            data = sys.stdin.buffer.read(json_text.MOST_BYTES + 1)
        else:
            data = _read_file(Path(path), name)
    except OSError as error:
        raise BundleError(f"{name}: {_reason(error)}") from error
    checked(lambda: refuse_large(len(data)), name)
    return data


def _read_file(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        checked(lambda: refuse_large(os.fstat(file.fileno()).st_size), name)
        return file.read(json_text.MOST_BYTES + 1)  # a pipe does not tell its size


def write(
    place: str | os.PathLike[str], text: str, timeout: float = remote.TIMEOUT_SECONDS
) -> None:
    """Writes a text to a path, a URL (in ``timeout`` seconds) or "-", standard output.

    To a name that ends in ``.gz`` it is compressed. A file is there whole or, on an error, as it
    was before; at a URL that depends on the protocol.

    Raises:
      BundleError: it cannot be written.
    """
    path = os.fspath(place)
    if path == "-":
        sys.stdout.write(text)
        return
    data = _compressed(text.encode()) if path.endswith(".gz") else text.encode()
    try:
        if remote.is_url(path):
            remote.write(path, data, timeout)
        else:
            _write_file(Path(path), data)
    except OSError as error:
        raise BundleError(f"{name_of(place)}: {_reason(error)}") from error


def _compressed(data: bytes) -> bytes:
    """In gzip's format, without a name or a time, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


def _write_file(path: Path, data: bytes) -> None:
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a pipe or a device is written to, not replaced
        return
    target = Path(os.path.realpath(path))  # a link stays one
    # Not by tempfile, whose files no one else may read.
    beside = target.parent / f".autochunk-{secrets.token_hex(8)}"
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def obstacle(path: Path) -> str:
    """Why a file cannot be made where there is none; "" where it is there, or can be.

    Tried with a file that is gone at once: permissions alone do not tell of every file system.
    """
    try:
        if path.exists():
            return ""
        folder = next(parent for parent in path.resolve().parents if parent.exists())
        if not folder.is_dir():
            return f"{folder} is no folder"
    except (OSError, RuntimeError) as error:  # the latter for links that lead to themselves
        return one_line(str(error))
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} takes no file, {_reason(error)}"


def file_identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none.

    Who replaces a file may keep its time and size, but not all of this.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


def name_of(place: str | os.PathLike[str]) -> str:
    """What a place is called in errors; a URL without its password."""
    path = os.fspath(place)
    return "standard input" if path == "-" else one_line(remote.without_password(path))


def _reason(error: OSError) -> str:
    return one_line(remote.without_password((error.strerror or str(error))[:1000]))
