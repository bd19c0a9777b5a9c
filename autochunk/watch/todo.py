"""What is to be done next, by what was missed and what is stored: decided, not done."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autochunk.device import Device
from autochunk.store.profile import Effort, Profile
from autochunk.workload import Workload

VERIFY_DAYS = 7.0
"""A profile that was neither made nor verified for so long is old."""
SAMPLE = 3
"""So many old profiles are verified in a day."""

_DAY = 86_400.0
_LONGEST_PAUSE = 30 * _DAY

Kind = Literal["missed", "drifted", "unfinished", "stale", "functions", "verify"]
_ORDER: tuple[Kind, ...] = ("missed", "drifted", "unfinished", "stale", "functions", "verify")


@dataclass(frozen=True)
class Job:
    """One thing to do.

    Attributes:
      kind: why. "functions" are all that were missed and are not attention; a profile that has
        "drifted" is measured as if nothing were there.
      workload: its key; "" of functions.
      effort: how hard to look.
      wanted: how many processes missed it, on all machines.
    """

    kind: Kind
    workload: str
    effort: Effort
    wanted: int = 0

    @property
    def name(self) -> str:
        """What it is remembered by: its workload, or its kind."""
        return self.workload or self.kind


@dataclass
class Memory:
    """What a service remembers from one run to the next; times are ``time.time()``'s.

    Attributes:
      verified: when a workload's profile was verified last.
      drifted: workloads whose profiles no longer hold and are measured again.
      tries: how often in a row a job came to nothing.
      not_before: when such is tried again.
    """

    verified: dict[str, float] = field(default_factory=dict)
    drifted: list[str] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)

    def came_to_nothing(self, name: str, now: float) -> None:
        """Puts a job off for a day, and when it comes to nothing again for two, four and so on."""
        tries = self.tries[name] = self.tries.get(name, 0) + 1
        self.not_before[name] = now + min(_DAY * 2 ** min(tries - 1, 10), _LONGEST_PAUSE)

    def is_done(self, name: str) -> None:
        """Forgets what kept a job from being done."""
        self.tries.pop(name, None)
        self.not_before.pop(name, None)
        if name in self.drifted:
            self.drifted.remove(name)


@dataclass(frozen=True)
class Known:
    """What is known of a device, of which ``todo`` says what is to be done.

    Attributes:
      device: as it is today.
      profiles: all that are stored of it.
      missed: how many processes missed what, on all machines.
      functions: how many processes missed functions that are not attention, here.
    """

    device: Device
    profiles: Sequence[Profile]
    missed: Mapping[Workload, int]
    functions: int = 0


def todo(known: Known, memory: Memory, effort: Effort, now: float) -> list[Job]:
    """All that is to be done, what is wanted most first.

    Of equal jobs those come first that nothing is known of, then what drifted, what is unfinished
    and what is stale, functions, and when there is nothing else, a sample of old profiles is
    verified.

    Args:
      known: what there is.
      memory: what was done before.
      effort: for what was missed; what is stored is measured again by its own.
      now: ``time.time()``.
    """
    jobs: dict[str, Job] = {}
    for job in (*_missed(known, effort), *_again(known, memory), *_functions(known, effort)):
        jobs.setdefault(job.name, job)
    for job in _verifications(known, memory, now):
        jobs.setdefault(job.name, job)
    waiting = [job for job in jobs.values() if memory.not_before.get(job.name, 0.0) <= now]
    return sorted(waiting, key=_urgency)


def _urgency(job: Job) -> tuple[bool, int, int]:
    return job.kind == "verify", -job.wanted, _ORDER.index(job.kind)


def _missed(known: Known, effort: Effort) -> Iterable[Job]:
    stored = {profile.workload for profile in known.profiles}
    for workload, count in known.missed.items():
        if workload.key not in stored:
            yield Job("missed", workload.key, effort, count)


def _again(known: Known, memory: Memory) -> Iterable[Job]:
    wanted = {workload.key: count for workload, count in known.missed.items()}
    for profile in _attention(known.profiles):
        key = profile.workload
        kind = _why_again(profile, known.device, memory.drifted)
        if kind:
            yield Job(kind, key, profile.effort, wanted.get(key, 0))


def _why_again(profile: Profile, now: Device, drifted: Collection[str]) -> Kind | None:
    if not profile.complete:
        return "unfinished"
    if profile.stale_reasons(now):
        return "stale"
    return "drifted" if profile.workload in drifted else None


def _functions(known: Known, effort: Effort) -> Iterable[Job]:
    if known.functions:
        yield Job("functions", "", effort, known.functions)


def _verifications(known: Known, memory: Memory, now: float) -> Iterable[Job]:
    """Of the profiles that are old the oldest, as many as a day has."""
    since = {
        one.workload: (max(_made(one), memory.verified.get(one.workload, 0.0)), one)
        for one in _attention(known.profiles)
    }
    today = sum(when > now - _DAY for when in memory.verified.values())
    old = [one for one in since.values() if one[0] < now - VERIFY_DAYS * _DAY and one[1].choose()]
    old.sort(key=lambda one: (one[0], one[1].workload))
    for _, profile in old[: max(0, SAMPLE - today)]:
        yield Job("verify", profile.workload, profile.effort)


def _attention(profiles: Iterable[Profile]) -> list[Profile]:
    return [profile for profile in profiles if not profile.function]


def _made(profile: Profile) -> float:
    return datetime.datetime.fromisoformat(profile.created).timestamp()
