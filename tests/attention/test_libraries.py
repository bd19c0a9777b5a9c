"""The kernels of other libraries: what each takes, on any machine; what each computes, on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, compiled_text, draw, operands

from autochunk import dot_product_attention
from autochunk.attention.arguments import Arguments
from autochunk.attention.kernels import Call, Inputs, libraries, maps
from autochunk.attention.kernels import tokamax as tokamax_calls
from autochunk.attention.kernels.inputs import KeyRange, Settings
from autochunk.attention.kernels.libraries import FORMS, Kernel, lacking
from autochunk.attention.kernels.tokamax import quiet
from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS
from autochunk.plan import Plan, Plans
from autochunk.workload import MODES

NAMES = ("query", "key", "value")

# name: (what marks it in a lowered program, what it keeps, how many of the forms it lacks)
ROWS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "cudnn": (r"__cudnn\$fmha", ("log-sum-exp",), 8),
    "tokamax_mosaic": ("mosaic_gpu", ("maximum", "sum"), 4),
    "tokamax_triton": ("triton", ("maximum", "sum"), 5),
}
KERNELS: dict[str, Kernel] = {name: getattr(libraries, name) for name in ROWS}


def test_every_kernel_has_a_row() -> None:
    """And every row a kernel."""
    assert list(ROWS) == [name for name, one in IMPLEMENTATIONS.items() if one.fused]


@pytest.mark.parametrize("name", ROWS)
def test_entry(name: str) -> None:
    """What it keeps, and forms that there are; all compute the cotangents of what is multiplied."""
    kernel, (_, keeps, lacks) = KERNELS[name], ROWS[name]
    assert (kernel.keeps, len(kernel.lacks)) == (keeps, lacks)
    assert set(kernel.lacks) <= FORMS.keys()
    assert set(NAMES) <= set(kernel.differentiated)


def forms_of_call(size: int) -> dict[str, dict[str, Any]]:
    """Forms of call of two sequences of a size with four heads, of which some rows see no key."""
    mask = draw((2, 4, size, size), 7) < 0.5
    mask[0, :, 2] = False
    lengths = {"key_value_seq_lengths": np.asarray([3, 0], np.int32)}
    padded = {**lengths, "query_seq_lengths": np.asarray([size, 4], np.int32)}
    bias = draw((1, 4, size, size), 8).astype(np.float32)
    ids = np.sort(draw((2, size), 9) * 2).astype(np.int32)
    segments = {"query_segment_ids": ids + np.asarray([[0], [1]]), "key_value_segment_ids": ids}
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": mask},
        "mask of one row": {"mask": mask[:, :1, :1]},
        "mask of one key": {"mask": mask[..., :1]},
        "key lengths": lengths,
        "lengths": padded,
        "causal lengths": {**padded, "is_causal": True},
        "causal mask": {"mask": mask, "is_causal": True},
        "window": {"local_window_size": (2, 0)},
        "causal window": {"local_window_size": (1, 7), "is_causal": True},
        "window to the right": {"local_window_size": (1, 2)},
        "window and lengths": {"local_window_size": (2, 0), **padded},
        "lengths beyond the arrays": {
            "key_value_seq_lengths": np.asarray([size + 1, -1], np.int32)
        },
        "bias": {"bias": bias},
        "bias of each sequence": {"bias": np.concatenate([bias, 2 * bias])},
        "bias of one row": {"bias": bias[:, :, :1]},
        "bias and mask": {"bias": bias, "mask": mask[:, :1, :1]},
        "causal bias": {"bias": bias, "is_causal": True},
        "cap": {"logits_soft_cap": 2.0},
        "cap and window": {"logits_soft_cap": 2.0, "local_window_size": (3, 1)},
        "offset": {"query_offset": 1, "is_causal": True},
        "offsets": {"query_offset": np.asarray([2, -3], np.int32), "is_causal": True},
        "offsets alone": {"query_offset": np.asarray([2, -3], np.int32)},
        "offsets, window and lengths": {
            "query_offset": np.asarray([2, -3], np.int32),
            "local_window_size": (5, 0),
            **lengths,
        },
        "segments": segments,
        "causal segments and lengths": {**segments, **padded, "is_causal": True},
        "segments and a bias": {**segments, "bias": bias},
        "segments, window and mask": {**segments, "local_window_size": (3, 2), "mask": mask},
        "slopes": {"alibi_slopes": np.asarray([0.5, 0.25, 0.1, 0.0], np.float32)},
        "residual": {"return_residual": True},
        "highest precision": {"precision": "highest"},
        "algorithm": {"precision": "BF16_BF16_F32"},
    }


T = 64
FORMS_OF_CALL = forms_of_call(T)
MASK, LENGTHS = FORMS_OF_CALL["mask"]["mask"], FORMS_OF_CALL["key lengths"]
# What each does not take, forward or differentiated.
REFUSED: dict[str, set[str]] = {
    "cudnn": {
        "bias of each sequence",
        "bias of one row",
        "cap",
        "cap and window",
        "slopes",
        "residual",
        "algorithm",
    },
    "tokamax_mosaic": {"slopes", "residual", "algorithm"},
    "tokamax_triton": {"slopes", "residual", "algorithm", "cap", "cap and window"},
}


@pytest.mark.parametrize("form", FORMS_OF_CALL)
@pytest.mark.parametrize("name", ROWS)
def test_forms_that_are_lacking(name: str, form: str) -> None:
    """By the table, before the kernel is asked; what it lacks forward it lacks in training."""
    query, shared = draw((2, T, 4, 8)), draw((2, T, 2, 8), 1)
    inputs, call = described(query, shared, FORMS_OF_CALL[form], name)
    forward, training = (
        bool(lacking(KERNELS[name], inputs, call, training=training)) for training in (False, True)
    )
    assert training == (form in REFUSED[name])
    assert training or not forward


@pytest.mark.parametrize("form", [*FORMS_OF_CALL, "dropout"])
@pytest.mark.parametrize("name", ROWS)
def test_what_a_workload_tells_is_true(name: str, form: str) -> None:
    """No kernel is foretold for what it lacks by a field alone; and what is ruled out it lacks."""
    dtype = IMPLEMENTATIONS[name].dtypes[0]
    query, key = (jnp.asarray(draw((2, T, heads, 8)), dtype) for heads in (4, 2))
    rate = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    given = FORMS_OF_CALL.get(form, rate)
    arguments = Arguments.checked(query=query, key=key, value=key, **given)
    plan = Plan(name)
    call = arguments.call(Plans(plan, plan))
    for mode in MODES:
        training = mode == "training"
        lacks = bool(lacking(KERNELS[name], arguments.inputs(), call, training=training))
        ruled_out = not IMPLEMENTATIONS[name].may_take(arguments.workload().with_mode(mode))
        assert lacks or not ruled_out
        if form in ("dropout", "slopes", "cap", "residual"):
            assert ruled_out == lacks


def described(query: Any, key: Any, form: dict[str, Any], name: str) -> tuple[Inputs, Call]:
    """A call as the kernels have it."""
    arguments = Arguments.checked(query=query, key=key, value=key, **form)
    plan = Plan(name)
    return arguments.inputs(), arguments.call(Plans(plan, plan))


def test_log_lines_of_tokamax_stay_away(caplog: pytest.LogCaptureFixture) -> None:
    """Each new shape would be one; its other messages come through, and after it all do."""
    with quiet():
        logging.getLogger("absl").warning("Autotuning cache miss for %s", "a call")
        logging.getLogger("absl").warning("something else")
    logging.getLogger("absl").warning("Autotuning cache miss for %s", "someone else's")
    assert [record.getMessage() for record in caplog.records] == [
        "something else",
        "Autotuning cache miss for someone else's",
    ]


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_a_tokamax_that_keeps_its_kernels_elsewhere(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is called by its function's own arguments, as where there is no mask."""
    asked: list[Any] = []
    tokamax = types.ModuleType("tokamax")
    monkeypatch.setattr(
        tokamax,
        "dot_product_attention",
        lambda *_, implementation, **__: asked.append(implementation),
        raising=False,
    )
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    settings = Settings(1.0, None, None, None, None)
    monkeypatch.setattr(tokamax_calls, "_is_measured", lambda: True)
    for key_range in (None, KeyRange(None, jnp.ones((1, 1, 8), jnp.int32))):
        for rows in (8, 256):
            query = jnp.zeros((1, rows, 2, 8))
            KERNELS[f"tokamax_{name}"].attend(Inputs(query, query, query), settings, key_range)
    assert asked == [[name]] * 4


# On a GPU


def available(name: str) -> str:
    entry = IMPLEMENTATIONS[name]
    if not entry.installed:
        pytest.skip(entry.how_to_install)
    return name


def attend(implementation: str, **settings: Any) -> Callable[..., jax.Array]:
    return functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=None, **settings
    )


def both(implementation: str, form: dict[str, Any], dtype: Any) -> Callable[[Any, Any], Any]:
    """Output and gradients of a call, in a dtype."""

    def run(moving: dict[str, jax.Array], cotangent: jax.Array) -> Any:
        moving = {name: one.astype(dtype) for name, one in moving.items()}
        out, pull = jax.vjp(lambda one: attend(implementation, **form)(**one), moving)
        return out, pull(cotangent.astype(out.dtype))

    return run


TAKEN = [(name, form) for name in ROWS for form in FORMS_OF_CALL if form not in REFUSED[name]]
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"rows": 8, "keys": 8},
    "lengths that do not divide": {"rows": 100, "keys": 76, "key_size": 40},
    "one row": {"rows": 1, "keys": 64},
    "several leading dims": {"leading": (2, 3), "rows": 64, "keys": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "form"), TAKEN, ids=[" ".join(one) for one in TAKEN])
def test_every_form(name: str, form: str) -> None:
    """By the kernel forward and backward, and right, also where rows see no key."""
    given = dict(FORMS_OF_CALL[form])
    dtypes = [jnp.dtype(one) for one in IMPLEMENTATIONS[available(name)].dtypes]
    arrays = operands((2,), T, T, 4, 2, 64)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {one: jnp.asarray(arrays[one]) for one in NAMES}
    if "bias" in given:
        moving["bias"] = jnp.asarray(given.pop("bias"))
    if form == "highest precision" and "float32" in IMPLEMENTATIONS[name].dtypes:
        dtypes = [jnp.dtype(jnp.float32)]
    for dtype in dtypes:
        if dtype == jnp.float16:
            continue
        lowered = jax.jit(both(name, given, dtype)).lower(moving, cotangent)
        assert len(re.findall(ROWS[name][0], lowered.as_text())) >= 2
        received = jax.tree.map(
            lambda x: x.astype(jnp.float32), lowered.compile()(moving, cotangent)
        )
        exactly = {**given, "precision": "highest"}
        expected = jax.jit(both("dense", exactly, jnp.float32))(moving, cotangent)
        allowed = 3e-2 if dtype == jnp.bfloat16 else 1e-5 if "precision" in given else 3e-3
        assert_close(received, expected, allowed)


PADDED_QUERY = np.where(np.arange(T)[:, None] < T // 2, np.arange(T) < 40, False)
BIAS = FORMS_OF_CALL["bias"]["bias"]
UNSEEN: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "key lengths": (LENGTHS, slice(3, None), slice(0)),
    "lengths": (
        {"key_value_seq_lengths": np.asarray([9, T]), "query_seq_lengths": np.asarray([50, T])},
        slice(9, None),
        slice(50, None),
    ),
    "mask of one row": ({"mask": np.arange(T) < 40}, slice(40, None), slice(0)),
    "mask": ({"mask": PADDED_QUERY}, slice(40, None), slice(T // 2, None)),
    "segments": (
        {
            "query_segment_ids": np.where(np.arange(T) < T // 2, 1, 0),
            "key_value_segment_ids": np.where(np.arange(T) < 40, 1, 2),
        },
        slice(40, None),
        slice(T // 2, None),
    ),
    "offset": ({"query_offset": -9, "is_causal": True}, slice(T - 9, None), slice(9)),
    "mask and bias": (
        {"mask": np.arange(T) < 40, "bias": np.where(np.arange(T)[:, None] == 5, -np.inf, BIAS)},
        slice(40, None),
        slice(5, 6),
    ),
}


def check_what_no_row_sees(name: str, form: str, dtype: Any, tolerance: float) -> None:
    """Compares results with those of NaN where nothing is seen."""
    given, keys, rows = UNSEEN[form]
    arrays = operands((2,), T, T, 4, 2, 64)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {one: jnp.asarray(arrays[one]) for one in NAMES}
    run = jax.jit(both(name, given, dtype))
    (out, (clean,)) = jax.device_get(run(moving, cotangent))
    spoilt = dict(moving, query=moving["query"].at[0, rows].set(jnp.nan))
    for one in ("key", "value"):
        spoilt[one] = moving[one].at[0, keys].set(jnp.nan)
    (again, (gradients,)) = jax.device_get(run(spoilt, cotangent))
    seeing = np.setdiff1d(np.arange(T), np.arange(T)[rows])
    pairs = {one: (array, clean[one]) for one, array in gradients.items()}
    pairs["output"] = again[0, seeing], out[0, seeing]
    for received, expected in pairs.values():
        assert_close(received.astype(np.float32), expected.astype(np.float32), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("form", UNSEEN)
@pytest.mark.parametrize("name", ROWS)
def test_what_no_row_sees_does_not_matter(name: str, form: str) -> None:
    """Keys and values that no row sees, and queries that see none: not even where they are NaN."""
    check_what_no_row_sees(available(name), form, jnp.bfloat16, 2e-2)


def masks_of_a_part(size: int) -> dict[str, dict[str, Any]]:
    """Forms of call of two sequences whose masks exclude keys in a row: some tiles throughout."""
    row, key = np.arange(size)[:, None], np.arange(size)
    length = np.asarray([size // 3, size])[:, None, None, None]
    document = np.minimum(key * 5 // size, 3)
    random = draw((2, 4, size, size), 7) < 0.1
    random[1, 2] = False
    return {
        "of one row, padded on the right": {"mask": key < length},
        "of one row, padded on the left": {"mask": key >= size - length},
        "causal": {"mask": (key <= row)[None, None]},
        "causal and padded": {"mask": (key <= row) & (key < length)},
        "causal by a flag and padded": {"mask": key < length, "is_causal": True},
        "random": {"mask": random},
        "nothing": {"mask": np.zeros((1, 1, size, size), bool)},
        "window and mask": {"mask": random[:, :1], "local_window_size": (size // 4, 0)},
        "mask and lengths": {
            "mask": random[:1],
            "key_value_seq_lengths": np.asarray([size // 2, 3], np.int32),
            "query_seq_lengths": np.asarray([7, size - 7], np.int32),
        },
        "segments": {
            "query_segment_ids": document[None],
            "key_value_segment_ids": np.stack([document, document[::-1]]),
        },
        "offset": {"query_offset": np.asarray([-size // 2, 5]), "is_causal": True},
        "bias and mask": {
            "bias": draw((1, 4, size, size), 8).astype(np.float32),
            "mask": key < length,
        },
    }


@pytest.mark.gpu
@pytest.mark.parametrize("form", masks_of_a_part(3))
@pytest.mark.parametrize("name", [name for name, one in KERNELS.items() if one.skips is not None])
def test_keys_that_are_left_out(monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    """Where a kernel is told which keys a mask shows, it gives the same as by the mask alone."""
    monkeypatch.setattr(libraries, name, dataclasses.replace(KERNELS[name], skips=1))
    size, dtype = 384, jnp.dtype(IMPLEMENTATIONS[available(name)].dtypes[0])
    given = masks_of_a_part(size)[form]
    arrays = operands((2,), size, size, 4, 2, 64)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {one: jnp.asarray(arrays[one]) for one in NAMES}
    lowered = jax.jit(both(name, given, dtype)).lower(moving, cotangent)
    assert len(re.findall(ROWS[name][0], lowered.as_text())) >= 2
    received = jax.tree.map(lambda x: x.astype(jnp.float32), lowered.compile()(moving, cotangent))
    exactly = {**given, "precision": "highest"}
    expected = jax.jit(both("dense", exactly, jnp.float32))(moving, cotangent)
    assert_close(received, expected, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "bias"])
@pytest.mark.parametrize("name", ROWS)
def test_every_shape(name: str, form: str, shape: str) -> None:
    """By the kernel where it takes the shape, else in slices: right, and never an error."""
    sizes: dict[str, Any] = {
        "leading": (2,),
        "rows": T,
        "keys": T,
        "heads": 4,
        "kv_heads": 2,
        "key_size": 64,
    }
    sizes |= SHAPES[shape]
    logits = (4, sizes["rows"], sizes["keys"])
    arrays = operands(**sizes, bias=logits if form == "bias" else None)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {one: jnp.asarray(array) for one, array in arrays.items() if array is not None}
    given: dict[str, Any] = {"is_causal": form == "causal"}
    if form == "mask":
        given["mask"] = np.tril(np.ones(logits[1:], bool), 3)
    expected = jax.jit(both("dense", {**given, "precision": "highest"}, jnp.float32))
    try:
        received = jax.jit(both(available(name), given, jnp.bfloat16))(moving, cotangent)
    except ArgumentError as refusal:  # of the forward pass; what is not differentiated is sliced
        pytest.skip(str(refusal))
    received = jax.tree.map(lambda x: x.astype(jnp.float32), received)
    assert_close(received, expected(moving, cotangent), 4e-2)


def total(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(array.astype(jnp.float32)))


CHANGES: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], Any]]] = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "hessian": lambda f: jax.hessian(lambda x: total(f(x))),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f: (
        lambda x: jax.vmap(jax.grad(lambda y: total(f(y))))(jnp.stack([x, 2 * x]))
    ),
    "remat": lambda f: jax.grad(lambda x: total(jax.checkpoint(f)(x))),
    "scan": lambda f: jax.grad(
        lambda x: total(jax.lax.scan(lambda y, _: (f(y), None), x, None, length=2)[0])
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ROWS)
def test_every_transformation(name: str, change: str) -> None:
    """What the kernel cannot do is done in slices, from what it saved."""
    query, key = (jnp.asarray(draw((1, T, 2, 64), seed), jnp.bfloat16) for seed in (0, 1))
    mask = np.tril(np.ones((T, T), bool), 2)
    kernel = attend(available(name), mask=mask)
    ours = jax.jit(CHANGES[change](lambda x: kernel(x, key, key)))(query)
    wide = key.astype(jnp.float32)
    dense = attend("dense", mask=mask, precision="highest")
    plain = jax.jit(CHANGES[change](lambda x: dense(x, wide, wide)))(query.astype(jnp.float32))
    assert_close(ours.astype(jnp.float32), plain, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
def test_the_forward_pass_is_not_run_again(name: str) -> None:
    """A gradient is one call of the kernel's forward and one or two of its backward, far apart."""
    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    kernel = attend(available(name))

    def loss(query: jax.Array, key: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, _: (kernel(x, key, key), None), query, None, length=3)
        return total(out)

    def calls(function: Any) -> int:
        text = compiled_text(jax.jit(function), x, x)
        return len(re.findall("custom_call_target=.*(?:fmha|mosaic|triton)", text))

    both = calls(jax.grad(loss))
    assert 2 <= both <= 3
    assert calls(loss) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROWS)
def test_residuals_are_interchangeable(name: str) -> None:
    """The kernel goes on from what slices kept, and slices from what the kernel kept."""
    plans = [Plans(Plan(one), Plan(one)) for one in (available(name), "xla")]
    arrays = operands((2,), T, T, 4, 2, 64, dtype=jnp.bfloat16)
    inputs, call = described(arrays["query"], arrays["key"], {"mask": MASK[:, :1]}, name)
    wanted = (True, True, True)
    cotangent = jnp.asarray(arrays["cotangent"]).reshape(inputs.query.shape)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(inputs: Inputs, forward: Plans, backward: Plans) -> Any:
        given = tuple(inputs.present.values())
        here: dict[str, Any] = {"platforms": ("cuda",)}
        stats = maps.with_stats(*given, call=call._replace(plans=forward), **here)
        own = call._replace(plans=backward)
        return maps.cotangent(*given, *stats, cotangent, call=own, wanted=wanted, **here)

    gradients = [run(inputs, *pair) for pair in (plans, plans[::-1], plans[1:] * 2)]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
    assert_close(wide[0], wide[2], 3e-2)
    assert_close(wide[1], wide[2], 3e-2)
