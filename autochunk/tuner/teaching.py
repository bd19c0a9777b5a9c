"""Which of many workloads to measure, where a few are to tell of all.

Workloads of one family differ only in sizes, so what is known of one tells of others the more, the
fewer doublings they are apart. Those that leave none far from all that is measured are a k-centre
of their sizes; to take the one farthest from those that are taken, again and again, leaves none
more than twice as far as it must be (Gonzalez 1985, "Clustering to minimize the maximum
intercluster distance"), and better than that cannot be had quickly. What was asked for more often
counts for more (Dyer and Frieze 1985, "A simple heuristic for the p-centre problem").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from autochunk.workload import Workload, split_key

_Place = tuple[float, ...]


def representatives(
    wanted: Mapping[Workload, int], most: int, known: Iterable[Workload] = ()
) -> list[Workload]:
    """At most so many of the wanted workloads, those that teach most first.

    Each family that has none yet is begun in its middle, the one that was asked for most before the
    others; then comes what is farthest from all that are taken. The same for every order of what is
    given, and the first of more.

    Args:
      wanted: workloads, and how often each was asked for.
      most: how many.
      known: workloads that are measured already, or will be.
    """
    places = {one: _place(one) for one in sorted(wanted, key=lambda one: one.key)}
    taken = _by_family(known)
    distances = {one: _to_nearest(places[one], taken.get(one.family, ())) for one in places}
    chosen: list[Workload] = []
    while distances and len(chosen) < most:
        best = _next(distances, wanted, places)
        chosen.append(best)
        del distances[best]
        for one, distance in distances.items():
            if one.family == best.family:
                distances[one] = min(distance, _apart(places[one], places[best]))
    return chosen


def _next(
    distances: Mapping[Workload, float],
    wanted: Mapping[Workload, int],
    places: dict[Workload, _Place],
) -> Workload:
    """The farthest, each doubling of how often it was asked for counting like once more as far.

    A count is of processes, not of calls, and says no more than an order of magnitude.
    """
    far = max(distances, key=lambda one: distances[one] * _weight(wanted[one]))
    if distances[far] < math.inf:
        return far
    families: dict[str, dict[Workload, int]] = {}
    for one, distance in distances.items():
        if distance == math.inf:
            families.setdefault(one.family, {})[one] = wanted[one]
    most_wanted = max(families.values(), key=lambda members: sum(members.values()))
    return _middle(most_wanted, places)


def _middle(members: Mapping[Workload, int], places: Mapping[Workload, _Place]) -> Workload:
    """The one nearest to the mean of all, weighted."""
    weights = [_weight(count) for count in members.values()]
    columns = zip(*(places[one] for one in members), strict=True)
    mean = tuple(
        sum(weight * size for weight, size in zip(weights, column, strict=True)) / sum(weights)
        for column in columns
    )
    return min(members, key=lambda one: _apart(places[one], mean))


def _weight(count: int) -> float:
    return 1.0 + math.log2(max(1, count))


def _place(workload: Workload) -> _Place:
    sizes, _ = split_key(workload.key)
    return tuple(math.log2(size) for size in sizes)


def _by_family(workloads: Iterable[Workload]) -> dict[str, list[_Place]]:
    found: dict[str, list[_Place]] = {}
    for one in workloads:
        found.setdefault(one.family, []).append(_place(one))
    return found


def _to_nearest(place: _Place, others: Iterable[_Place]) -> float:
    return min((_apart(place, other) for other in others), default=math.inf)


def _apart(one: _Place, other: _Place) -> float:
    """Doublings of the size that differs most: T' and T, which mostly are one, count once."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
