"""Attention on several devices: each computes its share, in slices of its own.

Leading dims, heads and query rows may be sharded, over any axes of a mesh; keys and features are
gathered. Each device computes attention of its share's shape with the plan for that shape, so a
limit holds for each device. Only cotangents are communicated: they are summed over shares once,
after the slices.

XLA says what is sharded only when it partitions a program, after tracing. JAX's
``custom_partitioning`` asks us then. Inside a ``shard_map`` over some axes of a mesh it does so for
the other axes (``meshes``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autochunk.attention.kernels.fused import taken
from autochunk.attention.kernels.inputs import AXES, QUERY, STATS, Call, Inputs, split
from autochunk.attention.kernels.meshes import Axes, FreeAxes, Places

Bind = Callable[..., list[jax.Array]]

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


def is_exported(context: Any) -> bool:
    """Whether what is lowered here is exported."""
    return bool(context.module_context.lowering_parameters.for_export)


def spread_over(context: Any, call: Call) -> tuple[Call, FreeAxes | None]:
    """The call as it is lowered here, and the mesh axes that a ``shard_map`` around it leaves.

    There are none of these if there is no ``shard_map``.
    """
    free = FreeAxes.around(context)
    if is_exported(context) or (free is not None and free.devices is None):
        return unspread(call), None
    if is_spread(call) and free is not None and free.devices == 1:
        return call._replace(shares=None), None
    return call, free


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


def in_shares(
    bind: Bind,
    call: Call,
    operands: Sequence[Axes],
    results: Sequence[Axes],
    free: FreeAxes | None = None,
) -> Bind:
    """A primitive's ``bind(*operands, call=...)`` as a program whose operands may be sharded.

    Operands and results have these trailing axes. A result that lacks some of the query's axes is a
    sum over those. Inside a ``shard_map`` operands may be sharded over the ``free`` axes.
    """
    whole = call._replace(shares=None)

    def run(*arrays: jax.Array) -> list[jax.Array]:
        outs = jax.eval_shape(functools.partial(bind, call=whole), *arrays)
        dims = [*map(_Dims, arrays, operands), *map(_Dims, outs, results)]
        named = _factors(dims)
        given, made = named[: len(arrays)], named[len(arrays) :]
        chart = [] if free is None else [free.chart()]
        mapped = given if free is None else [*given, free.factors]
        program = custom_partitioning(functools.partial(_tuple_of, bind, whole, len(arrays)))
        rule = ", ".join(map(" ".join, mapped)) + " -> " + ", ".join(map(" ".join, made))
        program.def_partition(
            functools.partial(_partition, bind, whole, given, made, free),
            decode_shardings=False,  # JAX knows no parts of a mesh axis
            sharding_rule=rule,
        )
        return list(program(*arrays, *chart))

    return run


def _tuple_of(bind: Bind, call: Call, count: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(bind(*arrays[:count], call=call))


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
    free: FreeAxes | None,
    mesh: Mesh,
    operands: Sequence[jax.ShapeDtypeStruct],
    results: Sequence[jax.ShapeDtypeStruct],
) -> tuple[Mesh, Callable[..., Any], Any, Any]:
    """The program of one share, and how its operands and results are sharded."""
    count = len(given)
    places = Places.of_all(mesh, operands[0]) if free is None else free.places(operands[count])
    over = places.mesh_axes(
        [*zip(operands[:count], given, strict=True), *zip(results, made, strict=True)]
    )

    def spec(factors: Sequence[str]) -> NamedSharding:
        return NamedSharding(places.group, PartitionSpec(*(over.get(one) for one in factors)))

    @_without_mesh
    def share(*shares: jax.Array) -> tuple[jax.Array, ...]:
        inputs, rest = split(shares[:count], call)
        if rows := over.get("rows"):
            inputs = _from_row(inputs, call, jax.lax.axis_index(rows) * inputs.query.shape[-4])
        own = own_call(inputs, call)._replace(shares=_ONE, kernel=None, training_kernel=None)
        outs = bind(*inputs.present.values(), *rest, call=own)
        return tuple(_summed(out, over, factors) for out, factors in zip(outs, made, strict=True))

    chart = tuple(places.own(one).sharding for one in operands[count:])
    return places.mesh, share, tuple(map(spec, made)), (*map(spec, given), *chart)


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
