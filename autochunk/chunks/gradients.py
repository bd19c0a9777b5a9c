"""A call in training: its results and the gradients of its arrays, and whether it has any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention.kernels.grid import vary_alike
from autochunk.chunks.call import Call
from autochunk.chunks.reductions import Arrays
from autochunk.resolution.reporting import muted


def trained(call: Call) -> Callable[[Arrays], Any]:
    """A function from a chunk's arrays to its results and the gradients of its inexact arrays."""
    moving = [n for n, array in enumerate(call.arrays) if _is_inexact(array)]

    def run(part: Arrays) -> Any:
        def of_moving(*values: jax.Array) -> Arrays:
            given = dict(zip(moving, values, strict=True))
            results = call.flat([given.get(n, array) for n, array in enumerate(part)])
            return [one for one in results if _is_inexact(one)]

        results, backward = jax.vjp(of_moving, *(part[n] for n in moving))
        ones = [vary_alike([jnp.ones_like(one)], [one])[0] for one in results]
        return results, backward(ones)

    return run


NO_GRADIENTS = (TypeError, ValueError, NotImplementedError)
"""What JAX raises for a function without gradients: a while loop, a call back to the host."""


def has_gradients(call: Call) -> bool:
    """Whether JAX can differentiate the function with respect to any of its arrays."""
    if not any(map(_is_inexact, call.arrays)):
        return False
    try:
        with muted():
            call.trace(trained(call), call.lengths)
    except NO_GRADIENTS:
        return False
    return True


def _is_inexact(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))
