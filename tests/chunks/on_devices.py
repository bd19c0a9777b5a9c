"""Run by ``test_on_devices.py`` in a process with four devices: prints what was communicated."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autochunk import ProfileStore, chunked, detect
from autochunk.plan import Plan
from autochunk.store.programs import Programs
from autochunk.tuner.functions.subject import Subject, of_program

Function = Callable[..., Any]

KINDS = ("all-gather", "all-reduce", "collective-permute", "all-to-all")


def leaves_a_program(mesh: jax.sharding.Mesh, fn: Function, arrays: Any) -> None:
    """What is missed here can be measured on one device."""
    missed = chunked(fn, (0, None), name="missed")
    if sys.argv[1] == "shard_map":
        missed = jax.shard_map(missed, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.jit(missed).lower(*arrays)
    store = ProfileStore()
    header, program = Programs(store.path).read(store.missed_functions(detect()).popitem()[0])
    subject = Subject(*of_program(header, program), "training")
    jax.eval_shape(subject.function(Plan("chunks", None, (3,))), *subject.passed)


def in_loops(text: str) -> list[str]:
    """What is communicated in loops of a compiled program, and in what these call."""
    found = re.findall(r"^(?:ENTRY )?(%[\w.-]+) .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    inside, waiting = dict(found), re.findall(r" body=(%[\w.-]+)", text)
    loops = ""
    while waiting:
        body = inside.pop(waiting.pop(), "")
        loops += body
        waiting += [one for one in re.findall(r"%[\w.-]+", body) if one in inside]
    assert loops
    return [kind for kind in KINDS if re.search(rf"{kind}(-start)?\(", loops)]


def reduces(mesh: jax.sharding.Mesh, x: jax.Array, w: jax.Array) -> None:
    """What is reduced over shares, and what is joined of two axes, are as of one device."""
    sharded = jax.device_put(x, NamedSharding(mesh, P("i")))
    shared = jax.device_put(w, NamedSharding(mesh, P()))
    merges = {"mean": jnp.mean, "max": jnp.max}
    for reduce, merge in merges.items():
        fn: Function = lambda x, w, merge=merge: (jnp.sin(x @ w), merge(x @ w, axis=0))  # noqa: E731
        run = chunked(fn, (0, None), (0, None), reduce=reduce, chunk_size=12)
        compare(mesh, run, fn, (sharded, shared), (x, w))
    table: Function = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
    cells = chunked(table, ((0, None), (None, 1)), (0, 1), chunk_size=(8, 3))
    total: Function = lambda x, w: (jnp.tanh(x @ w) @ jnp.ones(w.shape[1]), (x @ w).sum())  # noqa: E731
    both = chunked(total, ((0, None), (None, 1)), ((0, None), None), reduce="sum", chunk_size=5)
    compare(mesh, both, total, (sharded, shared), (x, w))
    half = sharded.astype(jnp.bfloat16), shared.astype(jnp.bfloat16)
    compare(mesh, cells, table, half, (x, w), within=0.1)


def compare(
    mesh: Any, run: Function, fn: Function, arrays: Any, whole: Any, within: float = 1e-4
) -> None:
    """Results and gradients in chunks, and those of whole arrays on one device."""

    def both(fn: Function) -> Function:
        of: Function = jax.tree.leaves
        loss: Function = lambda *args: sum(jnp.sin(one).sum() for one in of(fn(*args)))  # noqa: E731
        return jax.jit(lambda *args: (fn(*args), jax.grad(loss, (0, 1))(*args)))

    expected = jax.tree.leaves(both(fn)(*whole))
    with jax.set_mesh(mesh):
        found = jax.tree.leaves(both(run)(*arrays))
        like = jax.tree.leaves(jax.eval_shape(jax.jit(fn), *arrays))
    assert [one.sharding.spec for one in found[: len(like)]] == [one.sharding.spec for one in like]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=within, atol=within)


def main() -> None:
    """Compares with the whole function on one device."""
    case = CASES["transition"]
    fn = case.fn
    x, w = jnp.concatenate([case.args[0]] * 4), case.args[1]
    # of 28 positions two of each device's seven
    run = chunked(fn, (0, None), chunk_size=2 if sys.argv[1] == "shard_map" else 8)
    whole: Function = lambda x, w: jnp.sin(fn(x, w)).sum()  # noqa: E731
    expected = fn(x, w), jax.grad(whole, (0, 1))(x, w)

    kind = AxisType[sys.argv[1]] if sys.argv[1] != "shard_map" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("i",), axis_types=(kind,))
    arrays = (
        jax.device_put(x, NamedSharding(mesh, P("i"))),
        jax.device_put(w, NamedSharding(mesh, P())),
    )
    inside: Function = run
    if sys.argv[1] == "shard_map":
        inside = jax.shard_map(run, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
        summed: Function = chunked(lambda x: x.sum(0), reduce="sum", chunk_size=2)
        total = jax.shard_map(
            lambda x: jax.lax.psum(summed(x), "i"), mesh=mesh, in_specs=P("i"), out_specs=P()
        )
        np.testing.assert_allclose(jax.jit(total)(arrays[0]), x.sum(0), rtol=1e-5, atol=1e-5)
    loss: Function = lambda x, w: jnp.sin(inside(x, w)).sum()  # noqa: E731
    both: Function = lambda x, w: (inside(x, w), jax.grad(loss, (0, 1))(x, w))  # noqa: E731
    with jax.set_mesh(mesh):
        found = jax.jit(both)(*arrays)
        text = jax.jit(inside).lower(*arrays).compile().as_text() or ""
        trained = jax.jit(both).lower(*arrays).compile().as_text() or ""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    leaves_a_program(mesh, fn, arrays)
    if sys.argv[1] == "Explicit":
        reduces(mesh, x, w)
    print("in loops", in_loops(trained))
    print(found[0].sharding.spec, [k for k in KINDS if re.search(rf"{k}(-start)?\(", text)])


main()
