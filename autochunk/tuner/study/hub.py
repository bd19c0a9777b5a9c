"""What machines of one kind leave for each other in a storage, beside the plans they measure.

A finished profile stands in its study, where ``tune --storage`` looks for it, one that was cut
short in the same study under a name of its own: who tunes together goes on for more than that.
What "auto" missed is in one study for each kind of device that has no trials: an attribute for each
machine, with all that it misses now. So that it makes no difference how often, and by how many at
once, it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import optuna

from autochunk.device import Device, current_key
from autochunk.errors import WorkloadError
from autochunk.store.merge import rank
from autochunk.store.profile import Profile
from autochunk.tuner.study.failures import one_error
from autochunk.tuner.study.storage import MISSES, Storage, device_key_of
from autochunk.tuner.study.trials import readable
from autochunk.workload import Workload

_FINISHED, _CUT_SHORT = "profile", "unfinished profile"


class Shared(NamedTuple):
    """What a storage has of one kind of device.

    Attributes:
      profiles: all that can be read; of a workload there may be several, of different versions and
        efforts.
      misses: by machine, how many processes missed which workload.
      newer: how many profiles only a newer autochunk can read.
    """

    profiles: list[Profile]
    misses: dict[str, dict[Workload, int]]
    newer: int

    def wishes(self) -> dict[Workload, int]:
        """What was missed on all machines together, most wanted first."""
        counts: dict[Workload, int] = {}
        for missed in self.misses.values():
            for workload, count in missed.items():
                counts[workload] = counts.get(workload, 0) + count
        return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0].key)))


class Hub(Storage):
    """A storage as the place where machines of one kind meet. Every method raises StorageError."""

    def shared(self, device: Device) -> Shared:
        """What is there of this kind of device."""
        with one_error(self.place):
            every = optuna.get_all_study_summaries(storage=self._optuna, include_best_trial=False)
        texts: list[Any] = []
        misses: dict[str, dict[Workload, int]] = {}
        for study in every:
            name, found = study.study_name, study.user_attrs
            if name.endswith(MISSES):
                if current_key(name.removesuffix(MISSES)) == device.key:
                    misses |= {machine: _missed(told) for machine, told in found.items()}
            elif device_key_of(name) == device.key:
                texts += [found[one] for one in (_FINISHED, _CUT_SHORT) if one in found]
        profiles = [readable(text) for text in texts]
        ours = [one for one in profiles if one and one.device.key == device.key]
        return Shared(ours, misses, profiles.count(None))

    def hand_in(self, profiles: Iterable[Profile]) -> list[Profile]:
        """Leaves profiles where there is none of the same versions and effort, or an older one.

        Returns those that were left there.
        """
        return [profile for profile in profiles if self._hand_in(profile)]

    def _hand_in(self, profile: Profile) -> bool:
        name = _FINISHED if profile.complete else _CUT_SHORT
        study = self.study(profile.device, profile.subject, profile.effort)
        with one_error(self.place):
            found = study.attribute(name)
            there = readable(found)
            newer = bool(found) and there is None
            better = there and rank(there, "best-effort") >= rank(profile, "best-effort")
            if newer or better:
                return False
            study.set_attribute(name, profile.model_dump_json())
            return True

    def tell_missed(self, device: Device, machine: str, missed: Mapping[Workload, int]) -> None:
        """Leaves what a machine has missed, in place of what it told before."""
        with one_error(self.place):
            study = optuna.create_study(
                study_name=device.key + MISSES, storage=self._optuna, load_if_exists=True
            )
            counts = {workload.key: count for workload, count in missed.items()}
            study.set_user_attr(machine, counts)


def _missed(told: Any) -> dict[Workload, int]:
    """What a machine told, as far as this version understands it."""
    found = {}
    for key, count in told.items() if isinstance(told, dict) else ():
        try:
            workload = Workload.parse(key)
        except WorkloadError:
            continue
        found[workload] = count if type(count) is int and count > 0 else 1
    return found
