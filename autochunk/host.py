"""The machine's processor, cores, memory and allocator, as far as this process may use them.

On a CPU jax calls every device just "cpu", so its fingerprint is made from what decides the speed
of a matrix product: the model, its instruction sets, its caches and the cores that this process may
use. On Linux all of it comes from ``/proc`` and ``/sys``, on macOS from ``sysctl``; elsewhere, what
Python knows has to do, and nothing raises.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

# Allocators that programs are started with instead of the C library's, by their libraries' names.
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc")

# Flags that count, as Linux spells them (pni is SSE 3, abm has lzcnt): the instruction sets that
# LLVM, Eigen, oneDNN and XNNPACK choose XLA's CPU code by. All others say what the kernel, its
# microcode or a hypervisor does (pti, ibrs, md_clear, constant_tsc, hypervisor), or are of use to
# other programs (aes, sha_ni); they come and go with updates, and no product gets faster by them.
# Listed is what counts, for kernels invent more of the others each year. Each architecture has its
# own list: on x86 ``sme`` is encrypted memory, and ``smep`` a protection.
_COUNTING = {
    "flags": re.compile(
        r"sse\w*|pni|ssse3|avx\w*|amx_\w+|fma4?|f16c|xop|bmi[12]|abm|popcnt|movbe", re.ASCII
    ),
    "Features": re.compile(r"fp|fphp|asimd\w*|sve\w*|sme\w*|bf16|i8mm|neon|vfpv\w+", re.ASCII),
}

_SYSCTL_SECONDS = 10


def read(path: str | Path) -> str:
    """The file's text; empty where the system has no such file."""
    try:
        return Path(path).read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def sysctl() -> str:
    """What macOS says of its hardware, as lines of ``name: value``; empty on other systems."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "hw", "machdep.cpu"]
    try:
        # It fails with what it cannot read, and has printed the rest.
        return subprocess.run(
            command, capture_output=True, check=False, timeout=_SYSCTL_SECONDS
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""


# --- The processor --------------------------------------------------------------------------------


def cpu_kind(read: Callable[[str | Path], str] = read, sysctl: Callable[[], str] = sysctl) -> str:
    """What the CPU is called: its model, a hash of its instruction sets, and its cache sizes.

    ``AuthenticAMD/25/1/1 isa=0a1b2c3d caches=32K+512K+32768K`` names vendor, family, model and
    stepping; a chip of Apple's is known by its name, ``Apple M1 Pro caches=64K+4096K``.

    Args:
      read: the text of a file; empty where there is none.
      sysctl: what macOS says of its hardware, as ``sysctl`` in this module.
    """
    if info := _first_processor(read("/proc/cpuinfo")):
        name, flags = _flags(info)
        sets = [flag for flag in flags if _COUNTING[name].fullmatch(flag)]
        return _kind(_model(info), sets, _caches(read))
    return _macos_kind(_fields(sysctl())) or _bare_kind()


def former_cpu_kind(read: Callable[[str | Path], str] = read) -> str | None:
    """What versions called this CPU that took all flags for instruction sets.

    None where they knew no flags. Which of them count cannot be told from that hash of all; that
    this machine has the same can.
    """
    info = _first_processor(read("/proc/cpuinfo"))
    return _kind(_model(info), _flags(info)[1], _caches(read)) if info else None


def _kind(model: str, flags: Iterable[str], caches: str) -> str:
    text = " ".join(sorted(flags))
    isa = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{model} isa={isa} caches={caches or 'unknown'}"


def _model(info: dict[str, str]) -> str:
    names = (
        ("vendor_id", "cpu family", "model", "stepping")
        if "vendor_id" in info
        else ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
    )
    return "/".join(info.get(name, "unknown") for name in names)


def _flags(info: dict[str, str]) -> tuple[str, list[str]]:
    """The name of the line of flags, by architecture, and the flags."""
    name = "flags" if "flags" in info else "Features"
    return name, info.get(name, "").split()


def _first_processor(cpuinfo: str) -> dict[str, str]:
    """The first block of ``/proc/cpuinfo``; the others repeat it once per core."""
    return _fields(cpuinfo.strip().partition("\n\n")[0])


def _fields(text: str) -> dict[str, str]:
    """Lines of ``name: value``."""
    return {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in text.splitlines())
        if colon
    }


def _caches(read: Callable[[str | Path], str]) -> str:
    """Sizes of the data and unified caches that the first core sees: ``48K+2048K+32768K``."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    indices = [folder / f"index{number}" for number in range(10)]
    sizes = [
        read(index / "size").strip()
        for index in indices
        if read(index / "type").strip() not in ("Instruction", "")
    ]
    return "+".join(sizes)


def _macos_kind(hardware: dict[str, str]) -> str:
    """By what ``sysctl`` says; "" where that is nothing.

    An Intel Mac's is spelt as on Linux. The name of Apple's own chips says which instruction sets
    they have, of which macOS lists more with each version.
    """
    sizes = [hardware.get(f"hw.{level}cachesize", "") for level in ("l1d", "l2", "l3")]
    caches = "+".join(
        f"{int(size) // 1024}K" for size in sizes if re.fullmatch("[0-9]{1,18}", size) and int(size)
    )
    cpu = {name: hardware.get(f"machdep.cpu.{name}", "") for name in _MACOS_NAMES}
    if not cpu["vendor"]:
        brand = re.sub(r"[^ -{}~]+", " ", cpu["brand_string"])[:100].strip()
        return f"{brand} caches={caches or 'unknown'}" if brand else ""
    model = "/".join(cpu[name] or "unknown" for name in _MACOS_NAMES[:4])
    flags = f"{cpu['features']} {cpu['leaf7_features']}".lower().replace(".", "_").split()
    return _kind(model, filter(_COUNTING["flags"].fullmatch, flags), caches)


_MACOS_NAMES = (
    "vendor",
    "family",
    "model",
    "stepping",
    "brand_string",
    "features",
    "leaf7_features",
)


def _bare_kind() -> str:
    """What Python knows, as on Windows: architecture and processor."""
    return f"{platform.machine() or 'unknown'}/{platform.processor() or 'unknown'}"


# --- Cores and memory -----------------------------------------------------------------------------


def usable_cores() -> float:
    """CPU cores that this process may use: 1.5 where a quota lets it have so many.

    The least of the machine's, its affinity and its cgroups' quotas; of these hundredths count.
    """
    cores: float = (
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
            cores = min(cores, max(0.01, round(int(quota) / int(period), 2)))
    return int(cores) if cores == int(cores) else cores


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
    try:
        return max(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # a system without these names
        return _windows_memory(available=name == "MemAvailable")


class _WindowsMemory(ctypes.Structure):
    """``MEMORYSTATUSEX`` of Windows, with names for what is used of it; in bytes."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_memory(*, available: bool) -> int:
    """Memory that Windows has, or has free, in bytes; 0 on other systems."""
    windows = getattr(ctypes, "windll", None)
    memory = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    if windows is None or not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(memory)):
        return 0
    return int(memory.available if available else memory.total)


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
    """The cgroup folders of this process for a controller, from its own up to what is mounted.

    A limit may sit on any of them.
    """
    folders: list[Path] = []
    for line in read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for root, own in _mounted(controller if controllers else "", path):
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return list(dict.fromkeys(folders))


def _mounted(controller: str, path: str) -> list[tuple[Path, Path]]:
    """Where the cgroups of a controller are mounted, and there the folder of one by its path.

    Of version 2, which has one mount for all, the controller is "".
    """
    mounts = _cgroup_mounts(controller)
    if not mounts:
        usual = Path("/sys/fs/cgroup") / controller
        return [(usual, usual / path.lstrip("/"))]
    found = [(root, _below(inside, path)) for root, inside in mounts]
    # Of a mount that shows others' cgroups, too, all that can be told is what it is of.
    fitting = [one for one in found if one[1] is not None] or found
    return [(root, root / (below or "")) for root, below in fitting]


def _cgroup_mounts(controller: str) -> list[tuple[Path, str]]:
    """Each mount of a controller, and the path of the cgroup that is mounted there.

    Controllers may be mounted together and anywhere: ``/sys/fs/cgroup/cpu,cpuacct``, say.
    """
    found = []
    for line in read("/proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        fields, (kind, *more) = mount.split(), system.split() or [""]
        controllers = more[-1].split(",") if more else []
        ours = kind == "cgroup" and controller in controllers if controller else kind == "cgroup2"
        if ours and len(fields) >= 5:
            found.append((Path(_unescaped(fields[4])), _unescaped(fields[3])))
    return found


def _below(cgroup: str, path: str) -> str | None:
    """A cgroup's path from another that it is in; None where it is elsewhere.

    "" where one of them lies outside of this container's own cgroups, where names end.
    """
    if ".." in f"{cgroup}/{path}".split("/"):
        return ""
    above = cgroup.rstrip("/") + "/"
    return f"{path}/".removeprefix(above).strip("/") if f"{path}/".startswith(above) else None


def _unescaped(text: str) -> str:
    """A path of ``/proc/self/mountinfo``, where spaces and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


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
