"""How good predictions are: what shipped curves say must not get worse unseen."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import autochunk
from autochunk.predict.evaluate import Replay, Summary, replay, summaries
from autochunk.store import bundle

SHIPPED = sorted((Path(autochunk.__file__).parents[1] / "profiles").glob("*.json"))


@functools.cache
def replays(devices: bool) -> list[Replay]:
    profiles = [profile for file in SHIPPED for profile in bundle.read(file).profiles]
    return replay(profiles, devices=devices)


def of_platform(platform: str, devices: bool) -> list[Summary]:
    return [one for one in summaries(replays(devices)) if one.device.startswith(platform)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_workload_that_is_left_out(platform: str) -> None:
    """Half of the choices cost at most 1%, nine in ten at most 10%; memory is within 15%."""
    found = of_platform(platform, devices=False)
    assert found
    for one in found:
        median, ninth, _ = one.regret
        assert median <= 0.01
        assert ninth <= 0.10
        assert one.memory <= 0.15
        assert one.workloads > 40


def test_a_device_that_is_left_out() -> None:
    """Half of the choices cost at most 2%. There is one CPU only, and nothing like it."""
    found = of_platform("gpu", devices=True)
    assert len(found) == 2
    assert all(one.regret[0] <= 0.02 for one in found)
    assert not of_platform("cpu", devices=True)


def test_what_a_replay_tells() -> None:
    """Plans that were measured: the best has no regret, and none is negative."""
    for one in replays(devices=False):
        assert one.regret >= 0
        assert (one.regret == 0) == (one.chosen.ratio == one.best.ratio)
        assert len(one.memory) == sum(m.timed for m in one.profile.measurements)
        assert one.within >= 0
