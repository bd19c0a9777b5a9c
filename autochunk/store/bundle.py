"""Bundles: profiles as one JSON file that travels between machines.

A bundle is an object with ``schema_version`` and a list ``profiles``. Its text is deterministic: the same profiles give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from autochunk.errors import BundleError
from autochunk.store.database import ProfileStore
from autochunk.store.profile import SCHEMA_VERSION, Bundle, Profile

MOST_BYTES = 256 * 2**20


class ImportSummary(NamedTuple):
    """How many profiles of a bundle were new to the store, replaced an older one, or were left out because the store's is as new."""

    new: int
    updated: int
    kept: int


def dump(profiles: Iterable[Profile]) -> str:
    """The profiles as a bundle's text, ordered by device and workload."""
    ordered = sorted(profiles, key=lambda profile: (profile.device.key, profile.workload))
    bundle = Bundle(schema_version=SCHEMA_VERSION, profiles=tuple(ordered))
    return json.dumps(bundle.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def load(text: str | bytes, source: str = "bundle") -> Bundle:
    """Reads a bundle's text; ``source`` names it in errors.

    Raises:
      BundleError: the text is no bundle, or one of another schema version.
    """
    if len(text) > MOST_BYTES:
        raise BundleError(f"{source}: a bundle has at most {MOST_BYTES >> 20} MiB; this has {len(text) >> 20}")
    try:
        return Bundle.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = _one_line(".".join(map(str, problem["loc"]))) or "the whole text"
        if problem["loc"] == ("schema_version",) and problem["type"] != "missing":
            raise BundleError(
                f"{source}: schema_version must be {SCHEMA_VERSION}; got {_one_line(str(problem['input'])[:80])}; export it again with this version"
            ) from None
        raise BundleError(
            f"{source}: not a bundle of profiles as `autochunk export` writes; {error.error_count()} problem(s), "
            f"first at {place}: {_one_line(problem['msg'][:300])}"
        ) from None


def _one_line(text: str) -> str:
    """Text from a file, fit for a line of an error: without line ends and control characters."""
    return text.encode("unicode_escape").decode("ascii")


def read(path: Path) -> Bundle:
    """Reads a bundle file.

    Raises:
      BundleError: the file cannot be read, or is no bundle.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BundleError(f"{path}: a bundle has at most {MOST_BYTES >> 20} MiB; this has {path.stat().st_size >> 20}")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error
    return load(data, str(path))


def merge(store: ProfileStore, bundle: Bundle) -> ImportSummary:
    """Adds a bundle's profiles to a store, all or none; of two for one device and workload the later one stays."""
    stored = {(profile.device.key, profile.workload): profile for profile in store.profiles()}
    new, updated, kept = [], [], 0
    latest = {(p.device.key, p.workload): p for p in sorted(bundle.profiles, key=lambda profile: profile.created)}
    for key, profile in latest.items():
        mine = stored.get(key)
        if mine is None:
            new.append(profile)
        elif profile.created > mine.created:
            updated.append(profile)
        else:
            kept += 1
    if new or updated:
        store.put_all([*new, *updated])
    return ImportSummary(len(new), len(updated), kept)
