"""What a service has, as a bundle for machines that only read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from autochunk.device import Device
from autochunk.errors import BundleError
from autochunk.store import bundle, files, remote
from autochunk.store.merge import rank
from autochunk.store.profile import Profile


def publish(place: str, profiles: Iterable[Profile], device: Device) -> int | None:
    """Adds a device's profiles to a bundle, in which nothing better is overwritten.

    The file is there whole at any moment (at a URL that depends on the protocol), and is not
    touched where nothing is new.

    Args:
      place: a file or URL, made where it is not there, or a folder, in which there is a file for
        each kind of device.
      profiles: what there is.
      device: of which they are.

    Returns:
      How many profiles are new in it; None where it was not touched.

    Raises:
      BundleError: what is there cannot be read, or it cannot be written.
    """
    place = file_of(place, device)
    added, all_of_them = merged(_read(place), profiles)
    if not added:
        return None
    files.write(place, bundle.dump(all_of_them))
    return added


def file_of(place: str, device: Device) -> str:
    """The file that a place stands for."""
    if remote.is_url(place) or not (place.endswith("/") or Path(place).is_dir()):
        return place
    name = re.sub(r"[^a-z0-9]+", "-", device.key.lower()).strip("-")[:120]
    return str(Path(place) / f"{name}.json")


def merged(there: Iterable[Profile], ours: Iterable[Profile]) -> tuple[int, list[Profile]]:
    """How many of ours are new or better than what is there, and what there is then."""
    best = {profile.key: profile for profile in there}
    added = 0
    for profile in ours:
        old = best.get(profile.key)
        if old is None or rank(profile, "best-effort") > rank(old, "best-effort"):
            best[profile.key] = profile
            added += 1
    return added, list(best.values())


def _read(place: str) -> tuple[Profile, ...]:
    """What is there; nothing where nothing is."""
    try:
        return bundle.read(place).profiles
    except BundleError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, FileNotFoundError):
            cause = cause.__cause__
        if cause is None:
            raise
        return ()
