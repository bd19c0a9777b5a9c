"""Attention on several devices: each computes its share, in slices of its own.

Leading dims, heads and query rows may be sharded, over any axes of a mesh; keys and features are
gathered. Each device computes attention of its share's shape with the plan for that shape, so a
limit holds for each device. Only cotangents are communicated: they are summed over shares once,
after the slices.

XLA says what is sharded only when it partitions a program, after tracing. JAX's
``custom_partitioning`` asks us then.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autochunk.attention.kernels.fused import taken
from autochunk.attention.kernels.inputs import AXES, QUERY, STATS, Call, Inputs, split

Axes = tuple[str, ...]
Bind = Callable[..., list[jax.Array]]

# Dims of these stay whole.
_WHOLE = {"keys", "key features", "value features"}

# As ``Call.shares``: this is the computation of one share.
_ONE = "one"


@functools.cache
def marker() -> Any:
    """A traced program that tells JAX that devices must be known where it is lowered.

    JAX looks for it among a primitive's parameters. What a primitive lowers to would come too late.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(lambda *_: None, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), jnp.float32))


def lowering(call: Call, lower: Callable[..., Any]) -> Callable[..., Any]:
    """How a call is lowered to a program without sharding: in a share's there is no mesh."""
    return _without_mesh(lower) if call.shares == _ONE else lower


def _without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with no mesh in force, whatever mesh is set where XLA partitions the program.

    With explicit axes arrays would have shardings in their types, which nothing uses any more.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **settings: Any) -> Any:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*arguments, **settings)

    return run


def is_spread(call: Call) -> bool:
    """Whether a call's arrays may be sharded."""
    return call.shares not in (None, _ONE)


def unspread(call: Call) -> Call:
    """A call for XLA to partition by itself, as in a program that another process will run.

    Slicing along a sharded axis makes XLA gather it; rows are sharded least often.
    """
    if not is_spread(call):
        return call
    return call._replace(shares=None, plans=call.plans.rows_first())


def input_axes(call: Call) -> list[Axes]:
    """Trailing axes of a call's inputs, which tell features of keys from those of values."""
    return [_named(AXES[name], "value" if name == "value" else "key") for name in call.operands]


def output_axes(call: Call) -> list[Axes]:
    """Trailing axes of what a call returns."""
    return [_named(QUERY, "value"), *([STATS] if call.residual else [])]


def stats_axes() -> list[Axes]:
    """Trailing axes of the output, the row maxima and the sums of exponentials."""
    return [_named(QUERY, "value"), STATS, STATS]


def moving_axes(call: Call, names: Sequence[str]) -> list[Axes]:
    """Trailing axes of the tangents, or cotangents, of these inputs."""
    return [
        axes for name, axes in zip(call.operands, input_axes(call), strict=True) if name in names
    ]


def _named(axes: Axes, kind: str) -> Axes:
    return tuple(f"{kind} {axis}" if axis == "features" else axis for axis in axes)


def in_shares(bind: Bind, call: Call, operands: Sequence[Axes], results: Sequence[Axes]) -> Bind:
    """A primitive's ``bind(*operands, call=...)`` as a program whose operands may be sharded.

    Operands and results have these trailing axes. A result that lacks some of the query's axes is a
    sum over those.
    """
    whole = call._replace(shares=None)

    def run(*arrays: jax.Array) -> list[jax.Array]:
        outs = jax.eval_shape(functools.partial(bind, call=whole), *arrays)
        dims = [*map(_Dims, arrays, operands), *map(_Dims, outs, results)]
        named = _factors(dims)
        given, made = named[: len(arrays)], named[len(arrays) :]
        program = custom_partitioning(functools.partial(_tuple_of, bind, whole))
        rule = ", ".join(map(" ".join, given)) + " -> " + ", ".join(map(" ".join, made))
        program.def_partition(
            functools.partial(_partition, bind, whole, given, made),
            decode_shardings=False,  # JAX knows no parts of a mesh axis
            sharding_rule=rule,
        )
        return list(program(*arrays))

    return run


def _tuple_of(bind: Bind, call: Call, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(bind(*arrays, call=call))


class _Dims:
    """The dims of one array: leading ones by number, trailing ones by the names of their axes."""

    def __init__(self, array: Any, axes: Axes) -> None:
        self.sizes = array.shape
        leading = len(self.sizes) - len(axes)
        self.names = (*(f"leading {number}" for number in range(leading)), *axes)


def _factors(dims: Sequence[_Dims]) -> list[list[str]]:
    """A name for each dim of each array: the same where they are sharded alike.

    A dim of size one that broadcasts has a name of its own.
    """
    sizes: dict[str, int] = {}
    for one in dims:
        for name, size in zip(one.names, one.sizes, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    fresh = map("one{}".format, itertools.count())
    return [
        [
            name.replace(" ", "_") if size == sizes[name] else next(fresh)
            for name, size in zip(one.names, one.sizes, strict=True)
        ]
        for one in dims
    ]


def _partition(
    bind: Bind,
    call: Call,
    given: Sequence[Sequence[str]],
    made: Sequence[Sequence[str]],
    mesh: Mesh,
    operands: Sequence[jax.ShapeDtypeStruct],
    results: Sequence[jax.ShapeDtypeStruct],
) -> tuple[Mesh, Callable[..., Any], Any, Any]:
    """The program of one share, and how its operands and results are sharded."""
    arrays = [*zip(operands, given, strict=True), *zip(results, made, strict=True)]
    if mesh.empty:  # shardings without names, of which nothing can be summed
        devices = sorted(operands[0].sharding.device_set, key=lambda device: device.id)
        mesh = Mesh(np.array(devices), ("devices",))
        over: dict[str, Axes] = {}
    else:
        mesh = _refined(mesh)
        over = _mesh_axes(mesh, arrays)

    def spec(factors: Sequence[str]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(over.get(factor) for factor in factors)))

    @_without_mesh
    def share(*shares: jax.Array) -> tuple[jax.Array, ...]:
        inputs, rest = split(shares, call)
        if rows := over.get("rows"):
            inputs = _from_row(inputs, call, jax.lax.axis_index(rows) * inputs.query.shape[-4])
        own = own_call(inputs, call)._replace(shares=_ONE, kernel=None, training_kernel=None)
        outs = bind(*inputs.present.values(), *rest, call=own)
        return tuple(_summed(out, over, factors) for out, factors in zip(outs, made, strict=True))

    return mesh, share, tuple(map(spec, made)), tuple(map(spec, given))


def own_call(inputs: Inputs, call: Call) -> Call:
    """The call as that of one share, with the plans for it."""
    plans = call.plans.of_share(_workload_fields(inputs, call))
    call = call._replace(operands=tuple(inputs.present), plans=plans)
    return taken(inputs, call, lambda name, mode, _refusal: plans.without(name, mode))


def _workload_fields(inputs: Inputs, call: Call) -> dict[str, Any]:
    """The fields of a share's Workload that may differ from the whole's."""
    logits = inputs.logits
    fields: dict[str, Any] = {
        "batch": logits.batch,
        "query_length": logits.rows,
        "key_length": logits.keys,
        "num_heads": logits.heads * logits.groups,
        "num_kv_heads": logits.heads,
        "causal": call.is_causal,
        "window": "none" if call.window is None else "{}:{}".format(*call.window),
    }
    offset = inputs.query_offset
    if offset is not None and math.prod(offset.shape) == 1:
        fields["query_offset"] = "1"
    return fields


def _refined(mesh: Mesh) -> Mesh:
    """The mesh with each axis split into several of prime sizes.

    A dim that was reshaped to two may have its mesh axis split between these: of four devices for
    eight query heads, two are for two key heads and two for the queries of each.
    """
    primes = [(axis, prime) for axis, size in mesh.shape.items() for prime in _primes(size)]
    names = [f"{axis} {number}" for number, (axis, _) in enumerate(primes)]
    return Mesh(mesh.devices.reshape([prime for _, prime in primes]), names)


def _primes(size: int) -> list[int]:
    for prime in range(2, size + 1):
        if size % prime == 0:
            return [prime, *_primes(size // prime)]
    return []


def _mesh_axes(
    mesh: Mesh, arrays: Sequence[tuple[jax.ShapeDtypeStruct, Sequence[str]]]
) -> dict[str, Axes]:
    """The mesh axes that each factor is sharded over, as in the first array sharded by it."""
    over: dict[str, Axes] = {}
    used: set[str] = set()
    for array, factors in arrays:
        spec = _axes_of_dims(mesh, array)
        for factor, size, axes in zip(factors, array.shape, spec, strict=True):
            shares = math.prod(mesh.shape[axis] for axis in axes)
            stays = factor.replace("_", " ") in _WHOLE or factor.startswith("one")
            # XLA would pad uneven shares with rows that do not exist.
            fits = axes and size % shares == 0 and not stays
            if fits and factor not in over and not used & {*axes}:
                over[factor] = axes
                used |= {*axes}
    return over


def _axes_of_dims(mesh: Mesh, array: jax.ShapeDtypeStruct) -> list[Axes]:
    """The mesh axes that each dim is sharded over, the major one first.

    Found from where shares begin, one step along each mesh axis, in an array that any number of
    shares divides. Empty for all dims, if the array is sharded in another way.
    """
    assert array.sharding is not None
    rank, count = len(array.shape), mesh.size
    begin = array.sharding.devices_indices_map((count,) * rank)
    strides: list[dict[str, int]] = [{} for _ in range(rank)]
    for number, axis in enumerate(mesh.axis_names):
        device = mesh.devices[tuple(int(number == other) for other in range(mesh.devices.ndim))]
        for dim, part in enumerate(begin[device] or ()):
            if part.start:
                strides[dim][axis] = part.start
    axes = [tuple(sorted(found, key=found.__getitem__, reverse=True)) for found in strides]
    same = NamedSharding(mesh, PartitionSpec(*axes)).is_equivalent_to(array.sharding, rank)
    return axes if same else [()] * rank


def _from_row(inputs: Inputs, call: Call, first: jax.Array) -> Inputs:
    """Inputs of a share whose first row is row ``first`` of the whole."""
    changes: dict[str, jax.Array] = {}
    if inputs.query_seq_lengths is not None:
        changes["query_seq_lengths"] = inputs.query_seq_lengths.astype(jnp.int32) - first
    if call.reach != (None, None) or inputs.alibi_slopes is not None:
        offset = inputs.query_offset
        if offset is None:
            offset = jnp.zeros((1,) * (inputs.query.ndim - 4), jnp.int32)
        changes["query_offset"] = offset + first
    return inputs._replace(**changes)


def _summed(out: jax.Array, over: dict[str, Axes], factors: Sequence[str]) -> jax.Array:
    """The sum of a result over the shares along all axes that it does not have."""
    lacking = [axis for factor, axes in over.items() if factor not in factors for axis in axes]
    return jax.lax.psum(out, tuple(lacking)) if lacking else out
