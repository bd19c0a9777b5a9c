"""Where studies are kept: a journal file, or a database that several machines reach."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from sqlalchemy.exc import IntegrityError, ProgrammingError

from autochunk.device import Device, current_key
from autochunk.errors import StorageError
from autochunk.functions import Tunable
from autochunk.store.merge import rank
from autochunk.store.profile import Effort, Profile
from autochunk.store.remote import without_password
from autochunk.tuner.study.failures import (
    PATIENCE_SECONDS,
    Patience,
    first_line,
    one_error,
    patient,
)
from autochunk.tuner.study.journal import JournalFile
from autochunk.tuner.study.trials import Study, readable
from autochunk.workload import Workload

MISSES = " | misses"
"""How the name of a study ends that has no plans, but what machines have missed."""

_ATTEMPTS = 10  # at opening a database
_CONNECT_SECONDS = 10  # a host that does not answer is waited for minutes by itself


class Storage:
    """Where studies are kept.

    Args:
      place: a database's URL as SQLAlchemy reads it (``postgresql://user:password@host/name``), or
        the path of a journal file.
      make: whether a journal file that is not there is made.
      patience: seconds for which one that worked, and fails for what may pass, is waited for; None
        is ``PATIENCE_SECONDS``.

    Raises:
      StorageError: it cannot be reached, or is not there and not to be made.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        *,
        make: bool = True,
        patience: float | None = None,
    ) -> None:
        self.place = os.fspath(place)
        _check(self.place, make)
        self._patience = Patience(PATIENCE_SECONDS if patience is None else patience)
        with one_error(self.place):
            try:
                self._optuna = patient(_open(self.place), self._patience)
            # what Optuna makes of content that it did not write
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                raise StorageError(
                    f"{without_password(self.place)} is no storage that `autochunk tune --storage` "
                    f"made: {first_line(error)}"
                ) from error

    def study(self, device: Device, workload: Tunable, effort: Effort) -> Study:
        """The study of a workload; made if it is not there.

        One that an older version made goes on under its name.
        """
        name = study_name(device, workload, effort)
        with one_error(self.place):
            # Sorted, so that all machines that share it take the same.
            names = sorted(optuna.get_all_study_names(self._optuna))
            older = (one for one in names if _current_name(one) == name)
            name = name if name in names else next(older, name)
            return Study(self.place, self._optuna, name, self._patience)

    def profiles(self) -> tuple[list[Profile], int]:
        """Of each device and workload the profile of best effort, and the number of other studies.

        Those have no profile yet, or one that only a newer autochunk can read.
        """
        with one_error(self.place):
            summaries = optuna.get_all_study_summaries(
                storage=self._optuna, include_best_trial=False
            )
        studies = [one for one in summaries if not one.study_name.endswith(MISSES)]
        found = [readable(one.user_attrs.get("profile")) for one in studies]
        rising = sorted(filter(None, found), key=lambda profile: rank(profile, "best-effort"))
        return list({profile.key: profile for profile in rising}.values()), found.count(None)


def study_name(device: Device, workload: Tunable, effort: Effort) -> str:
    """What machines must have in common to share a study.

    The device, the libraries whose programs are timed, and how memory is handed out to them.
    """
    soft = ("cudnn", "allocator", "huge_pages")
    given = "".join(f" {name}={value}" for name in soft if (value := getattr(device, name)))
    return f"{device.key} jaxlib={device.jaxlib}{given} | {workload.key} | {effort}"


def older_study_names(device: Device, workload: Workload, effort: Effort) -> list[str]:
    """What older versions called the same study on a machine with this device's memory."""
    rest = study_name(device, workload, effort).removeprefix(device.key)
    return [f"{stem} memory={device.memory_gib}GiB{rest}" for stem in device.key_stems]


def _current_name(name: str) -> str:
    """A study's name that any version gave it, as this version would."""
    _, jaxlib, rest = name.partition(" jaxlib=")
    return f"{device_key_of(name)}{jaxlib}{rest}"


def device_key_of(name: str) -> str:
    """The key, as it is today, of the device that a study's name begins with."""
    return current_key(name.partition(" jaxlib=")[0])


def open_private(journal: Path) -> Storage:
    """The storage in a journal of this machine's own.

    What cannot be read is thrown away: it saves work, no more. Nor is it worth waiting for.
    """
    try:
        return Storage(journal, patience=0.0)
    except StorageError:
        journal.unlink(missing_ok=True)
        return Storage(journal, patience=0.0)


def _check(place: str, make: bool) -> None:
    """Raises StorageError for what can be told without opening it."""
    is_url = "://" in place
    if is_url and place.count("@") > 1:
        raise StorageError(
            "in a storage's URL there is one @, before the host; one in a password is written %40 "
            "(PGPASSWORD needs no such care)"
        )
    if not (is_url or make or Path(place).exists()):
        raise StorageError(
            f"there is no storage {place}; name the one that `autochunk tune --storage` was given"
        )


def _open(place: str) -> BaseStorage:
    if "://" in place:
        return get_storage(_open_database(place))
    return JournalStorage(JournalFile(Path(place)))


def _open_database(url: str) -> RDBStorage:
    # SQLAlchemy's default for PostgreSQL is psycopg2; psycopg is its successor.
    for scheme in ("postgresql://", "postgres://"):
        url = url.replace(scheme, "postgresql+psycopg://", 1) if url.startswith(scheme) else url
    options = {"pool_pre_ping": True, "connect_args": _connecting(url)}
    for _ in range(_ATTEMPTS):
        # Workers that start together make the tables of a new database at the same time.
        with contextlib.suppress(IntegrityError, ProgrammingError):
            return RDBStorage(url, engine_kwargs=options)
        time.sleep(0.5)
    return RDBStorage(url, engine_kwargs=options)


def _connecting(url: str) -> dict[str, int]:
    """How PostgreSQL's driver connects, unless the user says it."""
    said = "connect_timeout=" in url or "PGCONNECT_TIMEOUT" in os.environ
    ours = url.startswith("postgresql+psycopg:") and not said
    return {"connect_timeout": _CONNECT_SECONDS} if ours else {}
