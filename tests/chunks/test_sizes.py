"""The sizes of chunks where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autochunk
from autochunk.chunks.memory import peak_bytes
from autochunk.chunks.rule import most_bytes, usual_sizes

Function = Callable[..., Any]


def _wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ w.T


X, W = jax.ShapeDtypeStruct((1000, 8), jnp.float32), jax.ShapeDtypeStruct((8, 500), jnp.float32)


def test_peak_is_of_what_lives_at_once() -> None:
    """What was used last is gone, and what a loop or a call computes inside counts."""
    several: Function = lambda x: x + 1 + 1 + 1  # noqa: E731

    one = 1000 * 8 * 4
    assert peak_bytes(jax.make_jaxpr(several)(X).jaxpr) == 2 * one
    inside: Function = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0]  # noqa: E731
    assert peak_bytes(jax.make_jaxpr(inside)(X).jaxpr) == one
    assert peak_bytes(jax.make_jaxpr(jax.jit(several))(X).jaxpr) == 2 * one


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_auto_keeps_within_a_budget(mode: str) -> None:
    """What is compiled takes no more working memory than the budget, and whole it takes more."""

    def temp_mb(function: Function) -> float:
        loss: Function = lambda x, w: function(x, w).sum()  # noqa: E731
        run = jax.grad(loss, (0, 1)) if mode == "training" else function
        compiled = jax.jit(run).lower(X, W).compile()
        analysis: Any = compiled.memory_analysis()
        return float(analysis.temp_size_in_bytes) / 1e6

    by_argument = autochunk.chunked(_wide, (0, None), memory_budget_mb=0.5)
    assert temp_mb(_wide) > 1.9
    assert temp_mb(by_argument) <= 0.5
    with autochunk.use(memory_budget_mb=0.5):
        assert temp_mb(autochunk.chunked(_wide, (0, None))) <= 0.5
    assert temp_mb(autochunk.chunked(_wide, (0, None))) == temp_mb(_wide)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.integers(1, 50),
    st.floats(1, 1e9),
)
def test_usual_sizes_fit(lengths: list[int], fixed: int, each: int, most: float) -> None:
    """Sizes are the whole where that fits; else they fit, or take little more than the least."""
    needed: Function = lambda sizes: fixed + each * math.prod(sizes)  # noqa: E731
    sizes = usual_sizes(lengths, needed, most)
    if needed(tuple(lengths)) <= most:
        assert sizes == tuple(lengths)
    else:
        least = fixed + each
        assert needed(sizes) <= max(most, 1.25 * least) or set(sizes) == {1}
        assert least > most or needed(sizes) <= most
    assert all(1 <= size <= length for size, length in zip(sizes, lengths, strict=True))


def test_most_bytes() -> None:
    """A share of the device's memory, or less by a budget; no end where neither is known."""
    assert most_bytes(8, None) == 2**30
    assert most_bytes(8, 100.0) == 1e8
    assert most_bytes(0, None) == math.inf
