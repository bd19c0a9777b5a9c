"""A tune's own journals, which lie beside its store until a workload is finished.

What is interrupted, even by a crash, goes on from there, if within a month.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from autochunk.device import Device
from autochunk.errors import StorageError
from autochunk.store.profile import Effort
from autochunk.tuner.study.storage import older_study_names, open_private, study_name
from autochunk.tuner.study.trials import Study
from autochunk.workload import Workload

_KEPT_DAYS = 30


@dataclass(frozen=True)
class Journals:
    """One file for each workload of a tune.

    What is measured by force has files of its own, so that it goes on there when it was
    interrupted; and so has each budget, for what does not fit one may fit another.

    Attributes:
      store: the path of the store that they lie beside.
      device, effort, memory_budget_mb, force: what is tuned, and how.
    """

    store: Path
    device: Device
    effort: Effort
    memory_budget_mb: float | None
    force: bool

    def study(self, workload: Workload) -> Study:
        """The study of a workload; made if it is not there, or a newer version's."""
        try:
            study = self._study(workload)
            study.measured()
        except StorageError:
            self._path(workload).unlink(missing_ok=True)
            study = self._study(workload)
        return study

    def _study(self, workload: Workload) -> Study:
        return open_private(self._path(workload)).study(self.device, workload, self.effort)

    def throw_away(self, workload: Workload) -> None:
        """Throws a finished workload's journal away, unless another process is at it.

        If no plan could be timed too: why that is may pass.
        """
        journal = self._path(workload)
        if journal.exists() and not self.study(workload).workers():
            for file in (journal, journal.with_name(journal.name + ".lock")):
                with contextlib.suppress(OSError):
                    file.unlink()

    def throw_away_old(self) -> None:
        """Throws away what nobody went on with for long: all tunes', with this store.

        Such are left by one that was killed, and whose command was never given again.
        """
        for file in self._folder.glob("*"):
            with contextlib.suppress(OSError):  # another tune does the same
                if time.time() - file.stat().st_mtime > _KEPT_DAYS * 86_400:
                    file.unlink()

    @property
    def _folder(self) -> Path:
        return self.store.with_name(f"{self.store.name}.unfinished")

    def _path(self, workload: Workload) -> Path:
        what = (self.device, workload, self.effort)
        today, *older = map(self._file, (study_name(*what), *older_study_names(*what)))
        # An older version's goes on.
        return today if today.exists() else next(filter(Path.exists, older), today)

    def _file(self, name: str) -> Path:
        if self.memory_budget_mb is not None:
            name += f" | {self.memory_budget_mb:g} MB"
        if self.force:
            name += " | forced"
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self._folder / f"{digest}.journal"
