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


class NotCompared(Exception):
    """A library that is not asked for this workload here; the text says why."""


def haiku_dense(arguments: Arguments) -> jax.Array:
    """Attention as ``hk.MultiHeadAttention`` computes it; a bias is added to the logits.

    What such a model would need as an array of the logits' size is one.
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
    known = {"query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"}
    if not arguments.present.keys() <= known or arguments.offset:
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
    """Raises NotCompared for what is neither seen, nor added, nor known elsewhere."""
    if arguments.soft_cap is not None or arguments.residual or arguments.dropout_bits is not None:
        raise NotCompared("it has neither caps, nor this dropout, nor residuals")


def tokamax(arguments: Arguments) -> Any:
    """Tokamax's attention, by whichever of its kernels it chooses."""
    import tokamax as library

    _refuse_more(arguments)
    given = arguments.explicit() if arguments.present.keys() - _COMMON else arguments
    window = None if given.window is None else tuple(given.window)
    settings = {"is_causal": given.is_causal, "local_window_size": window}
    return library.dot_product_attention(**given.present, **settings)


def torch(inputs: WorkloadInputs) -> Callable[[], Any]:
    """Torch's ``scaled_dot_product_attention``, on the CPU, where arrays are shared by copying.

    Raises:
      NotCompared: another device, or a bias.
    """
    arguments, mode = inputs.arguments, inputs.workload.mode
    plain = arguments.present.keys() <= _COMMON - {"bias"} and arguments.window is None
    if default_device().platform != "cpu" or not plain or arguments.soft_cap or arguments.residual:
        raise NotCompared("compared on CPU, with causality and a mask only")
    import torch as library

    arrays = (arguments.query, arguments.key, arguments.value)
    query, key, value = heads = [_to_torch(one, arguments.query.dtype) for one in arrays]
    mask = None if arguments.mask is None else library.from_numpy(np.array(arguments.mask))
    causal = arguments.is_causal
    if mask is not None and causal:  # torch does not take both
        sizes = arguments.logits_shape[-2:]
        mask, causal = mask & library.ones(*sizes, dtype=library.bool).tril(), False
    cotangent = _to_torch(inputs.cotangent, arguments.query.dtype)
    attention = library.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        settings = {"is_causal": causal, "enable_gqa": query.shape[1] != key.shape[1]}
        return attention(query, key, value, attn_mask=mask, **settings)

    def training() -> Any:
        for array in heads:
            array.requires_grad_(True)
        return library.autograd.grad(forward(), heads, cotangent)

    def without_gradients() -> Any:
        with library.no_grad():
            return forward()

    return training if mode == "training" else without_gradients


def _to_torch(array: jax.Array, dtype: Any) -> Any:
    """[B, T, H, K] as a torch tensor [B, H, T, K]."""
    import torch as library

    tensor = library.from_numpy(np.array(array.astype(jnp.float32)))
    return tensor.to(getattr(library, str(dtype))).transpose(1, 2).contiguous()
