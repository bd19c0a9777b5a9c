"""Two sets of profiles side by side: what changed, and what got slower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from autochunk.report.records import bounds, profile_row
from autochunk.store.interval import Interval, unpaired
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile

Verdict = Literal["slower", "faster", "same", "unclear", "no plan", "new", "gone"]

USUAL_LIMIT = 0.05
"""By how much times must differ to be told of, unless another limit is given."""


def comparison(
    then: Iterable[Profile], now: Iterable[Profile], limit: float = USUAL_LIMIT
) -> list[dict[str, Any]]:
    """What became of each workload that either has, the worst first.

    Profiles are of one workload and device; where each side has one device that the other has not,
    those two are compared. Of several profiles of one workload and device the first counts.

    Returns:
      records with ``then`` and ``now``, what is chosen on either side (None where it has nothing),
      ``slower``, [low, best guess, high] of the fraction by which the choice takes longer now (with
      95% confidence, as far as rounds of two days can tell), and a ``verdict``: "slower" or
      "faster" where that is surely so and the best guess is more than ``limit``, "unclear" where it
      is more and may be chance, "no plan" where there was one and is none.
    """
    now = list(now)
    old, new = earlier(then, now), _by_workload(now)
    found = [_compared(old.get(key), new.get(key), limit) for key in {**new, **old}]
    return sorted(found, key=_worst_first)


def earlier(then: Iterable[Profile], now: Iterable[Profile]) -> dict[tuple[str, str], Profile]:
    """What there was then, by the keys of the profiles that it is compared with."""
    old, new = _by_workload(then), _by_workload(now)
    renamed = _renamed({device for device, _ in old}, {device for device, _ in new})
    return {(renamed.get(device, device), workload): one for (device, workload), one in old.items()}


def slower(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the records that a check must fail for."""
    return [one for one in records if one["verdict"] in ("slower", "no plan")]


def _by_workload(profiles: Iterable[Profile]) -> dict[tuple[str, str], Profile]:
    found: dict[tuple[str, str], Profile] = {}
    for profile in profiles:
        found.setdefault(profile.key, profile)
    return found


def _renamed(then: set[str], now: set[str]) -> dict[str, str]:
    """The device that one of then is compared with, where that has another name."""
    only_then, only_now = then - now, now - then
    return dict(zip(only_then, only_now, strict=True)) if len(only_then | only_now) == 2 else {}


def _compared(then: Profile | None, now: Profile | None, limit: float) -> dict[str, Any]:
    either = now or then
    assert either is not None
    workload = either.subject
    before, after = _best(then), _best(now)
    interval = unpaired(after.seconds, before.seconds) if before and after else None
    return {
        "device": either.device.key,
        "device_then": then.device.key if then else None,
        "workload": either.workload,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "mode": workload.mode,
        "then": _side(then),
        "now": _side(now),
        "slower": bounds(interval),
        "verdict": _verdict(then, now, interval, limit),
    }


def _best(profile: Profile | None) -> Measurement | None:
    choice = profile.choose() if profile else None
    return choice.measurement if choice else None


def _side(profile: Profile | None) -> dict[str, Any] | None:
    if profile is None:
        return None
    wanted = ("plan", "seconds", "temp_bytes", "speedup_vs_dense", "created", "complete")
    row = profile_row(profile)
    return {**{name: row[name] for name in wanted}, "jaxlib": profile.device.jaxlib}


def _verdict(
    then: Profile | None, now: Profile | None, interval: Interval | None, limit: float
) -> Verdict:
    if then is None:
        return "new"
    if now is None:
        return "gone"
    if interval is None:
        return "no plan" if _best(then) else "new" if _best(now) else "same"
    if abs(interval.middle) <= limit:
        return "same"
    if not interval.decided:
        return "unclear"
    return "slower" if interval.middle > 0 else "faster"


_ORDER: tuple[Verdict, ...] = ("no plan", "slower", "unclear", "faster", "gone", "new", "same")


def _worst_first(one: dict[str, Any]) -> tuple[int, float, str, str]:
    times = one["slower"][1] if one["slower"] else 0.0
    return _ORDER.index(one["verdict"]), -times, one["device"], one["workload"]
