"""One service on a device of this machine: a lock that goes with the process that holds it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from autochunk.device import Device
from autochunk.errors import DeviceError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


class DeviceLock:
    """The right to watch a device, whoever's store is for; let go of when the process ends.

    Args:
      device: which is watched.
      which: what tells it from others of its kind in this machine: a GPU's UUID, or cores.

    Attributes:
      name: of the device among all, short and fit for a file.

    Raises:
      DeviceError: another process has it, or there are no such locks on this system.
    """

    def __init__(self, device: Device, which: str) -> None:
        if fcntl is None:
            raise DeviceError("watch needs a system with flock(2); run `autochunk tune --missed`")
        self.name = hashlib.sha256(f"{device.key} {which}".encode()).hexdigest()[:16]
        self.path = Path(tempfile.gettempdir()) / f"autochunk-watch-{self.name}.lock"
        try:
            self._file = _opened(self.path)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise DeviceError(
                f"another autochunk watch has {device.key} ({self.path}); "
                "`autochunk watch --status` says what it does"
            ) from None
        except OSError as error:
            raise DeviceError(f"no lock can be had on {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Lets go."""
        os.close(self._file)

    def __enter__(self) -> DeviceLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(path: Path) -> int:
    """The file, which may be another user's: it is only read, and no link is followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)
