"""Flax: an ``attention_fn`` for the attention modules of ``flax.nnx`` and ``flax.linen``.

Both call their ``attention_fn`` with conventions of their own, which are Flax's here: numeric
masks, promotion of dtypes, dropout unless ``deterministic``. linen leaves out, without a word,
what a function does not name; so all that either passes is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.linen import dot_product_attention as linens_attention
from flax.linen import dtypes

from autochunk.attention.arguments import Arguments
from autochunk.attention.op import attend
from autochunk.errors import ArgumentError
from autochunk.plan import check_implementation, check_max_chunk_size_mb


def attention_fn(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    *,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """``nnx.dot_product_attention`` and ``linen.dot_product_attention``, in slices.

    For ``nnx.MultiHeadAttention(..., attention_fn=attention_fn)`` and
    ``linen.MultiHeadDotProductAttention(..., attention_fn=attention_fn)``, with a cache
    (``decode``) or without. H is the number of query heads, N that of key/value heads and divides
    H.

    Args:
      query: [..., T', H, K]. Complex numbers, of which there are no slices, are left to linen's
        function: no limit holds.
      key: [..., T, N, K].
      value: [..., T, N, V].
      bias: added to the logits; broadcasts to [..., H, T', T].
      mask: boolean or number, zero takes no part; broadcasts to [..., H, T', T].
      broadcast_dropout: the same weights are dropped for all leading dims and heads.
      dropout_rng: key of the random numbers. Which weights are dropped depends on it and on their
        indices alone; they are others than Flax drops.
      dropout_rate: share of the weights that are dropped.
      deterministic: no dropout.
      dtype: of the computation; None is what the three arrays promote to.
      precision: of the products, as in ``jax.lax.dot``.
      module: must be None: there are no weights that a module could sow.
      promote_dtype: as of ``flax.nnx``: takes the three arrays as a tuple, and ``dtype``.
      is_causal: the query at position i sees keys 0 to i only.
      force_fp32_for_softmax: the output and, whatever the plan, the softmax are float32. Without,
        a dense plan with a ``dropout_rate`` has bfloat16 logits where all inputs are bfloat16, as
        Flax has.
      einsum_dot_general: must be None, as the next two: products are not done by ``jnp.einsum``.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``autochunk.dot_product_attention``.
      implementation: as in ``autochunk.dot_product_attention``.

    Returns:
      [..., T', H, V].

    Raises:
      ArgumentError: what is asked for cannot be done, shapes do not fit, or a setting is not
        usable. It is a ValueError.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import autochunk.flax
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2,
      ...     in_features=16,
      ...     decode=False,
      ...     attention_fn=autochunk.flax.attention_fn,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((1, 32, 16))).shape
      (1, 32, 16)
    """
    _check_none(
        module=module,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    if promote_dtype is None:
        query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_shapes(jnp.shape(query), jnp.shape(key), jnp.shape(value))
    if jnp.iscomplexobj(query):
        if is_causal:
            raise ArgumentError("is_causal must be False for complex numbers: pass it as the mask")
        left: jax.Array = linens_attention(
            *(query, key, value, bias, mask, broadcast_dropout, dropout_rng, dropout_rate),
            deterministic,
            precision=precision,
            force_fp32_for_softmax=force_fp32_for_softmax,
        )
        return left
    added = None if bias is None else _floating(jnp.asarray(bias))
    arguments = Arguments.checked(
        query=query,
        key=key,
        value=value,
        bias=added,
        mask=None if mask is None else jnp.asarray(mask).astype(jnp.bool_),
        is_causal=is_causal,
        dropout_rate=0.0 if deterministic else dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        half_logits=not force_fp32_for_softmax
        and _flax_has_half_logits(query, added, dropout_rate),
    )
    out: jax.Array = attend(arguments, max_chunk_size_mb, implementation)
    if force_fp32_for_softmax:
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))
    return out


def make_attention_fn(
    *,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> Callable[..., jax.Array]:
    """``attention_fn`` with a limit, or an implementation, of its own.

    The same settings give the same function, so that modules made with it are equal.

    Args:
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``autochunk.dot_product_attention``.
      implementation: as in ``autochunk.dot_product_attention``.

    Raises:
      ArgumentError: there is no such limit or implementation. It is a ValueError.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen
      >>> import autochunk.flax
      >>> in_slices = autochunk.flax.make_attention_fn(max_chunk_size_mb=0.001)
      >>> layer = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=in_slices)
      >>> x = jnp.ones((1, 32, 16))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 32, 16)
    """
    return _with_settings(
        check_max_chunk_size_mb(max_chunk_size_mb), check_implementation(implementation)
    )


@functools.cache
def _with_settings(
    max_chunk_size_mb: float | Literal["auto"] | None, implementation: str | None
) -> Callable[..., jax.Array]:
    return functools.partial(
        attention_fn, max_chunk_size_mb=max_chunk_size_mb, implementation=implementation
    )


_WHY_NOT = {
    "module": "attention in slices has no weights to sow: call it with sow_weights=False, or leave "
    "attention_fn out of modules whose weights are looked at",
    "einsum_dot_general": "products in slices are not done by einsum",
    "qk_attn_weights_einsum": "products in slices are not done by einsum",
    "attn_weights_value_einsum": "products in slices are not done by einsum",
}


def _check_none(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"{name} must be None, since {_WHY_NOT[name]}; got {value!r:.80}")


def _check_shapes(*shapes: tuple[int, ...]) -> None:
    """What Flax requires, in its words."""
    query, key, value = shapes
    if not len(query) == len(key) == len(value):
        raise ArgumentError(f"query, key and value must have the same rank; got shapes {shapes}")
    if not query[:-3] == key[:-3] == value[:-3]:
        raise ArgumentError(f"batch dims of query, key and value must match; got shapes {shapes}")
    if key[-3:-2] != value[-3:-2]:
        raise ArgumentError(f"key and value lengths must match; got {key[-3]} and {value[-3]}")
    if query[-1:] != key[-1:]:
        raise ArgumentError(f"query and key depths must match; got {query[-1]} and {key[-1]}")


def _flax_has_half_logits(
    query: jax.typing.ArrayLike, bias: jax.Array | None, dropout_rate: float
) -> bool:
    """Whether a dense plan may have logits of half precision, with Flax's memory.

    Without dropout nnx leaves it to ``jax.nn``, whose logits are float32. Those of float16 would
    overflow: Flax divides queries before their product, a dense plan the logits after it.
    """
    dtype = jnp.result_type(query)
    same = bias is None or bias.dtype == dtype
    return bool(dropout_rate) and same and dtype == jnp.bfloat16


def _floating(bias: jax.Array) -> jax.Array:
    return bias if jnp.issubdtype(bias.dtype, jnp.floating) else bias.astype(jnp.float32)
