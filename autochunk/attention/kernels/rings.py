"""A ring of devices as JAX primitives, so that it has all derivatives that the op has.

In the backward pass, too, a device holds one share of the keys at a time. Derivatives beyond the
first are JAX's own, of the loop around the ring, and keep what each step had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from autochunk.attention.kernels.grid import vary_alike
from autochunk.attention.kernels.inputs import Call, Inputs, kept_dtype, split
from autochunk.attention.kernels.primitive import (
    Family,
    differentiate_plainly,
    primitive,
    results,
    tangent_transpose,
)
from autochunk.attention.kernels.primitives import cotangent_shapes, output_shapes, stats_shapes
from autochunk.attention.kernels.ring import Ring, Spread


def attention_around(inputs: Inputs, call: Call, spread: Spread) -> list[jax.Array]:
    """What ``attention`` returns for this device's queries and all devices' keys."""
    operands = tuple(inputs.present.values())
    like = (*operands, jax.lax.axis_index(spread.axis_name))
    found = _family.output.bind(*vary_alike(operands, like), call=call, spread=spread)
    return cast(list[jax.Array], found)


def _only_output(*operands: jax.Array, call: Call, spread: Spread) -> list[jax.Array]:
    return results(operands, _with_stats(*operands, call=call, spread=spread), call)


def _with_stats(*operands: jax.Array, call: Call, spread: Spread) -> list[jax.Array]:
    inputs, _ = split(operands, call)
    out, *stats = Ring(inputs, call, spread).stats(inputs)
    return [out.astype(kept_dtype(inputs.query.dtype, call)), *stats]


def _tangent(*operands: jax.Array, call: Call, spread: Spread) -> list[jax.Array]:
    inputs, rest = split(operands, call)
    return Ring(inputs, call, spread).tangents(inputs, rest[:3], rest[3:])


def _cotangent(
    *operands: jax.Array, call: Call, spread: Spread, wanted: tuple[bool, ...]
) -> list[jax.Array]:
    inputs, rest = split(operands, call)
    return Ring(inputs, call, spread).cotangents(inputs, rest[:3], rest[3:], wanted)


def _primitive(
    name: str, function: Callable[..., list[jax.Array]], shapes: Callable[..., Any]
) -> Primitive:
    def own_shapes(*avals: Any, **params: Any) -> Any:
        del params["spread"]
        return shapes(*avals, **params)

    made = primitive(name, function, own_shapes)
    batch = batching.fancy_primitive_batchers[made]

    def batch_around(
        axis: Any, operands: Sequence[Any], dims: Any, *, spread: Spread, **params: Any
    ) -> Any:
        names = spread.axis_name
        if axis.name not in (names if isinstance(names, tuple) else (names,)):
            return batch(axis, operands, dims, spread=spread, **params)
        # The ring goes over the elements of a batch, which are on one device.
        run = functools.partial(function, spread=spread, **params)
        outs = jax.vmap(run, tuple(dims), axis_name=axis.name)(*operands)
        return outs, [0] * len(outs)

    batching.fancy_primitive_batchers[made] = batch_around
    return made


_family = Family(
    _primitive("autochunk_ring", _only_output, output_shapes),
    _primitive("autochunk_ring_with_stats", _with_stats, stats_shapes),
    _primitive("autochunk_ring_tangent", _tangent, output_shapes),
    _primitive("autochunk_ring_cotangent", _cotangent, cotangent_shapes),
)
ad.primitive_jvps[_family.output] = _family.jvp
ad.primitive_transposes[_family.output] = _family.transpose
ad.primitive_transposes[_family.tangent] = functools.partial(tangent_transpose, _family.cotangent)
differentiate_plainly(_family.with_stats, _with_stats)
differentiate_plainly(_family.tangent, _tangent)
differentiate_plainly(_family.cotangent, _cotangent)
