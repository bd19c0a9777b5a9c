"""Other ways to compute attention, which ``bench`` compares with.

Each takes the same ``Arguments``: haiku's own, the pull request's loop, JAX's, other libraries'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention.arguments import Arguments
from autochunk.device import default_device
from autochunk.plan import BYTES_PER_MB, DEFAULT_MAX_CHUNK_SIZE_MB
from autochunk.tuner.inputs import WorkloadInputs

_COMMON = {"query", "key", "value", "bias", "mask"}
_LENGTHS = {"query_seq_lengths", "key_value_seq_lengths"}


class NotCompared(Exception):
    """A library cannot be compared on this workload here; the text says why."""


def haiku_dense(arguments: Arguments) -> jax.Array:
    """Attention as ``hk.MultiHeadAttention`` computes it; a bias is added to the logits.

    Masks and biases that such a model would need as an array of the logits' size are arrays.
    """
    _refuse_more(arguments)
    arguments = arguments.explicit()
    query, mask = arguments.query, arguments.mask
    groups = query.shape[-2] // arguments.key.shape[-2]
    key, value = (jnp.repeat(x, groups, axis=-2) for x in (arguments.key, arguments.value))
    logits = jnp.einsum("...thd,...Thd->...htT", query, key)
    logits = logits / np.sqrt(query.shape[-1]).astype(query.dtype)
    if arguments.bias is not None:
        logits = logits + arguments.bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(-1e30, logits.dtype))
    return jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(logits), value)


def row_loop(arguments: Arguments) -> jax.Array:
    """Attention as dm-haiku pull request #679 slices it.

    Query rows in a Python loop, 1000 MB of logits at a time.
    """
    _refuse_more(arguments)
    query, key = arguments.query, arguments.key
    length, logits_bytes = query.shape[-3], 4 * query[..., 0].size * key.shape[-3]
    count = 1 + math.ceil(logits_bytes / (DEFAULT_MAX_CHUNK_SIZE_MB * BYTES_PER_MB))
    whole = arguments.explicit()
    bounds = np.linspace(0, length, count).astype(int)
    outs = [haiku_dense(_rows(whole, *ends)) for ends in itertools.pairwise(bounds)]
    return jnp.concatenate(outs, axis=-3)


def _rows(whole: Arguments, first: int, end: int) -> Arguments:
    """The arguments with the query rows from ``first`` to ``end`` only."""
    terms = {
        name: term if term.shape[-2] == 1 else term[..., first:end, :]
        for name, term in whole.terms.items()
    }
    return whole.replace(query=whole.query[..., first:end, :, :], **terms)


def jax_nn(arguments: Arguments, implementation: Any) -> jax.Array:
    """JAX's own attention."""
    attention: Any = jax.nn.dot_product_attention  # overloaded by its argument for residuals
    if not arguments.present.keys() <= _COMMON | _LENGTHS or arguments.offset:
        _refuse_more(arguments)
        arguments = arguments.explicit()
    elif arguments.soft_cap is not None:
        _refuse_more(arguments)
    settings = {"is_causal": arguments.is_causal, "local_window_size": arguments.window}
    more = {"return_residual": arguments.residual, "implementation": implementation}
    with jax.default_matmul_precision(arguments.precision):
        out: jax.Array = attention(**arguments.present, **settings, **more)
    return out


def _refuse_more(arguments: Arguments) -> None:
    """Raises NotCompared for forms of call that other libraries do not know."""
    if arguments.soft_cap is not None or arguments.residual or arguments.dropout_bits is not None:
        raise NotCompared("it has neither caps, nor this dropout, nor residuals")


def tokamax(arguments: Arguments, implementation: str | None) -> Any:
    """Tokamax's attention, by one of its implementations; None is whichever it chooses."""
    import tokamax as library

    if arguments.residual or arguments.dropout_bits is not None:
        raise NotCompared("it has neither dropout nor residuals")
    given = arguments
    if given.present.keys() - _COMMON - _LENGTHS or given.offset:
        given = given.explicit()
    settings: dict[str, Any] = {
        "is_causal": given.is_causal,
        "local_window_size": None if given.window is None else tuple(given.window),
        "logits_soft_cap": given.soft_cap,
        "precision": given.precision,
        "implementation": implementation,
    }
    return library.dot_product_attention(**given.present, **settings)


def torch(inputs: WorkloadInputs) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Torch's ``scaled_dot_product_attention`` of copies of the arrays; and a wait for its results.

    Raises:
      NotCompared: a form of call that it does not take, or a device that it does not see.
    """
    arguments, mode = inputs.arguments, inputs.workload.mode
    plain = arguments.present.keys() <= _COMMON and arguments.window is None
    if not plain or arguments.soft_cap or arguments.residual:
        raise NotCompared("compared with causality, a mask and a bias only")
    import torch as library

    on_gpu = default_device().platform == "gpu"
    if on_gpu and not library.cuda.is_available():
        raise NotCompared("this torch sees no GPU")

    def copied(array: jax.Array, dtype: Any = None) -> Any:
        wide = array if dtype is None else array.astype(jnp.float32)
        tensor = library.from_numpy(np.array(wide))
        tensor = tensor if dtype is None else tensor.to(getattr(library, str(dtype)))
        return tensor.cuda() if on_gpu else tensor

    def heads_first(array: jax.Array) -> Any:
        """[B, T, H, K] as a tensor [B, H, T, K]."""
        return copied(array, arguments.query.dtype).transpose(1, 2).contiguous()

    arrays = (arguments.query, arguments.key, arguments.value)
    query, key, value = moving = [heads_first(one) for one in arrays]
    mask = None if arguments.mask is None else copied(arguments.mask)
    causal = arguments.is_causal
    if causal and (mask is not None or arguments.bias is not None):  # torch does not take both
        lower = library.ones(*arguments.logits_shape[-2:], dtype=library.bool).tril()
        lower = lower.cuda() if on_gpu else lower
        mask, causal = (lower if mask is None else mask & lower), False
    if arguments.bias is not None:
        bias = copied(arguments.bias, arguments.query.dtype)
        moving = [*moving, bias]
    cotangent = heads_first(inputs.cotangent)
    attention = library.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        settings = {"is_causal": causal, "enable_gqa": query.shape[1] != key.shape[1]}
        added = mask
        if arguments.bias is not None:
            added = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        return attention(query, key, value, attn_mask=added, **settings)

    def training() -> Any:
        for array in moving:
            array.requires_grad_(True)
        return library.autograd.grad(forward(), moving, cotangent)

    def without_gradients() -> Any:
        with library.no_grad():
            return forward()

    wait = library.cuda.synchronize if on_gpu else lambda: None
    return (training if mode == "training" else without_gradients), wait
