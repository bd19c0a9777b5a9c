"""Bundles: profiles as one JSON file that travels between machines.

Its text is deterministic, so that the same profiles give the same bytes, and laid out for people
and for diffs: each field on its own line, each measurement on one. Every profile stands beside the
digest of its content, and the checksum is over the digests: a layer of many profiles checks its
list at once, and each profile when it is asked for.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import reprlib
import secrets
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

import autochunk
from autochunk.device import Device
from autochunk.errors import ArgumentError, BundleError
from autochunk.store import remote
from autochunk.store.profile import Bundle, Profile, Provenance

BUNDLE_VERSION: Literal[2] = 2

MOST_BYTES = 256 * 2**20
# Python takes up to some 100 bytes for a value that JSON writes in three; a bundle has one in about
# 20 bytes of text.
MOST_VALUES = 2**24
# Pydantic keeps an error for each field that it does not know.
_MOST_FIELDS = 50

_GZIP_MAGIC = b"\x1f\x8b"
_NO_BUNDLE = "not a bundle of profiles as `autochunk export` writes"

_T = TypeVar("_T")

_Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


# --- Writing --------------------------------------------------------------------------------------


def dump(profiles: Iterable[Profile], note: str = "") -> str:
    """The profiles as a bundle's text, ordered by device and workload.

    Args:
      profiles: at most one of each device and workload.
      note: a line about them, for whoever imports them.

    Raises:
      ArgumentError: ``note`` is not one line of at most 1000 characters.
      BundleError: two profiles are of one device and workload.
    """
    ordered = sorted(profiles, key=lambda profile: profile.key)
    refuse_twice(ordered, "a bundle cannot be written")
    entries = [_entry(profile.model_dump(mode="json")) for profile in ordered]
    content = {
        "schema_version": BUNDLE_VERSION,
        "checksum": _checksum(entry["digest"] for entry in entries),
        "provenance": _provenance(ordered, autochunk.__version__, note).model_dump(mode="json"),
        "profiles": entries,
    }
    # Bundle, list, entry, profile and its list of measurements are spread out; a measurement is
    # not.
    return _lay_out(content, levels=5) + "\n"


def _lay_out(value: Any, levels: int, line: str = "\n") -> str:
    """JSON with the items of the outermost ``levels`` on lines of their own, and what is inside
    those on one line.
    """
    if not levels or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    inner = line + " "
    if isinstance(value, list):
        return (
            "[" + ",".join(inner + _lay_out(item, levels - 1, inner) for item in value) + line + "]"
        )
    return (
        "{"
        + ",".join(
            f"{inner}{json.dumps(name)}: {_lay_out(item, levels - 1, inner)}"
            for name, item in value.items()
        )
        + line
        + "}"
    )


def _entry(profile: dict[str, Any]) -> dict[str, Any]:
    return {"digest": _digest(profile), "profile": profile}


def _digest(profile: dict[str, Any]) -> str:
    """Of the content, however it is laid out.

    Raises ValueError for 1e999, which is read as infinity.
    """
    return _sha256(json.dumps(profile, sort_keys=True, separators=(",", ":"), allow_nan=False))


def _checksum(digests: Iterable[str]) -> str:
    return _sha256("".join(digests))


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _provenance(profiles: Iterable[Profile], version: str, note: str) -> Provenance:
    profiles = list(profiles)
    created = sorted(profile.created for profile in profiles)
    devices = sorted({profile.device.key for profile in profiles})
    oldest, newest = (created[0], created[-1]) if created else (None, None)
    try:
        return Provenance(
            autochunk=version,
            devices=tuple(devices),
            oldest=oldest,
            newest=newest,
            profiles=len(profiles),
            note=note,
        )
    except ValidationError:
        raise ArgumentError(
            "note must be one line of at most 1000 characters, none of them control characters; "
            f"got {reprlib.repr(note)}"
        ) from None


def refuse_twice(profiles: Iterable[Profile], source: str) -> None:
    """Raises BundleError where two profiles are of one device and workload."""
    seen = set()
    for profile in profiles:
        if profile.key in seen:
            raise BundleError(f"{source}: {_twice(profile.key)}")
        seen.add(profile.key)


def _twice(key: tuple[str, str]) -> str:
    return (
        "a bundle has one profile of each device and workload; there are two of "
        f"{_one_line(' | '.join(key))}"
    )


# --- Reading --------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Entry(_Strict):
    digest: _Digest
    profile: dict[str, Any]


class _File(_Strict):
    """A file's content, but for what is in its profiles."""

    schema_version: Literal[2]
    checksum: _Digest
    # None if it was written before bundles said where they come from.
    provenance: Provenance | None
    profiles: Annotated[list[_Entry], FailFast()] = Field(max_length=1_000_000)


class _File1(_Strict):
    """The same of version 1."""

    schema_version: Literal[1]
    profiles: Annotated[list[dict[str, Any]], FailFast()] = Field(max_length=1_000_000)


class _Subject(BaseModel):
    """What a profile is of, without what was measured."""

    device: Device
    workload: str


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    entries = [_entry(profile) for profile in _File1.model_validate(content).profiles]
    return {
        "schema_version": 2,
        "checksum": _checksum(entry["digest"] for entry in entries),
        "provenance": None,
        "profiles": entries,
    }


# From each older version to the next; a released one is never taken out.
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}


class Index(Mapping[tuple[str, str], Profile]):
    """A bundle's profiles by (device key, workload key).

    Each is compared with its digest and validated when it is asked for.

    Asking raises BundleError where a profile is damaged; one that is damaged leaves the others
    usable.

    Attributes:
      source: names the bundle in errors.
      schema_version: of the layout that the file had.
      provenance: as the file says; None if it does not.
    """

    def __init__(self, content: Any, source: str) -> None:
        self.source = source
        self.schema_version, file = _checked(lambda: _file(content), source)
        self.provenance = file.provenance
        self._entries: dict[tuple[str, str], tuple[str, _Entry]] = {}
        for number, entry in enumerate(file.profiles):
            place = f"profiles.{number}"
            key = _checked(functools.partial(_subject, entry), source, place)
            if key in self._entries:
                raise BundleError(
                    f"{source}: {place}: {_twice(key)}, the other at {self._entries[key][0]}"
                )
            self._entries[key] = place, entry

    def __getitem__(self, key: tuple[str, str]) -> Profile:
        place, entry = self._entries[key]
        return _checked(lambda: _profile(entry, key), self.source, place)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def workloads(self, device_key: str) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        return sorted(workload for device, workload in self._entries if device == device_key)


def _file(content: Any) -> tuple[int, _File]:
    """The version of a file's layout, and its content in today's; ValueError where it is no bundle."""
    version = _version(content)
    _refuse_wide(content, levels=2)
    for step in range(version, BUNDLE_VERSION):
        content = _UPGRADES[step](content)
    file = _File.model_validate(content)
    _check_list(file)
    return version, file


def _subject(entry: _Entry) -> tuple[str, str]:
    _refuse_wide(entry.profile, levels=2)
    subject = _Subject.model_validate(entry.profile)
    return subject.device.key, subject.workload


def _profile(entry: _Entry, key: tuple[str, str]) -> Profile:
    if _digest(entry.profile) != entry.digest:
        raise ValueError(
            f"the profile of {' | '.join(key)} is not what its digest was made of: the file was "
            "damaged or edited; export it again"
        )
    return Profile.model_validate(entry.profile)


def scan(data: str | bytes, source: str = "bundle") -> Index:
    """Reads a bundle's text, or that text compressed with gzip, without validating the profiles in
    it: each is when it is asked for.

    Raises:
      BundleError: it is no bundle, or of a newer version, or its checksum does not fit its list of
        profiles.
    """
    return Index(_checked(lambda: _parse(_json_bytes(data)), source), source)


def load(text: str | bytes, source: str = "bundle") -> Bundle:
    """Reads a bundle's text, or that text compressed with gzip, and checks all of it.

    ``source`` names it in errors.

    Raises:
      BundleError: it is no bundle, or of a newer version, or it was damaged or edited.
    """
    data = _checked(lambda: _json_bytes(text), source)
    index = scan(data, source)
    _checked(lambda: json.loads(data, object_pairs_hook=_refuse_repeated_names), source)
    profiles = tuple(index.values())
    said = index.provenance
    provenance = _provenance(profiles, said.autochunk if said else "", said.note if said else "")
    if said not in (None, provenance):
        raise BundleError(
            f"{source}: its provenance does not fit its profiles: the file was damaged or edited; "
            "export it again"
        )
    return Bundle(schema_version=index.schema_version, profiles=profiles, provenance=provenance)


def _json_bytes(data: str | bytes) -> bytes:
    """The JSON text as UTF-8, decompressed."""
    _refuse_large(len(data))
    data = data.encode() if isinstance(data, str) else _decompressed(data)
    _refuse_large(len(data))
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


def _refuse_large(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(
            f"a bundle has at most {MOST_BYTES >> 20} MiB; this has "
            f"{'more' if size == MOST_BYTES + 1 else size >> 20}"
        )


def _parse(data: bytes) -> Any:
    """The value that a JSON text stands for."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MOST_VALUES:
        raise ValueError(
            f"{_NO_BUNDLE}; a bundle has at most {MOST_VALUES} values, this has about {values}"
        )
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"{_NO_BUNDLE}; {error}") from None


def _version(content: Any) -> int:
    if not isinstance(content, dict):
        raise ValueError(f"{_NO_BUNDLE}; it must be an object; got {reprlib.repr(content)}")
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{_NO_BUNDLE}; its schema_version must be a whole number from 1 to {BUNDLE_VERSION}; "
            f"got {reprlib.repr(version)}"
        )
    if version > BUNDLE_VERSION:
        raise ValueError(
            f"its schema_version is {reprlib.repr(version)}, and this autochunk reads those up to "
            f"{BUNDLE_VERSION}; upgrade autochunk to read it"
        )
    return version


def _check_list(file: _File) -> None:
    """Raises ValueError where the list of profiles is not the one that was written."""
    if _checksum(entry.digest for entry in file.profiles) != file.checksum:
        raise ValueError(
            "its checksum does not fit its list of profiles: the file was damaged or edited, or a "
            "merge left it mixed; export it again"
        )
    if file.provenance is not None and file.provenance.profiles != len(file.profiles):
        raise ValueError(
            f"its provenance says {file.provenance.profiles} profiles; there are "
            f"{len(file.profiles)}"
        )


def _refuse_wide(value: Any, levels: int) -> None:
    """Raises ValueError where an object in the outer ``levels`` has more fields than any of a
    bundle.
    """
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"{_NO_BUNDLE}; an object has {len(value)} fields")
    if levels and isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_wide(item, levels - 1)


def _refuse_repeated_names(pairs: list[tuple[str, Any]]) -> None:
    # Readers differ in which of two they take, so what was checked need not be what is used.
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        raise ValueError(
            f"{_NO_BUNDLE}; a name is given twice in one object, among "
            f"{reprlib.repr(sorted(names))}"
        )


def _checked(work: Callable[[], _T], source: str, place: str = "") -> _T:
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
        message = f"{place + ': ' if place else ''}{_one_line(str(error)[:1000])}"
    # Not inside the `except`, where pydantic's error would become this one's context: it holds on
    # to all that was read, out of the garbage collector's sight.
    raise BundleError(f"{source}: {message}")


def _explanation(error: ValidationError, place: str) -> str:
    problem = error.errors(include_url=False)[0]
    where = _one_line(".".join(map(str, (*filter(None, [place]), *problem["loc"]))))
    return (
        f"{_NO_BUNDLE}; {error.error_count()} problem(s), first at {where[:300]}: "
        f"{_one_line(problem['msg'][:300])}"
    )


def _one_line(text: str) -> str:
    """Text from a file, fit for a line of an error.

    Line ends and whatever else does not print are escaped.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# --- Files ----------------------------------------------------------------------------------------


def read(place: str | os.PathLike[str], timeout: float = remote.TIMEOUT_SECONDS) -> Bundle:
    """Reads a bundle from a path, a URL (in ``timeout`` seconds) or "-", standard input.

    See ``load``.

    Raises:
      BundleError: it cannot be read, or is no bundle.
    """
    return load(fetch(place, timeout), _name(place))


def fetch(place: str | os.PathLike[str], timeout: float = remote.TIMEOUT_SECONDS) -> bytes:
    """The bytes at a path, a URL (in ``timeout`` seconds) or "-", standard input, for ``load`` or
    ``scan``; compressed they may still be.

    Raises:
      BundleError: they cannot be read, or are more than a bundle has.
    """
    path, name = os.fspath(place), _name(place)
    try:
        if remote.is_url(path):
            data = remote.read(path, MOST_BYTES + 1, timeout)
        elif path == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            data = _read_file(Path(path), name)
    except OSError as error:
        raise BundleError(f"{name}: {_reason(error)}") from error
    _checked(lambda: _refuse_large(len(data)), name)
    return data


def _read_file(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        _checked(lambda: _refuse_large(os.fstat(file.fileno()).st_size), name)
        return file.read(MOST_BYTES + 1)  # a pipe does not tell its size


def write(
    place: str | os.PathLike[str], text: str, timeout: float = remote.TIMEOUT_SECONDS
) -> None:
    """Writes a bundle's text to a path, a URL (in ``timeout`` seconds) or "-", standard output.

    To a name that ends in ``.gz`` compressed.

    A file is there whole or, on an error, as it was before; at a URL that depends on the protocol.

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
        raise BundleError(f"{_name(place)}: {_reason(error)}") from error


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


def _reason(error: OSError) -> str:
    return _one_line((error.strerror or str(error))[:1000])


def _name(place: str | os.PathLike[str]) -> str:
    path = os.fspath(place)
    return "standard input" if path == "-" else _one_line(path)
