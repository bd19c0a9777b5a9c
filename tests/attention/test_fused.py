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
from reference import assert_close, draw, exact, operands

from autochunk import dot_product_attention
from autochunk.attention.kernels import FUSED, Fused
from autochunk.errors import ArgumentError

NAMES = ("query", "key", "value")


def _logits(
    query: jax.Array, key: jax.Array, bias: Any, mask: Any, scale: float, is_causal: bool
) -> jax.Array:
    groups = query.shape[2] // key.shape[2]
    logits = (
        jnp.einsum(
            "bthd,bshd->bhts",
            query,
            jnp.repeat(key, groups, axis=2),
            preferred_element_type=jnp.float32,
        )
        * scale
    )
    logits = logits if bias is None else logits + bias
    if is_causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None], logits, -1e30)
    return logits if mask is None else jnp.where(mask, logits, -1e30)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def stand_in(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: float, is_causal: bool
) -> jax.Array:
    return _forward(query, key, value, bias, mask, scale, is_causal)[0]


def _forward(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: float, is_causal: bool
) -> Any:
    logits = _logits(query, key, bias, mask, scale, is_causal)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    out = jnp.einsum(
        "bhts,bshd->bthd", weights, jnp.repeat(value, query.shape[2] // key.shape[2], axis=2)
    ).astype(query.dtype)
    return out, (query, key, value, bias, mask, lse, out)


def _backward(scale: float, is_causal: bool, saved: Any, d_out: jax.Array) -> Any:
    query, key, value, bias, mask, lse, out = saved
    groups = query.shape[2] // key.shape[2]
    weights = jnp.exp(_logits(query, key, bias, mask, scale, is_causal) - lse[..., None])
    d_weights = jnp.einsum("bthd,bshd->bhts", d_out, jnp.repeat(value, groups, axis=2))
    d_logits = weights * (d_weights - jnp.einsum("bthd,bthd->bht", out, d_out)[..., None]) * scale
    d_query = jnp.einsum("bhts,bshd->bthd", d_logits, jnp.repeat(key, groups, axis=2))
    d_key, d_value = (
        jnp.einsum("bhts,bthd->bshd", d_logits, query),
        jnp.einsum("bhts,bthd->bshd", weights, d_out),
    )
    d_key, d_value = (
        g.reshape((*g.shape[:2], g.shape[2] // groups, groups, g.shape[3])).sum(3)
        for g in (d_key, d_value)
    )
    return d_query, d_key, d_value, None, None


stand_in.defvjp(_forward, _backward)


class Recorded:
    """The stand-in, which notes how often it is traced."""

    def __init__(self) -> None:
        self.traced = 0

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any,
        mask: Any,
        *,
        scale: float,
        is_causal: bool,
    ) -> jax.Array:
        """Takes key sizes that are multiples of 8."""
        if query.shape[-1] % 8:
            raise NotImplementedError("the key size must be a multiple of 8")
        self.traced += 1
        return stand_in(query, key, value, bias, mask, scale, is_causal)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    function = Recorded()
    monkeypatch.setitem(FUSED, "cudnn", Fused(function, ("cpu",)))
    jax.clear_caches()
    yield function
    jax.clear_caches()


def attend(**settings: Any) -> Callable[..., jax.Array]:
    return functools.partial(
        dot_product_attention, implementation="cudnn", max_chunk_size_mb=None, **settings
    )


SHAPES = {
    "plain": {"leading": (2,), "rows": 6, "keys": 5, "heads": 2, "key_size": 8},
    "no leading dim": {"leading": (), "rows": 6, "keys": 5, "heads": 2, "key_size": 8},
    "several leading dims": {"leading": (2, 3), "rows": 4, "keys": 5, "heads": 2, "key_size": 8},
    "shared keys": {
        "leading": (2,),
        "rows": 6,
        "keys": 5,
        "heads": 4,
        "kv_heads": 2,
        "key_size": 8,
    },
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(recorded: Recorded, shape: dict[str, Any], is_causal: bool) -> None:
    """The fused kernel computes the output and, from what was saved, the gradients."""
    arrays = operands(**shape)

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

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert recorded.traced
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) == 7


CHANGES: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Callable[[jax.Array], Any]]] = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "jacfwd": lambda f: jax.jacfwd(lambda x: jnp.sum(jnp.sin(f(x)), axis=-1)),
    "hessian": lambda f: jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)))),
    "grad of jvp": lambda f: jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (jnp.cos(x),))[1])),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "vmap of grad": lambda f: (
        lambda x: jax.vmap(jax.grad(lambda y: jnp.sum(jnp.sin(f(y)))))(jnp.stack([x, 2 * x]))
    ),
    "grad of vmap": lambda f: jax.grad(
        lambda x: jnp.sum(jnp.sin(jax.vmap(f)(jnp.stack([x, 2 * x]))))
    ),
    "remat": lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(f)(x)))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_transformation(recorded: Recorded, change: Callable[..., Any]) -> None:
    """What the kernel cannot do itself is done in slices, from what it saved."""
    query, key, value = draw((2, 4, 2, 8)), draw((2, 5, 2, 8), 1), draw((2, 5, 2, 8), 2)
    ours = jax.jit(change(lambda x: attend()(x, key, value)))(query)
    plain = jax.jit(
        change(
            lambda x: dot_product_attention(
                x, key, value, implementation="dense", max_chunk_size_mb=None
            )
        )
    )(query)
    np.testing.assert_allclose(ours, plain, atol=2e-5)
    assert recorded.traced


def test_a_bias_has_a_gradient(recorded: Recorded) -> None:
    """Where the kernel has none, training runs in slices."""
    arrays = operands((2,), 6, 5, 2, key_size=8, bias=(1, 2, 6, 5))
    names = (*NAMES, "bias")
    out, pull = jax.vjp(attend(), *(arrays[name] for name in names))
    ours = {"output": out, **dict(zip(names, pull(arrays["cotangent"]), strict=True))}
    assert_close(ours, exact(arrays))


@pytest.mark.parametrize(
    ("size", "platforms", "said"),
    [(7, ("cpu",), "multiple of 8"), (8, ("cuda",), "it runs on cuda, not on cpu")],
    ids=["refused", "other platform"],
)
def test_what_it_does_not_take(
    monkeypatch: pytest.MonkeyPatch, size: int, platforms: tuple[str, ...], said: str
) -> None:
    """Asked for by name, the refusal is an error that says why."""
    monkeypatch.setitem(FUSED, "cudnn", Fused(Recorded(), platforms))
    x = draw((1, 4, 2, size))
    with pytest.raises(
        ArgumentError, match=f"implementation='cudnn' does not take this call.*{said}"
    ):
        attend()(x, x, x)
