"""The kernels: no more logits at once than the limit allows, and each plan in its place."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, draw, exact, operands, output_and_gradients, quick_jit

from autochunk import Plan, dot_product_attention
from autochunk.attention import kernels
from autochunk.attention.kernels import maps
from autochunk.errors import ArgumentError
from autochunk.plan import Plans


def attend(**settings: Any) -> Callable[..., jax.Array]:
    return functools.partial(dot_product_attention, **settings)


def gradient(
    function: Callable[..., jax.Array], argnums: tuple[int, ...] = (0, 1, 2)
) -> Callable[..., Any]:
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums)


# --- The limit ------------------------------------------------------------------------------------


def largest_array(text: str) -> int:
    """Bytes of the largest array that a compiled program's text names."""
    sizes = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
    shapes = re.findall(rf"\b({'|'.join(sizes)})\[([0-9,]+)\]", text)
    return max(
        sizes[dtype] * math.prod(int(size) for size in dims.split(",")) for dtype, dims in shapes
    )


# Every operand has at most 4096 bytes, so that what is larger can only be logits; all of them are
# 65536 bytes.
SMALL = {"leading": (2,), "rows": 64, "keys": 64, "heads": 2, "key_size": 2}
LIMIT = 0.0045
LIMITED: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv_heads": 1, "heads": 2},
    "causal": {"is_causal": True},
    "mask": {"mask": (2, 1, 1, 64)},
    "bias": {"bias": (2, 1, 64)},
    "bias by row": {"bias": (2, 2, 64, 1)},
    "no leading dims, many heads": {"leading": (), "heads": 4},
}


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
@pytest.mark.parametrize("call", LIMITED.values(), ids=LIMITED.keys())
def test_no_array_exceeds_the_limit(call: dict[str, Any], implementation: str, mode: str) -> None:
    """The compiled program has no array of any kind above the limit, where the operands are not."""
    arrays = operands(
        **(SMALL | {name: value for name, value in call.items() if name != "is_causal"})
    )
    del arrays["cotangent"]
    mask = arrays.pop("mask", None)
    function = attend(
        mask=mask,
        is_causal=call.get("is_causal", False),
        max_chunk_size_mb=LIMIT,
        implementation=implementation,
    )
    function = function if mode == "forward" else gradient(function, tuple(range(len(arrays))))
    text = quick_jit(function).lower(*arrays.values()).compile().as_text()
    assert max(array.nbytes for array in arrays.values()) <= LIMIT * 1e6
    assert largest_array(text) <= LIMIT * 1e6


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    ("leading", "bias"),
    [((2, 16), (2, 1, 2, 32, 32)), ((16, 2), (1, 2, 2, 32, 32)), ((2, 2, 8), (1, 2, 1, 2, 32, 32))],
    ids=str,
)
def test_terms_of_some_leading_dims_keep_the_limit(
    leading: tuple[int, ...], bias: tuple[int, ...], mode: str
) -> None:
    """A bias of each batch element, shared by its alignment's rows, is not copied for each row.

    Protein folding has such.
    """
    arrays = operands(leading=leading, rows=32, keys=32, bias=bias)
    del arrays["cotangent"]
    function = attend(max_chunk_size_mb=0.04)
    function = function if mode == "forward" else gradient(function, (0, 1, 2, 3))
    assert largest_array(quick_jit(function).lower(*arrays.values()).compile().as_text()) <= 0.04e6


def test_without_a_limit_all_logits_are_there() -> None:
    """The measure above does see logits: without a limit, all of them."""
    arrays = operands(**SMALL)
    text = (
        quick_jit(attend(max_chunk_size_mb=None))
        .lower(arrays["query"], arrays["key"], arrays["value"])
        .compile()
        .as_text()
    )
    assert largest_array(text) == 2 * 2 * 64 * 64 * 4


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _call(plan: Plan, has_mask: bool = False) -> kernels.Call:
    return kernels.Call(0.5, False, False, has_mask, Plans(plan, plan))


@pytest.mark.parametrize("limit", [0.2, 0.03, 0.0045, 0.0002])
@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_what_is_traced_keeps_the_limit(implementation: str, limit: float) -> None:
    """No logits in the forward's and the backward's own steps exceed the limit.

    Slices that fit are not cut further than needed.
    """
    features = 101  # unlike any other size: a product that sums over it makes logits
    # [..., T', H, G, K]
    query, cotangent = draw((2, 3, 60, 2, 2, features)), draw((2, 3, 60, 2, 2, features), 1)
    key, stats = draw((2, 3, 50, 2, features)), draw((2, 3, 2, 2, 60), 2)
    plan = Plan(implementation, limit)
    forward = jax.make_jaxpr(functools.partial(maps.forward, call=_call(plan), plan=plan))(
        query, key, key
    )
    backward = jax.make_jaxpr(
        functools.partial(maps.cotangent, call=_call(plan), wanted=(True,) * 3)
    )(query, key, key, query, stats, stats, cotangent)
    for traced in (forward, backward):
        products = [
            equation
            for equation in equations(traced.jaxpr)
            if equation.primitive.name == "dot_general"
        ]
        summed = [
            equation.invars[0].aval.shape[equation.params["dimension_numbers"][0][0][0]]
            for equation in products
        ]
        logits = max(
            math.prod(product.outvars[0].aval.shape) * 4
            for product, size in zip(products, summed, strict=True)
            if size == features
        )
        assert limit * 1e6 / 4 <= logits <= limit * 1e6


MEMORY = {"leading": (1,), "rows": 1024, "keys": 1024, "heads": 4, "key_size": 16}


def temp_bytes(function: Callable[..., Any], *arrays: Any) -> int:
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_memory(implementation: str, mode: str) -> None:
    """What the compiler sets aside falls with the limit, in gradients, too.

    Nothing is kept for the backward pass but two numbers a row.
    """
    arrays = [
        jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in operands(**MEMORY).items()
        if name != "cotangent"
    ]
    change = (lambda function: function) if mode == "forward" else gradient
    dense = temp_bytes(change(attend(implementation="dense", max_chunk_size_mb=None)), *arrays)
    sliced = temp_bytes(
        change(attend(implementation=implementation, max_chunk_size_mb=0.5)), *arrays
    )
    assert dense >= 16e6
    assert sliced <= 4e6  # operands and gradients are 0.26 MB each


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_memory_under_vmap(implementation: str, mode: str) -> None:
    """The limit is on the whole vmapped call, not on each element of it."""
    arrays = [
        jax.ShapeDtypeStruct((8, *array.shape), array.dtype)
        for name, array in operands(**MEMORY | {"rows": 256}).items()
        if name != "cotangent"
    ]
    change = jax.vmap if mode == "forward" else lambda function: gradient(jax.vmap(function))
    dense = temp_bytes(change(attend(implementation="dense", max_chunk_size_mb=None)), *arrays)
    limit = 2.0  # a quarter of one element's logits, a thirty-second of all
    sliced = temp_bytes(
        change(attend(implementation=implementation, max_chunk_size_mb=limit)), *arrays
    )
    assert dense >= 8 * 4e6
    # operands and gradients of the whole batch are 0.5 MB to 2.1 MB each
    assert sliced <= 3 * limit * 1e6 + 8e6


@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_vmapped_arrays_keep_the_limit(implementation: str) -> None:
    """Of vmapped calls, nested or of one operand only, no array exceeds the limit either."""
    query, key, value = (draw((3, 2, 2, 16, 1, 1), seed) for seed in range(3))
    nested = jax.vmap(jax.vmap(attend(max_chunk_size_mb=LIMIT, implementation=implementation)))
    text = quick_jit(gradient(nested)).lower(query, key, value).compile().as_text()
    assert largest_array(text) <= LIMIT * 1e6
    wide = draw((8, 1, 64, 2, 2), 3)
    one = jax.vmap(
        attend(max_chunk_size_mb=3 * LIMIT, implementation=implementation), in_axes=(0, None, None)
    )
    text = (
        quick_jit(one)
        .lower(wide, draw((1, 64, 2, 2), 4), draw((1, 64, 2, 2), 5))
        .compile()
        .as_text()
    )
    assert largest_array(text) <= 3 * LIMIT * 1e6
    text = (
        quick_jit(gradient(one))
        .lower(draw((8, 1, 4, 2, 2), 6), draw((1, 512, 2, 2), 7), draw((1, 512, 2, 2), 8))
        .compile()
        .as_text()
    )
    # keys and values, 8192 bytes each, are not copied for each query
    assert largest_array(text) <= 3 * LIMIT * 1e6


def test_a_vmapped_limit_below_the_smallest_slice() -> None:
    """Vmapping leaves the smallest slice as it is, one logit.

    A limit that holds it always works, one below never does.
    """
    query = draw((2, 1, 3, 1, 2))
    vmapped = jax.vmap(attend(max_chunk_size_mb=4e-6))
    assert jax.jit(vmapped).lower(query, query, query) is not None
    with pytest.raises(ArgumentError, match="smallest slice"):
        jax.jit(jax.vmap(attend(max_chunk_size_mb=3e-6))).lower(query, query, query)


# --- Which plan runs ------------------------------------------------------------------------------

FORWARD, TRAINING = Plan("xla", 1e-4), Plan("xla_rows", 1e-4)
USES: dict[str, tuple[Callable[[Callable[..., Any]], Callable[..., Any]], str]] = {
    "call": (lambda function: function, "forward"),
    "vmap": (jax.vmap, "forward"),
    "remat": (jax.checkpoint, "forward"),
    "scan": (
        lambda function: (
            lambda query: jax.lax.scan(lambda x, _: (function(x), None), query, None, 2)
        ),
        "forward",
    ),
    "value_and_grad": (
        lambda function: jax.value_and_grad(lambda query: jnp.sum(function(query))),
        "training",
    ),
    "grad(vmap)": (
        lambda function: jax.grad(lambda query: jnp.sum(jax.vmap(function)(query))),
        "training",
    ),
    "vjp": (lambda function: lambda query: jax.vjp(function, query)[0], "training"),
    "jvp": (lambda function: lambda query: jax.jvp(function, (query,), (query,)), "training"),
    "hessian": (lambda function: jax.hessian(lambda query: jnp.sum(function(query))), "training"),
}


@pytest.mark.parametrize(("change", "expected"), USES.values(), ids=USES.keys())
def test_which_plan_runs(
    change: Callable[[Callable[..., Any]], Callable[..., Any]], expected: str
) -> None:
    """A call that is differentiated runs the training plan, any other the forward plan.

    ``on_use`` hears of that one only.
    """
    used: set[str] = set()
    call = kernels.Call(0.5, False, False, False, Plans(FORWARD, TRAINING, used.add))

    def function(query: jax.Array) -> jax.Array:
        return kernels.attention(query, query[..., 0, :], query[..., 0, :], None, None, call)

    jax.jit(change(function)).lower(
        draw((2, 5, 2, 1, 3), 1)
        if expected == "forward" and change is not jax.vmap
        else draw((2, 2, 5, 2, 1, 3), 1)
    )
    assert used == {expected}


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda f: f, 2 * 2), (jax.grad, 5)], ids=["forward", "grad"]
)
def test_slices_are_those_of_the_plan_that_runs(change: Callable[..., Any], expected: int) -> None:
    """The loops of the compiled program make the forward plan's slices, or the training plan's."""
    # a batch element's head; a row of all of them
    call = kernels.Call(
        0.5, False, False, False, Plans(Plan("xla", 1.2e-4), Plan("xla_rows", 1e-4))
    )
    query = draw((2, 5, 2, 1, 3))
    key = draw((2, 6, 2, 3))

    def function(query: jax.Array) -> jax.Array:
        (out,) = (kernels.attention(query, key, key, None, None, call),)
        return jnp.sum(out)

    text = quick_jit(change(function)).lower(query).as_text()
    assert Counter(re.findall(r"stablehlo.while", text)).total() >= 1
    # A loop compares its counter with the number of its slices.
    assert f"dense<{expected}> : tensor<i32>" in text


def test_plans_are_equal_whatever_hears_of_them() -> None:
    """``on_use`` takes no part in equality or hash, so that programs are shared."""
    one, other = (Plans(FORWARD, TRAINING, heard) for heard in (None, print))
    assert (one, hash(one)) == (other, hash(other))


# --- Slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "keys"), [(1, 3), (2, 5), (3, 5), (21, 5), (5, 2)])
def test_slices_that_do_not_divide(rows: int, keys: int) -> None:
    """Where a slice overlaps its neighbour nothing is counted twice, in whatever axis."""
    arrays = operands(leading=(7,), rows=7, keys=5, heads=1, bias=(7, 1, 7, 5))
    names = ("query", "key", "value", "bias")
    expected = exact(arrays)

    @quick_jit
    def both(cotangent: jax.Array, *moving: jax.Array) -> Any:
        out, pull = jax.vjp(
            attend(
                max_chunk_size_mb=rows * keys * 4e-6,
                implementation="xla_rows" if rows < 3 else "xla",
            ),
            *moving,
        )
        return {"output": out, **dict(zip(names, pull(cotangent), strict=True))}

    assert_close(both(arrays["cotangent"], *(arrays[name] for name in names)), expected)


@pytest.mark.parametrize("limit", [None, 1e-4])
@pytest.mark.parametrize(
    "terms", [{}, {"bias": (1, 2, 6, 5)}, {"mask": (2, 1, 6, 5)}, {"bias": (2, 1, 1, 5)}], ids=str
)
def test_the_softmax_of_accelerators(
    monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any], limit: float | None
) -> None:
    """The arithmetic that is for accelerators is right, here run on whatever there is.

    A bias of -inf takes keys out.
    """
    monkeypatch.setattr(maps, "_NO_SOFTMAX_KERNEL", frozenset())
    jax.clear_caches()
    arrays = operands(heads=2, **terms)
    if terms == {"bias": (2, 1, 1, 5)}:
        arrays["bias"][:, :, :, :2] = -np.inf
    try:
        ours = output_and_gradients(attend(implementation="xla", max_chunk_size_mb=limit), arrays)
        alone = jax.jit(attend(max_chunk_size_mb=limit))(
            arrays["query"], arrays["key"], arrays["value"], arrays.get("bias"), arrays.get("mask")
        )
    finally:
        jax.clear_caches()
    expected = exact(arrays)
    assert_close(ours, expected)
    np.testing.assert_allclose(alone, expected["output"], atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "platforms", "divided"),
    [
        (16384, ("cuda",), "weights"),
        (16385, ("cuda",), "output"),
        (64, ("cpu",), "output"),
        (64, ("cpu", "cuda"), "output"),
    ],
    ids=["fits", "too long", "cpu", "any platform"],
)
def test_what_is_divided_by_the_sum(keys: int, platforms: tuple[str, ...], divided: str) -> None:
    """The weights are divided where that makes one kernel of a softmax, elsewhere the output.

    It makes one on GPUs, unless rows are too long for it; the output is smaller.
    """
    query, key = (
        jax.ShapeDtypeStruct((1, 4, 2, 1, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, keys, 2, 3), jnp.float32),
    )
    function = functools.partial(
        maps.forward,
        call=_call(Plan("xla")),
        plan=Plan("xla"),
        platforms=platforms,
        need_stats=False,
    )
    traced = jax.make_jaxpr(function)(query, key, key)
    sizes = {
        equation.outvars[0].aval.shape[-1]
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "div"
    }
    assert sizes == {keys if divided == "weights" else 3}


def test_dense_is_haikus() -> None:
    """``dense`` keeps haiku's dtype for the logits, that of the inputs."""
    half = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    traced = jax.make_jaxpr(
        lambda q: kernels.dense(q[..., None, :], q, q, None, None, _call(Plan("dense")))
    )(half)
    products = [
        equation.outvars[0].aval.dtype
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert set(products) == {jnp.dtype(jnp.bfloat16)}


def test_half_precision_has_float32_logits() -> None:
    """Everywhere else logits, and sums over them, are float32."""
    half = np.ones((1, 4, 2, 1, 3), jnp.bfloat16)
    plan = Plan("xla", 1e-5)
    traced = jax.make_jaxpr(functools.partial(maps.forward, call=_call(plan), plan=plan))(
        half, half[..., 0, :], half[..., 0, :]
    )
    products = [
        equation.outvars[0].aval.dtype
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    assert set(products) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("rows", "keys"), [(600, 600), (600, 530), (530, 800), (600, 200)])
@pytest.mark.parametrize(
    ("implementation", "limit"), [("xla", None), ("xla", 0.3), ("xla_rows", 0.1)]
)
def test_causal_blocks(rows: int, keys: int, implementation: str, limit: float | None) -> None:
    """Long causal attention is right whatever the lengths, and leaves out blocks no row sees."""
    arrays = operands((1,), rows, keys, value_size=3, bias=(2, 1, keys))
    attend = functools.partial(
        dot_product_attention,
        is_causal=True,
        max_chunk_size_mb=limit,
        implementation=implementation,
    )
    ours = output_and_gradients(attend, arrays)
    assert_close(ours, exact(arrays, is_causal=True), 1e-4)


def test_causal_blocks_above_the_diagonal_are_not_computed() -> None:
    """Of n by n blocks the n on the diagonal are computed, then those below.

    With a mask all are: a row may see nothing, and be the mean of all values.
    """
    query, key = draw((1, 1024, 1, 1, 4)), draw((1, 1024, 1, 4))
    call = kernels.Call(0.5, True, False, False, Plans(Plan(), Plan()))

    def trips(call: kernels.Call, *mask: Any) -> list[int]:
        traced = jax.make_jaxpr(functools.partial(maps.forward, call=call, plan=Plan()))(
            query, key, key, *mask
        )
        return [
            equation.params["length"]
            for equation in equations(traced.jaxpr)
            if equation.primitive.name == "scan"
        ]

    assert trips(call) == [4, 4 * 3 // 2]
    masked = kernels.Call(0.5, True, False, True, Plans(Plan(), Plan()))
    assert trips(masked, np.ones((1, 1, 1, 1, 1024), bool)) == []
