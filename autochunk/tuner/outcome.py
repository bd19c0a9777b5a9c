"""What a search found, also where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from autochunk.errors import StorageError
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
      measurements: by whomever.
      complete: whether everything was looked at.
      awaited: whether other workers are still looking.
      failure: why no worker could go on; empty if that is not what ended it.
    """

    measurements: tuple[Measurement, ...]
    complete: bool
    awaited: bool = False
    failure: str = ""


class Tuned(NamedTuple):
    """What became of functions that "auto" missed.

    Attributes:
      profiles: of those that were measured.
      wanted: how many calls there were, each mode for itself.
      left: how many of them have no finished profile.
    """

    profiles: list[Profile]
    wanted: int
    left: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was measured before it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class StorageLost(StorageError):
    """The storage failed, with what was measured before it."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome
