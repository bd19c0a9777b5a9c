"""Plans beside the chosen one: what is timed, and how well a profile's figures agree with it."""

from __future__ import annotations

import itertools
import math
import os

import jax
import numpy as np
import pytest
from factories import CURVE, make_measurement, make_profile

from autochunk.errors import ArgumentError, ProbeError
from autochunk.plan import Plan
from autochunk.store.interval import Interval
from autochunk.tuner.bench import Contender
from autochunk.tuner.inputs import WorkloadInputs
from autochunk.tuner.layer import Layer
from autochunk.tuner.rivals import (
    Rival,
    agreement,
    in_the_middle,
    rivals,
    rivals_of_several,
    timed_plans,
)
from autochunk.workload import Workload

SHAPES = [
    "b=2,t=12,s=9,h=4,kv_heads=2,k=8,v=6",
    "b=2,t=12,h=2,k=4,causal=yes,mask=b1ts",
    "b=1,t=10,h=2,k=4,bias=1hts",
    "t=1,s=5,h=1,k=4",
]


@pytest.mark.parametrize(
    ("shape", "mode", "dtype"),
    [
        *itertools.product(SHAPES, ["training"], ["float32"]),
        *itertools.product(SHAPES[:1], ["forward", "training"], ["bfloat16"]),
    ],
)
def test_a_layer_is_the_same_by_every_plan(shape: str, mode: str, dtype: str) -> None:
    """Only the attention's plan differs; all that moves gets a gradient, and x is used."""
    layer = Layer(WorkloadInputs(Workload.parse(shape, mode=mode, dtype=dtype)))
    whole = jax.jit(layer.function(Plan("dense", None)))(*layer.passed)
    sliced = jax.jit(layer.function(Plan("xla", 1e-4)))(*layer.passed)
    near = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    numbers = [
        [np.asarray(x, np.float32) for x in jax.tree.leaves(results)] for results in (whole, sliced)
    ]
    for one, other in zip(*numbers, strict=True):
        np.testing.assert_allclose(one, other, atol=near * max(1.0, np.abs(one).max()))
    moving, fixed = layer.passed
    assert {"bias", "mask"} & (moving.keys() | fixed.keys()) == {
        name for name in ("bias", "mask") if name in shape
    }
    if mode == "training":
        assert whole[1].keys() == moving.keys()
        # The softmax over a single key is one whatever the logits are.
        assert all(np.any(np.asarray(gradient, np.float32)) for gradient in whole[1].values())


def test_what_disturbs_for_a_while_hits_a_few_rounds_of_each_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs that take turns alone would all be timed within it."""
    ran: list[str] = []

    def prepare(name: str, *_: object) -> Contender:
        def run() -> float:
            ran.append(name)
            if name != "xla, 16 MB":
                return 1.2
            return 1.8 if len(ran) < 18 else 1.0

        return Contender(name, run=run)

    monkeypatch.setattr("autochunk.tuner.rivals.prepare", prepare)
    profile = make_profile(Workload.parse("t=32,h=2,k=8"), measurements=CURVE)
    found = rivals(profile, timed_plans(profile), rounds=10)
    assert {str(rival.plan): rival.slower.middle for rival in found[1:] if rival.slower} == {
        str(plan): pytest.approx(0.2) for plan in timed_plans(profile) if plan != found[0].plan
    }
    assert found[0].seconds == 1.0


@pytest.mark.parametrize("in_layer", [False, True])
def test_every_timed_plan_is_compared(in_layer: bool) -> None:
    """Also those that are asked for; the chosen one comes first, and is equal to itself."""
    failed = make_measurement("xla", 1.0, status="oom")
    profile = make_profile(Workload.parse("t=32,h=2,k=8"), measurements=(*CURVE, failed))
    more = [Plan("xla", 2e-3), Plan("no_such", None), Plan("xla", 16.0)]
    seen: list[Plan] = []
    found = rivals(
        profile, [*timed_plans(profile), *more], rounds=4, in_layer=in_layer, on_plan=seen.append
    )
    plans = [Plan("xla", 16.0), Plan("dense", None), Plan("xla", None), Plan("xla_rows", 4.0)]
    assert [rival.plan for rival in found] == seen == [*plans, *more[:2]]
    assert found[0].slower == found[0].stored == Interval(0, 0, 0)
    assert found[1].stored is not None
    assert found[1].stored.middle == pytest.approx(1.0)
    for rival in found[:5]:
        assert rival.seconds is not None
        assert rival.seconds > 0
        assert rival.slower is not None
        assert rival.slower.low <= rival.slower.middle <= rival.slower.high
    assert found[4].stored is None
    assert found[5].slower is None
    assert found[5].seconds is None
    assert "no_such" in found[5].detail


def test_of_several_processes_the_one_in_the_middle_counts() -> None:
    """Of each plan; one that was disturbed in one of three does not count."""
    workload = Workload.parse("t=32,h=2,k=8")
    profile = make_profile(workload, measurements=CURVE)
    plans = [*timed_plans(profile), Plan("no_such", None)]
    found = rivals_of_several(profile, plans, processes=3, rounds=3)
    assert [one.plan for one in found] == [found[0].plan, *(p for p in plans if p != found[0].plan)]
    assert found[0].slower == Interval(0, 0, 0)
    assert all((one.slower is None) == ("no_such" in str(one.plan)) for one in found)
    assert "no_such" in found[-1].detail

    def rival(middle: float) -> Rival:
        return Rival(plans[0], 1 + middle, None, Interval(middle - 1, middle, middle + 1))

    refused = Rival(plans[0], detail="out of memory")
    assert in_the_middle([rival(0.4), rival(0.1), rival(0.85)]) == rival(0.4)
    assert in_the_middle([rival(0.4), refused, rival(0.1)]) == rival(0.1)
    assert in_the_middle([refused, refused]) == refused


def test_a_process_that_is_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do about it."""
    profile = make_profile(Workload.parse("t=32,h=2,k=8"), measurements=CURVE)
    monkeypatch.setattr("autochunk.tuner.rivals.rivals", end_at_once)
    with pytest.raises(ProbeError, match="was ended; if it was out of memory"):
        rivals_of_several(profile, [], processes=2, rounds=1)


def end_at_once(*_: object, **__: object) -> None:
    os._exit(9)


def test_a_profile_must_choose_a_plan_that_runs() -> None:
    """Otherwise there is nothing to compare with."""
    none = make_profile(measurements=(make_measurement(status="oom"),))
    with pytest.raises(ArgumentError, match="chooses no plan"):
        rivals(none, [])
    workload = Workload.parse("t=8,h=2,k=4")
    foreign = make_profile(workload, measurements=(make_measurement("cudnn", None),))
    with pytest.raises(ArgumentError, match="cudnn of attention:b=1"):
        rivals(foreign, [])


def rival(stored: float | None, slower: float | None) -> Rival:
    then, now = (None if x is None else Interval(x, x, math.inf) for x in (stored, slower))
    return Rival(Plan("xla", None), 0.1, then, now)


@pytest.mark.parametrize(
    ("pairs", "correlation", "contradiction"),
    [
        ([(0.0, 0.0)], None, 0.0),
        ([(0.0, 0.0), (0.1, 0.3)], None, 0.0),
        ([(0.0, 0.0), (0.1, 0.3), (0.2, 0.4)], 1.0, 0.0),
        ([(0.0, 0.0), (0.1, -0.02), (0.2, 0.4)], 0.5, 0.02),
        ([(0.0, 0.0), (0.1, 0.3), (0.2, 0.15), (None, -9.0), (0.5, None)], 0.5, 0.1),
        ([(0.0, 0.0), (0.0, 0.3), (0.0, -0.3)], None, 0.0),
    ],
)
def test_agreement(
    pairs: list[tuple[float | None, float | None]], correlation: float | None, contradiction: float
) -> None:
    """Of plans with both figures; equal ones contradict nothing."""
    found = agreement([rival(*pair) for pair in pairs])
    assert found.rank_correlation == (None if correlation is None else pytest.approx(correlation))
    assert found.contradiction == pytest.approx(contradiction)


def test_a_sure_contradiction_is_one_of_intervals() -> None:
    """What overlaps, then or now, may be a tie."""

    def about(middle: float, *, within: float = 0.05) -> Interval:
        return Interval(middle - within, middle, middle + within)

    chosen = Rival(Plan("xla", None), 0.1, about(0.0, within=0.0), about(0.0, within=0.0))
    other = Rival(Plan("xla", 1.0), 0.1, about(0.2), about(-0.1))
    unsure = Rival(Plan("xla", 2.0), 0.1, about(0.4, within=0.5), about(-0.4))
    found = agreement([chosen, other, unsure])
    assert found.contradiction == pytest.approx(0.4)
    assert found.sure_contradiction == pytest.approx(0.1)
    assert agreement([chosen, unsure]).sure_contradiction == 0.0
