"""Curves: what of a profile is learned from."""

from __future__ import annotations

from factories import (
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)

from autochunk.predict.curves import MOST_PLANS, curve, fastest
from autochunk.predict.evaluate import replay


def test_of_very_many_plans_the_fastest_are_learned() -> None:
    """Ten thousand are a file's doing, no tune's; to learn them all would take hours."""
    plans = [
        make_measurement("xla", 1.0 + n, 1.0 + (n * 7919 % 10_000) * 1e-5) for n in range(10_000)
    ]
    kept = fastest(plans)
    assert len(kept) == MOST_PLANS
    assert max(m.ratio for m in kept) < sorted(m.ratio for m in plans)[MOST_PLANS]
    assert kept == [m for m in plans if m in kept]
    shapes = ("t=1024,h=2,k=8", "t=2048,h=2,k=8", "t=4096,h=2,k=8", "t=8192,h=2,k=8")
    profiles = [make_profile(make_workload(shape), make_device(), plans) for shape in shapes]
    found = curve(profiles[0])
    assert found is not None
    assert len(found.noise) == MOST_PLANS
    assert len(replay(profiles)) == len(shapes)


def test_functions_are_no_curves() -> None:
    """They teach nothing of attention, nor is it said how well they are predicted."""
    assert curve(make_function_profile()) is None
    assert replay([make_function_profile(), make_profile()]) == []
