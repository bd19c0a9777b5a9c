"""``patch_jax_nn``: what calls ``jax.nn.dot_product_attention`` runs in slices, left as it is."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from flax import nnx
from jax.nn import dot_product_attention as imported_by_name
from reference import assert_close, compiled_text, draw, draw_mask, largest_array

from autochunk import patch_jax_nn
from autochunk.attention import jax_nn
from autochunk.errors import ArgumentError

SMALLEST = 8e-6  # MB: a logit of each of two heads that share a key at a time
Q, K = (2, 6, 4, 8), (2, 5, 2, 8)
LENGTHS = {
    "query_seq_lengths": np.array([6, 2], np.int32),
    "key_value_seq_lengths": np.array([3, 5], np.int32),
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and mask": {"bias": draw((1, 4, 6, 5)), "mask": draw_mask((2, 1, 6, 5))},
    "bias and mask of fewer dims": {"bias": draw((6, 5)), "mask": draw_mask((4, 6, 5))},
    "integer bias": {"bias": np.arange(5)[None, None, None]},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "lengths": LENGTHS,
    "window": {"local_window_size": 2},
    "sides of a window": {"local_window_size": (1, 2)},
    "residual": {"return_residual": True},
    "several": {"is_causal": True, "local_window_size": (3, 0), "return_residual": True, **LENGTHS},
    "named": {"implementation": "xla"},
}


def arrays(query: tuple[int, ...] = Q, key: tuple[int, ...] = K) -> list[np.ndarray[Any, Any]]:
    return [draw(query, 1), draw(key, 2), draw(key, 3)]


def largest(run: Callable[..., Any], *moving: Any) -> int:
    return largest_array(compiled_text(quick_jit(run), *moving))


LONG = arrays((1, 64, 2, 2), (1, 64, 2, 2))
LOGITS = 2 * 64 * 64 * 4
QUARTER = LOGITS / 4e6


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_everything_that_the_function_takes(call: dict[str, Any]) -> None:
    """Outputs are jax's own, in the smallest slices and in none."""
    run = functools.partial(imported_by_name, **call)
    expected = quick_jit(run)(*arrays())
    for limit in (SMALLEST, None):
        with patch_jax_nn(max_chunk_size_mb=limit):
            assert_close(quick_jit(run)(*arrays()), expected)


def test_without_a_batch() -> None:
    """Arrays of rank 3 give arrays of rank 3."""
    moving = arrays(Q[1:], K[1:])
    expected = imported_by_name(*moving)
    with patch_jax_nn(max_chunk_size_mb=SMALLEST):
        assert_close(imported_by_name(*moving), expected)


@pytest.mark.parametrize("call", ["bias and mask", "several"])
def test_gradients(call: str) -> None:
    """They are jax's own, none of them through the residual, and one of a scale that is learnt."""

    def loss(query: Any, key: Any, value: Any, scale: Any) -> jax.Array:
        found = jax.nn.dot_product_attention(query, key, value, scale=scale, **CALLS[call])
        return sum(jnp.sum(jnp.sin(one)) for one in jax.tree.leaves(found))  # type: ignore[return-value]

    moving = (*arrays(), jnp.float32(0.4))
    run = quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    expected = run(*moving)
    with patch_jax_nn(max_chunk_size_mb=SMALLEST):
        assert_close(run(*moving), expected, 1e-4)


def by_attribute(*moving: Any) -> Any:
    return jax.nn.dot_product_attention(*moving)


def by_default(*moving: Any, function: Callable[..., Any] = jax.nn.dot_product_attention) -> Any:
    return function(*moving)


CALLERS = [imported_by_name, by_attribute, by_default, nnx.dot_product_attention]


@pytest.mark.parametrize("caller", CALLERS)
def test_however_it_is_called(caller: Callable[..., Any]) -> None:
    """A name imported before, a default argument and a library run in slices; after it none."""
    assert largest(caller, *LONG) >= LOGITS
    with patch_jax_nn(max_chunk_size_mb=QUARTER):
        assert largest(caller, *LONG) < LOGITS
    assert largest(caller, *LONG) >= LOGITS


def test_jit_knows_of_the_context() -> None:
    """One jitted function has a program of its own for inside, and for each setting."""
    run: Any = jax.jit(by_attribute)
    run(*arrays())
    for limit, programs in ((SMALLEST, 2), (SMALLEST, 2), (None, 3)):
        with patch_jax_nn(max_chunk_size_mb=limit):
            run(*arrays())
        assert run._cache_size() == programs
    run(*arrays())
    assert run._cache_size() == 3


def test_contexts_nest() -> None:
    """The innermost counts; leaving it, by an error too, gives the outer one back."""
    with patch_jax_nn(max_chunk_size_mb=QUARTER):
        with contextlib.suppress(KeyError), patch_jax_nn(max_chunk_size_mb=None):
            assert largest(by_attribute, *LONG) >= LOGITS
            raise KeyError
        assert largest(by_attribute, *LONG) < LOGITS
    assert largest(by_attribute, *LONG) >= LOGITS


def test_threads() -> None:
    """One outside is left alone; one inside stays so when another leaves."""
    seen: dict[str, int] = {}
    entered, left = threading.Event(), threading.Event()

    def inside() -> None:
        with patch_jax_nn(max_chunk_size_mb=QUARTER):
            entered.set()
            left.wait(60)
            seen["inside"] = largest(by_attribute, *LONG)

    thread = threading.Thread(target=inside)
    with patch_jax_nn(max_chunk_size_mb=QUARTER):
        thread.start()
        entered.wait(60)
    seen["outside"] = largest(by_attribute, *LONG)
    left.set()
    thread.join()
    assert seen["inside"] < LOGITS <= seen["outside"]


def test_it_is_undone() -> None:
    """After all contexts jax has its function back."""
    with patch_jax_nn(), patch_jax_nn():
        pass
    assert jax._src.nn.functions._dot_product_attention_xla is jax_nn._original


WRONG: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "implementation": (arrays(), {"implementation": "tpu"}),
    "cudnn without a GPU": (arrays(), {"implementation": "cudnn"}),
    "mask of numbers": (arrays(), {"mask": np.ones((1, 1, 6, 5), np.float32)}),
    "heads": (arrays((2, 6, 3, 8)), {}),
    "lengths": (arrays(), {"query_seq_lengths": np.array([1, 2, 3], np.int32)}),
    "value size": ([*arrays()[:2], draw((2, 5, 2, 9))], {}),
}


@pytest.mark.parametrize(("moving", "call"), WRONG.values(), ids=WRONG.keys())
def test_errors_are_jaxs(moving: list[Any], call: dict[str, Any]) -> None:
    """What jax refuses is refused by jax, in its words."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        imported_by_name(*moving, **call)
    with patch_jax_nn(max_chunk_size_mb=SMALLEST), pytest.raises(expected.type) as received:
        imported_by_name(*moving, **call)
    assert str(received.value) == str(expected.value)


@pytest.mark.parametrize(
    "call",
    [{"scale": np.full((2, 1, 1, 1), 0.3, np.float32)}, {"local_window_size": (-1, 3)}],
    ids=["scale of each example", "window beside the query"],
)
def test_what_slices_cannot_do_is_jaxs(call: dict[str, Any]) -> None:
    """It is computed as without the context."""
    run = quick_jit(functools.partial(imported_by_name, **call))
    expected = run(*arrays())
    with patch_jax_nn(max_chunk_size_mb=SMALLEST):
        np.testing.assert_array_equal(run(*arrays()), expected)


def test_a_limit_that_no_slice_keeps_is_an_error() -> None:
    """It is not left to jax, which keeps none."""
    with patch_jax_nn(max_chunk_size_mb=1e-9), pytest.raises(ArgumentError, match="smallest slice"):
        imported_by_name(*arrays())


def test_another_jax_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jax computes in a way that is not known, entering says so."""
    monkeypatch.setattr(jax_nn, "_original", by_default)
    with pytest.raises(ArgumentError, match=f"in jax {jax.__version__} it does so"), patch_jax_nn():
        pass


@pytest.mark.parametrize(
    "settings", [{"max_chunk_size_mb": 0}, {"implementation": "cuda"}], ids=str
)
def test_settings_are_checked_at_once(settings: dict[str, Any]) -> None:
    """On entering, not where the function is called."""
    with pytest.raises(ArgumentError, match=next(iter(settings))), patch_jax_nn(**settings):
        pass
