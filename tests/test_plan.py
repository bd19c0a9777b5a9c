"""From MB to slices: integer arithmetic, so mostly properties over all sizes."""

from __future__ import annotations

import decimal
import fractions
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from factories import logits_shapes
from hypothesis import example, given
from hypothesis import strategies as st

from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import (
    LogitsShape,
    Plan,
    Plans,
    Slices,
    balanced,
    candidate_plans,
    check_implementation,
    check_max_chunk_size_mb,
    same_slices,
    slice_logits,
)

SLICED = [name for name, one in IMPLEMENTATIONS.items() if one.sliced]
sliced = st.sampled_from(SLICED)


@st.composite
def limited(draw: st.DrawFn) -> tuple[Plan, LogitsShape]:
    """A shape, and a plan whose limit holds at least one logit of every query head in a group."""
    shape = draw(logits_shapes)
    least = shape.groups * shape.itemsize
    limit = draw(
        st.one_of(
            st.integers(least, max(least, shape.bytes + 1)),
            st.integers(least, least * 64),
            st.sampled_from([10**6, 10**9]).filter(lambda n: n >= least),
        )
    )
    # Half a byte more, so that rounding of limit / 10^6 cannot take a byte away.
    return Plan(draw(sliced), (limit + 0.5) / 1e6), shape


def limit_bytes(plan: Plan) -> int:
    assert plan.max_chunk_size_mb is not None
    return math.floor(plan.max_chunk_size_mb * 10**6)


@given(limited())
def test_slice_is_within_the_limit(case: tuple[Plan, LogitsShape]) -> None:
    """No slice has more bytes of logits than the limit; none is empty or larger than its axis."""
    plan, shape = case
    slices = slice_logits(plan, shape)
    assert slices.chunk_bytes(shape) <= limit_bytes(plan)
    assert all(1 <= size <= getattr(shape, axis) for axis, size in slices._asdict().items())


@given(limited())
def test_slices_cover_each_axis(case: tuple[Plan, LogitsShape]) -> None:
    """The counted slices cover each axis, and one slice fewer would not.

    The last overlaps its neighbour by less than a slice.
    """
    plan, shape = case
    slices = slice_logits(plan, shape)
    for axis, count in slices.counts(shape)._asdict().items():
        size, length = getattr(slices, axis), getattr(shape, axis)
        assert (count - 1) * size < length <= count * size
        assert count * size - length < size


@given(limited())
def test_slices_are_balanced_and_as_few_as_possible(case: tuple[Plan, LogitsShape]) -> None:
    """Along the axis where slicing ends there are as few slices as the limit allows.

    They are equal but for rounding up to eight. There are up to twice as many only where fewer
    would compute more.
    """
    plan, shape = case
    slices, order = slice_logits(plan, shape), IMPLEMENTATIONS[plan.implementation].slicing
    counts = slices.counts(shape)
    bytes_of_one = slices.chunk_bytes(shape)
    for axis in order:
        length, size, count = getattr(shape, axis), getattr(slices, axis), getattr(counts, axis)
        if size == length:
            continue
        most = limit_bytes(plan) // (bytes_of_one // size)
        assert size <= most
        fewest = -(-length // most)
        if count == fewest and size > 1:
            assert size - -(-length // count) < 8
        elif most > 1:
            assert count <= 2 * fewest
            assert count * size < fewest * -(-length // fewest)


@pytest.mark.parametrize(
    ("length", "most", "size"),
    [
        (8, 3, 2),
        (16, 7, 4),
        (3, 2, 1),
        (7, 6, 4),
        (12, 5, 4),
        (8, 4, 4),
        (256, 14, 14),
        (13, 12, 7),
    ],
)
def test_few_heads_overlap_little(length: int, most: int, size: int) -> None:
    """Where the last slice would compute many heads once more, slices are smaller.

    Three of eight compute nine, two compute eight; 14 of 256 sequences compute 4% more.
    """
    assert balanced(length, most) == size


@given(limited())
def test_slicing_order(case: tuple[Plan, LogitsShape]) -> None:
    """Axes are sliced in the implementation's order.

    The next one is sliced only when single elements of those before are still too large.
    """
    plan, shape = case
    slices = slice_logits(plan, shape)
    order = IMPLEMENTATIONS[plan.implementation].slicing
    touched = [axis for axis in order if getattr(slices, axis) < getattr(shape, axis)]
    for axis in touched:
        before, after = order[: order.index(axis)], order[order.index(axis) + 1 :]
        assert all(getattr(slices, earlier) == 1 for earlier in before)
        # With this axis whole, and the later ones too, the limit would not hold.
        whole = slices._replace(**{name: getattr(shape, name) for name in (axis, *after)})
        assert whole.chunk_bytes(shape) > limit_bytes(plan)


@given(logits_shapes, sliced)
def test_limit_of_all_logits_does_not_slice(shape: LogitsShape, implementation: str) -> None:
    """Logits that fit the limit are never sliced."""
    plan = Plan(implementation, (shape.bytes + 0.5) / 1e6)
    assert slice_logits(plan, shape) == Slices(shape.batch, shape.heads, shape.rows, shape.keys)


@given(logits_shapes, st.sampled_from(list(IMPLEMENTATIONS)))
def test_no_limit_never_slices(shape: LogitsShape, implementation: str) -> None:
    """None means: do not slice, whatever the size."""
    slices = slice_logits(Plan(implementation, None), shape)
    assert slices == Slices(shape.batch, shape.heads, shape.rows, shape.keys)
    assert slices.counts(shape) == Slices(1, 1, 1, 1)
    assert slices.chunk_bytes(shape) == shape.bytes


@given(logits_shapes, st.floats(1e-9, 1e9))
def test_dense_has_no_slices(shape: LogitsShape, limit: float) -> None:
    """The plan "dense" is whole whatever the limit.

    Where it does not fit, ``runs_dense`` says so and ``Plan.sliced`` what runs in its place.
    """
    assert slice_logits(Plan("dense", limit), shape) == Slices(
        shape.batch, shape.heads, shape.rows, shape.keys
    )


@given(logits_shapes, sliced, st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_limit_below_one_logit_is_an_error(
    shape: LogitsShape, implementation: str, share: float
) -> None:
    """A limit below one logit per query head of a group is an ArgumentError.

    It says how many bytes are needed.
    """
    least = shape.groups * shape.itemsize
    if shape.bytes * 1e-6 <= least * share * 1e-6:
        return
    said = f"less than the {least} bytes of the smallest slice possible; give a larger limit"
    with pytest.raises(ArgumentError, match=said):
        slice_logits(Plan(implementation, math.floor(least * share) / 1e6), shape)


@pytest.mark.parametrize("implementation", SLICED)
def test_smallest_limit(implementation: str) -> None:
    """A limit of exactly one logit works, one byte less does not."""
    shape = LogitsShape(2, 3, 1, 5, 7, 4)
    assert slice_logits(Plan(implementation, 4.5e-6), shape) == Slices(1, 1, 1, 1)
    said = "max_chunk_size_mb=3e-06 is 3 bytes, less than the 4 bytes"
    with pytest.raises(ArgumentError, match=said):
        slice_logits(Plan(implementation, 3e-6), shape)


@pytest.mark.parametrize(
    ("implementation", "shape", "limit", "expected"),
    [
        ("xla", LogitsShape(4, 8, 1, 1000, 1000, 4), 64, Slices(2, 8, 1000, 1000)),  # batch first
        ("xla", LogitsShape(1, 8, 1, 1000, 1000, 4), 16, Slices(1, 4, 1000, 1000)),  # then heads
        ("xla", LogitsShape(1, 1, 1, 1000, 1000, 4), 1, Slices(1, 1, 250, 1000)),  # then rows
        ("xla", LogitsShape(1, 1, 1, 2, 1_000_000, 4), 1, Slices(1, 1, 1, 250_000)),  # then keys
        # Query heads of a group stay together.
        ("xla", LogitsShape(1, 2, 4, 1000, 1000, 4), 16, Slices(1, 1, 1000, 1000)),
        # 3 + 2, not 4 + 1.
        ("xla", LogitsShape(5, 1, 1, 1000, 1000, 4), 16, Slices(3, 1, 1000, 1000)),
        # Rows first.
        ("xla_rows", LogitsShape(4, 8, 1, 1000, 1000, 4), 64, Slices(4, 8, 500, 1000)),
        # 7 is ceil(4000 / ceil(4000 / 7)): too few rows to round up to eight.
        ("xla_rows", LogitsShape(4, 8, 1, 4000, 1000, 4), 1, Slices(4, 8, 7, 1000)),
        # 128 rows would be over the limit.
        ("xla_rows", LogitsShape(1, 1, 1, 1000, 1000, 4), 0.5, Slices(1, 1, 125, 1000)),
        # 125, rounded up to a multiple of eight.
        ("xla_rows", LogitsShape(1, 1, 1, 1000, 1000, 4), 0.52, Slices(1, 1, 128, 1000)),
    ],
)
def test_slices_by_hand(
    implementation: str, shape: LogitsShape, limit: float, expected: Slices
) -> None:
    """Slices worked out by hand."""
    assert slice_logits(Plan(implementation, limit), shape) == expected


@pytest.mark.parametrize("limit", [1e300, 1e303, 1.7e308])
def test_huge_limit_does_not_slice(limit: float) -> None:
    """A limit may be any finite number, however large."""
    assert check_max_chunk_size_mb(limit) == limit
    shape = LogitsShape(1, 1, 1, 4, 4, 4)
    assert slice_logits(Plan("xla", limit), shape) == Slices(1, 1, 4, 4)


@given(st.integers(1, 2**40))
@example(249)
def test_limit_in_bytes_survives_the_way_through_mb(size: int) -> None:
    """A limit of n bytes, written in MB as n / 10^6, is n bytes again.

    Slices of exactly n bytes fit it.
    """
    shape = LogitsShape(2, 1, 1, 1, size, 4)
    half = shape.bytes // 2
    assert slice_logits(Plan("xla", half / 10**6), shape) == Slices(1, 1, 1, size)


@given(logits_shapes)
def test_candidates_differ_in_slices(shape: LogitsShape) -> None:
    """No two candidates come to the same computation, and the first is not to slice."""
    plans = candidate_plans(shape)
    assert plans[0] == Plan("xla", None)
    assert len({slice_logits(plan, shape) for plan in plans}) == len(plans)
    pairs = itertools.combinations(plans, 2)
    assert not any(same_slices(one, other, shape) for one, other in pairs)


@given(logits_shapes)
def test_candidates_are_legal(shape: LogitsShape) -> None:
    """Every candidate passes the op's checks; its limit is at most twice what its slices need."""
    for plan in candidate_plans(shape):
        assert check_implementation(plan.implementation) == plan.implementation
        assert check_max_chunk_size_mb(plan.max_chunk_size_mb) == plan.max_chunk_size_mb
        most = shape.bytes if plan.max_chunk_size_mb is None else limit_bytes(plan)
        assert slice_logits(plan, shape).chunk_bytes(shape) <= most


@given(logits_shapes)
def test_candidates_descend_in_memory(shape: LogitsShape) -> None:
    """From most memory to least, for a tuner that stops early.

    A limit is a power of two times 1.05 MB, room for as many MiB.
    """
    plans = candidate_plans(shape)
    for limit in (plan.max_chunk_size_mb for plan in plans[1:]):
        assert limit is not None
        exponent = round(math.log2(limit / 1.05))
        assert limit == pytest.approx(1.05 * 2.0**exponent, rel=1e-3)
        assert limit * 1e6 >= 2.0 ** (20 + exponent)
    for implementation in SLICED:
        own = [plan for plan in plans if plan.implementation == implementation]
        limits = [plan.max_chunk_size_mb or math.inf for plan in own]
        assert limits == sorted(limits, reverse=True)
        memory = [slice_logits(plan, shape).chunk_bytes(shape) for plan in own]
        assert memory == sorted(set(memory), reverse=True)


@pytest.mark.parametrize("most_slices", [1, 7, 100, 1024])
def test_candidates_have_no_more_slices_than_asked(most_slices: int) -> None:
    """Plans with more than ``most_slices`` slices are left out."""
    for shape in (
        LogitsShape(64, 1, 1, 1000, 1000, 4),
        LogitsShape(64, 8, 1, 1000, 1000, 4),
        LogitsShape(100, 12, 1, 129, 129, 4),
    ):
        for plan in candidate_plans(shape, most_slices=most_slices):
            assert math.prod(slice_logits(plan, shape).counts(shape)) <= most_slices


@pytest.mark.parametrize(
    "shape", [LogitsShape(1, 1, 32768, 4, 4, 4), LogitsShape(2, 1, 2**20, 8, 1, 8)]
)
def test_candidates_of_very_large_groups(shape: LogitsShape) -> None:
    """Where one logit of every query head in a group is much, candidates are fewer and no error."""
    assert all(slice_logits(plan, shape) for plan in candidate_plans(shape))


def test_candidates_descend_in_memory_across_implementations() -> None:
    """From most memory to least, of slices as they are and not of their limits."""
    shape = LogitsShape(1, 3, 1, 129, 129, 4)
    memory = [slice_logits(plan, shape).chunk_bytes(shape) for plan in candidate_plans(shape)]
    assert memory == sorted(memory, reverse=True)


@given(logits_shapes)
def test_candidates_in_larger_steps_are_fewer(shape: LogitsShape) -> None:
    """A larger step measures less."""
    assert len(candidate_plans(shape, step=4)) <= len(candidate_plans(shape, step=2))


@pytest.mark.parametrize(
    "shape", [LogitsShape(1, 1, 1, 1, 1, 4), LogitsShape(2**20, 2**10, 1, 2**20, 2**20, 8)]
)
def test_candidates_at_the_ends(shape: LogitsShape) -> None:
    """One logit, and more logits than any machine has, both have candidates."""
    assert candidate_plans(shape)[0] == Plan("xla", None)


def test_same_slices() -> None:
    """Plans are the same where their slices are, but "dense" is a computation of its own."""
    shape = LogitsShape(1, 8, 1, 1000, 1000, 4)
    assert same_slices(Plan("xla", None), Plan("xla_rows", 1000.0), shape)
    assert same_slices(Plan("xla", 16.0), Plan("xla", 17.0), shape)
    assert not same_slices(Plan("xla", 16.0), Plan("xla_rows", 16.0), shape)
    assert not same_slices(Plan("dense", None), Plan("xla", None), shape)
    assert same_slices(Plan("dense", None), Plan("dense", 1.0), shape)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        (1, 1.0),
        (0.5, 0.5),
        (1e-300, 1e-300),
        (np.float32(2), 2.0),
        (np.float64(2.5), 2.5),
        (np.float16(0.5), 0.5),
        (np.int32(3), 3.0),
        (np.uint8(3), 3.0),
        (fractions.Fraction(1, 2), 0.5),
    ],
)
def test_limit_is_accepted(value: Any, expected: object) -> None:
    """Any positive finite real number is a limit, numpy's scalars too; so are None and "auto"."""
    result = check_max_chunk_size_mb(value)
    assert result == expected
    assert type(result) is type(expected)


WRONG_LIMITS: list[Callable[[], object]] = [
    lambda: True,
    lambda: False,
    lambda: np.True_,
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: 0,
    lambda: 0.0,
    lambda: -0.0,
    lambda: -1,
    lambda: np.float32("nan"),
    lambda: np.float32("inf"),
    lambda: "1000",
    lambda: "AUTO",
    lambda: "Auto",
    lambda: "",
    lambda: "none",
    lambda: b"auto",
    lambda: [1.0],
    lambda: (1.0,),
    lambda: {"mb": 1},
    lambda: 1 + 0j,
    object,
    lambda: decimal.Decimal(1),
    lambda: np.array(1.0),
    lambda: np.array([1.0, 2.0]),
    lambda: np.array(["auto", "auto"]),
    lambda: jnp.array(1.0),
    lambda: jnp.ones(3),
    lambda: fractions.Fraction(1, 10**400),
]
TOO_LARGE: list[Callable[[], object]] = [lambda: 10**400, lambda: fractions.Fraction(10**400)]


@pytest.mark.parametrize("make", [*WRONG_LIMITS, *TOO_LARGE])
def test_limit_is_refused(make: Callable[[], object]) -> None:
    """Whatever is no positive finite number is an ArgumentError; arrays are no numbers.

    It says what is required and what was received.
    """
    said = r'max_chunk_size_mb must be a positive finite number .*None .*or "auto"; got '
    with pytest.raises(ArgumentError, match=said) as error:
        check_max_chunk_size_mb(make())
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("name", [None, *IMPLEMENTATIONS])
def test_implementation_is_accepted(name: str | None) -> None:
    """Known names, and None for "you choose"."""
    assert check_implementation(name) == name


@pytest.mark.parametrize(
    "value",
    [
        *("", "XLA", "auto", "cudnn_v8", " xla"),
        *(True, 0, b"xla", ["xla"], {}, np.array(["xla"]), object()),
    ],
)
def test_implementation_is_refused(value: object) -> None:
    """Anything else is an ArgumentError that lists the names."""
    said = r"implementation must be None or one of 'dense', 'cudnn', 'xla', 'xla_rows'.*; got "
    with pytest.raises(ArgumentError, match=said):
        check_implementation(value)


def test_plan_says_its_limit() -> None:
    """A plan's text names the implementation and the limit, so that it can be read in a report."""
    assert str(Plan("xla", 64.0)) == "xla, 64 MB"
    assert "xla_rows" in str(Plan("xla_rows", None))
    texts = {str(Plan(name, limit)) for name in SLICED for limit in (None, 1.0, 0.5)}
    assert len(texts) == 3 * len(SLICED)


def test_plan_is_a_value() -> None:
    """Equal plans are equal and hash alike: a compiled program is found again by its plan."""
    assert Plan("xla", 1) == Plan("xla", 1.0)
    assert hash(Plan("xla", 1)) == hash(Plan("xla", 1.0))


def test_plans_tell_which_one_ran() -> None:
    """``used`` reports the mode.

    Who listens takes no part in equality, so that compiled programs are shared.
    """
    heard: list[str] = []
    plans = Plans(Plan("xla", 1.0), Plan("xla", 2.0), heard.append)
    plans.used("training")
    plans.used("forward")
    assert heard == ["training", "forward"]
    silent = Plans(Plan("xla", 1.0), Plan("xla", 2.0))
    silent.used("forward")
    assert plans == silent
    assert hash(plans) == hash(silent)
