"""What is measured of a function: its program as a function of arrays, for each plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from autochunk.chunks.axes import Axes
from autochunk.chunks.export import drawn
from autochunk.chunks.loop import in_chunks, make_split
from autochunk.chunks.reductions import NAMED, Arrays, Reduction
from autochunk.plan import Plan
from autochunk.tuner.reference import blocks, error_of_product, multiplying
from autochunk.workload import Mode


@dataclass(frozen=True)
class Function:
    """A function as ``chunked`` has it: of a list of arrays, with the axes that are chunked.

    Attributes:
      flat: takes the arrays, whole or chunks of them; returns a list of results.
      lengths: positions along each chunked axis.
      inputs, outputs: axes of each array and result.
      reduction: how results without an axis are merged.
      whole: what is computed of whole arrays, where that is not ``flat``.
      rounding: the relative rounding of the least precise dtype in it.
      products: the precisions of the products of float32 arrays in it.
    """

    flat: Callable[[Arrays], Arrays]
    lengths: tuple[int, ...]
    inputs: Sequence[Axes]
    outputs: Sequence[Axes]
    reduction: Reduction
    whole: Callable[[Arrays], Arrays] | None = None
    rounding: float = 0.0
    products: Sequence[str] = ("default",)


def of_program(header: dict[str, Any], program: bytes) -> tuple[Function, Arrays]:
    """The function of an exported program, and arrays that it takes."""
    around, inputs = len(header["around"]), list(map(tuple, header["inputs"]))
    lengths = tuple(header["lengths"])
    read: Callable[..., Any] = jax.export.deserialize
    found = _parts(header, program).items()
    parts = {sizes: read(bytearray(one)).call for sizes, one in found}

    def flat(arrays: Arrays) -> Arrays:
        outer, inner = arrays[:around], arrays[around:]
        call = parts.get(None) or parts[_sizes_of(inner, inputs)]
        found: Arrays = call(outer, inner)
        return found

    function = Function(
        flat=flat,
        lengths=lengths,
        inputs=[*[(None,) * len(lengths)] * around, *inputs],
        outputs=list(map(tuple, header["outputs"])),
        reduction=NAMED[header["reduce"] or "sum"],
        rounding=float(header.get("rounding", 0.0)),  # programs of before had neither
        products=header.get("products", ("default",)),
    )
    descriptions = [*header["around"], *header["arrays"]]
    return function, [drawn(one, seed) for seed, one in enumerate(descriptions)]


def _parts(header: dict[str, Any], program: bytes) -> dict[tuple[int, ...] | None, bytes]:
    """The programs by the sizes that they are for; None is any."""
    if "parts" not in header:
        return {None: program}
    found: dict[tuple[int, ...] | None, bytes] = {}
    start = 0
    for sizes, count in header["parts"]:
        found[tuple(sizes)] = program[start : start + count]
        start += count
    return found


def _sizes_of(arrays: Arrays, inputs: Sequence[Axes]) -> tuple[int, ...]:
    """How many positions arrays have along each chunked axis."""
    found = {
        number: array.shape[dim]
        for array, dims in zip(arrays, inputs, strict=True)
        for number, dim in enumerate(dims)
        if dim is not None
    }
    return tuple(found[number] for number in sorted(found))


class Subject:
    """A function, arguments for it, and how it runs by a plan.

    Attributes:
      mode: whether gradients are computed, too.
      passed: what programs are called with.
    """

    def __init__(self, function: Function, arrays: Arrays, mode: Mode) -> None:
        self._function, self.mode = function, mode
        self.passed: tuple[Any, ...] = (arrays,)
        if mode == "training":
            results = jax.eval_shape(self._forward(Plan("dense"), differentiable=False), arrays)
            cotangents = [
                drawn({"shape": one.shape, "dtype": str(one.dtype)}, len(arrays) + seed)
                for seed, one in enumerate(results)
                if jnp.issubdtype(one.dtype, jnp.inexact)
            ]
            self.passed = (arrays, cotangents)

    @functools.cached_property
    def tolerance(self) -> float:
        """By what results may differ between sizes of chunks."""
        inexact = [one.dtype for one in self.passed[0] if jnp.issubdtype(one.dtype, jnp.inexact)]
        of_arrays = max((float(jnp.finfo(dtype).eps) for dtype in inexact), default=1e-7)
        of_products = [
            error_of_product("float32", multiplying(one)) for one in self._function.products
        ]
        return tolerance_of([of_arrays, self._function.rounding, *of_products])

    def function(self, plan: Plan) -> Callable[..., Any]:
        """What computes the results, and in training the gradients, by a plan."""
        if self.mode == "forward":
            return self._forward(plan, differentiable=False)
        run = self._forward(plan, differentiable=True)

        def training(arrays: Arrays, cotangents: Arrays) -> tuple[Arrays, list[Any]]:
            moving = [n for n, one in enumerate(arrays) if jnp.issubdtype(one.dtype, jnp.inexact)]

            def of_moving(*values: jax.Array) -> tuple[Arrays, Arrays]:
                given = dict(zip(moving, values, strict=True))
                results = run([given.get(n, one) for n, one in enumerate(arrays)])
                inexact = [one for one in results if jnp.issubdtype(one.dtype, jnp.inexact)]
                return inexact, results

            _, backward, results = jax.vjp(of_moving, *(arrays[n] for n in moving), has_aux=True)
            return results, list(backward(cotangents))

        return training

    def _forward(self, plan: Plan, *, differentiable: bool) -> Callable[[Arrays], Arrays]:
        one = self._function
        pairs = zip(one.lengths, plan.chunk_sizes or one.lengths, strict=True)
        splits = [make_split(length, size, 1) for length, size in pairs]
        if not any(splits):
            return one.whole or one.flat
        return in_chunks(
            one.flat,
            splits,
            one.inputs,
            one.outputs,
            one.reduction,
            differentiable=differentiable,
        )


def tolerance_of(roundings: Sequence[float]) -> float:
    """The root of the coarsest rounding: sums in another order never reach it, mixed positions do.

    One is the least precise dtype's; another that of float32 products, whose operands a GPU may
    round more (to TF32), and in some sizes of a chunk only.
    """
    return math.sqrt(max(roundings))


def as_numbers(results: Any) -> list[np.ndarray[Any, Any]]:
    """Results as floating-point numbers on the host; keys of random numbers by their data."""
    return [_number(one) for one in jax.tree.leaves(results) if one.dtype != jax.dtypes.float0]


def _number(array: jax.Array) -> np.ndarray[Any, Any]:
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))


def deviation(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """Root mean square difference of the worst array, relative to that of its expected values.

    A few values may differ by more than their rounding: where a ReLU's input is next to zero, it is
    now on this side of it and now on that. So the largest difference, relative to the largest
    value, counts by its square: enough for positions that are wrong altogether. NaN where NaN is
    expected is right; where only one is finite, the result is infinite.
    """
    pairs = zip(results, expected, strict=True)
    return max((_deviation(one.ravel(), other.ravel()) for one, other in pairs), default=0.0)


def _deviation(received: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    largest = 1e-30
    for part in blocks(expected.size):
        finite = _finite(expected[part].astype(np.float64))
        largest = max(largest, float(np.abs(finite).max(initial=0.0)))
    most, squares, expected_squares, count = 0.0, 0.0, 0.0, 0
    for part in blocks(expected.size):
        one, other = (array[part].astype(np.float64) for array in (received, expected))
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(one - other)) / largest
        if not np.isfinite(apart).all():
            return math.inf
        usual = _finite(other) / largest
        most = max(most, float(apart.max()))
        squares += float(apart @ apart)
        expected_squares += float(usual @ usual)
        count += usual.size
    typical = math.sqrt(squares / max(expected.size, 1))
    return max(typical / max(math.sqrt(expected_squares / max(count, 1)), 1e-30), most**2)


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = values[np.isfinite(values)]
    return found
