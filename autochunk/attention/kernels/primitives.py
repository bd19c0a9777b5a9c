"""Attention as JAX primitives: how it is batched, differentiated, transposed and lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.interpreters import ad

from autochunk.attention.kernels.dense import dense, dense_tangent, dense_with_weights
from autochunk.attention.kernels.derivatives import Plain, differentiate_in_shares
from autochunk.attention.kernels.grid import vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs, kept_dtype, split
from autochunk.attention.kernels.maps import cotangent, only_output, tangent, with_stats
from autochunk.attention.kernels.meshes import Axes
from autochunk.attention.kernels.primitive import (
    Batched,
    Family,
    differentiate_plainly,
    element,
    logits_of,
    moving_of,
    primitive,
    promoting,
    results,
    tangent_transpose,
)
from autochunk.attention.kernels.shares import (
    input_axes,
    moving_axes,
    output_axes,
    stats_axes,
)
from autochunk.plan import runs_dense


def attention(inputs: Inputs, call: Call) -> list[jax.Array]:
    """Attention by the call's plans: [..., T', H, G, V] in the query's dtype.

    With ``call.residual`` the log-sum-exp [..., H, G, T'] of each row follows, in float32 at least.

    Args:
      inputs: query [..., T', H, G, K], with at least one leading dim and no dim of size zero; key
        [..., T, H, K] and value [..., T, H, V], whose leading dims of size one broadcast; bias
        [..., H, G, T', T], added to the scaled logits; mask [..., H, G, T', T], boolean, where
        False hides a key. Any dim of size one of bias and mask broadcasts. The others have the
        axes in ``AXES`` and as many leading dims.
      call: scale, causality and the plans; names the arrays that are there.
    """
    operands = tuple(inputs.present.values())
    return cast(list[jax.Array], attention_p.bind(*vary_alike(operands, operands), call=call))


def output_shapes(
    query: Any, key: Any, value: Any, *_rest: Any, call: Call
) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what attention gives."""
    (shape, _), lse, _ = stats_shapes(query, key, value, call=call)
    return [(shape, query.dtype), *([lse] if call.residual else [])]


def stats_shapes(
    query: Any, _key: Any, value: Any, *_rest: Any, call: Call
) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of what is kept for the backward pass: output, row maxima and sums."""
    *leading, rows, heads, groups, _ = query.shape
    stats = ((*leading, heads, groups, rows), jnp.promote_types(query.dtype, jnp.float32))
    out = ((*query.shape[:-1], value.shape[-1]), kept_dtype(query.dtype, call))
    return [out, stats, stats]


def cotangent_shapes(
    *operands: Any, call: Call, wanted: tuple[bool, ...]
) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the wanted cotangents."""
    named = dict(zip(call.operands, operands, strict=False))
    return [(named[name].shape, named[name].dtype) for name in call.wanted(wanted)]


# Dense attention that is differentiated keeps its weights. That is decided before a batch around it
# is known. Where the batch exceeds the limit slices compute everything: the weights then have no
# batch dim, and are not used.


def _dense(*operands: jax.Array, call: Call, differentiable: bool = False) -> list[jax.Array]:
    call.plans.used("training")
    return dense_with_weights(split(operands, call)[0], call, differentiable=differentiable)


def _dense_shapes(*operands: Any, call: Call) -> list[tuple[tuple[int, ...], Any]]:
    query, key, value = operands[:3]
    *leading, rows, heads, groups, _ = query.shape
    dtype = jnp.promote_types(query.dtype, query.dtype if call.half_logits else jnp.float32)
    weights = ((*leading, heads * groups, rows, key.shape[-3]), dtype)
    return [*output_shapes(query, key, value, call=call), weights]


def _dense_in_slices(inputs: list[jax.Array], _rest: Any, *, call: Call) -> Batched:
    outs = results(inputs, attention_with_stats_p.bind(*inputs, call=call), call)
    shape, dtype = _dense_shapes(*(element(one, 0) for one in inputs), call=call)[-1]
    return [*outs, jnp.zeros(shape, dtype)], [0] * len(outs) + [None]


def _dense_tangent(
    *operands: jax.Array, call: Call, platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    inputs, (weights, *tangents) = split(operands, call)
    named = dict(zip(call.moving, tangents, strict=True))
    return dense_tangent(inputs, call, weights, named, platforms)


def _dense_tangent_in_slices(
    inputs: list[jax.Array], rest: list[Callable[[], jax.Array]], *, call: Call
) -> Batched:
    stats = attention_with_stats_p.bind(*inputs, call=call)
    outs = tangent_p.bind(*inputs, *stats, *(one() for one in rest[1:]), call=call)
    return outs, [0] * len(outs)


def _dense_cotangent(
    *operands: jax.Array, call: Call, wanted: tuple[bool, ...], platforms: tuple[str, ...] = ()
) -> list[jax.Array]:
    inputs, (weights, *cotangents) = split(operands, call)
    names = call.wanted(wanted)

    def moved(*tangents: jax.Array) -> list[jax.Array]:
        named = dict(zip(names, tangents, strict=True))
        return dense_tangent(inputs, call, weights, named, platforms)

    pull = jax.linear_transpose(moved, *(inputs.present[name] for name in names))
    return list(pull(list(cotangents)))


def _dense_cotangent_in_slices(
    inputs: list[jax.Array],
    rest: list[Callable[[], jax.Array]],
    *,
    call: Call,
    wanted: tuple[bool, ...],
) -> Batched:
    stats = attention_with_stats_p.bind(*inputs, call=call)
    pulled = (one() for one in rest[1:])
    outs = cotangent_p.bind(*inputs, *stats, *pulled, call=call, wanted=wanted)
    return outs, [0] * len(outs)


def _axes(call: Call) -> tuple[list[Axes], list[Axes]]:
    return input_axes(call), output_axes(call)


def _with_stats_axes(call: Call) -> tuple[list[Axes], list[Axes]]:
    return input_axes(call), stats_axes()


def _tangent_axes(call: Call) -> tuple[list[Axes], list[Axes]]:
    moving = moving_axes(call, call.moving)
    return [*input_axes(call), *stats_axes(), *moving], output_axes(call)


def _cotangent_axes(call: Call, wanted: tuple[bool, ...]) -> tuple[list[Axes], list[Axes]]:
    pulled = [*input_axes(call), *stats_axes(), *output_axes(call)]
    return pulled, moving_axes(call, call.wanted(wanted))


attention_p = primitive("autochunk_attention", only_output, output_shapes, axes=_axes)
attention_with_stats_p = primitive(
    "autochunk_attention_with_stats", with_stats, stats_shapes, axes=_with_stats_axes
)
tangent_p = primitive("autochunk_attention_tangent", tangent, output_shapes, axes=_tangent_axes)
cotangent_p = primitive(
    "autochunk_attention_cotangent", cotangent, cotangent_shapes, axes=_cotangent_axes
)
dense_p = primitive("autochunk_dense", _dense, _dense_shapes, _dense_in_slices)
dense_tangent_p = primitive(
    "autochunk_dense_tangent", _dense_tangent, output_shapes, _dense_tangent_in_slices
)
dense_cotangent_p = primitive(
    "autochunk_dense_cotangent", _dense_cotangent, cotangent_shapes, _dense_cotangent_in_slices
)

_sliced = Family(attention_p, attention_with_stats_p, tangent_p, cotangent_p)


@promoting
def _attention_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call) -> Any:
    if not runs_dense(call.plans.training, logits_of(primals, call)):
        return _sliced.jvp(primals, tangents, call=call)
    *outs, weights = dense_p.bind(*primals, call=call)
    return outs, dense_tangent_p.bind(*primals, weights, *moving_of(tangents, call), call=call)


ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_transposes[attention_p] = _sliced.transpose
ad.primitive_transposes[tangent_p] = functools.partial(tangent_transpose, cotangent_p)
ad.primitive_transposes[dense_tangent_p] = functools.partial(tangent_transpose, dense_cotangent_p)
differentiate_in_shares(
    attention_with_stats_p,
    Plain(functools.partial(with_stats, differentiable=True), stats_shapes, _with_stats_axes),
)
differentiate_in_shares(
    tangent_p, Plain(functools.partial(tangent, differentiable=True), output_shapes, _tangent_axes)
)
differentiate_in_shares(
    cotangent_p,
    Plain(functools.partial(cotangent, differentiable=True), cotangent_shapes, _cotangent_axes),
)
differentiate_plainly(dense_p, functools.partial(_dense, differentiable=True))
differentiate_plainly(dense_tangent_p, _dense_tangent)
differentiate_plainly(dense_cotangent_p, _dense_cotangent)


def _jet(primals: Sequence[Any], series: Sequence[Any], *, call: Call) -> Any:
    """Taylor series: JAX's own, of all logits at once."""

    def plain(*operands: jax.Array) -> list[jax.Array]:
        return dense(split(operands, call)[0], call, careful=False, differentiable=True)

    # Rules are given the coefficients of the series, without factorials.
    return jet.jet(plain, primals, series, factorial_scaled=False)


cast(dict[Any, Any], jet.jet_rules)[attention_p] = _jet
