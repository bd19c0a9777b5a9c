"""A bundle as JSON text: laid out for people, and read from strangers.

A file may have been made to take memory and time, or to say one thing to one reader and another to
the next. So it is measured before it is unfolded and parsed, and whatever is wrong with it is a
BundleError of one line that is safe to print.
"""

from __future__ import annotations

import gzip
import io
import json
import reprlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from autochunk.errors import BundleError
from autochunk.text import one_line

MOST_BYTES = 256 * 2**20
# Python takes up to some 100 bytes for a value that JSON writes in three; a bundle has one in about
# 20 bytes of text.
_MOST_VALUES = 2**24
# Pydantic keeps an error for each field that it does not know.
_MOST_FIELDS = 50

_GZIP_MAGIC = b"\x1f\x8b"
NO_BUNDLE = "not a bundle of profiles as `autochunk export` writes"

_T = TypeVar("_T")


def lay_out(value: Any, levels: int, line: str = "\n") -> str:
    """JSON with the items of the outermost ``levels`` on lines of their own.

    What is inside those is on one line.
    """
    if not levels or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    inner = line + " "
    if isinstance(value, list):
        items = [lay_out(item, levels - 1, inner) for item in value]
    else:
        items = [
            f"{json.dumps(name)}: {lay_out(item, levels - 1, inner)}"
            for name, item in value.items()
        ]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return opening + ",".join(inner + item for item in items) + line + closing


# --- Reading --------------------------------------------------------------------------------------


def utf8(data: str | bytes) -> bytes:
    """A text, or its bytes, compressed with gzip or not, as UTF-8; ValueError if too large."""
    refuse_large(len(data))
    data = data.encode() if isinstance(data, str) else _decompressed(data)
    refuse_large(len(data))
    return data


def _decompressed(data: bytes) -> bytes:
    """At most one byte more than a bundle has, of whatever that data may unfold to."""
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged gzip data: {error}") from None


def refuse_large(size: int) -> None:
    """Raises ValueError for more bytes than a bundle has."""
    if size > MOST_BYTES:
        has = "more" if size == MOST_BYTES + 1 else size >> 20
        raise ValueError(f"a bundle has at most {MOST_BYTES >> 20} MiB; this has {has}")


def parse(data: bytes) -> Any:
    """The value that a JSON text stands for; ValueError if it is none, or has too many values."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise ValueError(
            f"{NO_BUNDLE}; a bundle has at most {_MOST_VALUES} values, this has about {values}"
        )
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"{NO_BUNDLE}; {error}") from None


def refuse_wide(value: Any, levels: int) -> None:
    """Raises ValueError where an object has more fields than any of a bundle.

    Only objects in the outer ``levels`` are looked at.
    """
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"{NO_BUNDLE}; an object has {len(value)} fields")
    if levels and isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            refuse_wide(item, levels - 1)


def refuse_repeated_names(data: bytes) -> None:
    """Raises ValueError where an object of a JSON text has a name twice.

    Readers differ in which of two they take, so what was checked need not be what is used.
    """
    json.loads(data, object_pairs_hook=_refuse_repeated_names)


def _refuse_repeated_names(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        raise ValueError(
            f"{NO_BUNDLE}; a name is given twice in one object, among {reprlib.repr(sorted(names))}"
        )


# --- Errors ---------------------------------------------------------------------------------------


def checked(work: Callable[[], _T], source: str, place: str = "") -> _T:
    """What ``work`` returns.

    What goes wrong in it is a BundleError of one line that names the source and the place in it.
    """
    try:
        return work()
    except BundleError:
        raise
    except ValidationError as error:
        message = _explanation(error, place)
    except (ValueError, RecursionError) as error:
        message = f"{place + ': ' if place else ''}{one_line(str(error)[:1000])}"
    # Not inside the `except`, where pydantic's error would become this one's context: it holds on
    # to all that was read, out of the garbage collector's sight.
    raise BundleError(f"{source}: {message}")


def _explanation(error: ValidationError, place: str) -> str:
    problem = error.errors(include_url=False)[0]
    where = one_line(".".join(map(str, (*filter(None, [place]), *problem["loc"]))))
    return (
        f"{NO_BUNDLE}; {error.error_count()} problem(s), first at {where[:300]}: "
        f"{one_line(problem['msg'][:300])}"
    )
