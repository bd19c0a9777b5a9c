"""Chunks of each device's share, where the types of arrays say how they are sharded.

Each device then computes its own positions in a loop of its own, by ``jax.shard_map``: results that
are reduced, and cotangents of shared arrays, are summed over devices once, after the loop. XLA's
own propagation would sum them for each chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from autochunk.chunks.axes import Axes
from autochunk.chunks.call import Call
from autochunk.chunks.loop import Function, in_chunks, make_split
from autochunk.chunks.modes import Program, for_both
from autochunk.chunks.reductions import Arrays

_Names = tuple[str, ...]
"""Of mesh axes."""


def by_shares(
    call: Call, forward: Sequence[int], training: Sequence[int], like: Sequence[Any]
) -> Program | None:
    """The call in chunks of at most these sizes, with results sharded as in ``like``.

    None where shares cannot be computed alone: nothing is sharded along a chunked axis, an array
    is sharded along another one, or results are merged by a function.
    """
    names = _sharded_along(call)
    if names is None or isinstance(call.settings.reduce, tuple):
        return None
    inputs = [_spec(array.ndim, dims, names) for array, dims in _arrays_of(call)]
    outputs = [_spec_of_result(*one, names) for one in zip(like, call.outputs, strict=True)]
    local = functools.partial(
        for_both,
        _local(call, forward, names, differentiable=False),
        _local(call, training, names, differentiable=True),
    )

    def run(arrays: Arrays) -> Arrays:
        pairs = zip(arrays, inputs, strict=True)
        given = [jax.sharding.reshard(array, spec) for array, spec in pairs]
        found = jax.shard_map(local, in_specs=(inputs,), out_specs=outputs)(given)
        merged = map(functools.partial(_merged, call), found, _reduced_along(call, names))
        specs = [one.sharding.spec for one in like]
        return [jax.sharding.reshard(*one) for one in zip(merged, specs, strict=True)]

    return run


def _arrays_of(call: Call) -> Iterator[tuple[jax.Array, Axes]]:
    return zip(call.arrays, call.inputs, strict=True)


def _sharded_along(call: Call) -> list[_Names] | None:
    """The mesh axes that each chunked axis is sharded along; None if it is not so simple."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if any(kind != AxisType.Explicit for kind in kinds):
        return None
    found: list[_Names] = [()] * len(call.lengths)
    for array, dims in _arrays_of(call):
        for dim, one in enumerate(map(_names_of, jax.typeof(array).sharding.spec)):
            if not one:
                continue
            if dim not in dims or found[dims.index(dim)] not in ((), one):
                return None
            found[dims.index(dim)] = one
    every = [name for one in found for name in one]
    return found if every and len(set(every)) == len(every) else None


def _names_of(entry: Any) -> _Names:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _spec(ndim: int, dims: Axes, names: Sequence[_Names]) -> PartitionSpec:
    along = dict(zip(dims, names, strict=True))
    return PartitionSpec(*(along.get(dim) or None for dim in range(ndim)))


def _spec_of_result(one: Any, dims: Axes, names: Sequence[_Names]) -> PartitionSpec:
    """The same for a result; first comes a dim of the devices to merge it over, if any."""
    spec, merged = _spec(one.ndim, dims, names), _merged_along(dims, names)
    return PartitionSpec(merged, *spec) if merged else spec


def _merged_along(dims: Axes, names: Sequence[_Names]) -> _Names:
    return tuple(name for dim, one in zip(dims, names, strict=True) if dim is None for name in one)


def _reduced_along(call: Call, names: Sequence[_Names]) -> list[bool]:
    return [bool(_merged_along(dims, names)) for dims in call.outputs]


def _local(
    call: Call, sizes: Sequence[int], names: Sequence[_Names], *, differentiable: bool
) -> Function:
    """What a device computes of its share."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = [math.prod(mesh.shape[name] for name in one) for one in names]
    splits = [
        make_split(length // count, max(1, size // count), 1)
        for length, size, count in zip(call.lengths, sizes, devices, strict=True)
    ]
    how = call.inputs, call.outputs, call.reduction
    program = in_chunks(call.flat, splits, *how, differentiable=differentiable)
    reduced = _reduced_along(call, names)

    def run(arrays: Arrays) -> Arrays:
        pairs = zip(program(arrays), reduced, strict=True)
        return [one[None] if is_reduced else one for one, is_reduced in pairs]

    return run


def _merged(call: Call, result: jax.Array, is_reduced: bool) -> jax.Array:
    """A result merged over all devices."""
    if not is_reduced:
        return result
    merges: dict[str, Any] = {"mean": jnp.mean, "max": jnp.max, "min": jnp.min}
    found: jax.Array = merges.get(call.settings.reduce, jnp.sum)(result, axis=0)
    return found.astype(result.dtype)
