"""Which axes of a call's arrays are chunked: what ``in_axes`` and ``out_axes`` say of each leaf."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from autochunk.errors import ArgumentError

SPLIT = "split"
"""In place of an axis: a random key, which is split so that each position gets its own."""

Axes = tuple[int | None, ...]
"""For one array: for each chunked axis its dim in the array, or None."""


@dataclass(frozen=True)
class Leaf:
    """One leaf, an array or anything else, in the arguments or results of a function.

    Attributes:
      name: for errors.
      value: what it is.
      axes: as the caller gave it: an int, None, "split", or a tuple with an entry for each axis.
    """

    name: str
    value: Any
    axes: Any


# --- Spreading a prefix over a tree ---------------------------------------------------------------


def leaves_of(name: str, tree: Any, axes: Any, argument: str = "in_axes") -> Iterator[Leaf]:
    """The leaves of a tree, each with its entry in a prefix of the tree, as in ``jax.vmap``.

    Where the tree is not a tuple or list (an array, say), a tuple or list means several axes.

    Raises:
      ArgumentError: the prefix does not fit the tree, or has something that is no axis.
    """
    children = _children(tree)
    if _is_axis(axes) or (_is_axes(axes) and not isinstance(tree, tuple | list)):
        yield from (Leaf(name + path, value, axes) for path, value in _all_leaves(tree))
        return
    if children is None:
        raise ArgumentError(
            f"{argument} must have an int, None or a tuple of these for {name}, which is an array; "
            f"got {axes!r}"
        )
    parts, structure = children
    try:
        below = structure.flatten_up_to(axes)
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(
            f"{argument} must be a prefix of {name}, as in jax.vmap; {name} is {structure}, "
            f"and got {axes!r}"
        ) from error
    for (path, part), one in zip(parts, below, strict=True):
        yield from leaves_of(name + path, part, one, argument)


def _is_axis(axes: Any) -> bool:
    return axes is None or isinstance(axes, str) or _is_int(axes)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_axes(axes: Any) -> bool:
    several = isinstance(axes, tuple | list) and len(axes) > 0
    return several and all(one is None or _is_int(one) for one in axes)


def _children(tree: Any) -> tuple[list[tuple[str, Any]], Any] | None:
    """The children, one level down, with their paths, and the structure; None for a leaf."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda one: one is not tree
    )
    if jax.tree_util.treedef_is_leaf(structure):
        return None
    return [(jax.tree_util.keystr(path), value) for path, value in with_paths], structure


def _all_leaves(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), value) for path, value in found]


# --- The arguments of a call ----------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Names of a function's parameters: those that may be given by position, and all others."""

    positional: tuple[str, ...]
    others: tuple[str, ...]
    open: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """Of a function; nothing is known of one that does not tell its signature."""
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return cls((), (), True)
        kinds = inspect.Parameter
        positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        variable = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        return cls(
            tuple(one.name for one in found if one.kind in positional),
            tuple(one.name for one in found if one.kind == kinds.KEYWORD_ONLY),
            any(one.kind in variable for one in found),
        )

    def check(self, in_axes: Any) -> None:
        """Raises ArgumentError for ``in_axes`` that no call of this function could have."""
        if isinstance(in_axes, dict):
            unknown = set(in_axes) - {*self.positional, *self.others}
            if unknown and not self.open:
                raise ArgumentError(
                    f"in_axes names {', '.join(map(repr, sorted(unknown, key=repr)))}; the "
                    f"function's parameters are {', '.join((*self.positional, *self.others))}"
                )
        elif not isinstance(in_axes, tuple | list) and not _is_axis(in_axes):
            raise ArgumentError(
                "in_axes must be an int, None, a tuple with an entry for each positional argument "
                f"or a dict by parameter; got {in_axes!r}"
            )


def arguments_of(
    parameters: Parameters, in_axes: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Leaf]:
    """Leaves of ``(args, kwargs)`` in JAX's order, each with its axes.

    Raises:
      ArgumentError: ``in_axes`` does not fit the arguments.
    """
    if isinstance(in_axes, tuple | list) and len(args) > len(in_axes):
        raise ArgumentError(
            f"in_axes must have an entry for each positional argument; there are {len(args)}, and "
            f"got {in_axes!r}"
        )
    found: list[Leaf] = []
    for number, value in enumerate(args):
        known = number < len(parameters.positional)
        name = parameters.positional[number] if known else f"argument {number}"
        found += leaves_of(name, value, _axes_of(in_axes, name, number))
    for name in sorted(kwargs):  # as JAX flattens a dict
        place = parameters.positional.index(name) if name in parameters.positional else None
        found += leaves_of(name, kwargs[name], _axes_of(in_axes, name, place))
    return found


def _axes_of(in_axes: Any, name: str, number: int | None) -> Any:
    """The entry of ``in_axes`` for one argument; those that only a name can give are shared."""
    if isinstance(in_axes, dict):
        return in_axes.get(name)
    if number is None:
        return None
    if isinstance(in_axes, tuple | list):
        return in_axes[number] if number < len(in_axes) else None
    return in_axes


# --- Axes and lengths -----------------------------------------------------------------------------


def is_array(value: Any) -> bool:
    """Whether it is an array that JAX computes with, not a constant of Python or NumPy."""
    return isinstance(value, jax.Array)


def count_axes(leaves: Sequence[Leaf]) -> int:
    """How many axes are chunked."""
    several = [len(leaf.axes) for leaf in leaves if isinstance(leaf.axes, tuple | list)]
    return max(several, default=1)


def normal_axes(leaf: Leaf, count: int, argument: str = "in_axes") -> Axes:
    """The dim, counted from the first, of each of ``count`` chunked axes in an array.

    Raises:
      ArgumentError: the array has no such dim, or is not an array, or a dim is named twice.
    """
    if leaf.axes is None or leaf.axes == SPLIT:
        return (None,) * count
    if isinstance(leaf.axes, str):
        raise ArgumentError(
            f'{argument} must be ints, None or "split"; for {leaf.name} got {leaf.axes!r}'
        )
    given = tuple(leaf.axes) if isinstance(leaf.axes, tuple | list) else (leaf.axes,)
    shape = np.shape(leaf.value) if hasattr(leaf.value, "shape") else ()
    for axis in given:
        if axis is not None and not -len(shape) <= axis < len(shape):
            what = f"of shape {shape}" if hasattr(leaf.value, "shape") else f"{leaf.value!r}"
            raise ArgumentError(
                f"{argument} says axis {axis} of {leaf.name}, which is {what}; give an axis that "
                "it has, or None if it is shared"
            )
    dims = [None if axis is None else int(axis) % len(shape) for axis in given]
    real = [dim for dim in dims if dim is not None]
    if len(set(real)) < len(real):
        raise ArgumentError(
            f"{argument} must name each axis of {leaf.name} once; got {leaf.axes!r}"
        )
    return (*dims, *[None] * (count - len(dims)))


def lengths_of(leaves: Sequence[Leaf], axes: Sequence[Axes], count: int) -> tuple[int, ...]:
    """How many positions there are along each chunked axis.

    Raises:
      ArgumentError: two arrays have different lengths, or none has one of the axes.
    """
    found = []
    for number in range(count):
        lengths = {
            leaf.name: leaf.value.shape[dim]
            for leaf, dims in zip(leaves, axes, strict=True)
            if (dim := dims[number]) is not None
        }
        which = "" if count == 1 else f" number {number}"
        if not lengths:
            raise ArgumentError(
                f"in_axes must name the chunked axis{which} of one array at least; every argument "
                "is shared"
            )
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ArgumentError(
                f"arrays must be equally long along the chunked axis{which}; {said}"
            )
        found.append(next(iter(lengths.values())))
    return tuple(found)
