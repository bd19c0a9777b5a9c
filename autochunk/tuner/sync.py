"""``sync``: machines of one kind swap what they know through a storage that they share.

Any number of machines may run it at once, and again: what is there already does not move.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autochunk.device import Device
from autochunk.errors import StorageError
from autochunk.store.bundle import BUNDLE_VERSION, Bundle
from autochunk.store.merge import merge, rank
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore
from autochunk.tuner.study import Hub
from autochunk.workload import Workload

PATIENCE_SECONDS = 10.0
"""How long a storage that worked and fails is waited for: a job's prolog has no more."""


@dataclass(frozen=True)
class Synced:
    """What moved.

    Attributes:
      device: the kind of device.
      taken: profiles of others that are now in the store.
      handed_in: profiles of the store that are now in the storage.
      missed: what "auto" missed here, how often, as far as the storage did not know.
      wishes: what was missed on all machines of the kind together and is not measured, most
        wanted first.
      newer: how many profiles were left that only a newer autochunk can read.
    """

    device: Device
    taken: tuple[Profile, ...]
    handed_in: tuple[Profile, ...]
    missed: dict[Workload, int]
    wishes: dict[Workload, int]
    newer: int = 0


def open_hub(place: str) -> Hub:
    """The storage of several machines; a journal is made, if its folder is there.

    Where that is not, a file system is away, and nobody would find what is left in its place.

    Raises:
      StorageError: it cannot be used.
    """
    folder = Path(place).parent
    if "://" not in place and not folder.is_dir():
        raise StorageError(f"the storage {place} cannot be used: there is no folder {folder}")
    return Hub(place, patience=PATIENCE_SECONDS)


def sync(store: ProfileStore, hub: Hub, device: Device) -> Synced:
    """Takes what others have for a kind of device, and hands in what the store has.

    First it takes, so that nothing is handed in, or told as missed, that others have better.

    Args:
      store: this machine's.
      hub: the storage.
      device: of which profiles and misses are looked at, and by which it is told what is stale.

    Raises:
      StorageError: the storage cannot be used; what was taken before is kept.
      StoreError: the store cannot be read or written.
    """
    there = hub.shared(device)
    bundle = Bundle(
        schema_version=BUNDLE_VERSION,
        profiles=tuple(worth_taking(there.profiles, store.profiles(device), device)),
    )
    taken = merge(store, bundle).taken if bundle.profiles else []
    handed_in = hub.hand_in(worth_handing_in(store.profiles(device), there.profiles))
    machine, missed = machine_name(store), store.misses(device)
    told = there.misses.get(machine, {})
    if missed != told:
        hub.tell_missed(device, machine, missed)
    wishes = there._replace(misses={**there.misses, machine: missed}).wishes()
    return Synced(
        device,
        tuple(taken),
        tuple(handed_in),
        {one: count for one, count in missed.items() if told.get(one) != count},
        unmeasured(wishes, store.profiles(device)),
        there.newer,
    )


def machine_name(store: ProfileStore) -> str:
    """What tells this machine's store from others: counts of two must not be taken for one's."""
    digest = hashlib.sha256(str(store.path.resolve()).encode()).hexdigest()[:16]
    return f"{socket.gethostname()} {digest}"


def worth_taking(theirs: Iterable[Profile], ours: Iterable[Profile], now: Device) -> list[Profile]:
    """Of each workload the best that others have.

    One that is fresh on this device is better than one that is stale here, and what is stale never
    stands in place of what is fresh: it would be measured and taken again, without end.
    """
    fresh_here = {one.key for one in ours if not one.stale_reasons(now)}
    rising = sorted(theirs, key=lambda one: (not one.stale_reasons(now), rank(one, "best-effort")))
    best = {one.key: one for one in rising}
    return [one for key, one in best.items() if key not in fresh_here or not one.stale_reasons(now)]


def worth_handing_in(ours: Iterable[Profile], theirs: Iterable[Profile]) -> list[Profile]:
    """What others have not, by what they had a moment ago; so that not every study is opened."""
    there = list(theirs)
    return [one for one in ours if one not in there]


def unmeasured(wishes: Mapping[Workload, int], profiles: Iterable[Profile]) -> dict[Workload, int]:
    """The wishes of which there is no complete profile."""
    done = {profile.workload for profile in profiles if profile.complete}
    return {workload: count for workload, count in wishes.items() if workload.key not in done}
