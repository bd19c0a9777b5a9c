"""``dot_product_attention``: checks the arguments, resolves "auto", runs the plan."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from autochunk.attention import kernels
from autochunk.attention.arguments import Arguments
from autochunk.errors import ArgumentError
from autochunk.implementations import is_fused
from autochunk.plan import (
    BYTES_PER_MB,
    DEFAULT_MAX_CHUNK_SIZE_MB,
    Plan,
    Plans,
    check_implementation,
    check_max_chunk_size_mb,
)
from autochunk.resolution.resolve import plans as resolved_plans
from autochunk.workload import MODES, Mode


@overload
def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = ...,
    mask: jax.typing.ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: jax.typing.ArrayLike | None = ...,
    key_value_seq_lengths: jax.typing.ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_segment_ids: jax.typing.ArrayLike | None = ...,
    key_value_segment_ids: jax.typing.ArrayLike | None = ...,
    query_offset: int | jax.typing.ArrayLike | None = ...,
    logits_soft_cap: float | None = ...,
    alibi_slopes: jax.typing.ArrayLike | None = ...,
    dropout_rate: float = ...,
    dropout_rng: jax.Array | None = ...,
    broadcast_dropout: bool = ...,
    precision: Any = ...,
    return_residual: Literal[False] = ...,
    max_chunk_size_mb: float | Literal["auto"] | None = ...,
    implementation: str | None = ...,
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = ...,
    mask: jax.typing.ArrayLike | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: jax.typing.ArrayLike | None = ...,
    key_value_seq_lengths: jax.typing.ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    query_segment_ids: jax.typing.ArrayLike | None = ...,
    key_value_segment_ids: jax.typing.ArrayLike | None = ...,
    query_offset: int | jax.typing.ArrayLike | None = ...,
    logits_soft_cap: float | None = ...,
    alibi_slopes: jax.typing.ArrayLike | None = ...,
    dropout_rate: float = ...,
    dropout_rng: jax.Array | None = ...,
    broadcast_dropout: bool = ...,
    precision: Any = ...,
    return_residual: Literal[True],
    max_chunk_size_mb: float | Literal["auto"] | None = ...,
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.typing.ArrayLike | None = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: jax.typing.ArrayLike | None = None,
    key_value_segment_ids: jax.typing.ArrayLike | None = None,
    query_offset: int | jax.typing.ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.typing.ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    broadcast_dropout: bool = True,
    precision: Any = None,
    return_residual: bool = False,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(query @ key^T * scale + bias) @ value for every head, never with all logits at once.

    Arguments and meaning are those of ``jax.nn.dot_product_attention``, with any number of leading
    dims [...], and values may have a size V of their own. There are H query heads and N key/value
    heads, and N divides H: query head h uses key/value head h // (H / N).

    Args:
      query: [..., T', H, K], floating point.
      key: [..., T, N, K], of the query's dtype.
      value: [..., T, N, V], of the query's dtype.
      bias: numbers, added to the scaled logits; broadcasts to [..., H, T', T].
      mask: boolean, False hides a key from a row; broadcasts to [..., H, T', T].
      scale: factor on the logits; None is 1 / sqrt(K). A traced one multiplies the query, rounded.
      is_causal: the query at position i sees keys 0 to i only.
      query_seq_lengths: integers that broadcast to [...]; output rows from there on are zero.
      key_value_seq_lengths: integers that broadcast to [...]; keys from there on are excluded.
      local_window_size: (left, right), or one number for both: the query at position i sees keys
        i - left to i + right.
      query_segment_ids: integers that broadcast to [..., T']; only equal ids see each other.
      key_value_segment_ids: integers that broadcast to [..., T]; give both ids or neither.
      query_offset: integer, or integers that broadcast to [...]: query i is at position i + offset.
      logits_soft_cap: logits, bias and slopes included, become cap * tanh(logits / cap).
      alibi_slopes: floating point, broadcasts to [..., H]; -slope * |position - key| is added to
        the logits (Press et al. 2022, "Train short, test long").
      dropout_rate: share of the weights to drop; the others are scaled by 1 / (1 - dropout_rate).
      dropout_rng: random key. Which weights are dropped depends on this key and on their indices
        alone, not on how the attention is computed.
      broadcast_dropout: the same weights are dropped for all leading dims and heads.
      precision: of the matrix products, as in ``jax.lax.dot``; None is the one in force where the
        call is traced (``jax.default_matmul_precision``).
      return_residual: also return the log-sum-exp of each row's logits.
      max_chunk_size_mb: most MB (10^6 bytes) of logits at a time, None for no limit (causal
        attention of 512 positions and more is cut into blocks even so), or "auto" to take what
        ``autochunk tune`` found best on this device for these shapes. Under ``vmap`` "auto" uses
        the shapes of one element; if it does not slice one element, it slices a batch whose logits
        exceed both those of one element and 1000 MB. Logits of half-precision inputs are float32.
      implementation: pins the implementation: "xla", "xla_rows", "dense", or a kernel of another
        library, "cudnn", "tokamax_mosaic" or "tokamax_triton" (see ``autochunk.Plan``). None lets
        "auto" choose; with a number it means "xla". What such a kernel cannot differentiate
        (forward mode, higher orders, some biases) runs in slices.

    Returns:
      [..., T', H, V] in the query's dtype; with ``return_residual`` a tuple of that and the
      log-sum-exp [..., T', H], in the key's dtype. What the mask or another argument excludes
      never affects results or gradients, even if it is infinite or NaN. A row that sees no key
      gives the mean of all values, and a log-sum-exp of -0.7 times the largest float32.

    Raises:
      ArgumentError: shapes or dtypes do not fit, a setting is not one of those above, or the
        pinned implementation does not take this call. It is a ValueError.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import autochunk
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 8))
      >>> out = autochunk.dot_product_attention(query, key, value, is_causal=True)
      >>> same = jax.nn.dot_product_attention(query, key, value, is_causal=True)
      >>> out.shape, bool(jnp.allclose(out, same, atol=1e-5))
      ((2, 64, 4, 8), True)

      At most 0.01 MB of the 0.13 MB of logits at once, also in the backward pass:

      >>> def loss(query):
      ...     out = autochunk.dot_product_attention(query, key, value, max_chunk_size_mb=0.01)
      ...     return (out**2).sum()
      >>> jax.jit(jax.grad(loss))(query).shape
      (2, 64, 4, 8)
    """
    arguments = Arguments.checked(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        query_offset=query_offset,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        return_residual=return_residual,
    )
    found: jax.Array | tuple[jax.Array, jax.Array]
    found = attend(arguments, max_chunk_size_mb, implementation)
    return found


@kernels.promoting
def attend(
    arguments: Arguments,
    max_chunk_size_mb: float | Literal["auto"] | None,
    implementation: str | None,
) -> Any:
    """What ``dot_product_attention`` returns for checked arguments."""
    max_chunk_size_mb = check_max_chunk_size_mb(max_chunk_size_mb)
    implementation = check_implementation(implementation)
    if _mesh_of(arguments.query).explicit_axes:
        return _by_propagation(arguments, max_chunk_size_mb, implementation)
    out_shape, query = arguments.output_shape, arguments.query
    if 0 in arguments.logits_shape or 0 in out_shape:
        outs = [jnp.zeros(out_shape, query.dtype)]
        if arguments.residual:
            wide = jnp.promote_types(query.dtype, jnp.float32)
            lse = kernels.log_sum_exp(*jnp.zeros((2, *query.shape[:-1]), wide))
            outs.append(lse.astype(arguments.key.dtype))
    else:
        inputs = arguments.inputs()
        anything_goes = (implementation, max_chunk_size_mb) == ("dense", None)
        symbolic = not anything_goes and arguments.symbolic()
        call = static_call(arguments, max_chunk_size_mb, implementation)
        if symbolic:
            call = _for_any_batch(call, inputs, max_chunk_size_mb)
        if not kernels.mesh_without_devices(inputs.query).empty:
            call = call._replace(plans=call.plans.rows_first())
        elif each_its_share():
            call = call._replace(shares=kernels.marker())
        out, *stats = kernels.attention(inputs, _taken(call, inputs, implementation))
        by_row = [jnp.moveaxis(one, -1, -3).reshape(query.shape[:-1]) for one in stats]
        outs = [out.reshape(out_shape), *(one.astype(arguments.key.dtype) for one in by_row)]
    return tuple(outs) if arguments.residual else outs[0]


def static_call(
    arguments: Arguments,
    max_chunk_size_mb: float | Literal["auto"] | None,
    implementation: str | None,
) -> kernels.Call:
    """A call in the form that the kernels take, with its plans.

    Raises:
      ArgumentError: there is no such limit or implementation.
    """
    limit = check_max_chunk_size_mb(max_chunk_size_mb)
    return arguments.call(_plans(arguments, limit, check_implementation(implementation)))


def _for_any_batch(
    call: kernels.Call, inputs: kernels.Inputs, limit: float | Literal["auto"] | None
) -> kernels.Call:
    """A call whose leading sizes are symbolic, with plans whose slices do not depend on them.

    For "auto", slices a little smaller than one element may replace those that it found.

    Raises:
      ArgumentError: the requested slices depend on the symbolic sizes.
    """
    element = inputs.logits._replace(batch=1).bytes / BYTES_PER_MB
    found: dict[str, Any] = {}
    for mode in MODES:
        plan: Plan = getattr(call.plans, mode)
        smaller = dataclasses.replace(plan.sliced(), max_chunk_size_mb=0.99 * element)
        tried = [plan, smaller, Plan("xla")] if limit == "auto" else [plan]
        fitting = (one for one in tried if _is_for_any_batch(one, call, inputs))
        if (chosen := next(fitting, None)) is None:
            leading = inputs.query.shape[:-4]
            raise ArgumentError(
                f"leading sizes that are symbolic, as for jax.export, here {leading}, must make "
                "no difference to the slices: give max_chunk_size_mb=None, or with "
                'implementation="xla" a number that one element\'s logits exceed; got '
                f"max_chunk_size_mb={limit!r}"
            )
        found[mode] = chosen
    return call._replace(plans=dataclasses.replace(call.plans, **found))


def _is_for_any_batch(plan: Plan, call: kernels.Call, inputs: kernels.Inputs) -> bool:
    try:
        kernels.check_slices(inputs, call._replace(plans=Plans(plan, plan)))
    except jax.errors.InconclusiveDimensionOperation:
        return False
    return True


quiet, for_this_machine = kernels.quiet, kernels.for_this_machine
"""Contexts that hide what libraries log of each call, and that export for this machine alone."""

_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Inside, calls are traced for one device, however many jax sees.

    Plans then run unchanged, so that they can be measured.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def why_not(implementation: str, arguments: Arguments, *, training: bool) -> str:
    """Why an implementation does not take a call, on jax's default device; empty if it does."""
    if not is_fused(implementation):
        return ""
    call = arguments.call(Plans(Plan(implementation), Plan(implementation)))
    try:
        kernels.trace(
            implementation, arguments.inputs(), call, kernels.platform(), training=training
        )
    except kernels.NotTaken as refusal:
        return str(refusal)
    return ""


def _taken(call: kernels.Call, inputs: kernels.Inputs, pinned: str | None) -> kernels.Call:
    """The call with its fused kernels; the next best plan replaces one that refuses the call.

    Raises:
      ArgumentError: the kernel that was pinned by name refuses the forward pass. Where it refuses
        only the gradient, the gradient runs in slices.
    """

    def refused(name: str, mode: Mode, refusal: kernels.NotTaken) -> Plan:
        if pinned == name and mode == "forward":
            why = f"implementation={pinned!r} does not take this call: {refusal}. "
            cure = 'Leave implementation out to let "auto" choose'
            raise ArgumentError(why + cure) from None
        return _for_mesh(call.plans.without(name, mode))

    return kernels.taken(inputs, call, refused)


def _by_propagation(
    arguments: Arguments, limit: float | Literal["auto"] | None, implementation: str | None
) -> Any:
    """What ``attend`` returns where mesh axes are explicit, sharded like the query.

    Inside, XLA's own propagation can split an axis of heads between [N] and [H / N].
    """
    *spec, _ = jax.typeof(arguments.query).sharding.spec
    specs = jax.sharding.PartitionSpec(*spec, None), jax.sharding.PartitionSpec(*spec)
    mesh = _mesh_of(arguments.query)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(
            lambda arrays: attend(arguments.replace(**arrays), limit, implementation),
            axes=mesh.explicit_axes,
            out_sharding=specs if arguments.residual else specs[0],
        )(arguments.present)


def _mesh_of(query: jax.Array) -> jax.sharding.AbstractMesh:
    mesh = jax.sharding.get_abstract_mesh()
    return kernels.mesh_without_devices(query) if mesh.empty else mesh


def _plans(
    arguments: Arguments,
    max_chunk_size_mb: float | Literal["auto"] | None,
    implementation: str | None,
) -> Plans:
    if max_chunk_size_mb == "auto" and arguments.query.shape[-1] == 0:
        max_chunk_size_mb = DEFAULT_MAX_CHUNK_SIZE_MB  # nothing to tune: all logits are zero
    if max_chunk_size_mb != "auto":
        plan = _for_mesh(Plan(implementation or "xla", max_chunk_size_mb))
        return Plans(plan, plan)
    plans = resolved_plans(arguments.workload(), implementation)
    forward, training = _for_mesh(plans.forward), _for_mesh(plans.training)
    return dataclasses.replace(plans, forward=forward, training=training)


def each_its_share() -> bool:
    """Whether arrays that are traced as if they were whole may be sharded.

    Inside a ``shard_map`` they may be over the mesh axes that it leaves to XLA, if the mesh has
    devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mixed = kernels.is_mixed(mesh) and mesh.abstract_device is not None
    return jax.device_count() > 1 and not _alone.get() and (mixed or not mesh.manual_axes)


def _for_mesh(plan: Plan) -> Plan:
    """The plan; rows first where XLA alone partitions what ``shard_map`` leaves of a mesh.

    Slicing along a sharded axis makes XLA gather it.
    """
    mixed = kernels.is_mixed(jax.sharding.get_abstract_mesh())
    return plan.rows_first() if mixed and not each_its_share() else plan
