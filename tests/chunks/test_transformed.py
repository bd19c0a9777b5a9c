"""In chunks a function is what it is whole, under JAX's transformations and their compositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from factories import quick_jit

Function = Callable[..., Any]


def scalar(function: Function, args: tuple[Any, ...]) -> Function:
    """Something of the first two arguments with derivatives of every order."""

    def of_two(*moving: Any) -> jax.Array:
        leaves = jax.tree.leaves(function(*moving, *args[2:]))
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in leaves), jnp.float32(0))

    return of_two


def transformed(function: Function, args: tuple[Any, ...]) -> dict[str, Any]:
    """What transformations of a function give, by name; one program for all of them."""
    moving, loss = args[:2], scalar(function, args)
    gradient = jax.grad(loss, (0, 1))

    def layers(first: Any, second: Any) -> Any:
        step = lambda c, one: (jax.tree.map(jnp.add, c, one), loss(c, second))  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step), first, jax.tree.map(lambda x: x[None], first))[1]

    return {
        "value": function(*args),
        "vmap of gradient": jax.vmap(gradient, (0, None))(
            jax.tree.map(lambda one: jnp.stack([one, one / 2]), moving[0]), moving[1]
        ),
        "remat in a scan over layers": jax.grad(lambda *both: layers(*both).sum(), (0, 1))(*moving),
        "closure": jax.grad(lambda one: loss(moving[0], one))(moving[1]),
    }


def forward_mode(function: Function, args: tuple[Any, ...]) -> dict[str, Any]:
    """What transformations give that a function with a rule for its cotangents does not have."""
    moving, loss = args[:2], scalar(function, args)
    return {"second order": jax.jvp(jax.grad(loss, (0, 1)), moving, moving)}


@pytest.mark.parametrize("name", CASES)
def test_transformations(name: str) -> None:
    """Values, derivatives and their compositions do not depend on chunks."""
    case = CASES[name]
    maps = [transformed] if name == "own rule" else [transformed, forward_mode]

    def all_of(function: Function) -> Any:
        given = lambda *args: [one(function, args) for one in maps]  # noqa: E731
        return quick_jit(given)(*case.args)

    structure: Any = jax.tree.structure
    found, expected = all_of(case.chunked), all_of(case.expected)
    assert structure(found) == structure(expected)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        said = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, said
        np.testing.assert_allclose(one, other, rtol=3e-4, atol=3e-4, err_msg=said)
