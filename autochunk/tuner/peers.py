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


class NotCompared(Exception):
    """A library that is not asked for this workload here; the text says why."""


def haiku_dense(arguments: Arguments) -> jax.Array:
    """Attention as ``hk.MultiHeadAttention`` computes it; a bias is added to the logits."""
    query, mask = arguments.query, arguments.mask
    groups = query.shape[-2] // arguments.key.shape[-2]
    key, value = (jnp.repeat(x, groups, axis=-2) for x in (arguments.key, arguments.value))
    logits = jnp.einsum("...thd,...Thd->...htT", query, key)
    logits = logits / np.sqrt(query.shape[-1]).astype(query.dtype)
    if arguments.bias is not None:
        logits = logits + arguments.bias
    if arguments.is_causal:
        triangle = jnp.tril(jnp.ones((1,) * (logits.ndim - 2) + logits.shape[-2:], bool))
        mask = triangle if mask is None else jnp.logical_and(mask, triangle)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(-1e30, logits.dtype))
    return jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(logits), value)


def row_loop(arguments: Arguments) -> jax.Array:
    """Attention as dm-haiku pull request #679 slices it.

    Query rows in a Python loop, 1000 MB of logits at a time.
    """
    query, key, mask = arguments.query, arguments.key, arguments.mask
    length, logits_bytes = query.shape[-3], 4 * query[..., 0].size * key.shape[-3]
    count = 1 + math.ceil(logits_bytes / (DEFAULT_MAX_CHUNK_SIZE_MB * BYTES_PER_MB))
    if arguments.is_causal:
        triangle = jnp.tril(jnp.ones((1, 1, length, key.shape[-3]), bool))
        mask = triangle if mask is None else mask & triangle
    whole = arguments.replace(mask=mask, is_causal=False)
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
    settings = {"is_causal": arguments.is_causal, "implementation": implementation}
    out: jax.Array = attention(**arguments.present, **settings)
    return out


def tokamax(arguments: Arguments) -> Any:
    """Tokamax's attention, by whichever of its kernels it chooses."""
    import tokamax as library

    return library.dot_product_attention(**arguments.present, is_causal=arguments.is_causal)


def torch(inputs: WorkloadInputs) -> Callable[[], Any]:
    """Torch's ``scaled_dot_product_attention``, on the CPU, where arrays are shared by copying.

    Raises:
      NotCompared: another device, or a bias.
    """
    arguments, mode = inputs.arguments, inputs.workload.mode
    if default_device().platform != "cpu" or arguments.bias is not None:
        raise NotCompared("compared on CPU and without a bias only")
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
