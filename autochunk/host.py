"""The machine's processor, cores, memory and allocator, as far as this process may use them.

On a CPU jax calls every device just "cpu", so its fingerprint is made from what decides the speed
of a matrix product: the model, its instruction sets, its caches and the cores that this process may
use. All of it comes from ``/proc`` and ``/sys``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

# Allocators that programs are started with instead of the C library's, by their libraries' names.
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc")


def cpu_kind() -> str:
    """Vendor, family, model and stepping, a hash of the instruction sets, and the cache sizes."""
    info = _first_processor(read("/proc/cpuinfo"))
    if not info:
        return f"{platform.machine() or 'unknown'}/{platform.processor() or 'unknown'}"
    names = (
        ("vendor_id", "cpu family", "model", "stepping")
        if "vendor_id" in info
        else ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    )
    flags = " ".join(sorted(info.get("flags", info.get("Features", "")).split()))
    model = "/".join(info.get(name, "unknown") for name in names)
    return (
        f"{model} isa={hashlib.sha256(flags.encode()).hexdigest()[:8]} "
        f"caches={_caches() or 'unknown'}"
    )


def _first_processor(cpuinfo: str) -> dict[str, str]:
    """The first block of ``/proc/cpuinfo``; the others repeat it once per core."""
    block = cpuinfo.strip().partition("\n\n")[0]
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in block.splitlines())
        if colon
    }


def _caches() -> str:
    """Sizes of the data and unified caches that the first core sees: ``48K+2048K+32768K``."""
    indices = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return "+".join(
        read(index / "size").strip()
        for index in indices
        if read(index / "type").strip() != "Instruction"
    )


def usable_cores() -> int:
    """CPU cores that this process may use.

    The least of the machine's, its affinity and its cgroup's quota (rounded up).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _cgroup_folders("cpu"):
        quota, _, period = read(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (
                read(folder / "cpu.cfs_quota_us").strip(),
                read(folder / "cpu.cfs_period_us").strip(),
            )
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def cpu_memory_bytes() -> int:
    """Memory that this process could ever have.

    The lesser of the machine's and its cgroups' limits, in bytes.
    """
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroup_memory())])


def available_cpu_bytes() -> int:
    """Memory free for this process now.

    The least of what the machine has available and what its cgroups leave, in bytes.
    """
    return max(
        0, min([_meminfo("MemAvailable"), *(limit - used for limit, used in _cgroup_memory())])
    )


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every cgroup, of either version, that bounds this process."""
    bounds = []
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = read(folder / limit_name).strip(), read(folder / used_name).strip()
            # Version 1 writes a number near 2^63 for "no limit".
            if limit.isdecimal() and int(limit) < 2**60:
                bounds.append(
                    (int(limit), int(used) - _inactive_file(folder) if used.isdecimal() else 0)
                )
    return bounds


def _inactive_file(folder: Path) -> int:
    """Page cache that the kernel gives back on demand, in bytes.

    No reason to think memory is short.
    """
    # In version 1 the plain name leaves out the groups below, whose use counts.
    values: dict[str, str] = dict(
        re.findall(
            r"^(total_inactive_file|inactive_file) ([0-9]+)$",
            read(folder / "memory.stat"),
            re.MULTILINE,
        )
    )
    return int(values.get("total_inactive_file") or values.get("inactive_file") or 0)


def _cgroup_folders(controller: str) -> list[Path]:
    """The cgroup folders of this process for a controller, from its own up to the root.

    A limit may sit on any of them.
    """
    folders: list[Path] = []
    for line in read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def read(path: str | Path) -> str:
    """The file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def busy_seconds() -> float | None:
    """CPU time of all processes since the start, on the cores that this one may use.

    None where the system does not tell, or a quota gives this one less than those cores.
    """
    if not hasattr(os, "sched_getaffinity") or usable_cores() < len(os.sched_getaffinity(0)):
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in read("/proc/stat").splitlines() if line]
    # All but idle time and waiting for disks: what a host takes for other machines counts, too.
    working = [line[1:4] + line[6:9] for line in lines if line[0] in mine]
    spent = [sum(map(int, times)) for times in working]
    return sum(spent) / os.sysconf("SC_CLK_TCK") if spent else None


# --- How memory is handed out ---------------------------------------------------------------------


def allocator() -> str:
    """What hands out memory in this process, such as "glibc" or "jemalloc"; "" if not known.

    With the settings that it was started with: whether a freed buffer is kept decides whether the
    next one costs page faults, which can take longer than filling it.
    """
    loaded = re.findall(r"/lib([a-z]+)[^/]*$", read("/proc/self/maps"), re.MULTILINE)
    for name in _ALLOCATORS:
        if name in loaded:
            return name
    library = _c_library()
    return " ".join([library, *_malloc_settings()]) if library else ""


def _c_library() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")[0]
    except (AttributeError, ValueError, OSError):  # another system, or another C library
        return ""


def _malloc_settings() -> list[str]:
    """Those of the environment that glibc's allocator heeds."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    named = [f"{name}={value}"[:60] for name, value in sorted(settings.items())]
    return [*named, *sorted(one[:60] for one in tunables if one.startswith("glibc.malloc."))]


def huge_pages() -> str:
    """Whether the kernel gives huge pages unasked: "always", "madvise" or "never"; or "".

    A buffer in huge pages costs fewer page faults.
    """
    chosen = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else ""
