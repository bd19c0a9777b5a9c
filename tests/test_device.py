"""The device's fingerprint, and what of a machine's cores and memory a process may use.

Files of ``/proc`` and ``/sys`` come from a dict of texts in place of ``autochunk.host.read``;
all parsing is the real one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jaxlib.version
import pytest
from factories import make_device, run_python
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autochunk import host, nvidia
from autochunk.device import Device, detect
from autochunk.errors import DeviceError
from autochunk.host import available_cpu_bytes, cpu_memory_bytes, usable_cores

GIB = 2**30
MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
Buffers:               0 kB
"""
V2 = "0::/\n"
V1 = "12:cpu,cpuacct:/\n5:memory:/\n1:name=systemd:/\n"
NESTED_V2 = "0::/outer/inner\n"
NESTED_V1 = "4:memory:/outer/inner\n3:cpu:/outer/inner\n"
ROOT = "/sys/fs/cgroup"


class Files(dict[str, str]):
    """A machine's files by path; others read as "", as in ``autochunk.host.read``."""

    def read(self, path: str | Path) -> str:
        """Stands in for ``read``."""
        return self.get(str(path), "")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """A Linux machine of 64 cores and 16 GiB, half of them available, without cgroups."""
    machine = Files({"/proc/meminfo": MEMINFO})
    monkeypatch.setattr(host, "read", machine.read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return machine


def test_detect_is_complete() -> None:
    """Every field of this machine's CPU is known."""
    here = detect(jax.devices("cpu")[0])
    assert here.platform == "cpu"
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.memory_gib >= 1
    assert here.jax == jax.__version__
    assert here.jaxlib == jaxlib.version.__version__
    assert here.driver == ""
    if Path("/proc/cpuinfo").exists():
        assert re.fullmatch(r"\S.* isa=[0-9a-f]{8} caches=\S+", here.kind)


def test_detect_is_the_same_in_another_process() -> None:
    """The fingerprint depends on the machine only, so one process's profile answers in the next."""
    code = """
import autochunk, jax
print(autochunk.detect(jax.devices("cpu")[0]).model_dump_json())
"""
    other = Device.model_validate_json(run_python(code, PYTHONHASHSEED="77"))
    assert other == detect(jax.devices("cpu")[0])


def test_detect_means_jax_s_default_device() -> None:
    """Without an argument it is the device that jax computes on, which may also be set by name."""
    assert detect() == detect(jax.local_devices()[0])
    with jax.default_device(jax.devices("cpu")[0]):
        assert detect().platform == "cpu"
    code = """
import autochunk, jax
jax.config.update("jax_default_device", "cpu")
print(autochunk.detect().platform)
"""
    assert run_python(code).strip() == "cpu"


def test_no_such_device_is_a_device_error() -> None:
    """A platform that jax does not have is a DeviceError with jax's reason, not a RuntimeError."""
    code = """
import autochunk
from autochunk.errors import DeviceError
try:
    autochunk.detect()
except DeviceError as error:
    print(error)
"""
    assert "jax finds no device to compute on" in run_python(code, JAX_PLATFORMS="nonsense")
    assert issubclass(DeviceError, RuntimeError)


@pytest.mark.gpu
def test_detect_gpu() -> None:
    """A GPU is known by its name and memory; a CPU's cores do not count."""
    here = detect(jax.devices("gpu")[0])
    assert (here.platform, here.cores) == ("gpu", 0)
    assert here.kind == jax.devices("gpu")[0].device_kind
    assert here.memory_gib > 0
    assert here.driver


class FakeDriver:
    """CUDA's driver library, of a machine with some GPUs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        """As in CUDA's driver API."""
        count._obj.value = self.count
        return 0


@pytest.mark.parametrize(
    ("visible", "wanted", "expected"),
    [
        (None, "all", ["0", "1", "2"]),
        (None, "2,0", ["2", "0"]),
        ("5,GPU-abc,7", "all", ["5", "GPU-abc", "7"]),
        ("5,GPU-abc,7", "1", ["GPU-abc"]),
    ],
)
def test_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, wanted: str, expected: list[str]
) -> None:
    """Numbers count the GPUs that this process sees.

    Names are those that a process of its own is given.
    """
    monkeypatch.setattr(nvidia, "cuda_driver", lambda: FakeDriver(3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia.visible_gpus(wanted) == expected


@pytest.mark.parametrize("wanted", ["3", "0,0", "", "-1", "one", "0,,1"])
def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """What was asked for is named with what there is."""
    monkeypatch.setattr(nvidia, "cuda_driver", lambda: FakeDriver(3))
    said = r'devices must be "all" or different numbers from 0 to 2'
    with pytest.raises(DeviceError, match=said):
        nvidia.visible_gpus(wanted)


@pytest.mark.parametrize("driver", [None, FakeDriver(0)], ids=["no driver", "no GPU"])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    """Without a GPU there is an error that says how to go on, and no memory to tell."""
    monkeypatch.setattr(nvidia, "cuda_driver", lambda: driver)
    with pytest.raises(DeviceError, match="this process sees no NVIDIA GPU; leave --devices out"):
        nvidia.visible_gpus()
    assert driver is not None or nvidia.gpu_memory(0) is None


def test_versions_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read from what the driver and jax say of themselves."""
    text = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build
GCC version:  gcc version 15.3.0
"""
    monkeypatch.setattr(nvidia, "read", lambda _: text)
    assert nvidia.driver_version() == "580.159.04"
    monkeypatch.setattr(nvidia, "read", lambda _: "")
    assert nvidia.driver_version() == ""
    for said, version in (("cuda 13000", "13.0"), ("cuda 12080", "12.8"), ("rocm 7", "")):
        gpu = SimpleNamespace(client=SimpleNamespace(platform_version=said))
        assert nvidia.cuda_version(gpu) == version


@pytest.mark.parametrize("field", ["jax", "jaxlib", "driver", "cuda", "cudnn"])
def test_key_has_no_version_in_it(field: str) -> None:
    """An upgrade makes a profile stale, not unknown."""
    assert make_device(**{field: "99.88.77"}).key == make_device().key
    assert "0.12" not in make_device().key


@pytest.mark.parametrize(
    ("field", "other"),
    [("platform", "gpu"), ("kind", "Other"), ("cores", 5), ("cores", 0), ("memory_gib", 9)],
)
def test_key_has_every_hard_field(field: str, other: object) -> None:
    """Profiles are shared between equal machines only."""
    assert make_device(**{field: other}).key != make_device().key


@pytest.mark.parametrize(
    ("then", "now", "stale"),
    [
        ("0.12.0", "0.12.0", False),
        ("0.12.0", "0.12.0.1", False),
        ("0.12.0", "0.12.9", False),
        ("0.12.0", "0.13.0", True),
        ("0.12.0", "1.12.0", True),
        ("0.1.0", "0.10.0", True),
        ("0.12.0.dev20260101", "0.12.1", False),
        ("", "0.12.0", True),
        ("", "", False),
    ],
)
def test_stale_by_jaxlib_s_minor_version(then: str, now: str, stale: bool) -> None:
    """Only another minor version of jaxlib makes a profile stale; the reason names both."""
    reasons = make_device(jaxlib=then).stale_reasons(make_device(jaxlib=now))
    assert bool(reasons) == stale
    if stale:
        assert len(reasons) == 1
        assert now in reasons[0]
        assert (then or "unknown") in reasons[0]


def test_stale_by_cudnns_minor_version() -> None:
    """A newer cuDNN brings other kernels, and those are candidates."""
    then = make_device(cudnn="9.19.0.56")
    assert then.stale_reasons(make_device(cudnn="9.19.1.2")) == []
    reasons = then.stale_reasons(make_device(cudnn="9.20.0.48"))
    assert reasons == ["measured with cuDNN 9.19.0.56, this is 9.20.0.48"]


@pytest.mark.parametrize("field", ["allocator", "huge_pages"])
def test_stale_by_how_memory_is_handed_out(field: str) -> None:
    """Where both are known: profiles of before it was recorded are no staler for it."""
    then, unknown = make_device(**{field: "one"}), make_device()
    (reason,) = then.stale_reasons(make_device(**{field: "other"}))
    assert reason == f"measured with {field.replace('_', ' ')} one, this is other"
    assert then.stale_reasons(unknown) == unknown.stale_reasons(then) == []
    assert then.stale_reasons(then) == []
    assert then.key == make_device(**{field: "other"}).key


def test_another_device_is_not_stale() -> None:
    """It has no profile here that could be."""
    assert make_device(jaxlib="0.1.0", cores=2).stale_reasons(make_device(jaxlib="0.2.0")) == []


@pytest.mark.parametrize("field", ["jax", "driver", "cuda"])
def test_other_versions_are_recorded_only(field: str) -> None:
    """Jax itself and the driver were not seen to move the best plan."""
    assert make_device(**{field: "1"}).stale_reasons(make_device(**{field: "2"})) == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("platform", ""),
        ("kind", ""),
        ("kind", "x" * 201),
        ("cores", -1),
        ("memory_gib", -1),
        ("speed", 1),
    ],
)
def test_device_is_checked(field: str, wrong: object) -> None:
    """A fingerprint read from a file is checked."""
    with pytest.raises(ValidationError):
        make_device(**{field: wrong})


LETTERS = st.characters(exclude_categories=["C"], exclude_characters="|")
KINDS = st.text(LETTERS, min_size=1, max_size=20).filter(
    lambda kind: "cores=" not in kind and "memory=" not in kind
)


@given(KINDS, st.integers(0, 512), st.integers(0, 4096), st.text(max_size=9))
def test_device_json_round_trip(kind: str, cores: int, memory: int, driver: str) -> None:
    """A device goes through JSON unchanged."""
    one = make_device(kind=kind, cores=cores, memory_gib=memory, driver=driver)
    assert Device.model_validate_json(one.model_dump_json()) == one
    assert Device.model_validate(json.loads(json.dumps(one.model_dump(mode="json")))) == one


@given(KINDS, KINDS, st.integers(0, 3), st.integers(0, 3))
def test_keys_of_devices_are_injective(one: str, other: str, cores: int, more: int) -> None:
    """Different hard fields never give one key, whatever the kind's text."""
    first, second = make_device(kind=one, cores=cores), make_device(kind=other, cores=more)
    assert (first.key == second.key) == ((one, cores) == (other, more))


@pytest.mark.parametrize(
    "kind", ["", "A cores=4", "A memory=8GiB", "A | attention:t=1", "new\nline", "\x1b[31m"]
)
def test_a_kind_that_imitates_a_key_is_refused(kind: str) -> None:
    """What stands for other fields, or ends a device's key, is no name of a device.

    A bundle could carry it.
    """
    with pytest.raises(ValidationError):
        make_device(kind=kind)


# --- The CPU's kind -------------------------------------------------------------------------------

X86 = """\
processor\t: {n}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
cpu MHz\t: {mhz}
flags\t\t: {flags}
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd
CPU implementer\t: 0x41
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


def test_kind_of_an_x86(files: Files) -> None:
    """Vendor, family, model and stepping, then the instruction sets' hash."""
    files["/proc/cpuinfo"] = X86.format(n=0, mhz=2000, flags="sse avx")
    assert host.cpu_kind().startswith("AuthenticAMD/25/1/1 isa=")


def test_kind_of_an_arm(files: Files) -> None:
    """ARM's own names for the same."""
    files["/proc/cpuinfo"] = ARM
    assert host.cpu_kind().startswith("0x41/0xd0c/0x3/1 isa=")


def test_kind_leaves_out_what_changes(files: Files) -> None:
    """Clock, number of processors and the order of flags change from boot to boot.

    The kind does not.
    """
    files["/proc/cpuinfo"] = X86.format(n=0, mhz=2000, flags="sse avx")
    first = host.cpu_kind()
    faster = X86.format(n=0, mhz=3456.789, flags="avx  sse")
    files["/proc/cpuinfo"] = f"{faster}\n{X86.format(n=1, mhz=1, flags='sse avx')}"
    assert host.cpu_kind() == first


def test_kind_tells_instruction_sets_apart(files: Files) -> None:
    """One model behind two hypervisors, one of which hides AVX-512, is two kinds."""
    files["/proc/cpuinfo"] = X86.format(n=0, mhz=2000, flags="sse avx")
    first = host.cpu_kind()
    files["/proc/cpuinfo"] = X86.format(n=0, mhz=2000, flags="sse avx avx512f")
    assert host.cpu_kind() != first


@pytest.mark.parametrize("text", ["", "\n", "no colon here\n", "\0\0\0"])
def test_kind_without_cpuinfo(files: Files, text: str) -> None:
    """A system without /proc has a kind all the same."""
    files["/proc/cpuinfo"] = text
    assert Device(platform="cpu", kind=host.cpu_kind(), cores=1, memory_gib=1)


# --- Cores ----------------------------------------------------------------------------------------


def test_cores_without_cgroups(files: Files) -> None:
    """Without cgroups the affinity decides."""
    assert usable_cores() == 64


def test_cores_follow_the_affinity_of_this_process() -> None:
    """The real affinity, without a seam: a process bound to one core has one."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    code = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from autochunk.host import usable_cores
print(usable_cores())
"""
    assert run_python(code, min(os.sched_getaffinity(0))).strip() == "1"


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("150000 100000\n", 2),
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("50000 100000", 1),
        ("1 1000000", 1),
        ("800000 50000", 16),
        ("99999999 100000", 64),
        ("max 100000\n", 64),
        ("max", 64),
        ("", 64),
        ("0 100000", 1),
        ("100000 0", 64),
        ("-1 100000", 64),
        ("garbage", 64),
        ("lots of garbage", 64),
    ],
)
def test_cores_by_quota_v2(files: Files, quota: str, cores: int) -> None:
    """The ratio of cpu.max's quota and period, rounded up, bounds the cores.

    "max" and what cannot be read do not.
    """
    files.update({"/proc/self/cgroup": V2, f"{ROOT}/cpu.max": quota})
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("150000\n", "100000\n", 2),
        ("-1\n", "100000\n", 64),
        ("400000", "100000", 4),
        ("", "100000", 64),
        ("1", "", 64),
    ],
)
def test_cores_by_quota_v1(files: Files, quota: str, period: str, cores: int) -> None:
    """Version 1 has quota and period in two files; -1 is no limit."""
    files["/proc/self/cgroup"] = V1
    files[f"{ROOT}/cpu/cpu.cfs_quota_us"] = quota
    files[f"{ROOT}/cpu/cpu.cfs_period_us"] = period
    assert usable_cores() == cores


@pytest.mark.parametrize(("cgroup", "root"), [(NESTED_V2, ROOT), (NESTED_V1, f"{ROOT}/cpu")])
@pytest.mark.parametrize(
    ("outer", "inner", "cores"),
    [
        ("200000 100000", "max 100000", 2),
        ("max 100000", "300000 100000", 3),
        ("200000 100000", "300000 100000", 2),
    ],
)
def test_cores_by_nested_quotas(
    files: Files, cgroup: str, root: str, outer: str, inner: str, cores: int
) -> None:
    """A quota may sit on any cgroup above the process's own; the least one binds."""
    files["/proc/self/cgroup"] = cgroup
    files[f"{root}/outer/cpu.max"] = outer
    files[f"{root}/outer/inner/cpu.max"] = inner
    assert usable_cores() == cores


def test_quota_of_a_foreign_cgroup_does_not_bind(files: Files) -> None:
    """Only the process's own cgroup and those above it count, and only the cpu controller's."""
    files["/proc/self/cgroup"] = "3:cpuset:/\n0::/mine\n"
    files[f"{ROOT}/other/cpu.max"] = "100000 100000"
    files[f"{ROOT}/cpuset/cpu.cfs_quota_us"] = "1"
    assert usable_cores() == 64


# --- Memory ---------------------------------------------------------------------------------------


def test_memory_without_cgroups(files: Files) -> None:
    """The machine's own figures."""
    assert cpu_memory_bytes() == 16 * GIB
    assert available_cpu_bytes() == 8 * GIB


def test_memory_without_meminfo(files: Files) -> None:
    """Without /proc/meminfo, the system's page counts."""
    del files["/proc/meminfo"]
    assert cpu_memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_of_this_machine() -> None:
    """The real files, without a seam: some memory is available, and no more than there is."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_cpu_bytes() <= cpu_memory_bytes() <= whole


# The cgroup, and its files of the memory's limit, usage and statistics.
MEMORY_V2 = (V2, *(f"{ROOT}/memory.{name}" for name in ("max", "current", "stat")))
MEMORY_V1 = (
    V1,
    *(f"{ROOT}/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
)


@pytest.mark.parametrize("names", [MEMORY_V2, MEMORY_V1], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("limit", "used", "total", "available"),
    [
        (4 * GIB, 1 * GIB, 4, 3),  # the cgroup's limit less its usage
        (12 * GIB, 1 * GIB, 12, 8),  # MemAvailable is less
        (4 * GIB, 5 * GIB, 4, 0),  # over its limit for a moment: nothing is left, never less
        (64 * GIB, 0, 16, 8),  # a limit beyond the machine binds nothing
        ("max", 1 * GIB, 16, 8),
        (9223372036854771712, 1 * GIB, 16, 8),  # version 1's "no limit"
        ("", "", 16, 8),
        ("garbage", 0, 16, 8),
        (4 * GIB, "", 4, 4),  # usage unknown
    ],
)
def test_memory_by_cgroup(
    files: Files, names: tuple[str, ...], limit: object, used: object, total: int, available: int
) -> None:
    """The lesser of the machine's memory and the cgroup's, in both versions."""
    files["/proc/self/cgroup"], limit_name, used_name, _ = names
    files |= {limit_name: f"{limit}\n", used_name: f"{used}\n"}
    assert cpu_memory_bytes() == total * GIB
    assert available_cpu_bytes() == available * GIB


def test_memory_by_nested_cgroups(files: Files) -> None:
    """Total and available memory may be bound by different cgroups.

    The outer one has neighbours that use it up.
    """
    files["/proc/self/cgroup"] = NESTED_V2
    files[f"{ROOT}/outer/memory.max"] = str(6 * GIB)
    files[f"{ROOT}/outer/memory.current"] = str(5 * GIB)
    files[f"{ROOT}/outer/inner/memory.max"] = str(4 * GIB)
    files[f"{ROOT}/outer/inner/memory.current"] = str(1 * GIB)
    assert cpu_memory_bytes() == 4 * GIB
    assert available_cpu_bytes() == 1 * GIB


@pytest.mark.parametrize(
    ("names", "stat"),
    [
        (MEMORY_V2, f"anon 1\ninactive_file {2 * GIB}\nactive_file 3\n"),
        (MEMORY_V1, f"cache 1\ntotal_inactive_file {2 * GIB}\n"),
        (MEMORY_V1, f"cache 1\ninactive_file 0\ntotal_cache 1\ntotal_inactive_file {2 * GIB}\n"),
    ],
    ids=["v2", "v1", "v1 with children"],
)
def test_page_cache_is_free(files: Files, names: tuple[str, ...], stat: str) -> None:
    """Cached files that the kernel drops on demand do not count as used.

    In version 1 those of child groups, too.
    """
    files["/proc/self/cgroup"], limit_name, used_name, stat_name = names
    files |= {limit_name: str(4 * GIB), used_name: str(3 * GIB), stat_name: stat}
    assert available_cpu_bytes() == 3 * GIB


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("", []),
        ("0::/\n", [ROOT]),
        ("0::/a/b\n", [f"{ROOT}/a/b", f"{ROOT}/a", ROOT]),
        ("5:memory:/a\n", [f"{ROOT}/memory/a", f"{ROOT}/memory"]),
        ("5:hugetlb,memory:/a\n", [f"{ROOT}/memory/a", f"{ROOT}/memory"]),
        ("5:cpu:/a\n1:name=systemd:/\n", []),
        ("0::/a:b\n", [f"{ROOT}/a:b", ROOT]),
        ("garbage\n", [ROOT]),
    ],
)
def test_cgroup_folders(files: Files, cgroup: str, expected: list[str]) -> None:
    """The controller's folders from the process's own cgroup up to the root."""
    files["/proc/self/cgroup"] = cgroup
    assert [str(folder) for folder in host._cgroup_folders("memory")] == expected


@pytest.mark.parametrize("digit", ["\u00b2", "\u2460"])
def test_digits_that_are_no_numbers(files: Files, digit: str) -> None:
    """A superscript two is no quota, and no error."""
    files.update({"/proc/self/cgroup": V2, f"{ROOT}/cpu.max": f"{digit} 100000"})
    assert usable_cores() == 64


ascii_text = st.text(st.characters(max_codepoint=127))


@given(st.text(), ascii_text, st.text())
def test_garbage_never_raises(cgroup: str, limit: str, meminfo: str) -> None:
    """Files that cannot be understood bind nothing.

    There is always at least one core, and never less than no memory.
    """
    texts = {"/proc/self/cgroup": f"0::/{cgroup}", "/proc/meminfo": meminfo}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvidia, "read", lambda path: texts.get(str(path), limit))
        assert usable_cores() >= 1
        assert available_cpu_bytes() >= 0
        assert cpu_memory_bytes() >= 0


def test_read_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    """A file that is not there, or is a folder, or is no text, is no error."""
    assert host.read(tmp_path / "missing") == ""
    assert host.read(tmp_path) == ""
    (tmp_path / "binary").write_bytes(b"\xff\x00ok")
    assert host.read(tmp_path / "binary").endswith("ok")


# --- How memory is handed out, and who is at work -------------------------------------------------


@pytest.mark.parametrize(
    ("maps", "environment", "expected"),
    [
        ("", {}, "glibc"),
        ("", {"MALLOC_TOP_PAD_": "9", "MALLOC_A": "2"}, "glibc MALLOC_A=2 MALLOC_TOP_PAD_=9"),
        ("", {"GLIBC_TUNABLES": "glibc.malloc.x=9:glibc.cpu.x=1"}, "glibc glibc.malloc.x=9"),
        ("7f00 r-xp 0 /usr/lib/libjemalloc.so.2\n", {"MALLOC_TOP_PAD_": "1"}, "jemalloc"),
        ("7f00 r-xp 0 /opt/libtcmalloc_minimal.so.4\n", {}, "tcmalloc"),
        ("7f00 r-xp 0 /opt/libjemalloc/other.so\n", {}, "glibc"),
    ],
)
def test_allocator(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    maps: str,
    environment: dict[str, str],
    expected: str,
) -> None:
    """By the library that is loaded in its place, else the C library's with its settings."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    files["/proc/self/maps"] = maps
    assert host.allocator() == expected


def test_allocator_of_another_c_library(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known, and nothing raises."""

    def refuse(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", refuse, raising=False)
    assert host.allocator() == ""
    assert files == {"/proc/meminfo": MEMINFO}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never", "always"), ("", "")],
)
def test_huge_pages(files: Files, text: str, expected: str) -> None:
    """The one in brackets is in force."""
    files["/sys/kernel/mm/transparent_hugepage/enabled"] = text
    assert host.huge_pages() == expected


def test_busy_seconds_are_of_the_cores_of_this_process(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of others, nor time in which nothing was done; unknown where nothing tells."""
    assert host.busy_seconds() is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    times = "1 2 3 1000 1000 4 5 6 7 0"
    files["/proc/stat"] = f"cpu  9 9 9 9\ncpu0 {times}\ncpu1 {times}\ncpu2 {times}\nintr 5\n"
    assert host.busy_seconds() == pytest.approx(2 * (1 + 2 + 3 + 4 + 5 + 6) / 100)
