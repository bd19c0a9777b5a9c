"""What a call has beside products: lengths, windows, segments, offsets, caps, slopes, dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from hypothesis import settings
from hypothesis import strategies as st
from jax.experimental import jet
from reference import MOST, Arrays, assert_close, draw, operands, plain, temp_bytes

from autochunk import dot_product_attention
from autochunk.errors import ArgumentError

PLANS = {
    "dense": ("dense", None),
    "whole": ("xla", None),
    "rows and keys": ("xla", 4e-5),
    "rows first": ("xla_rows", 4e-4),
}


def whole(*numbers: int) -> np.ndarray[Any, Any]:
    return np.asarray(numbers, np.int32)


# Queries are [2, 12, 4, 8], keys [2, 10, 2, 8], values [2, 10, 2, 6].
CALLS: dict[str, dict[str, Any]] = {
    "key lengths": {"key_value_seq_lengths": whole(3, 10)},
    "query lengths": {"query_seq_lengths": whole(5, 12)},
    "no key": {
        "key_value_seq_lengths": whole(0, 7),
        "query_seq_lengths": whole(12, 4),
        "is_causal": True,
    },
    "one length for all": {"key_value_seq_lengths": whole(4)},
    "window": {"local_window_size": (2, 1)},
    "causal window": {"local_window_size": (3, 2), "is_causal": True},
    "narrowest window": {"local_window_size": (0, 0)},
    "segments": {
        "query_segment_ids": whole(*[0] * 4, *[1] * 5, *[2] * 3)[None],
        "key_value_segment_ids": whole(*[0] * 3, *[1] * 5, *[3] * 2)[None],
    },
    "segments in no order": {
        "query_segment_ids": np.stack([np.arange(12) % 3, np.arange(12) % 2]).astype(np.int32),
        "key_value_segment_ids": np.stack([np.arange(10) % 3] * 2).astype(np.int32),
        "is_causal": True,
    },
    "offsets": {"query_offset": whole(-2, 3), "is_causal": True},
    "one offset": {"query_offset": -3, "is_causal": True, "local_window_size": (3, 0)},
    "cap": {"logits_soft_cap": 1.5},
    "slopes": {"alibi_slopes": np.asarray([0.5, 0.25, 0.1, -0.05], np.float32)},
    "slopes, offsets, a cap": {
        "alibi_slopes": draw((2, 4)),
        "query_offset": whole(1, 2),
        "is_causal": True,
        "logits_soft_cap": 3.0,
    },
    "residual": {"return_residual": True, "key_value_seq_lengths": whole(0, 7)},
    "all": {
        "return_residual": True,
        "is_causal": True,
        "local_window_size": (6, 6),
        "key_value_seq_lengths": whole(9, 7),
        "query_seq_lengths": whole(12, 11),
        "query_segment_ids": whole(*[0] * 7, *[1] * 5)[None],
        "key_value_segment_ids": whole(*[0] * 6, *[1] * 4)[None],
        "mask": np.random.default_rng(0).random((1, 1, 1, 10)) < 0.8,
        "bias": draw((4, 1, 10)),
        "alibi_slopes": np.asarray([0.5, 0.25, 0.1, 0.05], np.float32),
        "query_offset": whole(0, 1),
        "logits_soft_cap": 5.0,
    },
}
MOVING = ("bias", "alibi_slopes")


def arrays_of(call: dict[str, Any]) -> Arrays:
    made = operands((2,), 12, 10, 4, 2, 8, 6)
    del made["cotangent"]
    return made | {name: call[name] for name in MOVING if name in call}


def derivatives(function: Callable[..., Any], call: dict[str, Any]) -> Callable[[Arrays], Any]:
    """Output, gradients and tangents of all that is floating point."""
    fixed = {name: one for name, one in call.items() if name not in MOVING}

    def run(moving: Arrays) -> Any:
        def attend(moving: Arrays) -> Any:
            return function(**moving, **fixed)

        out, pull = jax.vjp(attend, moving)
        tangent = jax.jvp(attend, (moving,), (jax.tree.map(jnp.sin, moving),))[1]
        # What a row without keys has for a residual would drown all others.
        near = jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 1e30, x, 0.0), out)
        gradients = pull(jax.tree.map(jnp.cos, near))
        return attend(moving), out, gradients, tangent

    return run


@pytest.mark.parametrize("name", CALLS)
def test_terms_are_right_by_every_plan(name: str) -> None:
    """Output, residual, gradients and tangents are those of plain attention, which masks."""
    call = CALLS[name]
    functions = {"plain": plain}
    for plan in ("dense", "rows and keys", "rows first", *(["whole"] if name == "all" else [])):
        implementation, limit = PLANS[plan]
        functions[plan] = functools.partial(
            dot_product_attention, implementation=implementation, max_chunk_size_mb=limit
        )

    @quick_jit
    def results(moving: Arrays) -> dict[str, Any]:
        return {plan: derivatives(one, call)(moving) for plan, one in functions.items()}

    received = results(arrays_of(call))
    expected = dict.fromkeys(received, received["plain"])
    assert_close(received, expected, 1e-5 if "residual" not in str(call) else 1e-4)


@pytest.mark.parametrize("far", [2**31, 10**12])
def test_a_side_of_a_window_that_is_longer_than_all_sequences(far: int) -> None:
    """It is none, however large the number."""
    attend = functools.partial(
        dot_product_attention, **arrays_of({}), implementation="xla", max_chunk_size_mb=4e-5
    )
    for window, same in (((far, 1), (11, 1)), ((2, far), (2, 9)), (far, None)):
        assert_close(attend(local_window_size=window), attend(local_window_size=same))


@pytest.mark.parametrize(("one", "both"), [(3, (3, 3)), (0, (0, 0))])
def test_a_window_of_one_number_has_it_on_both_sides(one: int, both: tuple[int, int]) -> None:
    """As in ``jax.nn.dot_product_attention``."""
    arrays = arrays_of({})
    expected = jax.nn.dot_product_attention(
        *(arrays[name] for name in ("query", "key", "key")), local_window_size=one
    )
    for window in (one, both):
        ours = dot_product_attention(
            *(arrays[name] for name in ("query", "key", "key")),
            local_window_size=window,
            max_chunk_size_mb=1.0,
        )
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_lengths_are_jaxs(causal: bool, residual: bool) -> None:
    """Padded rows are zero, rows without any key the mean of all values, and residuals the same."""
    arrays = operands((3,), 9, 7)
    options: dict[str, Any] = {"is_causal": causal, "return_residual": residual}
    options |= {
        "query_seq_lengths": whole(9, 4, 0),
        "key_value_seq_lengths": whole(3, 7, 0),
    }
    heads = [arrays[name] for name in ("query", "key", "value")]
    attention: Any = jax.nn.dot_product_attention
    expected = quick_jit(functools.partial(attention, **options))(*heads)
    for limit in (None, 1e-4):
        ours = functools.partial(dot_product_attention, **options, max_chunk_size_mb=limit)
        assert_close(quick_jit(ours)(*heads), expected)


@pytest.mark.parametrize("name", ["key lengths", "segments in no order", "slopes, offsets, a cap"])
@pytest.mark.parametrize("of", ["call", "gradient"])
def test_terms_may_be_vmapped(name: str, of: str) -> None:
    """Each element of a batch has its own, or all share one."""
    call = dict(CALLS[name])
    arrays = [name for name, one in call.items() if isinstance(one, np.ndarray)]
    stacked = {name: np.stack([call[name], call[name][..., ::-1]]) for name in arrays}
    rest = {name: one for name, one in call.items() if name not in arrays}
    heads = [np.stack([one, -one]) for one in list(arrays_of({}).values())]

    def mapped(function: Callable[..., Any], axes: int | None) -> Any:
        def attend(query: Any, key: Any, value: Any, terms: Any) -> Any:
            return jnp.sum(jnp.sin(function(query, key, value, **terms, **rest)), axis=(-1, -2))

        one = attend if of == "call" else jax.grad(lambda *a: jnp.sum(attend(*a)), (0, 1, 2))
        terms = stacked if axes == 0 else {name: call[name] for name in arrays}
        return jax.vmap(one, (0, None, 0, axes))(heads[0], heads[1][0], heads[2], terms)

    ours = functools.partial(dot_product_attention, max_chunk_size_mb=2e-4)
    for axes in (0, None):
        received, expected = quick_jit(lambda a=axes: (mapped(ours, a), mapped(plain, a)))()
        assert_close(received, expected)


@pytest.mark.parametrize("call", ["window", "key lengths", "segments", "slopes", "dropout"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_terms_are_never_arrays_of_the_logits_size(call: str, mode: str) -> None:
    """Working memory stays that of the plain call."""
    length = 1024
    ids = jnp.arange(length, dtype=jnp.int32)[None] // 300
    calls: dict[str, dict[str, Any]] = {
        "window": {"local_window_size": (100, 0)},
        "key lengths": {"key_value_seq_lengths": whole(700)},
        "segments": {"query_segment_ids": ids, "key_value_segment_ids": ids},
        "slopes": {"alibi_slopes": jnp.ones(2)},
        "dropout": {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)},
    }
    heads = [draw((1, length, 2, 8), seed) for seed in range(3)]

    def bytes_of(**options: Any) -> int:
        attend = functools.partial(dot_product_attention, max_chunk_size_mb=0.5, **options)
        if mode == "training":
            return temp_bytes(jax.grad(lambda *a: jnp.sum(attend(*a)), (0, 1, 2)), *heads)
        return temp_bytes(attend, *heads)

    logits = 2 * length * length * 4
    assert bytes_of(**calls[call]) < 1.3 * bytes_of() + 0.6e6 < logits


@pytest.mark.parametrize("call", ["key lengths", "all lengths", "segments"])
def test_sums_are_held_for_a_few_rows_at_a_time(call: str) -> None:
    """However many slices of keys they go over, what is held is no output in float32."""
    length, heads = 8192, jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)  # only compiled
    ids = jnp.arange(length, dtype=jnp.int32)[None] // 1000
    calls: dict[str, dict[str, Any]] = {
        "key lengths": {"key_value_seq_lengths": whole(7000)},
        "all lengths": {"query_seq_lengths": whole(100), "key_value_seq_lengths": whole(7000)},
        "segments": {"query_segment_ids": ids, "key_value_segment_ids": ids},
    }

    def bytes_of(**options: Any) -> int:
        attend = functools.partial(dot_product_attention, max_chunk_size_mb=8.0, **options)
        return temp_bytes(attend, heads, heads, heads)

    assert bytes_of(**calls[call]) <= 1.3 * bytes_of()


# --- Blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"local_window_size": (70, 30)},
        {"key_value_seq_lengths": whole(900, 1100), "is_causal": True},
        {"query_seq_lengths": whole(1, 1100), "key_value_seq_lengths": whole(1100, 300)},
        {"mask": np.arange(1100)[None, None, None] < 700, "is_causal": True},
        {"query_offset": whole(-300, 500), "is_causal": True},
        {"mask": np.tril(np.ones((1100, 1100), bool))},
        {"mask": np.tri(1100, k=-300, dtype=bool), "key_value_seq_lengths": whole(900, 1100)},
        {"mask": np.arange(1100)[:, None] // 300 == np.arange(1100) // 300},
        {"mask": draw((2, 1, 1100, 1100), 7) < 1},
        {"mask": np.zeros((1100, 1100), bool)},
        {"query_segment_ids": None, "is_causal": True},
        # Indices that these integers cannot count.
        {"key_value_seq_lengths": np.asarray([200, 100], np.uint8)},
    ],
    ids=str,
)
def test_long_sequences_in_blocks(call: dict[str, Any]) -> None:
    """Blocks that no row sees are left out, and the result is the same."""
    if "query_segment_ids" in call:
        ids = np.searchsorted(whole(100, 512, 513, 900), np.arange(1100), side="right")[None]
        call = call | {"query_segment_ids": ids, "key_value_segment_ids": ids}
    arrays = [draw((2, 1100, 1, 4), seed) for seed in range(3)]

    def both(function: Callable[..., Any]) -> Any:
        attend = lambda *heads: function(*heads, **call)  # noqa: E731
        out, pull = jax.vjp(attend, *arrays)
        return out, pull(jnp.cos(out))

    ours = functools.partial(dot_product_attention, max_chunk_size_mb=0.6)
    received, expected = quick_jit(lambda: (both(ours), both(plain)))()
    assert_close(received, expected, 1e-4)


# --- What is excluded -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("by", ["mask", "lengths", "causality", "segments"])
def test_what_is_excluded_never_matters(by: str, plan: str) -> None:
    """Neither keys nor values nor their biases, whatever they are, in output or gradients."""
    arrays = operands((1,), 4, 6, bias=(1, 6))
    cotangent = arrays.pop("cotangent")
    kinds: dict[str, dict[str, Any]] = {
        "mask": {"mask": np.arange(6) < 4},
        "lengths": {"key_value_seq_lengths": whole(4)},
        "causality": {"is_causal": True},
        "segments": {
            "query_segment_ids": np.zeros((1, 4), np.int32),
            "key_value_segment_ids": (np.arange(6)[None] > 3).astype(np.int32),
        },
    }
    implementation, limit = PLANS[plan]
    attend = functools.partial(
        dot_product_attention,
        **kinds[by],
        implementation=implementation,
        max_chunk_size_mb=limit,
    )

    @quick_jit
    def results(filling: jax.Array) -> Any:
        given = {name: jnp.asarray(one) for name, one in arrays.items()}
        given |= {name: given[name].at[:, 4:].set(filling) for name in ("key", "value", "bias")}
        out, pull = jax.vjp(lambda given: attend(**given), given)
        return out, {name: one[:, :4] for name, one in pull(cotangent)[0].items()}

    for poison in (np.nan, np.inf, -np.inf, 3e38):
        assert_close(results(poison), results(0.0), 1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_one_row_sees_does_not_matter_to_another(poison: float, plan: str) -> None:
    """A value that is not finite spoils the rows that see it, and those alone."""
    arrays = operands((1,), 6, 6)
    del arrays["cotangent"]
    implementation, limit = PLANS[plan]
    attend = functools.partial(
        dot_product_attention,
        is_causal=True,
        implementation=implementation,
        max_chunk_size_mb=limit,
    )
    expected = np.array(attend(**arrays))
    arrays["value"] = arrays["value"].copy()
    arrays["value"][0, 3, 1, 2] = poison
    received = np.asarray(attend(**arrays))
    spoilt = np.zeros(expected.shape, bool)
    spoilt[0, 3:, 1, 2] = True
    np.testing.assert_array_equal(np.isfinite(received), ~spoilt)
    np.testing.assert_allclose(received[~spoilt], expected[~spoilt], atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("term", ["mask", "key_value_seq_lengths", "bias"])
def test_rows_whose_logits_overflow_are_finite(term: str, plan: str) -> None:
    """Where keys are excluded, and all that a row sees have logits of -inf by overflow."""
    given: dict[str, Any] = {
        "mask": np.asarray([[[[True, True, False]]]]),
        "key_value_seq_lengths": np.asarray([2], np.int32),
        "bias": np.asarray([[[[0, 0, -np.inf]]]], np.float32),
    }
    implementation, limit = PLANS[plan]
    attend = functools.partial(
        dot_product_attention, max_chunk_size_mb=limit, implementation=implementation
    )
    query, value = np.full((1, 2, 1, 1), 1e30, np.float32), draw((1, 3, 1, 1))
    out, gradient = jax.value_and_grad(
        lambda value: attend(query, -query[:, [0, 1, 1]], value, **{term: given[term]}).sum()
    )(value)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


def test_excluded_keys_that_outweigh_all_others() -> None:
    """Cases where a masked key came through: it is left out, not made small."""
    one = np.ones((1, 1, 1, 1), np.float32)
    key, value = (
        np.asarray(numbers, np.float32)[None, :, None, None]
        for numbers in ((1, 1, 3e38), (1, 2, 5))
    )
    for implementation, limit in PLANS.values():
        plan: dict[str, Any] = {"implementation": implementation, "max_chunk_size_mb": limit}
        out = dot_product_attention(one, key, value, mask=np.arange(3) < 2, scale=1.0, **plan)
        assert float(out.ravel()[0]) == 1.5
        ones = np.ones((1, 2, 1, 1), np.float32)
        bias = np.asarray([-MOST, 0.0], np.float32)
        values = np.asarray([0.0, 9.0], np.float32)[None, :, None, None]
        out = dot_product_attention(ones, ones, values, bias, is_causal=True, **plan)
        assert float(out[0, 0, 0, 0]) == 0.0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("bias", [-MOST, -1e9])
def test_finite_biases_give_finite_results(bias: float, dtype: Any, plan: str) -> None:
    """A padding bias for a whole row gives that row the mean, and spoils no other row."""
    arrays = operands((1,), 3, 4, dtype=dtype)
    cotangent = arrays.pop("cotangent")
    biases = np.zeros((1, 3, 4), np.float32)
    biases[0, 1], biases[0, 2, 2:] = bias, bias
    implementation, limit = PLANS[plan]
    attend = functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=limit
    )

    @quick_jit
    def both(cotangent: Any, *moving: Any) -> Any:
        out, pull = jax.vjp(lambda arrays, bias: attend(**arrays, bias=bias), *moving)
        return out, pull(cotangent)

    out, gradients = both(cotangent, arrays, biases)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradients))
    mean = np.asarray(arrays["value"], np.float32).mean(1)
    near = 2e-2 if dtype != jnp.float32 else 1e-6
    np.testing.assert_allclose(np.asarray(out[:, 1], np.float32), mean, atol=near)


@settings(deadline=None, max_examples=12)
@hypothesis.given(st.data())
def test_extreme_calls_are_finite_where_the_reference_is(data: st.DataObject) -> None:
    """With large numbers all plans agree with float64, and on what is finite."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    sizes = data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    rows, keys = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    lengths = {"query": rows, "key": keys, "value": keys}
    given: Any = {
        name: random.normal(size=(1, length, 2, 3)).astype(np.float32)
        for name, length in lengths.items()
    }
    given["query"] *= sizes
    # Of a bias of -1e9 float64 still tells logits apart, float32 does not.
    lowest = data.draw(st.sampled_from([0.0, -1e20, -1e30, -MOST]))
    given["bias"] = np.where(random.random((2, rows, keys)) < 0.4, lowest, 0).astype(np.float32)
    mask = random.random((1, rows, keys)) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    causal = data.draw(st.booleans())
    with jax.enable_x64(True):
        wide = {name: one.astype(np.float64) for name, one in given.items()}
        expected = plain(**wide, mask=mask, is_causal=causal)
    for implementation, limit in PLANS.values():
        options: dict[str, Any] = {"implementation": implementation, "max_chunk_size_mb": limit}
        received = dot_product_attention(**given, mask=mask, is_causal=causal, **options)
        assert_close(received, expected, 1e-4)


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", [True, False])
def test_what_is_dropped_depends_on_no_plan(broadcast: bool) -> None:
    """Nor on slices or vmap; gradients are of the same weights."""
    arrays = operands((2,), 12, 10, 4, 2, 8, 6)
    cotangent = arrays.pop("cotangent")
    dropped: dict[str, Any] = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3)}
    dropped["broadcast_dropout"] = broadcast

    def results(plan: str) -> Any:
        implementation, limit = PLANS[plan]
        attend = functools.partial(
            dot_product_attention,
            implementation=implementation,
            max_chunk_size_mb=limit,
            **dropped,
        )
        out, pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
        return out, pull(cotangent)[0]

    expected = results("dense")
    for plan in list(PLANS)[1:]:
        assert_close(quick_jit(functools.partial(results, plan))(), expected, 1e-5)
    attend = functools.partial(dot_product_attention, max_chunk_size_mb=1.0, **dropped)
    out = jax.vmap(lambda arrays: attend(**arrays))(arrays)
    if broadcast:
        assert_close(out, expected[0], 1e-5)


def test_dropped_weights_are_made_up_for() -> None:
    """Of each row about the share that was asked for; rate zero drops none and needs no key."""
    size = 400
    query, key = np.zeros((1, size, 2, 1), np.float32), np.zeros((1, size, 2, 1), np.float32)
    value = np.broadcast_to(np.eye(size, dtype=np.float32)[None, :, None], (1, size, 2, size))
    attend = functools.partial(dot_product_attention, query, key, value, max_chunk_size_mb=1.0)
    weights = np.asarray(
        attend(dropout_rate=0.25, dropout_rng=jax.random.key(1), broadcast_dropout=False)
    )
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / 0.75 / size, rtol=1e-5)
    deviation = np.sqrt(0.25 * 0.75 / size)
    for axis in (1, 3):  # rows, keys
        shares = kept.mean(axis)
        assert np.abs(shares - 0.75).max() < 5 * deviation
        assert 0.7 * deviation < shares.std() < 1.3 * deviation
    both = kept[0, :, 0] == kept[0, :, 1]
    assert abs(both.mean() - (0.75**2 + 0.25**2)) < 0.01
    assert_close(attend(dropout_rate=0.0), attend())


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("given_by", ["argument", "context"])
def test_precision_reaches_every_product(given_by: str, plan: str, mode: str) -> None:
    """Also where it is in force where the call is traced only."""
    implementation, limit = PLANS[plan]
    heads = [draw((1, 12, 2, 4), seed) for seed in range(3)]

    def attend(*heads: Any) -> Any:
        options: dict[str, Any] = {"max_chunk_size_mb": limit, "implementation": implementation}
        if given_by == "argument":
            return dot_product_attention(*heads, precision="highest", **options)
        with jax.default_matmul_precision("highest"):
            return dot_product_attention(*heads, **options)

    function = attend if mode == "forward" else jax.grad(lambda *a: jnp.sum(attend(*a)), (0, 1, 2))
    lines = jax.jit(function).lower(*heads).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_results_over_sets_of_keys_can_be_merged() -> None:
    """By their residuals, and with right gradients: what ring attention does."""
    arrays = operands((2,), 7, 10)
    cotangent = arrays.pop("cotangent")

    def merged(query: Any, key: Any, value: Any) -> Any:
        attend: Any = functools.partial(dot_product_attention, return_residual=True)
        halves = [
            attend(query, key[:, part], value[:, part], max_chunk_size_mb=1e-4)
            for part in (slice(0, 3), slice(3, 10))
        ]
        total = jnp.logaddexp(*(lse for _, lse in halves))
        return sum(out * jnp.exp(lse - total)[..., None] for out, lse in halves)

    heads = [arrays[name] for name in ("query", "key", "value")]

    def both(function: Callable[..., Any]) -> Any:
        out, pull = jax.vjp(function, *heads)
        return out, pull(cotangent)

    received, expected = quick_jit(lambda: (both(merged), both(plain)))()
    assert_close(received, expected, 1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_attention_is_linear_in_its_values(plan: str) -> None:
    """It can be transposed with respect to them, as jax.nn's can."""
    arrays = operands((2,), 6, 5)
    implementation, limit = PLANS[plan]

    def of_values(value: Any) -> Any:
        options: dict[str, Any] = {"implementation": implementation, "max_chunk_size_mb": limit}
        return dot_product_attention(
            arrays["query"], arrays["key"], value, is_causal=True, **options
        )

    shape = jax.ShapeDtypeStruct(arrays["value"].shape, np.float32)
    (received,) = jax.linear_transpose(of_values, shape)(arrays["cotangent"])
    _, pull = jax.vjp(of_values, arrays["value"])
    assert_close(received, pull(arrays["cotangent"])[0])
    with pytest.raises(NotImplementedError, match="linear in its values alone"):
        jax.linear_transpose(
            lambda query: dot_product_attention(query, arrays["key"], arrays["value"]),
            jax.ShapeDtypeStruct(arrays["query"].shape, np.float32),
        )(arrays["cotangent"])


def test_taylor_series() -> None:
    """``jax.experimental.jet`` goes through it, as through jax.nn's."""
    query, key, value = (draw((1, 4, 1, 3), seed) for seed in range(3))

    def series(function: Callable[..., Any]) -> Any:
        attend = lambda query: function(query, key, value)  # noqa: E731
        return jet.jet(attend, (query,), ((jnp.ones_like(query), jnp.zeros_like(query)),))

    plainly: Any = jax.nn.dot_product_attention
    ours = functools.partial(dot_product_attention, max_chunk_size_mb=None)
    assert_close(series(ours), series(plainly), 1e-4)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"key_value_seq_lengths": whole(1, 2, 3)}, r"broadcast to \[\.\.\.\] = \(2,\)"),
    "float length": ({"query_seq_lengths": np.ones(2)}, "must be integer"),
    "window": ({"local_window_size": -1}, "local_window_size must be a number of positions"),
    "three": ({"local_window_size": (1, 2, 3)}, "or two"),
    "one segment": ({"query_segment_ids": np.zeros((2, 12), int)}, "must be given together"),
    "cap": ({"logits_soft_cap": 0.0}, "must be positive"),
    "slopes": ({"alibi_slopes": np.ones(3)}, r"\[\.\.\., H\] = \(2, 4\)"),
    "rate": ({"dropout_rate": 1.0}, r"\[0, 1\)"),
    "no key": ({"dropout_rate": 0.5}, "dropout_rng is required"),
    "bad key": ({"dropout_rate": 0.5, "dropout_rng": 3.5}, "dropout_rng must be one key"),
    "traced cap": ({"logits_soft_cap": "much"}, "known while tracing"),
}


@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    """Errors say what was required and what was received."""
    with pytest.raises(ArgumentError, match=said):
        dot_product_attention(**arrays_of({}), **options)


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_with_a_cache(rows: int) -> None:
    """A few queries at the end of what is in a cache, of another length for each element."""
    length, query = 700, draw((3, rows, 2, 4))
    key, value = (draw((3, length, 2, 4), seed) for seed in (1, 2))
    lengths = whole(rows, 350, length)
    options = {"key_value_seq_lengths": lengths, "query_offset": lengths - rows}

    def attend(function: Callable[..., Any]) -> Any:
        run = jax.jit(lambda options: function(query, key, value, is_causal=True, **options))
        return run(options)

    for limit in (None, 5e-3):
        ours = functools.partial(dot_product_attention, max_chunk_size_mb=limit)
        assert_close(attend(ours), attend(plain), 1e-5)
