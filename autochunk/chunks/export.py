"""A function as a program for another process, the sizes of its chunks symbolic."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from autochunk.chunks.call import Call
from autochunk.chunks.memory import rounding
from autochunk.chunks.reductions import Arrays
from autochunk.resolution.reporting import muted


def exported(call: Call) -> tuple[dict[str, Any], bytes]:
    """What a call's program takes, and the program.

    Its arguments are first what the function has from around it, then the call's arrays; no value
    of any of them is in it.

    Raises:
      Exception: whatever JAX raises of a function that cannot be exported: host callbacks, shapes
        that depend on a number, operations that have no form for sizes that are symbolic.
    """
    if isinstance(call.settings.reduce, tuple):
        raise ValueError("a pair (first, merge) has a function of its own, which is not exported")
    names = ", ".join(f"c{number}" for number in range(len(call.lengths)))
    sizes = jax.export.symbolic_shape(
        names, constraints=[f"{one} >= 1" for one in names.split(", ")]
    )
    chunk = call.shapes(sizes)
    with muted():
        traced = call.trace_alone(call.flat, sizes)
    constants = [jnp.asarray(one) for one in traced.consts]
    around = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in constants]

    def function(around: Arrays, arrays: Arrays) -> Arrays:
        found: Arrays = jax.core.eval_jaxpr(traced.jaxpr, around, *arrays)
        return found

    header = {
        "lengths": list(call.lengths),
        "around": [description(one) for one in constants],
        "arrays": [description(one) for one in call.arrays],
        "inputs": call.inputs,
        "outputs": call.outputs,
        "reduce": call.settings.reduce,
        "rounding": rounding(call.traced.jaxpr),
    }
    moving = [one for one in (*around, *chunk) if jnp.issubdtype(one.dtype, jnp.inexact)]

    def serialized() -> bytes:
        program = jax.export.export(jax.jit(function))(around, chunk)
        return bytes(program.serialize(vjp_order=1 if moving else 0))

    # Another thread has none of the meshes that are in force around a call that is traced, for
    # which the program would be made.
    with ThreadPoolExecutor(1) as thread:
        return header, thread.submit(_with_wide(serialized)).result()


def _with_wide(function: Callable[[], bytes]) -> Callable[[], bytes]:
    """The function with 64-bit types where they are in force here, for another thread."""
    wide = bool(jax.config.read("jax_enable_x64"))

    def run() -> bytes:
        with jax.enable_x64(wide), muted():
            return function()

    return run


def description(array: Any) -> dict[str, Any]:
    """Shape and dtype of an array as JSON data; of keys of random numbers their algorithm."""
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
