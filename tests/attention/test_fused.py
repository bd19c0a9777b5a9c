"""Fused kernels as implementations.

A stand-in that any platform has takes the place of each; they themselves are tested on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from reference import assert_close, compiled_text, draw, exact, operands
from test_libraries import UNSEEN, check_what_no_row_sees, forms_of_call, masks_of_a_part

from autochunk import dot_product_attention
from autochunk.attention.kernels import Inputs, fused, in_place, libraries, maps
from autochunk.attention.kernels.inputs import KeyRange, Settings
from autochunk.attention.kernels.libraries import Kernel
from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS, Implementation

NAMES = ("query", "key", "value")


Arrays = dict[str, jax.Array]


def _visible(rest: Arrays, settings: Settings, rows: int, keys: int) -> jax.Array:
    row, key = jnp.arange(rows)[:, None], jnp.arange(keys)[None]
    visible = rest.get("mask", jnp.ones((1, 1, 1, 1), bool))
    if settings.left is not None:
        visible &= (key >= row - settings.left)[None, None]
    if settings.right is not None:
        visible &= (key <= row + settings.right)[None, None]
    for name, index in (("query_seq_lengths", row), ("key_value_seq_lengths", key)):
        if name in rest:
            visible &= index[None, None] < rest[name][:, None, None, None]
    return visible


def _logits(moving: Arrays, rest: Arrays, settings: Settings) -> jax.Array:
    query, key = moving["query"], moving["key"]
    keys = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
    logits = settings.scale * logits + moving.get("bias", 0)
    if settings.soft_cap is not None:
        logits = settings.soft_cap * jnp.tanh(logits / settings.soft_cap)
    return jnp.where(_visible(rest, settings, *logits.shape[-2:]), logits, -1e30)


def by_pallas(array: jax.Array) -> jax.Array:
    """The array through a Pallas kernel, which is how many of the kernels are written."""

    def kernel(given: Any, result: Any) -> None:
        result[...] = given[...]

    like = jax.ShapeDtypeStruct(array.shape, array.dtype)
    copied: jax.Array = pl.pallas_call(kernel, out_shape=like, interpret=True)(array)
    return copied


def _output(moving: Arrays, rest: Arrays, settings: Settings, keeps: tuple[str, ...]) -> jax.Array:
    out: jax.Array = _forward(moving, rest, settings, keeps)[0]
    return out


def _forward(moving: Arrays, rest: Arrays, settings: Settings, keeps: tuple[str, ...]) -> Any:
    logits = _logits(moving, rest, settings)
    maximum = logits.max(-1)
    total = jnp.exp(logits - maximum[..., None]).sum(-1)
    lse = maximum + jnp.log(total)
    weights = jnp.exp(logits - lse[..., None])
    groups = moving["query"].shape[2] // moving["key"].shape[2]
    values = jnp.repeat(moving["value"], groups, axis=2)
    out = by_pallas(jnp.einsum("bhts,bshd->bthd", weights, values).astype(moving["query"].dtype))
    kept = (lse,) if keeps == ("log-sum-exp",) else (maximum, total)
    return out, (moving, rest, kept, out)


def _backward(settings: Settings, keeps: tuple[str, ...], saved: Any, d_out: jax.Array) -> Any:
    moving, rest, (maximum, *total), out = saved
    groups = moving["query"].shape[2] // moving["key"].shape[2]
    others = {name: array for name, array in moving.items() if name != "value"}
    logits, pull = jax.vjp(lambda others: _logits(others, rest, settings), others)
    weights = jnp.exp(logits - maximum[..., None]) / (total[0][..., None] if total else 1)
    d_weights = jnp.einsum("bthd,bshd->bhts", d_out, jnp.repeat(moving["value"], groups, axis=2))
    delta = jnp.einsum("bthd,bthd->bht", out, d_out)
    (gradients,) = pull(weights * (d_weights - delta[..., None]))
    d_value = jnp.einsum("bhts,bthd->bshd", weights, d_out)
    d_value = d_value.reshape((*d_value.shape[:2], -1, groups, d_value.shape[3])).sum(3)
    return {**gradients, "value": d_value}, None


stand_in = jax.custom_vjp(_output, nondiff_argnums=(2, 3))
stand_in.defvjp(_forward, _backward)
# As Tokamax's: what its derivative keeps are other objects than what it gives.
behind_a_primitive = jax.custom_vjp(_output, nondiff_argnums=(2, 3))
behind_a_primitive.defvjp(_forward, _backward, optimize_remat=True)


class Recorded:
    """The stand-in for a kernel, which notes how often it is traced."""

    def __init__(self, like: Kernel) -> None:
        self.like = like
        self.traced = 0
        self.ranges: list[KeyRange] = []

    def __call__(self, inputs: Inputs, settings: Settings, key_range: KeyRange | None) -> jax.Array:
        """Takes key sizes that are multiples of 8, and looks at no key outside of the range."""
        if inputs.query.shape[-1] % 8:
            raise NotImplementedError("the key size must be a multiple of 8")
        self.traced += 1
        given = inputs.present
        rows, keys = inputs.query.shape[1], inputs.key.shape[1]
        for name in {"bias", "mask"} & given.keys():
            shared = name == "mask" and self.like.one_row_masks
            assert given[name].shape[2:] in [(rows, keys), *([(1, keys)] if shared else [])]
        moving = {name: one for name, one in given.items() if name in self.like.differentiated}
        rest = {name: one for name, one in given.items() if name not in moving}
        if key_range is not None:
            self.ranges.append(key_range)
            batch, rows, heads, _ = inputs.query.shape
            assert key_range.first is None or key_range.first.shape == key_range.end.shape
            assert jnp.broadcast_shapes(key_range.end.shape, (batch, heads, rows)) == (
                batch,
                heads,
                rows,
            )
            key = jnp.arange(keys)
            within = key < key_range.end[..., None]
            if key_range.first is not None:
                within &= key_range.first[..., None] <= key
            rest["mask"] = within & rest.get("mask", True)
        # what a kernel may not do without jax's own rules for other operands
        assert "bias" not in rest
        function = stand_in if "log-sum-exp" in self.like.keeps else behind_a_primitive
        out: jax.Array = function(moving, rest, settings, self.like.keeps)
        return out


KERNELS = [name for name, one in IMPLEMENTATIONS.items() if one.fused]


def install(
    monkeypatch: pytest.MonkeyPatch, name: str = "cudnn", platforms: tuple[str, ...] = ("cpu",)
) -> Recorded:
    """Puts a stand-in in the place of a kernel, with what its entry says of it."""
    kernel: Kernel = getattr(libraries, name)
    recorded = Recorded(kernel)
    few = None if kernel.skips is None else 4
    monkeypatch.setattr(libraries, name, dataclasses.replace(kernel, attend=recorded, skips=few))
    entry = Implementation("a stand-in", kernel=f"{libraries.__name__}:{name}", platforms=platforms)
    monkeypatch.setitem(IMPLEMENTATIONS, name, entry)
    return recorded


@pytest.fixture(params=KERNELS)
def recorded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Recorded]:
    kernel = install(monkeypatch, request.param)
    monkeypatch.setattr(f"{__name__}.STANDING_IN", request.param)
    jax.clear_caches()
    yield kernel
    jax.clear_caches()


STANDING_IN = "cudnn"
"""The kernel that has a stand-in."""


def attend(implementation: str | None = None, **settings: Any) -> Callable[..., jax.Array]:
    """The op by an implementation, or by that which has a stand-in."""
    name = implementation or STANDING_IN
    return functools.partial(
        dot_product_attention, implementation=name, max_chunk_size_mb=None, **settings
    )


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"leading": (2,)},
    "no leading dim": {"leading": ()},
    "several leading dims": {"leading": (2, 3), "rows": 4},
    "shared keys": {"heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(recorded: Recorded, shape: dict[str, Any], is_causal: bool) -> None:
    """The fused kernel computes the output and, from what was saved, the gradients."""
    arrays = operands(**shape, key_size=8)

    @jax.jit
    def both(cotangent: jax.Array, *moving: jax.Array) -> Any:
        out, pull = jax.vjp(attend(is_causal=is_causal), *moving)
        return {"output": out, **dict(zip(NAMES, pull(cotangent), strict=True))}

    assert_close(
        both(arrays["cotangent"], *(arrays[name] for name in NAMES)),
        exact(arrays, is_causal=is_causal),
    )
    assert recorded.traced


def test_the_forward_pass_is_not_run_again(recorded: Recorded) -> None:
    """A gradient is the kernel's forward and its backward, seven products, though far apart."""
    arrays = [jax.ShapeDtypeStruct((2, 16, 2, 8), jnp.float32)] * 3

    def loss(*moving: jax.Array) -> jax.Array:
        # A scan over layers keeps what backward needs and nothing else: the compiler cannot merge
        # the two forward passes.
        out, _ = jax.lax.scan(
            lambda x, _: (attend()(x, *moving[1:]), None), moving[0], None, length=3
        )
        return jnp.sum(out)

    text = compiled_text(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), *arrays)
    assert recorded.traced
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) == 7


def total(array: jax.Array) -> jax.Array:
    """Something with derivatives of every order."""
    return jnp.sum(jnp.sin(array))


CHANGES: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], Any]]] = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "jacfwd": lambda f: jax.jacfwd(lambda x: jnp.sum(jnp.sin(f(x)), axis=-1)),
    "hessian": lambda f: jax.hessian(lambda x: total(f(x))),
    "grad of jvp": lambda f: jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (jnp.cos(x),))[1])),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f: (
        lambda x: jax.vmap(jax.grad(lambda y: total(f(y))))(jnp.stack([x, 2 * x]))
    ),
    "grad of vmap": lambda f: jax.grad(lambda x: total(jax.vmap(f)(jnp.stack([x, 2 * x])))),
    "remat": lambda f: jax.grad(lambda x: total(jax.checkpoint(f)(x))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_transformation(recorded: Recorded, change: Callable[..., Any]) -> None:
    """What the kernel cannot do itself is done in slices, from what it saved."""
    query, key, value = draw((2, 4, 2, 8)), draw((2, 5, 2, 8), 1), draw((2, 5, 2, 8), 2)
    ours = jax.jit(change(lambda x: attend()(x, key, value)))(query)
    plain = jax.jit(change(lambda x: attend("dense")(x, key, value)))(query)
    np.testing.assert_allclose(ours, plain, atol=2e-5)
    assert recorded.traced


# The forms that all kernels take.
TAKEN = (
    "mask",
    "mask of one row",
    "mask of one key",
    "key lengths",
    "lengths",
    "causal lengths",
    "causal mask",
    "window",
    "causal window",
    "lengths beyond the arrays",
    "highest precision",
)
FORMS = {name: form for name, form in forms_of_call(6).items() if name in TAKEN}
LENGTHS = FORMS["key lengths"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_that_it_takes(recorded: Recorded, form: dict[str, Any]) -> None:
    """Rows without a key are the mean of the values, and have its gradients, by the kernel too.

    Whatever no row sees has no part in either, finite or not.
    """
    arrays = operands((2,), 6, 6, 4, 2, 8)
    moving = {name: arrays[name] for name in NAMES}

    def both(implementation: str | None, moving: Any) -> Any:
        out, pull = jax.vjp(lambda one: attend(implementation, **form)(**one), moving)
        return out, pull(arrays["cotangent"])

    received = jax.jit(functools.partial(both, None))(moving)
    assert recorded.traced
    assert_close(received, jax.jit(functools.partial(both, "dense"))(moving))
    if form.get("key_value_seq_lengths", [0])[0] == 3:
        for name in ("key", "value"):
            moving[name] = moving[name].copy()
            moving[name][0, 3:] = np.nan
        poisoned = jax.tree.map(np.asarray, jax.jit(functools.partial(both, None))(moving))
        assert_close(poisoned[0][0], received[0][0])
        for name, one in poisoned[1][0].items():
            np.testing.assert_allclose(one[0], received[1][0][name][0], atol=1e-5)


@pytest.mark.parametrize(("keys", "is_worth_it"), [(3, False), (4, True), (6, True)])
@pytest.mark.parametrize("form", ["mask", "segments", "causal", "key lengths"])
def test_which_keys_a_mask_shows(
    recorded: Recorded, form: str, keys: int, is_worth_it: bool
) -> None:
    """A kernel that leaves others out is told where there are many, but of what it knows itself."""
    given: dict[str, Any] = dict(forms_of_call(6)[form])
    for name in {"mask", "key_value_segment_ids"} & given.keys():
        given[name] = given[name][..., :keys]
    arrays = operands((2,), 6, keys, 4, 2, 8)
    del arrays["cotangent"]
    jax.jit(attend(**given)).lower(**arrays)
    has_mask = form in ("mask", "segments")
    skips = recorded.like.skips is not None
    assert bool(recorded.ranges) == (skips and is_worth_it and has_mask)
    assert all(
        (key_range.first is not None) == (form == "segments") for key_range in recorded.ranges
    )


@pytest.mark.parametrize("form", masks_of_a_part(3))
def test_keys_that_are_left_out(recorded: Recorded, form: str) -> None:
    """Told which keys a mask shows, a kernel gives the same as dense attention by the mask."""
    given = masks_of_a_part(12)[form]
    arrays = operands((2,), 12, 12, 4, 2, 8)
    moving = {name: arrays[name] for name in NAMES}

    def both(implementation: str | None) -> Any:
        out, pull = jax.vjp(lambda one: attend(implementation, **given)(**one), moving)
        return out, pull(arrays["cotangent"])

    assert_close(jax.jit(lambda: both(None))(), jax.jit(lambda: both("dense"))())
    assert recorded.traced
    assert bool(recorded.ranges) == (recorded.like.skips is not None)


@pytest.mark.parametrize("exported", [False, True])
def test_rows_without_a_key_know_of_exports(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, exported: bool
) -> None:
    """What puts them right is told whether the program is exported, forward and backward."""
    told: list[bool] = []

    def spy(function: Any) -> Any:
        def told_first(*arrays: jax.Array) -> Any:
            told.append(in_place._is_kept.get())
            return function(*arrays)

        return told_first

    for module, name in ((fused, "can_mend"), (maps, "with_cotangents_of_means")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    arrays = operands((2,), 6, 6, 4, 2, 8)
    moving = [arrays[name] for name in NAMES]
    gradient = jax.jit(jax.grad(lambda *a: total(attend(**LENGTHS)(*a)), argnums=(0, 1, 2)))
    if exported:
        jax.export.export(gradient)(*moving)
    else:
        gradient.lower(*moving)
    assert recorded.traced
    assert told == [exported] * 2


@pytest.mark.parametrize("form", UNSEEN)
def test_what_no_row_sees_does_not_matter(recorded: Recorded, form: str) -> None:
    """Keys and values that no row sees, and queries that see none: not even where they are NaN."""
    check_what_no_row_sees(STANDING_IN, form, jnp.float32, 1e-5)
    assert recorded.traced


def test_the_log_sum_exp(recorded: Recorded) -> None:
    """It is what the kernel keeps for its gradient; its own gradient is computed in slices."""
    arrays = operands((2,), 6, 5, 2, key_size=8)
    moving = [arrays[name] for name in NAMES]

    def both(implementation: str | None) -> Any:
        attention = attend(implementation, return_residual=True, **LENGTHS)
        out = attention(*moving)
        return out, jax.grad(lambda *a: jnp.sum(jnp.tanh(attention(*a)[1])), (0, 1))(*moving)

    received = jax.jit(lambda: both(None))()
    assert recorded.traced
    assert_close(received, jax.jit(lambda: both("dense"))())


@pytest.mark.parametrize(
    "shape", [(1, 4, 6, 5), (2, 4, 6, 5), (2, 1, 6, 5), (1, 4, 1, 5), (1, 1, 6, 1), (4, 6, 5)]
)
def test_a_bias_has_a_gradient(recorded: Recorded, shape: tuple[int, ...]) -> None:
    """By the kernel, or where it has none of that form in slices."""
    arrays = operands((2,), 6, 5, 4, 2, key_size=8, bias=shape)
    names = (*NAMES, "bias")
    out, pull = jax.vjp(jax.jit(attend()), *(arrays[name] for name in names))
    ours = {"output": out, **dict(zip(names, pull(arrays["cotangent"]), strict=True))}
    assert_close(ours, exact(arrays))
    assert recorded.traced


def test_the_gradient_of_a_bias_is_the_kernels(recorded: Recorded) -> None:
    """Of a bias that all sequences share it is computed with the others: seven products at most."""
    arrays = operands((2,), 6, 5, 4, 2, key_size=8, bias=(1, 4, 6, 5))
    gradient = jax.grad(lambda *a: total(attend()(*a)), argnums=(0, 1, 2, 3))
    text = compiled_text(jax.jit(gradient), *(arrays[name] for name in (*NAMES, "bias")))
    assert recorded.traced
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) <= 7


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "refused": ({"size": 7}, "multiple of 8"),
    "other platform": ({"platforms": ("cuda",)}, "it runs on cuda, not on cpu"),
    "cap": ({"logits_soft_cap": 2.0}, "logits_soft_cap"),
    "slopes": ({"alibi_slopes": np.ones(2, np.float32)}, "alibi_slopes"),
    "algorithm": ({"precision": "BF16_BF16_F32"}, "precision that names an algorithm"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    """Asked for by name, the refusal is an error that says why."""
    settings = {"size": 8, "platforms": ("cpu",), **changes}
    install(monkeypatch, platforms=settings.pop("platforms"))
    x = draw((1, 4, 2, settings.pop("size")))
    refusal = f"implementation='cudnn' does not take this call.*{said}"
    with pytest.raises(ArgumentError, match=refusal):
        attend("cudnn", **settings)(x, x, x)
