"""A profile's memory-time curve as plain data: every plan, the choice, and that of each budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from autochunk.plan import BYTES_PER_MB
from autochunk.report.records import WHOLE, plan_text
from autochunk.report.scales import steps
from autochunk.store.choice import DEFAULT, DENSE, Choice
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile


def curve_record(
    profile: Profile, peers: Sequence[dict[str, Any]] = (), before: Profile | None = None
) -> dict[str, Any]:
    """All that is drawn of a profile.

    Args:
      profile: of whichever device.
      peers: other libraries beside it, as ``bench_record`` has them.
      before: what it is compared with.

    Returns:
      ``plans``, in the order of measuring, with ``seconds`` (comparable within the profile: the
      ratio to the anchor times its median), their quartiles ``low`` and ``high``, ``temp_bytes``
      and ``against``, what spoke against each; ``chosen``, ``dense`` and ``default``, places in
      that list or None; ``picks``, what ``budget_picks`` finds; ``peers`` on the same scale;
      ``before``, None or what memory budgets picked then; and the versions that measured.
    """
    choice = profile.choose()
    anchor = _anchor_seconds(profile.measurements)
    against = dict(choice.rejected) if choice else {}
    default, dense = profile.baseline(DEFAULT), profile.baseline(DENSE)
    return {
        "plans": [
            {**_plan_record(profile, one, anchor), "against": _against(one, choice, against)}
            for one in profile.measurements
        ],
        "chosen": _place(profile, choice.measurement if choice else None),
        "dense": _place(profile, dense),
        "default": _place(profile, default),
        "picks": budget_picks(profile),
        "peers": list(_peers(peers, dense, anchor)),
        "before": None if before is None else _before(before, profile),
        "versions": versions(profile),
    }


def budget_picks(profile: Profile) -> list[dict[str, int]]:
    """The plan that each ``memory_budget_mb`` picks: a staircase.

    From each step's ``from_bytes`` on (a budget in MB times 10^6 is no less), up to the next step,
    it is the plan at the place ``plan`` of the measurements. Below the first step nothing that was
    measured fits. Without a budget ``Profile.choose`` decides, which leaves out what was given up
    early.
    """
    steps: list[dict[str, int]] = []
    for needed in sorted({one.temp_bytes or 0 for one in profile.measurements if one.timed}):
        choice = profile.choose(memory_budget_mb=least_budget_mb(needed))
        place = _place(profile, choice.measurement if choice else None)
        if place is not None and (not steps or steps[-1]["plan"] != place):
            steps.append({"from_bytes": needed, "plan": place})
    return steps


def least_budget_mb(needed: int) -> float:
    """The least ``memory_budget_mb`` that so many bytes fit: division alone may round down."""
    budget = needed / BYTES_PER_MB
    while budget * BYTES_PER_MB < needed:
        budget = math.nextafter(budget, math.inf)
    return budget


def versions(profile: Profile) -> dict[str, str]:
    """What measured it, by name; only what is known."""
    soft = ("jax", "jaxlib", "driver", "cuda", "cudnn", "allocator", "huge_pages")
    known = {name: getattr(profile.device, name) for name in soft}
    return {name: text for name, text in {**known, "autochunk": profile.autochunk}.items() if text}


def _before(then: Profile, now: Profile) -> dict[str, Any]:
    """An earlier profile's staircase, as (bytes, seconds), and by what it is told from this one."""
    names = ("jaxlib", "cudnn")
    differing = [one for one in names if getattr(then.device, one) != getattr(now.device, one)]
    label = ", ".join(f"{one} {getattr(then.device, one) or 'unknown'}" for one in differing)
    return {"label": label or then.created[:10], "steps": steps(curve_record(then))}


def _plan_record(profile: Profile, one: Measurement, anchor: float) -> dict[str, Any]:
    whole = profile.function and one.plan == DENSE
    return {
        "plan": plan_text(profile, one.plan),
        "implementation": WHOLE if whole else one.implementation,
        "max_chunk_size_mb": one.max_chunk_size_mb,
        "chunk_sizes": list(one.chunk_sizes) if one.chunk_sizes else None,
        "status": one.status,
        **_times(one, anchor),
        "rounds": len(one.ratios),
        "temp_bytes": one.temp_bytes,
        "compile_seconds": one.compile_seconds,
        "error": one.error,
    }


def _times(one: Measurement, anchor: float) -> dict[str, float | None]:
    if not one.timed:
        return {"seconds": None, "low": None, "high": None}
    ratios = one.ratios[one.telling]
    low, high = ratios[0], ratios[0]
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"seconds": one.ratio * anchor, "low": low * anchor, "high": high * anchor}


def _anchor_seconds(measurements: Sequence[Measurement]) -> float:
    """Median time of the plan that all were timed beside; by this ratios become seconds."""
    rounds = [
        seconds / ratio
        for one in measurements
        for seconds, ratio in zip(one.seconds, one.ratios, strict=True)
        if ratio
    ]
    return statistics.median(rounds) if rounds else 0.0


def _against(one: Measurement, choice: Choice | None, against: dict[str, str]) -> str:
    """Why a plan was not chosen; empty for the one that was."""
    if choice is not None:
        return "" if one is choice.measurement else against.get(str(one.plan), "")
    return ": ".join(filter(None, (one.status, one.detail)))


def _place(profile: Profile, one: Measurement | None) -> int | None:
    """Where in a profile a measurement stands."""
    places = (i for i, other in enumerate(profile.measurements) if other is one)
    return next(places, None)


def _peers(
    peers: Sequence[dict[str, Any]], dense: Measurement | None, anchor: float
) -> Iterator[dict[str, Any]]:
    """Other libraries, on the scale of this profile: they were timed beside dense attention."""
    for peer in peers:
        if dense is not None and peer["ratio"] is not None and peer["temp_bytes"] is not None:
            seconds = peer["ratio"] * dense.ratio * anchor
            yield {"name": peer["name"], "seconds": seconds, "temp_bytes": peer["temp_bytes"]}
