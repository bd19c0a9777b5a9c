"""Run by ``test_transformations`` in a process with eight devices, with a name of ``CASES``.

A ``shard_map`` over one axis of a mesh, inside which XLA partitions programs over the others; and
derivatives of derivatives. Prints, as JSON, what went wrong in each case ("" for nothing).
"""

from __future__ import annotations

import functools
import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from factories import quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import assert_close, draw
from sharded import (
    FORMS,
    LIMIT,
    ROWS,
    arrays_of,
    communication,
    expected_of_form,
    moving_of,
    own_spec,
    problem,
    trains,
)
from test_fused import install

from autochunk import ProfileStore, dot_product_attention, ring_attention
from autochunk.device import detect
from autochunk.errors import MissWarning

NAMES = ("outer", "left", "right")
MESHES = {
    kind: jax.make_mesh((2, 2, 2), NAMES, axis_types=(kind,) * 3)
    for kind in (AxisType.Auto, AxisType.Explicit)
}
CUBE = MESHES[AxisType.Auto]
# What XLA spreads over the axes that a shard_map over "outer" leaves: batch, rows, heads.
FREE: dict[str, tuple[Any, Any, Any]] = {
    "batch": (("left", "right"), None, None),
    "heads": (None, None, "left"),
    "rows": (None, "right", None),
    "batch and rows": ("left", "right", None),
    "rows and heads": (None, "right", "left"),
    "all rows": (None, ("right", "left"), None),
}
MIXED = [(form, list(FREE)[(number + number // 6) % 6]) for number, form in enumerate(FORMS)]


def within_outer(
    function: Callable[..., Any], form: str, names: list[str], check_vma: bool = True
) -> Callable[..., Any]:
    """A function of named arrays and a cotangent inside a ``shard_map`` that has half the heads.

    It gives an output like the query, and one like each array of these names.
    """
    specs = {name: own_spec(name, None, None, "outer") for name in arrays_of(form)}
    outs = specs["query"], {name: specs[name] for name in names}
    return jax.shard_map(
        function,
        in_specs=(specs, specs["query"]),
        out_specs=outs,
        axis_names={"outer"},
        check_vma=check_vma,
    )


def placed(form: str, spec: str, mesh: jax.sharding.Mesh) -> tuple[Any, jax.Array, Any]:
    """The arrays of a form and a cotangent, spread, and how each is."""
    batch, rows, heads = FREE[spec]
    own = "outer" if heads is None else ("outer", heads)
    arrays = arrays_of(form)
    spread = {name: NamedSharding(mesh, own_spec(name, batch, rows, own)) for name in arrays}
    there = {name: jax.device_put(array, spread[name]) for name, array in arrays.items()}
    return there, jax.device_put(draw(ROWS), spread["query"]), spread


def shares_inside(form: str, spec: str, kind: AxisType = AxisType.Auto, vma: bool = True) -> None:
    """Each device computes its own part; only sums of cotangents are communicated."""
    mesh, moving = MESHES[kind], moving_of(form)
    with jax.set_mesh(mesh):
        there, cotangent, spread = placed(form, spec, mesh)
        outs = spread["query"], {name: spread[name] for name in moving}
        train = within_outer(trains(form), form, moving, vma)
        forward = within_outer(lambda given, _: (attends(given, form), {}), form, [], vma)
        run = quick_jit(forward, out_shardings=(outs[0], {})).lower(there, cotangent).compile()
        both = quick_jit(train, out_shardings=outs).lower(there, cotangent).compile()
        batch, rows, _ = FREE[spec]
        shared = [rows is not None, *(batch is not None for _ in moving[3:])]
        given = there, cotangent
        by_jax = set() if kind is AxisType.Auto else at_the_border(form, moving, given, outs)
        assert set(communication(run)) <= by_jax
        assert {*communication(both)} - by_jax == {*["all-reduce"] * any(shared)}
        received = jax.device_get((run(there, cotangent)[0], both(there, cotangent)))
    expected = expected_of_form(form)
    assert_close(received, (expected[0], expected))


def at_the_border(form: str, moving: list[str], given: Any, outs: Any) -> set[str]:
    """What JAX communicates where arrays go into a ``shard_map`` and out of it.

    jax 0.10.2 gathers what is spread over Explicit axes.
    """
    passing = within_outer(
        lambda arrays, cotangent: (cotangent, {name: arrays[name] for name in moving}), form, moving
    )
    program = quick_jit(passing, out_shardings=outs).lower(*given).compile()
    return {*communication(program)}


def attends(arrays: dict[str, Any], form: str = "plain") -> jax.Array:
    """A form's output alone."""
    settings = {"implementation": "xla", "max_chunk_size_mb": LIMIT, **FORMS[form][1]}
    out: jax.Array = dot_product_attention(**arrays, **settings)
    return out


def per_device() -> None:
    """A limit, and "auto", are of a device's share: what is missed is the share's workload."""
    with jax.set_mesh(CUBE), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there, _, _ = placed("plain", "batch and rows", CUBE)
        spec = P(None, None, "outer")
        function = functools.partial(dot_product_attention, is_causal=True)
        mapped = jax.shard_map(function, in_specs=(spec,) * 3, out_specs=spec, axis_names={"outer"})
        quick_jit(mapped)(*there.values())
    (said,) = [str(one.message) for one in caught if one.category is MissWarning]
    assert "b=2,t=32,s=64,h=2" in said, said
    (missed,) = ProfileStore().missed(detect())
    assert missed.shape in said


def small_axes() -> None:
    """Mesh axes of one device are neither spread over nor in the way."""
    for shape, spec in (((1, 4, 1), "rows and heads"), ((4, 1, 1), "batch")):
        mesh = jax.make_mesh(shape, NAMES, axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            there, _, spread = placed("plain", spec, mesh)
            function = within_outer(lambda given, _: (attends(given), {}), "plain", [])
            outs: Any = spread["query"], {}
            run = quick_jit(function, out_shardings=outs).lower(there, there["query"]).compile()
            assert communication(run) == []
            received, _ = jax.device_get(run(there, there["query"]))
        assert_close(received, expected_of_form("plain")[0])


def round_a_ring(form: str, spec: str) -> None:
    """Keys go round one axis, and nothing else is communicated but sums over the others."""
    batch, rows, heads = FREE[spec]
    arrays, moving = arrays_of(form), moving_of(form)
    along = P(None, "outer")
    specs = {name: along if name in ("query", "key", "value") else P() for name in arrays}
    mapped = jax.shard_map(
        trains(form, functools.partial(ring_attention, axis_name="outer")),
        in_specs=(specs, along),
        out_specs=(along, {name: specs[name] for name in moving}),
        axis_names={"outer"},
    )
    with jax.set_mesh(CUBE):
        length = "outer" if rows is None else ("outer", rows)
        spread = {
            name: NamedSharding(CUBE, own_spec(name, batch, length, heads)) for name in arrays
        }
        for name in ("key", "value"):
            spread[name] = NamedSharding(CUBE, P(batch, "outer", heads))
        there = {name: jax.device_put(array, spread[name]) for name, array in arrays.items()}
        cotangent = jax.device_put(draw(ROWS), spread["query"])
        outs = spread["query"], {name: spread[name] for name in moving}
        run = quick_jit(mapped, out_shardings=outs).lower(there, cotangent).compile()
        text = str(run.as_text())
        gathers = re.findall(r"(all-gather|all-to-all|reduce-scatter)(?:-start)?\(", text)
        assert gathers == []
        assert rows is not None or "all-reduce(" not in text
        received = jax.device_get(run(there, cotangent))
    assert_close(received, expected_of_form(form))


# Derivatives of derivatives, of what is spread by annotations.


def twice(order: str, form: str) -> Callable[[dict[str, jax.Array], jax.Array], Any]:
    """Second derivatives by forward and reverse mode, in an order such as "forward of reverse"."""

    def run(arrays: dict[str, jax.Array], cotangent: jax.Array) -> Any:
        moving = {name: arrays[name] for name in moving_of(form)}
        along = jax.tree.map(jnp.sin, moving)

        def loss(moved: dict[str, jax.Array]) -> jax.Array:
            return jnp.sum(jnp.sin(attends(arrays | moved, form)) * cotangent)

        def slope(moved: dict[str, jax.Array]) -> jax.Array:
            _, change = jax.jvp(loss, (moved,), (along,))
            return jnp.asarray(change)

        def product(moved: dict[str, jax.Array]) -> jax.Array:
            pairs = zip(jax.tree.leaves(jax.grad(loss)(moved)), jax.tree.leaves(along), strict=True)
            return jnp.sum(jnp.stack([jnp.sum(one * two) for one, two in pairs]))

        if order == "forward of reverse":
            return jax.jvp(jax.grad(loss), (moving,), (along,))[1]
        if order == "reverse of forward":
            return jax.grad(slope)(moving)
        if order == "third":
            return jax.jvp(jax.grad(product), (moving,), (along,))[1]
        assert order == "reverse of reverse"
        return jax.grad(product)(moving)

    return run


SECOND = [
    ("plain", "rows", "forward of reverse"),
    ("causal", "all rows", "reverse of forward"),
    ("bias", "batch and rows", "reverse of reverse"),
    ("lengths", "rows and heads", "forward of reverse"),
    ("plain", "all rows", "third"),
]


def again(form: str, spec: str, order: str, inside: bool = False) -> None:
    """Derivatives of derivatives are of each device's part, too; only sums are communicated."""
    names = moving_of(form)
    run: Any = twice(order, form)
    if inside:
        run = within_outer(lambda *arrays: (arrays[1], twice(order, form)(*arrays)), form, names)
    with jax.set_mesh(CUBE):
        there, cotangent, spread = placed(form, spec, CUBE)
        outs: Any = {name: spread[name] for name in names}
        outs = (spread["query"], outs) if inside else outs
        program = quick_jit(run, out_shardings=outs).lower(there, cotangent).compile()
        found = communication(program)
        received = jax.device_get(program(there, cotangent))
    # a loss, or a slope, is a sum over all
    assert set(found) <= {"all-reduce"}, found
    whole = jax.device_put((arrays_of(form), draw(ROWS)), jax.devices()[0])
    expected = jax.device_get(quick_jit(twice(order, form))(*whole))
    assert_close(received[1] if inside else received, expected, 1e-4)


def hessian() -> None:
    """All second derivatives of a small call, by ``jax.hessian``, with rows spread."""
    query, key = draw((1, 8, 1, 2)), draw((1, 4, 1, 2), 1)

    def loss(query: jax.Array, key: jax.Array) -> jax.Array:
        attend = functools.partial(dot_product_attention, max_chunk_size_mb=1e-4)
        return jnp.sum(jnp.sin(attend(query, key, key)))

    function = jax.hessian(loss, (0, 1))
    spread = NamedSharding(CUBE, P(None, "left"))
    there = jax.device_put(query, spread), jax.device_put(key, NamedSharding(CUBE, P()))
    alone = jax.device_put((query, key), jax.devices()[0])
    received = jax.device_get(quick_jit(function)(*there))
    assert_close(received, jax.device_get(quick_jit(function)(*alone)), 1e-4)


# Fused kernels


def by_a_kernel(name: str, form: str, spec: str, inside: bool) -> None:
    """A fused kernel computes each device's part of causal calls with rows spread, whatever else.

    Where the first row is another one on each device, positions are told by a mask.
    """
    moving = moving_of(form)
    settings: dict[str, Any] = {"max_chunk_size_mb": None, "is_causal": True}
    function = trains(form, **settings, implementation=name)
    if inside:
        function = within_outer(function, form, moving, check_vma=False)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(CUBE):
        recorded = install(patch, name)
        there, cotangent, spread = placed(form, spec, CUBE)
        outs = spread["query"], {name: spread[name] for name in moving}
        lowered = quick_jit(function, out_shardings=outs).lower(there, cotangent)
        before = recorded.traced
        program = lowered.compile()
        assert recorded.traced > before + 2
        received = jax.device_get(program(there, cotangent))
        assert " while(" not in str(program.as_text())
    alone = jax.device_put((arrays_of(form), draw(ROWS)), jax.devices()[0])
    assert_close(received, jax.device_get(quick_jit(trains(form, **settings))(*alone)))


KERNEL = [("causal", "rows"), ("mask", "all rows"), ("lengths", "rows and heads")]
KERNEL += [("segments", "batch and rows"), ("bias", "rows")]


CASES: dict[str, dict[str, Callable[[], None]]] = {
    "mixed": {
        **{
            f"{form}, {spec}": functools.partial(shares_inside, form, spec, vma=number % 3 != 0)
            for number, (form, spec) in enumerate(MIXED)
        },
        **{
            f"explicit, {form}, {spec}": functools.partial(
                shares_inside, form, spec, AxisType.Explicit
            )
            for form, spec in (("plain", "rows and heads"), ("bias", "all rows"))
        },
        "each device has its own plan": per_device,
        "axes of one device": small_axes,
        "round a ring, batch": lambda: round_a_ring("causal", "batch"),
        "round a ring, rows": lambda: round_a_ring("lengths", "rows"),
    },
    "second": {
        **{
            f"{order}, {form}, {spec}": functools.partial(again, form, spec, order)
            for form, spec, order in SECOND
        },
        "inside": lambda: again("causal", "all rows", "forward of reverse", inside=True),
        "hessian": hessian,
    },
    "kernels": {
        f"{form}, {spec}": functools.partial(by_a_kernel, name, form, spec, number == 1)
        for number, ((form, spec), name) in enumerate(
            zip(KERNEL, 3 * ("cudnn", "tokamax_triton"), strict=False)
        )
    },
}


if __name__ == "__main__":
    print(json.dumps({name: problem(case) for name, case in CASES[sys.argv[1]].items()}))
