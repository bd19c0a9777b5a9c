"""How the primitives of attention are made: batched, lowered, differentiated, transposed."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autochunk.attention.kernels import fused, in_place
from autochunk.attention.kernels.dense import log_sum_exp
from autochunk.attention.kernels.inputs import Call, split
from autochunk.attention.kernels.meshes import Axes
from autochunk.attention.kernels.shares import (
    in_shares,
    is_exported,
    is_spread,
    lowering,
    spread_over,
)
from autochunk.plan import LogitsShape, runs_dense

Batched = tuple[list[jax.Array], list[int | None]]
"""Outputs, and which of their dims is that of the batch."""


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under JAX's standard promotion of dtypes, whatever its caller's code has set."""

    @functools.wraps(function)
    def run(*arguments: Any, **settings: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **settings)

    return run


def primitive(
    name: str,
    function: Callable[..., list[jax.Array]],
    shapes: Callable[..., list[tuple[tuple[int, ...], Any]]],
    in_slices: Callable[..., Batched] | None = None,
    axes: Callable[..., tuple[list[Axes], list[Axes]]] | None = None,
) -> Primitive:
    """A primitive that runs ``function``, and batches by giving every operand one more leading dim.

    ``shapes`` gives its outputs' shapes and dtypes. A dense call that exceeds the limit in a batch
    is computed by ``in_slices``, which takes the inputs and the other operands. On several devices
    each computes its share, if ``axes`` names the axes of operands and outputs; else XLA
    partitions the whole.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    function, shapes = promoting(function), promoting(shapes)
    parameters = inspect.signature(function).parameters
    names = ("call", "spread", "wanted", "of")
    statics = [one for one in names if one in parameters]
    compiled = jax.jit(primitive.bind, static_argnames=statics)

    def implement(*operands: jax.Array, **params: Any) -> list[jax.Array]:
        # Lowering is what knows the platform; with jit disabled there is none.
        config: Any = jax.config  # some versions annotate what it has, others do not
        run = function if config.jax_disable_jit else compiled
        return cast(list[jax.Array], run(*operands, **params))

    primitive.def_impl(implement)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        call, free = spread_over(context, params["call"])
        params["call"] = call
        if axes is not None and is_spread(call):
            del params["call"]
            bind = functools.partial(primitive.bind, **params)
            shared = in_shares(bind, call, *axes(call, **params), free)
            return mlir.lower_fun(shared, multiple_results=True)(context, *operands)
        if "platforms" in parameters:
            params["platforms"] = tuple(context.module_context.platforms)
        lowered = lowering(call, mlir.lower_fun(function, multiple_results=True))
        # Functions that a kernel's derivatives hide are traced here.
        if (call.kernel, call.training_kernel) == (None, None):
            return lowered(context, *operands, **params)
        with fused.their_rules(), in_place.lowering(for_export=is_exported(context)):
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
            elements = itertools.starmap(element, pairs)
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
        if in_slices is not None and not runs_dense(call.plans.training, logits_of(moved, call)):
            return in_slices(moved, rest, call=call, **params)
        outs = primitive.bind(*moved, *(one() for one in rest), call=call, **params)
        return outs, [0] * len(outs)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, lower)
    batching.primitive_batchers[primitive] = batch
    return primitive


def logits_of(operands: Sequence[jax.Array], call: Call) -> LogitsShape:
    """Sizes of all logits of a primitive's operands."""
    return split(operands, call)[0].logits


def element(operand: jax.Array, dim: int | None) -> jax.ShapeDtypeStruct:
    """What one element of a batch sees of an operand."""
    shape = operand.shape if dim is None else operand.shape[:dim] + operand.shape[dim + 1 :]
    return jax.ShapeDtypeStruct(shape, operand.dtype)


def _shared(call: Call, wanted: tuple[bool, ...] = (), of: Any = None, **_params: Any) -> set[int]:
    """Positions of operands that a batch may share by broadcasting.

    All inputs but the query, unless each element needs its own cotangent, or is differentiated
    again (``of`` a map).
    """
    own = {"query", *call.wanted(wanted), *(() if of is None else of.own(call))}
    return {position for position, name in enumerate(call.operands) if name not in own}


class Family(NamedTuple):
    """The primitives of one kind of attention, alike in their static parameters.

    Attributes:
      output: what the attention returns.
      with_stats: the output as it is kept, the row maxima and the sums of exponentials.
      tangent, cotangent: the derivatives. Operands are the inputs, what ``with_stats`` returns, and
        the tangents of ``Call.moving`` or the cotangents of the outputs.
    """

    output: Primitive
    with_stats: Primitive
    tangent: Primitive
    cotangent: Primitive

    @promoting
    def jvp(
        self, primals: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call, **params: Any
    ) -> Any:
        """The output's rule for tangents."""
        moving = moving_of(tangents, call)
        stats = self.with_stats.bind(*primals, call=call, **params)
        outs = results(primals, stats, call)
        return outs, self.tangent.bind(*primals, *stats, *moving, call=call, **params)

    def transpose(
        self, cotangents: Sequence[Any], *operands: Any, call: Call, **params: Any
    ) -> list[Any]:
        """The output's rule for transposition: it is linear in its values and in nothing else."""
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
        stats = self.with_stats.bind(*known, call=call, **params)
        wanted = tuple(name == "value" for name in call.moving)
        (d_value,) = self.cotangent.bind(
            *known, *stats, *pulled, call=call, wanted=wanted, **params
        )
        return [d_value if name == "value" else None for name in call.operands]


def moving_of(tangents: Sequence[Any], call: Call) -> list[Any]:
    """The tangents of ``Call.moving``, from those of all operands."""
    whole = map(ad.instantiate_zeros, tangents)
    named = dict(zip(call.operands, whole, strict=True))
    return [named[name] for name in call.moving]


def results(operands: Sequence[Any], stats: Sequence[jax.Array], call: Call) -> list[jax.Array]:
    """What attention returns, from what is kept for the backward pass."""
    (out, maximum, total), query = stats, operands[0]
    out = out.astype(query.dtype)
    return [out, log_sum_exp(maximum, total)] if call.residual else [out]


def tangent_transpose(
    by: Primitive, cotangents: Sequence[Any], *operands: Any, call: Call, **params: Any
) -> list[Any]:
    """A tangent map's rule for transposition; ``by`` is the primitive of cotangents."""
    moving = len(call.moving)
    residuals, tangents = operands[:-moving], operands[-moving:]
    wanted = tuple(ad.is_undefined_primal(tangent) for tangent in tangents)
    none: list[Any] = [None] * len(residuals)
    if all(type(one) is ad.Zero for one in cotangents):
        zeros = [ad.Zero(tangent.aval) for tangent in tangents]
        return none + [zero if want else None for zero, want in zip(zeros, wanted, strict=True)]
    pulled = map(ad.instantiate_zeros, cotangents)
    gradients = iter(by.bind(*residuals, *pulled, call=call, wanted=wanted, **params))
    return none + [next(gradients) if want else None for want in wanted]


def differentiate_plainly(primitive: Primitive, function: Callable[..., list[jax.Array]]) -> None:
    """Derivatives of a derivative: JAX's own, through slices that are recomputed."""
    ad.primitive_jvps[primitive] = plain_rule(function)


def plain_rule(function: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """JAX's own rule for the tangents of a primitive that ``function`` computes."""

    @promoting
    def rule(primals: Sequence[jax.Array], tangents: Sequence[Any], **params: Any) -> Any:
        plain = functools.partial(function, **params)
        moved = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(plain, tuple(primals), moved)

    return rule
