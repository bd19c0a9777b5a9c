"""``autochunk.haiku.patched``: models of haiku's own modules, left as they are, run in slices."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from haiku import MultiHeadAttention as ImportedByName
from reference import assert_close, compiled_text, draw, draw_mask, largest_array

import autochunk
from autochunk.errors import ArgumentError
from autochunk.haiku import patched

SMALLEST = 4e-6  # MB: one logit at a time
KEY = jax.random.PRNGKey(7)
LOGITS = 2 * 64 * 64 * 4  # bytes of those of a long input, 64 positions and 2 heads
INIT: dict[str, Any] = {"w_init": hk.initializers.VarianceScaling(0.3)}


class Sub(hk.MultiHeadAttention):
    """A subclass that leaves the attention alone, made before any context."""


class Scaled(hk.MultiHeadAttention):
    """A subclass that passes on to haiku's attention."""

    def __call__(self, query: Any, key: Any, value: Any, mask: Any = None) -> jax.Array:
        """Queries are scaled by a parameter."""
        scale = hk.get_parameter("scale", (), init=hk.initializers.Constant(2.0))
        found: jax.Array = super().__call__(query * scale, key, value, mask=mask)
        return found


class Own(hk.MultiHeadAttention):
    """A subclass whose attention is none of haiku's."""

    def __call__(self, *inputs: Any) -> jax.Array:
        """The mean of all values."""
        return jnp.broadcast_to(inputs[2].mean(-2, keepdims=True), inputs[2].shape)


def model(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Modules of all kinds, by position and by name, with all settings."""
    for kind in (ImportedByName, hk.MultiHeadAttention, Sub, Scaled, Own):
        x = x + kind(2, 4, **INIT)(x, x, x, mask)
    settings: dict[str, Any] = {
        "value_size": 3,
        "model_size": 8,
        "with_bias": False,
        "name": "other",
        **INIT,
    }
    last = ImportedByName(num_heads=2, key_size=5, **settings)
    return last(query=x, key=x, value=x, mask=mask)


def transformed(function: Callable[..., Any] = model) -> hk.Transformed:
    return hk.without_apply_rng(hk.transform(function))


def attention(x: jax.Array) -> jax.Array:
    found: jax.Array = hk.MultiHeadAttention(2, 4, **INIT)(x, x, x)
    return found


def largest(run: Callable[..., Any], *arrays: Any) -> int:
    return largest_array(compiled_text(quick_jit(run), *arrays))


def test_a_model_is_what_it_was() -> None:
    """Names and values of the parameters, and the output, are haiku's."""
    arrays = [draw((2, 6, 8)), draw_mask((2, 1, 6, 6)).astype(np.float32)]
    function = transformed()

    @quick_jit
    def run() -> Any:
        return (params := function.init(KEY, *arrays)), function.apply(params, *arrays)

    expected = run()
    for limit in (SMALLEST, None):
        with patched(max_chunk_size_mb=limit):
            assert_close(run(), expected)


def test_gradients() -> None:
    """They are haiku's, of a subclass's own parameter, too."""
    function = transformed(lambda x: Scaled(2, 4, **INIT)(x, x, x))
    x = draw((2, 6, 8))
    params = function.init(KEY, x)
    run = quick_jit(jax.grad(lambda params: jnp.sum(jnp.sin(function.apply(params, x)))))
    expected = run(params)
    with patched(max_chunk_size_mb=SMALLEST):
        assert_close(run(params), expected)


@pytest.mark.parametrize("kind", [hk.MultiHeadAttention, Sub, Scaled])
def test_every_kind_runs_in_slices(kind: type[hk.MultiHeadAttention]) -> None:
    """All logits are never there, in one jitted function: inside it is traced anew, and outside."""
    function = transformed(lambda x: kind(2, 4, **INIT)(x, x, x))
    x = draw((64, 8))
    params = function.init(KEY, x)
    assert largest(function.apply, params, x) >= LOGITS
    with patched(max_chunk_size_mb=LOGITS / 8e6):
        assert largest(function.apply, params, x) <= LOGITS / 4
    assert largest(function.apply, params, x) >= LOGITS


def test_jit_knows_of_the_context() -> None:
    """One jitted function has a program of its own for inside, and for each setting."""
    function = transformed(attention)
    x = draw((6, 8))
    params = function.init(KEY, x)
    apply: Any = jax.jit(function.apply)
    with patched():  # the first context of a process makes whatever was traced before be so anew
        pass
    apply(params, x)
    for limit, programs in ((SMALLEST, 2), (SMALLEST, 2), (None, 3)):
        with patched(max_chunk_size_mb=limit):
            apply(params, x)
        assert apply._cache_size() == programs
    apply(params, x)
    assert apply._cache_size() == 3


def test_contexts_nest() -> None:
    """The innermost counts; leaving it, by an error too, gives the outer one back."""
    function = transformed(attention)
    x = draw((64, 8))
    params = function.init(KEY, x)

    def small() -> bool:
        return largest(function.apply, params, x) < LOGITS

    with patched(max_chunk_size_mb=LOGITS / 8e6):
        with contextlib.suppress(KeyError), patched(max_chunk_size_mb=None):
            assert not small()
            raise KeyError
        assert small()
    assert not small()


def test_other_threads_are_left_alone() -> None:
    """A thread outside of the context runs haiku's attention meanwhile."""
    function = transformed(attention)
    x = draw((64, 8))
    params = function.init(KEY, x)
    seen: list[int] = []
    with patched(max_chunk_size_mb=LOGITS / 8e6):
        thread = threading.Thread(target=lambda: seen.append(largest(function.apply, params, x)))
        thread.start()
        thread.join()
        seen.append(largest(function.apply, params, x))
    assert seen[0] >= LOGITS > seen[1]


def test_interceptors_outside_see_the_calls() -> None:
    """A user's own, entered before, is asked as without the context."""
    names: list[str] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        names.append(f"{type(context.module).__name__}.{context.method_name}")
        return call(*args, **kwargs)

    function = transformed(attention)
    with hk.intercept_methods(note):
        function.init(KEY, draw((6, 8)))
        without, names = names, []
        with patched(max_chunk_size_mb=SMALLEST):
            function.init(KEY, draw((6, 8)))
    assert sorted(names) == sorted(without)


def test_our_own_module_keeps_its_settings() -> None:
    """What a model asks for by name is not overruled."""
    function = transformed(
        lambda x: autochunk.MultiHeadAttention(2, 4, max_chunk_size_mb=None, **INIT)(x, x, x)
    )
    x = draw((64, 8))
    params = function.init(KEY, x)
    with patched(max_chunk_size_mb=LOGITS / 8e6):
        assert largest(function.apply, params, x) >= LOGITS


def test_the_name_in_haiku_may_be_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that were imported by that name before are haiku's, and run in slices."""
    monkeypatch.setattr(hk, "MultiHeadAttention", autochunk.MultiHeadAttention)
    function = transformed(lambda x: ImportedByName(2, 4, **INIT)(x, x, x))
    x = draw((64, 8))
    params = function.init(KEY, x)
    with patched(max_chunk_size_mb=LOGITS / 8e6):
        assert largest(function.apply, params, x) <= LOGITS / 4


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_what_slices_cannot_do_is_haikus() -> None:
    """Complex numbers are computed as without the context."""
    function = transformed(attention)
    x = draw((6, 8)).astype(np.complex64)
    params = function.init(KEY, x)
    with patched(max_chunk_size_mb=SMALLEST):
        received = function.apply(params, x)
    np.testing.assert_array_equal(received, function.apply(params, x))


def test_errors_are_haikus() -> None:
    """A mask of another rank is refused as without the context."""
    function = transformed()
    arrays = (draw((2, 6, 8)), draw_mask((6, 6)))
    with patched(max_chunk_size_mb=SMALLEST), pytest.raises(ValueError, match="Mask dimension"):
        function.init(KEY, *arrays)


@pytest.mark.parametrize(
    "settings", [{"max_chunk_size_mb": 0}, {"implementation": "cuda"}], ids=str
)
def test_settings_are_checked_at_once(settings: dict[str, Any]) -> None:
    """On entering, not where a model is called."""
    with pytest.raises(ArgumentError, match=next(iter(settings))), patched(**settings):
        pass
