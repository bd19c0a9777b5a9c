"""What a tune tells of its progress, one small class for each thing that can be told.

If time is left, workers may return to a workload that was reported as unfinished.
"""

from __future__ import annotations

from dataclasses import dataclass

from autochunk.device import Device
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.workload import Workload


@dataclass(frozen=True)
class DeviceFound:
    """The measuring processes are up, and this is what they measure on."""

    device: Device


@dataclass(frozen=True)
class OtherWork:
    """All is measured, and meanwhile other programs used so many of the machine's cores."""

    cores: float
    of: float


@dataclass(frozen=True)
class SharedGpu:
    """All is measured, and before or after it so many programs of others were on a GPU."""

    programs: int


@dataclass(frozen=True)
class SlowedGpu:
    """All is measured, and a GPU's clocks were held down for a share of the time that it worked."""

    reason: str
    share: float


@dataclass(frozen=True)
class LeftOut:
    """At the end, what was not begun: for want of time, or because its answer is known.

    Where ``missed``, all of the first is what "auto" missed.
    """

    workloads: tuple[Workload, ...]
    known: tuple[Workload, ...]
    missed: bool


@dataclass(frozen=True)
class Subject:
    """The workload that is told of, which is number ``number`` of ``count``."""

    workload: Workload
    number: int
    count: int

    @property
    def place(self) -> tuple[Workload, int, int]:
        """What every event about it begins with."""
        return self.workload, self.number, self.count


@dataclass(frozen=True)
class Started(Subject):
    """A worker begins with it."""


@dataclass(frozen=True)
class Measured(Subject):
    """One of its plans is measured, and ``done`` of ``total`` are now."""

    measurement: Measurement
    done: int
    total: int


@dataclass(frozen=True)
class Finished(Subject):
    """Its profile is stored; not ``complete`` if time ran out."""

    profile: Profile


@dataclass(frozen=True)
class Awaited(Subject):
    """Other workers are still at it, and nothing is left for the one that tells."""


@dataclass(frozen=True)
class Skipped(Subject):
    """Its profile was there already, and is good enough.

    In the store that profiles go to, or in another ``layer`` that "auto" reads.
    """

    profile: Profile
    layer: str = ""


@dataclass(frozen=True)
class Failed(Subject):
    """It could not be measured; ``profile`` has what was measured before, if anything."""

    detail: str
    profile: Profile | None


@dataclass(frozen=True)
class OutOfTime(Subject):
    """Time ran out before there was more than the profile that is stored, if any.

    It was begun, and so many of its plans are measured; or, where ``measured`` is None, not begun.
    """

    profile: Profile | None
    measured: int | None = None


Disturbance = OtherWork | SharedGpu | SlowedGpu

Ending = Finished | Awaited | Skipped | Failed | OutOfTime

Event = DeviceFound | Disturbance | LeftOut | Started | Measured | Ending
