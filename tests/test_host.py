"""What a machine's processor is called, and what of its cores and memory a process may use.

Files of ``/proc`` and ``/sys`` come from a dict of texts in place of ``autochunk.host.read``, and
what macOS says from a text in place of ``sysctl``; all parsing is the real one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from factories import run_python
from hypothesis import given
from hypothesis import strategies as st

from autochunk import host
from autochunk.device import Device
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
Features\t: fp asimd {features}
CPU implementer\t: 0x41
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
# A whole line of flags, of an AMD EPYC 7763 in a virtual machine.
FLAGS = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse "
    "sse2 ht syscall nx mmxext fxsr_opt pdpe1gb rdtscp lm constant_tsc rep_good nopl tsc_reliable "
    "nonstop_tsc cpuid extd_apicid pni pclmulqdq ssse3 fma cx16 pcid sse4_1 sse4_2 movbe popcnt "
    "aes xsave avx f16c rdrand hypervisor lahf_lm cmp_legacy svm cr8_legacy abm sse4a misalignsse "
    "3dnowprefetch osvw topoext vmmcall fsgsbase bmi1 avx2 smep bmi2 erms invpcid rdseed adx smap "
    "clflushopt clwb sha_ni xsaveopt xsavec xgetbv1 xsaves clzero xsaveerptr arat npt nrip_save "
    "umip vaes vpclmulqdq rdpid fsrm"
)
SETS = "sse sse2 pni ssse3 fma sse4_1 sse4_2 movbe popcnt avx f16c abm sse4a bmi1 avx2 bmi2"


def kind_of(cpuinfo: str, **files: str) -> str:
    """The kind of a Linux machine with this ``/proc/cpuinfo``."""
    return host.cpu_kind(Files({"/proc/cpuinfo": cpuinfo, **files}).read, lambda: "")


def x86(flags: str) -> str:
    """The kind of an x86 with these flags."""
    return kind_of(X86.format(n=0, mhz=2000, flags=flags))


def arm(features: str) -> str:
    """The kind of an ARM with these features."""
    return kind_of(ARM.format(features=features))


def test_kind_of_an_x86() -> None:
    """Vendor, family, model and stepping, then the instruction sets' hash and the caches."""
    caches = "/sys/devices/system/cpu/cpu0/cache/index"
    levels = [("Data", "32K"), ("Instruction", "32K"), ("Unified", "512K"), ("Unified", "32768K")]
    files = {f"{caches}{n}/type": f"{kind}\n" for n, (kind, _) in enumerate(levels)}
    files |= {f"{caches}{n}/size": f"{size}\n" for n, (_, size) in enumerate(levels)}
    found = kind_of(X86.format(n=0, mhz=2000, flags=FLAGS), **files)
    assert re.fullmatch(r"AuthenticAMD/25/1/1 isa=[0-9a-f]{8} caches=32K\+512K\+32768K", found)


def test_kind_of_an_arm() -> None:
    """ARM's own names for the same."""
    assert re.fullmatch(r"0x41/0xd0c/0x3/1 isa=[0-9a-f]{8} caches=unknown", arm(""))


def test_kind_leaves_out_what_changes() -> None:
    """Clock, number of processors and the order of flags change from boot to boot.

    The kind does not.
    """
    faster = X86.format(n=0, mhz=3456.789, flags="avx  sse")
    assert kind_of(f"{faster}\n{X86.format(n=1, mhz=1, flags='sse avx')}") == x86("sse avx")


def test_only_instruction_sets_that_xla_uses_count() -> None:
    """Of a whole line of flags these are left."""
    assert x86(FLAGS) == x86(SETS)


@pytest.mark.parametrize(
    "flag",
    "pti ibrs ibpb stibp ssbd hypervisor md_clear retpoline spec_ctrl arch_capabilities tsc_adjust "
    "constant_tsc nonstop_tsc rep_good nopl cpuid sme sev smep smap svm smx flush_l1d "
    "ibrs_enhanced user_shstk tsc_known_freq aes sha_ni vaes rdtscp xsave avxish+".split(),
)
def test_flags_that_change_no_speed_change_no_kind(flag: str) -> None:
    """Kernels, microcode and hypervisors add and hide them: the machine stays the same."""
    assert x86(f"{FLAGS} {flag}") == x86(FLAGS)
    assert host.former_cpu_kind(
        Files({"/proc/cpuinfo": X86.format(n=0, mhz=1, flags=f"{FLAGS} {flag}")}).read
    ) != host.former_cpu_kind(Files({"/proc/cpuinfo": X86.format(n=0, mhz=1, flags=FLAGS)}).read)


@pytest.mark.parametrize(
    "flag",
    "avx512f avx512_bf16 avx512_fp16 avx512_vnni avx_vnni avx_vnni_int8 avx10_1 amx_tile amx_bf16 "
    "amx_fp16 fma4 xop".split(),
)
def test_kind_tells_instruction_sets_apart(flag: str) -> None:
    """One model behind two hypervisors, one of which hides AVX-512, is two kinds."""
    assert x86(f"{FLAGS} {flag}") != x86(FLAGS)


@pytest.mark.parametrize(
    ("feature", "counts"),
    [
        *((name, True) for name in "asimdhp asimddp asimdfhm sve sve2 svebf16 sme bf16".split()),
        *((name, True) for name in "i8mm svei8mm sme2 fphp".split()),
        *((name, False) for name in "aes sha2 crc32 cpuid ssbs sb paca dit bti atomics".split()),
    ],
)
def test_features_of_an_arm(feature: str, counts: bool) -> None:
    """The same by ARM's names, of which one (sme) is another thing on x86."""
    assert (arm(feature) != arm("")) == counts


@pytest.mark.parametrize("text", ["", "\n", "no colon here\n", "\0\0\0"])
def test_kind_without_cpuinfo(text: str) -> None:
    """A system without /proc, such as Windows, has a kind all the same."""
    assert Device(platform="cpu", kind=kind_of(text), cores=1, memory_gib=1)
    assert host.former_cpu_kind(Files({"/proc/cpuinfo": text}).read) is None


M1 = """\
hw.ncpu: 8
hw.byteorder: 1234
hw.memsize: 17179869184
hw.perflevel0.l2cachesize: 12582912
hw.optional.arm.FEAT_BF16: 0
hw.pagesize: 16384
hw.cachelinesize: 128
hw.l1icachesize: 131072
hw.l1dcachesize: 65536
hw.l2cachesize: 4194304
machdep.cpu.cores_per_package: 8
machdep.cpu.core_count: 8
machdep.cpu.logical_per_package: 8
machdep.cpu.brand_string: Apple M1
"""
INTEL_MAC = """\
hw.l1dcachesize: 32768
hw.l2cachesize: 262144
hw.l3cachesize: 12582912
machdep.cpu.vendor: GenuineIntel
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
machdep.cpu.family: 6
machdep.cpu.model: 158
machdep.cpu.extmodel: 9
machdep.cpu.stepping: 10
machdep.cpu.features: FPU VME SSE SSE2 SSE3 SSSE3 FMA SSE4.1 SSE4.2 POPCNT AES AVX1.0 F16C
machdep.cpu.leaf7_features: RDWRFSGS TSC_THREAD_OFFSET SGX BMI1 AVX2 SMEP BMI2 {more}
"""


def mac(hardware: str) -> str:
    """The kind of a machine that has no /proc, and of which ``sysctl`` says this."""
    return host.cpu_kind(lambda _: "", lambda: hardware)


def test_kind_of_a_mac() -> None:
    """Apple's chips go by name: two are two kinds, however many cores this process may use."""
    assert mac(M1) == "Apple M1 caches=64K+4096K"
    assert mac(M1.replace("Apple M1", "Apple M4 Max")) == "Apple M4 Max caches=64K+4096K"
    assert mac("machdep.cpu.brand_string: Apple M2\n") == "Apple M2 caches=unknown"


def test_kind_of_an_intel_mac() -> None:
    """As on Linux; a mitigation is no instruction set there, either."""
    kind = mac(INTEL_MAC.format(more=""))
    assert re.fullmatch(r"GenuineIntel/6/158/10 isa=[0-9a-f]{8} caches=32K\+256K\+12288K", kind)
    assert mac(INTEL_MAC.format(more="MDCLEAR IBRS STIBP")) == kind
    assert mac(INTEL_MAC.format(more="AVX512F")) != kind


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hw.l2cachesize", "machdep.cpu.brand_string", "machdep.cpu.vendor"]),
            st.text(max_size=300),
        )
    )
)
def test_what_sysctl_says_never_raises(lines: list[tuple[str, str]]) -> None:
    """Whatever it is; where it is nothing, what Python knows stands for it."""
    assert mac("\n".join(f"{name}: {value}" for name, value in lines))
    assert mac("") == mac("nonsense") == host.cpu_kind(lambda _: "", lambda: "")


def test_sysctl_is_macos_s_own() -> None:
    """It says something there, and on no other system."""
    assert bool(host.sysctl()) == (sys.platform == "darwin")


@pytest.mark.skipif(sys.platform == "win32", reason="these are there on Windows, too")
def test_nothing_raises_without_what_only_unix_has() -> None:
    """No affinity, no names for ``sysconf`` and ``confstr``, no /proc: as on Windows."""
    code = """
import os
for name in ("sched_getaffinity", "sysconf", "sysconf_names", "confstr"):
    vars(os).pop(name, None)
from pathlib import Path
Path.read_text = lambda self, **_: open("/nowhere/at/all").read()
from autochunk import host
print(host.cpu_kind(), host.usable_cores() >= 1, host.cpu_memory_bytes(),
      host.available_cpu_bytes(), [host.allocator(), host.huge_pages(), host.busy_seconds()])
"""
    assert run_python(code).endswith(" True 0 0 ['', '', None]\n")


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
        ("150000 100000\n", 1.5),
        ("100000 100000", 1),
        ("100001 100000", 1),
        ("133300 100000", 1.33),
        ("50000 100000", 0.5),
        ("1 1000000", 0.01),
        ("800000 50000", 16),
        ("99999999 100000", 64),
        ("max 100000\n", 64),
        ("max", 64),
        ("", 64),
        ("0 100000", 0.01),
        ("100000 0", 64),
        ("-1 100000", 64),
        ("garbage", 64),
        ("lots of garbage", 64),
    ],
)
def test_cores_by_quota_v2(files: Files, quota: str, cores: float) -> None:
    """The ratio of cpu.max's quota and period, in hundredths, bounds the cores.

    "max" and what cannot be read do not.
    """
    files.update({"/proc/self/cgroup": V2, f"{ROOT}/cpu.max": quota})
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("150000\n", "100000\n", 1.5),
        ("-1\n", "100000\n", 64),
        ("400000", "100000", 4),
        ("", "100000", 64),
        ("1", "", 64),
    ],
)
def test_cores_by_quota_v1(files: Files, quota: str, period: str, cores: float) -> None:
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


DOCKER = "/docker/0a1b"
MEMORY = "/sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "expected"),
    [
        # mounted together, without a link of the controller's own name
        ("4:cpu,cpuacct:/a", ["/ /sys/fs/cgroup/cpu,cpuacct - cgroup cgroup rw,cpu,cpuacct"], [
            "/sys/fs/cgroup/cpu,cpuacct/a", "/sys/fs/cgroup/cpu,cpuacct"]),
        # a container that sees paths of the host, and is shown its own cgroup alone
        (f"4:cpu:{DOCKER}", [f"{DOCKER} /cg/cpu - cgroup cgroup rw,cpu"], ["/cg/cpu"]),
        (f"4:cpu:{DOCKER}/x", [f"{DOCKER} /c - cgroup cgroup rw,cpu"], ["/c/x", "/c"]),
        # version 2 beside version 1
        ("0::/a", ["/ /sys/fs/cgroup/unified - cgroup2 cgroup2 rw"], [
            "/sys/fs/cgroup/unified/a", "/sys/fs/cgroup/unified"]),
        # optional fields, and a space in a path
        ("0::/a", ["/ /c\\040g rw shared:9 master:1 - cgroup2 none rw"], ["/c g/a", "/c g"]),
        # somebody else's cgroup is mounted, too
        ("4:cpu:/a", ["/ /c - cgroup x rw,cpu", "/b /d - cgroup x rw,cpu"], ["/c/a", "/c"]),
        # names end at the edge of a namespace
        ("0::/../../other", ["/ /c - cgroup2 x rw"], ["/c"]),
        ("0::/a", ["/.. /c - cgroup2 x rw"], ["/c"]),
        # another controller's mount is no place for this one's; nor is a line that says nothing
        ("4:cpu:/a", ["/ /c - cgroup x rw,cpuset", "", " - ", "garbage - cgroup x cpu"], [
            f"{ROOT}/cpu/a", f"{ROOT}/cpu"]),
    ],
)  # fmt: skip
def test_cgroups_are_where_they_are_mounted(
    files: Files, cgroup: str, mounts: list[str], expected: list[str]
) -> None:
    """By /proc/self/mountinfo; only where that says nothing, in the usual places."""
    files["/proc/self/cgroup"] = f"{cgroup}\n"
    lines = [f"30 23 0:26 {one}" for one in mounts]
    files["/proc/self/mountinfo"] = "30 23 0:26 / /proc rw - proc proc rw\n" + "\n".join(lines)
    assert [str(folder) for folder in host._cgroup_folders("cpu")] == expected


def test_a_quota_of_this_machine_s_own_is_found() -> None:
    """A real cgroup of half a core, wherever its controller is mounted."""
    mounts = host._cgroup_mounts("cpu")  # of version 2 only some folders have the controller
    if not mounts or os.geteuid() != 0:
        pytest.skip("no cgroup can be made here")
    cgroup = mounts[0][0] / f"autochunk-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "cpu.cfs_period_us").write_text("100000")
        (cgroup / "cpu.cfs_quota_us").write_text("50000")
    except OSError:
        pytest.skip("no cgroup can be made here")
    code = """
import os, pathlib, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from autochunk.host import usable_cores
print(usable_cores())
"""
    try:
        assert run_python(code, cgroup).strip() == "0.5"
    finally:
        cgroup.rmdir()


@pytest.mark.parametrize("digit", ["\u00b2", "\u2460"])
def test_digits_that_are_no_numbers(files: Files, digit: str) -> None:
    """A superscript two is no quota, and no error."""
    files.update({"/proc/self/cgroup": V2, f"{ROOT}/cpu.max": f"{digit} 100000"})
    assert usable_cores() == 64


ascii_text = st.text(st.characters(max_codepoint=127))


@given(st.text(), ascii_text, st.text())
def test_garbage_never_raises(cgroup: str, limit: str, meminfo: str) -> None:
    """Files that cannot be understood bind nothing.

    There is always some of a core, and never less than no memory.
    """
    texts = {"/proc/self/cgroup": f"0::/{cgroup}", "/proc/meminfo": meminfo}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "read", lambda path: texts.get(str(path), limit))
        assert usable_cores() > 0
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
