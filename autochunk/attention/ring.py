"""Attention over a sequence that is sharded over devices, none of which ever holds all keys."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention import checks, kernels
from autochunk.attention.arguments import Arguments
from autochunk.attention.kernels.ring import Spread, first_position
from autochunk.attention.kernels.rings import attention_around
from autochunk.attention.op import each_its_share, static_call
from autochunk.errors import ArgumentError


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axis_name: Hashable,
    balanced: bool = False,
    return_residual: bool = False,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
    **settings: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention inside ``jax.shard_map`` of queries and keys that are sharded along the sequence.

    N is the number of devices along the axis. The n-th device has the n-th of N parts of the T'
    queries and of the T keys. With ``balanced`` it has the n-th and the n-th to last of 2 N parts,
    in the order of ``ring_order``, so that causal attention is the same work for all devices.
    Derivatives beyond the first keep in memory what each step around the ring had.

    Args:
      query: [..., T' / N, H, K].
      key: [..., T / N, H', K], H' a divisor of H.
      value: [..., T / N, H', V].
      bias: added to the scaled logits; broadcasts to [..., H, T' / N, T]: all keys, in the order
        in which the devices have them.
      mask: boolean, False hides a key from a row; broadcasts as the bias does.
      axis_name: the mesh axis, or axes, that the sequence is sharded over.
      balanced: whether each device has an early part of the sequence and a late one.
      return_residual: also return the log-sum-exp, as ``dot_product_attention`` does.
      max_chunk_size_mb: most MB (10^6 bytes) of logits at a time, None or "auto". It is for the
        attention of one part's queries to one part's keys.
      implementation: how that attention is computed, as in ``dot_product_attention``.
      **settings: scale, is_causal, query_seq_lengths, key_value_seq_lengths (of the whole
        sequences), local_window_size, query_offset (of the whole sequences), query_segment_ids
        [..., T' / N], key_value_segment_ids [..., T / N], logits_soft_cap, alibi_slopes,
        dropout_rate, dropout_rng (give each device the same one; it drops the same weights as for
        whole sequences), broadcast_dropout and precision, as in ``dot_product_attention``.

    Returns:
      [..., T' / N, H, V] in the query's dtype; with ``return_residual`` a tuple of that and the
      log-sum-exp [..., T' / N, H].

    Raises:
      ArgumentError: as from ``dot_product_attention``; a device's share has an odd length and
        ``balanced`` is set; a setting is not one of these.

    Example:
      >>> import functools
      >>> import jax
      >>> import autochunk
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
      >>> spec = jax.sharding.PartitionSpec(None, "sequence")  # of [batch, T, H, K]
      >>> attend = functools.partial(autochunk.ring_attention, axis_name="sequence")
      >>> ring = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
      >>> x = jax.numpy.ones((1, 64, 2, 8))
      >>> jax.jit(ring)(x, x, x).shape
      (1, 64, 2, 8)
    """
    _check_settings(settings)
    dropout = {name: settings.pop(name) for name in _DROPOUT if name in settings}
    arguments = Arguments.checked(query=query, key=key, value=value, **settings)
    devices = jax.lax.axis_size(axis_name)
    arguments = _with_terms_of_all_keys(arguments, devices, bias=bias, mask=mask)
    parts = 2 if balanced else 1
    _check_lengths(arguments, parts)
    arguments = _with_dropout_of_own_rows(arguments, axis_name, devices, parts, **dropout)
    call = static_call(arguments, max_chunk_size_mb, implementation)
    if each_its_share():
        call = call._replace(shares=kernels.marker())
    call, inputs = call._replace(residual=return_residual), arguments.inputs()
    out, *stats = attention_around(inputs, call, Spread(axis_name, devices, parts))
    out = out.reshape(arguments.output_shape)
    if not return_residual:
        return out
    (lse,) = stats
    lse = jnp.moveaxis(lse, -1, -3).reshape(arguments.query.shape[:-1])
    return out, lse.astype(arguments.key.dtype)


_DROPOUT = ("dropout_rate", "dropout_rng", "broadcast_dropout")
_SETTINGS = {
    *_DROPOUT,
    "scale",
    "is_causal",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "local_window_size",
    "query_offset",
    "query_segment_ids",
    "key_value_segment_ids",
    "logits_soft_cap",
    "alibi_slopes",
    "precision",
}


def _check_settings(settings: dict[str, Any]) -> None:
    if unknown := settings.keys() - _SETTINGS:
        raise ArgumentError(
            f"ring_attention has no {' and no '.join(sorted(unknown))}; beside its own arguments "
            f"it takes {', '.join(sorted(_SETTINGS))}"
        )


def _with_terms_of_all_keys(arguments: Arguments, devices: int, **terms: Any) -> Arguments:
    """The arguments with a bias and a mask, if given, whose columns are all devices' keys."""
    sizes = checks.sizes_of(arguments.query, arguments.key)
    sizes["s"] *= devices
    leading = arguments.query.shape[:-3]
    given = {
        name: checks.whole_term(name, checks.array_of(name, term), leading, sizes)
        for name, term in terms.items()
        if term is not None
    }
    return arguments.replace(**given)


def _with_dropout_of_own_rows(
    arguments: Arguments,
    axis_name: Hashable,
    devices: int,
    parts: int,
    dropout_rate: Any = 0.0,
    dropout_rng: Any = None,
    broadcast_dropout: bool = True,
) -> Arguments:
    """The arguments with the random bits that this device's rows have in the whole sequence."""
    rate = checks.dropout_rate(dropout_rate)
    if not rate:
        return arguments
    sizes, leading = checks.sizes_of(arguments.query, arguments.key), arguments.query.shape[:-3]
    sizes["t"] *= devices
    bits = checks.dropout_bits(dropout_rng, leading, sizes, bool(broadcast_dropout))
    rows, here = arguments.query.shape[-3] // parts, jax.lax.axis_index(axis_name)
    starts = (first_position(here, part, devices, parts) * rows for part in range(parts))
    own = [jax.lax.dynamic_slice_in_dim(bits, start, rows, axis=-1) for start in starts]
    return arguments.replace(dropout_rate=rate, dropout_bits=jnp.concatenate(own, axis=-1))


def _check_lengths(arguments: Arguments, parts: int) -> None:
    for name in ("query", "key"):
        length = getattr(arguments, name).shape[-3]
        if length % parts or not length:
            raise ArgumentError(
                f"each device's share of the {name} must have rows, and an even number of them "
                f"with balanced=True; got {length}. Pad the sequence"
            )


def ring_order(length: int, devices: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions [length] of a sequence in the order that ``balanced=True`` needs.

    ``x[:, ring_order(T, N)]`` gives the n-th of N devices the n-th and the n-th to last of 2 N
    parts. ``np.argsort(ring_order(T, N))`` is the way back.

    Raises:
      ArgumentError: the length is not a multiple of 2 N.

    Example:
      >>> import autochunk
      >>> autochunk.ring_order(8, 2)
      array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    if devices < 1 or length % (2 * devices):
        raise ArgumentError(
            f"the length must be a multiple of {2 * devices}, twice the number of devices; got "
            f"{length}. Pad the sequence"
        )
    parts = np.arange(length).reshape(2 * devices, -1)
    return np.stack([parts[:devices], parts[devices:][::-1]], axis=1).reshape(length)
