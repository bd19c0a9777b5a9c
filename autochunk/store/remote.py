"""Files at URLs, through fsspec: an optional package, for a file on this machine needs none of it.

fsspec reaches many kinds of store but bounds neither their time nor their size, so both are bounded
here. A URL leads to one place: none through another (``simplecache::file://...``), whose files
would be read and written on the way; nor does https lead to what is not encrypted. Whatever goes
wrong is an OSError that says why.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

TIMEOUT_SECONDS = 30.0
_PIECE_BYTES = 2**20
_WEB = ("http://", "https://")
_SECRET = re.compile(r"([?&][\w-]*(?:password|secret|token|signature|sig)=)[^&#\s]*", re.IGNORECASE)

_T = TypeVar("_T")


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in place


def without_password(place: str) -> str:
    """A place as it may be shown: no password, and nothing that a signed URL is signed with."""
    place = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", place)
    return _SECRET.sub(r"\1***", place)


def read(url: str, most_bytes: int, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """The bytes at a URL, or the first ``most_bytes``, whatever size the server claims.

    Args:
      url: anything that fsspec has a protocol for.
      most_bytes: where to stop.
      timeout: seconds for all of it.

    Raises:
      OSError: it cannot be read, or not in time.
    """
    given_up = threading.Event()
    try:
        return _within(timeout, lambda: _read(url, most_bytes, given_up))
    finally:
        given_up.set()


def write(url: str, data: bytes, timeout: float = TIMEOUT_SECONDS) -> None:
    """Writes a file at a URL; whether at once or piece by piece is the protocol's affair.

    Raises:
      OSError: it cannot be written, or not in time, in which case a part of it may be there.
    """

    def work() -> None:
        files, path = _files_and_path(url)
        files.pipe_file(path, data)

    _within(timeout, work)


def _read(url: str, most_bytes: int, given_up: threading.Event) -> bytes:
    files, path = _files_and_path(url)
    # By blocks, http asks for ranges up to the size that the server claims; as a stream it takes
    # what comes.
    options = {"block_size": 0} if url.startswith(_WEB) else {}
    pieces, left = [], most_bytes
    with contextlib.closing(files.open(path, "rb", **options)) as file:
        while left and not given_up.is_set() and (piece := file.read(min(left, _PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


def _files_and_path(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL as that file system wants it."""
    try:
        import fsspec
    except ImportError:
        raise OSError(
            'URLs need fsspec, which is not installed: pip install "autochunk[remote]"'
        ) from None
    if "::" in re.sub(r"//\[[^]/]*\]", "//", url):  # an address of IPv6 has it, too
        raise OSError("a URL must be of one place; this one chains several with ::")
    try:
        if url.startswith(_WEB):
            return fsspec.filesystem(url.partition(":")[0], client_kwargs=_web_options()), url
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise OSError(
            f"this protocol needs a package that is not installed ({error}); pip install "
            '"autochunk[remote]" brings that of http'
        ) from None
    return files, str(path)


@functools.cache
def _web_options() -> dict[str, Any]:
    """How aiohttp asks: for bytes as they are, and with no less safety than was asked for.

    What a server compressed is unfolded where its size is bounded.
    """
    import aiohttp

    async def check(_session: object, _context: object, asked: Any) -> None:
        target = asked.response.headers.get("Location", "")
        scheme = asked.url.join(type(asked.url)(target)).scheme
        if asked.url.scheme == "https" and scheme != "https":
            raise OSError(f"the server leads from https to {scheme}, where anybody may answer")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    headers = {"Accept-Encoding": "identity"}
    return {"trace_configs": [trace], "auto_decompress": False, "headers": headers}


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """What ``work`` returns, from a thread that is left behind when the time is up."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # every protocol raises its own
            outcome.set_exception(error)

    threading.Thread(target=run, name="autochunk remote file", daemon=True).start()
    try:
        return outcome.result(seconds)
    except Exception as error:
        if not outcome.done():
            raise TimeoutError(f"not done after {seconds:g} seconds") from None
        raise OSError(_reason(error)) from error


def _reason(error: Exception) -> str:
    # fsspec's http calls every failure "not found"; the cause knows better.
    cause = error.__cause__ or error
    said = getattr(cause, "strerror", None) or str(cause)
    return said if type(cause) is OSError else f"{type(cause).__name__}: {said}".removesuffix(": ")
