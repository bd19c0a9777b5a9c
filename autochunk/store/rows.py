"""The rows of the user's store: their keys, of any version, and what is in them.

A row may come from a newer version, another program or a damaged file. Older versions had more in a
device's key: it is read as the key that it would be today.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
)

from autochunk.device import Device, current_key
from autochunk.store.profile import SCHEMA_VERSION, Profile
from autochunk.store.rescue import Row
from autochunk.text import one_line

PROFILES, MISSED = TABLES = "profiles", "missed"

_LARGEST_COUNT = 2**53  # which every reader of JSON has exactly

# No device's name has it.
_BETWEEN = " | "


class Miss(BaseModel):
    """The value of a row of a missed workload: when that was first, and how often since.

    What a newer version adds is kept.
    """

    model_config = ConfigDict(extra="allow")

    when: str
    count: int = 1

    @field_validator("count", mode="before")
    @classmethod
    def _some_number(cls, value: object) -> object:
        # A count that is none is no reason to lose the miss.
        return value if type(value) is int and 0 <= value <= _LARGEST_COUNT else 1


class Newer(BaseModel):
    """What there is to know about a profile that a newer version wrote."""

    schema_version: Annotated[StrictInt, Field(gt=SCHEMA_VERSION)]


def row_key(device_key: str, workload_key: str) -> str:
    """The key of a row."""
    return f"{device_key}{_BETWEEN}{workload_key}"


def ranges(device: Device) -> list[tuple[str, str]]:
    """From where, included, to where the keys of a device's rows lie.

    Others' may, too, as of a device whose name goes on after a space. Those of today come last:
    whoever reads while a profile is put in an older one's place finds one of the two.
    """
    return [(f"{stem} ", f"{stem} \U0010ffff") for stem in reversed(device.key_stems)]


def is_of(key: bytes | None, device: Device, workload_key: str = "") -> tuple[str, str] | None:
    """The names in a row's key, if they are a device's, and the workload's if one is asked for."""
    names = names_of(key)
    ours = names and names[0] == device.key and workload_key in ("", names[1])
    return names if ours else None


def names_of(key: bytes | None) -> tuple[str, str] | None:
    """Device key, as it is today, and workload key of a row; None of one that has neither."""
    device_key, between, workload_key = key_text(key).partition(_BETWEEN)
    return (current_key(device_key), workload_key) if between else None


def key_text(key: bytes | None) -> str:
    """A row's key, which need be no text, for people."""
    return (key or b"").decode(errors="backslashreplace")


def profile_of(row: Row) -> Profile:
    """The profile of a row; ValueError, which says why, where it is none or another key's."""
    try:
        profile = Profile.model_validate_json(row.value or b"")
    except ValidationError as error:
        raise ValueError(f"{error.error_count()} problems, first: {_first(error)}") from error
    if names_of(row.key) != profile.key:
        raise ValueError(f"under the key {row.key!r} is the profile of {row_key(*profile.key)}")
    return profile


def miss_of(row: Row) -> Miss | None:
    """The miss of a row; None where it is none."""
    try:
        return Miss.model_validate_json(row.value or b"")
    except ValidationError:
        return None


def readable(row: Row) -> Profile | None:
    """The profile of a row; None where it is none, or another key's."""
    try:
        return profile_of(row)
    except ValueError:
        return None


def best_of(rows: Iterable[Row]) -> list[Profile]:
    """The profile of each device and workload among rows that can be read, by key.

    Of several, one under today's key, else the one that was made last.
    """
    found = [(row.key, profile) for row in rows if (profile := readable(row))]
    rising = sorted(
        found, key=lambda one: (row_key(*one[1].key).encode() == one[0], one[1].created)
    )
    best = {profile.key: profile for _, profile in rising}
    return [best[key] for key in sorted(best)]


def whole(table: str, row: Row) -> bool:
    """Whether a row is what some version stored."""
    try:
        named = bool((row.key or b"").decode())
    except UnicodeDecodeError:
        return False
    if table == MISSED:
        return named and fits(Miss, row)
    return named and (readable(row) is not None or fits(Newer, row))


def fits(kind: type[BaseModel], row: Row) -> bool:
    """Whether a row's value is of a kind."""
    try:
        kind.model_validate_json(row.value or b"")
    except ValidationError:
        return False
    return True


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = one_line(".".join(map(str, problem["loc"])))
    return f"{where[:300]}: {one_line(problem['msg'][:300])}"
