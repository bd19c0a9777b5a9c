"""What a report has, as plain data: of each source and device an overview, and every profile."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import autochunk
from autochunk.device import Device
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.report.curve import curve_record, versions
from autochunk.report.records import profile_row
from autochunk.report.sources import Source, miss_records
from autochunk.store.profile import Profile, utc_now

_Peers = dict[str, list[dict[str, Any]]]


def report_record(
    sources: Sequence[Source],
    now: Device,
    peers: _Peers | None = None,
    before: Mapping[tuple[str, str], Profile] | None = None,
) -> dict[str, Any]:
    """All that a report shows of its sources.

    ``before`` are profiles that they are compared with, by device and workload, as ``earlier`` has
    them.

    ``peers`` are other libraries by workload key, as ``autochunk bench --json`` prints them; they
    were timed on this device, ``now``. ``not_installed`` names implementations that are in a
    profile and cannot be chosen here, and so not in this report.
    """
    devices = [
        device_record(source, key, now, peers or {}, before or {})
        for source in sources
        for key in dict.fromkeys([*(one.device.key for one in source.profiles), *source.misses])
    ]
    profiles = [profile for source in sources for profile in source.profiles]
    return {
        "made": utc_now(),
        "autochunk": autochunk.__version__,
        "sources": [_source_record(source) for source in sources],
        "devices": devices,
        "not_installed": _not_installed(profiles),
    }


def device_record(
    source: Source,
    key: str,
    now: Device,
    peers: _Peers,
    before: Mapping[tuple[str, str], Profile],
) -> dict[str, Any]:
    """What a source has of a device: figures of all its workloads, then each of them.

    ``memory_vs_dense`` and the speed-ups are [least, median, greatest] over the workloads.
    """
    profiles = [profile for profile in source.profiles if profile.device.key == key]
    own_peers = peers if key == now.key else {}
    rows = [
        {
            **profile_row(profile, now),
            "curve": curve_record(
                profile, own_peers.get(profile.workload, ()), before.get(profile.key)
            ),
        }
        for profile in profiles
    ]
    return {
        "device": key,
        "source": source.name,
        "here": key == now.key,
        "speedup_vs_dense": _range(row["speedup_vs_dense"] for row in rows),
        "speedup_vs_default": _range(row["speedup_vs_default"] for row in rows),
        "memory_vs_dense": _range(row["memory_vs_dense"] for row in rows),
        "stale": sum(bool(row["stale"]) for row in rows),
        "unfinished": sum(not row["complete"] for row in rows),
        "versions": _versions(profiles),
        "misses": miss_records(source.misses.get(key, {})),
        "workloads": rows,
    }


def _source_record(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "kind": source.kind,
        "profiles": len(source.profiles),
        "note": source.note,
    }


def _range(values: Iterable[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), statistics.median(known), max(known)] if known else None


def _versions(profiles: Iterable[Profile]) -> dict[str, list[str]]:
    """Of each program the versions that measured."""
    found: dict[str, set[str]] = {}
    for profile in profiles:
        for name, text in versions(profile).items():
            found.setdefault(name, set()).add(text)
    return {name: sorted(texts) for name, texts in found.items()}


def _not_installed(profiles: Iterable[Profile]) -> list[str]:
    names = {one.implementation for profile in profiles for one in profile.measurements}
    known = names & IMPLEMENTATIONS.keys()
    return sorted(name for name in known if not IMPLEMENTATIONS[name].installed)
