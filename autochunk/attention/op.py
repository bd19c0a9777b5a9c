"""``dot_product_attention``: checks the arguments, resolves "auto", runs the plan."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import jax
import jax.extend.backend
import jax.numpy as jnp

from autochunk.attention import kernels
from autochunk.errors import ArgumentError
from autochunk.plan import (
    DEFAULT_MAX_CHUNK_SIZE_MB,
    Plan,
    Plans,
    check_implementation,
    check_max_chunk_size_mb,
)
from autochunk.store import resolve
from autochunk.workload import DTYPES, Workload


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
    """softmax(query @ key^T * scale + bias) @ value for every head, without holding all logits at
    once.

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
    query, key, value = (
        _array(name, array) for name, array in (("query", query), ("key", key), ("value", value))
    )
    _check_shapes(query, key, value)
    logits_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    bias = None if bias is None else _check_term("bias", _array("bias", bias), logits_shape)
    mask = None if mask is None else _check_term("mask", _array("mask", mask), logits_shape)
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else _check_scale(scale)
    if 0 in logits_shape or value.shape[-1] == 0:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
    if (implementation, max_chunk_size_mb) != ("dense", None):
        _check_known((*logits_shape, query.shape[-1], value.shape[-1]))
    plans = _plans(
        query, key, value, bias, mask, bool(is_causal), max_chunk_size_mb, implementation
    )
    call = kernels.Call(scale, bool(is_causal), bias is not None, mask is not None, plans)
    inputs = _grouped(query, key, value, bias, mask)
    return _attend(inputs, _taken(call, inputs, implementation)).reshape(
        (*query.shape[:-1], value.shape[-1])
    )


_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Within it calls are traced for one device, however many jax sees, so that a plan runs as it
    is: for measuring it.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def why_not(
    implementation: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    is_causal: bool,
    training: bool,
) -> str:
    """Why an implementation does not take a call, on jax's default device.

    Empty if it does. Arrays as in ``dot_product_attention``, of rank 4.
    """
    if implementation not in kernels.FUSED:
        return ""
    plan = Plan(implementation)
    call = kernels.Call(1.0, is_causal, bias is not None, mask is not None, Plans(plan, plan))
    try:
        kernels.trace(
            implementation,
            _grouped(query, key, value, bias, mask),
            call,
            _platform(),
            training=training,
        )
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
    for mode in ("forward", "training"):
        plan: Plan = getattr(plans, mode)
        if plan.implementation not in kernels.FUSED:
            continue
        try:
            kernel = kernels.trace(
                plan.implementation, inputs, call, _platform(), training=mode == "training"
            )
        except kernels.NotTaken as refusal:
            if pinned == plan.implementation and mode == "forward":
                raise ArgumentError(
                    f"implementation={pinned!r} does not take this call: {refusal}. Leave "
                    'implementation out to let "auto" choose'
                ) from None
            plans = dataclasses.replace(plans, **{mode: plan.sliced()})  # type: ignore[arg-type]
    return call._replace(plans=plans, kernel=kernel)


def _platform() -> str:
    """Jax's default platform as lowering rules name it."""
    backend = jax.extend.backend.get_backend()
    if backend.platform != "gpu":
        return cast(str, backend.platform)
    return "rocm" if "rocm" in backend.platform_version.lower() else "cuda"


def _grouped(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
) -> kernels.Inputs:
    """The arrays as the kernels want them: query heads [H] as [N, H / N], at least one leading dim."""
    leading, heads, kv_heads = query.shape[:-3] or (1,), query.shape[-2], key.shape[-2]
    grouped = query.reshape(
        (*leading, query.shape[-3], kv_heads, heads // kv_heads, query.shape[-1])
    )
    keys, values = (array.reshape((*leading, *array.shape[-3:])) for array in (key, value))
    bias, mask = (None if term is None else _grouped_term(term, kv_heads) for term in (bias, mask))
    return kernels.Inputs(grouped, keys, values, bias, mask)


def _attend(inputs: kernels.Inputs, call: kernels.Call) -> jax.Array:
    """The kernel.

    Where mesh axes are explicit, its inside is left to XLA's own propagation and the output is
    sharded as the query.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return kernels.attention(*inputs, call)
    spec = jax.sharding.PartitionSpec(*jax.typeof(inputs.query).sharding.spec[:-1], None)
    attend = jax.sharding.auto_axes(
        functools.partial(kernels.attention, call=call), out_sharding=spec
    )
    return cast(jax.Array, attend(*inputs))


def _array(name: str, array: Any) -> jax.Array:
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} must be an array; got {type(array).__name__} ({error})"
        ) from None


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if query.ndim < 3:
        raise ArgumentError(
            f"query must be [..., T', H, K], of rank 3 or more; got shape {query.shape}"
        )
    if str(query.dtype) not in DTYPES:
        raise ArgumentError(
            f"query must be of one of the dtypes {', '.join(DTYPES)}; got {query.dtype}"
        )
    *leading, _, heads, size = query.shape
    for name, array, last in (("key", key, size), ("value", value, None)):
        if array.dtype != query.dtype:
            raise ArgumentError(
                f"{name} must have the query's dtype {query.dtype}; got {array.dtype}"
            )
        if array.ndim != query.ndim or list(array.shape[:-3]) != leading:
            raise ArgumentError(
                f"{name} must have the query's leading dims {tuple(leading)} and rank "
                f"{query.ndim}; got shape {array.shape}"
            )
        if last is not None and array.shape[-1] != last:
            raise ArgumentError(
                f"{name} must have the query's last dim {last}; got shape {array.shape}"
            )
    if value.shape[-3:-1] != key.shape[-3:-1]:
        raise ArgumentError(
            f"value must have the key's length and heads {key.shape[-3:-1]}; got "
            f"{value.shape[-3:-1]}"
        )
    if key.shape[-2] == 0 or heads % key.shape[-2]:
        raise ArgumentError(
            f"the query's heads must be a multiple of the key's; got {heads} and {key.shape[-2]}"
        )


def _check_known(sizes: tuple[Any, ...]) -> None:
    if not all(isinstance(size, int) for size in sizes):
        raise ArgumentError(
            f"sizes must be known while tracing, since slices follow from them; got {sizes}. "
            "Symbolic ones, as for jax.export, take implementation='dense' with "
            "max_chunk_size_mb=None"
        )


def _check_term(name: str, term: jax.Array, logits_shape: tuple[int, ...]) -> jax.Array:
    """Bias or mask with the logits' rank."""
    if name == "mask" and term.dtype != jnp.bool_:
        raise ArgumentError(f"mask must be boolean (pass terms to add as bias); got {term.dtype}")
    if name == "bias" and not jnp.issubdtype(term.dtype, jnp.floating):
        raise ArgumentError(f"bias must be floating point; got {term.dtype}")
    padded = (1,) * (len(logits_shape) - term.ndim) + term.shape
    if len(padded) != len(logits_shape) or any(
        size not in (1, whole) for size, whole in zip(padded, logits_shape, strict=True)
    ):
        raise ArgumentError(
            f"{name} must broadcast to [..., H, T', T] = {logits_shape}; got shape {term.shape}"
        )
    return term.reshape(padded)


def _check_scale(scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise ArgumentError(
            f"scale must be a number known while tracing, or None; got {scale!r}. Multiply the "
            "query by a traced scale instead"
        ) from None


def _grouped_term(term: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, T', T] to [..., N, H / N, T', T], with at least one leading dim."""
    *leading, heads, rows, keys = term.shape
    groups = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return term.reshape((*(leading or (1,)), *groups, rows, keys))


def _plans(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
    max_chunk_size_mb: float | Literal["auto"] | None,
    implementation: str | None,
) -> Plans:
    if max_chunk_size_mb != "auto":
        plan = _for_mesh(Plan(implementation or "xla", max_chunk_size_mb))
        return Plans(plan, plan)
    if query.shape[-1] == 0:  # nothing to tune: all logits are zero
        return _plans(
            query, key, value, bias, mask, is_causal, DEFAULT_MAX_CHUNK_SIZE_MB, implementation
        )
    workload = Workload.make(
        batch=math.prod(query.shape[:-3]),
        query_length=query.shape[-3],
        key_length=key.shape[-3],
        num_heads=query.shape[-2],
        num_kv_heads=key.shape[-2],
        key_size=query.shape[-1],
        value_size=value.shape[-1],
        dtype=str(query.dtype),
        causal=is_causal,
        mask=_pattern(mask),
        bias=_pattern(bias),
    )
    plans = resolve.plans(workload, implementation)
    return dataclasses.replace(
        plans, forward=_for_mesh(plans.forward), training=_for_mesh(plans.training)
    )


def _for_mesh(plan: Plan) -> Plan:
    """Rows first where batch or heads may be sharded.

    Slicing along a sharded axis makes XLA gather it.
    """
    if plan.implementation != "xla" or jax.device_count() == 1 or _alone.get():
        return plan
    mesh = jax.sharding.get_abstract_mesh()
    inside_shard_map = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return plan if inside_shard_map else dataclasses.replace(plan, implementation="xla_rows")


def _pattern(term: jax.Array | None) -> str:
    """Which dims of a bias or mask [..., H, T', T] are its own, in a Workload's letters."""
    if term is None:
        return "none"
    *leading, heads, rows, keys = term.shape
    sizes = {"b": math.prod(leading), "h": heads, "t": rows, "s": keys}
    return "".join("1" if size == 1 else letter for letter, size in sizes.items())
