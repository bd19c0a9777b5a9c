"""What the jaxpr of a program tells about it, such as its memory; nothing is compiled for that.

Every value of a jaxpr counts as an array from where it is computed to where it is last used. XLA
fuses elementwise operations and computes some in place, so the result is an upper bound: two to
three times what activations between matrix products take. What a library's kernel takes for itself
is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Most bytes that are in use at once beside a program's arguments."""
    last = _last_uses(jaxpr)
    live: dict[Any, int] = {}
    now = peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        new = {one: bytes_of(one.aval) for one in equation.outvars}
        # what is computed inside has its results there, too
        within = max(map(peak_bytes, core.jaxprs_in_params(equation.params)), default=0)
        peak = max(peak, now + max(sum(new.values()), within))
        live |= new
        done = [one for one in (*_variables(equation.invars), *new) if last.get(one, -1) <= number]
        now += sum(new.values()) - sum(live.pop(one, 0) for one in done)
    return peak


def rounding(jaxpr: core.Jaxpr) -> float:
    """The relative rounding of the least precise floating-point dtype in a program.

    A function of float32 arguments may well compute in bfloat16.
    """
    values = (one for equation in jaxpr.eqns for one in (*equation.invars, *equation.outvars))
    dtypes: set[Any] = {getattr(one.aval, "dtype", None) for one in values} - {None}
    inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    own = max((float(jnp.finfo(dtype).eps) for dtype in inexact), default=0.0)
    within = (core.jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    return max(own, *(rounding(one) for several in within for one in several), 0.0)


_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}


def products(jaxpr: core.Jaxpr) -> set[str]:
    """The precisions of a program's products of float32 arrays, as ``jnp.matmul`` names them.

    By default a GPU rounds their operands.
    """
    found = set()
    for equation in jaxpr.eqns:
        name = str(equation.primitive)
        operands: list[Any] = [one.aval for one in equation.invars]
        if name in _PRODUCTS and any(one.dtype == jnp.float32 for one in operands):
            found.add(_precision(equation.params.get("precision")))
        for one in core.jaxprs_in_params(equation.params):
            found |= products(one)
    return found


def _precision(given: Any) -> str:
    """The lower one of two operands' precisions; for an algorithm its name."""
    several = given if isinstance(given, tuple) else (given,)
    kinds = [one for one in jax.lax.Precision if one in several]  # from the lowest
    found = [one.name.lower() for one in kinds] or [getattr(one, "name", "") for one in several]
    return found[0] or "default"


def calls_to_host(jaxpr: core.Jaxpr) -> str:
    """The first operation of a program that calls back to the host; empty if there is none."""
    for equation in jaxpr.eqns:
        name = str(equation.primitive)
        if "callback" in name or name == "debug_print":
            return name
        within = map(calls_to_host, core.jaxprs_in_params(equation.params))
        if found := next(filter(None, within), ""):
            return found
    return ""


def _last_uses(jaxpr: core.Jaxpr) -> dict[Any, int]:
    """For each variable the last equation that needs it, by number; results come after all."""
    last: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(_variables(equation.invars), number)
    return last | dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))


def _variables(atoms: Any) -> Iterator[Any]:
    return (one for one in atoms if not isinstance(one, core.Literal))


def bytes_of(aval: Any) -> int:
    """Bytes of an array of a shape and dtype; for a random key an estimate."""
    size = math.prod(getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return 0
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    return int(size * (16 if extended else dtype.itemsize))
