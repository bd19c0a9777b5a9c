"""How good predictions are: what shipped curves say must not get worse unseen."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import autochunk
from autochunk.predict.curves import curve
from autochunk.predict.evaluate import Replay, Summary, replay, summaries
from autochunk.predict.prediction import Source, nearest, plans_of, predict
from autochunk.store import bundle
from autochunk.store.choice import DENSE
from autochunk.workload import Workload

SHIPPED = sorted((Path(autochunk.__file__).parents[1] / "profiles").glob("*.json"))


@functools.cache
def replays(devices: bool) -> list[Replay]:
    profiles = [profile for file in SHIPPED for profile in bundle.read(file).profiles]
    return replay(profiles, devices=devices)


def of_platform(platform: str, devices: bool) -> list[Summary]:
    return [one for one in summaries(replays(devices)) if one.device.startswith(platform)]


@pytest.mark.parametrize(
    ("platform", "ninth", "worst", "too_small"),
    [("cpu", 0.05, 0.18, 0.08), ("gpu", 0.02, 0.14, 0.01)],
)
def test_a_workload_that_is_left_out(
    platform: str, ninth: float, worst: float, too_small: float
) -> None:
    """Half of the choices cost at most 1%, nine in ten and the worst little more than they do.

    Memory is within 15%, and of few plans too small by over a quarter.
    """
    found = of_platform(platform, devices=False)
    assert found
    for one in found:
        assert one.regret[0] <= 0.01
        assert one.regret[1] <= ninth
        assert one.regret[2] <= worst
        assert one.memory <= 0.15
        assert one.memory_under <= too_small
        assert one.workloads > 40


def test_a_device_that_is_left_out() -> None:
    """Nine in ten choices cost at most 1%, and one is slower than dense attention by over 5%.

    That is in float32 with heads of 128, where an H100 and an H200 differ. There is one CPU only,
    and nothing like it.
    """
    found = of_platform("gpu", devices=True)
    assert len(found) == 2
    for one in found:
        assert one.regret[0] <= 0.01
        assert one.regret[1] <= 0.01
        assert one.regret[2] <= 0.15
        assert one.memory <= 0.10
        assert one.memory_under <= 0.01
    slower = [one.against_dense or 0.0 for one in replays(devices=True)]
    assert sum(by > 0.05 for by in slower) <= 1
    assert not of_platform("cpu", devices=True)


def test_what_a_replay_tells() -> None:
    """Plans that were measured: the best has no regret, and none is negative."""
    for one in replays(devices=False):
        assert one.regret >= 0
        assert (one.regret == 0) == (one.chosen.ratio == one.best.ratio)
        assert len(one.memory) == sum(m.timed for m in one.profile.measurements)
        assert one.within >= 0


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("term", ["dropout=bht", "dropout=b11,bias=1hts", "alibi=1h"])
def test_what_no_curve_has_is_left_to_dense_attention(term: str, mode: str) -> None:
    """On GPUs, of which no curve has these: slices were seen to be slower, predicted faster."""
    profiles = bundle.read(next(file for file in SHIPPED if "h100" in file.name)).profiles
    workload = Workload.parse(f"b=8,t=1024,h=12,k=64,{term}", dtype="bfloat16", mode=mode)
    sources = [Source(own, 1.0) for one in profiles if (own := curve(one)) is not None]
    plans = plans_of(workload, "gpu")
    found = predict(workload, "gpu", nearest(workload, "gpu", sources), plans)
    assert found is not None
    assert found.cost.plan == DENSE
    little = predict(
        workload, "gpu", nearest(workload, "gpu", sources), plans, memory_budget_mb=300
    )
    assert little is not None
    assert little.cost.most_bytes <= 300e6


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("term", ["dropout=bht", "causal=yes,alibi=1h", "soft_cap=yes"])
def test_on_a_cpu_it_is_not(term: str, mode: str) -> None:
    """What is computed of each logit costs dense attention as much as slices, which win there."""
    profiles = bundle.read(next(file for file in SHIPPED if "xeon" in file.name)).profiles
    workload = Workload.parse(f"t=2048,h=4,k=32,{term}", mode=mode)
    sources = [Source(own, 1.0) for one in profiles if (own := curve(one)) is not None]
    found = predict(workload, "cpu", nearest(workload, "cpu", sources), plans_of(workload, "cpu"))
    assert found is not None
    assert found.cost.plan != DENSE
