"""Attention as JAX primitives: how it is batched, differentiated, transposed and lowered."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autochunk.attention.kernels import fused
from autochunk.attention.kernels.dense import (
    dense,
    dense_tangent,
    dense_with_weights,
    log_sum_exp,
)
from autochunk.attention.kernels.grid import vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs, kept_dtype, split
from autochunk.attention.kernels.maps import cotangent, only_output, tangent, with_stats
from autochunk.attention.kernels.shares import (
    Axes,
    in_shares,
    input_axes,
    is_spread,
    lowering,
    moving_axes,
    output_axes,
    stats_axes,
    unspread,
)
from autochunk.plan import LogitsShape, runs_dense

Batched = tuple[list[jax.Array], list[int | None]]
"""Outputs, and which of their dims is that of the batch."""


def attention(inputs: Inputs, call: Call) -> list[jax.Array]:
    """Attention by the call's plans: [..., T', H, G, V] in the query's dtype.

    With ``call.residual`` the log-sum-exp [..., H, G, T'] of each row follows, in float32 at least.

    Args:
      inputs: query [..., T', H, G, K], with at least one leading dim and no dim of size zero; key
        [..., T, H, K] and value [..., T, H, V], whose leading dims broadcast where they are of size
        one; bias, added to the scaled logits, and mask, boolean, of which False takes no part:
        [..., H, G, T', T], of which any dim may be of size one and broadcast; the others by
        ``AXES``, with as many leading dims.
      call: scale, causality and the plans; names the arrays that are there.
    """
    operands = tuple(inputs.present.values())
    return cast(list[jax.Array], attention_p.bind(*vary_alike(operands, operands), call=call))


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by JAX's standard promotion of dtypes, whatever its caller's code asks for."""

    @functools.wraps(function)
    def run(*arguments: Any, **settings: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **settings)

    return run


def _primitive(
    name: str,
    function: Callable[..., list[jax.Array]],
    shapes: Callable[..., list[tuple[tuple[int, ...], Any]]],
    in_slices: Callable[..., Batched] | None = None,
    axes: Callable[..., tuple[list[Axes], list[Axes]]] | None = None,
) -> Primitive:
    """A primitive that runs ``function``, and batches by giving every operand one more leading dim.

    ``shapes`` gives its outputs' shapes and dtypes. What runs dense and in a batch exceeds the
    limit is computed by ``in_slices``, which takes the inputs and the other operands. Where there
    are several devices each computes its share, if ``axes`` tells those of operands and outputs;
    else XLA sees to it.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    function, shapes = promoting(function), promoting(shapes)
    parameters = inspect.signature(function).parameters
    statics = [parameter for parameter in ("call", "wanted") if parameter in parameters]
    compiled = jax.jit(primitive.bind, static_argnames=statics)

    def implement(*operands: jax.Array, **params: Any) -> list[jax.Array]:
        # Lowering is what knows the platform; with jit disabled there is none.
        config: Any = jax.config  # some versions annotate what it has, others do not
        run = function if config.jax_disable_jit else compiled
        return cast(list[jax.Array], run(*operands, **params))

    primitive.def_impl(implement)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        exported = context.module_context.lowering_parameters.for_export
        call = unspread(params["call"]) if exported else params["call"]
        params["call"] = call
        if axes is not None and is_spread(call):
            del params["call"]
            bind = functools.partial(primitive.bind, **params)
            shared = in_shares(bind, call, *axes(call, **params))
            return mlir.lower_fun(shared, multiple_results=True)(context, *operands)
        if "platforms" in parameters:
            params["platforms"] = tuple(context.module_context.platforms)
        lowered = lowering(call, mlir.lower_fun(function, multiple_results=True))
        # Functions that a kernel's derivatives hide are traced here.
        kernels = call.kernel, call.training_kernel
        with contextlib.nullcontext() if kernels == (None, None) else fused.their_rules():
            return lowered(context, *operands, **params)

    def abstract_eval(*avals: Any, **params: Any) -> list[Any]:
        # Updating an input's aval keeps what it knows of meshes; a new one would lose it.
        return [
            avals[0].update(shape=shape, dtype=dtype) for shape, dtype in shapes(*avals, **params)
        ]

    def batch(
        operands: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, **params: Any
    ) -> Batched:
        pairs = list(zip(operands, dims, strict=True))
        size = next(operand.shape[dim] for operand, dim in pairs if dim is not None)
        if size == 0:
            elements = itertools.starmap(_element, pairs)
            wanted = shapes(*elements, call=call, **params)
            outs = [jnp.zeros((0, *shape), dtype) for shape, dtype in wanted]
            return outs, [0] * len(outs)
        shared = _shared(call, **params)

        def move(position: int, operand: jax.Array, dim: int | None) -> jax.Array:
            if dim is not None:
                return jnp.moveaxis(operand, dim, 0)
            return jnp.broadcast_to(operand, (1 if position in shared else size, *operand.shape))

        count = len(call.operands)
        moved = [move(position, *pair) for position, pair in enumerate(pairs[:count])]
        rest = [functools.partial(move, count + n, *pair) for n, pair in enumerate(pairs[count:])]
        if in_slices is not None and not runs_dense(call.plans.training, _logits(moved, call)):
            return in_slices(moved, rest, call=call, **params)
        outs = primitive.bind(*moved, *(one() for one in rest), call=call, **params)
        return outs, [0] * len(outs)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lower)
    batching.primitive_batchers[primitive] = batch
    return primitive


def _logits(operands: Sequence[jax.Array], call: Call) -> LogitsShape:
    return split(operands, call)[0].logits


def _element(operand: jax.Array, dim: int | None) -> jax.ShapeDtypeStruct:
    """What one element of a batch sees of an operand."""
    shape = operand.shape if dim is None else operand.shape[:dim] + operand.shape[dim + 1 :]
    return jax.ShapeDtypeStruct(shape, operand.dtype)


def _shared(call: Call, wanted: tuple[bool, ...] = ()) -> set[int]:
    """Positions of operands that a batch may share by broadcasting.

    All inputs but the query, unless each element needs its own cotangent.
    """
    own = {"query", *call.wanted(wanted)}
    return {position for position, name in enumerate(call.operands) if name not in own}


def _output_shapes(
    query: Any, key: Any, value: Any, *_rest: Any, call: Call
) -> list[tuple[tuple[int, ...], Any]]:
    (shape, _), lse, _ = _stats_shapes(query, key, value, call=call)
    return [(shape, query.dtype), *([lse] if call.residual else [])]


def _stats_shapes(
    query: Any, _key: Any, value: Any, *_rest: Any, call: Call
) -> list[tuple[tuple[int, ...], Any]]:
    *leading, rows, heads, groups, _ = query.shape
    stats = ((*leading, heads, groups, rows), jnp.promote_types(query.dtype, jnp.float32))
    out = ((*query.shape[:-1], value.shape[-1]), kept_dtype(query.dtype, call))
    return [out, stats, stats]


def _cotangent_shapes(
    *operands: Any, call: Call, wanted: tuple[bool, ...]
) -> list[tuple[tuple[int, ...], Any]]:
    named = dict(zip(call.operands, operands, strict=False))
    return [(named[name].shape, named[name].dtype) for name in call.wanted(wanted)]


def _differentiate_plainly(primitive: Primitive, function: Callable[..., list[jax.Array]]) -> None:
    """Derivatives of a derivative: JAX's own, through slices that are recomputed."""

    @promoting
    def rule(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> Any:
        plain = functools.partial(function, **params)
        moved = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(plain, tuple(primals), moved)

    ad.primitive_jvps[primitive] = rule


@promoting
def _attention_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call) -> Any:
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    named = dict(zip(call.operands, tangents, strict=True))
    moving = [named[name] for name in call.moving]
    if runs_dense(call.plans.training, _logits(primals, call)):
        *outs, weights = dense_p.bind(*primals, call=call)
        return outs, dense_tangent_p.bind(*primals, weights, *moving, call=call)
    stats = attention_with_stats_p.bind(*primals, call=call)
    outs = _results(primals, stats, call)
    return outs, tangent_p.bind(*primals, *stats, *moving, call=call)


def _results(operands: Sequence[Any], stats: Sequence[jax.Array], call: Call) -> list[jax.Array]:
    """What ``attention`` gives, by what is kept for the backward pass."""
    (out, maximum, total), query = stats, operands[0]
    out = out.astype(query.dtype)
    return [out, log_sum_exp(maximum, total)] if call.residual else [out]


def _tangent_transpose(
    by: Primitive, cotangents: Sequence[Any], *operands: Any, call: Call
) -> list[Any]:
    moving = len(call.moving)
    residuals, tangents = operands[:-moving], operands[-moving:]
    wanted = tuple(ad.is_undefined_primal(tangent) for tangent in tangents)
    none: list[Any] = [None] * len(residuals)
    if all(type(one) is ad.Zero for one in cotangents):
        zeros = [ad.Zero(tangent.aval) for tangent in tangents]
        return none + [zero if want else None for zero, want in zip(zeros, wanted, strict=True)]
    pulled = map(ad.instantiate_zeros, cotangents)
    gradients = iter(by.bind(*residuals, *pulled, call=call, wanted=wanted))
    return none + [next(gradients) if want else None for want in wanted]


def _attention_transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> list[Any]:
    """Attention is linear in its values, if nothing else is asked for."""
    unknown = [
        name
        for name, one in zip(call.operands, operands, strict=True)
        if ad.is_undefined_primal(one)
    ]
    if unknown != ["value"]:
        raise NotImplementedError(
            f"attention is linear in its values alone, not in {' and '.join(unknown)}"
        )
    known = [
        jnp.zeros(one.aval.shape, one.aval.dtype) if ad.is_undefined_primal(one) else one
        for one in operands
    ]
    pulled = map(ad.instantiate_zeros, cotangents)
    stats = attention_with_stats_p.bind(*known, call=call)
    wanted = tuple(name == "value" for name in call.moving)
    (d_value,) = cotangent_p.bind(*known, *stats, *pulled, call=call, wanted=wanted)
    return [d_value if name == "value" else None for name in call.operands]


# Dense attention that is differentiated keeps its weights. It is known to be that before any batch
# around it is: where that exceeds the limit, the weights are left out of the batch, and are not
# looked at, and slices compute all.


def _dense(*operands: jax.Array, call: Call) -> list[jax.Array]:
    call.plans.used("training")
    return dense_with_weights(split(operands, call)[0], call)


def _dense_shapes(*operands: Any, call: Call) -> list[tuple[tuple[int, ...], Any]]:
    query, key, value = operands[:3]
    *leading, rows, heads, groups, _ = query.shape
    dtype = jnp.promote_types(query.dtype, query.dtype if call.half_logits else jnp.float32)
    weights = ((*leading, heads * groups, rows, key.shape[-3]), dtype)
    return [*_output_shapes(query, key, value, call=call), weights]


def _dense_in_slices(inputs: list[jax.Array], _rest: Any, *, call: Call) -> Batched:
    outs = _results(inputs, attention_with_stats_p.bind(*inputs, call=call), call)
    shape, dtype = _dense_shapes(*(_element(one, 0) for one in inputs), call=call)[-1]
    return [*outs, jnp.zeros(shape, dtype)], [0] * len(outs) + [None]


def _dense_tangent(*operands: jax.Array, call: Call) -> list[jax.Array]:
    inputs, (weights, *tangents) = split(operands, call)
    return dense_tangent(inputs, call, weights, dict(zip(call.moving, tangents, strict=True)))


def _dense_tangent_in_slices(
    inputs: list[jax.Array], rest: list[Callable[[], jax.Array]], *, call: Call
) -> Batched:
    stats = attention_with_stats_p.bind(*inputs, call=call)
    outs = tangent_p.bind(*inputs, *stats, *(one() for one in rest[1:]), call=call)
    return outs, [0] * len(outs)


def _dense_cotangent(*operands: jax.Array, call: Call, wanted: tuple[bool, ...]) -> list[jax.Array]:
    inputs, (weights, *cotangents) = split(operands, call)
    names = call.wanted(wanted)

    def moved(*tangents: jax.Array) -> list[jax.Array]:
        return dense_tangent(inputs, call, weights, dict(zip(names, tangents, strict=True)))

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


attention_p = _primitive("autochunk_attention", only_output, _output_shapes, axes=_axes)
attention_with_stats_p = _primitive(
    "autochunk_attention_with_stats", with_stats, _stats_shapes, axes=_with_stats_axes
)
tangent_p = _primitive("autochunk_attention_tangent", tangent, _output_shapes, axes=_tangent_axes)
cotangent_p = _primitive(
    "autochunk_attention_cotangent", cotangent, _cotangent_shapes, axes=_cotangent_axes
)
dense_p = _primitive("autochunk_dense", _dense, _dense_shapes, _dense_in_slices)
dense_tangent_p = _primitive(
    "autochunk_dense_tangent", _dense_tangent, _output_shapes, _dense_tangent_in_slices
)
dense_cotangent_p = _primitive(
    "autochunk_dense_cotangent", _dense_cotangent, _cotangent_shapes, _dense_cotangent_in_slices
)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_transposes[attention_p] = _attention_transpose
ad.primitive_transposes[tangent_p] = functools.partial(_tangent_transpose, cotangent_p)
ad.primitive_transposes[dense_tangent_p] = functools.partial(_tangent_transpose, dense_cotangent_p)
_differentiate_plainly(attention_with_stats_p, functools.partial(with_stats, differentiable=True))
_differentiate_plainly(tangent_p, functools.partial(tangent, differentiable=True))
_differentiate_plainly(cotangent_p, functools.partial(cotangent, differentiable=True))
_differentiate_plainly(dense_p, _dense)
_differentiate_plainly(dense_tangent_p, _dense_tangent)
_differentiate_plainly(dense_cotangent_p, _dense_cotangent)


def _jet(primals: Sequence[Any], series: Sequence[Any], *, call: Call) -> Any:
    """Taylor series: JAX's own, of all logits at once."""

    def plain(*operands: jax.Array) -> list[jax.Array]:
        return dense(split(operands, call)[0], call, careful=False)

    # Rules are given the coefficients of the series, without factorials.
    return jet.jet(plain, primals, series, factorial_scaled=False)


cast(dict[Any, Any], jet.jet_rules)[attention_p] = _jet
