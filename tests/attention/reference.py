"""What attention is, written twice as plainly as possible, and helpers that several tests share.

``exact`` is float64 numpy with gradients written by hand, so that it shares nothing with JAX;
``plain`` is for JAX's transformations to act on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from factories import quick_jit

Array = jax.Array | np.ndarray[Any, Any]
# Numpy arrays by name; Any, so that they may be given as keywords beside others.
Arrays = dict[str, Any]

MOST = float(jnp.finfo(jnp.float32).max)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Normal numbers, the same for the same arguments."""
    drawn: np.ndarray[Any, Any] = np.random.default_rng([seed, *shape]).normal(size=shape)
    return drawn.astype(dtype)


def draw_mask(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """A mask that lets about two in three through."""
    return np.random.default_rng([seed, *shape]).random(shape) < 0.67


def operands(
    leading: tuple[int, ...] = (2,),
    rows: int = 6,
    keys: int = 5,
    heads: int = 2,
    kv_heads: int | None = None,
    key_size: int = 4,
    value_size: int | None = None,
    *,
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    dtype: Any = np.float32,
) -> Arrays:
    """Arguments of a call by name, and the output's cotangent."""
    kv_heads, value_size = kv_heads or heads, value_size or key_size
    arrays = {
        "query": draw((*leading, rows, heads, key_size), 1, dtype),
        "key": draw((*leading, keys, kv_heads, key_size), 2, dtype),
        "value": draw((*leading, keys, kv_heads, value_size), 3, dtype),
        "cotangent": draw((*leading, rows, heads, value_size), 4, dtype),
    }
    if bias is not None:
        arrays["bias"] = draw(bias, 5, dtype)
    if mask is not None:
        arrays["mask"] = draw_mask(mask, 6)
    return arrays


def output_and_gradients(
    function: Callable[..., jax.Array], arrays: Arrays
) -> dict[str, np.ndarray[Any, Any]]:
    """The output, and the gradients of query, key, value and bias, from one compiled program."""
    moving = {name: array for name, array in arrays.items() if name not in ("mask", "cotangent")}

    @quick_jit
    def both(
        moving: dict[str, jax.Array], mask: jax.Array | None, cotangent: jax.Array
    ) -> dict[str, jax.Array]:
        out, pull = jax.vjp(lambda moving: function(**moving, mask=mask), moving)
        return {"output": out, **pull(cotangent)[0]}

    return {
        name: np.asarray(array)
        for name, array in both(moving, arrays.get("mask"), arrays["cotangent"]).items()
    }


def exact(
    arrays: Arrays, *, scale: float | None = None, is_causal: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """Output and gradients of attention in float64.

    A row that is masked throughout weighs all values alike and gives its logits no gradient.
    """
    query, key, value, cotangent = (
        np.asarray(arrays[name], np.float64) for name in ("query", "key", "value", "cotangent")
    )
    groups = query.shape[-2] // key.shape[-2]
    # [..., T, H, K]
    keys, values = np.repeat(key, groups, axis=-2), np.repeat(value, groups, axis=-2)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = np.einsum("...thk,...shk->...hts", query, keys) * factor
    bias = np.asarray(arrays.get("bias", 0.0), np.float64)
    allowed = np.broadcast_to(arrays.get("mask", True), logits.shape)
    if is_causal:
        allowed = allowed & np.tri(query.shape[-3], key.shape[-3], dtype=bool)
    live = allowed.any(axis=-1, keepdims=True)
    logits = np.where(live, np.where(allowed, logits + bias, -np.inf), 0.0)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("...hts,...shv->...thv", weights, values)
    d_weights = np.einsum("...thv,...shv->...hts", cotangent, values)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * live
    results = {
        "output": out,
        "query": np.einsum("...hts,...shk->...thk", d_logits, keys) * factor,
        "key": _ungroup(np.einsum("...hts,...thk->...shk", d_logits, query) * factor, groups),
        "value": _ungroup(np.einsum("...hts,...thv->...shv", weights, cotangent), groups),
    }
    if "bias" in arrays:
        results["bias"] = _sum_to(d_logits, bias.shape)
    return results


def _ungroup(array: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
    *leading, heads, size = array.shape
    grouped: np.ndarray[Any, Any] = array.reshape((*leading, heads // groups, groups, size))
    return np.asarray(grouped.sum(axis=-2))


def _sum_to(array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    broadcast = tuple(dim for dim, size in enumerate(shape) if size == 1 and array.shape[dim] != 1)
    return np.asarray(array.sum(axis=broadcast, keepdims=True))


def plain(*arrays: Any, **settings: Any) -> Any:
    """Attention in plain JAX; arguments as of ``_plain``."""
    with jax.numpy_rank_promotion("allow"):
        return _plain(*arrays, **settings)


def _plain(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: tuple[int, int] | None = None,
    query_segment_ids: Array | None = None,
    key_value_segment_ids: Array | None = None,
    query_offset: Array | int = 0,
    logits_soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    return_residual: bool = False,
) -> Any:
    groups = query.shape[-2] // key.shape[-2]
    keys, values = jnp.repeat(key, groups, axis=-2), jnp.repeat(value, groups, axis=-2)
    logits = jnp.einsum("...thk,...shk->...hts", query, keys) / math.sqrt(query.shape[-1])
    rows, columns = logits.shape[-2:]
    row = jnp.arange(rows)[:, None] + jnp.asarray(query_offset)[..., None, None, None]
    ahead = jnp.arange(columns) - row  # [..., 1, T', T]
    if bias is not None:
        logits += jnp.expand_dims(bias, range(logits.ndim - bias.ndim))
    if alibi_slopes is not None:
        logits += -jnp.asarray(alibi_slopes)[..., None, None] * jnp.abs(ahead)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    allowed, inside = jnp.ones(logits.shape, bool), jnp.ones((), bool)
    if mask is not None:
        allowed &= jnp.expand_dims(mask, range(logits.ndim - mask.ndim))
    if is_causal:
        allowed &= ahead <= 0
    if local_window_size is not None:
        allowed &= (ahead >= -local_window_size[0]) & (ahead <= local_window_size[1])
    if key_value_seq_lengths is not None:
        lengths = jnp.asarray(key_value_seq_lengths)[..., None, None, None]
        allowed &= jnp.arange(columns) < lengths
    if query_seq_lengths is not None:
        lengths = jnp.asarray(query_seq_lengths)[..., None, None, None]
        inside = jnp.arange(rows)[:, None] < lengths
        allowed &= inside
    if query_segment_ids is not None:
        own = jnp.asarray(query_segment_ids)[..., None, :, None]
        allowed &= own == jnp.asarray(key_value_segment_ids)[..., None, None, :]
    live = jnp.any(allowed & (logits > -jnp.inf), -1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(live, jnp.where(allowed, logits, -jnp.inf), 0.0))
    weights = jnp.where(inside, weights, 0.0)
    out = jnp.einsum("...hts,...shv->...thv", weights, values)
    if not return_residual:
        return out
    seen = jnp.where(allowed, logits, -1e30)
    lse = jnp.where(live[..., 0], jax.scipy.special.logsumexp(seen, -1), -0.7 * MOST)
    return out, jnp.moveaxis(lse, -1, -2)


def compiled_text(jitted: jax.stages.Wrapped, *arrays: Any) -> str:
    """The text of what XLA makes of the function."""
    text = jitted.lower(*arrays).compile().as_text()
    assert text is not None
    return text


def largest_array(text: str) -> int:
    """Bytes of the largest array that a compiled program's text names."""
    sizes = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
    shapes = re.findall(rf"\b({'|'.join(sizes)})\[([0-9,]+)\]", text)
    return max(
        sizes[dtype] * math.prod(int(size) for size in dims.split(",")) for dtype, dims in shapes
    )


def temp_bytes(function: Callable[..., Any], *arrays: Any) -> int:
    """What XLA sets aside for the function, besides arguments and results."""
    memory: Any = jax.jit(function).lower(*arrays).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def structure(tree: Any) -> Any:
    """A tree without its leaves; jax's own annotation is none that a type checker can follow."""
    return jax.tree.structure(tree)


def assert_close(received: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Compares trees of arrays.

    The tolerance is relative to the largest element, or absolute where that is less than one.
    """
    assert structure(received) == structure(expected)
    compare = functools.partial(_assert_close, tolerance=tolerance)
    jax.tree.map_with_path(compare, received, expected)


def _assert_close(path: Any, received: Any, expected: Any, tolerance: float) -> None:
    received, expected = np.asarray(received, np.float64), np.asarray(expected, np.float64)
    assert received.shape == expected.shape, (
        f"{jax.tree_util.keystr(path)}: {received.shape}, expected {expected.shape}"
    )
    if expected.size:
        error, largest = np.max(np.abs(received - expected)), np.max(np.abs(expected))
        # NaN fails, too.
        assert error <= tolerance * max(1.0, largest), (
            f"{jax.tree_util.keystr(path)}: error {error:.3g}, largest {largest:.3g}"
        )


def lowering_for_an_h100() -> Any:
    """The context in which jax lowers Pallas kernels for a GPU that is not there."""
    sharding: Any = jax.sharding
    if jax.__version_info__ < (0, 12):
        return contextlib.nullcontext()
    h100 = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
    device = sharding.AbstractDevice(**h100)
    return sharding.use_abstract_mesh(sharding.AbstractMesh((1,), ("x",), abstract_device=device))
