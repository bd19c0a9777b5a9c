"""What a search found, also where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass

from autochunk.errors import StorageError
from autochunk.store.measurement import Measurement


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
