"""Bundles: profiles as one JSON file that travels between machines.

Its text is deterministic, so that the same profiles give the same bytes, and laid out for people
and for diffs: each field on its own line, each measurement on one. Every profile stands beside the
digest of its content, and the checksum is over the digests: a layer of many profiles checks its
list at once, and each profile when it is asked for.

A bundle decides what runs. Digests only reveal damage: whoever can write a bundle can write its
digests. The worst that a hostile bundle can do to those who import it or name it:

- It chooses, for the devices and workloads that it names and those like them, a plan of those that
  this version knows: a slow one, or a memory-hungry one that claims to need none. Results are the
  same but for rounding. It never runs code, adds a kernel, reads or writes a file, or opens a
  connection, and no limit in it, 1e-300 or 1e300, makes a call fail that has a plan without it.
- It takes time and memory to be refused or read: up to some 2 GB and 20 seconds for the 256 MiB and
  16 million values that a file may have, compressed or not. A profile has at most 10,000 plans of
  100,000 times; what a prediction or ``evaluate`` learns from has no more plans than a tune tries.
- Its names and texts are shown to people, on one line and with all that does not print escaped.

Its place may be hostile, too: a URL is of one place, https leads to https only, and neither size
nor time are what a server says. A file that others may write is theirs: ``autochunk doctor`` tells.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, ValidationError, field_validator

import autochunk
from autochunk.device import Device, current_key
from autochunk.errors import ArgumentError, BundleError
from autochunk.store import files, json_text, remote
from autochunk.store.json_text import NO_BUNDLE, checked, refuse_wide
from autochunk.store.measurement import Record
from autochunk.store.profile import MOST_OF_A_KEY, Profile
from autochunk.text import one_line

BUNDLE_VERSION: Literal[4] = 4

# What a terminal or a log shows as one line.
_ONE_LINE = r"^[^\p{Cc}\u{2028}\u{2029}]*$"
_Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Provenance(Record):
    """Where a bundle comes from; all but ``autochunk`` and ``note`` follows from its profiles.

    Attributes:
      autochunk: the version that wrote it; "" of a bundle that was written before bundles said so.
      devices: keys of the devices that were measured.
      oldest, newest: when the first and the last of its profiles was created; None without
        profiles.
      profiles: how many it has.
      note: a line of text from whoever wrote it.
    """

    autochunk: Annotated[str, Field(max_length=100, pattern=_ONE_LINE)] = ""
    devices: Annotated[tuple[str, ...], FailFast()] = ()
    oldest: str | None = None
    newest: str | None = None
    profiles: int = 0
    note: Annotated[str, Field(max_length=1000, pattern=_ONE_LINE)] = ""

    @field_validator("devices")
    @classmethod
    def _of_today(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(map(current_key, keys))))


class Bundle(Record):
    """The profiles of a file that travels, read and checked.

    Attributes:
      schema_version: of the layout that the file had; older ones are brought up to date in reading.
      profiles: in the file's order, at most one of each device and workload.
      provenance: where they come from.
    """

    schema_version: int
    profiles: tuple[Profile, ...] = Field(max_length=1_000_000)
    provenance: Provenance = Provenance()


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
    # Bundle, list, entry, profile and its list of measurements are spread out, a measurement not.
    return json_text.lay_out(content, levels=5) + "\n"


def _entry(profile: dict[str, Any]) -> dict[str, Any]:
    return {"digest": _digest(profile), "profile": profile}


def _digest(profile: dict[str, Any]) -> str:
    """Of the content, however it is laid out; ValueError for 1e999, which is read as infinity."""
    return _sha256(json.dumps(profile, sort_keys=True, separators=(",", ":"), allow_nan=False))


def _checksum(digests: Iterable[str]) -> str:
    return _sha256("".join(digests))


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _provenance(profiles: Sequence[Profile], version: str, note: str) -> Provenance:
    created = [profile.created for profile in profiles]
    try:
        return Provenance(
            autochunk=version,
            devices=tuple(sorted({profile.device.key for profile in profiles})),
            oldest=min(created, default=None),
            newest=max(created, default=None),
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
        f"{one_line(' | '.join(key))}"
    )


# --- Reading --------------------------------------------------------------------------------------


class _Entry(Record):
    digest: _Digest
    profile: dict[str, Any]


class _File(Record):
    """A file's content, but for what is in its profiles."""

    schema_version: Literal[4]
    checksum: _Digest
    # None if it was written before bundles said where they come from.
    provenance: Provenance | None
    profiles: Annotated[list[_Entry], FailFast()] = Field(max_length=1_000_000)


class _File1(Record):
    """The same of version 1."""

    schema_version: Literal[1]
    profiles: Annotated[list[dict[str, Any]], FailFast()] = Field(max_length=1_000_000)


class _Subject(BaseModel):
    """What a profile is of, without what was measured."""

    device: Device
    workload: str = Field(max_length=MOST_OF_A_KEY)
    # For which of two to take; whether they are what they must be is seen with the whole profile.
    complete: Any = False
    created: Any = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.device.key, self.workload

    @property
    def standing(self) -> tuple[bool, str]:
        return self.complete is True, str(self.created)


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    entries = [_entry(profile) for profile in _File1.model_validate(content).profiles]
    return {
        "schema_version": 2,
        "checksum": _checksum(entry["digest"] for entry in entries),
        "provenance": None,
        "profiles": entries,
    }


def _from_version_2(content: dict[str, Any]) -> dict[str, Any]:
    """Its profiles have fewer fields, each of which has a default."""
    return {**content, "schema_version": 3}


def _from_version_3(content: dict[str, Any]) -> dict[str, Any]:
    """Its device keys have more in them; they are read as today's."""
    return {**content, "schema_version": 4}


# From each older version to the next; a released one is never taken out.
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_version_1,
    2: _from_version_2,
    3: _from_version_3,
}


class Index(Mapping[tuple[str, str], Profile]):
    """A bundle's profiles by (device key, workload key).

    Each is compared with its digest and validated when it is asked for; BundleError where it is
    damaged. One that is damaged leaves the others usable. Of two of what was once two devices and
    is one today the complete one is taken, else the one made later.

    Attributes:
      source: names the bundle in errors.
      schema_version: of the layout that the file had.
      provenance: as the file says; None if it does not.
      merged: how many were not taken for another of the same device and workload.
    """

    def __init__(self, content: Any, source: str) -> None:
        self.source = source
        self.schema_version, file = checked(lambda: _file(content), source)
        self.provenance = file.provenance
        self._entries: dict[tuple[str, str], tuple[str, _Entry]] = {}
        self.merged = 0
        places: dict[Any, str] = {}
        standings: dict[tuple[str, str], tuple[bool, str]] = {}
        for number, entry in enumerate(file.profiles):
            place = f"profiles.{number}"
            subject = checked(functools.partial(_subject, entry), source, place)
            key, written = subject.key, _written_key(entry)
            if written in places:
                raise BundleError(
                    f"{source}: {place}: {_twice(key)}, the other at {places[written]}"
                )
            places[written] = place
            self.merged += key in self._entries
            if key not in standings or subject.standing > standings[key]:
                self._entries[key] = place, entry
                standings[key] = subject.standing

    def __getitem__(self, key: tuple[str, str]) -> Profile:
        place, entry = self._entries[key]
        return checked(lambda: _profile(entry, key), self.source, place)

    def __contains__(self, key: object) -> bool:  # else by looking at the profile closely
        return key in self._entries

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def workloads(self, device_key: str) -> list[str]:
        """Keys of the workloads that have a profile on a device."""
        return sorted(workload for device, workload in self._entries if device == device_key)


def _file(content: Any) -> tuple[int, _File]:
    """The version of a file's layout, and its content in today's; ValueError if it is no bundle."""
    version = _version(content)
    refuse_wide(content, levels=2)
    for step in range(version, BUNDLE_VERSION):
        content = _UPGRADES[step](content)
    file = _File.model_validate(content)
    _check_list(file)
    return version, file


def _subject(entry: _Entry) -> _Subject:
    refuse_wide(entry.profile, levels=2)
    return _Subject.model_validate(entry.profile)


def _written_key(entry: _Entry) -> tuple[object, ...]:
    """What a checked profile's key was made of when it was written, by any version."""
    device = entry.profile["device"]
    hard = [device[name] for name in ("platform", "kind", "cores", "memory_gib")]
    return *hard, entry.profile["workload"]


def _profile(entry: _Entry, key: tuple[str, str]) -> Profile:
    if _digest(entry.profile) != entry.digest:
        raise ValueError(
            f"the profile of {' | '.join(key)} is not what its digest was made of: the file was "
            "damaged or edited; export it again"
        )
    return Profile.model_validate(entry.profile)


def scan(data: str | bytes, source: str = "bundle") -> Index:
    """Reads a bundle's text, or that text compressed with gzip, and looks at no profile closely.

    Each is validated when it is asked for.

    Raises:
      BundleError: it is no bundle, or of a newer version, or its checksum does not fit its list of
        profiles.
    """
    return Index(checked(lambda: json_text.parse(json_text.utf8(data)), source), source)


def load(text: str | bytes, source: str = "bundle") -> Bundle:
    """Reads a bundle's text, or that text compressed with gzip, and checks all of it.

    ``source`` names it in errors.

    Raises:
      BundleError: it is no bundle, or of a newer version, or it was damaged or edited.
    """
    data = checked(lambda: json_text.utf8(text), source)
    index = scan(data, source)
    checked(lambda: json_text.refuse_repeated_names(data), source)
    profiles = tuple(index.values())
    said = index.provenance
    provenance = _provenance(profiles, said.autochunk if said else "", said.note if said else "")
    # Of profiles that another was taken for it tells, too.
    if said not in (None, provenance) and not index.merged:
        raise BundleError(
            f"{source}: its provenance does not fit its profiles: the file was damaged or edited; "
            "export it again"
        )
    return Bundle(schema_version=index.schema_version, profiles=profiles, provenance=provenance)


def read(place: str | os.PathLike[str], timeout: float = remote.TIMEOUT_SECONDS) -> Bundle:
    """Reads a bundle from a path, a URL (in ``timeout`` seconds) or "-", standard input.

    See ``load``.

    Raises:
      BundleError: it cannot be read, or is no bundle.
    """
    return load(files.fetch(place, timeout), files.name_of(place))


def _version(content: Any) -> int:
    if not isinstance(content, dict):
        raise ValueError(f"{NO_BUNDLE}; it must be an object; got {reprlib.repr(content)}")
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{NO_BUNDLE}; its schema_version must be a whole number from 1 to {BUNDLE_VERSION}; "
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
