"""What a tune is to measure, in which order, and what it has to leave out.

What was named and the standard set are always begun. What was missed is often more than there is
time for: of it come those that teach most, no more than have time enough to be worth storing, and
while the standard set waits in no more than half of the time. Others follow when all had theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from autochunk.tuner.probe import seconds_left
from autochunk.tuner.teaching import representatives
from autochunk.workload import Workload

_SHARE_OF_MISSED = 0.5  # of the time, while the standard set waits


@dataclass(frozen=True)
class Wishes:
    """What a tune is asked for.

    Attributes:
      named: by the user.
      missed: by "auto", each so often; these stand for the others of their families.
      standard: what is tuned where nothing is named.
    """

    named: Sequence[Workload] = ()
    missed: Mapping[Workload, int] = field(default_factory=dict)
    standard: Sequence[Workload] = ()

    @property
    def all(self) -> list[Workload]:
        """Each workload once."""
        return list(dict.fromkeys((*self.named, *self.missed, *self.standard)))


@dataclass(frozen=True)
class Agenda:
    """The order in which workloads are begun, and what becomes of those that teach.

    Attributes:
      order: all that wait and that there may be time for.
      teaching: those of them that were only missed.
      standard: those of the standard set.
      least: seconds without which none that teaches is begun.
      until: by ``time.monotonic()``, when what teaches has had its part of the time.
      is_known: asked before one that teaches is begun; if so, it would teach nothing.
      spare: these are begun when all others had their share of the time.
      left_out: there is no time for them.
      known: what ``is_known`` knew.
    """

    order: Sequence[Workload] = ()
    teaching: Collection[Workload] = frozenset()
    standard: Set[Workload] = frozenset()
    least: float = 0.0
    until: float = math.inf
    is_known: Callable[[Workload], bool] = lambda _: False
    spare: set[Workload] = field(default_factory=set)
    left_out: set[Workload] = field(default_factory=set)
    known: set[Workload] = field(default_factory=set)

    def takes_up(self, workload: Workload, begun: Set[Workload], seconds: float) -> bool:
        """Whether a worker is to begin it now, with so many left, or to go on with it.

        If not, it is over, or comes later.
        """
        if workload in begun or workload not in self.teaching:
            return True
        # One that was chosen may find a little less than it was promised.
        enough = self.least if workload in self.spare else self.least / 2
        # However short the time, it is for something.
        if seconds < enough and (begun or self.standard):
            self.left_out.add(workload)
        elif self.is_known(workload):
            self.known.add(workload)
        elif workload not in self.spare and self._others_turn(begun):
            self.spare.add(workload)
        else:
            return True
        return False

    def _others_turn(self, begun: Set[Workload]) -> bool:
        return time.monotonic() > self.until and not self.standard <= begun

    def is_over(self, workload: Workload) -> bool:
        """Whether it is not to be begun any more."""
        return workload in self.left_out or workload in self.known

    def not_begun(self, begun: Set[Workload]) -> list[Workload]:
        """What there was no time for."""
        rest = (*self.order, *sorted(self.left_out, key=lambda one: one.key))
        return [one for one in dict.fromkeys(rest) if one not in begun and one not in self.known]


def make_agenda(
    wishes: Wishes,
    waiting: Sequence[Workload],
    known: Iterable[Workload],
    *,
    deadline: float | None,
    least: float,
    workers: int = 1,
    is_known: Callable[[Workload], bool] = lambda _: False,
) -> Agenda:
    """What is begun when, of the wishes that wait.

    Args:
      wishes: what is asked for.
      waiting: those of them that need measuring.
      known: workloads that have been measured; what is like them teaches less.
      deadline: when all is to be over, by ``time.monotonic()``; None is never.
      least: seconds that a workload needs to be worth storing.
      workers: how many measure at the same time.
      is_known: whether a workload need not be measured, by what is known when it is its turn.
    """
    named = [one for one in waiting if one in set(wishes.named)]
    standard = [one for one in waiting if one in set(wishes.standard) - set(named)]
    missed = {one: wishes.missed[one] for one in waiting if one not in {*named, *standard}}
    left = max(0.0, seconds_left(deadline))
    share = _share_of_missed(left * workers, least, len(standard))
    teachers = representatives(
        missed, _how_many(left * workers, least), [*known, *named, *standard]
    )
    first = _how_many(share * left * workers, least)
    return Agenda(
        order=(*named, *teachers[:first], *standard, *teachers[first:]),
        teaching=frozenset(missed),
        standard=frozenset(standard),
        least=least,
        until=time.monotonic() + share * left,
        is_known=is_known,
        spare=set(teachers[first:]),
        left_out=set(missed) - set(teachers),
    )


def _share_of_missed(seconds: float, least: float, standard: int) -> float:
    """What part of the time is for what was missed: all that few of the standard set leave."""
    if not standard or seconds == math.inf:
        return 1.0
    return max(_SHARE_OF_MISSED, 1 - standard * least / seconds) if seconds else 0.0


def _how_many(seconds: float, least: float) -> int:
    """How many workloads there is time for; one at least."""
    return max(1, int(min(seconds / least, 1e9))) if least else 10**9
