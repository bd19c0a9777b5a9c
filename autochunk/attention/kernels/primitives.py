"""Attention as JAX primitives: how it is batched, differentiated, transposed and lowered."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autochunk.attention.kernels.dense import dense
from autochunk.attention.kernels.grid import vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs, split
from autochunk.attention.kernels.maps import cotangent, only_output, tangent, with_stats
from autochunk.plan import runs_dense


def attention(inputs: Inputs, call: Call) -> jax.Array:
    """Attention by the call's plans: [..., T', H, G, V] in the query's dtype.

    Args:
      inputs: query [..., T', H, G, K], with at least one leading dim and no dim of size zero; key
        [..., T, H, K] and value [..., T, H, V], whose leading dims broadcast where they are of size
        one; bias, added to the scaled logits, and mask, boolean, of which False takes no part:
        [..., H, G, T', T], of which any dim may be of size one and broadcast.
      call: scale, causality and the plans; names the arrays that are there.
    """
    operands = tuple(inputs.present.values())
    (out,) = attention_p.bind(*vary_alike(operands, operands), call=call)
    return cast(jax.Array, out)


def _primitive(
    name: str,
    function: Callable[..., list[jax.Array]],
    shapes: Callable[..., list[tuple[tuple[int, ...], Any]]],
) -> Primitive:
    """A primitive that runs ``function``, and batches by giving every operand one more leading dim.

    ``shapes`` gives its outputs' shapes and dtypes.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
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
        if "platforms" in parameters:
            params["platforms"] = tuple(context.module_context.platforms)
        return mlir.lower_fun(function, multiple_results=True)(context, *operands, **params)

    def abstract_eval(*avals: Any, **params: Any) -> list[Any]:
        # Updating an input's aval keeps what it knows of meshes; a new one would lose it.
        return [
            avals[0].update(shape=shape, dtype=dtype) for shape, dtype in shapes(*avals, **params)
        ]

    def batch(
        operands: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, **params: Any
    ) -> tuple[list[jax.Array], list[int]]:
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

        moved = [move(position, *pair) for position, pair in enumerate(pairs)]
        outs = primitive.bind(*moved, call=call, **params)
        return outs, [0] * len(outs)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lower)
    batching.primitive_batchers[primitive] = batch
    return primitive


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


def _output_shape(
    query: Any, _key: Any, value: Any, *_rest: Any, **_params: Any
) -> list[tuple[tuple[int, ...], Any]]:
    return [((*query.shape[:-1], value.shape[-1]), query.dtype)]


def _stats_shapes(
    query: Any, key: Any, value: Any, *_rest: Any, **_params: Any
) -> list[tuple[tuple[int, ...], Any]]:
    *leading, rows, heads, groups, _ = query.shape
    stats = ((*leading, heads, groups, rows), jnp.promote_types(query.dtype, jnp.float32))
    return [*_output_shape(query, key, value), stats, stats]


def _cotangent_shapes(
    *operands: Any, call: Call, wanted: tuple[bool, ...]
) -> list[tuple[tuple[int, ...], Any]]:
    named = dict(zip(call.operands, operands, strict=False))
    return [(named[name].shape, named[name].dtype) for name in call.wanted(wanted)]


def _differentiate_plainly(primitive: Primitive, function: Callable[..., list[jax.Array]]) -> None:
    """Derivatives of a derivative: JAX's own, through slices that are recomputed."""

    def rule(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> Any:
        plain = functools.partial(function, differentiable=True, **params)
        moved = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(plain, tuple(primals), moved)

    ad.primitive_jvps[primitive] = rule


def _attention_jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call) -> Any:
    call.plans.used("training")
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    if runs_dense(call.plans.training, split(primals, call)[0].logits):
        unsliced = lambda *operands: [dense(split(operands, call)[0], call)]  # noqa: E731
        return jax.jvp(unsliced, tuple(primals), tuple(tangents))
    out, maximum, total = attention_with_stats_p.bind(*primals, call=call)
    named = dict(zip(call.operands, tangents, strict=True))
    moving = [named[name] for name in call.moving]
    return [out], tangent_p.bind(*primals, out, maximum, total, *moving, call=call)


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, call: Call) -> list[Any]:
    moving = len(call.moving)
    residuals, tangents = operands[:-moving], operands[-moving:]
    wanted = tuple(ad.is_undefined_primal(tangent) for tangent in tangents)
    none: list[Any] = [None] * len(residuals)
    if type(cotangents[0]) is ad.Zero:
        zeros = [ad.Zero(tangent.aval) for tangent in tangents]
        return none + [zero if want else None for zero, want in zip(zeros, wanted, strict=True)]
    gradients = iter(cotangent_p.bind(*residuals, cotangents[0], call=call, wanted=wanted))
    return none + [next(gradients) if want else None for want in wanted]


attention_p = _primitive("autochunk_attention", only_output, _output_shape)
attention_with_stats_p = _primitive("autochunk_attention_with_stats", with_stats, _stats_shapes)
tangent_p = _primitive("autochunk_attention_tangent", tangent, _output_shape)
cotangent_p = _primitive("autochunk_attention_cotangent", cotangent, _cotangent_shapes)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
_differentiate_plainly(attention_with_stats_p, with_stats)
_differentiate_plainly(tangent_p, tangent)
_differentiate_plainly(cotangent_p, cotangent)
