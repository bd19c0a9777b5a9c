"""The device's fingerprint: what names another device, what older versions wrote, what is alike."""

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
from autochunk.device import Device, current_key, detect, likeness
from autochunk.errors import DeviceError


def test_detect_is_complete() -> None:
    """Every field of this machine's CPU is known."""
    here = detect(jax.devices("cpu")[0])
    assert here.platform == "cpu"
    assert 0 < here.cores <= (os.cpu_count() or 1)
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
    [("platform", "gpu"), ("kind", "Other"), ("cores", 5), ("cores", 0)],
)
def test_key_has_every_hard_field(field: str, other: object) -> None:
    """Profiles are shared between equal machines only."""
    assert make_device(**{field: other}).key != make_device().key


def gpu(kind: str, memory_gib: int) -> Device:
    """A GPU of this name."""
    return make_device(platform="gpu", kind=kind, cores=0, memory_gib=memory_gib)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_cpu_is_the_same_with_any_memory(one: int, other: int) -> None:
    """A container's limit bounds plans; it makes no product slower."""
    assert make_device(memory_gib=one).key == make_device(memory_gib=other).key


@pytest.mark.parametrize(
    ("memory", "other"), [(39, 40), (39, 38), (79, 80), (22, 24), (44, 48), (31, 32), (140, 144)]
)
def test_a_gpu_is_the_same_with_what_its_driver_leaves_of_its_memory(
    memory: int, other: int
) -> None:
    """Drivers, error correction and rounding take a little of the size that it is sold with."""
    assert gpu("Made Up", memory).key == gpu("Made Up", other).key


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_slice_of_a_gpu_is_told_by_much_less_memory(one: int, other: int) -> None:
    """Where its name does not tell: below 3/4 it is another device, whatever the two sizes are."""
    if 4 * min(one, other) < 3 * max(one, other):
        assert gpu("Made Up", one).key != gpu("Made Up", other).key


def test_slices_of_a_gpu_have_names_of_their_own() -> None:
    """As CUDA, and so jax, names them."""
    whole, slices = "NVIDIA A100-SXM4-40GB", ("MIG 1g.5gb", "MIG 1g.10gb", "MIG 7g.40gb")
    devices = [gpu(whole, 39), *(gpu(f"{whole} {name}", 39) for name in slices)]
    assert len({device.key for device in devices}) == 4


# --- Keys of older versions -----------------------------------------------------------------------

FORMER_KIND = host.former_cpu_kind()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cpu Made/Up cores=4 memory=8GiB", "cpu Made/Up cores=4"),
        ("cpu Made/Up memory=8GiB", "cpu Made/Up"),
        (
            "cpu GenuineIntel/6/167/1 isa=fc7df03f caches=48K+2048K+491520K cores=2 memory=24GiB",
            "cpu GenuineIntel/6/167/1 isa=fc7df03f caches=48K+2048K+491520K cores=2",
        ),
        ("gpu NVIDIA H100 80GB HBM3 memory=79GiB", "gpu NVIDIA H100 80GB HBM3 memory=~80GiB"),
        ("gpu NVIDIA H200 memory=140GiB", "gpu NVIDIA H200 memory=~144GiB"),
        ("gpu Made Up memory=0GiB", "gpu Made Up"),
        *((text, text) for text in ("", "cpu", "no device's key", "CPU x", "gpu a|b", "cpu a\x1b")),
        (f"cpu {'x' * 201} cores=4 memory=8GiB", f"cpu {'x' * 201} cores=4 memory=8GiB"),
    ],
)
def test_an_older_key_is_read_as_today_s(old: str, new: str) -> None:
    """Today's, and what is no key, stay as they are."""
    assert current_key(old) == new
    assert current_key(new) == new


@pytest.mark.skipif(FORMER_KIND is None, reason="this system tells no flags of its CPU")
def test_this_machine_s_former_kind_is_its_own_now() -> None:
    """Its hash of all flags cannot be inverted; that it is this machine's can be seen."""
    here = detect(jax.devices("cpu")[0])
    assert here.kind != FORMER_KIND
    dumped = here.model_dump(mode="json") | {"kind": FORMER_KIND, "memory_gib": 1}
    then = Device.model_validate(dumped)
    assert (then.kind, then.key) == (here.kind, here.key)
    assert current_key(f"cpu {FORMER_KIND} cores={here.cores} memory=1GiB") == here.key
    assert f"cpu {FORMER_KIND} cores={here.cores}" in here.key_stems
    assert make_device(platform="gpu", kind=FORMER_KIND).kind == FORMER_KIND


# --- Versions -------------------------------------------------------------------------------------


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
        ("cores", 1e300),
        ("cores", float("nan")),
        ("memory_gib", -1),
        ("memory_gib", 10**4000),
        ("jaxlib", "x" * 1001),
        ("speed", 1),
    ],
)
def test_device_is_checked(field: str, wrong: object) -> None:
    """A fingerprint read from a file is checked."""
    with pytest.raises(ValidationError):
        make_device(**{field: wrong})


def test_a_core_and_a_half_is_another_device_than_two() -> None:
    """What one has does not answer on the other; whole numbers are spelt as ever."""
    half, two = make_device(cores=1.5), make_device(cores=2.0)
    assert (half.key, two.key) == ("cpu Made/Up cores=1.5", "cpu Made/Up cores=2")
    assert two == make_device(cores=2)
    assert '"cores":2,' in two.model_dump_json()
    assert 0.8 < likeness(half, two) < 1


LETTERS = st.characters(exclude_categories=["C"], exclude_characters="|")
CORES = st.integers(0, 512) | st.integers(1, 51_200).map(lambda hundredths: hundredths / 100)
KINDS = st.text(LETTERS, min_size=1, max_size=20).filter(
    lambda kind: "cores=" not in kind and "memory=" not in kind
)


@given(KINDS, CORES, st.integers(0, 4096), st.text(max_size=9))
def test_device_json_round_trip(kind: str, cores: float, memory: int, driver: str) -> None:
    """A device goes through JSON unchanged."""
    one = make_device(kind=kind, cores=cores, memory_gib=memory, driver=driver)
    assert Device.model_validate_json(one.model_dump_json()) == one
    assert Device.model_validate(json.loads(json.dumps(one.model_dump(mode="json")))) == one


@given(KINDS, KINDS, st.sampled_from([0, 1, 1.5, 2]), st.sampled_from([0, 1, 1.25, 2.0]))
def test_keys_of_devices_are_injective(one: str, other: str, cores: float, more: float) -> None:
    """Different hard fields never give one key, whatever the kind's text."""
    first, second = make_device(kind=one, cores=cores), make_device(kind=other, cores=more)
    assert (first.key == second.key) == ((one, cores) == (other, more))


@given(KINDS, st.sampled_from(["cpu", "gpu"]), CORES, st.integers(0, 4096))
def test_a_key_is_read_as_itself(kind: str, platform: str, cores: float, memory: int) -> None:
    """Today's as it is, and what an older version made of the same device as today's.

    Every version's begin with one of its stems.
    """
    device = make_device(platform=platform, kind=kind, cores=cores, memory_gib=memory)
    older = f"{device.key.split(' memory=~')[0]} memory={memory}GiB"
    assert current_key(device.key) == current_key(older) == device.key
    assert older.startswith(f"{device.key_stems[0]} ")
    assert f"{device.key} ".startswith(f"{device.key_stems[0]} ")


@pytest.mark.parametrize(
    "kind", ["", "A cores=4", "A memory=8GiB", "A | attention:t=1", "new\nline", "\x1b[31m"]
)
def test_a_kind_that_imitates_a_key_is_refused(kind: str) -> None:
    """What stands for other fields, or ends a device's key, is no name of a device.

    A bundle could carry it.
    """
    with pytest.raises(ValidationError):
        make_device(kind=kind)


# --- Devices alike --------------------------------------------------------------------------------


def cpu(kind: str, cores: int = 2) -> Device:
    """A CPU."""
    return make_device(kind=kind, cores=cores)


XEON = "GenuineIntel/6/143/8 isa=0a1b2c3d caches=48K+2048K+107520K"
A100 = "NVIDIA A100-SXM4-40GB"
# Each device, and others that are less and less like it.
LIKE = [
    (
        cpu(XEON),
        cpu(XEON, 16),
        cpu(XEON.replace("107520K", "30720K").replace("0a1b2c3d", "ffffffff"), 16),
        cpu("GenuineIntel/6/85/7 isa=0a1b2c3d caches=48K+2048K+107520K"),
        cpu("AuthenticAMD/25/1/1 isa=0a1b2c3d caches=32K+512K+32768K"),
        gpu(A100, 40),
    ),
    (
        cpu("0x41/0xd0c/0x3/1 isa=0a1b2c3d caches=64K"),
        cpu("0x41/0xd0c/0x4/0 isa=0a1b2c3d caches=64K"),
        cpu("0x41/0xd40/0x3/1 isa=0a1b2c3d caches=64K"),
        cpu("0x61/0xd0c/0x3/1 isa=0a1b2c3d caches=64K"),
    ),
    (cpu("Apple M1 caches=64K", 8), cpu("Apple M1 caches=64K", 4), cpu("Apple M4 caches=64K", 8)),
    (
        gpu(A100, 40),
        gpu("NVIDIA A100-PCIE-40GB", 40),
        gpu(f"{A100} MIG 1g.5gb", 5),
        gpu("NVIDIA A30", 24),
        gpu("NVIDIA H100 80GB HBM3", 80),
        gpu("AMD Instinct MI300X", 192),
        cpu(XEON),
    ),
    (gpu("NVIDIA H200", 140), gpu("NVIDIA H100 NVL", 94), gpu("NVIDIA B200", 179)),
    (gpu("NVIDIA RTX 6000 Ada Generation", 48), gpu("NVIDIA L40S", 48), gpu("Quadro RTX 6000", 24)),
]


@pytest.mark.parametrize("devices", LIKE, ids=lambda devices: devices[0].kind)
def test_devices_that_are_less_and_less_alike(devices: tuple[Device, ...]) -> None:
    """What one may tell of another is in this order, and all or nothing only at the ends."""
    found = [likeness(devices[0], other) for other in devices]
    assert found == sorted(set(found), reverse=True)
    assert found[0] == 1
    assert all(
        (value == 0) == (one.platform != devices[0].platform)
        for one, value in zip(devices, found, strict=True)
    )


DEVICES = st.one_of(
    st.sampled_from([device for devices in LIKE for device in devices]),
    st.builds(
        lambda platform, kind, cores, memory: make_device(
            platform=platform, kind=kind, cores=cores, memory_gib=memory
        ),
        *(st.sampled_from(["cpu", "gpu"]), KINDS, st.integers(0, 9), st.integers(0, 99)),
    ),
)


@given(DEVICES, DEVICES)
def test_likeness_is_a_share_and_has_no_direction(one: Device, other: Device) -> None:
    """From 0, another platform, to 1, the same key and nothing else."""
    found = likeness(one, other)
    assert found == likeness(other, one)
    assert 0 <= found <= 1
    assert (found == 1) == (one.key == other.key)
    assert (found == 0) == (one.platform != other.platform)
