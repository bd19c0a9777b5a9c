"""The axes of a memory-time curve, which are of logarithms, and what their figures are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEAST_BYTES = 1e4
"""Plans that take less stand here: on an axis of logarithms nothing has no place."""


def timed(curve: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The plans of a ``curve_record`` that a curve can show, and their places."""
    return [(i, one) for i, one in enumerate(curve["plans"]) if one["seconds"]]


def on_axis(plan: dict[str, Any]) -> float:
    """Where a plan, or a peer, stands on the axis of memory, in bytes."""
    return max(float(plan["temp_bytes"] or 0), LEAST_BYTES)


def steps(curve: dict[str, Any]) -> list[tuple[float, float]]:
    """Where each step of what memory budgets pick begins, in bytes, and its seconds.

    Of what took no time that a clock could tell there is none.
    """
    plans = [(one, curve["plans"][one["plan"]]) for one in curve["picks"]]
    return [
        (max(float(one["from_bytes"]), LEAST_BYTES), plan["seconds"])
        for one, plan in plans
        if plan["seconds"]
    ]


def memory_limits(curve: dict[str, Any]) -> tuple[float, float]:
    """Bytes at both ends of the axis of memory."""
    found = [on_axis(one) for _, one in timed(curve)]
    found += map(on_axis, curve["peers"])
    found += [start for start, _ in _before(curve)]
    return _around(found)


def time_limits(curve: dict[str, Any]) -> tuple[float, float]:
    """Seconds at both ends of the axis of time."""
    plans = [one for _, one in timed(curve)]
    found = [one[name] for one in plans for name in ("low", "seconds", "high") if one[name] > 0]
    found += [one["seconds"] for one in curve["peers"]]
    found += [seconds for _, seconds in _before(curve)]
    return _around(found)


def _before(curve: dict[str, Any]) -> list[tuple[float, float]]:
    """The steps of what the curve is compared with."""
    return curve["before"]["steps"] if curve["before"] else []


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis of logarithms, with room at the ends, and for a tick or two."""
    least, greatest = min(values), max(values)
    room = max((greatest / least) ** 0.07, (2 / (greatest / least)) ** 0.5, 1.15)
    return least / room, greatest * room


def bytes_text(value: float) -> str:
    """Bytes in the unit that suits them, of 10^3 to the next."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def seconds_text(value: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two limits: 1, 2 and 5 of each power of ten, or if too many, only 1."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        values = [float(f"{step}e{power}") for power in powers for step in steps]
        found = [value for value in values if low <= value <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]
