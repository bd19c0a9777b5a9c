"""Curves: what of a profile is learned from."""

from __future__ import annotations

import itertools

from factories import (
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)

from autochunk.predict.curves import MOST_PLANS, curve, fastest, kinds_of
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


def test_lengths_are_a_kind_of_their_own() -> None:
    """Kernels skip what lengths leave out, and read a mask; segments are read as one, too."""
    forms = ["", ",kv_lengths=yes", ",mask=b1ts", ",mask=b1ts,kv_lengths=yes"]
    forms += [",q_segments=yes,kv_segments=yes", ",q_segments=yes,kv_segments=yes,kv_lengths=yes"]
    plain, lengths, *masks = (
        tuple(kinds_of(make_workload(f"b=2,t=64,h=2,k=8{form}"))) for form in forms
    )
    assert len({plain, lengths, *masks}) == 3
    for one, other in itertools.combinations((plain, lengths, masks[0]), 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
