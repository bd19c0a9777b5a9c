"""Haiku: a ``MultiHeadAttention`` that runs in slices, and a context in which haiku's own does.

The module subclasses haiku's, so that constructor, parameters and initialisers are haiku's own,
whatever version is installed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

from autochunk.attention.arguments import Arguments
from autochunk.attention.op import attend
from autochunk.plan import check_implementation, check_max_chunk_size_mb
from autochunk.workload import DTYPES

# Users may put ours in place of the name in haiku; what it named before is meant here.
_Own = hk.MultiHeadAttention


class MultiHeadAttention(_Own):
    """``hk.MultiHeadAttention``, its parameters and its results, with bounded memory.

    Glossary of shapes: T' and T are query and key lengths, H heads, K key size, V value size, D'
    model size; [...] are zero or more leading dims.

    Example:
      >>> import haiku as hk
      >>> import jax
      >>> import autochunk
      >>> def model(x):  # [batch, T, D]
      ...     w_init = hk.initializers.VarianceScaling()
      ...     mha = autochunk.MultiHeadAttention(num_heads=2, key_size=8, w_init=w_init)
      ...     return mha(x, x, x)
      >>> x = jax.numpy.ones((1, 32, 16))
      >>> init, apply = hk.without_apply_rng(hk.transform(model))
      >>> apply(init(jax.random.key(0), x), x).shape
      (1, 32, 16)
    """

    def __init__(
        self,
        num_heads: int,
        key_size: int,
        w_init_scale: float | None = None,
        *,
        max_chunk_size_mb: float | Literal["auto"] | None = "auto",
        implementation: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialises the module; arguments are those of ``hk.MultiHeadAttention`` and two more.

        Args:
          num_heads: number of heads (H).
          key_size: size of keys and queries (K).
          w_init_scale: deprecated by haiku in favour of ``w_init``.
          max_chunk_size_mb: most MB (10^6 bytes) of logits at a time, None never to slice, or
            "auto" to take what ``autochunk tune`` found best.
          implementation: as in ``autochunk.dot_product_attention``.
          name: name of the module.
          **kwargs: ``w_init``, ``with_bias``, ``b_init``, ``value_size`` and ``model_size``, as in
            haiku.

        Raises:
          ArgumentError: ``max_chunk_size_mb`` or ``implementation`` is not usable. It is a
            ValueError.
        """
        super().__init__(num_heads, key_size, w_init_scale, name=name, **kwargs)
        self.max_chunk_size_mb = check_max_chunk_size_mb(max_chunk_size_mb)
        self.implementation = check_implementation(implementation)

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Computes attention of queries over keys and values.

        Args:
          query: [..., T', D_q].
          key: [..., T, D_k].
          value: [..., T, D_v].
          mask: boolean or number, false takes no part; [..., H=1, T', T], of one rank more than the
            query.

        Returns:
          [..., T', D'].

        Raises:
          ValueError: the mask's rank is not the logits' (as in haiku), or shapes do not fit.
        """
        settings = self.max_chunk_size_mb, self.implementation
        return _attended(*settings, self, query, key, value, mask)


@contextlib.contextmanager
def patched(
    *,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> Iterator[None]:
    """Inside, every ``hk.MultiHeadAttention`` of a model runs in slices.

    The model is not edited: same parameters, same results. Of a subclass with a ``__call__`` of its
    own, what that passes on to ``super().__call__`` does. What counts is where the model is
    applied; only this thread is meant, and ``jax.jit`` traces a function anew inside. Contexts
    nest. Interceptors of your own (``hk.intercept_methods``) that should see these calls go
    outside.

    Args:
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``MultiHeadAttention``.
      implementation: as in ``MultiHeadAttention``.

    Raises:
      ArgumentError: there is no such limit or implementation. It is a ValueError.

    Example:
      >>> import haiku as hk
      >>> import jax
      >>> import autochunk.haiku
      >>> def model(x):
      ...     w_init = hk.initializers.VarianceScaling()
      ...     return hk.MultiHeadAttention(num_heads=2, key_size=8, w_init=w_init)(x, x, x)
      >>> x = jax.numpy.ones((1, 32, 16))
      >>> init, apply = hk.without_apply_rng(hk.transform(model))
      >>> params = init(jax.random.key(0), x)
      >>> with autochunk.haiku.patched(max_chunk_size_mb=1):
      ...     out = jax.jit(apply)(params, x)
      >>> out.shape
      (1, 32, 16)
    """
    settings = check_max_chunk_size_mb(max_chunk_size_mb), check_implementation(implementation)
    with hk.intercept_methods(_interceptor), _settings()(settings):
        yield


def _settings() -> Any:
    """(max_chunk_size_mb, implementation) of the innermost context around the caller.

    ``jax.jit``'s cache knows of it: functions that were traced outside are traced anew.
    """
    with _lock:  # jax wants it made by one thread
        return _user_context()


@functools.cache
def _user_context() -> Any:
    # Not when this file is imported: whatever was traced before is then traced once more.
    return jax.make_user_context(None)


_lock = threading.Lock()


def _interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    is_attention = context.orig_class is _Own
    if is_attention and context.method_name == "__call__" and _floating(*args, **kwargs):
        limit, implementation = _settings().value
        return _attended(limit, implementation, context.module, *args, **kwargs)
    return call(*args, **kwargs)


def _floating(query: Any, key: Any, value: Any, mask: Any = None) -> bool:
    """Whether slices take such inputs; any mask."""
    del mask
    return all(str(jnp.result_type(one)) in DTYPES for one in (query, key, value))


def _attended(
    max_chunk_size_mb: float | Literal["auto"] | None,
    implementation: str | None,
    module: hk.MultiHeadAttention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """What a module's ``__call__`` gives, by its own projections."""
    *leading, length, _ = query.shape
    query_heads = module._linear_projection(query, module.key_size, "query")  # [..., T', H, K]
    key_heads = module._linear_projection(key, module.key_size, "key")  # [..., T, H, K]
    value_heads = module._linear_projection(value, module.value_size, "value")  # [..., T, H, V]
    if mask is not None and mask.ndim != query_heads.ndim:
        raise ValueError(
            f"Mask dimensionality {mask.ndim} must match logits dimensionality {query_heads.ndim}."
        )
    query_heads, key_heads, value_heads = _broadcast_and_promote(
        query_heads, key_heads, value_heads
    )
    arguments = Arguments.checked(
        query=query_heads,
        key=key_heads,
        value=value_heads,
        mask=None if mask is None else mask.astype(jnp.bool_),
        # Where a plan is haiku's order of operations, so is its precision.
        half_logits=True,
    )
    attended = attend(arguments, max_chunk_size_mb, implementation)  # [..., T', H, V]
    flat = attended.reshape((*leading, length, module.num_heads * module.value_size))
    inits = {"w_init": module.w_init, "b_init": module.b_init}
    project = hk.Linear(module.model_size, with_bias=module.with_bias, **inits)
    return project(flat)  # [..., T', D']


def _broadcast_and_promote(*heads: jax.Array) -> list[jax.Array]:
    """Arrays [..., T, H, K], leading dims broadcast and dtypes promoted as by haiku's einsums."""
    leading = jnp.broadcast_shapes(*(array.shape[:-3] for array in heads))
    dtype = jnp.result_type(*heads)
    return [jnp.broadcast_to(array, leading + array.shape[-3:]).astype(dtype) for array in heads]
