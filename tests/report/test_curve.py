"""A curve's data: comparable times, and what each memory budget picks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from factories import (
    CURVE,
    make_device,
    make_function_profile,
    make_measurement,
    make_profile,
    make_workload,
)
from hypothesis import given
from hypothesis import strategies as st

from autochunk.device import detect
from autochunk.report.curve import budget_picks, curve_record, least_budget_mb
from autochunk.report.drawing import curve_figure
from autochunk.report.terminal import curve_text
from autochunk.resolution.resolve import resolve
from autochunk.resolution.settings import use
from autochunk.store import bundle
from autochunk.store.measurement import Measurement
from autochunk.store.profile import Profile
from autochunk.store.profiles import ProfileStore

SHIPPED = Path(__file__).resolve().parents[2] / "profiles"


def picked(picks: Sequence[dict[str, int]], budget_mb: float) -> int | None:
    """The place of the plan for a budget, as the page's script finds it."""
    reached = [one["plan"] for one in picks if one["from_bytes"] <= budget_mb * 1e6]
    return reached[-1] if reached else None


def place_of(profile: Profile, budget_mb: float) -> int | None:
    """The same by ``Profile.choose``, which "auto" asks."""
    choice = profile.choose(memory_budget_mb=budget_mb)
    return profile.measurements.index(choice.measurement) if choice else None


@st.composite
def _measurements(draw: st.DrawFn) -> tuple[Measurement, ...]:
    limits = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True))
    statuses = st.sampled_from(["ok", "ok", "pruned", "oom"])
    ratios, memory = st.floats(0.2, 3.0), st.sampled_from([0.0, 1e-6, 1.5, 7.0, 7.000001, 300.0])
    noise = st.sampled_from([0.0, 0.01, 0.1])
    plans = [("dense", None), *(("xla", float(limit)) for limit in limits)]
    return tuple(
        make_measurement(
            *plan, draw(ratios), draw(memory), status=draw(statuses), noise=draw(noise)
        )
        for plan in plans
    )


@given(_measurements(), st.lists(st.floats(1e-7, 400.0), min_size=1, max_size=10))
def test_picks_are_what_is_chosen(
    measurements: tuple[Measurement, ...], budgets: list[float]
) -> None:
    """For any budget, and exactly at each plan's memory, the staircase has the choice's plan."""
    profile = make_profile(measurements=measurements)
    picks = budget_picks(profile)
    exact = [(one.temp_bytes or 0) / 1e6 for one in measurements if one.temp_bytes]
    for budget in budgets + exact:
        assert picked(picks, budget) == place_of(profile, budget)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_picks_of_shipped_profiles(file: Path) -> None:
    """So it is of what was really measured, at and around every step."""
    for profile in bundle.read(file).profiles[::4]:
        picks = budget_picks(profile)
        steps = [least_budget_mb(one["from_bytes"]) for one in picks]
        for budget in [0.001, 40.0, 1e6, *steps, *(0.999 * one for one in steps)]:
            assert picked(picks, budget) == place_of(profile, budget)


@pytest.mark.parametrize("budget", [10.0, 39.9, 40.0, 350.0, 1e5])
def test_picks_are_what_auto_runs(budget: float) -> None:
    """``resolve`` within a budget answers with the plan that the report shows there."""
    profile = make_profile(device=detect())
    ProfileStore().put(profile)
    place = picked(budget_picks(profile), budget)
    assert place is not None
    with use(memory_budget_mb=budget):
        assert resolve(make_workload()).plan == profile.measurements[place].plan


def test_below_the_first_step_nothing_fits() -> None:
    """A budget less than what every plan takes picks none."""
    picks = budget_picks(make_profile())
    assert picks[0] == {"from_bytes": 10_000_000, "plan": 3}
    assert picked(picks, 9.999999) is None


@given(st.integers(0, 2**60))
def test_least_budget(needed: int) -> None:
    """So many bytes fit the budget, and not one that is noticeably less."""
    budget = least_budget_mb(needed)
    assert needed <= budget * 1e6
    assert needed == 0 or needed > budget * (1 - 1e-14) * 1e6


def test_times_are_of_the_same_rounds() -> None:
    """Seconds are ratios times the anchor's median: a plan timed on a slower day is not slower."""
    slow_day = make_measurement("xla", 16.0, 0.5, seconds=(0.5,) * 5)
    record = curve_record(make_profile(measurements=(*CURVE[:2], slow_day)))
    dense, _, sliced = record["plans"]
    assert sliced["seconds"] / dense["seconds"] == pytest.approx(0.5)
    assert (record["dense"], record["chosen"]) == (0, 2)


def test_quartiles_and_what_spoke_against_each() -> None:
    """A bar from the first to the third quartile; only the choice has nothing against it."""
    noisy = make_measurement("xla", 16.0, 0.5, noise=0.1)
    oom = make_measurement("xla_rows", 64.0, status="oom", detail="killed")
    record = curve_record(make_profile(measurements=(CURVE[0], noisy, oom)))
    dense, chosen, failed = record["plans"]
    assert chosen["low"] < chosen["seconds"] < chosen["high"]
    assert (chosen["against"], failed["against"]) == ("", "oom: killed")
    assert "time" in dense["against"]
    assert failed["seconds"] is None


def test_a_profile_of_failures() -> None:
    """Without a plan that was timed there is no choice, no step, and a reason for each."""
    oom = make_measurement("dense", None, status="oom", detail="killed")
    record = curve_record(make_profile(measurements=(oom,)))
    assert (record["chosen"], record["picks"], record["dense"]) == (None, [], None)
    assert record["plans"][0]["against"] == "oom: killed"


def test_peers_are_on_the_scale_of_dense() -> None:
    """Another library at half of dense's time in its run stands at half of it here, too."""
    peer: dict[str, Any] = {"name": "torch", "ratio": 0.5, "temp_bytes": 10}
    untold = {"name": "none", "ratio": None, "temp_bytes": None}
    record = curve_record(make_profile(), [peer, untold])
    seconds = record["plans"][record["dense"]]["seconds"] / 2
    assert record["peers"] == [{"name": "torch", "seconds": seconds, "temp_bytes": 10}]


def test_versions_are_those_that_are_known() -> None:
    """What a device does not tell is left out."""
    record = curve_record(make_profile(device=make_device(cudnn="9.1")))
    names = ["jax", "jaxlib", "cudnn", "autochunk"]
    assert list(record["versions"]) == names


def test_a_function_has_no_dense_plan() -> None:
    """Its baseline is the whole call, by that name in words, figures and letters."""
    curve = curve_record(make_function_profile())
    assert [one["plan"] for one in curve["plans"]] == ["whole", "chunks of 16"]
    assert [one["implementation"] for one in curve["plans"]] == ["whole", "chunks"]
    assert [one["chunk_sizes"] for one in curve["plans"]] == [None, [16]]
    assert curve["plans"][curve["dense"]]["plan"] == "whole"
    assert "W whole" in curve_text(curve, "title")
    assert "dense" not in curve_figure(curve, "title", "device")
