"""A function as a program for another process, with symbolic chunk sizes where that works."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from autochunk.chunks.call import Call
from autochunk.chunks.gradients import has_gradients
from autochunk.chunks.ladder import sizes_below
from autochunk.chunks.memory import calls_to_host, products, rounding
from autochunk.chunks.reductions import Arrays
from autochunk.resolution.reporting import muted

_MOST_SIZES = 8  # along an axis, where each needs a program of its own
_MOST_SECONDS = 5.0  # after which no more of them are made: a user's program waits


def exported(call: Call) -> tuple[dict[str, Any], bytes]:
    """The header, which says what a call's program takes, and the program.

    The program takes first the arrays that the function closes over, then the call's arrays; it
    contains no value of any of them. For a function that cannot be differentiated it is the forward
    pass alone. For a function that refuses symbolic sizes there is a program for each size of a
    few plans.

    Raises:
      Exception: whatever JAX raises for a function that cannot be exported.
      ValueError: it calls back to the host, or its results are merged by a function.
    """
    if isinstance(call.settings.reduce, tuple):
        raise ValueError("a pair (first, merge) has a function of its own, which is not exported")
    if back := calls_to_host(call.traced.jaxpr):
        raise ValueError(f"it calls back to the host ({back}), which no other process can")
    header = {
        "lengths": list(call.lengths),
        "arrays": [description(one) for one in call.arrays],
        "inputs": call.inputs,
        "outputs": call.outputs,
        "reduce": call.settings.reduce,
        "rounding": rounding(call.traced.jaxpr),
        "products": sorted(products(call.traced.jaxpr)),
        "gradients": has_gradients(call),
    }
    try:
        around, program = _of_sizes(call, _symbols(len(call.lengths)), header["gradients"])
    except Exception:  # whatever a user's function raises of sizes that are no numbers
        return _of_each_size(call, header)
    return header | {"around": around}, program


def _symbols(count: int) -> Any:
    names = ", ".join(f"c{number}" for number in range(count))
    constraints = [f"{one} >= 1" for one in names.split(", ")]
    return jax.export.symbolic_shape(names, constraints=constraints)


def _of_sizes(
    call: Call, sizes: Sequence[Any], gradients: bool
) -> tuple[list[dict[str, Any]], bytes]:
    """The arrays that the program of a chunk of these sizes closes over, and the program."""
    chunk = call.shapes(sizes)
    with muted():
        traced = call.trace_alone(call.flat, sizes)
    constants = [jnp.asarray(one) for one in traced.consts]
    around = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in constants]

    def function(around: Arrays, arrays: Arrays) -> Arrays:
        found: Arrays = jax.core.eval_jaxpr(traced.jaxpr, around, *arrays)
        return found

    def serialized() -> bytes:
        program = jax.export.export(jax.jit(function))(around, chunk)
        return bytes(program.serialize(vjp_order=1 if gradients else 0))

    # The traced call may be inside meshes, and the program would be made for them. In another
    # thread none of them is in force.
    with ThreadPoolExecutor(1) as thread:
        program = thread.submit(_with_wide(serialized)).result()
    return [description(one) for one in constants], program


# --- Sizes that are not symbolic ------------------------------------------------------------------


def _of_each_size(call: Call, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Programs of all chunk sizes that a few plans need, one after the other, while time allows.

    The header lists the plans, and for each program its sizes and how many bytes it has.
    """
    end = time.monotonic() + _MOST_SECONDS
    around, program = _of_sizes(call, call.lengths, header["gradients"])
    programs, plans = {call.lengths: program}, []
    for plan in _plans(call.lengths):
        missing = set(_chunks_of(plan, call.lengths)) - set(programs)
        if time.monotonic() > end:
            break
        for sizes in sorted(missing):
            own, programs[sizes] = _of_sizes(call, sizes, header["gradients"])
            if own != around:
                raise ValueError("arrays that it has from around it depend on the size of a chunk")
        plans.append(list(plan))
    parts = [[list(sizes), len(one)] for sizes, one in programs.items()]
    return header | {"around": around, "plans": plans, "parts": parts}, b"".join(programs.values())


def _plans(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """A few sizes of chunks, along all axes at once and along each alone, from large to small."""
    ladders = [sizes_below(length, 4)[:_MOST_SIZES] for length in lengths]
    found = set(zip(*ladders, strict=False))
    for number, ladder in enumerate(ladders):
        rest = lengths[number + 1 :]
        found |= {(*lengths[:number], size, *rest) for size in ladder[:: len(lengths)]}
    return sorted(found, key=lambda sizes: (-math.prod(sizes), sizes))


def _chunks_of(plan: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The sizes of all chunks of a plan: the whole ones and the smaller ones at the end."""
    pairs = zip(plan, lengths, strict=True)
    return itertools.product(*({size, length % size} - {0} for size, length in pairs))


def _with_wide(function: Callable[[], bytes]) -> Callable[[], bytes]:
    """The function for another thread, with 64-bit types if they are in force here."""
    wide = bool(jax.config.read("jax_enable_x64"))

    def run() -> bytes:
        with jax.enable_x64(wide), muted():
            return function()

    return run


def description(array: Any) -> dict[str, Any]:
    """Shape and dtype of an array as JSON data; for random keys also their algorithm."""
    found = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        found["keys"] = str(jax.random.key_impl(array))
    return found


def drawn(described: dict[str, Any], seed: int) -> jax.Array:
    """An array as described: random if it is floating, zeros and ones if it is integer."""
    shape, dtype = tuple(described["shape"]), described["dtype"]
    key = jax.random.key(seed)
    if kind := described.get("keys"):
        return jax.random.split(jax.random.key(seed, impl=kind), shape)
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.inexact):
        return jax.random.normal(key, shape, jnp.promote_types(kind, jnp.float32)).astype(kind)
    if jnp.issubdtype(kind, jnp.bool_):
        return jax.random.bernoulli(key, 0.5, shape)
    return jax.random.randint(key, shape, 0, 2).astype(kind)
