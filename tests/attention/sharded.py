"""Run by ``test_transformations`` in a process with four devices, with a name of ``CASES``.

Prints, as JSON, what went wrong in each case ("" for nothing).
"""

from __future__ import annotations

import functools
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from factories import quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import assert_close, compiled_text, draw, plain
from test_fused import install

from autochunk import ProfileStore, dot_product_attention, ring_attention
from autochunk.attention.ring import ring_order
from autochunk.device import detect
from autochunk.errors import MissWarning

MESH = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
ARRAYS = [draw((4, 6, 2, 4)), draw((4, 5, 2, 4)), draw((4, 5, 2, 3))]
BIAS = draw((2, 6, 5))


def spread(mesh: jax.sharding.Mesh, *axes: str | None) -> list[jax.Array]:
    """The operands, each of its dims over the axis of the mesh that is named for it."""
    return [jax.device_put(array, NamedSharding(mesh, P(*axes))) for array in ARRAYS]


def pulled(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jnp.cos(out))

    return run


def attend(implementation: str = "xla", **settings: Any) -> Callable[..., Any]:
    return functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=1e-4, **settings
    )


@functools.cache
def expected_of_arrays() -> Any:
    """Plain attention's output and gradients of the operands."""
    return jax.device_get(quick_jit(pulled(plain))(*ARRAYS))


def shard_map(check_vma: bool, *specs: Any) -> None:
    """With a bias that all have, whose gradient is a sum over devices; in pieces, of keys, too."""
    for limit in (1e-4, 8e-6):
        function = functools.partial(dot_product_attention, max_chunk_size_mb=limit, is_causal=True)
        mapped = jax.shard_map(
            function, mesh=MESH, in_specs=specs, out_specs=specs[0], check_vma=check_vma
        )
        received = quick_jit(pulled(mapped))(*ARRAYS, BIAS)
        assert_close(jax.device_get(received), expected_with_bias())


@functools.cache
def expected_with_bias() -> Any:
    causal = functools.partial(plain, is_causal=True)
    return jax.device_get(quick_jit(pulled(causal))(*ARRAYS, BIAS))


def vmapped() -> None:
    """``vmap`` whose axis is one of the mesh."""
    wide = [jnp.stack([array, -array]) for array in ARRAYS]
    received = quick_jit(pulled(jax.vmap(attend("xla_rows"), spmd_axis_name="batch")))(
        *(jax.device_put(array, NamedSharding(MESH, P("batch"))) for array in wide)
    )
    expected = quick_jit(pulled(jax.vmap(plain)))(*wide)
    assert_close(jax.device_get(received), jax.device_get(expected))


def sharded(implementation: str) -> None:
    """Operands that are spread over the mesh, and no word about it in the program."""
    arrays = spread(MESH, "batch", None, "heads")
    received = jax.device_get(quick_jit(pulled(attend(implementation)))(*arrays))
    assert_close(received, expected_of_arrays())


def explicit() -> None:
    """Shardings that are part of the types."""
    with jax.set_mesh(EXPLICIT):
        arrays = spread(EXPLICIT, "batch", None, None)
        received = jax.device_get(quick_jit(pulled(attend("xla_rows")))(*arrays))
    assert_close(received, expected_of_arrays())


# Each device's share of arrays of many rows, by forms of call and by what is spread over which axes
# of the mesh: query [batch, rows, heads, features].

ROWS = (4, 64, 4, 8)
LIMIT = 0.004  # MB: a sixteenth of a head's logits
SPECS: dict[str, tuple[Any, ...]] = {
    "batch": (("batch", "heads"), None, None),
    "heads": (None, None, "heads"),
    "rows": (None, "batch", None),
    "batch and rows": ("batch", "heads", None),
    "rows and heads": (None, "batch", "heads"),
    "all rows": (None, ("batch", "heads"), None),
}
LENGTHS = jnp.asarray([64, 30, 1, 0])
SEGMENTS = jnp.arange(64) // jnp.asarray([[64], [10], [40], [7]])
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "mask": ({"mask": draw((4, 1, 64, 64)) > 0}, {}),
    "bias": ({"bias": draw((1, 4, 64, 64))}, {"is_causal": True}),
    "lengths": ({"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS}, {}),
    "window": ({"key_value_seq_lengths": LENGTHS}, {"local_window_size": (9, 3)}),
    "segments": (
        {"query_segment_ids": SEGMENTS, "key_value_segment_ids": SEGMENTS},
        {"is_causal": True},
    ),
    "offset": (
        {"query_offset": jnp.asarray([0, 5, -3, 40])},
        {"is_causal": True, "local_window_size": 30},
    ),
    "slopes": ({"alibi_slopes": jnp.asarray([0.5, 0.2, 0.1, 0.05])}, {"is_causal": True}),
    "dropout": ({}, {"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)}),
}
SHARES = [
    (form, spec)
    for number, form in enumerate(FORMS)
    for spec in (list(SPECS)[number % 6], list(SPECS)[(number + 3) % 6])
]
DIFFERENTIABLE = ("bias", "alibi_slopes")


def own_spec(name: str, batch: Any, rows: Any, heads: Any) -> P:
    """How an array follows a query that is spread like this."""
    return {
        "query": P(batch, rows, heads),
        "key": P(batch, None, heads),
        "value": P(batch, None, heads),
        "bias": P(None, heads, rows),
        "mask": P(batch, None, rows),
        "query_segment_ids": P(batch, rows),
        "alibi_slopes": P(heads),
    }.get(name, P(batch))


def trains(
    form: str, function: Callable[..., Any] = dot_product_attention, **settings: Any
) -> Callable[[dict[str, jax.Array], jax.Array], Any]:
    """The output and gradients of a form of call."""
    fixed = {"implementation": "xla", "max_chunk_size_mb": LIMIT, **FORMS[form][1], **settings}

    def training(arrays: dict[str, jax.Array], cotangent: jax.Array) -> Any:
        moving = {name: arrays[name] for name in moving_of(form)}
        out, pull = jax.vjp(lambda moved: function(**(arrays | moved), **fixed), moving)
        return out, pull(cotangent)[0]

    return training


def moving_of(form: str) -> list[str]:
    """The names of what is differentiated."""
    return ["query", "key", "value", *(name for name in DIFFERENTIABLE if name in FORMS[form][0])]


def arrays_of(form: str) -> dict[str, Any]:
    return {"query": draw(ROWS), "key": draw(ROWS), "value": draw(ROWS), **FORMS[form][0]}


@functools.cache
def expected_of_form(form: str) -> Any:
    """What one device computes, whole, which is compiled faster than slices."""
    whole = jax.device_put((arrays_of(form), draw(ROWS)), jax.devices()[0])
    return jax.device_get(quick_jit(trains(form, max_chunk_size_mb=None))(*whole))


def share(form: str, spec: str) -> None:
    """Each device computes its own part, and what is communicated are sums of cotangents.

    They are for keys and values if rows are spread, or for what broadcasts over what is spread.
    """
    arrays, moving = arrays_of(form), moving_of(form)
    function = functools.partial(
        dot_product_attention, max_chunk_size_mb=LIMIT, implementation="xla", **FORMS[form][1]
    )
    axes = SPECS[spec]
    spread_as = {name: NamedSharding(MESH, own_spec(name, *axes)) for name in arrays}
    there = {name: jax.device_put(array, spread_as[name]) for name, array in arrays.items()}
    cotangent = jax.device_put(draw(ROWS), spread_as["query"])
    outs = spread_as["query"], {name: spread_as[name] for name in moving}
    forward = quick_jit(lambda arrays: function(**arrays), out_shardings=outs[0])
    run = forward.lower(there).compile()
    train = quick_jit(trains(form), out_shardings=outs).lower(there, cotangent).compile()
    assert communication(run) == []
    shared = [axes[1] is not None, *(axes[0] is not None for name in moving[3:])]
    allowed = ["all-reduce"] * any(shared)
    assert sorted(set(communication(train))) == allowed
    expected = expected_of_form(form)
    assert_close(jax.device_get(run(there)), expected[0])
    assert_close(jax.device_get(train(there, cotangent)), expected)


def communication(program: jax.stages.Compiled) -> list[str]:
    """What is communicated by a program; within its loops nothing may be."""
    text = program.as_text()
    assert text is not None
    found = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    entry = text[text.index("\nENTRY ") :]
    assert re.findall(found, text) == re.findall(found, entry)
    return re.findall(found, entry)


def uneven() -> None:
    """Rows that no mesh axis divides are whole on each device."""
    arrays = [draw((1, 7, 2, 4)), draw((1, 5, 2, 4)), draw((1, 5, 2, 4))]

    def run(query: jax.Array, *others: jax.Array) -> Any:
        query = jax.lax.with_sharding_constraint(query + 0, NamedSharding(MESH, P(None, "batch")))
        return attend(is_causal=True)(query, *others)

    there = jax.device_put(arrays, NamedSharding(MESH, P()))
    assert_close(
        jax.device_get(quick_jit(pulled(run))(*there)),
        jax.device_get(quick_jit(pulled(functools.partial(plain, is_causal=True)))(*arrays)),
    )


def split_axis(kind: AxisType, kv_heads: int, flat: bool) -> None:
    """Dims that share a mesh axis, as few key heads and the queries of each, or batch and rows."""
    mesh = jax.make_mesh((4,), ("all",), axis_types=(kind,))
    query, key = draw((2, 8, 8, 4)), draw((2, 8, kv_heads, 4))
    spec, whole = NamedSharding(mesh, P(None, None, "all")), NamedSharding(mesh, P())

    def run(query: jax.Array, key: jax.Array) -> Any:
        out = attend(is_causal=True)(query.reshape(2, 8, 8, 4), key, key)
        return out.reshape(query.shape)

    with jax.set_mesh(mesh):
        if flat:  # tokens
            query, spec = query.reshape(16, 8, 4), NamedSharding(mesh, P("all"))
        there = jax.device_put(query, spec), jax.device_put(key, whole)
        assert communication(quick_jit(run).lower(*there).compile()) == []
        received = jax.device_get(quick_jit(pulled(run))(*there))
    alone = jax.device_put((query, key), jax.devices()[0])
    assert_close(received, jax.device_get(quick_jit(pulled(run))(*alone)))


def exported() -> None:
    """What is exported holds nothing of this process, for one device and for several."""
    whole = [jnp.asarray(array) for array in ARRAYS]
    expected = quick_jit(functools.partial(plain, is_causal=True))(*whole)
    for arrays in (whole, spread(MESH, "batch", None, "heads")):
        made = jax.export.export(jax.jit(attend(is_causal=True)))(*arrays)
        assert "CustomSPMDPartitioning" not in made.mlir_module()
        assert made.nr_devices == len(arrays[0].devices())
        assert_close(jax.device_get(quick_jit(made.call)(*arrays)), jax.device_get(expected))


def without_devices() -> None:
    """Programs are lowered, and exported, for a mesh that has no devices."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.sharding.AbstractMesh((2,), ("batch",), (kind,))
        spread = NamedSharding(mesh, P("batch"))
        shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=spread) for one in ARRAYS]
        for function in (attend(is_causal=True), pulled(attend(is_causal=True))):
            made = jax.export.export(jax.jit(function), platforms=("cpu",))(*shapes)
            assert made.nr_devices == 2


def per_device() -> None:
    """A limit, and "auto", are of a device's share: what is missed is the share's workload."""
    arrays = [jax.device_put(draw(ROWS), NamedSharding(MESH, P("batch", "heads"))) for _ in "qkv"]
    arrays[1:] = [jax.device_put(one, NamedSharding(MESH, P("batch"))) for one in arrays[1:]]
    function = quick_jit(functools.partial(dot_product_attention, is_causal=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arrays)
    (said,) = [str(one.message) for one in caught if one.category is MissWarning]
    assert "b=2,t=32,s=64,h=4" in said, said
    (missed,) = ProfileStore().missed(detect())
    assert missed.shape in said


def ring(form: str, balanced: bool, check_vma: bool, axis: Any = ("batch", "heads")) -> None:
    """Attention around a ring is that of the whole sequence, with its tangents and gradients."""
    earlier: Any = {}, {"is_causal": True, "query_offset": -20}
    terms, settings = earlier if form == "earlier" else FORMS[form]
    devices = 2 if axis == "batch" else 4
    order = ring_order(64, devices) if balanced else jnp.arange(64)
    arrays = {"query": draw(ROWS), "key": draw((4, 64, 2, 8)), "value": draw((4, 64, 2, 8))}
    arrays |= terms
    along: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("query", "key", "value"), (1,)),
        **dict.fromkeys(("query_segment_ids", "key_value_segment_ids"), (1,)),
        **dict.fromkeys(("bias", "mask"), (2, 3)),
    }

    def ordered(name: str, array: Any) -> jax.Array:
        for dim in along.get(name, ()):
            array = jnp.take(array, order, axis=dim)
        return jnp.asarray(array)

    def spec(name: str) -> P:
        return P(*(None,) * along[name][0], axis) if name in along else P()

    def attend(function: Any, arrays: dict[str, jax.Array], **more: Any) -> Any:
        return function(**arrays, **settings, **more, return_residual=True)

    go_round = functools.partial(
        attend,
        functools.partial(ring_attention, axis_name=axis, balanced=balanced),
        max_chunk_size_mb=LIMIT,
    )
    mapped = jax.shard_map(
        go_round,
        mesh=MESH,
        in_specs=({name: spec(name) for name in arrays},),
        out_specs=(spec("query"), spec("query")),
        check_vma=check_vma,
    )
    whole = functools.partial(attend, dot_product_attention, max_chunk_size_mb=None)
    moving = ["query", "key", "value", *(name for name in DIFFERENTIABLE if name in terms)]

    def run(function: Any, arrays: dict[str, jax.Array], weights: jax.Array) -> Any:
        def loss(moved: dict[str, jax.Array]) -> Any:
            out, lse = function(arrays | moved)
            # of a row without a key it is a large number, whatever its dtype's
            seen = jnp.where(lse > -1e30, lse, 0)
            return jnp.sum(out * weights) + jnp.sum(seen * weights[..., 0]), (out, seen)

        moved = {name: arrays[name] for name in moving}
        found = jax.value_and_grad(loss, has_aux=True)(moved)
        _, pushed, _ = jax.jvp(loss, (moved,), (jax.tree.map(jnp.cos, moved),), has_aux=True)
        return found, pushed

    weights = draw(ROWS)
    there = {name: ordered(name, array) for name, array in arrays.items()}
    received = quick_jit(functools.partial(run, mapped))(there, ordered("query", weights))
    expected = quick_jit(functools.partial(run, whole))(arrays, weights)
    ((loss, (out, lse)), gradients), pushed = jax.device_get(expected)
    outs = ordered("query", jnp.asarray(out)), ordered("query", jnp.asarray(lse))
    moved = {name: ordered(name, jnp.asarray(one)) for name, one in gradients.items()}
    assert_close(jax.device_get(received), jax.device_get((((loss, outs), moved), pushed)))


def ring_transformed(transform: Callable[..., Any], by_vmap: bool = False) -> None:
    """A ring has the derivatives that the op has, also one whose devices are a vmapped axis."""
    arrays = [draw((2, 8, 2, 4)) for _ in "qkv"]
    settings: dict[str, Any] = {"is_causal": True, "max_chunk_size_mb": None}
    attend = functools.partial(ring_attention, axis_name="batch", **settings)
    spec = P(None, "batch")
    mapped: Any = jax.shard_map(attend, mesh=MESH, in_specs=(spec,) * 3, out_specs=spec)

    def around(*arrays: jax.Array) -> Any:
        if not by_vmap:
            return mapped(*arrays)
        shares = (array.reshape(2, 2, 4, 2, 4) for array in arrays)
        share: Any = attend
        out = jax.vmap(share, 1, 1, axis_name="batch")(*shares)
        return out.reshape(arrays[0].shape)

    whole = functools.partial(dot_product_attention, **settings)
    both = quick_jit(lambda *arrays: [transform(one)(*arrays) for one in (around, whole)])
    received, expected = jax.device_get(both(*arrays))
    assert_close(received, expected, 1e-4)


def curvature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tangents of gradients, and gradients of tangents, of a batch."""

    def run(*arrays: Any) -> Any:
        many = tuple(jnp.stack([one, -one]) for one in arrays)

        def loss(*arrays: Any) -> jax.Array:
            return jnp.sum(jnp.sin(jax.vmap(jax.checkpoint(function))(*arrays)))

        every = (0, 1, 2)
        forward_of_reverse = jax.jvp(jax.grad(loss, every), many, many)
        pushed = jax.grad(lambda *arrays: jax.jvp(loss, arrays, many)[1], every)(*many)
        return forward_of_reverse, pushed

    return run


def by_a_kernel(around: bool, check_vma: bool, name: str = "tokamax_triton") -> None:
    """A fused kernel computes each device's part, whatever its authors know of such meshes."""
    query, key = draw((4, 64, 2, 8)), draw((4, 64, 2, 8), 1)
    function: Any = dot_product_attention
    spec = P("batch")
    if around:
        function, spec = functools.partial(ring_attention, axis_name="batch"), P(None, "batch")
    with pytest.MonkeyPatch.context() as patch:
        recorded = install(patch, name)
        settings = {"is_causal": True, "max_chunk_size_mb": None}
        run = pulled(functools.partial(function, implementation=name, **settings))
        mapped = jax.shard_map(
            run, mesh=MESH, in_specs=spec, out_specs=(spec, (spec,) * 3), check_vma=check_vma
        )
        received = quick_jit(mapped)(query, key, key)
        assert recorded.traced
    expected = quick_jit(pulled(functools.partial(plain, is_causal=True)))(query, key, key)
    assert_close(jax.device_get(received), jax.device_get(expected))


def ring_holds_no_keys() -> None:
    """No array of a device is as long as all keys, forward or backward."""

    def train(*arrays: jax.Array) -> Any:
        attend = functools.partial(
            ring_attention, axis_name="batch", is_causal=True, max_chunk_size_mb=LIMIT
        )
        return pulled(attend)(*arrays)

    spec = P(None, "batch")
    mapped = jax.shard_map(train, mesh=MESH, in_specs=(spec,) * 3, out_specs=(spec, (spec,) * 3))
    text = compiled_text(quick_jit(mapped), *(draw((1, 106, 2, 8)) for _ in "qkv"))
    assert "53" in text
    assert not re.search(r"\[(\d+,)*106[],]", text)


CASES: dict[str, dict[str, Callable[[], None]]] = {
    "meshes": {
        "shard_map, vma checked": lambda: shard_map(True, *(P("batch"),) * 3, P()),
        "shard_map, vma not checked": lambda: shard_map(False, *(P("batch"),) * 3, P()),
        "shard_map over heads": lambda: shard_map(
            True, *(P("batch", None, "heads"),) * 3, P("heads")
        ),
        "vmap with spmd_axis_name": vmapped,
        "sharded jit, rows": lambda: sharded("xla_rows"),
        "sharded jit": lambda: sharded("xla"),
        "explicit shardings": explicit,
        "uneven rows": uneven,
        "few key heads": lambda: split_axis(AxisType.Auto, 2, False),
        "few key heads, explicit": lambda: split_axis(AxisType.Explicit, 2, False),
        "tokens of few sequences": lambda: split_axis(AxisType.Auto, 8, True),
        "exported programs": exported,
        "a mesh without devices": without_devices,
        "each device has its own plan": per_device,
        "a kernel in a shard_map": lambda: by_a_kernel(False, False),
        "a kernel in a shard_map, vma checked": lambda: by_a_kernel(False, True),
        "a kernel round the ring": lambda: by_a_kernel(True, False),
        "a kernel round the ring, vma checked": lambda: by_a_kernel(True, True, "cudnn"),
    },
    "shares": {f"{form}, {spec}": functools.partial(share, form, spec) for form, spec in SHARES},
    "rings": {
        **{
            form: functools.partial(ring, form, number % 2 == 0, number % 3 == 0)
            for number, form in enumerate(FORMS)
        },
        "all queries earlier": lambda: ring("earlier", True, True),
        "over one axis": lambda: ring("causal", True, True, "batch"),
        "holds no keys": ring_holds_no_keys,
        "second derivatives": lambda: ring_transformed(curvature),
        "over a vmapped axis": lambda: ring_transformed(pulled, by_vmap=True),
    },
}


def problem(case: Callable[[], None]) -> str:
    try:
        case()
    except Exception:  # told to the parent
        return traceback.format_exc()[-3000:]
    return ""


if __name__ == "__main__":
    print(json.dumps({name: problem(case) for name, case in CASES[sys.argv[1]].items()}))
