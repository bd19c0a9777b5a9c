"""What is kept of measurements, and how the choice follows from them."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from factories import CURVE, make_device, make_measurement, make_profile, make_workload
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import Plan
from autochunk.store.bundle import Bundle
from autochunk.store.choice import (
    DEFAULT,
    DENSE,
    LARGEST_NOISE,
    SAME_TIME,
    Choice,
    compare,
    slower_by,
)
from autochunk.store.measurement import ENOUGH_JOINT, Measurement
from autochunk.store.profile import EFFORTS, Profile, sliced_shape

NO_TIMES = ("oom", "over_budget", "timeout", "crashed", "inaccurate")
FUTURE = "splash_v9"


# --- Measurement ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": (1.0,), "ratios": ()},
        {"seconds": (1.0, 2.0), "ratios": (1.0,)},
        {"seconds": (), "ratios": ()},
        {"temp_bytes": None},
        {"temp_bytes": -1},
        {"temp_bytes": 2**61},
        {"temp_bytes": 1.5},
        {"seconds": (math.nan,), "ratios": (1.0,)},
        {"seconds": (1.0,), "ratios": (math.nan,)},
        {"seconds": (math.inf,), "ratios": (1.0,)},
        {"seconds": (-1.0,), "ratios": (1.0,)},
        {"seconds": (1.0,), "ratios": (-1.0,)},
        {"seconds": (1.0,) * 1001, "ratios": (1.0,) * 1001},
        {"compile_seconds": math.nan},
        {"compile_seconds": -1.0},
        {"error": math.nan},
        {"error": math.inf},
        {"error": -1.0},
        {"max_chunk_size_mb": 0.0},
        {"max_chunk_size_mb": -1.0},
        {"max_chunk_size_mb": math.nan},
        {"max_chunk_size_mb": math.inf},
        {"max_chunk_size_mb": "auto"},
        {"implementation": ""},
        {"implementation": "no name"},
        {"implementation": "x\ny"},
        {"implementation": None},
        {"status": "fine"},
        {"status": None},
        {"detail": "x" * 2001},
        {"speed": 1.0},
    ],
)
def test_wrong_measurement(fields: dict[str, Any]) -> None:
    """A measurement that cannot be is refused.

    Such as lengths that differ, times that are no times, ok without them, unknown fields.
    """
    with pytest.raises(ValidationError):
        make_measurement(**fields)


@pytest.mark.parametrize("status", ["ok", "pruned"])
def test_status_with_times(status: str) -> None:
    """Statuses "ok" and "pruned" need times and memory."""
    assert make_measurement(status=status).timed
    with pytest.raises(ValidationError, match="needs times and temp_bytes"):
        make_measurement(status=status, seconds=(), ratios=())


@pytest.mark.parametrize("status", NO_TIMES)
def test_status_without_times(status: str) -> None:
    """The other statuses need neither, and their times do not count."""
    assert not make_measurement(status=status).timed
    assert not make_measurement(status=status, seconds=(1.0,), ratios=(1.0,), temp_bytes=1).timed


def test_statistics_of_a_measurement() -> None:
    """Median time and ratio, and the spread as half the interquartile range."""
    measurement = make_measurement(ratio=0.5, noise=0.1)
    assert measurement.ratio == 0.5
    assert measurement.seconds_median == pytest.approx(0.05)
    assert measurement.spread == pytest.approx(0.1)


@pytest.mark.parametrize(("own", "expected"), [(1, 1.5), (2, 1.5), (4, 0.9)])
def test_few_joint_rounds_count_beside_fewer_others(own: int, expected: float) -> None:
    """One round alone may be one that something disturbed: three joint ones say more than it.

    Only more rounds than these are taken by themselves.
    """
    ratios = (0.9,) * own + (1.5, 1.5, 1.6)
    assert make_measurement(seconds=ratios, ratios=ratios, joint=3).ratio == expected


def test_joint_rounds_count_where_there_are_enough() -> None:
    """A ratio is that of joint rounds, if there are enough of them; of few, that of all."""
    alone, together = (1.0,) * 9, (0.5, 0.6, 0.7) * 2
    for joint, expected in ((ENOUGH_JOINT, 0.6), (ENOUGH_JOINT - 1, 1.0)):
        ratios = alone + together[:joint]
        found = make_measurement(seconds=ratios, ratios=ratios, joint=joint)
        assert found.joint_ratios == together[:joint]
        assert found.ratio == pytest.approx(expected)


def test_the_anchor_has_the_spread_of_its_own_rounds() -> None:
    """Beside itself in joint rounds its ratio is one each time, which tells nothing."""
    alone = make_measurement(noise=0.1)
    ratios = (*alone.ratios, *(1.0,) * ENOUGH_JOINT)
    anchor = make_measurement(seconds=ratios, ratios=ratios, joint=ENOUGH_JOINT)
    assert anchor.spread == alone.spread > 0


def test_comparisons_pair_joint_rounds() -> None:
    """What hits all plans of a round alike makes a difference no less sure.

    Without joint rounds the same times tell nothing, and plans that were in fewer of them are
    compared by those that both were in.
    """
    drift = (1.0, 1.3, 0.8, 1.6, 0.9, 1.1, 2.0)
    slower = tuple(1.02 * one for one in drift)
    joint = [
        make_measurement(seconds=one, ratios=one, joint=len(one)) for one in (slower, drift[:6])
    ]
    assert compare(*joint).decided
    assert compare(*joint).middle == pytest.approx(0.02)
    alone = [make_measurement(seconds=one, ratios=one) for one in (slower, drift)]
    assert not compare(*alone).decided


def test_within_is_the_worst_that_may_be() -> None:
    """Of all plans that were timed to the end the one that may be fastest, by its interval."""
    best = make_measurement("xla", 8.0, 1.0, noise=0.01)
    noisy, pruned = (
        make_measurement("xla", 4.0, 1.02, noise=0.03),
        make_measurement("xla", 2.0, 0.9, noise=0.3, status="pruned"),
    )
    for others, expected in (((), 0.0), ((noisy,), compare(best, noisy).high)):
        choice = make_profile(measurements=[best, pruned, *others]).choose()
        assert choice is not None
        assert choice.plan == best.plan
        assert choice.within == pytest.approx(expected)
    assert expected > 0.02


def test_too_few_rounds_tell_nothing() -> None:
    """Where another plan may be twice as fast, how sure a choice is cannot be said."""
    once = [make_measurement("xla", mb, 1.0, seconds=(1.0,), ratios=(1.0,)) for mb in (8.0, 4.0)]
    choice = make_profile(measurements=once).choose()
    assert choice is not None
    assert choice.within is None


@pytest.mark.parametrize("ratios", [(1.0,), (0.0, 0.0), (0.5, 0.5, 0.5)])
def test_no_spread(ratios: tuple[float, ...]) -> None:
    """One repeat, or equal ones, or none that took time, have no spread."""
    assert make_measurement(seconds=ratios, ratios=ratios).spread == 0.0


@pytest.mark.parametrize(
    ("one", "other", "noise", "expected"),
    [
        (1.0, 1.0, 0.0, 0.0),
        (1.2, 1.0, 0.0, 0.2),
        (0.8, 1.0, 0.0, -0.2),
        (1 + SAME_TIME / 2, 1.0, 0.0, 0.0),  # too close to matter
        (1 + 2 * SAME_TIME, 1.0, 0.0, 2 * SAME_TIME),
        (1.02, 1.0, 0.02, 0.0),  # within noise
        (1 + 1.5 * LARGEST_NOISE, 1.0, 0.4, 1.5 * LARGEST_NOISE),  # no noise hides this much
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_slower_by(one: float, other: float, noise: float, expected: float) -> None:
    """Times are told apart where their interval does, from 1% on, and from 3% on always."""
    measured = [make_measurement(ratio=ratio, noise=noise) for ratio in (one, other)]
    assert slower_by(*measured) == pytest.approx(expected, abs=1e-12)


# --- Profile --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"workload": "attention:t=4,k=8"},
        {"workload": "t=4,k=8"},
        {"workload": "nonsense"},
        {"workload": ""},
        {"workload": make_workload().key.replace("b=2", "b=02")},
        {"workload": make_workload().key + ",mode=forward"},
        {"created": "yesterday"},
        {"created": "2026-01-02"},
        {"created": "2026-01-02T03:04:05"},
        {"created": "2026-01-02T03:04:05+00:00"},
        {"created": "2026-01-02T03:04:05Z\n"},
        {"effort": "some"},
        {"complete": None},
        {"schema_version": 3},
        {"schema_version": 0},
        {"schema_version": True},
        {"device": None},
        {"owner": "me"},
        {"measurements": (None,)},
        {"measurements": CURVE[:1] * 10_001},
    ],
)
def test_wrong_profile(fields: dict[str, Any]) -> None:
    """A profile that cannot be is refused.

    Such as a key that is not canonical, a time that is none, another schema, unknown fields.
    """
    with pytest.raises(ValidationError):
        Profile(**{**dict(make_profile()), **fields})


measurements = st.builds(
    make_measurement,
    st.sampled_from([*IMPLEMENTATIONS, FUTURE]),
    st.one_of(st.none(), st.floats(1e-6, 1e9)),
    st.floats(1e-3, 1e3),
    st.integers(0, 10**6),
    status=st.sampled_from(["ok", "pruned", *NO_TIMES]),
    noise=st.floats(0, 0.3),
    detail=st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").decode()),
    error=st.one_of(st.none(), st.floats(0, 1)),
    compile_seconds=st.one_of(st.none(), st.floats(0, 1e4)),
)


@given(st.lists(measurements, max_size=6), st.sampled_from(EFFORTS), st.booleans())
def test_json_round_trip(curve: list[Measurement], effort: str, complete: bool) -> None:
    """A profile goes through JSON unchanged, to the last bit of every time."""
    profile = make_profile(measurements=curve, effort=effort, complete=complete)
    assert Profile.model_validate_json(profile.model_dump_json()) == profile
    dumped = json.dumps(profile.model_dump(mode="json"))
    assert Profile.model_validate(json.loads(dumped)) == profile
    bundle = Bundle(schema_version=1, profiles=(profile,)).model_dump_json()
    assert Bundle.model_validate_json(bundle).profiles == (profile,)


def test_profile_is_frozen() -> None:
    """A stored profile never changes."""
    with pytest.raises(ValidationError, match="frozen"):
        make_profile().complete = False  # type: ignore[misc]


def test_parsed_workload() -> None:
    """The key gives the workload back."""
    assert make_profile().parsed_workload() == make_workload()


def test_sliced_shape_groups_query_heads() -> None:
    """Query heads of one key/value head stay together."""
    workload = make_workload("b=2,t=3,s=4,h=12,kv_heads=3,k=8", dtype="float64")
    assert tuple(sliced_shape(workload)) == (2, 3, 4, 3, 4, 8)


# --- The choice -----------------------------------------------------------------------------------


def test_fastest_wins() -> None:
    """Where times differ, time decides."""
    choice = make_profile().choose()
    assert choice is not None
    assert choice.plan == Plan("xla", 16.0)
    assert choice.reason == "fastest"


def test_ties_go_to_the_least_memory() -> None:
    """Where times cannot be told apart, memory decides."""
    curve = [
        make_measurement("xla", None, 0.5, 500),
        make_measurement("xla", 8.0, 0.503, 20),
        make_measurement("xla", 4.0, 0.504, 30),
        make_measurement("xla", 2.0, 0.6, 1),
    ]
    choice = make_profile(measurements=curve).choose()
    assert choice is not None
    assert choice.plan == Plan("xla", 8.0)
    assert choice.reason == "least memory of 3 plans whose times cannot be told apart"


def test_noise_widens_a_tie() -> None:
    """Two percent is a difference in a quiet measurement and none in a noisy one.

    In a very noisy one it may be many: nothing is given for memory then.
    """
    for noise, expected in ((0.0, 32.0), (0.01, 8.0), (0.03, 32.0)):
        curve = [
            make_measurement("xla", 32.0, 0.5, 500, noise=noise),
            make_measurement("xla", 8.0, 0.51, 20, noise=noise),
        ]
        choice = make_profile(measurements=curve).choose()
        assert choice is not None
        assert choice.plan.max_chunk_size_mb == expected


def test_never_slower_than_dense() -> None:
    """A plan that is surely slower than dense is not chosen for its little memory.

    Not even where it ties with a noisy fastest one.
    """
    curve = [
        make_measurement("dense", None, 1.0, 500),
        make_measurement("xla", 64.0, 0.995, 400, noise=0.012),
        make_measurement("xla", 1.0, 1.02, 1, noise=0.010),
    ]
    assert slower_by(curve[2], curve[1]) == 0
    assert slower_by(curve[2], curve[0]) > 0
    choice = make_profile(measurements=curve).choose()
    assert choice is not None
    assert choice.plan == Plan("xla", 64.0)


def test_dense_wins_where_it_is_fastest() -> None:
    """Not to chunk is an answer, too."""
    curve = [make_measurement("dense", None, 1.0, 500), make_measurement("xla", 1.0, 1.2, 5)]
    choice = make_profile(measurements=curve).choose()
    assert choice is not None
    assert choice.plan == DENSE


def test_slower_than_dense_where_dense_does_not_fit() -> None:
    """With a budget that dense exceeds, a slower plan is right."""
    curve = [make_measurement("dense", None, 1.0, 500), make_measurement("xla", 1.0, 1.2, 5)]
    choice = make_profile(measurements=curve).choose(memory_budget_mb=100)
    assert choice is not None
    assert choice.plan == Plan("xla", 1.0)
    reason = "500 MB of working memory is over the budget of 100 MB"
    assert choice.rejected == ((str(DENSE), reason),)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(None, 16.0), (300, 16.0), (40, 16.0), (39.9, 4.0), (10, 4.0), (9.9, None)],
)
def test_memory_budget(budget: float | None, expected: float | None) -> None:
    """The fastest whose measured memory fits, down to the byte; nothing where nothing fits."""
    choice = make_profile().choose(memory_budget_mb=budget)
    assert (choice and choice.plan.max_chunk_size_mb) == expected


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        ("dense", DENSE),
        ("xla", Plan("xla", 16.0)),
        ("xla_rows", Plan("xla_rows", 4.0)),
        (FUTURE, None),
    ],
)
def test_implementation_filter(implementation: str, expected: Plan | None) -> None:
    """A pinned implementation is the only one chosen from."""
    choice = make_profile().choose(implementation=implementation)
    assert (choice and choice.plan) == expected


@pytest.mark.parametrize("status", ["pruned", *NO_TIMES])
def test_only_ok_is_chosen(status: str) -> None:
    """Whatever did not end well is never chosen, however fast it seemed.

    Its status or what happened is told.
    """
    bad = make_measurement("xla", 1.0, 0.01, 1, status=status, detail="what happened")
    choice = make_profile(measurements=[bad, *CURVE]).choose()
    assert choice is not None
    assert choice.plan == Plan("xla", 16.0)
    reason = dict(choice.rejected)[str(bad.plan)]
    assert "what happened" in reason
    assert make_profile(measurements=[bad]).choose() is None


@pytest.mark.parametrize("status", ["pruned", *NO_TIMES])
def test_rejection_without_detail(status: str) -> None:
    """There is a reason even where no detail was recorded."""
    bad = make_measurement("xla", 1.0, status=status)
    choice = make_profile(measurements=[bad, *CURVE]).choose()
    assert choice is not None
    assert dict(choice.rejected)[str(bad.plan)]


def test_a_budget_admits_what_was_given_up_early() -> None:
    """Slower than a plan that does not fit, it may still be the fastest that does."""
    small = [
        make_measurement("xla", 1.0, 0.55, 5, status="pruned"),
        make_measurement("xla", 0.5, 0.9, 4),
    ]
    profile = make_profile(measurements=[*CURVE, *small])
    for budget, expected in ((None, 16.0), (9.0, 1.0), (4.5, 0.5)):
        choice = profile.choose(memory_budget_mb=budget)
        assert choice is not None
        assert choice.plan == Plan("xla", expected)


def test_unknown_implementation_is_kept_and_never_chosen() -> None:
    """A newer version's profile, with an unknown implementation, answers with what can run here."""
    future = make_measurement(FUTURE, 8.0, 0.001, 1)
    profile = make_profile(measurements=[future, *CURVE])
    assert Profile.model_validate_json(profile.model_dump_json()).measurements[0] == future
    choice = profile.choose()
    assert choice is not None
    assert choice.plan == Plan("xla", 16.0)
    reason = "this version of autochunk has no such implementation"
    assert dict(choice.rejected)[str(future.plan)] == reason
    assert make_profile(measurements=[future]).choose() is None
    assert profile.baseline(DENSE) == CURVE[0]


def test_no_measurements_no_choice() -> None:
    """Nothing measured, nothing recommended."""
    assert make_profile(measurements=[]).choose() is None
    assert make_profile(measurements=[]).baseline(DENSE) is None


@st.composite
def curves(draw: st.DrawFn, *, ties: bool = False) -> list[Measurement]:
    """A curve of different plans; without exact ties of ratio or memory, unless asked for."""
    implementations = st.sampled_from([*IMPLEMENTATIONS, FUTURE])
    limits = st.sampled_from([None, 1.0, 2.0, 4.0, 8.0])
    plans = draw(st.lists(st.tuples(implementations, limits), unique=True, min_size=1, max_size=10))

    def one_each(numbers: st.SearchStrategy[int]) -> list[int]:
        count = len(plans)
        return draw(st.lists(numbers, min_size=count, max_size=count, unique=not ties))

    ratios, memory = one_each(st.integers(900, 1100)), one_each(st.integers(1, 500))
    statuses = st.sampled_from(["ok"] * 5 + ["pruned", *NO_TIMES])
    noises = st.sampled_from([0.0, 0.01, 0.05])
    return [
        make_measurement(*plan, ratio / 1000, mb, status=draw(statuses), noise=draw(noises))
        for plan, ratio, mb in zip(plans, ratios, memory, strict=True)
    ]


budgets = st.one_of(st.none(), st.integers(1, 500))
filters = st.sampled_from([None, *IMPLEMENTATIONS])


def choose(
    curve: list[Measurement], budget: float | None, implementation: str | None
) -> Choice | None:
    profile = make_profile(measurements=curve)
    return profile.choose(memory_budget_mb=budget, implementation=implementation)


@given(curves(ties=True), budgets, filters)
def test_choice_keeps_its_rules(
    curve: list[Measurement], budget: float | None, implementation: str | None
) -> None:
    """The choice is not slower than the fastest or dense; of such plans none needs less memory."""
    choice = choose(curve, budget, implementation)
    here = {name for name, one in IMPLEMENTATIONS.items() if one.installed}
    narrowed = (budget, implementation) != (None, None) or any(
        m.implementation not in here for m in curve
    )
    fitting = [
        m
        for m in curve
        if (m.status == "ok" or (m.status == "pruned" and narrowed))
        and m.implementation in here
        and implementation in (None, m.implementation)
        and (budget is None or (m.temp_bytes or 0) <= budget * 1e6)
    ]
    assert (choice is None) == (not fitting)
    if choice is None:
        return
    best = choice.measurement
    assert best in fitting
    # Which of several equally fast ones counts as the fastest is not laid down.
    fastest = [m for m in fitting if m.ratio == min(one.ratio for one in fitting)]
    assert any(slower_by(best, one) == 0 for one in fastest)
    dense = next((m for m in fitting if m.plan == DENSE), None)
    assert dense is None or slower_by(best, dense) <= 0
    rivals = [
        m
        for m in fitting
        if all(slower_by(m, one) == 0 for one in fastest)
        and (dense is None or slower_by(m, dense) <= 0)
    ]
    assert all((best.temp_bytes or 0) <= (rival.temp_bytes or 0) for rival in rivals)


@given(curves(ties=True), budgets, filters)
def test_every_other_plan_is_rejected_with_a_reason(
    curve: list[Measurement], budget: float | None, implementation: str | None
) -> None:
    """A choice explains itself: each other plan stands in ``rejected`` once, with words."""
    choice = choose(curve, budget, implementation)
    if choice is not None:
        others = sorted(str(m.plan) for m in curve if m is not choice.measurement)
        assert sorted(plan for plan, _ in choice.rejected) == others
        assert all(reason.strip() for _, reason in choice.rejected)
        assert choice.reason


@given(curves(), budgets, filters, st.randoms(use_true_random=False))
def test_choice_does_not_depend_on_the_order(
    curve: list[Measurement], budget: float | None, implementation: str | None, rng: random.Random
) -> None:
    """The same measurements in another order give the same plan."""
    one = choose(curve, budget, implementation)
    other = choose(rng.sample(curve, len(curve)), budget, implementation)
    assert (one and (one.plan, one.reason)) == (other and (other.plan, other.reason))
    if one and other:
        assert sorted(one.rejected) == sorted(other.rejected)


TIED = [
    # Equal ratios, one of them noisy: whether the third ties depends on which of the two is taken
    # for the fastest.
    [
        make_measurement("xla", 8.0, 1.0, 100),
        make_measurement("xla", 4.0, 1.0, 90, noise=0.05),
        make_measurement("xla", 2.0, 1.02, 10),
    ],
    # Equal in time and in memory.
    [make_measurement("xla", 8.0, 1.0, 100), make_measurement("xla_rows", 8.0, 1.0, 100)],
]


@pytest.mark.parametrize("curve", TIED)
def test_choice_of_exact_ties_does_not_depend_on_the_order(curve: list[Measurement]) -> None:
    """Also where two medians are exactly equal."""
    one, other = choose(curve, None, None), choose(curve[::-1], None, None)
    assert one is not None
    assert other is not None
    assert one.plan == other.plan


# --- Baselines ------------------------------------------------------------------------------------


def test_baseline_by_plan() -> None:
    """The measurement of exactly that plan, if it was timed."""
    profile = make_profile()
    assert profile.baseline(DENSE) == CURVE[0]
    assert profile.baseline(Plan("xla_rows", 4.0)) == CURVE[3]


def test_baseline_by_slices() -> None:
    """The 1000 MB default of a workload with fewer logits is not to slice, and measured as such."""
    assert make_workload().logits_bytes < 1e9
    assert make_profile().baseline(DEFAULT) == CURVE[1]


def test_exact_baseline_comes_before_equal_slices() -> None:
    """Of two measurements with equal slices, the one of the plan asked for."""
    exact = make_measurement("xla", 1000.0, 0.8)
    assert make_profile(measurements=[*CURVE, exact]).baseline(DEFAULT) == exact


@pytest.mark.parametrize("status", NO_TIMES)
def test_baseline_needs_times(status: str) -> None:
    """A baseline that could not run is none."""
    profile = make_profile(measurements=[make_measurement("dense", None, status=status)])
    assert profile.baseline(DENSE) is None


def test_pruned_baseline_has_times() -> None:
    """A baseline given up early as too slow can still be compared with."""
    profile = make_profile(measurements=[make_measurement("dense", None, status="pruned")])
    assert profile.baseline(DENSE) is not None


def test_baseline_beside_an_impossible_limit() -> None:
    """A measurement with a limit that nothing fits, from a file, spoils no other one."""
    curve = [make_measurement("xla", 1e-9), make_measurement("xla", None)]
    assert make_profile(measurements=curve).baseline(DEFAULT) is not None


def test_device_of_a_profile_is_kept() -> None:
    """Versions of the device are those it was measured with."""
    device = make_device(jaxlib="0.9.1", driver="CUDA 13")
    text = make_profile(device=device).model_dump_json()
    assert Profile.model_validate_json(text).device == device


def test_a_plan_of_one_round_ties_with_none_that_met_in_joint_rounds() -> None:
    """However little memory it takes: nothing is known of its time."""
    well_known = make_measurement("xla", 16.0, 1.0, 100.0).model_copy(
        update={"seconds": (1.0,) * 12, "ratios": (1.0,) * 12, "joint": 8}
    )
    glimpsed = make_measurement("xla_rows", 16.0, 1.02, 5.0).model_copy(
        update={"seconds": (1.02,), "ratios": (1.02,)}
    )
    chosen = choose([well_known, glimpsed], None, None)
    assert chosen is not None
    assert chosen.plan == well_known.plan
