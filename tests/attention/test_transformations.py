"""Under JAX's transformations, and compositions of them, the op behaves as plain attention does.

Slicing is in force throughout.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.ad_checkpoint
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from factories import devices_on_cpu, quick_jit, run_python
from reference import (
    assert_close,
    draw,
    draw_mask,
    operands,
    output_and_gradients,
    plain,
)

from autochunk import dot_product_attention
from autochunk.attention import kernels
from autochunk.attention.arguments import Arguments
from autochunk.plan import Plan, Plans

Function = Callable[..., Any]

# Operands are query [2, 6, 2, 4], key [2, 5, 1, 4], value [2, 5, 1, 3] and bias [2, 6, 5]: 480
# bytes of logits, grouped heads, an uneven last slice.
SHAPES: dict[str, Any] = {"heads": 2, "kv_heads": 1, "value_size": 3, "bias": (2, 6, 5)}
MASK = np.concatenate([draw_mask((1, 1, 6, 5)), np.ones((1, 1, 6, 5), bool)])
PLANS = {
    "rows": ("xla", 1e-4),  # two rows of a batch element at a time
    "keys": ("xla", 2.4e-5),  # three keys of one row
    "rows first": ("xla_rows", 1e-4),  # a row of all
    "rows, then keys": ("xla_rows", 4e-5),  # two keys of a row of all
    "dense": ("dense", 1e-3),  # unless vmapped: then slices
}
# All that a call may have beside bias and mask.
TERMS: dict[str, Any] = {
    "is_causal": True,
    "local_window_size": (4, 1),
    "query_seq_lengths": np.asarray([6, 5], np.int32),
    "key_value_seq_lengths": np.asarray([5, 4], np.int32),
    "query_segment_ids": np.asarray([[0, 0, 0, 1, 1, 1]], np.int32),
    "key_value_segment_ids": np.asarray([[0, 0, 1, 1, 2], [0, 0, 0, 1, 1]], np.int32),
    "query_offset": np.asarray([0, 1], np.int32),
    "alibi_slopes": np.asarray([0.3, -0.1], np.float32),
    "logits_soft_cap": 3.0,
    "dropout_rate": 0.2,
}


def four(**sizes: Any) -> list[np.ndarray[Any, Any]]:
    arrays = operands(**SHAPES | sizes)
    return [arrays[name] for name in ("query", "key", "value", "bias")]


def shapes_of_four() -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in four()]


def scalar(function: Function) -> Function:
    """Something with derivatives of every order."""
    return lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))


def tangents(arrays: Any) -> Any:
    return jax.tree.map(jnp.cos, arrays)


def forward_of(function: Function) -> Function:
    return lambda *arrays: jax.jvp(function, arrays, tangents(arrays))


def gradient(function: Function) -> Function:
    return jax.grad(scalar(function), (0, 1, 2, 3))


def pulled(function: Function) -> Function:
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jnp.cos(out))

    return run


def linear(function: Function) -> Function:
    def run(*arrays: Any) -> Any:
        out, push = jax.linearize(function, *arrays)
        return out, push(*tangents(arrays)), push(*arrays)

    return run


def spread(array: Any, axis: int | None) -> Any:
    return array if axis is None else jnp.stack([array, -array, 0.5 * array], axis)


def mapped(function: Function, in_axes: tuple[int | None, ...], **settings: Any) -> Function:
    """``function`` vmapped over three variants of those operands that have an axis."""
    run = jax.vmap(function, in_axes, **settings)
    return lambda *arrays: run(*map(spread, arrays, in_axes))


def nested(function: Function) -> Function:
    inner = jax.vmap(function, (1, None, 0, None), 1)
    outer = jax.vmap(inner, (0, 0, None, 2))
    return lambda q, k, v, b: outer(
        spread(spread(q, 1), 0), spread(k, 0), spread(v, 0), spread(b, 2)
    )


def layers(function: Function, remat: bool) -> Function:
    """Three layers by ``lax.scan``."""

    def layer(
        x: jax.Array, weight: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
    ) -> jax.Array:
        return x + jnp.einsum("...v,vk->...k", function(x, key, value, bias), weight)

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer

    def run(query: jax.Array, *others: jax.Array) -> jax.Array:
        weights = jnp.asarray(draw((3, 3, 4)))
        out, _ = jax.lax.scan(lambda x, one: (layer(x, one, *others), None), query, weights)
        return out

    return run


def named(function: Function) -> Function:
    return lambda *arrays: jax.ad_checkpoint.checkpoint_name(function(*arrays), "attended")


def looped(function: Function) -> Function:
    """Inside ``cond`` inside ``while_loop``, not differentiated."""

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        count, (total, arrays) = state
        more = jax.lax.cond(count > 0, function, lambda *_: jnp.zeros_like(total), *arrays)
        return count + 1, (total + more, tangents(arrays))

    def run(*arrays: Any) -> jax.Array:
        start = (jnp.int32(0), (jnp.zeros((2, 6, 2, 3)), arrays))
        _, (total, _) = jax.lax.while_loop(lambda state: state[0] < 3, body, start)
        return total

    return run


def hessian_of_a_row(function: Function) -> Function:
    """Of the query's last row, which sees several keys; the whole query's would be large."""

    def run(query: jax.Array, *others: jax.Array) -> Any:
        def of_row(row: jax.Array) -> Any:
            return scalar(function)(query.at[0, -1, 0].set(row), *others)

        return jax.hessian(of_row)(query[0, -1, 0])

    return run


def gradient_norm(function: Function) -> Function:
    return lambda *arrays: sum(jnp.sum(array**2) for array in gradient(function)(*arrays))


policies = jax.checkpoint_policies
FIRST_ORDER: dict[str, Callable[[Function], Function]] = {
    "call": lambda f: f,
    "grad": gradient,
    "vjp": pulled,
    "jvp": forward_of,
    "linearize": linear,
    "jvp of the query": lambda f: lambda q, k, v, b: jax.jvp(lambda q: f(q, k, v, b), (q,), (q,)),
    "grad of the key": lambda f: jax.grad(scalar(f), 1),
    "grad of the bias": lambda f: jax.grad(scalar(f), 3),
    "vmap(grad)": lambda f: mapped(gradient(f), (0, 0, 0, 0)),
    "grad(vmap)": lambda f: gradient(mapped(f, (2, 1, 0, 0))),
}
TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "jacrev": lambda f: jax.jacrev(lambda *arrays: f(*arrays)[:, ::3, :1], (0, 1, 2, 3)),
    "jacfwd": lambda f: jax.jacfwd(lambda *arrays: f(*arrays)[:, ::3], (1, 3)),
    "vmap 0": lambda f: mapped(f, (0, 0, 0, 0)),
    "vmap 1": lambda f: mapped(f, (1, 1, 1, 1), out_axes=1),
    "vmap 2": lambda f: mapped(f, (2, 2, 2, 2), out_axes=2),
    "vmap 3 and last": lambda f: mapped(f, (3, 4, -1, 3), out_axes=-1),
    "vmap query": lambda f: mapped(f, (0, None, None, None)),
    "vmap key and value": lambda f: mapped(f, (None, 1, 2, None)),
    "vmap bias": lambda f: mapped(f, (None, None, None, 1)),
    "vmap nested": nested,
    "vmap spmd_axis_name": lambda f: mapped(f, (0, 0, None, None), spmd_axis_name="devices"),
    "grad(vmap) query": lambda f: gradient(mapped(f, (1, None, None, None))),
    "grad(vmap) bias": lambda f: gradient(mapped(f, (None, None, None, 0))),
    "grad(vmap) all but bias": lambda f: gradient(mapped(f, (0, 1, 2, None))),
    "grad(vmap nested)": lambda f: gradient(nested(f)),
    "vmap(grad) bias": lambda f: mapped(gradient(f), (None, None, None, 2)),
    "jvp(vmap)": lambda f: forward_of(mapped(f, (0, None, 1, None))),
    "vmap(jvp)": lambda f: mapped(forward_of(f), (None, 0, None, 1)),
    "remat": lambda f: gradient(jax.checkpoint(f)),
    "remat, dots saved": lambda f: gradient(jax.checkpoint(f, policy=policies.dots_saveable)),
    "remat, nothing saved": lambda f: gradient(
        jax.checkpoint(scalar(f), policy=policies.nothing_saveable)
    ),
    "remat, saved by name": lambda f: gradient(
        jax.checkpoint(named(f), policy=policies.save_only_these_names("attended"))
    ),
    "remat of vmap": lambda f: gradient(jax.checkpoint(mapped(f, (0, 0, 0, None)))),
    "jvp(remat)": lambda f: forward_of(jax.checkpoint(f)),
    "scan": lambda f: gradient(layers(f, remat=False)),
    "scan, remat": lambda f: gradient(layers(f, remat=True)),
    "while and cond": looped,
    "lax.map": lambda f: gradient(
        lambda *arrays: jax.lax.map(lambda q: f(q, *arrays[1:]), spread(arrays[0], 0))
    ),
}
HIGHER: dict[str, Callable[[Function], Function]] = {
    "jvp(grad)": lambda f: forward_of(gradient(f)),
    "jvp(grad) remat": lambda f: forward_of(gradient(jax.checkpoint(f))),
    "vmap(jvp(grad))": lambda f: mapped(forward_of(gradient(f)), (0, None, None, 0)),
    "linearize(grad)": lambda f: linear(gradient(f)),
    "grad(grad)": lambda f: gradient(gradient_norm(f)),
    "grad(jvp)": lambda f: gradient(lambda *arrays: forward_of(f)(*arrays)[1]),
    "jvp(jvp)": lambda f: forward_of(forward_of(f)),
    "grad(vmap(grad))": lambda f: gradient(mapped(gradient_norm(f), (0, None, 0, None))),
    "hessian of a row": hessian_of_a_row,
    "third order": lambda f: forward_of(gradient(gradient_norm(f))),
}


CASES = [
    *((name, "rows") for name in FIRST_ORDER),
    *((name, "rows, then keys") for name in ("vjp", "linearize", "vmap(grad)", "grad(vmap)")),
    *((name, list(PLANS)[position % 4]) for position, name in enumerate(TRANSFORMATIONS)),
]
CASES += [
    (name, plan)
    for name in ("vmap query", "vmap key and value", "grad(vmap) query")
    for plan in PLANS
    if (name, plan) not in CASES
]
CASES += [(name, list(PLANS)[position % 3]) for position, name in enumerate(HIGHER)]
CASES += [("jvp(grad)", "rows, then keys")]
CASES += [(name, "dense") for name in (*FIRST_ORDER, "jacrev", "vmap nested", "grad(vmap nested)")]
CASES += [(name, "dense") for name in ("scan, remat", "vmap(grad) bias", "jvp(vmap)", *HIGHER)]


def assert_alike(
    transform: Callable[[Function], Function],
    ours: Function | dict[str, Function],
    theirs: Function,
    tolerance: float = 2e-5,
    dtype: type[np.floating[Any]] = np.float32,
    **sizes: Any,
) -> None:
    """All functions give the same, transformed; one program, for one is compiled faster."""
    functions = {"theirs": theirs, **(ours if isinstance(ours, dict) else {"ours": ours})}
    run = quick_jit(lambda *arrays: {n: transform(one)(*arrays) for n, one in functions.items()})
    received = run(*(np.asarray(array, dtype) for array in four(**sizes)))
    assert_close(received, dict.fromkeys(received, received["theirs"]), tolerance)


@pytest.mark.parametrize("name", [*FIRST_ORDER, *TRANSFORMATIONS, *HIGHER])
def test_transformations(name: str) -> None:
    """The transformed op gives what transformed plain attention does, by each of its plans."""
    transform = {**FIRST_ORDER, **TRANSFORMATIONS, **HIGHER}[name]
    masked: dict[str, Any] = {"mask": MASK, "is_causal": True}
    ours: dict[str, Function] = {}
    for plan in (plan for case, plan in CASES if case == name):
        implementation, limit = PLANS[plan]
        ours[plan] = functools.partial(
            dot_product_attention, **masked, max_chunk_size_mb=limit, implementation=implementation
        )
    theirs = functools.partial(plain, **masked)
    if name not in HIGHER:
        assert_alike(transform, ours, theirs)
        return
    # In float32 rounding grows with each order, by how much depends on the processor.
    with jax.enable_x64(True):
        assert_alike(transform, ours, theirs, 1e-10, np.float64)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "name", ["vjp", "linearize", "vmap(grad)", "grad(vmap)", "scan, remat", "jvp(grad)"]
)
def test_transformations_of_longer_rows(name: str, has_bias: bool) -> None:
    """With so many rows and keys backward slices are transposed, and keys may be centred.

    In slices of one batch element, of 40 rows by 18 keys.
    """

    def given(attention: Function) -> Function:
        if has_bias:
            return lambda q, k, v, b: attention(q, k, v, b, is_causal=True)
        return lambda q, k, v, b: attention(q, k, v, is_causal=True) * jnp.cos(b[0, 0, 0])

    ours = given(functools.partial(dot_product_attention, max_chunk_size_mb=3e-3))
    theirs = given(plain)
    transform = {**FIRST_ORDER, **TRANSFORMATIONS, **HIGHER}[name]
    sizes: dict[str, Any] = {"rows": 20, "keys": 18, "bias": (2, 20, 18)}
    with jax.enable_x64(name in HIGHER):
        tolerance, dtype = (1e-10, np.float64) if name in HIGHER else (5e-5, np.float32)
        assert_alike(transform, ours, theirs, tolerance, dtype, **sizes)


def by_jax(query: Any, key: Any, value: Any, bias: Any, **given: Any) -> jax.Array:
    """Dense attention, without rules of ours."""
    arguments = Arguments.checked(query=query, key=key, value=value, bias=bias, **given)
    call = arguments.call(Plans(Plan("dense"), Plan("dense")))
    (out,) = kernels.dense(arguments.inputs(), call, careful=False, differentiable=True)
    return out.reshape(arguments.output_shape)


# Terms are the same whichever axis is mapped and however often: a transformation of each kind.
WITH_ALL_TERMS = [
    *FIRST_ORDER,
    *("jacrev", "vmap 3 and last", "vmap query", "vmap bias", "vmap nested", "jvp(vmap)"),
    *("grad(vmap) query", "grad(vmap) bias", "grad(vmap nested)", "vmap(grad) bias"),
    *("remat, dots saved", "remat, saved by name", "remat of vmap", "scan, remat"),
    *("while and cond", "lax.map", "jvp(grad)", "vmap(jvp(grad))", "grad(grad)", "third order"),
]


@pytest.mark.parametrize("name", WITH_ALL_TERMS)
def test_transformations_of_all_terms(name: str) -> None:
    """So it does with lengths, windows, segments, offsets, slopes, caps and dropout.

    Plain attention cannot drop what we drop: here JAX's own rules differentiate our dense one.
    """
    transforms = {**FIRST_ORDER, **TRANSFORMATIONS, **HIGHER}
    implementation, limit = list(PLANS.values())[WITH_ALL_TERMS.index(name) % len(PLANS)]
    given = {**TERMS, "dropout_rng": jax.random.key(1)}
    ours = functools.partial(
        dot_product_attention, **given, max_chunk_size_mb=limit, implementation=implementation
    )
    with jax.enable_x64(name in HIGHER):
        tolerance = 1e-10 if name in HIGHER else 2e-5
        dtype = np.float64 if name in HIGHER else np.float32
        assert_alike(transforms[name], ours, functools.partial(by_jax, **given), tolerance, dtype)


@pytest.mark.parametrize("limit", [1e-3, 2e-3])
def test_a_batch_of_dense_attention_keeps_to_the_limit(limit: float) -> None:
    """Its gradients too, and on a branch: 480 bytes of logits are 1440 in a batch of three."""
    arrays = four()
    dense = functools.partial(attend, limit=limit, implementation="dense")
    by_slices = functools.partial(attend, limit=None)

    def branched(function: Function) -> Function:
        def run(query: Any, *others: Any) -> Any:
            other = lambda query, *_: query[..., :3]  # noqa: E731
            return jax.lax.cond(query[0, 0, 0, 0] > 0, function, other, query, *others)

        return run

    for wrap in (lambda function: function, branched):
        for axes in ((0, 0, 0, 0), (0, None, 0, None)):
            ours, theirs = (mapped(gradient(wrap(one)), axes) for one in (dense, by_slices))
            program = jax.jit(ours).lower(*arrays)
            assert ("while" in program.as_text()) == (limit < 2e-3)
            assert_close(program.compile()(*arrays), jax.jit(theirs)(*arrays), 1e-5)


@pytest.mark.parametrize("name", ["vmap(grad)", "grad(vmap) bias", "jvp(grad)", "grad(grad)"])
def test_transformations_with_rows_masked_throughout(name: str) -> None:
    """A row that is masked throughout has zeros for derivatives, of any order, and no NaN."""
    mask = MASK.copy()
    mask[0, :, 1:3] = False
    transform = {**FIRST_ORDER, **TRANSFORMATIONS, **HIGHER}[name]
    ours = functools.partial(dot_product_attention, mask=mask, max_chunk_size_mb=1e-4)
    theirs = functools.partial(plain, mask=mask)
    assert_alike(transform, ours, theirs, 1e-4)


def gradient_of_three(function: Function) -> Function:
    return jax.grad(scalar(function), (0, 1, 2))


def attend(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    *,
    mask: Any = MASK,
    limit: float | None = 1e-4,
    implementation: str | None = None,
) -> jax.Array:
    return dot_product_attention(
        query, key, value, bias, mask, max_chunk_size_mb=limit, implementation=implementation
    )


@pytest.mark.parametrize("in_axes", [0, (0, None, None)], ids=str)
def test_vmap_over_nothing(in_axes: Any) -> None:
    """A batch of no elements has no outputs and no gradients, as for plain attention."""
    query, *others = four()[:3]
    arrays = (query[:0], *(array[0] if in_axes else array[:0] for array in others))
    ours, theirs = functools.partial(attend, mask=None), plain
    for one, other in ((ours, theirs), (gradient_of_three(ours), gradient_of_three(theirs))):
        received, expected = (
            quick_jit(jax.vmap(function, in_axes))(*arrays) for function in (one, other)
        )
        assert_close(received, expected)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_vmap_over_masks(axis: int) -> None:
    """Masks may be vmapped, alone and under ``grad``."""
    masks = np.stack([MASK, draw_mask(MASK.shape, 1), draw_mask(MASK.shape, 2)], axis)
    masks[..., 0] = True

    def transform(function: Function) -> Function:
        def run(*arrays: Any) -> Any:
            return jax.vmap(lambda mask: function(*arrays, mask=mask), axis)(masks)

        return pulled(run)

    assert_alike(transform, attend, plain)


@pytest.mark.parametrize("setting", ["disable_jit", "debug_nans", "x64", "eager"])
def test_under_settings(setting: str) -> None:
    """Output and gradients are right without ``jit``, while looking for NaN, and in 64 bits."""
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "disable_jit": jax.disable_jit,
        "debug_nans": lambda: jax.debug_nans(True),
        "x64": lambda: jax.enable_x64(True),
        "eager": contextlib.nullcontext,
    }
    query, key, value = (draw((1, 3, 1, 2), seed) for seed in range(3))
    mask = np.array([[True, False, True], [False] * 3, [True] * 3])
    run = pulled(functools.partial(attend, mask=mask, limit=1.2e-5))
    expected = jax.jit(pulled(functools.partial(plain, mask=mask[None, None])))(query, key, value)
    function = run if setting in ("eager", "disable_jit") else jax.jit(run)
    with contexts[setting]():
        assert_close(function(query, key, value), expected)


def test_debug_nans_in_half_precision() -> None:
    """In half precision, where the masked logits' value would overflow, no NaN arises either."""
    arrays = operands(dtype=np.float16)
    arrays["mask"] = np.zeros((2, 1, 6, 5), bool)
    with jax.debug_nans(True):
        received = output_and_gradients(
            functools.partial(dot_product_attention, max_chunk_size_mb=1e-4), arrays
        )
    assert not any(np.isnan(array).any() for array in received.values())


@pytest.mark.parametrize(
    "function",
    [attend, gradient(attend), forward_of(attend), mapped(attend, (0, 0, 0, 0))],
    ids=["call", "grad", "jvp", "vmap"],
)
def test_eval_shape(function: Function) -> None:
    """Shapes and dtypes are known without running or compiling anything."""
    received = jax.eval_shape(function, *four())
    assert received == jax.eval_shape(function, *shapes_of_four())
    if function is attend:
        assert (received.shape, received.dtype) == ((2, 6, 2, 3), np.float32)


def test_ahead_of_time() -> None:
    """Lowered from shapes alone and compiled before there are arrays, it runs as ever."""
    compiled = jax.jit(pulled(attend)).lower(*shapes_of_four()).compile()
    assert_close(compiled(*four()), jax.jit(pulled(functools.partial(plain, mask=MASK)))(*four()))


def test_export() -> None:
    """Exported, serialised and read back it runs, and has gradients where these were asked for."""
    read = jax.export.export(jax.jit(attend))(*four())
    # JAX needs it to serialise, and does not require it.
    if importlib.util.find_spec("flatbuffers"):
        read = jax.export.deserialize(read.serialize(vjp_order=1))
    assert_close(
        jax.jit(pulled(read.call))(*four()),
        jax.jit(pulled(functools.partial(plain, mask=MASK)))(*four()),
    )


def test_only_what_is_needed_is_kept_for_the_backward_pass() -> None:
    """Between the passes live the operands, the output and two numbers a row, never logits."""
    query, key, value = draw((2, 64, 2, 4)), draw((2, 64, 2, 4)), draw((2, 64, 2, 4))
    attend = functools.partial(dot_product_attention, max_chunk_size_mb=0.01)
    _, pull = jax.eval_shape(functools.partial(jax.vjp, attend), query, key, value)
    kept = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert max(kept) == query.size


# --- Several devices ------------------------------------------------------------------------------


LEAST = {"meshes": 18, "shares": 20, "rings": 15, "mixed": 16, "second": 6, "kernels": 5}
"""Cases that each of these has at least."""


@pytest.mark.parametrize(
    ("script", "devices", "cases"),
    [
        ("sharded", 4, "meshes"),
        ("sharded", 4, "shares"),
        ("sharded", 4, "rings"),
        ("mixed", 8, "mixed"),
        ("mixed", 8, "second"),
        ("mixed", 8, "kernels"),
    ],
)
def test_several_devices(script: str, devices: int, cases: str) -> None:
    """Each device computes its share, and no more is communicated than sums of cotangents.

    A script beside this one does it, on devices of a process of its own.
    """
    path = Path(__file__).with_name(f"{script}.py")
    printed = run_python(path, cases, timeout=1500, **devices_on_cpu(devices))
    errors: dict[str, str] = json.loads(printed)
    assert len(errors) >= LEAST[cases]
    assert {case: error for case, error in errors.items() if error} == {}
