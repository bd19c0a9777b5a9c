"""What all workloads of one tune have in common: how hard to look, for how long, what is stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import autochunk
from autochunk.device import Device
from autochunk.errors import StorageError
from autochunk.resolution.answer import Resolution
from autochunk.resolution.resolve import resolve
from autochunk.resolution.settings import use
from autochunk.store.profile import (
    ATTENTION_VERSION,
    EFFORTS,
    Effort,
    Profile,
    sliced_shape,
    utc_now,
)
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.agenda import Agenda
from autochunk.tuner.candidates import all_plans
from autochunk.tuner.earlier import anchor_of, under_names_of, what_stands
from autochunk.tuner.effort import EFFORT_SETTINGS
from autochunk.tuner.events import Event
from autochunk.tuner.outcome import Outcome
from autochunk.tuner.probe import seconds_left
from autochunk.tuner.study import Study
from autochunk.workload import Workload

FEWEST_TIMED = 2
"""Of fewer plans there is nothing to choose."""


@dataclass(frozen=True)
class Task:
    """One tune on one kind of device, and what has become of each workload.

    Attributes:
      agenda: when which workload is begun.
      force: whatever is stored is measured anew.
      found: profiles that are stored.
      begun: some worker has been at it.
      spent: its share of the time is over; more is for it only when all others have had theirs.
      finished: nothing is left to be measured.
      failed: a worker could not go on with it, and no other one is to try.
      storing: held by whoever compares with what is stored, and stores.
    """

    effort: Effort
    store: ProfileStore
    device: Device
    deadline: float | None
    on_event: Callable[[Event], None]
    force: bool = False
    agenda: Agenda = field(default_factory=Agenda)
    found: dict[Workload, Profile] = field(default_factory=dict)
    begun: set[Workload] = field(default_factory=set)
    spent: set[Workload] = field(default_factory=set)
    finished: set[Workload] = field(default_factory=set)
    failed: set[Workload] = field(default_factory=set)
    storing: threading.Lock = field(default_factory=threading.Lock)

    def is_over(self, workload: Workload) -> bool:
        """Whether no worker is to go on with a workload."""
        ended = workload in self.finished or workload in self.failed
        return ended or self.agenda.is_over(workload)

    def takes_up(self, workload: Workload) -> bool:
        """Whether a worker is to begin a workload now, or to go on with it."""
        return self.agenda.takes_up(workload, self.begun, seconds_left(self.deadline))

    def good_enough(self, workload: Workload) -> Profile | None:
        """The stored profile, if measuring again would tell nothing new."""
        profile = self.store.get(self.device, workload)
        if profile is None or not profile.complete or profile.stale_reasons(self.device):
            return None
        return profile if _rank(profile.effort) >= _rank(self.effort) else None

    def build_on_earlier(self, study: Study, workload: Workload, budget_bytes: int | None) -> None:
        """Contributes to a study that has nothing yet what is stored and still stands.

        Of a profile that a new kernel made stale that is all that is in it.
        """
        if self.force:
            return
        with self.storing:  # else another worker would see it half done, and measure the rest
            profile = self.store.get(self.device, workload)
            if profile is None or profile.device.stale_reasons(self.device):
                return
            shape = sliced_shape(workload)
            plans = all_plans(shape, EFFORT_SETTINGS[self.effort], self.device.platform)
            anchor = anchor_of(under_names_of(plans, shape, profile.measurements))
            standing = under_names_of(plans, shape, what_stands(profile, budget_bytes))
            if anchor and standing:
                study.contribute(standing, anchor)

    def known(self, workload: Workload) -> Resolution:
        """What "auto" would do now."""
        with use(store=self.store.path):
            return resolve(workload, device=self.device)

    def is_known(self, workload: Workload) -> bool:
        """Whether profiles measured here predict the answer so well that measuring adds nothing."""
        found = None if self.force else self.known(workload).prediction
        return found is not None and found.sure

    def answered(self, workload: Workload) -> tuple[str, Profile | None]:
        """A complete, fresh profile by which "auto" has an answer, and the layer that has it."""
        known = self.known(workload)
        profile = known.profile if known.match == "exact" and not known.stale else None
        return known.layer, profile if profile is not None and profile.complete else None

    def keep(self, outcome: Outcome, study: Study, workload: Workload) -> Profile | None:
        """Stores what was found, unless that is nothing or less than is stored.

        Of what is not finished a single plan is nothing: there is no choice in it, and it would
        answer in place of a like workload that has one. Returns what is stored then, None if
        nothing was found. What is complete is stored also where its study can no longer be told so.
        """
        timed = sum(measurement.timed for measurement in outcome.measurements)
        if timed < (1 if outcome.complete else FEWEST_TIMED):
            return None
        with self.storing:
            profile = self._profile(outcome, workload)
            try:
                # by another worker, which held the joint rounds or ended at the same time
                made = study.profile if outcome.complete else None
                if outcome.complete and made is None:
                    study.profile = profile
            except StorageError:
                self._put(profile)
                raise
            return self._put(made or profile)

    def _put(self, profile: Profile) -> Profile:
        """Stores a profile, unless what is stored tells more; returns which of them is stored."""
        workload = profile.parsed_workload()
        old = self.store.get(self.device, workload)
        if old is not None and _stays(old, profile):
            profile = old
        else:
            self.store.put(profile)
        self.found[workload] = profile
        return profile

    def _profile(self, outcome: Outcome, workload: Workload) -> Profile:
        return Profile(
            schema_version=ATTENTION_VERSION,
            workload=workload.key,
            device=self.device,
            measurements=outcome.measurements,
            effort=self.effort,
            complete=outcome.complete,
            created=utc_now(),
            autochunk=autochunk.__version__,
        )


def _stays(old: Profile, new: Profile) -> bool:
    """Whether what is stored tells more than what is new.

    It is finished, and the new one is not; or of two unfinished ones, it is of more effort, or has
    more plans timed.
    """
    if new.complete:
        return False
    stale = old.device.stale_reasons(new.device)
    return old.complete or (not stale and _extent(old) > _extent(new))


def _extent(profile: Profile) -> tuple[int, int]:
    return _rank(profile.effort), sum(m.timed for m in profile.measurements)


def _rank(effort: Effort) -> int:
    return EFFORTS.index(effort)
