"""What ``bench`` compares: every contender computes the same, and what does not run says why."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from factories import make_profile

from autochunk.device import detect
from autochunk.errors import MissWarning
from autochunk.store.profiles import ProfileStore
from autochunk.tuner import bench, peers
from autochunk.tuner.inputs import WorkloadInputs, make_function
from autochunk.tuner.reference import reference, relative_error
from autochunk.workload import Workload

SHAPES = [
    "b=2,t=12,s=9,h=4,kv_heads=2,k=8",
    "b=2,t=12,h=2,k=4,causal=yes,mask=b1ts",
    "b=1,t=10,h=2,k=4,bias=1hts",
]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_baselines_are_right(shape: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Haiku's dense attention and the pull request's loop agree with the float64 reference.

    A baseline that is wrong is worth no comparison.
    """
    # The loop shall have several turns.
    monkeypatch.setattr(peers, "DEFAULT_MAX_CHUNK_SIZE_MB", 5e-4)
    inputs = WorkloadInputs(Workload.parse(shape, mode=mode))
    for attend in (peers.haiku_dense, peers.row_loop):
        function = make_function(inputs.workload, attend)
        results = inputs.on_sample(jax.jit(function)(*inputs.passed))
        assert relative_error(results, reference(inputs)) < 1e-5


def test_every_contender_has_figures_or_a_reason() -> None:
    """Ratios are to haiku's dense attention in the same round, one for each round."""
    seen: list[str] = []
    workload, peers = Workload.parse("b=1,t=32,h=2,k=8"), ("no_such_library",)
    contenders = bench.bench(workload, rounds=3, peers=peers, on_contender=seen.append)
    assert seen == ["haiku dense", "1000 MB", "auto", "jax.nn xla", "jax.nn cudnn"]
    assert [contender.name for contender in contenders] == seen
    for contender in contenders:
        if contender.run is None:
            assert contender.detail
            assert contender.ratio is contender.spread is contender.seconds_median is None
        else:
            assert len(contender.seconds) == len(contender.ratios) == 3
            assert contender.temp_bytes is not None
    np.testing.assert_array_equal(contenders[0].ratios, 1.0)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    "shape",
    [
        "t=16,h=2,k=4,causal=yes,mask=11ts",
        "t=16,s=9,h=2,k=4,causal=yes,mask=1111",
        "t=16,h=2,k=4,causal=yes",
        "t=16,h=2,k=4,bias=1hts",
        "b=2,t=16,h=2,k=4,causal=yes,mask=b11s,bias=1hts",
    ],
)
def test_torch_takes_every_mask_and_bias(shape: str, mode: str) -> None:
    """It refuses a mask beside causality, which are one mask then."""
    pytest.importorskip("torch")
    contenders = bench.bench(Workload.parse(shape, mode=mode), rounds=1, peers=("torch",))
    (contender,) = [found for found in contenders if found.name == "torch"]
    assert contender.run is not None, contender.detail


def test_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs the others nothing."""
    reason = "libtorch_cpu.so: cannot open shared object file"

    def fail(_: WorkloadInputs) -> list[bench.Contender]:
        raise OSError(reason)

    monkeypatch.setattr(bench, "_PEERS", {"numpy": fail})
    *_, peer = bench.bench(Workload.parse("t=8,k=2"), rounds=1, peers=("numpy",))
    assert peer.detail == f"does not run here: OSError: {reason}"


def test_float64_is_timed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jax makes float32 of it unless it is enabled; afterwards the process is as it was."""
    dtypes = []

    def note(inputs: WorkloadInputs) -> list[bench.Contender]:
        dtypes.append(inputs.arguments.query.dtype)
        return [bench.Contender("numpy")]

    monkeypatch.setattr(bench, "_PEERS", {"numpy": note})
    bench.bench(Workload.parse("t=8,k=2", dtype="float64"), rounds=1, peers=("numpy",))
    assert dtypes == [np.float64]
    assert jax.numpy.zeros(1).dtype == np.float32


def test_causal_attention_is_compared_with_the_same_without() -> None:
    """Where that is tuned; it says what leaving out the masked half gains."""
    causal = Workload.parse("t=32,h=2,k=8,causal=yes")
    names = [[contender.name for contender in bench.bench(causal, rounds=1, peers=())]]
    ProfileStore().put(make_profile(Workload.parse("t=32,h=2,k=8"), detect()))
    names.append([contender.name for contender in bench.bench(causal, rounds=1, peers=())])
    assert ["auto, not causal" in each for each in names] == [False, True]


def test_other_workloads_are_timed_beside_it() -> None:
    """By "auto", on arrays of their own; its ratio is to dense attention of the workload itself."""
    shapes = ("t=32,h=2,k=8,window=7:0", "t=48,h=2,k=8,kv_lengths=yes")
    beside = [Workload.parse(shape) for shape in shapes]
    with pytest.warns(MissWarning):
        found = bench.bench(Workload.parse("t=32,h=2,k=8"), rounds=2, peers=(), beside=beside)
    named = {contender.name: contender for contender in found}
    for other in beside:
        contender = named[f"auto, {other.shape}"]
        assert len(contender.ratios) == len(contender.seconds) == 2
        assert "other results" in contender.detail
