"""Looks for bytes that reading a bundle answers with no bundle and no BundleError of one line.

Guided by coverage, through atheris. Not collected by pytest, for it ends when it is told to;
``check``, which says what holds for all bytes, is also what test_bundle.py checks with. To run it,
where atheris can be imported (its wheels are for Python 3.11) besides autochunk and what its tests
need::

    mkdir corpus
    python tests/store/fuzz_bundle.py corpus tests/store/released -max_total_time=600 -max_len=20000

New inputs are kept in ``corpus``; one that fails is written to ``crash-...``, and is tried alone by
naming it as the only argument.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import TypeVar

from autochunk.errors import BundleError
from autochunk.store import bundle
from autochunk.store.bundle import Bundle, Index
from autochunk.store.profile import Profile

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def check(data: str | bytes) -> Bundle | BundleError:
    """Whatever is read loads or is a BundleError of one line.

    What loads is found by scanning, too, and can be written again.
    """
    loaded, index = _outcome(bundle.load, data), _outcome(bundle.scan, data)
    if isinstance(loaded, Bundle):
        assert isinstance(index, Index), index
        assert tuple(index.values()) == loaded.profiles
        text = bundle.dump(loaded.profiles, loaded.provenance.note)
        again = bundle.load(text)
        assert again.profiles == tuple(sorted(loaded.profiles, key=_key))
        assert bundle.dump(again.profiles, again.provenance.note) == text
    elif isinstance(index, Index):
        found = {key: _outcome(index.__getitem__, key) for key in index}
        sound = {key: one for key, one in found.items() if not isinstance(one, BundleError)}
        assert all(_key(profile) == key for key, profile in sound.items())
        # Only loading looks at what the error tells then.
        said = str(loaded)
        all_sound = len(sound) == len(found)
        assert not all_sound or "provenance does not fit" in said or "given twice" in said, said
    return loaded


def _key(profile: Profile) -> tuple[str, str]:
    return profile.device.key, profile.workload


def _outcome(function: Callable[[Argument], Result], argument: Argument) -> Result | BundleError:
    """What a function returns, or its BundleError."""
    try:
        return function(argument)
    except BundleError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert message.isprintable(), message
        assert len(message) < 3000
        return error


def sealed(data: bytes) -> bytes:
    """The bytes with digests and a checksum that fit, so that what lies behind these is reached.

    Bytes that are no bundle at all stay as they are.
    """
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads(data)
        for entry in content["profiles"]:
            entry["digest"] = bundle._digest(entry["profile"])
        content["checksum"] = bundle._checksum(entry["digest"] for entry in content["profiles"])
        return json.dumps(content).encode()
    return data


def _try(data: bytes) -> None:
    check(data)
    again = sealed(data)
    if again != data:
        check(again)


def main() -> None:
    """Hands the process to the fuzzer."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, _try)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
