"""``dot_product_attention``: what it computes, how exactly, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from factories import make_profile, one_plan, quick_jit
from reference import (
    Arrays,
    assert_close,
    draw,
    draw_mask,
    exact,
    operands,
    output_and_gradients,
    plain,
    temp_bytes,
)

import autochunk
from autochunk import Plan, dot_product_attention, use
from autochunk.attention import checks
from autochunk.device import detect
from autochunk.errors import ArgumentError
from autochunk.store.profiles import ProfileStore
from autochunk.workload import Workload

# Limits in MB for logits of a few hundred bytes: none, and one that slices over everything.
HALF = ml_dtypes.bfloat16
NO_LIMIT, TINY = None, 1.2e-5


def run(arrays: Arrays, **settings: Any) -> dict[str, np.ndarray[Any, Any]]:
    return output_and_gradients(functools.partial(dot_product_attention, **settings), arrays)


# --- What it computes -----------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "queries fewer than keys": {"rows": 3, "keys": 7},
    "queries more than keys": {"rows": 7, "keys": 3},
    "one query, as when decoding": {"rows": 1, "keys": 11},
    "value size larger than key size": {"key_size": 3, "value_size": 5},
    "value size one": {"key_size": 3, "value_size": 1},
    "two query heads to a key head": {"heads": 4, "kv_heads": 2},
    "one key head": {"heads": 3, "kv_heads": 1},
    "no leading dims": {"leading": ()},
    "two leading dims": {"leading": (2, 3), "rows": 2, "keys": 3},
    "three leading dims": {"leading": (2, 1, 3), "rows": 3, "keys": 2},
    "primes": {"leading": (3,), "rows": 7, "keys": 5, "heads": 3},
    "all ones": {"leading": (1,), "rows": 1, "keys": 1, "heads": 1, "key_size": 1},
}


@pytest.mark.parametrize("shape", SHAPES.keys())
def test_shapes(shape: str) -> None:
    """Whatever the shape and the slices, output and gradients are attention's."""
    arrays = operands(**SHAPES[shape])
    implementation, limit = ("xla", TINY) if list(SHAPES).index(shape) % 3 else ("xla_rows", 2e-5)
    assert_close(run(arrays, max_chunk_size_mb=limit, implementation=implementation), exact(arrays))


@pytest.mark.parametrize("limit", [2.0e-4, 6.2e-5, 8e-6])
@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_limits(implementation: str, limit: float) -> None:
    """The limit decides the slices, never the result.

    Slices of batch, of heads, of rows, of keys, of all of them, down to a single logit per head.
    """
    arrays = operands(
        leading=(3,), rows=5, keys=3, heads=4, kv_heads=2, bias=(4, 5, 3), mask=(3, 1, 5, 3)
    )
    assert_close(run(arrays, max_chunk_size_mb=limit, implementation=implementation), exact(arrays))


@pytest.mark.parametrize(
    "settings",
    [{"max_chunk_size_mb": None}, {"max_chunk_size_mb": 1e-4, "implementation": "dense"}],
    ids=["no limit", "dense"],
)
def test_unsliced(settings: dict[str, Any]) -> None:
    """The result is the same without a limit, and in haiku's order of operations, never sliced."""
    arrays = operands(heads=4, kv_heads=2, value_size=3, bias=(1, 4, 6, 1), mask=(2, 1, 6, 5))
    expected = exact(arrays, is_causal=True, scale=0.3)
    assert_close(run(arrays, is_causal=True, scale=0.3, **settings), expected)


TERMS = [
    *[(2, 4, 6, 5), (1, 4, 6, 5), (2, 1, 6, 5), (2, 4, 1, 5), (2, 4, 6, 1), (1, 1, 1, 1)],
    *[(4, 6, 5), (1, 6, 1), (6, 5), (5,), (1,), ()],
]


@pytest.mark.parametrize("shape", TERMS, ids=str)
def test_bias_and_mask_broadcast(shape: tuple[int, ...]) -> None:
    """Bias and mask may have size one in any dim, and fewer dims than the logits.

    The bias's gradient has the bias's shape.
    """
    mask = shape[::-1] if shape == (1, 6, 1) else shape
    arrays = operands(heads=4, kv_heads=2, bias=shape, mask=mask)
    implementation, limit = ("xla", TINY) if len(shape) % 2 else ("xla_rows", 6.2e-5)
    assert_close(run(arrays, max_chunk_size_mb=limit, implementation=implementation), exact(arrays))


@pytest.mark.parametrize("leading", [(), (3, 2)], ids=str)
@pytest.mark.parametrize("term", ["bias", "mask"])
def test_bias_and_mask_broadcast_over_any_leading_dims(leading: tuple[int, ...], term: str) -> None:
    """Some leading dims of a term may be its own and others broadcast."""
    terms: dict[str, Any] = {term: (*leading[:-1], *(1 for _ in leading[-1:]), 2, 1, 5)}
    arrays = operands(leading=leading, rows=3, keys=5, **terms)
    assert_close(run(arrays, max_chunk_size_mb=TINY), exact(arrays))


CAUSAL: dict[str, dict[str, Any]] = {
    "square": {"rows": 6, "keys": 6},
    "more keys": {"rows": 3, "keys": 7},
    "more queries": {"rows": 7, "keys": 3},
    "masked and biased": {"heads": 4, "kv_heads": 2, "mask": (2, 1, 1, 5), "bias": (4, 6, 5)},
}


@pytest.mark.parametrize(("implementation", "limit"), [("xla", TINY), ("xla_rows", 1e-4)])
@pytest.mark.parametrize("shape", CAUSAL.values(), ids=CAUSAL.keys())
def test_causal(shape: dict[str, Any], implementation: str, limit: float) -> None:
    """Query i sees keys 0 to i, counted from the first of each, also where slices begin elsewhere.

    A mask is a further restriction.
    """
    arrays = operands(**shape)
    assert_close(
        run(arrays, is_causal=True, max_chunk_size_mb=limit, implementation=implementation),
        exact(arrays, is_causal=True),
    )


@pytest.mark.parametrize(
    ("implementation", "limit", "dtype", "tolerance"),
    [
        ("xla", NO_LIMIT, np.float32, 2e-5),
        ("xla", TINY, np.float32, 2e-5),
        ("xla", TINY, np.float16, 4e-3),
        ("xla", 1e-4, ml_dtypes.bfloat16, 3e-2),
        ("xla_rows", 1e-4, np.float16, 4e-3),
    ],
)
def test_rows_that_are_masked_throughout(
    implementation: str, limit: float | None, dtype: Any, tolerance: float
) -> None:
    """They give the mean of all values, whatever the bias, and no NaN in any gradient."""
    arrays = operands(bias=(2, 6, 5), dtype=dtype)
    arrays["mask"] = draw_mask((2, 1, 6, 5))
    arrays["mask"][0, :, :2] = arrays["mask"][1] = False
    received = run(arrays, max_chunk_size_mb=limit, implementation=implementation)
    assert_close(received, exact(arrays), tolerance)
    mean = np.broadcast_to(np.mean(np.asarray(arrays["value"][1], np.float64), axis=0), (6, 2, 4))
    assert_close(received["output"][1], mean, tolerance)


@pytest.mark.parametrize(
    ("scale", "limit", "kind"), [(0.0, None, "mask"), (0.7, TINY, "causal"), (-1.5, 1e-4, "mask")]
)
def test_scale(scale: float, limit: float | None, kind: str) -> None:
    """The logits are multiplied by ``scale``, before the bias is added.

    Zero and negative ones are numbers like others.
    """
    arrays = operands(bias=(6, 5), mask=(6, 5) if kind == "mask" else None)
    is_causal = kind == "causal"
    assert_close(
        run(arrays, scale=scale, is_causal=is_causal, max_chunk_size_mb=limit),
        exact(arrays, scale=scale, is_causal=is_causal),
    )


@pytest.mark.parametrize("empty", ["leading", "rows", "keys"])
def test_empty(empty: str) -> None:
    """A call with nothing to do gives an output of the right shape and zeros for gradients.

    No keys at all give zeros.
    """
    size: dict[str, Any] = {empty: (0,) if empty == "leading" else 0}
    arrays = operands(**size)
    *leading, rows, _, _ = arrays["query"].shape
    arrays["bias"] = draw((*leading, 1, rows, arrays["key"].shape[-3]))
    zeros = {name: 0 * array for name, array in arrays.items()}
    zeros["output"] = zeros.pop("cotangent")
    assert_close(run(arrays, max_chunk_size_mb=TINY), zeros)


JAX_CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "cross, grouped": {"rows": 3, "keys": 7, "heads": 4, "kv_heads": 2},
    "bias and mask": {"bias": (1, 2, 6, 5), "mask": (2, 1, 6, 5)},
    "causal, grouped": {"heads": 4, "kv_heads": 2, "is_causal": True},
    "scale, no leading dims": {"leading": (), "scale": 0.25},
}


@pytest.mark.parametrize("call", JAX_CALLS.values(), ids=JAX_CALLS.keys())
def test_like_jax(call: dict[str, Any]) -> None:
    """Where ``jax.nn.dot_product_attention`` takes the same arguments it gives the same result."""
    settings = {name: call[name] for name in call.keys() & {"is_causal", "scale"}}
    arrays = operands(**{name: call[name] for name in call.keys() - settings.keys()})
    theirs = functools.partial(jax.nn.dot_product_attention, **settings)
    expected = output_and_gradients(theirs, arrays)
    assert_close(run(arrays, max_chunk_size_mb=TINY, **settings), expected)


@pytest.mark.parametrize(
    "dtype",
    [np.float32, ml_dtypes.bfloat16, np.float16, np.float64],
    ids=["f32", "bf16", "f16", "f64"],
)
def test_dtypes(dtype: Any) -> None:
    """Output and gradients have the inputs' dtype, and the bias's gradient the bias's."""
    with jax.enable_x64(dtype == np.float64):
        arrays = operands(dtype=dtype) | {"bias": draw((6, 5))}
        received = run(arrays, max_chunk_size_mb=TINY)
        dtypes = dict.fromkeys(received, np.dtype(dtype)) | {"bias": np.dtype(np.float32)}
        assert {name: array.dtype for name, array in received.items()} == dtypes
        tolerance = 1e-6 if dtype == np.float64 else 1e-1 if dtype == ml_dtypes.bfloat16 else 1e-2
        assert_close(received, exact(arrays), tolerance)


def test_float64_is_computed_in_float64() -> None:
    """Nothing on the way is rounded to float32."""
    with jax.enable_x64(True):
        arrays = operands(dtype=np.float64, bias=(6, 5), mask=(2, 1, 6, 5))
        assert_close(run(arrays, max_chunk_size_mb=2.4e-5), exact(arrays), 1e-14)


# --- How exactly ----------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``operands``, and settings of the op."""
    size = st.integers(1, 9)
    batch, rows, keys = draw(st.integers(1, 3)), draw(size), draw(size)
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = kv_heads * groups
    whole = (batch, heads, rows, keys)
    term = st.none() | st.tuples(*(st.sampled_from([1, length]) for length in whole))
    shape = {
        "leading": (batch,),
        "rows": rows,
        "keys": keys,
        "heads": heads,
        "kv_heads": kv_heads,
        "bias": draw(term),
        "mask": draw(term),
    }
    logits_bytes = 4 * math.prod(whole)
    limit = draw(st.integers(4 * groups, max(4 * groups, logits_bytes))) / 1e6
    return shape, {
        "max_chunk_size_mb": limit,
        "is_causal": draw(st.booleans()),
        "implementation": draw(st.sampled_from(["xla", "xla_rows"])),
    }


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["f32", "bf16", "f16"]
)
@hypothesis.settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
)
@hypothesis.given(calls())
def test_accuracy(dtype: Any, call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Against float64, no result errs more than twice what dense attention in the same dtype does.

    A few roundings are let through besides.
    """
    shape, settings = call
    arrays = operands(**shape, dtype=dtype)
    expected = exact(arrays, is_causal=settings["is_causal"])
    received = run(arrays, **settings)
    dense = run(
        arrays, is_causal=settings["is_causal"], implementation="dense", max_chunk_size_mb=None
    )
    for name, array in expected.items():
        error, dense_error = (
            np.max(np.abs(np.asarray(result[name], np.float64) - array))
            for result in (received, dense)
        )
        # Of the result, and of sums of terms that cancel: the output is kept in the inputs' dtype.
        rounding = 4 * float(ml_dtypes.finfo(dtype).eps) + 16 * float(np.finfo(np.float32).eps)
        assert error <= 2 * dense_error + rounding * max(1.0, np.max(np.abs(array))), name


def root_mean_square_error(received: Any, expected: Any) -> float:
    """In float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(received, np.float64) - expected))))


@pytest.mark.parametrize(
    ("form", "dtype", "limit"),
    [
        *itertools.product(["plain", "causal"], [np.float32, HALF], [NO_LIMIT, 0.1, 0.002]),
        # A row's own sum is taken anew there, but in slices of its keys.
        *itertools.product(["bias", "mask", "lengths"], [HALF], [NO_LIMIT, 0.1, 0.0003]),
        *itertools.product(["bias", "mask", "lengths"], [np.float32], [NO_LIMIT]),
    ],
)
def test_what_keys_have_in_common_costs_no_accuracy(
    form: str, limit: float | None, dtype: Any
) -> None:
    """The query's gradient errs no more than jax.nn's: the row's own sum is rounded otherwise.

    By the root of the mean square, against float64.
    """
    shape: dict[str, Any] = {"leading": (1,), "rows": 130, "keys": 130, "heads": 2, "key_size": 32}
    shape |= {"bias": (1, 2, 130, 130)} if form == "bias" else {}
    arrays = operands(**shape, dtype=dtype)
    for name in ("query", "key", "value"):
        arrays[name] = (1.5 + 0.3 * arrays[name].astype(np.float32)).astype(dtype)
    options: dict[str, Any] = {"causal": {"is_causal": True}, "bias": {"bias": arrays.get("bias")}}
    options["mask"] = {"mask": np.arange(130)[None, None, None] < 100}
    options["lengths"] = {"key_value_seq_lengths": np.array([100])}
    known = {"mask": options["mask"]["mask"]} if form in ("mask", "lengths") else {}
    expected = exact(arrays | known, is_causal=form == "causal")["query"]

    def error(function: Callable[..., jax.Array]) -> float:
        def summed(query: jax.Array) -> jax.Array:
            out = function(query, arrays["key"], arrays["value"], **options.get(form, {}))
            return jnp.sum(out * arrays["cotangent"])

        return root_mean_square_error(jax.jit(jax.grad(summed))(arrays["query"]), expected)

    ours = functools.partial(dot_product_attention, max_chunk_size_mb=limit)
    assert error(ours) <= 1.2 * error(jax.nn.dot_product_attention)


@pytest.mark.parametrize("form", ["plain", "causal", "mask"])
@pytest.mark.parametrize(("plan", "limit"), [("dense", None), ("xla", NO_LIMIT), ("xla", 0.05)])
def test_half_precision_errs_no_more_than_jax_nn(plan: Any, limit: float | None, form: str) -> None:
    """Each gradient, by the root of the mean square against float64, by whatever plan."""
    arrays = operands((2,), 96, 96, 2, key_size=32, dtype=HALF)
    mask = np.random.default_rng(1).random((2, 1, 96, 96)) < 0.7
    options: dict[str, Any] = {"causal": {"is_causal": True}, "mask": {"mask": mask}}
    known = {"mask": mask} if form == "mask" else {}
    expected = exact(arrays | known, is_causal=form == "causal")
    names = ("query", "key", "value")
    moving = [arrays[name] for name in names]

    def errors(function: Callable[..., jax.Array]) -> dict[str, float]:
        def both(*moving: jax.Array) -> Any:
            out, pull = jax.vjp(lambda *a: function(*a, **options.get(form, {})), *moving)
            return out, *pull(arrays["cotangent"])

        results = zip(("output", *names), jax.jit(both)(*moving), strict=True)
        return {name: root_mean_square_error(one, expected[name]) for name, one in results}

    ours = functools.partial(dot_product_attention, max_chunk_size_mb=limit, implementation=plan)
    theirs = errors(jax.nn.dot_product_attention)
    for name, error in errors(ours).items():
        assert error <= 1.2 * theirs[name], name


@pytest.mark.parametrize("far", [np.nan, np.inf, 1e30])
def test_a_key_far_from_the_others_is_no_matter_of_rows_that_do_not_see_it(far: float) -> None:
    """The query's gradient in these rows is that without it."""
    arrays = operands(leading=(1,), rows=64, keys=64, heads=2, key_size=8)
    query, key, value = (arrays[name] + 2 for name in ("query", "key", "value"))

    @jax.jit
    def gradient(key: jax.Array) -> jax.Array:
        def summed(query: jax.Array) -> jax.Array:
            out = dot_product_attention(query, key, value, is_causal=True, max_chunk_size_mb=0.004)
            return jnp.sum(jnp.sin(out[:, :-1]))

        found: jax.Array = jax.grad(summed)(query)
        return found[:, :-1]

    spoilt = np.concatenate([key[:, :-1], np.full_like(key[:, -1:], far)], axis=1)
    np.testing.assert_allclose(gradient(spoilt), gradient(key), atol=1e-5)


@pytest.mark.parametrize("limit", [NO_LIMIT, TINY])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_large_logits(dtype: Any, limit: float | None) -> None:
    """Logits of 10^4 overflow nothing: the largest takes all the weight."""
    arrays = operands(mask=(2, 1, 1, 5), dtype=dtype)
    for name in ("query", "key"):  # the dtype of 100 times bfloat16 depends on NumPy's version
        arrays[name] = (100 * arrays[name].astype(np.float32)).astype(dtype)
    received = run(arrays, max_chunk_size_mb=limit)
    assert all(np.isfinite(np.asarray(array, np.float32)).all() for array in received.values())
    assert_close(received["output"], exact(arrays)["output"], 0.02)


@pytest.mark.parametrize(
    ("where", "implementation", "limit"),
    [
        ("one key", "xla", NO_LIMIT),
        ("one key", "xla", TINY),
        ("one key", "xla_rows", 1e-4),
        ("one key", "xla", 4e-6),
        ("a whole slice of keys", "xla", TINY),
        ("a whole slice of keys", "xla_rows", TINY),
    ],
)
def test_bias_of_minus_infinity(where: str, implementation: str, limit: float | None) -> None:
    """A bias of -inf takes its key out, as ``jax.nn.dot_product_attention`` has it.

    As long as one key is left there is no NaN.
    """
    arrays = operands(bias=(6, 5))
    arrays["bias"][:, 1:2] = -np.inf
    if where != "one key":
        arrays["bias"][:3, :3] = arrays["bias"][3:, 2:] = -np.inf
    assert_close(run(arrays, max_chunk_size_mb=limit, implementation=implementation), exact(arrays))


@pytest.mark.parametrize(
    ("implementation", "limit"), [("xla", None), ("xla", 0.3), ("xla_rows", 0.1)]
)
def test_rows_that_see_nothing_but_minus_infinity(implementation: str, limit: float | None) -> None:
    """Causal attention over a text that a bias of -inf pads on the left has no NaN.

    What the padding's rows come to reaches no gradient.
    """
    padding = 300
    arrays = operands((1,), 512, 512, bias=(1, 1, 512))
    arrays["bias"][..., :padding] = -np.inf
    arrays["cotangent"][:, :padding] = 0
    received = run(arrays, is_causal=True, max_chunk_size_mb=limit, implementation=implementation)
    expected = output_and_gradients(functools.partial(plain, is_causal=True), arrays)
    assert np.isfinite(received["output"]).all()
    for results in (received, expected):
        results["output"] = results["output"][:, padding:]
    assert_close(received, expected)


def test_small_cotangents_of_long_rows_in_float16() -> None:
    """Products of numbers near float16's least keep what they can.

    Such are weights of thousands of keys, and cotangents as loss scaling leaves them.
    """
    arrays = operands((1,), 64, 2048, 1, dtype=np.float16)
    arrays["query"] *= 0.1
    arrays["cotangent"] = (1e-4 * arrays["cotangent"].astype(np.float32)).astype(np.float16)
    expected = exact(arrays)
    received, dense = (
        run(arrays, max_chunk_size_mb=None, implementation=name) for name in ("xla", "dense")
    )
    for name, array in expected.items():
        error, dense_error = (
            np.linalg.norm(np.asarray(result[name], np.float64) - array)
            for result in (received, dense)
        )
        assert error <= 1.2 * dense_error, name


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_rows_masked_throughout_without_slices_in_float16(implementation: str) -> None:
    """Such a row is the mean of the values, whatever the implementation and the dtype."""
    arrays = operands(dtype=np.float16) | {"mask": np.zeros((6, 5), bool)}
    with np.errstate(over="ignore"):
        received = run(arrays, max_chunk_size_mb=None, implementation=implementation)
        assert_close(received, exact(arrays), 4e-3)


# --- What "auto" comes to -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    ("limit", "implementation"), [(1e-4, "xla"), (TINY, "xla_rows"), (None, "xla"), (None, "dense")]
)
def test_auto_leaves_no_trace(limit: float | None, implementation: str, mode: str) -> None:
    """The program of "auto" is, to the letter, that of the plan it came to."""
    arrays = operands(bias=(2, 6, 5))
    del arrays["cotangent"]

    def lowered(**settings: Any) -> str:
        def attend(arrays: Arrays) -> jax.Array:
            return jnp.sum(dot_product_attention(**arrays, **settings))

        return jax.jit(attend if mode == "forward" else jax.grad(attend)).lower(arrays).as_text()

    with autochunk.use(max_chunk_size_mb=limit, implementation=implementation):
        auto = lowered(max_chunk_size_mb="auto")
    assert auto == lowered(max_chunk_size_mb=limit, implementation=implementation)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("plan", [Plan("xla"), Plan("dense")], ids=str)
def test_auto_keeps_to_what_was_measured_under_vmap(plan: Plan, mode: str) -> None:
    """A plan without slices was measured on one element.

    A batch of them has its logits at once up to the default of 1000 MB, and no further.
    """
    workload = Workload.parse("t=1024,h=4,k=8", mode=mode)
    ProfileStore().put(make_profile(workload, detect(), one_plan(None, plan.implementation)))
    attend = jax.vmap(dot_product_attention)
    training = jax.grad(lambda *arrays: jnp.sum(attend(*arrays)))
    function = attend if mode == "forward" else training

    def sliced(batch: int) -> bool:
        array = jax.ShapeDtypeStruct((batch, 1, 1024, 4, 8), jnp.float32)  # 16.8 MB of logits each
        return "while" in jax.jit(function).lower(array, array, array).as_text()

    assert [sliced(batch) for batch in (1, 59, 60)] == [False, False, True]


def _export(sizes: str, **settings: Any) -> Any:
    """The op as ``jax.export`` has it, of [..., T, 2, 4] with symbolic sizes such as "b, t"."""
    query = jax.ShapeDtypeStruct((*jax.export.symbolic_shape(sizes), 2, 4), jnp.float32)
    attend = jax.jit(lambda query: dot_product_attention(query, query, query, **settings))
    return jax.export.export(attend)(query)


def test_sizes_that_are_not_known() -> None:
    """Symbolic sizes, as ``jax.export`` has them, are no sizes to slice by.

    The error says what takes them.
    """
    pinned = {"implementation": "xla", "max_chunk_size_mb": None}
    cure = r"sizes but the leading.*implementation='dense' with max_chunk_size_mb=None"
    for settings in ({}, {"max_chunk_size_mb": 1.0}, pinned):
        with pytest.raises(ArgumentError, match=cure):
            _export("b, t", **settings)
    unsliced = _export("b, t", implementation="dense", max_chunk_size_mb=None)
    assert str(unsliced.out_avals[0].shape) == "(b, t, 2, 4)"


@pytest.mark.parametrize(
    ("limit", "implementation"), [(None, "xla"), (None, "dense"), (1e-4, "xla"), (None, "xla_rows")]
)
@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"local_window_size": (2, 0)}], ids=str)
def test_a_batch_that_is_not_known(
    limit: float | None, implementation: str, call: dict[str, Any]
) -> None:
    """It may be symbolic, of several dims too, where slices do not depend on it."""
    plan: dict[str, Any] = {"max_chunk_size_mb": limit, "implementation": implementation}
    exported = _export("b, c, 9", **call, **plan)
    for batch in ((1, 1), (3, 2)):
        query = draw((*batch, 9, 2, 4))
        ours = functools.partial(dot_product_attention, **call, **plan)
        expected = quick_jit(ours)(query, query, query)
        np.testing.assert_allclose(quick_jit(exported.call)(query), expected, atol=1e-6)


def test_a_batch_on_which_slices_depend() -> None:
    """It must be known."""
    with pytest.raises(ArgumentError, match=r"symbolic.*max_chunk_size_mb=None.*got max_chunk"):
        _export("b, 9", max_chunk_size_mb=1.0)


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
@pytest.mark.parametrize("limit", [None, 1e-4, 17.0])
def test_auto_for_a_batch_that_is_not_known(limit: float | None) -> None:
    """What is best for one element, cut smaller where it would take several at once."""
    with use(max_chunk_size_mb=limit):
        exported = _export("b, 9", is_causal=True)
        for batch in (1, 3):
            query = draw((batch, 9, 2, 4))
            expected = dot_product_attention(query, query, query, is_causal=True)
            np.testing.assert_allclose(exported.call(query), expected, atol=1e-6)


@pytest.mark.parametrize("limit", [1.0, None, "auto"])
def test_features_of_size_zero(limit: Any) -> None:
    """All logits are zero, and all values weigh alike, as in ``jax.nn.dot_product_attention``."""
    query, value = np.ones((1, 3, 1, 0), np.float32), draw((1, 3, 1, 2))
    out = dot_product_attention(query, query, value, max_chunk_size_mb=limit)
    mean = value.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(mean, (1, 3, 1, 2)), rtol=1e-6)


def test_auto_is_the_default() -> None:
    """Without a limit, it is "auto" that answers."""
    arrays = operands()
    del arrays["cotangent"]
    with autochunk.use(max_chunk_size_mb=1e-9), pytest.raises(ArgumentError, match="larger limit"):
        jax.jit(lambda: dot_product_attention(**arrays)).lower()


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_auto_compiles_to_the_same_code(mode: str) -> None:
    """The compiled code is the same, too."""
    arrays = operands()
    del arrays["cotangent"]

    def attend(arrays: Arrays, limit: Any) -> jax.Array:
        return jnp.sum(dot_product_attention(**arrays, max_chunk_size_mb=limit))

    jitted = jax.jit(attend if mode == "forward" else jax.grad(attend), static_argnums=1)
    texts = []
    for limit in ("auto", 1e-4):  # lowered from one place, because the text names lines of source
        with autochunk.use(max_chunk_size_mb=1e-4):
            texts.append(jitted.lower(arrays, limit).compile().as_text())
    assert texts[0] == texts[1]


# --- What it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [0, 0.0, -1, math.nan, math.inf, -math.inf, True, "big", "", (1,), np.ones(2), 1j],
    ids=repr,
)
def test_limits_that_are_none(limit: Any) -> None:
    """A limit is a positive finite number, None or "auto"; the error says so, and what it got."""
    required = r'max_chunk_size_mb must be a positive finite number .* None .* or "auto"'
    with pytest.raises(ArgumentError, match=required) as caught:
        dot_product_attention(*(np.ones((1, 2, 1, 2)),) * 3, max_chunk_size_mb=limit)
    assert repr(limit) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("limit", [1, 0.5, np.float32(0.5), np.int64(2), 10**6], ids=repr)
def test_any_real_number_is_a_limit(limit: Any) -> None:
    """Fractions, integers and numpy's scalars are limits."""
    attend = functools.partial(dot_product_attention, max_chunk_size_mb=limit)
    shape = jax.eval_shape(attend, *(jnp.ones((1, 2, 1, 2)),) * 3)
    assert shape.shape == (1, 2, 1, 2)


def test_a_limit_smaller_than_a_logit() -> None:
    """The smallest slice is one logit for each query head of a key head.

    A limit below that is refused with both numbers of bytes.
    """
    arrays = operands(heads=4, kv_heads=2)
    del arrays["cotangent"]
    refusal = r"7 bytes, less than the 8 bytes of the smallest slice possible"
    with pytest.raises(ArgumentError, match=refusal):
        dot_product_attention(**arrays, max_chunk_size_mb=7e-6)


def _shaped(*shapes: tuple[int, ...]) -> Arrays:
    arrays = (np.ones(shape, np.float32) for shape in shapes)
    return dict(zip(("query", "key", "value"), arrays, strict=True))


# The shapes of operands() and their logits.
Q, K, LOGITS = (2, 6, 2, 4), (2, 5, 2, 4), "(2, 2, 6, 5)"


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "implementation": (
        {"implementation": "cuda"},
        ["implementation", "'xla'", "'xla_rows'", "'dense'", "'cuda'"],
    ),
    "implementation of another type": ({"implementation": 1}, ["implementation", "1"]),
    "rank of query": (_shaped((6, 4), (5, 4), (5, 4)), ["query", "rank 3", "(6, 4)"]),
    "rank of key": (_shaped(Q, (5, 2, 4), K), ["key", "rank 4", "(5, 2, 4)"]),
    "rank of value": (_shaped(Q, K, (1, *K)), ["value", "rank 4", "(1, 2, 5, 2, 4)"]),
    "leading dims of key": (
        _shaped(Q, (3, 5, 2, 4), K),
        ["key", "leading dims (2,)", "(3, 5, 2, 4)"],
    ),
    "leading dims of value": (
        _shaped(Q, K, (1, 5, 2, 4)),
        ["value", "leading dims (2,)", "(1, 5, 2, 4)"],
    ),
    "size of key": (_shaped(Q, (2, 5, 2, 3), K), ["key", "last dim 4", "(2, 5, 2, 3)"]),
    "length of value": (_shaped(Q, K, (2, 6, 2, 4)), ["value", "(5, 2)", "(6, 2)"]),
    "heads of value": (_shaped(Q, (2, 5, 1, 4), K), ["value", "(5, 1)", "(5, 2)"]),
    "heads that do not divide": (_shaped((2, 6, 3, 4), K, K), ["heads", "multiple", "3", "2"]),
    "more key heads": (_shaped(Q, *[(2, 5, 4, 4)] * 2), ["heads", "multiple", "2", "4"]),
    "no key heads": (_shaped(Q, *[(2, 5, 0, 4)] * 2), ["heads", "2", "0"]),
    "integers": ({"query": np.ones(Q, np.int32)}, ["query", "float32", "bfloat16", "int32"]),
    "complex numbers": ({"query": np.ones(Q, np.complex64)}, ["query", "float32", "complex64"]),
    "dtype of key": ({"key": np.ones(K, np.float16)}, ["key", "float32", "float16"]),
    "dtype of value": ({"value": np.ones(K, np.float16)}, ["value", "float32", "float16"]),
    "not an array": ({"key": "text"}, ["key", "array", "str"]),
    "None": ({"value": None}, ["value", "array", "NoneType"]),
    "mask of integers": ({"mask": np.ones((6, 5), np.int32)}, ["mask", "boolean", "int32"]),
    "mask of numbers": ({"mask": draw((6, 5))}, ["mask", "boolean", "bias", "float32"]),
    "mask that does not broadcast": ({"mask": np.ones((5, 6), bool)}, ["mask", LOGITS, "(5, 6)"]),
    "mask of too many dims": (
        {"mask": np.ones((1, 2, 1, 6, 5), bool)},
        ["mask", LOGITS, "(1, 2, 1, 6, 5)"],
    ),
    "mask larger than the logits": (
        {"mask": np.ones((2, 2, 6, 10), bool)},
        ["mask", LOGITS, "(2, 2, 6, 10)"],
    ),
    "bias of booleans": ({"bias": np.ones((6, 5), bool)}, ["bias", "floating", "bool"]),
    "bias that does not broadcast": ({"bias": draw((2, 6, 4))}, ["bias", LOGITS, "(2, 6, 4)"]),
    "scale that is text": ({"scale": "large"}, ["scale", "number", "large"]),
    "scale that is an array": ({"scale": np.ones(2)}, ["scale", "number"]),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit(changes: dict[str, Any], words: list[str]) -> None:
    """They raise an ArgumentError that names what was required and what was received."""
    arrays = operands() | changes
    del arrays["cotangent"]
    with pytest.raises(ArgumentError) as caught:
        dot_product_attention(**{"max_chunk_size_mb": None, **arrays})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("limit", [None, TINY])
@pytest.mark.parametrize("transform", [lambda run: run, jax.jit, jax.vmap], ids=["", "jit", "vmap"])
def test_a_traced_scale(transform: Callable[..., Any], limit: float | None) -> None:
    """Outputs are those of jax.nn, and gradients, which the scale has, too."""
    arrays = operands()
    moving = [arrays[name] for name in ("query", "key", "value")]

    def loss(scale: Any, attend: Callable[..., Any], **settings: Any) -> jax.Array:
        return jnp.sum(jnp.sin(attend(*moving, scale=scale, **settings)))

    scales = jnp.array([0.3, -0.7]) if transform is jax.vmap else jnp.float32(0.3)
    ours = functools.partial(loss, attend=dot_product_attention, max_chunk_size_mb=limit)
    theirs = functools.partial(loss, attend=jax.nn.dot_product_attention)
    found, expected = (transform(jax.value_and_grad(one))(scales) for one in (ours, theirs))
    assert_close(found, expected, 1e-4)


def test_a_traced_scale_in_half_precision() -> None:
    """It is not rounded to the query's dtype before it multiplies the query."""
    query = np.arange(1, 128).astype(HALF)
    found = jax.jit(lambda x: checks.scaled(x, 1 / jnp.sqrt(48))[0])(query)
    exact_scale = np.float32(1 / math.sqrt(48))
    np.testing.assert_array_equal(found, (query.astype(np.float32) * exact_scale).astype(HALF))


@pytest.mark.parametrize("name", ["bias", "mask", "key_value_seq_lengths", "query_seq_lengths"])
def test_without_a_batch_terms_may_have_one(name: str) -> None:
    """A batch of one is dropped, and a bias may be of integers, as in jax.nn."""
    heads = [draw(shape, seed) for seed, shape in enumerate(((6, 4, 8), (5, 2, 8), (5, 2, 8)))]
    term: dict[str, Any] = {
        "bias": np.arange(120).reshape(1, 4, 6, 5) % 7,
        "mask": draw_mask((1, 1, 6, 5)),
        "key_value_seq_lengths": np.array([3], np.int32),
        "query_seq_lengths": np.array([4], np.int32),
    }
    call = {name: term[name]}
    received = dot_product_attention(*heads, **call, max_chunk_size_mb=TINY)
    assert_close(received, jax.nn.dot_product_attention(*heads, **call))


@pytest.mark.parametrize("container", [list, np.asarray, jnp.asarray])
def test_anything_like_an_array(container: Any) -> None:
    """Lists and numpy arrays are taken as JAX takes them."""
    query = container([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    if isinstance(query, np.ndarray):
        query = query.astype(np.float32)
    shape = jax.eval_shape(
        lambda: dot_product_attention(query, query, query, max_chunk_size_mb=None)
    )
    assert (shape.shape, shape.dtype) == ((1, 2, 1, 2), np.float32)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("heads", [4, 2])
def test_dense_needs_no_more_memory_than_haiku(mode: str, heads: int) -> None:
    """The baseline that tuning compares with is no heavier than haiku's own operations.

    An extra axis once cost XLA a fusion and made it slow.
    """
    from autochunk.attention.arguments import Arguments
    from autochunk.tuner.peers import haiku_dense

    query, key, value = (jnp.zeros((2, 256, number, 16)) for number in (4, heads, heads))

    def taken(attend: Callable[..., jax.Array]) -> int:
        def run(*arrays: jax.Array) -> Any:
            return attend(*arrays) if mode == "forward" else jax.vjp(attend, *arrays)[1](query)

        return temp_bytes(run, query, key, value)

    def ours(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(
            query, key, value, max_chunk_size_mb=None, implementation="dense"
        )

    def theirs(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return haiku_dense(Arguments(query, key, value))

    assert taken(ours) <= 1.05 * taken(theirs)
