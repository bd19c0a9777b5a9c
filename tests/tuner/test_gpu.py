"""Measuring on a GPU."""

from __future__ import annotations

import jax
import pytest

from autochunk.device import detect
from autochunk.nvidia import gpu_memory, visible_gpus
from autochunk.plan import Plan
from autochunk.resolution.resolve import resolve
from autochunk.tuner.probe import Probe
from autochunk.tuner.tune import tune
from autochunk.workload import Workload

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_the_compilers_memory_is_the_allocators(mode: str) -> None:
    """What jax's allocator hands out beyond arguments and results is what XLA said, to 5%.

    In a fresh process: compiling tries kernels out, which may take more than the program, so it is
    done before, in another process.
    """
    workload = Workload.parse("b=4,t=2048,h=8,k=64", dtype="float32", mode=mode)
    for plan in (Plan("dense"), Plan("xla", 67.2), Plan("xla_rows", 134.4)):
        with Probe() as probe:
            probe.load(workload)
            probe.prepare(plan)
            probe._stop()
            prepared = probe.prepare(plan)
        assert prepared.status == "ok", prepared.detail
        assert prepared.measured_bytes is not None
        assert prepared.temp_bytes is not None
        # Its allocator hands out whole a piece that it would split off less than 128 MiB from.
        more = prepared.measured_bytes - prepared.temp_bytes
        near = 0.05 * prepared.temp_bytes + 2**20
        assert -near <= more <= near + 2**27, plan


def test_what_does_not_fit_is_not_run() -> None:
    """A plan for which there is no memory is a result; smaller ones still run."""
    workload = Workload.parse("b=1,t=65536,h=16,k=64", dtype="float32")
    with Probe() as probe:
        probe.load(workload)
        assert probe.prepare(Plan("dense")).status in ("over_budget", "oom")
        assert probe.prepare(Plan("xla", 268.8)).status == "ok"


def test_what_fits_is_run() -> None:
    """A plan that needs 2/5 of the memory runs, in however many pieces compiling left that."""
    memory = gpu_memory(0)
    assert memory is not None
    fraction = f"{12 * 2**30 / memory[0]:.4f}"
    with Probe(environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction}) as probe:
        probe.load(Workload.parse("b=1,t=6144,h=16,k=64", dtype="float32"))
        prepared = probe.prepare(Plan("dense"))
    assert prepared.status == "ok", prepared.detail
    assert prepared.temp_bytes == pytest.approx(2 * 16 * 6144**2 * 4, rel=0.05)


def test_cudnn_is_a_candidate() -> None:
    """In half precision it is measured; in float32 its refusal is a result that says why."""
    (half,) = tune([Workload.parse("b=2,t=1024,h=8,k=64", dtype="bfloat16")], effort="quick")
    statuses = {m.plan: m.status for m in half.measurements}
    assert statuses[Plan("cudnn")] in ("ok", "pruned")
    (single,) = tune([Workload.parse("b=2,t=1024,h=8,k=64")], effort="quick")
    refused = next(m for m in single.measurements if m.plan == Plan("cudnn"))
    assert refused.status == "unsupported"
    assert "not float32" in refused.detail
    assert resolve(single.parsed_workload()).match == "exact"


def test_the_fingerprint() -> None:
    """All of the GPU's memory, whatever jax may use of it, and the versions that matter."""
    here, memory = detect(), gpu_memory(0)
    assert memory is not None
    assert here.memory_gib == round(memory[0] / 2**30)
    assert here.driver
    assert here.cuda
    assert here.cudnn
    assert len(visible_gpus()) == jax.device_count()
