"""Equinox: ``eqx.nn.MultiheadAttention`` in slices, made so or swapped into a finished model."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from autochunk.attention.op import dot_product_attention
from autochunk.errors import ArgumentError
from autochunk.plan import check_implementation, check_max_chunk_size_mb

# Users may put ours in place of the name in Equinox; what it named before is meant here.
_Own = eqx.nn.MultiheadAttention


class MultiheadAttention(_Own):
    """``eqx.nn.MultiheadAttention``, its leaves and its results, with bounded memory.

    Example:
      >>> import jax
      >>> import autochunk.equinox
      >>> layer = autochunk.equinox.MultiheadAttention(
      ...     num_heads=2, query_size=16, key=jax.random.key(0)
      ... )
      >>> x = jax.numpy.ones((32, 16))
      >>> layer(x, x, x).shape
      (32, 16)
    """

    max_chunk_size_mb: float | Literal["auto"] | None = eqx.field(static=True, kw_only=True)
    implementation: str | None = eqx.field(static=True, kw_only=True)

    def __init__(
        self,
        *args: Any,
        max_chunk_size_mb: float | Literal["auto"] | None = "auto",
        implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialises the module.

        Args:
          *args: as of ``eqx.nn.MultiheadAttention``.
          max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in
            ``autochunk.dot_product_attention``.
          implementation: as in ``autochunk.dot_product_attention``.
          **kwargs: as of ``eqx.nn.MultiheadAttention``.

        Raises:
          ArgumentError: there is no such limit or implementation. It is a ValueError.
        """
        super().__init__(*args, **kwargs)
        self.max_chunk_size_mb = check_max_chunk_size_mb(max_chunk_size_mb)
        self.implementation = check_implementation(implementation)

    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """As ``multihead_attention``, with this module's settings."""
        settings = {
            "max_chunk_size_mb": self.max_chunk_size_mb,
            "implementation": self.implementation,
        }
        return multihead_attention(self, query, key_, value, mask, **(settings | kwargs))


def patched(
    model: Any,
    *,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> Any:
    """A model with every ``eqx.nn.MultiheadAttention`` of a tree replaced by one in slices.

    Leaves and the structure around them stay: parameters, serialised files and paths of
    ``eqx.tree_at`` are the same. A subclass stays one: of a ``__call__`` of its own, what that
    passes on to ``super().__call__`` runs in slices.

    Args:
      model: any PyTree.
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``autochunk.dot_product_attention``.
      implementation: as in ``autochunk.dot_product_attention``.

    Raises:
      ArgumentError: there is no such module in it, or no such limit or implementation. It is a
        ValueError.

    Example:
      >>> import equinox as eqx
      >>> import jax
      >>> import autochunk.equinox
      >>> model = eqx.nn.MultiheadAttention(num_heads=2, query_size=16, key=jax.random.key(0))
      >>> model = autochunk.equinox.patched(model, max_chunk_size_mb=1)
      >>> x = jax.numpy.ones((32, 16))
      >>> model(x, x, x).shape
      (32, 16)
    """
    settings = {
        "max_chunk_size_mb": check_max_chunk_size_mb(max_chunk_size_mb),
        "implementation": check_implementation(implementation),
    }
    leaves, structure = jax.tree.flatten(model, is_leaf=_is_attention)
    if not any(map(_is_attention, leaves)):
        raise ArgumentError(
            "patched needs a model with eqx.nn.MultiheadAttention among its nodes (a static field "
            f"is none); got {type(model).__name__}"
        )
    swapped = [_swapped(leaf, settings) if _is_attention(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, swapped)


def multihead_attention(
    module: eqx.nn.MultiheadAttention,
    query: jax.Array,
    key_: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    inference: bool | None = None,
    deterministic: bool | None = None,
    process_heads: Callable[..., Any] | None = None,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """What ``module(query, key_, value, mask, ...)`` gives, in slices.

    H is the number of heads, K the size of queries and keys, V that of values. Under ``vmap`` the
    limit is of all elements together.

    Args:
      module: its projections, heads and dropout.
      query: [T', D_q].
      key_: [T, D_k].
      value: [T, D_v].
      mask: boolean or number, zero takes no part; [T', T] or [H, T', T].
      key: of dropout's random numbers. Which weights are dropped depends on it and on their indices
        alone; they are others than Equinox drops.
      inference: no dropout; None leaves it to ``module.dropout``.
      deterministic: deprecated by Equinox in favour of ``inference``.
      process_heads: takes and returns the heads: [T', H, K], [T, H, K] and [T, H, V].
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``autochunk.dot_product_attention``.
      implementation: as in ``autochunk.dot_product_attention``.

    Returns:
      [T', D'].

    Raises:
      ArgumentError: shapes do not fit, the dropout is none that can be done in slices, or a
        setting is not usable. It is a ValueError.
      RuntimeError: dropout has no key.

    Example:
      >>> import equinox as eqx
      >>> import jax
      >>> from autochunk.equinox import multihead_attention
      >>> module = eqx.nn.MultiheadAttention(num_heads=2, query_size=16, key=jax.random.key(0))
      >>> x = jax.numpy.ones((32, 16))
      >>> multihead_attention(module, x, x, x).shape
      (32, 16)
    """
    if deterministic is not None:
        inference = deterministic
        warnings.warn("deterministic is deprecated in favour of inference", stacklevel=2)
    project: Callable[..., jax.Array] = module._project
    query_heads = project(module.query_proj, query)  # [T', H, K]
    key_heads = project(module.key_proj, key_)  # [T, H, K]
    value_heads = project(module.value_proj, value)  # [T, H, V]
    if process_heads is not None:
        query_heads, key_heads, value_heads = _processed(
            process_heads, query_heads, key_heads, value_heads
        )
    dtype = jnp.result_type(query_heads, key_heads, value_heads)
    attended = dot_product_attention(
        query_heads.astype(dtype),
        key_heads.astype(dtype),
        value_heads.astype(dtype),
        mask=_checked_mask(mask, (module.num_heads, query.shape[0], key_.shape[0])),
        dropout_rate=_dropout_rate(module.dropout, key, inference),
        dropout_rng=key,
        broadcast_dropout=False,
        max_chunk_size_mb=max_chunk_size_mb,
        implementation=implementation,
    )  # [T', H, V]
    return jax.vmap(module.output_proj)(attended.reshape(query.shape[0], -1))  # [T', D']


def _processed(process_heads: Callable[..., Any], *heads: jax.Array) -> list[jax.Array]:
    made = list(process_heads(*heads))
    shapes, wanted = [one.shape for one in made], [one.shape for one in heads]
    if shapes != wanted:
        raise ArgumentError(
            f"process_heads must not change the shapes of the heads, {wanted}; got {shapes}"
        )
    return made


def _checked_mask(mask: Any, logits: tuple[int, int, int]) -> jax.Array | None:
    """A mask as boolean, whose shape must be that of the logits [H, T', T] or [T', T]."""
    if mask is None:
        return None
    seen = jnp.asarray(mask, jnp.bool_)
    if seen.shape not in (logits, logits[1:]):
        raise ArgumentError(f"mask must have shape {logits[1:]} or {logits}; got {seen.shape}")
    return seen


def _dropout_rate(dropout: Any, key: Any, inference: bool | None) -> Any:
    if dropout is None or isinstance(dropout, eqx.nn.Identity):
        return 0.0
    if type(dropout) is not eqx.nn.Dropout:
        raise ArgumentError(
            "module.dropout must be an eqx.nn.Dropout, since weights in slices are dropped by "
            f"their indices; got {type(dropout).__name__}"
        )
    inference = dropout.inference if inference is None else inference
    if inference or (isinstance(dropout.p, int | float) and dropout.p == 0):
        return 0.0
    if key is None:
        raise RuntimeError(
            "dropout requires a key: pass key=..., or inference=True for a call without dropout"
        )
    return dropout.p


def _is_attention(node: Any) -> bool:
    return isinstance(node, _Own)


def _swapped(module: eqx.nn.MultiheadAttention, settings: dict[str, Any]) -> Any:
    """The same module, of a class in slices."""
    fields = {one.name: getattr(module, one.name) for one in dataclasses.fields(module)}
    made = object.__new__(_in_slices(type(module)))
    for name, value in (fields | settings).items():
        object.__setattr__(made, name, value)  # past __init__, as when a PyTree is unflattened
    return made


@functools.cache
def _in_slices(kind: type[eqx.nn.MultiheadAttention]) -> type[MultiheadAttention]:
    """The class that ``super().__call__`` of a class, or its own ``__call__``, comes to last."""
    if issubclass(kind, MultiheadAttention):
        return kind
    if kind is _Own:
        return MultiheadAttention
    metaclass: Any = type(kind)
    made = metaclass(kind.__name__, (kind, MultiheadAttention), {"__module__": kind.__module__})
    return cast(type[MultiheadAttention], made)
