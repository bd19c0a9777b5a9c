"""Results as plain data: what ``--json`` prints, and what the tables are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from autochunk.device import Device
from autochunk.plan import Plan
from autochunk.resolution.answer import Resolution
from autochunk.resolution.functions import FunctionResolution
from autochunk.store.choice import DEFAULT, DENSE
from autochunk.store.interval import Interval
from autochunk.store.measurement import Measurement
from autochunk.store.merge import ImportPlan
from autochunk.store.profile import Profile

if TYPE_CHECKING:
    from autochunk.doctor import Finding
    from autochunk.tuner.bench import Contender  # which loads jax
    from autochunk.tuner.probe import Prepared
    from autochunk.tuner.rivals import Rival
    from autochunk.tuner.sync import Synced


WHOLE = "whole"
"""What a function that is not attention is, where it is in no chunks."""


def profile_row(profile: Profile, now: Device | None = None) -> dict[str, Any]:
    """One profile as a flat record.

    ``speedup_*`` are times of the baseline over that of the chosen plan; ``memory_vs_dense`` is the
    chosen plan's working memory over dense's; ``spread`` is half the interquartile range of the
    time ratio to dense, relative to it; ``within`` is how much faster another plan may be at most.
    None where a baseline could not be measured, or too little was to tell. ``stale`` is filled
    where the profile is of the device ``now``.
    """
    workload = profile.subject
    choice = profile.choose()
    return {
        "workload": profile.workload,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "mode": workload.mode,
        "device": profile.device.key,
        **_chosen(profile, choice.measurement if choice else None),
        "within": choice.within if choice else None,
        "plans_measured": len(profile.measurements),
        "effort": profile.effort,
        "complete": profile.complete,
        "created": profile.created,
        "stale": profile.stale_reasons(now) if now else [],
        "reason": choice.reason if choice else "no plan could be measured",
    }


def memory_rows(profile: Profile) -> list[dict[str, Any]]:
    """Working memory of each plan that was timed, as ``memory_row``s."""
    return [memory_row(profile, m.plan, m) for m in profile.measurements if m.timed]


def memory_row(profile: Profile, plan: Plan, found: Measurement | Prepared) -> dict[str, Any]:
    """Working memory of a plan: predicted by XLA, and seen to be taken.

    ``measured_vs_predicted`` is the second over the first; None where one of them is not known.
    """
    workload = profile.subject
    return {
        "workload": profile.workload,
        "device": profile.device.key,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "mode": workload.mode,
        "plan": plan_text(profile, plan),
        "predicted_bytes": found.predicted_bytes,
        "measured_bytes": found.measured_bytes,
        "measured_vs_predicted": _over(found.measured_bytes, found.predicted_bytes),
    }


def plan_text(profile: Profile, plan: Plan) -> str:
    """A plan in words; of a function that is not attention nothing is dense."""
    return WHOLE if profile.function and plan == DENSE else str(plan)


def _over(one: int | None, other: int | None) -> float | None:
    return one / other if one is not None and other else None


def _chosen(profile: Profile, best: Measurement | None) -> dict[str, Any]:
    dense, default = profile.baseline(DENSE), profile.baseline(DEFAULT)
    return {
        "plan": plan_text(profile, best.plan) if best else None,
        "implementation": best.implementation if best else None,
        "max_chunk_size_mb": best.max_chunk_size_mb if best else None,
        "chunk_sizes": list(best.chunk_sizes) if best and best.chunk_sizes else None,
        "seconds": best.seconds_median if best else None,
        "speedup_vs_dense": _speedup(dense, best),
        "speedup_vs_default": _speedup(default, best),
        "temp_bytes": best.temp_bytes if best else None,
        "memory_vs_dense": _memory_share(dense, best),
        "spread": _spread(dense, best),
        "repeats": len(best.ratios) if best else 0,
    }


def _speedup(baseline: Measurement | None, best: Measurement | None) -> float | None:
    if baseline is None or best is None or not best.ratio:
        return None
    return 1.0 if baseline.plan == best.plan else baseline.ratio / best.ratio


def _memory_share(dense: Measurement | None, best: Measurement | None) -> float | None:
    if best is None or dense is None:
        return None
    return _over(best.temp_bytes, dense.temp_bytes)


def _spread(dense: Measurement | None, best: Measurement | None) -> float | None:
    if best is None or dense is None:
        return best.spread if best else None
    return math.hypot(best.spread, dense.spread)


def resolution_record(resolution: Resolution) -> dict[str, Any]:
    """A Resolution as plain data."""
    return {
        "workload": resolution.workload.key,
        "device": resolution.device.key,
        "implementation": resolution.plan.implementation,
        "max_chunk_size_mb": resolution.plan.max_chunk_size_mb,
        "match": resolution.match,
        "layer": resolution.layer,
        "reason": resolution.reason,
        "within": resolution.within,
        "source": resolution.source,
        "stale": list(resolution.stale),
        "asked": [{"layer": layer, "answer": answer} for layer, answer in resolution.asked],
        "rejected": [{"plan": plan, "why": why} for plan, why in resolution.rejected],
    }


def function_record(answer: FunctionResolution) -> dict[str, Any]:
    """What "auto" means for a function, as plain data; no sizes are those of a rule."""
    return {
        "workload": answer.workload.key,
        "device": answer.device.key,
        "chunk_sizes": None if answer.sizes is None else list(answer.sizes),
        "match": answer.match,
        "layer": answer.layer,
        "reason": answer.reason,
        "source": answer.source,
        "stale": list(answer.stale),
        "asked": [{"layer": layer, "answer": had} for layer, had in answer.asked],
        "rejected": [{"plan": plan, "why": why} for plan, why in rejected_of(answer)],
    }


def rejected_of(answer: FunctionResolution) -> list[tuple[str, str]]:
    """Why each other plan of a function was not chosen, by the plan in words."""
    rejected = answer.choice.rejected if answer.choice else ()
    return [(WHOLE if plan == str(DENSE) else plan, why) for plan, why in rejected]


def import_records(plan: ImportPlan, here: Device | None = None) -> list[dict[str, Any]]:
    """What an import does, as plain data.

    ``answers_here`` says whether a profile is of the device ``here``; None if that is not known.
    """
    return [
        {
            "device": entry.profile.device.key,
            "workload": entry.profile.workload,
            "relation": entry.relation,
            "taken": entry.taken,
            "reason": entry.reason,
            "answers_here": entry.profile.device.key == here.key if here else None,
        }
        for entry in plan.entries
    ]


def synced_record(found: Synced, place: str) -> dict[str, Any]:
    """What ``sync`` moved to and from a storage, whose place has no password, as plain data."""
    return {
        "storage": place,
        "device": found.device.key,
        "taken": [_moved(profile) for profile in found.taken],
        "handed_in": [_moved(profile) for profile in found.handed_in],
        "missed": {workload.key: count for workload, count in found.missed.items()},
        "wishes": {workload.key: count for workload, count in found.wishes.items()},
        "newer": found.newer,
    }


def _moved(profile: Profile) -> dict[str, Any]:
    names = ("workload", "effort", "complete", "created")
    return {name: getattr(profile, name) for name in names} | {"jaxlib": profile.device.jaxlib}


def bench_record(contender: Contender) -> dict[str, Any]:
    """A bench contender as plain data; ``ratio`` is time relative to haiku's dense attention."""
    return {
        "name": contender.name,
        "seconds": contender.seconds_median,
        "ratio": contender.ratio,
        "spread": contender.spread,
        "temp_bytes": contender.temp_bytes,
        "detail": contender.detail,
    }


def rivals_record(profile: Profile, found: Sequence[Rival]) -> dict[str, Any]:
    """A profile's plans beside the chosen one, as plain data.

    ``stored`` and ``slower`` are [low, best guess, high] of the fraction by which a plan is slower
    than the chosen one, when it was tuned and now; ``faster`` are the plans that surely are now;
    the rest as in ``Agreement``.
    """
    from autochunk.tuner.rivals import agreement

    return {
        "workload": profile.workload,
        "device": profile.device.key,
        "chosen": str(found[0].plan),
        "plans": [
            {
                "plan": str(rival.plan),
                "seconds": rival.seconds,
                "stored": bounds(rival.stored),
                "slower": bounds(rival.slower),
                "temp_bytes": rival.temp_bytes,
                "detail": rival.detail,
            }
            for rival in found
        ],
        "faster": [str(one.plan) for one in found if one.slower and one.slower.high < 0],
        **asdict(agreement(found)),
    }


def bounds(interval: Interval | None) -> list[float | None] | None:
    """JSON has no infinity."""
    return None if interval is None else [x if math.isfinite(x) else None for x in interval]


def finding_record(finding: Finding) -> dict[str, Any]:
    """A doctor's finding as plain data."""
    return asdict(finding)
