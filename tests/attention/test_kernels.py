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
from factories import quick_jit
from reference import (
    assert_close,
    compiled_text,
    draw,
    exact,
    largest_array,
    operands,
    output_and_gradients,
    temp_bytes,
)

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


# Every operand has at most 4096 bytes, so that what is larger can only be logits; all of them are
# 65536 bytes.
SMALL: dict[str, Any] = {"leading": (2,), "rows": 64, "keys": 64, "heads": 2, "key_size": 2}
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
    shape = SMALL | call
    is_causal = shape.pop("is_causal", False)
    arrays = operands(**shape)
    del arrays["cotangent"]
    settings = {"mask": arrays.pop("mask", None), "is_causal": is_causal}
    function = attend(**settings, max_chunk_size_mb=LIMIT, implementation=implementation)
    function = function if mode == "forward" else gradient(function, tuple(range(len(arrays))))
    assert max(array.nbytes for array in arrays.values()) <= LIMIT * 1e6
    assert largest_array(compiled_text(quick_jit(function), *arrays.values())) <= LIMIT * 1e6


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
    assert largest_array(compiled_text(quick_jit(function), *arrays.values())) <= 0.04e6


def test_without_a_limit_all_logits_are_there() -> None:
    """The measure above does see logits: without a limit, all of them."""
    arrays = operands(**SMALL)
    function = quick_jit(attend(max_chunk_size_mb=None))
    text = compiled_text(function, arrays["query"], arrays["key"], arrays["value"])
    assert largest_array(text) == 2 * 2 * 64 * 64 * 4


def equations(jaxpr: Any, primitive: str, but_in: str = "") -> Iterator[Any]:
    """All equations of a primitive in a jaxpr and in those inside it, but in one of another."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        if equation.primitive.name == but_in:
            continue
        for leaf in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from equations(inner, primitive, but_in)


def _call(plans: Plan | Plans, has_mask: bool = False, is_causal: bool = False) -> kernels.Call:
    both = plans if isinstance(plans, Plans) else Plans(plans, plans)
    names = ("query", "key", "value", "mask")[: 3 + has_mask]
    return kernels.Call(names, 0.5, is_causal, both)


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
    forward = functools.partial(maps.forward, call=_call(plan), plan=plan)
    backward = functools.partial(maps.cotangent, call=_call(plan), wanted=(True,) * 3)
    for traced in (
        jax.make_jaxpr(forward)(query, key, key),
        jax.make_jaxpr(backward)(query, key, key, query, stats, stats, cotangent),
    ):
        products = list(equations(traced.jaxpr, "dot_general"))
        summed = [
            product.invars[0].aval.shape[product.params["dimension_numbers"][0][0][0]]
            for product in products
        ]
        logits = max(
            math.prod(product.outvars[0].aval.shape) * 4
            for product, size in zip(products, summed, strict=True)
            if size == features
        )
        assert limit * 1e6 / 4 <= logits <= limit * 1e6


MEMORY: dict[str, Any] = {
    "leading": (1,),
    "rows": 1024,
    "keys": 1024,
    "heads": 4,
    "key_size": 16,
}


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

    def taken(implementation: str, limit: float | None) -> int:
        function = attend(implementation=implementation, max_chunk_size_mb=limit)
        return temp_bytes(function if mode == "forward" else gradient(function), *arrays)

    dense, sliced = taken("dense", None), taken(implementation, 0.5)
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

    def taken(implementation: str, limit: float | None) -> int:
        function = jax.vmap(attend(implementation=implementation, max_chunk_size_mb=limit))
        return temp_bytes(function if mode == "forward" else gradient(function), *arrays)

    limit = 2.0  # a quarter of one element's logits, a thirty-second of all
    dense, sliced = taken("dense", None), taken(implementation, limit)
    assert dense >= 8 * 4e6
    # Operands and gradients of the whole batch are 0.5 MB to 2.1 MB each.
    assert sliced <= 3 * limit * 1e6 + 8e6


@pytest.mark.parametrize("implementation", ["xla", "xla_rows"])
def test_vmapped_arrays_keep_the_limit(implementation: str) -> None:
    """Of vmapped calls, nested or of one operand only, no array exceeds the limit either."""
    query, key, value = (draw((3, 2, 2, 16, 1, 1), seed) for seed in range(3))
    nested = jax.vmap(jax.vmap(attend(max_chunk_size_mb=LIMIT, implementation=implementation)))
    text = compiled_text(quick_jit(gradient(nested)), query, key, value)
    assert largest_array(text) <= LIMIT * 1e6
    one = jax.vmap(
        attend(max_chunk_size_mb=3 * LIMIT, implementation=implementation), in_axes=(0, None, None)
    )
    query, key, value = draw((8, 1, 64, 2, 2), 3), draw((1, 64, 2, 2), 4), draw((1, 64, 2, 2), 5)
    text = compiled_text(quick_jit(one), query, key, value)
    assert largest_array(text) <= 3 * LIMIT * 1e6
    query, key, value = draw((8, 1, 4, 2, 2), 6), draw((1, 512, 2, 2), 7), draw((1, 512, 2, 2), 8)
    text = compiled_text(quick_jit(gradient(one)), query, key, value)
    # Keys and values, 8192 bytes each, are not copied for each query.
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
    "call": (lambda f: f, "forward"),
    "vmap": (jax.vmap, "forward"),
    "remat": (jax.checkpoint, "forward"),
    "scan": (lambda f: lambda q: jax.lax.scan(lambda x, _: (f(x), None), q, None, 2), "forward"),
    "value_and_grad": (lambda f: jax.value_and_grad(lambda q: jnp.sum(f(q))), "training"),
    "grad(vmap)": (lambda f: jax.grad(lambda q: jnp.sum(jax.vmap(f)(q))), "training"),
    "vjp": (lambda f: lambda q: jax.vjp(f, q)[0], "training"),
    "jvp": (lambda f: lambda q: jax.jvp(f, (q,), (q,)), "training"),
    "hessian": (lambda f: jax.hessian(lambda q: jnp.sum(f(q))), "training"),
}


@pytest.mark.parametrize(("change", "expected"), USES.values(), ids=USES.keys())
def test_which_plan_runs(
    change: Callable[[Callable[..., Any]], Callable[..., Any]], expected: str
) -> None:
    """A call that is differentiated runs the training plan, any other the forward plan.

    ``on_use`` hears of that one only.
    """
    used: set[str] = set()
    call = _call(Plans(FORWARD, TRAINING, used.add))

    def function(query: jax.Array) -> jax.Array:
        key = query[..., 0, :]
        return kernels.attention(kernels.Inputs(query, key, key), call)[0]

    alone = expected == "forward" and change is not jax.vmap
    jax.jit(change(function)).lower(draw((2, 5, 2, 1, 3) if alone else (2, 2, 5, 2, 1, 3), 1))
    assert used == {expected}


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda f: f, 2 * 2), (jax.grad, 5)], ids=["forward", "grad"]
)
def test_slices_are_those_of_the_plan_that_runs(change: Callable[..., Any], expected: int) -> None:
    """The loops of the compiled program make the forward plan's slices, or the training plan's."""
    # A batch element's head; a row of all of them.
    plans = Plans(Plan("xla", 1.2e-4), Plan("xla_rows", 1e-4))
    call = _call(plans)
    query = draw((2, 5, 2, 1, 3))
    key = jnp.asarray(draw((2, 6, 2, 3)))

    def function(query: jax.Array) -> jax.Array:
        return jnp.sum(kernels.attention(kernels.Inputs(query, key, key), call)[0])

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
    implementation = "xla_rows" if rows < 3 else "xla"
    function = attend(max_chunk_size_mb=rows * keys * 4e-6, implementation=implementation)
    assert_close(output_and_gradients(function, arrays), exact(arrays))


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
    query = jax.ShapeDtypeStruct((1, 4, 2, 1, 3), jnp.float32)
    key = jax.ShapeDtypeStruct((1, keys, 2, 3), jnp.float32)
    plan = Plan("xla")
    function = functools.partial(
        maps.forward, call=_call(plan), plan=plan, platforms=platforms, need_stats=False
    )
    traced = jax.make_jaxpr(function)(query, key, key)
    sizes = {division.outvars[0].aval.shape[-1] for division in equations(traced.jaxpr, "div")}
    assert sizes == {keys if divided == "weights" else 3}


def product_dtypes(function: Callable[..., Any], *arrays: Any) -> set[Any]:
    """The dtypes that products have in a function."""
    products = equations(jax.make_jaxpr(function)(*arrays).jaxpr, "dot_general")
    return {product.outvars[0].aval.dtype for product in products}


@pytest.mark.parametrize("half_logits", [True, False])
def test_dense_may_be_haikus(half_logits: bool) -> None:
    """``dense`` has float32 logits, or keeps haiku's dtype for them, that of the inputs."""

    def dense(half: jax.Array) -> jax.Array:
        inputs = kernels.Inputs(half[..., None, :], half, half)
        call = _call(Plan("dense"))._replace(half_logits=half_logits)
        return kernels.dense(inputs, call)[0]

    half = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    dtypes = product_dtypes(dense, half)
    assert (jnp.dtype(jnp.float32) in dtypes) is not half_logits


def test_half_precision_has_float32_logits() -> None:
    """Everywhere else logits, and sums over them, are float32."""
    half = np.ones((1, 4, 2, 1, 3), jnp.bfloat16)
    plan = Plan("xla", 1e-5)
    function = functools.partial(maps.forward, call=_call(plan), plan=plan)
    dtypes = product_dtypes(function, half, half[..., 0, :], half[..., 0, :])
    assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("rows", "keys"), [(600, 600), (600, 530), (530, 800), (600, 200)])
@pytest.mark.parametrize(
    ("implementation", "limit"), [("xla", None), ("xla", 0.3), ("xla_rows", 0.1)]
)
def test_causal_blocks(rows: int, keys: int, implementation: str, limit: float | None) -> None:
    """Long causal attention is right whatever the lengths, and leaves out blocks no row sees."""
    arrays = operands((1,), rows, keys, value_size=3, bias=(2, 1, keys))
    function = attend(is_causal=True, max_chunk_size_mb=limit, implementation=implementation)
    ours = output_and_gradients(function, arrays)
    assert_close(ours, exact(arrays, is_causal=True), 1e-4)


def test_causal_blocks_above_the_diagonal_are_not_computed() -> None:
    """Of n by n blocks the n on the diagonal are computed, then those below, with a mask too."""
    query, key = draw((1, 1024, 1, 1, 4)), draw((1, 1024, 1, 4))
    call = _call(Plan(), is_causal=True)

    def trips(call: kernels.Call, *mask: Any) -> list[int]:
        function = functools.partial(maps.forward, call=call, plan=Plan())
        traced = jax.make_jaxpr(function)(query, key, key, *mask)
        loops = equations(traced.jaxpr, "scan", but_in="cond")  # there for what is not finite
        return [scan.params["length"] for scan in loops]

    assert trips(call) == [4, 4 * 3 // 2]
    masked = _call(Plan(), has_mask=True, is_causal=True)
    assert trips(masked, np.ones((1, 1, 1, 1024, 1024), bool)) == [4, 4 * 3 // 2]
