"""Places: where the layers are, in the order in which they are asked.

First what ``AUTOCHUNK_PROFILES`` names (bundle files, folders of them, URLs), then the user's own
store, the site's folder of bundles (of all users of a machine or of a cluster's shared file
system), and what is shipped with autochunk.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import platformdirs

from autochunk.errors import StoreError
from autochunk.resolution.layers import SHIPPED, SITE, BundleLayer, Layer
from autochunk.store import remote
from autochunk.store.profiles import STORE_VARIABLE, ProfileStore, default_path

PROFILES_VARIABLE = "AUTOCHUNK_PROFILES"
# All that the places depend on.
_VARIABLES = (PROFILES_VARIABLE, STORE_VARIABLE, "XDG_DATA_HOME", "XDG_DATA_DIRS", "HOME")

STORE = "user store"


def shipped_profiles() -> Path:
    """The folder of profiles that come with autochunk.

    Inside the wheel, or beside the package in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "shipped_profiles"
    return inside if inside.is_dir() else package.parent / "profiles"


def site_profiles() -> Path:
    """The folder of bundles for all users of a machine, such as ``/usr/local/share/autochunk``.

    ``XDG_DATA_DIRS`` moves it.
    """
    return Path(platformdirs.site_data_path("autochunk"))


def places(store: Path | None) -> tuple[tuple[str, str], ...]:
    """(kind, place) of each layer, first asked first; ``store`` stands in for the user's own."""
    return _places(store, *(os.environ.get(name) for name in _VARIABLES))


@functools.lru_cache(maxsize=64)
def _places(
    store: Path | None, profiles: str | None, *_environment: str | None
) -> tuple[tuple[str, str], ...]:
    """The same, from all that it depends on."""
    found = [(PROFILES_VARIABLE, _absolute(part)) for part in _split(profiles or "")]
    # Who has no home directory has no store, and says so when one is to be written.
    with contextlib.suppress(StoreError):
        found.append((STORE, str(store or default_path())))
    return (*found, (SITE, str(site_profiles())), (SHIPPED, str(shipped_profiles())))


def _absolute(place: str) -> str:
    return place if remote.is_url(place) else str(Path(os.path.expanduser(place)).absolute())


def _split(text: str) -> list[str]:
    """The places in a list like PATH.

    In a URL the colons after the scheme, before a port and in a user's name separate nothing.
    """
    parts: list[str] = []
    for piece in text.split(os.pathsep):
        if parts and (piece.startswith("//") or _ends_in_host(parts[-1], piece)):
            parts[-1] += os.pathsep + piece
        else:
            parts.append(piece)
    return [part for part in parts if part]


def _ends_in_host(part: str, following: str) -> bool:
    """Whether a part is a URL up to a colon in its host, and what follows no place of its own."""
    scheme, _, host = part.partition("://")
    return scheme != part and "/" not in host and following[:1] not in ("/", "~", ".", "")


def make_layer(kind: str, place: str) -> Layer:
    """The layer of one of ``places``."""
    if kind == STORE:
        return ProfileStore(Path(place), briefly=True)
    return BundleLayer(place, kind)


def all_layers(store: Path | None) -> list[Layer]:
    """Every layer, first asked first, to be read anew."""
    return [make_layer(kind, place) for kind, place in places(store)]
