"""``MultiheadAttention``, and models patched with it, against Equinox's own."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from reference import (
    assert_close,
    compiled_text,
    draw,
    draw_mask,
    largest_array,
    structure,
)

from autochunk.equinox import MultiheadAttention, multihead_attention, patched
from autochunk.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")

SMALLEST = 4e-6  # MB: one logit at a time
KEY = jax.random.key(5)
SIZES: dict[str, Any] = {
    "num_heads": 2,
    "query_size": 7,
    "key_size": 5,
    "value_size": 3,
    "output_size": 11,
    "qk_size": 4,
    "vo_size": 6,
}


def inputs(rows: int = 6, keys: int = 5, dtype: Any = np.float32) -> list[Any]:
    return [draw((rows, 7), 1, dtype), draw((keys, 5), 2, dtype), draw((keys, 3), 3, dtype)]


def theirs(**settings: Any) -> Any:
    return eqx.nn.MultiheadAttention(**(SIZES | settings), key=KEY)


def rotated(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    rope = jax.vmap(eqx.nn.RotaryPositionalEmbedding(4), in_axes=1, out_axes=1)
    return rope(query), rope(key), value


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "biases": ({f"use_{name}_bias": True for name in ("query", "key", "value", "output")}, {}),
    "mask": ({}, {"mask": draw_mask((6, 5))}),
    "mask of each head": ({}, {"mask": draw_mask((2, 6, 5))}),
    "mask of numbers": ({}, {"mask": draw_mask((6, 5)).astype(np.float32)}),
    "rows that see nothing": ({}, {"mask": np.zeros((6, 5), bool)}),
    "process_heads": ({}, {"process_heads": rotated}),
    "inference": ({"dropout_p": 0.5}, {"inference": True, "key": KEY}),
    "inference mode": ({"dropout_p": 0.5, "inference": True}, {}),
    "bfloat16": ({"dtype": jnp.bfloat16}, {}),
}


@pytest.mark.parametrize(("settings", "call"), CALLS.values(), ids=CALLS.keys())
def test_what_equinox_computes(settings: dict[str, Any], call: dict[str, Any]) -> None:
    """The output is that of the module that it was, in the smallest slices and in none."""
    module = theirs(**settings)
    arrays = inputs(dtype=settings.get("dtype", np.float32))

    limits = (SMALLEST, None)
    modules = [module, *(patched(module, max_chunk_size_mb=limit) for limit in limits)]
    run = quick_jit(lambda arrays: [one(*arrays, **call) for one in modules])
    expected, *received = run(arrays)
    for out in received:
        assert_close(out, expected, 3e-2 if settings.get("dtype") else 2e-5)
        assert out.dtype == expected.dtype


def test_gradients() -> None:
    """They are those of the module that it was, of each of its parameters."""
    settings, call = CALLS["biases"][0], CALLS["mask"][1]

    def gradients(module: Any) -> Any:
        moving, fixed = eqx.partition(module, eqx.is_array)
        run: Any = lambda moving: eqx.combine(moving, fixed)(*inputs(), **call)  # noqa: E731
        loss = lambda moving: jnp.sum(jnp.sin(run(moving)))  # noqa: E731
        return jax.tree.leaves(quick_jit(jax.grad(loss))(moving))

    module = theirs(**settings)
    received = gradients(patched(module, max_chunk_size_mb=SMALLEST))
    assert len(received) == 8
    assert_close(received, gradients(module))


def test_the_module_is_made_as_equinox_makes_it() -> None:
    """Same arguments, same parameters from the same key."""
    made = MultiheadAttention(**SIZES, key=KEY, max_chunk_size_mb=64, implementation="xla_rows")
    assert_close(jax.tree.leaves(made), jax.tree.leaves(theirs()))
    assert (made.max_chunk_size_mb, made.implementation) == (64, "xla_rows")
    assert_close(made(*inputs()), theirs()(*inputs()))


def test_the_function_takes_equinoxs_own_module() -> None:
    """It computes the module's call, with a limit of the call's own."""
    received = multihead_attention(theirs(), *inputs(), max_chunk_size_mb=SMALLEST)
    assert_close(received, theirs()(*inputs()))


def weights(module: Any, **call: Any) -> np.ndarray[Any, Any]:
    """What a module weighs values with: [H=2, T'=6, T=64]; its values are the identity's rows."""
    query, key, value = draw((6, 7), 1), draw((64, 5), 2), np.eye(64, dtype=np.float32)
    out = eqx.filter_jit(module)(query, key, value, **call)  # [6, 2 * 64]
    return np.moveaxis(np.asarray(out).reshape(6, 2, 64), 1, 0)


def test_dropout() -> None:
    """Each head drops a share of its own; a key decides which; slices make no difference."""
    module = theirs(value_size=64, vo_size=64, output_size=128, dropout_p=0.25)
    wired = (jnp.concatenate([jnp.eye(64)] * 2), jnp.eye(128))
    where = lambda one: (one.value_proj.weight, one.output_proj.weight)  # noqa: E731
    module = eqx.tree_at(where, module, wired)
    ours = patched(module, max_chunk_size_mb=None)
    whole, dropped = weights(ours, inference=True), weights(ours, key=KEY)
    assert_close(whole, weights(module, inference=True))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)
    assert 0.65 < kept.mean() < 0.85
    assert not (kept[0] == kept[1]).all()
    assert (dropped != weights(ours, key=jax.random.key(6))).any()
    assert_close(weights(patched(module, max_chunk_size_mb=1e-3), key=KEY), dropped)


class Doubling(eqx.nn.MultiheadAttention):
    """Self-attention, with a parameter of its own."""

    factor: jax.Array
    times: int = eqx.field(static=True)

    def __init__(self, *, times: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.factor, self.times = jnp.float32(2), times

    def __call__(self, x: Any, **call: Any) -> Any:  # type: ignore[override]
        """Queries are larger than keys and values."""
        return super().__call__(x * self.factor * self.times, x, x, **call)


class Named(eqx.nn.MultiheadAttention):
    """A subclass that leaves the attention alone."""


class Block(eqx.Module):
    """A model as users have it."""

    doubling: Doubling
    others: list[Any]
    activation: Callable[..., Any]

    def __init__(self) -> None:
        sizes: dict[str, Any] = {"num_heads": 2, "query_size": 8, "key": KEY}
        self.doubling = Doubling(times=3, **sizes)
        self.others = [Named(**sizes), eqx.nn.LayerNorm(8), eqx.nn.MultiheadAttention(**sizes)]
        self.activation = jax.nn.relu

    def __call__(self, x: Any) -> jax.Array:
        """Three kinds of attention."""
        named, norm, own = self.others
        x = self.activation(named(x, x, x) + self.doubling(x))
        x = jax.vmap(norm)(x)
        return own(x, x, x)  # type: ignore[no-any-return]


def test_a_model_is_patched_in_one_line() -> None:
    """Everywhere in it, subclasses included; leaves, classes and results stay."""
    model = Block()
    swapped = patched(model, max_chunk_size_mb=SMALLEST)
    assert_close(swapped(draw((6, 8))), model(draw((6, 8))))
    same = [one is two for one, two in zip(*map(jax.tree.leaves, (swapped, model)), strict=True)]
    assert all(same)
    attentions = [swapped.doubling, swapped.others[0], swapped.others[2]]
    assert all(isinstance(one, MultiheadAttention) for one in attentions)
    assert isinstance(swapped.doubling, Doubling)
    assert isinstance(swapped.others[0], Named)
    assert type(swapped.doubling) is type(patched(model).doubling)
    assert not any(isinstance(one, MultiheadAttention) for one in model.others)


def test_a_patched_model_is_an_equinox_model() -> None:
    """It can be edited, switched to inference, saved, loaded and patched again."""
    swapped = patched(Block(), max_chunk_size_mb=64)
    edited = eqx.tree_at(lambda one: one.doubling.query_proj.weight, swapped, jnp.zeros((8, 8)))
    assert not np.asarray(edited.doubling.query_proj.weight).any()
    assert eqx.nn.inference_mode(swapped).others[0].dropout.inference
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, Block())
    file.seek(0)
    assert_close(
        eqx.filter(eqx.tree_deserialise_leaves(file, edited), eqx.is_array),
        eqx.filter(swapped, eqx.is_array),
    )
    again = patched(swapped, max_chunk_size_mb=32)
    assert again.others[2].max_chunk_size_mb == 32
    assert structure(patched(Block(), max_chunk_size_mb=32)) == structure(again)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_the_limit_holds_under_vmap(training: bool) -> None:
    """It is of the whole batch that the user's ``vmap`` makes."""
    x = draw((4, 64, 8))
    module: Any = eqx.nn.MultiheadAttention(2, 8, key=KEY)

    def largest(module: Any) -> int:
        run = lambda x: jnp.sum(jax.vmap(lambda one: module(one, one, one))(x) ** 2)  # noqa: E731
        return largest_array(compiled_text(jax.jit(jax.grad(run) if training else run), x))

    logits = 4 * 2 * 64 * 64 * 4
    assert largest(module) >= logits
    assert largest(patched(module, max_chunk_size_mb=logits / 8e6)) <= logits / 4


@pytest.mark.parametrize("limit", [SMALLEST, None])
def test_strict_promotion(limit: float | None) -> None:
    """A model that forbids implicit promotion, of dtypes and ranks, trains in half precision."""
    module = patched(theirs(dtype=jnp.bfloat16, dropout_p=0.5), max_chunk_size_mb=limit)
    moving, fixed = eqx.partition(module, eqx.is_array)
    arrays, mask = inputs(dtype=jnp.bfloat16), draw_mask((2, 6, 5))
    run: Any = lambda moving: eqx.combine(moving, fixed)(*arrays, mask, key=KEY)  # noqa: E731
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out, pull = jax.vjp(run, moving)
        assert {one.dtype for one in jax.tree.leaves((out, pull(out)))} == {jnp.dtype(jnp.bfloat16)}


def test_the_name_in_equinox_may_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where code that makes modules by Equinox's name shall make ours, patched modules included."""
    own = eqx.nn.MultiheadAttention
    for made in (MultiheadAttention, lambda *args, **settings: patched(own(*args, **settings))):
        monkeypatch.setattr(eqx.nn, "MultiheadAttention", made)
        module = theirs()
        assert type(module) is MultiheadAttention
        assert_close(module(*inputs()), own(**SIZES, key=KEY)(*inputs()))


def test_a_deprecated_argument() -> None:
    """``deterministic`` is ``inference``, with a warning, as in Equinox."""
    module = patched(theirs(dropout_p=0.5))
    with pytest.warns(UserWarning, match="deterministic"):
        received = module(*inputs(), deterministic=True)
    assert_close(received, theirs()(*inputs()))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mask": ({}, {"mask": np.ones((1, 5), bool)}, r"mask must have shape \(6, 5\) or"),
    "mask's heads": ({}, {"mask": np.ones((1, 6, 5), bool)}, r"or \(2, 6, 5\); got \(1, 6, 5\)"),
    "process_heads": ({}, {"process_heads": lambda q, k, v: (q[:1], k, v)}, "process_heads must"),
    "rate": ({"dropout_p": 1.0}, {"key": KEY}, r"in the range \[0, 1\)"),
    "dtype": ({"dtype": jnp.complex64}, {}, "float32.*complex64"),
}


@pytest.mark.parametrize(("settings", "call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done(settings: dict[str, Any], call: dict[str, Any], message: str) -> None:
    """It is an ArgumentError, which is a ValueError as Equinox's."""
    with pytest.raises(ArgumentError, match=message):
        patched(theirs(**settings))(*inputs(), **call)


def test_dropout_needs_a_key() -> None:
    """As in Equinox a RuntimeError, where it is not for inference."""
    for module in (theirs(dropout_p=0.5), patched(theirs(dropout_p=0.5))):
        with pytest.raises(RuntimeError, match="requires a key"):
            module(*inputs())


def test_dropout_of_another_kind_is_an_error() -> None:
    """What a user put in its place cannot be done in slices; the identity can."""
    kinds: list[Any] = [eqx.nn.Identity(), eqx.nn.Lambda(jnp.tanh)]
    identity, other = (eqx.tree_at(lambda it: it.dropout, theirs(), kind) for kind in kinds)
    assert_close(patched(identity)(*inputs()), theirs()(*inputs()))
    with pytest.raises(ArgumentError, match=r"dropout must be an eqx.nn.Dropout.*Lambda"):
        patched(other)(*inputs())


def test_a_model_without_attention_is_an_error() -> None:
    """It is not left as it is in silence."""
    with pytest.raises(ArgumentError, match=r"eqx.nn.MultiheadAttention among.*Linear"):
        patched(eqx.nn.Linear(2, 2, key=KEY))


@pytest.mark.parametrize(
    "settings", [{"max_chunk_size_mb": 0}, {"implementation": "cuda"}], ids=str
)
def test_settings_are_checked_at_once(settings: dict[str, Any]) -> None:
    """Where a module is made or patched, not where it is called."""
    for make in (
        lambda: patched(theirs(), **settings),
        lambda: MultiheadAttention(2, 4, key=KEY, **settings),
    ):
        with warnings.catch_warnings(), pytest.raises(ArgumentError, match=next(iter(settings))):
            make()
