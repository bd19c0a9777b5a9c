"""cuDNN's kernel against float64, on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import compiled_text, draw, exact, operands

from autochunk import dot_product_attention
from autochunk.errors import ArgumentError

pytestmark = pytest.mark.gpu

NAMES = ("query", "key", "value")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"rows": 256, "keys": 256},
    "lengths that do not divide": {"rows": 100, "keys": 77, "key_size": 40},
    "more keys than rows": {"rows": 64, "keys": 128},
    "more rows than keys": {"rows": 128, "keys": 64},
    "shared keys": {"rows": 64, "keys": 64, "heads": 8, "kv_heads": 2},
    "several leading dims": {"leading": (2, 3), "rows": 64, "keys": 64},
    "one row": {"rows": 1, "keys": 64},
}


def attend(implementation: str = "cudnn", **settings: Any) -> Callable[..., jax.Array]:
    return functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=None, **settings
    )


def total(array: jax.Array) -> jax.Array:
    """The sum, in float32."""
    return jnp.sum(array.astype(jnp.float32))


def error(ours: jax.Array, expected: Any) -> float:
    """Largest error, relative to the largest value."""
    largest = np.abs(np.asarray(ours, np.float64) - expected).max()
    return float(largest / max(1e-3, np.abs(expected).max()))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_and_gradients(dtype: Any, shape: dict[str, Any], is_causal: bool) -> None:
    """CuDNN's output and gradients are what attention is, to half precision.

    Causal is counted from the first key, as everywhere here.
    """
    arrays = operands(**({"heads": 4, "key_size": 64} | shape), dtype=dtype)
    expected = exact(arrays, is_causal=is_causal)

    @jax.jit
    def both(cotangent: jax.Array, *moving: jax.Array) -> Any:
        out, pull = jax.vjp(attend(is_causal=is_causal), *moving)
        return {"output": out, **dict(zip(NAMES, pull(cotangent), strict=True))}

    lowered = both.lower(arrays["cotangent"], *(arrays[name] for name in NAMES))
    # Of odd lengths cuDNN has no gradient: our slices have.
    even = shape["rows"] % 2 == shape["keys"] % 2 == 0
    assert ("__cudnn$fmha" in lowered.as_text()) == even
    ours = both(arrays["cotangent"], *(arrays[name] for name in NAMES))
    for name, array in ours.items():
        assert error(array, expected[name]) < 16 * float(jnp.finfo(dtype).eps), name


def test_the_forward_pass_is_not_run_again() -> None:
    """A gradient is one call of cuDNN's forward and one of its backward, though far apart."""
    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    def loss(query: jax.Array, key: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, _: (attend()(x, key, key), None), query, None, length=3)
        return total(out)

    text = compiled_text(jax.jit(jax.grad(loss)), x, x)
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
        lambda f: jax.hessian(lambda x: total(f(x))),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.vmap(jax.grad(lambda y: total(f(y))))(jnp.stack([x, 2 * x])),
    ],
    ids=["jvp", "hessian", "vmap", "vmap of grad"],
)
def test_every_transformation(change: Any) -> None:
    """What cuDNN cannot do is done in slices, from what it saved."""
    query, key = (jnp.asarray(draw((1, 8, 2, 8), seed), jnp.bfloat16) for seed in (0, 1))
    ours = jax.jit(change(lambda x: attend()(x, key, key)))(query)
    wide = [array.astype(jnp.float32) for array in (query, key)]
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(change(lambda x: attend("dense")(x, wide[1], wide[1])))(wide[0])
    assert error(ours, np.asarray(plain, np.float64)) < 0.05


def test_rows_without_a_key() -> None:
    """Where cuDNN takes a mask, a row that is masked throughout is the mean of all values."""
    arrays = operands(rows=64, keys=64, key_size=64, dtype=jnp.bfloat16)
    mask = np.ones((2, 1, 64, 64), bool)
    mask[:, :, 3] = False
    ours = jax.jit(attend())(*(arrays[name] for name in NAMES), None, mask)
    assert error(ours[:, 3], np.asarray(arrays["value"], np.float64).mean(1)) < 0.02


def test_what_it_does_not_take() -> None:
    """The refusal says why: float32 is not for cuDNN."""
    x = draw((1, 64, 2, 64))
    refusal = r"implementation='cudnn' does not take this call.*not float32"
    with pytest.raises(ArgumentError, match=refusal):
        attend()(x, x, x)
