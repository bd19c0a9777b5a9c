"""``patch_jax_nn``: unedited code that calls ``jax.nn.dot_product_attention`` runs in slices.

The patch replaces the internal function of jax that ``jax.nn.dot_product_attention`` calls. So it
does not matter how a caller imported the public one, and jax's own checks of arguments stay.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src.nn import functions

from autochunk.attention.arguments import Arguments
from autochunk.attention.op import attend
from autochunk.errors import ArgumentError
from autochunk.plan import check_implementation, check_max_chunk_size_mb

_NAME = "_dot_product_attention_xla"
_PARAMETERS = (
    *("query", "key", "value", "bias", "mask", "is_causal", "scale"),
    *("q_seqlen", "kv_seqlen", "local_window_size", "return_residual"),
)

# (max_chunk_size_mb, implementation) of the innermost context around the caller. It is part of the
# key of jax.jit's cache: a function traced outside is traced again inside. (This module is imported
# where patch_jax_nn is first used: what was traced before this line is traced once more, too.)
_settings: Any = jax.make_user_context(None)
_lock = threading.Lock()
_inside = 0  # contexts that are open, in all threads
_original: Callable[..., Any] = getattr(functions, _NAME, None)  # type: ignore[assignment]


@contextlib.contextmanager
def patch_jax_nn(
    *,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> Iterator[None]:
    """Inside, ``jax.nn.dot_product_attention`` runs as ``autochunk.dot_product_attention``.

    It does so for every caller, however it imported the function, such as Flax's
    ``nnx.dot_product_attention`` without dropout. Only calls in this thread are affected. Calls
    with ``implementation="cudnn"``, and calls that slices cannot compute, are left to jax.
    ``jax.jit`` traces a function again inside. Contexts nest.

    Args:
      max_chunk_size_mb: MB (10^6 bytes), None or "auto", as in ``autochunk.dot_product_attention``.
      implementation: as in ``autochunk.dot_product_attention``.

    Raises:
      ArgumentError: there is no such limit or implementation, or this version of jax computes
        attention in a way that is not known here. It is a ValueError.

    Example:
      >>> import jax
      >>> import autochunk
      >>> x = jax.numpy.ones((2, 64, 4, 8))
      >>> with autochunk.patch_jax_nn(max_chunk_size_mb=1):
      ...     out = jax.jit(jax.nn.dot_product_attention)(x, x, x)
      >>> out.shape
      (2, 64, 4, 8)
    """
    settings = check_max_chunk_size_mb(max_chunk_size_mb), check_implementation(implementation)
    if _original is None or tuple(inspect.signature(_original).parameters) != _PARAMETERS:
        raise ArgumentError(
            f"patch_jax_nn must know how jax.nn.dot_product_attention computes; in jax "
            f"{jax.__version__} it does so in a new way. Call autochunk.dot_product_attention, "
            "which takes the same arguments, instead"
        )
    with _installed(), _settings(settings):
        yield


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Keeps the replacement in place while any thread needs it."""
    global _inside
    with _lock:
        _inside += 1
        setattr(functions, _NAME, _attention)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                setattr(functions, _NAME, _original)


def _attention(*args: Any, **kwargs: Any) -> Any:
    """The replacement; it calls the original in other threads and where slices cannot be used."""
    if _settings.value is None:
        return _original(*args, **kwargs)
    try:
        arguments = _arguments(*args, **kwargs)
    except ArgumentError:
        return _original(*args, **kwargs)
    found = attend(arguments, *_settings.value)
    if not arguments.residual:
        return found
    out, residual = found
    return out, jax.lax.stop_gradient(residual)


def _arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
    scale: Any,
    q_seqlen: jax.Array | None,
    kv_seqlen: jax.Array | None,
    local_window_size: tuple[int, int] | None,
    return_residual: bool = False,
) -> Arguments:
    """The arguments of a call, as jax passes them on.

    Raises:
      ArgumentError: slices cannot compute this call.
    """
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        bias = bias.astype(jnp.float32)
    return Arguments.checked(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=q_seqlen,
        key_value_seq_lengths=kv_seqlen,
        local_window_size=local_window_size,
        return_residual=return_residual,
    )
