"""How good predictions are, by curves that were measured: nothing is measured for it.

Each workload is predicted from all others, or each device from the other devices, and the plan
that would have been chosen is looked up among those that were measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autochunk.device import Device
from autochunk.plan import Plan
from autochunk.predict.curves import curve, fastest
from autochunk.predict.memory import LEAST_BYTES
from autochunk.predict.prediction import Prediction, Source, nearest, predict, tells
from autochunk.store.choice import DENSE
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile


@dataclass(frozen=True)
class Replay:
    """One workload on one device, as if it had not been measured.

    Attributes:
      profile: what was measured.
      chosen, best: the plan that would have been chosen, and the fastest, as measured.
      within: how much faster another plan could be, as the prediction says.
      memory: of each plan the predicted working memory over the measured, less one.
      seconds: the predicted time of the chosen plan over the measured, less one.
    """

    profile: Profile
    chosen: Measurement
    best: Measurement
    within: float
    memory: tuple[float, ...]
    seconds: float

    @property
    def regret(self) -> float:
        """The chosen plan's time over the best one's, less one."""
        return self.chosen.ratio / self.best.ratio - 1

    @property
    def against_dense(self) -> float | None:
        """The chosen plan's time over dense attention's, less one; None if that has none."""
        dense = self.profile.baseline(DENSE)
        return self.chosen.ratio / dense.ratio - 1 if dense and dense.ratio else None


@dataclass(frozen=True)
class Summary:
    """What replays of one device come to; all are fractions.

    Attributes:
      device: its key.
      workloads: how many were predicted.
      regret: median, nine in ten, and worst.
      against_dense: how much slower than dense attention the worst choice is.
      memory: the median error of working memory, either way.
      memory_under: the share of plans whose memory was predicted too small by over a quarter.
      sure: the share of workloads where no plan is faster by more than the prediction says.
    """

    device: str
    workloads: int
    regret: tuple[float, float, float]
    against_dense: float | None
    memory: float
    memory_under: float
    sure: float


TOO_SMALL = -0.25
"""Memory that is predicted too small by more than this is counted."""


def replay(profiles: Iterable[Profile], *, devices: bool = False) -> list[Replay]:
    """Predicts each profile's workload from the other profiles.

    Args:
      profiles: of any devices; each is predicted from those of the same platform.
      devices: leave out all profiles of the device itself, not only the workload's.
    """
    curves = [(one, found) for one in profiles if (found := curve(one)) is not None]

    def sources(of: Profile) -> list[Source]:
        return [
            Source(found, tells(one.device, of.device))
            for one, found in curves
            if one.device.platform == of.device.platform
            if one.device.key != of.device.key or not (devices or one.workload == of.workload)
        ]

    replays = (_replay(one, sources(one)) for one, _ in curves)
    return [one for one in replays if one is not None]


def _replay(profile: Profile, sources: Sequence[Source]) -> Replay | None:
    timed = {m.plan: m for m in fastest([m for m in profile.measurements if m.timed and m.ratio])}
    if len(timed) < 2:
        return None
    workload, platform = profile.parsed_workload(), profile.device.platform
    found = predict(workload, platform, nearest(workload, platform, sources), list(timed))
    if found is None:
        return None
    chosen = timed[found.cost.plan]
    return Replay(
        profile=profile,
        chosen=chosen,
        best=min(timed.values(), key=lambda m: (m.ratio, str(m.plan))),
        within=found.within,
        memory=_memory_errors(found, timed),
        seconds=found.cost.seconds / chosen.seconds_median - 1,
    )


def _memory_errors(found: Prediction, timed: Mapping[Plan, Measurement]) -> tuple[float, ...]:
    costs = (found.cost, *found.others)
    measured = (max(timed[one.plan].temp_bytes or 0, LEAST_BYTES) for one in costs)
    return tuple(one.temp_bytes / took - 1 for one, took in zip(costs, measured, strict=True))


def summaries(replays: Sequence[Replay]) -> list[Summary]:
    """One for each device, by its key."""
    keys = sorted({_name(one.profile.device) for one in replays})
    return [_summary(key, [r for r in replays if _name(r.profile.device) == key]) for key in keys]


def _name(device: Device) -> str:
    """Curves of another jaxlib are other curves."""
    return f"{device.key} jaxlib={device.jaxlib}"


def _summary(name: str, replays: Sequence[Replay]) -> Summary:
    regrets = sorted(one.regret for one in replays)
    ninth = regrets[math.ceil(0.9 * len(regrets)) - 1]
    errors = [error for one in replays for error in one.memory]
    dense = [found for one in replays if (found := one.against_dense) is not None]
    return Summary(
        device=name,
        workloads=len(replays),
        regret=(statistics.median(regrets), ninth, regrets[-1]),
        against_dense=max(dense, default=None),
        memory=statistics.median(map(abs, errors)),
        memory_under=sum(error < TOO_SMALL for error in errors) / len(errors),
        sure=sum(one.regret <= one.within for one in replays) / len(replays),
    )
