"""What "auto" does where nothing is known, and in the place of a kernel that refuses a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factories import make_device, make_measurement, make_profile, make_workload

from autochunk.device import Device
from autochunk.plan import Plan
from autochunk.resolution import places, resolve
from autochunk.resolution.rule import usual_plan
from autochunk.resolution.settings import use
from autochunk.store import bundle
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

CPU = make_device()
GPU = make_device(platform="gpu", kind="Made Up", cores=0, memory_gib=80)
TPU = make_device(platform="tpu", kind="Made Up", cores=0, memory_gib=16)
TRITON = Plan("tokamax_triton")
SMALL = "b=8,t=2048,h=16,k=64"  # 2.1 GB of logits
LARGE = "b=8,t=4096,h=16,k=64"
# A kernel's mask says which of them see each other: 67 MB at T=8192, 4295 MB at 65536.
SEGMENTS = "b=1,h=16,k=64,q_segments=yes,kv_segments=yes"


def shipped_on_gpus() -> list[Profile]:
    folder = Path(__file__).parents[2] / "profiles"
    found = [one for path in folder.glob("nvidia-*.json") for one in bundle.read(path).profiles]
    assert found
    return found


@pytest.fixture(autouse=True)
def extras(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries that are installed: none, whatever is there."""
    installed: set[str] = set()
    monkeypatch.setattr("autochunk.implementations._is_installed", installed.__contains__)
    return installed


@pytest.mark.parametrize(
    ("device", "shape", "options", "expected"),
    [
        (CPU, SMALL, {}, Plan("xla", 17.0)),
        (CPU, LARGE, {"dtype": "bfloat16"}, Plan("xla", 17.0)),
        (GPU, SMALL, {"dtype": "bfloat16"}, Plan("cudnn")),
        (GPU, LARGE, {"dtype": "float16"}, Plan("cudnn")),
        (GPU, SMALL, {"dtype": "float32"}, Plan("dense")),
        (GPU, LARGE, {"dtype": "float32"}, Plan("xla", 1000.0)),
        (GPU, f"{SMALL},dropout=yes", {"dtype": "bfloat16"}, Plan("dense")),
        (GPU, f"{LARGE},alibi=yes", {"dtype": "bfloat16"}, Plan("xla", 1000.0)),
        (GPU, f"{SEGMENTS},t=8192", {"dtype": "bfloat16"}, Plan("cudnn")),
        (GPU, f"{SEGMENTS},t=65536", {"dtype": "bfloat16"}, Plan("xla", 1000.0)),
        (GPU, "b=8,t=65536,h=16,k=64,offset=b", {"dtype": "bfloat16"}, Plan("cudnn")),
        (TPU, SMALL, {"dtype": "bfloat16"}, Plan("xla", 1000.0)),
        (TPU, "t=256,h=4,k=64", {"dtype": "bfloat16"}, Plan("dense")),
    ],
)
def test_the_usual_plan(
    device: Device, shape: str, options: dict[str, str], expected: Plan
) -> None:
    """A fused kernel where there may be one, else dense attention while its logits are modest."""
    plan, why = usual_plan(make_workload(shape, **options), device)
    assert plan == expected
    assert why


@pytest.mark.parametrize(
    ("device", "budget", "expected"),
    [
        (CPU, 40.0, Plan("xla", 10.0)),
        (GPU, 1e6, Plan("dense")),
        (GPU, 8000.0, Plan("xla", 1000.0)),
        (GPU, 400.0, Plan("xla", 100.0)),
    ],
)
def test_the_usual_plan_within_a_budget(device: Device, budget: float, expected: Plan) -> None:
    """Logits take at most a quarter of it."""
    plan, _ = usual_plan(make_workload(SMALL), device, memory_budget_mb=budget)
    assert plan == expected


@pytest.mark.parametrize("implementation", ["xla", "xla_rows", "dense", "cudnn"])
def test_one_that_is_asked_for(implementation: str) -> None:
    """It is the answer, in slices of a usual size."""
    workload = make_workload(SMALL, dtype="bfloat16")
    plan, _ = usual_plan(workload, GPU, implementation=implementation)
    assert plan.implementation == implementation
    assert plan.max_chunk_size_mb == (1000.0 if "xla" in implementation else None)


@pytest.mark.parametrize(
    ("dtype", "without", "expected"),
    [
        ("bfloat16", set(), "cudnn"),
        ("bfloat16", {"cudnn"}, "tokamax_mosaic"),
        ("bfloat16", {"cudnn", "tokamax_mosaic"}, "tokamax_triton"),
        ("bfloat16", {"cudnn", "tokamax_mosaic", "tokamax_triton"}, "dense"),
        ("float32", set(), "tokamax_triton"),
    ],
)
def test_the_kernels_of_a_library_that_is_installed(
    extras: set[str], dtype: str, without: set[str], expected: str
) -> None:
    """The first that is for the dtype and has not refused the call; else as without any."""
    extras.add("tokamax")
    workload = make_workload(SMALL, dtype=dtype)
    assert usual_plan(workload, GPU, without=without)[0] == Plan(expected)
    masked = make_workload(f"{SMALL},mask=b11s", dtype=dtype)
    others = {"cudnn": "tokamax_mosaic"}
    assert usual_plan(masked, GPU, without=without)[0] == Plan(others.get(expected, expected))
    extras.clear()
    left = "cudnn" if dtype == "bfloat16" and "cudnn" not in without else "dense"
    assert usual_plan(workload, GPU, without=without)[0] == Plan(left)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ("b=1,t=512,s=16384,h=8,k=64", {"dtype": "float32"}, Plan("dense")),
        ("b=1,t=512,s=16384,h=8,k=64", {"dtype": "bfloat16"}, Plan("cudnn")),
        ("b=2,t=512,s=16384,h=8,k=64", {"dtype": "float32"}, TRITON),
        ("b=1,t=512,s=700000,h=8,k=64", {"dtype": "float32"}, TRITON),
        ("b=32,t=1,s=4096,h=32,k=64", {"dtype": "float32"}, TRITON),
        ("b=32,t=1,s=4096,h=32,k=64", {"dtype": "float32", "mode": "training"}, Plan("dense")),
        ("b=32,t=2,s=4096,h=32,k=64", {"dtype": "float32", "mode": "training"}, TRITON),
        ("b=1,t=65,s=4096,h=63,k=64", {"dtype": "float32"}, Plan("dense")),
        ("b=1,t=65,s=4096,h=64,k=64", {"dtype": "float32"}, TRITON),
    ],
)
def test_kernels_that_do_not_fill_a_gpu(
    extras: set[str], shape: str, options: dict[str, Any], expected: Plan
) -> None:
    """In float32 dense attention is faster than one with few rows, while its logits are modest."""
    extras.add("tokamax")
    assert usual_plan(make_workload(shape, **options), GPU)[0] == expected


def test_the_usual_plan_is_never_slower_than_dense(extras: set[str]) -> None:
    """By 3%, on any shape that GPUs were tuned for, as far as both were measured."""
    extras.add("tokamax")
    slower, compared = {}, 0
    for profile in shipped_on_gpus():
        refuse = {one.implementation for one in profile.measurements if one.status == "unsupported"}
        plan, _ = usual_plan(profile.parsed_workload(), profile.device, without=refuse)
        measured, dense = (profile.baseline(one) for one in (plan, Plan("dense")))
        if measured and dense:
            compared += 1
            if measured.ratio > 1.03 * dense.ratio:
                slower[profile.key] = str(plan)
    assert compared > 150
    assert slower == {}


# --- A kernel that refuses ------------------------------------------------------------------------

UNSLICED = Plan("dense", 2147.483648)  # but for a batch that ``vmap`` makes
CURVE = [
    make_measurement("cudnn", None, 0.2, memory_mb=1),
    make_measurement("xla", 64.0, 0.8, memory_mb=50),
    make_measurement("dense", None, 1.0, memory_mb=900),
]


@pytest.fixture
def on_gpu(tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileStore:
    """The user's store on a machine with a GPU, with no other layer."""
    monkeypatch.setattr(places, "shipped_profiles", lambda: tmp_path)
    monkeypatch.setattr("autochunk.device.detect", lambda: GPU)
    return ProfileStore(store_path)


@pytest.mark.parametrize(
    ("measurements", "expected"),
    [(CURVE, Plan("xla", 64.0)), ([], UNSLICED), (CURVE[:1], UNSLICED)],
)
def test_what_runs_in_its_place(
    measurements: list[Measurement], expected: Plan, on_gpu: ProfileStore
) -> None:
    """The best of the others by the profile; without one, as without a kernel."""
    workload = make_workload(SMALL, dtype="bfloat16", mode="training")
    if measurements:
        on_gpu.put(make_profile(workload, GPU, measurements))
    plans = resolve.plans(workload, None)
    assert plans.training == Plan("cudnn")
    assert plans.without("cudnn", "training") == expected


def test_others_may_refuse_too(on_gpu: ProfileStore, extras: set[str]) -> None:
    """Each kernel that is left is asked, then what is best without any."""
    extras.add("tokamax")
    workload = make_workload(SMALL, dtype="bfloat16", mode="training")
    triton = make_measurement("tokamax_triton", None, 0.3, memory_mb=1)
    mosaic = make_measurement("tokamax_mosaic", status="unsupported")
    on_gpu.put(make_profile(workload, GPU, [*CURVE, triton, mosaic]))
    plans = resolve.plans(workload, None)
    assert plans.without("cudnn", "training") == Plan("tokamax_triton")
    assert plans.without("tokamax_triton", "training") == Plan("xla", 64.0)


def test_a_kernel_that_is_not_installed(on_gpu: ProfileStore, extras: set[str]) -> None:
    """It stays in the profile and is not chosen, and is told of: what brings it, and how fast."""
    workload = make_workload(SMALL, dtype="bfloat16", mode="training")
    triton = make_measurement("tokamax_triton", None, 0.1, memory_mb=1)
    given_up = make_measurement("xla", 128.0, 0.4, memory_mb=90, status="pruned")
    cudnn = make_measurement("cudnn", status="unsupported")
    profile = make_profile(workload, GPU, [*CURVE[1:], triton, given_up, cudnn])
    on_gpu.put(profile)
    answer = resolve.resolve(workload, device=GPU)
    assert answer.plan == Plan("xla", 128.0)
    against = dict(answer.rejected)[str(Plan("tokamax_triton"))]
    assert "pip install 'autochunk[tokamax]'" in against
    assert "4.00x as fast" in against
    extras.add("tokamax")
    choice = profile.choose()
    assert choice is not None
    assert choice.plan == Plan("tokamax_triton")


def test_what_runs_in_the_place_of_one_that_use_pins(on_gpu: ProfileStore) -> None:
    """Slices of the limit that was given with it."""
    with use(implementation="cudnn", max_chunk_size_mb=64):
        plans = resolve.plans(make_workload(SMALL, dtype="bfloat16"), None)
    assert plans.without("cudnn", "forward") == Plan("xla_rows", 64.0)


@pytest.mark.parametrize(
    ("best", "refuses", "expected"),
    [
        ("xla", frozenset(), Plan("tokamax_mosaic")),
        ("xla", frozenset({"tokamax_mosaic"}), Plan("tokamax_triton")),
        ("xla", frozenset({"tokamax_mosaic", "tokamax_triton"}), Plan("xla", 64.0)),
        ("cudnn", frozenset(), Plan("cudnn")),
    ],
)
def test_a_kernel_that_was_never_tried(
    best: str, refuses: frozenset[str], expected: Plan, on_gpu: ProfileStore, extras: set[str]
) -> None:
    """It comes before what a profile chooses that is no fused kernel, its own or a neighbour's.

    Where it refuses the call, too, the profile's choice is taken.
    """
    extras.add("tokamax")
    sliced = make_measurement("xla", 64.0, 0.5, memory_mb=70)
    kernel = make_measurement("cudnn", None, 0.4 if best == "cudnn" else 0.9, memory_mb=1)
    on_gpu.put(make_profile(make_workload(SMALL, dtype="bfloat16"), GPU, [sliced, kernel]))
    for shape in (SMALL, "b=8,t=1536,h=16,k=64"):
        plans = resolve.plans(make_workload(shape, dtype="bfloat16"), None)
        found = plans.forward
        for name in sorted(refuses):
            found = plans.without(name, "forward")
        assert found == expected


def test_a_profile_is_stale_once_another_kernel_is_there(extras: set[str]) -> None:
    """A finished one, on its own device: what it chose may no longer be the fastest."""
    workload = make_workload(SMALL, dtype="bfloat16")
    tried = make_measurement("tokamax_triton", status="unsupported")
    profile = make_profile(workload, GPU, [*CURVE, tried])
    assert profile.stale_reasons(GPU) == []
    extras.add("tokamax")
    assert profile.stale_reasons(GPU) == ["never tried tokamax_mosaic, installed here"]
    assert profile.stale_reasons(CPU) == []
    assert make_profile(workload, GPU, CURVE, complete=False).stale_reasons(GPU) == []
    single = make_profile(make_workload(SMALL), GPU, [*CURVE[1:], tried])
    assert single.stale_reasons(GPU) == []
