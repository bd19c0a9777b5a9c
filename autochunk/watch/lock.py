"""One service on a device of this machine: a lock that goes with the process that holds it."""

from __future__ import annotations

import hashlib
import os
import stat
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
        try:
            self.path = _folder() / f"autochunk-watch-{self.name}.lock"
            self._file = _opened(self.path)
        except OSError as error:
            raise DeviceError(f"a device cannot be locked here: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            held = isinstance(error, BlockingIOError)
            raise DeviceError(
                f"another autochunk watch has {device.key} ({self.path}); "
                "`autochunk watch --status` says what it does"
                if held
                else f"{self.path} cannot be locked: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Lets go."""
        os.close(self._file)

    def __enter__(self) -> DeviceLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _folder() -> Path:
    """The same for all users; where there is one, one from which nothing old is cleared away."""
    shared = Path("/run/lock")
    for_all = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO
    if shared.is_dir() and shared.stat().st_mode & for_all == for_all:
        return shared
    return Path(tempfile.gettempdir())


def _opened(path: Path) -> int:
    """The file, which may be another user's: it is only read, and no link is followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)
