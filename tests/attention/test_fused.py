"""Fused kernels as implementations.

A stand-in that any platform has takes cuDNN's place; cuDNN itself is tested on a GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, compiled_text, draw, exact, operands

from autochunk import dot_product_attention
from autochunk.attention.kernels import Inputs, fused
from autochunk.errors import ArgumentError
from autochunk.implementations import IMPLEMENTATIONS, Implementation

NAMES = ("query", "key", "value")


def _logits(
    query: jax.Array, key: jax.Array, bias: Any, mask: Any, scale: float, is_causal: bool
) -> jax.Array:
    keys = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
    logits = scale * logits if bias is None else scale * logits + bias
    if is_causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None], logits, -1e30)
    return logits if mask is None else jnp.where(mask, logits, -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def stand_in(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: float, is_causal: bool
) -> jax.Array:
    out: jax.Array = _forward(query, key, value, bias, mask, scale, is_causal)[0]
    return out


def _forward(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: float, is_causal: bool
) -> Any:
    logits = _logits(query, key, bias, mask, scale, is_causal)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    values = jnp.repeat(value, query.shape[2] // key.shape[2], axis=2)
    out = jnp.einsum("bhts,bshd->bthd", weights, values).astype(query.dtype)
    return out, (query, key, value, bias, mask, lse, out)


def _backward(scale: float, is_causal: bool, saved: Any, d_out: jax.Array) -> Any:
    query, key, value, bias, mask, lse, out = saved
    groups = query.shape[2] // key.shape[2]
    weights = jnp.exp(_logits(query, key, bias, mask, scale, is_causal) - lse[..., None])
    d_weights = jnp.einsum("bthd,bshd->bhts", d_out, jnp.repeat(value, groups, axis=2))
    d_logits = weights * (d_weights - jnp.einsum("bthd,bthd->bht", out, d_out)[..., None]) * scale
    d_query = jnp.einsum("bhts,bshd->bthd", d_logits, jnp.repeat(key, groups, axis=2))
    d_keys = jnp.einsum("bhts,bthd->bshd", d_logits, query)
    d_values = jnp.einsum("bhts,bthd->bshd", weights, d_out)
    d_key, d_value = (
        g.reshape((*g.shape[:2], g.shape[2] // groups, groups, g.shape[3])).sum(3)
        for g in (d_keys, d_values)
    )
    return d_query, d_key, d_value, None, None


stand_in.defvjp(_forward, _backward)


class Recorded:
    """The stand-in, which notes how often it is traced."""

    def __init__(self) -> None:
        self.traced = 0

    def __call__(
        self, inputs: Inputs, *, scale: float, is_causal: bool, left: int | None
    ) -> jax.Array:
        """Takes key sizes that are multiples of 8."""
        if inputs.query.shape[-1] % 8:
            raise NotImplementedError("the key size must be a multiple of 8")
        self.traced += 1
        rows, keys = inputs.query.shape[1], inputs.key.shape[1]
        mask, row, key = inputs.mask, jnp.arange(rows)[:, None], jnp.arange(keys)[None]
        if mask is None:
            mask = jnp.ones((1, 1, rows, keys), bool)
        assert mask.shape[2:] == (rows, keys)
        if left is not None:
            mask &= (key >= row - left)[None, None]
        for lengths, index in (
            (inputs.query_seq_lengths, row),
            (inputs.key_value_seq_lengths, key),
        ):
            if lengths is not None:
                mask &= index[None, None] < lengths[:, None, None, None]
        return stand_in(*inputs[:4], mask, scale, is_causal)


def install(monkeypatch: pytest.MonkeyPatch, platforms: tuple[str, ...] = ("cpu",)) -> Recorded:
    """Puts a stand-in in cuDNN's place."""
    kernel = Recorded()
    monkeypatch.setattr(fused, "stand_in", kernel, raising=False)
    entry = Implementation("a stand-in", kernel=f"{fused.__name__}:stand_in", platforms=platforms)
    monkeypatch.setitem(IMPLEMENTATIONS, "cudnn", entry)
    return kernel


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    kernel = install(monkeypatch)
    jax.clear_caches()
    yield kernel
    jax.clear_caches()


def attend(implementation: str = "cudnn", **settings: Any) -> Callable[..., jax.Array]:
    return functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=None, **settings
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


MASK = draw((2, 4, 6, 6), 7) < 0.5
MASK[0, :, 2] = False
LENGTHS = {"key_value_seq_lengths": np.asarray([3, 0], np.int32)}
PADDED = {**LENGTHS, "query_seq_lengths": np.asarray([6, 4], np.int32)}
FORMS: dict[str, dict[str, Any]] = {
    "mask": {"mask": MASK},
    "mask of one row": {"mask": MASK[:, :1, :1]},
    "mask of one key": {"mask": MASK[..., :1]},
    "key lengths": LENGTHS,
    "lengths": PADDED,
    "causal lengths": {**PADDED, "is_causal": True},
    "causal mask": {"mask": MASK, "is_causal": True},
    "window": {"local_window_size": (2, 0)},
    "causal window": {"local_window_size": (1, 7), "is_causal": True},
    "lengths beyond the arrays": {"key_value_seq_lengths": np.asarray([7, -1], np.int32)},
    "highest precision": {"precision": "highest"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_that_it_takes(recorded: Recorded, form: dict[str, Any]) -> None:
    """Rows without a key are the mean of the values, and have its gradients, by the kernel too.

    Whatever no row sees has no part in either, finite or not.
    """
    arrays = operands((2,), 6, 6, 4, 2, 8)
    moving = {name: arrays[name] for name in NAMES}

    def both(implementation: str, moving: Any) -> Any:
        out, pull = jax.vjp(lambda one: attend(implementation, **form)(**one), moving)
        return out, pull(arrays["cotangent"])

    received = jax.jit(functools.partial(both, "cudnn"))(moving)
    assert recorded.traced
    assert_close(received, jax.jit(functools.partial(both, "dense"))(moving))
    if form.get("key_value_seq_lengths", [0])[0] == 3:
        for name in ("key", "value"):
            moving[name] = moving[name].copy()
            moving[name][0, 3:] = np.nan
        poisoned = jax.tree.map(np.asarray, jax.jit(functools.partial(both, "cudnn"))(moving))
        assert_close(poisoned[0][0], received[0][0])
        for name, one in poisoned[1][0].items():
            np.testing.assert_allclose(one[0], received[1][0][name][0], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_that_cudnn_takes(form: dict[str, Any]) -> None:
    """As the stand-in."""
    arrays = operands((2,), 6, 6, 4, 2, 64, dtype=jnp.bfloat16)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {name: jnp.asarray(arrays[name]) for name in NAMES}

    def both(implementation: str, moving: Any, dtype: Any) -> Any:
        moving = {name: one.astype(dtype) for name, one in moving.items()}
        out, pull = jax.vjp(lambda one: attend(implementation, **form)(**one), moving)
        return out, pull(cotangent.astype(out.dtype))

    lowered = jax.jit(lambda one: both("cudnn", one, jnp.bfloat16)).lower(moving)
    assert "fmha" in lowered.as_text()
    assert "Backward" in lowered.as_text()
    received = jax.tree.map(lambda x: x.astype(jnp.float32), lowered.compile()(moving))
    assert_close(received, jax.jit(lambda one: both("dense", one, jnp.float32))(moving), 3e-2)


def test_the_log_sum_exp(recorded: Recorded) -> None:
    """It is what the kernel keeps for its gradient; its own gradient is computed in slices."""
    arrays = operands((2,), 6, 5, 2, key_size=8)
    moving = [arrays[name] for name in NAMES]

    def both(implementation: str) -> Any:
        attention = attend(implementation, return_residual=True, **LENGTHS)
        out = attention(*moving)
        return out, jax.grad(lambda *a: jnp.sum(jnp.tanh(attention(*a)[1])), (0, 1))(*moving)

    received = jax.jit(lambda: both("cudnn"))()
    assert recorded.traced
    assert_close(received, jax.jit(lambda: both("dense"))())


def test_a_bias_has_a_gradient(recorded: Recorded) -> None:
    """Where the kernel has none, training runs in slices."""
    arrays = operands((2,), 6, 5, 2, key_size=8, bias=(1, 2, 6, 5))
    names = (*NAMES, "bias")
    out, pull = jax.vjp(attend(), *(arrays[name] for name in names))
    ours = {"output": out, **dict(zip(names, pull(arrays["cotangent"]), strict=True))}
    assert_close(ours, exact(arrays))


ONE_LENGTH = {"key_value_seq_lengths": np.asarray([2], np.int32)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "refused": ({"size": 7}, "multiple of 8"),
    "other platform": ({"platforms": ("cuda",)}, "it runs on cuda, not on cpu"),
    "window": ({"local_window_size": (3, 1)}, "reaches to the right"),
    "window and lengths": ({"local_window_size": (3, 0), **ONE_LENGTH}, "window_size and lengths"),
    "offset": ({"query_offset": 2, "is_causal": True}, "a query_offset"),
    "cap": ({"logits_soft_cap": 2.0}, "logits_soft_cap"),
    "slopes": ({"alibi_slopes": np.ones(2, np.float32)}, "alibi_slopes"),
    "algorithm": ({"precision": "BF16_BF16_F32"}, "precision BF16_BF16_F32"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    """Asked for by name, the refusal is an error that says why."""
    settings = {"size": 8, "platforms": ("cpu",), **changes}
    install(monkeypatch, settings.pop("platforms"))
    x = draw((1, 4, 2, settings.pop("size")))
    refusal = f"implementation='cudnn' does not take this call.*{said}"
    with pytest.raises(ArgumentError, match=refusal):
        attend(**settings)(x, x, x)
