"""Looks for bytes that a reader of other people's files answers with anything but a clear error.

Guided by coverage, through atheris. Not collected by pytest, for it ends when it is told to. To run
it, where atheris can be imported (its wheels are for Python 3.11) besides autochunk and what its
tests need::

    mkdir corpus
    python tests/fuzz.py bundle corpus tests/store/released -max_total_time=600 -max_len=20000

The readers are ``bundle``, ``row`` (of a store), ``journal`` (of a shared storage) and ``shape``.
New inputs are kept in ``corpus``; one that fails is written to ``crash-...``, and is tried alone by
naming it instead of the corpus. ``TMPDIR=/dev/shm`` makes journals several times as quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Only what is looked at is instrumented, as all of jax takes minutes; nothing in tests that only
# call the checks.
if __name__ == "__main__":
    import atheris

    instrumented = atheris.instrument_imports(include=["autochunk"])
else:
    instrumented = contextlib.nullcontext()
with instrumented:
    from factories import make_device, make_workload

    from autochunk.errors import BundleError, StorageError, WorkloadError
    from autochunk.plan import Plan
    from autochunk.store import bundle, rescue, rows
    from autochunk.store.bundle import Bundle, Index
    from autochunk.store.profile import Profile
    from autochunk.tuner.study import Storage
    from autochunk.workload import Workload

DEVICE, WORKLOAD = make_device(), make_workload()

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def check_bundle(data: str | bytes) -> Bundle | BundleError:
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
        _check_message(error)
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


def check_row(data: bytes) -> None:
    """A row of a store, its key before the first newline, is read or has no profile.

    What is read can be written again, and chosen from.
    """
    key, _, value = data.partition(b"\n")
    expected = rows.row_key(DEVICE.key, WORKLOAD.key).encode()
    for row in (rescue.Row(1, key, value), rescue.Row(1, expected, data)):
        rows.names_of(row.key)
        rows.is_of(row.key, DEVICE, WORKLOAD.key)
        missed = rows.miss_of(row)
        if missed:
            missed.model_dump_json()
        for table in rows.TABLES:
            rows.whole(table, row)
        rows.best_of([row, row])
        with contextlib.suppress(ValueError):
            rows.profile_of(row)
        profile = rows.readable(row)
        if profile:
            assert type(profile).model_validate_json(profile.model_dump_json()) == profile
            profile.choose()
            profile.stale_reasons(DEVICE)


def check_journal(data: bytes) -> None:
    """A shared journal is gone on with, or is a StorageError of one line; no byte of it is lost."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        path.write_bytes(data)
        try:
            storage = Storage(path, make=False, patience=0.0)
            storage.profiles()
            study = storage.study(DEVICE, WORKLOAD, "quick")
            study.measured()
            study.deaths()
            study.workers()
            claim = study.claim([Plan("xla", 16.0), Plan("dense", None)])
            if claim:
                with claim:
                    claim.runs("dense")
        except StorageError as error:
            _check_message(error)
        assert path.read_bytes()[: len(data)] == data


def check_shape(data: bytes) -> None:
    """The text of ``--shape`` is a workload that its key names, or a WorkloadError of a line."""
    try:
        workload = Workload.parse(data.decode(errors="surrogateescape"))
    except WorkloadError as error:
        _check_message(error)
        return
    assert Workload.parse(workload.key) == workload
    again = Workload.parse(workload.shape, dtype=workload.dtype, mode=workload.mode)
    assert again == workload


def _check_message(error: Exception) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), message
    assert len(message) < 3000


def _check_sealed(data: bytes) -> None:
    check_bundle(data)
    again = sealed(data)
    if again != data:
        check_bundle(again)


READERS = {
    "bundle": _check_sealed,
    "row": check_row,
    "journal": check_journal,
    "shape": check_shape,
}


def main() -> None:
    """Hands the process to the fuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"required: one of {', '.join(READERS)}, and where inputs are; see the docstring")
    atheris.Setup(sys.argv, READERS[sys.argv.pop(1)])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
