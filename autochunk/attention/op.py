"""``dot_product_attention``: checks the arguments, resolves "auto", runs the plan."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, cast

import jax
import jax.extend.backend
import jax.numpy as jnp

from autochunk.attention import kernels
from autochunk.attention.arguments import Arguments
from autochunk.errors import ArgumentError
from autochunk.implementations import is_fused
from autochunk.plan import (
    DEFAULT_MAX_CHUNK_SIZE_MB,
    Plan,
    Plans,
    check_implementation,
    check_max_chunk_size_mb,
)
from autochunk.resolution.resolve import plans as resolved_plans
from autochunk.workload import MODES


def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    max_chunk_size_mb: float | Literal["auto"] | None = "auto",
    implementation: str | None = None,
) -> jax.Array:
    """softmax(query @ key^T * scale + bias) @ value for every head, never with all logits at once.

    Arguments and meaning as in ``jax.nn.dot_product_attention``, with any number of leading dims
    [...] and a value size V of its own. H is the number of query heads, N that of key/value heads
    and divides H: query head h looks at key/value head h // (H / N).

    Args:
      query: [..., T', H, K], floating point.
      key: [..., T, N, K], of the query's dtype.
      value: [..., T, N, V], of the query's dtype.
      bias: added to the scaled logits; broadcasts to [..., H, T', T].
      mask: boolean, False takes no part; broadcasts to [..., H, T', T]. A row that is False
        throughout gives the mean of all values. Keys and values that take no part must still be
        finite.
      scale: factor on the logits; None is 1 / sqrt(K).
      is_causal: query i sees keys 0 to i only.
      max_chunk_size_mb: most MB (10^6 bytes) of logits at a time, None for no limit (causal
        attention of 512 positions and more is cut into blocks even so), or "auto" to take what
        ``autochunk tune`` found best on this device for these shapes. Under ``vmap`` "auto" goes by
        the shapes of one element; where it does not slice those, it slices what exceeds both these
        and 1000 MB. Logits are float32 for half-precision inputs.
      implementation: pins how it is computed: "xla", "xla_rows", "dense" or "cudnn" (see
        ``autochunk.Plan``); None lets "auto" choose, and is "xla" for a number. What cuDNN cannot
        differentiate (forward mode, higher orders, a bias, under a mask) runs in slices. On several
        devices, unless inside ``shard_map``, "xla" is "xla_rows".

    Returns:
      [..., T', H, V] in the query's dtype.

    Raises:
      ArgumentError: shapes or dtypes do not fit, a setting is not one of those above, or the
        implementation pinned does not take this call. It is a ValueError.
    """
    max_chunk_size_mb = check_max_chunk_size_mb(max_chunk_size_mb)
    implementation = check_implementation(implementation)
    arguments = Arguments.checked(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
    )
    if 0 in arguments.logits_shape or 0 in arguments.output_shape:
        return jnp.zeros(arguments.output_shape, arguments.query.dtype)
    if (implementation, max_chunk_size_mb) != ("dense", None):
        arguments.check_known()
    inputs = arguments.inputs()
    call = arguments.call(_plans(arguments, max_chunk_size_mb, implementation))
    return _attend(inputs, _taken(call, inputs, implementation)).reshape(arguments.output_shape)


_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Within it calls are traced for one device, however many jax sees.

    A plan then runs as it is: for measuring it.
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
    plan = Plan(implementation)
    call = arguments.call(Plans(plan, plan))
    try:
        kernels.trace(implementation, arguments.inputs(), call, _platform(), training=training)
    except kernels.NotTaken as refusal:
        return str(refusal)
    return ""


def _taken(call: kernels.Call, inputs: kernels.Inputs, pinned: str | None) -> kernels.Call:
    """The call with its fused kernel, or with slices in the place of one that does not take it.

    Raises:
      ArgumentError: the fused kernel was asked for by name. Only a refusal of the forward pass
        counts: what it cannot differentiate runs in slices.
    """
    plans, kernel = call.plans, None
    for mode in MODES:
        plan: Plan = getattr(plans, mode)
        name, training = plan.implementation, mode == "training"
        if not is_fused(name):
            continue
        try:
            kernel = kernels.trace(name, inputs, call, _platform(), training=training)
        except kernels.NotTaken as refusal:
            if pinned == name and not training:
                refused = f"implementation={pinned!r} does not take this call: {refusal}. "
                cure = 'Leave implementation out to let "auto" choose'
                raise ArgumentError(refused + cure) from None
            plans = dataclasses.replace(plans, **{mode: plan.sliced()})  # type: ignore[arg-type]
    return call._replace(plans=plans, kernel=kernel)


def _platform() -> str:
    """Jax's default platform as lowering rules name it."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return cast(str, backend.platform)
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"


def _attend(inputs: kernels.Inputs, call: kernels.Call) -> jax.Array:
    """The kernels' output, where mesh axes are explicit sharded as the query.

    Their inside is then left to XLA's own propagation.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return kernels.attention(inputs, call)
    spec = jax.sharding.PartitionSpec(*jax.typeof(inputs.query).sharding.spec[:-1], None)
    attention = functools.partial(kernels.attention, call=call)
    attend = jax.sharding.auto_axes(attention, out_sharding=spec)
    return cast(jax.Array, attend(inputs))


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


def _for_mesh(plan: Plan) -> Plan:
    """Rows first where batch or heads may be sharded.

    Slicing along a sharded axis makes XLA gather it.
    """
    if plan.implementation != "xla" or jax.device_count() == 1 or _alone.get():
        return plan
    mesh = jax.sharding.get_abstract_mesh()
    inside_shard_map = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return plan if inside_shard_map else dataclasses.replace(plan, implementation="xla_rows")
