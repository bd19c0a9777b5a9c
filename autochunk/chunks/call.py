"""One call of a chunked function: its arrays, their axes, and programs that compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.chunks.axes import (
    SPLIT,
    Axes,
    Leaf,
    Parameters,
    arguments_of,
    count_axes,
    is_array,
    leaves_of,
    lengths_of,
    normal_axes,
)
from autochunk.chunks.loop import Function, Split, in_chunks, make_split
from autochunk.chunks.reductions import NAMED, Arrays, Merge, Reduction, check_results
from autochunk.errors import ArgumentError


@dataclass(frozen=True)
class Settings:
    """What ``chunked`` was given, checked."""

    fn: Callable[..., Any]
    parameters: Parameters
    in_axes: Any
    out_axes: Any
    reduce: Any
    chunk_size: Any
    name: str
    memory_budget_mb: float | None


class Call:
    """One call.

    Attributes:
      settings: of the function.
      lengths: how many positions there are along each chunked axis.
      arrays: what programs take; programs contain all other arguments.
      inputs: the axes of each array.
      traced: the jaxpr of the function for whole arrays.
      outputs: the axes of each result.
      reduction: how results without an axis are merged.

    Raises:
      ArgumentError: the axes do not fit the arguments or the results.
    """

    def __init__(self, settings: Settings, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.settings = settings
        leaves = arguments_of(settings.parameters, settings.in_axes, args, kwargs)
        count = count_axes(leaves)
        axes = [normal_axes(leaf, count) for leaf in leaves]
        self.lengths = lengths_of(leaves, axes, count)
        self._arguments = jax.tree.structure((args, kwargs))
        pairs = [self._drawn(*one) for one in zip(leaves, axes, strict=True)]
        self._values = [value for value, _ in pairs]
        self._places = [n for n, (value, dims) in enumerate(pairs) if _is_traced(value, dims)]
        self.arrays: Arrays = [jnp.asarray(self._values[n]) for n in self._places]
        self.inputs = [pairs[n][1] for n in self._places]
        trace = jax.make_jaxpr(self._function, return_shape=True)
        self.traced, self._results = trace(self.arrays)
        self.outputs = self._axes_of_results()
        self.reduction = self._make_reduction()

    def _drawn(self, leaf: Leaf, dims: Axes) -> tuple[Any, Axes]:
        """An argument with its axes; of a random key to split, one key for each position."""
        if leaf.axes != SPLIT:
            return leaf.value, dims
        try:
            keys = jax.random.split(leaf.value, self.lengths)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f'in_axes says "split" of {leaf.name}, which must be one key of random numbers, as '
                f"jax.random.key makes it; got {leaf.value!r}"
            ) from error
        return keys, tuple(range(len(self.lengths)))

    def _function(self, arrays: Arrays) -> Any:
        """What the user's function returns."""
        values = list(self._values)
        for place, array in zip(self._places, arrays, strict=True):
            values[place] = array
        args, kwargs = jax.tree.unflatten(self._arguments, values)
        return self.settings.fn(*args, **kwargs)

    @property
    def symbolic(self) -> bool:
        """Whether some size is symbolic, as under ``jax.export``."""
        return not all(isinstance(size, int) for array in self.arrays for size in array.shape)

    @property
    def closes_over_sharded(self) -> bool:
        """Whether the function closes over arrays whose types say how they are sharded.

        A chunk leaves sharding to XLA, and JAX accepts no such arrays inside it.
        """
        return has_explicit_axes() and any(map(is_array, self.traced.consts))

    def flat(self, arrays: Arrays) -> Arrays:
        """The results of the user's function as a list."""
        return [jnp.asarray(one) for one in jax.tree.leaves(self._function(arrays))]

    # --- Results ----------------------------------------------------------------------------------

    def _axes_of_results(self) -> list[Axes]:
        leaves = list(leaves_of("the result", self._results, self.settings.out_axes, "out_axes"))
        count, found = len(self.lengths), []
        for leaf in leaves:
            dims = normal_axes(leaf, count, "out_axes")
            if len(dims) > count:
                raise ArgumentError(
                    f"out_axes must have an entry for each of the {count} chunked axes; for "
                    f"{leaf.name} got {leaf.axes!r}"
                )
            self._check_result(leaf, dims)
            found.append(dims)
        return found

    def _check_result(self, leaf: Leaf, dims: Axes) -> None:
        shape, reduce = leaf.value.shape, self.settings.reduce
        for dim, length in zip(dims, self.lengths, strict=True):
            if dim is not None and shape[dim] != length:
                raise ArgumentError(
                    f"fn must return one result for each of the {length} positions along the axis "
                    f"that out_axes names; {leaf.name} is of shape {shape}, which has "
                    f"{shape[dim]} along axis {dim}"
                )
            if dim is None and reduce is None:
                raise ArgumentError(
                    "out_axes must name an axis of each result for each chunked axis, unless "
                    f'reduce says how to merge it, as "sum" does; for {leaf.name} got {leaf.axes!r}'
                )
        if None in dims:
            check_results(reduce, leaf.name, leaf.value.dtype)

    def _make_reduction(self) -> Reduction:
        reduce = self.settings.reduce
        if not isinstance(reduce, tuple):
            return NAMED[reduce or "sum"]
        if len(self.lengths) > 1 or any(dims != (None,) for dims in self.outputs):
            raise ArgumentError(
                "a pair (first, merge) merges all results over one chunked axis; got out_axes="
                f"{self.settings.out_axes!r} and {len(self.lengths)} chunked axes"
            )
        first, merge = reduce
        return Merge(first, merge, jax.tree.structure(self._results))

    def result(self, flat: Arrays) -> Any:
        """What ``chunked``'s function returns, from a program's results."""
        like = self.reduction.initial if isinstance(self.reduction, Merge) else self._results
        return jax.tree.unflatten(jax.tree.structure(like), flat)

    # --- Programs ---------------------------------------------------------------------------------

    def program(self, sizes: Sequence[int], *, differentiable: bool) -> Function:
        """The call in chunks of at most these sizes, from ``arrays`` to a list of results."""
        devices = _devices()
        pairs = zip(self.lengths, sizes, strict=True)
        splits = [make_split(length, size, devices) for length, size in pairs]
        if not any(splits):
            return self.whole
        return in_chunks(
            self.flat,
            splits,
            self.inputs,
            self.outputs,
            self.reduction,
            differentiable=differentiable,
        )

    def whole(self, arrays: Arrays) -> Arrays:
        """The call without chunks."""
        results = self.flat(arrays)
        if not isinstance(self.reduction, Merge):
            return results
        return self.reduction.add(self.reduction.start(results), results, 1.0)

    def trace(self, function: Callable[[Arrays], Any], sizes: Sequence[Any]) -> Any:
        """The jaxpr of a function of this call's arrays, cut to one chunk.

        It is traced as on one device, but inside ``shard_map`` with the mesh that is there.
        """
        if not _manual_axes():
            return self.trace_alone(function, sizes)
        cut = lambda arrays: function(self._part(arrays, sizes))  # noqa: E731
        return jax.make_jaxpr(cut)(self.arrays)

    def trace_alone(self, function: Callable[[Arrays], Any], sizes: Sequence[Any]) -> Any:
        """The same as on one device, whatever mesh there is; sizes may be symbolic."""
        with _without_mesh():
            return jax.make_jaxpr(function)(self.shapes(sizes))

    def shapes(self, sizes: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a chunk of these sizes."""
        found = []
        for array, dims in zip(self.arrays, self.inputs, strict=True):
            shape = list(array.shape)
            for dim, size in zip(dims, sizes, strict=True):
                if dim is not None:
                    shape[dim] = size
            found.append(jax.ShapeDtypeStruct(tuple(shape), array.dtype))
        return found

    def _part(self, arrays: Arrays, sizes: Sequence[int]) -> Arrays:
        """The arrays of a chunk of these sizes: the first one."""
        return [self._first(*one, sizes) for one in zip(arrays, self.inputs, strict=True)]

    def _first(self, array: jax.Array, dims: Axes, sizes: Sequence[int]) -> jax.Array:
        for dim, length, size in zip(dims, self.lengths, sizes, strict=True):
            if dim is not None and size < length:
                array = Split(length, size).take(array, dim, 0, size)
        return array


def _is_traced(value: Any, dims: Axes) -> bool:
    return is_array(value) or any(dim is not None for dim in dims)


def _devices() -> int:
    """How many devices arrays that are traced as if they were whole may be sharded over."""
    return 1 if _manual_axes() else jax.device_count()


def _manual_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def has_explicit_axes() -> bool:
    """Whether the types of arrays say how they are sharded."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return any(kind == jax.sharding.AxisType.Explicit for kind in kinds)


def _without_mesh() -> AbstractContextManager[Any]:
    """A context in which JAX knows of no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
