"""Is the device idle, for long enough, at an hour at which it may be used? Decided, not seen."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autochunk.errors import ArgumentError

BUSY_CORES = 0.3
"""So many cores in use by others are work; less is what any system does by itself."""

_BUSY_SHARE = 0.5  # of the cores, where the device is no CPU
_BUSY_GPU = 0.1  # of the time
_LEAST_FREE = {"cpu": 0.25, "gpu": 0.9}  # of the memory, while nothing is measured


@dataclass(frozen=True)
class Look:
    """What was seen of a device at a moment; None is what cannot be told.

    Attributes:
      cores: in use by others, on the cores that this process may use.
      programs: how many compute on the GPU, the measuring one among them.
      utilization: the share of the time in which the GPU was busy.
      free: the share of the device's memory that is free.
    """

    cores: float | None = None
    programs: int | None = None
    utilization: float | None = None
    free: float | None = None


@dataclass(frozen=True)
class Threshold:
    """From where on a device is busy.

    Attributes:
      platform: "cpu" or "gpu".
      cores: others' that are work.
    """

    platform: str
    cores: float

    @classmethod
    def of(cls, platform: str, usable_cores: float, given: float | None = None) -> Threshold:
        """The usual one, or with so many cores; a GPU is disturbed only where half are busy."""
        usual = BUSY_CORES if platform == "cpu" else max(BUSY_CORES, _BUSY_SHARE * usable_cores)
        return cls(platform, usual if given is None else given)

    def busy(self, look: Look, *, measuring: bool) -> str:
        """Why the device is not idle; "" if it is.

        While something is measured, what that takes of the GPU and of memory cannot be told from
        what others take, but for the number of programs.
        """
        if look.cores is not None and look.cores > self.cores:
            return f"others use {look.cores:.1f} cores"
        if (look.programs or 0) > measuring:
            return f"{look.programs} programs use the GPU"
        if measuring:
            return ""
        if (look.utilization or 0.0) > _BUSY_GPU:
            return f"the GPU is busy for {look.utilization:.0%} of the time"
        if look.free is not None and look.free < _LEAST_FREE.get(self.platform, 0.0):
            return f"{look.free:.0%} of the memory is free"
        return ""

    def tells(self, look: Look) -> bool:
        """Whether it can be told at all that nobody is at work."""
        return (look.cores if self.platform == "cpu" else look.programs) is not None


class Quiet:
    """Since when the device is idle; times are ``time.monotonic()``'s."""

    def __init__(self) -> None:
        self._since: float | None = None

    def saw(self, busy: str, now: float) -> float:
        """Takes what was seen; returns for how many seconds it is idle now."""
        if busy:
            self._since = None
            return 0.0
        self._since = now if self._since is None else self._since
        return now - self._since


@dataclass(frozen=True)
class Hours:
    """Hours of the day, in minutes after midnight: from ``start``, included, to ``end``.

    They may go on after midnight; where both are the same it is all day.
    """

    start: int = 0
    end: int = 0

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Of a text such as 22-6 or 22:30-6:15.

        Raises:
          ArgumentError: it is none.
        """
        found = re.fullmatch(r"(\d{1,2})(?::(\d\d))?-(\d{1,2})(?::(\d\d))?", text.strip(), re.ASCII)
        numbers = [int(part or 0) for part in found.groups()] if found else []
        if not numbers or max(numbers[::2]) > 24 or max(numbers[1::2]) > 59:
            raise ArgumentError(
                f"hours must be two times of day such as 22-6 or 22:30-6:15; got {text!r}"
            )
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        minutes = [60 * hour + minute for hour, minute in pairs]
        if max(minutes) > 24 * 60:
            raise ArgumentError(f"a day has 24 hours; got {text!r}")
        return cls(minutes[0] % (24 * 60), minutes[1] % (24 * 60))

    def include(self, minute: int) -> bool:
        """Whether a minute of the day is one of them."""
        if self.start == self.end:
            return True
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return "-".join(f"{one // 60}:{one % 60:02}" for one in (self.start, self.end))


ALL_DAY = Hours()
