"""What ``chunked`` takes, what it refuses, and what does not depend on the sizes of chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from factories import quick_jit
from hypothesis import given
from hypothesis import strategies as st

import autochunk
from autochunk import chunked
from autochunk.chunks.loop import make_split
from autochunk.errors import ArgumentError

Function = Callable[..., Any]

X, W = draw(7, 4), draw(4, 5)


def scans(function: Function, *args: Any) -> list[int]:
    """How often each loop of a traced function goes round."""
    text = str(jax.make_jaxpr(function)(*args))
    return [int(part.split()[0]) for part in text.split(" length=")[1:]]


def product(x: jax.Array, w: jax.Array, scale: float = 1.0, *, relu: bool = False) -> jax.Array:
    out = x @ w * scale
    return jax.nn.relu(out) if relu else out


@pytest.mark.parametrize(
    ("size", "loops"), [(1, [7]), (3, [2]), (6, [1]), (7, []), (9, []), (None, [])]
)
def test_size_counts_positions(size: int | None, loops: list[int]) -> None:
    """A chunk has as many positions as asked for; a call that is no longer runs without a loop."""
    assert scans(chunked(product, (0, None), chunk_size=size), X, W) == loops


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_what_is_no_array_is_passed_as_it_is(by_name: bool, relu: bool) -> None:
    """Python values stay Python's, whether by position or name; names go by their position."""
    run = chunked(product, (0, None, None), chunk_size=2)
    found = run(w=W, x=X, relu=relu, scale=2.0) if by_name else run(X, W, 2.0, relu=relu)
    np.testing.assert_allclose(found, product(X, W, 2.0, relu=relu), rtol=1e-6)


def test_a_keyword_has_axes_in_a_dict() -> None:
    """An argument that only its name can give is chunked where ``in_axes`` names it."""

    def masked(x: jax.Array, *, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[:, None], x, 0)

    mask = np.arange(7) % 2 == 0
    found = chunked(masked, {"x": 0, "mask": 0}, chunk_size=3)(X, mask=mask)
    np.testing.assert_array_equal(found, masked(X, mask=jnp.asarray(mask)))


def test_what_is_drawn_does_not_depend_on_chunks() -> None:
    """Each position has a key of its own, of both kinds of keys."""
    bits: Function = jax.vmap(lambda x, key: jax.random.bits(key, (4,)) + x[0].astype(jnp.uint32))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        expected = bits(X, jax.random.split(key, 7))
        for size in (None, 3):
            found = quick_jit(chunked(bits, (0, "split"), chunk_size=size))(X, key)
            np.testing.assert_array_equal(found, expected)


def test_only_training_computes_chunks_again() -> None:
    """Gradients keep nothing of a chunk; what is not differentiated has no program for them."""
    run: Function = chunked(lambda x, w: jnp.tanh(x @ w) @ w.T, (0, None), chunk_size=3)
    gradient: Function = jax.grad(lambda x, w: run(x, w).sum(), (0, 1))
    text = str(jax.make_jaxpr(gradient)(X, W))
    assert text.count(" tanh ") > str(jax.make_jaxpr(run)(X, W)).count(" tanh ")
    assert "[2,3,5]" not in text  # of both whole chunks


def test_gradients_of_shared_half_precision_are_summed_in_float32() -> None:
    """Many chunks err no more than one."""
    x, w = draw(256, 4).astype(jnp.bfloat16), W.astype(jnp.bfloat16)

    def gradient(size: int | None) -> jax.Array:
        run = chunked(product, (0, None), chunk_size=size)
        loss: Function = lambda w: jnp.square(run(x, w).astype(jnp.float32)).sum()  # noqa: E731
        found = quick_jit(jax.grad(loss))(w)
        assert found.dtype == jnp.bfloat16
        wide: jax.Array = found.astype(jnp.float32)
        return wide

    whole = gradient(None)
    np.testing.assert_allclose(gradient(1), whole, atol=0.01 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float16])
@pytest.mark.parametrize("reduce", ["max", "min"])
def test_extremes_of_any_dtype(reduce: str, dtype: Any) -> None:
    """The largest and smallest of what can be ordered, NaN where one is."""
    x = jnp.asarray([[3, 0], [0, 0], [1, 1]]).astype(dtype)
    fn = getattr(jnp, reduce)
    found = chunked(lambda x: fn(x, 0), reduce=reduce, chunk_size=2)(x)
    np.testing.assert_array_equal(found, fn(x, 0))


def test_nothing_to_chunk() -> None:
    """No positions are no loop."""
    assert chunked(product, (0, None), chunk_size=2)(X[:0], W).shape == (0, 5)
    assert chunked(lambda x: x.sum(0), reduce="sum")(X[:0]).shape == (4,)


def test_effects_are_kept() -> None:
    """What a function prints is printed, once for each chunk."""
    seen: list[int] = []

    def told(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(len(x)), x)
        return x

    quick_jit(chunked(told, chunk_size=3))(X)
    jax.effects_barrier()
    assert sorted(seen) == [1, 3, 3]


def test_a_signature_is_kept() -> None:
    """A chunked function looks like what it is made of, and a lambda or partial can be chunked."""
    assert chunked(product).__name__ == "product"
    assert chunked(product, chunk_size=2).__doc__ == product.__doc__


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 2, 3, 4, 8]))
def test_chunks_cover_every_position_once(length: int, size: int, devices: int) -> None:
    """Chunks are no larger than asked for, equal in each device's part, and leave a smaller one."""
    split = make_split(length, size, devices)
    if split is None:
        assert size >= length
        return
    assert split.size <= size
    assert split.size % split.blocks == length % split.blocks == devices % split.blocks == 0
    assert split.count * split.size + split.rest == length
    assert 0 <= split.rest < split.size


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_stacked_and_joined_are_opposites(dim: int, devices: int) -> None:
    """Cutting and joining keep the order of positions."""
    array = draw(2, 12, 3) if dim else draw(12, 3)
    split = make_split(12, 5, devices)
    assert split is not None
    each = split.size // split.blocks
    rest = split.take(array, dim, split.count * each, split.rest // split.blocks)
    np.testing.assert_array_equal(split.joined(split.stacked(array, dim), rest, dim), array)


# --- What answers "auto" --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")
def test_use_answers_auto() -> None:
    """``use(chunk_size=)`` answers "auto" and leaves what is given alone."""
    run: Function = lambda: chunked(product, (0, None))  # noqa: E731  (JAX remembers what it has traced)
    with autochunk.use(chunk_size=2):
        assert scans(run(), X, W) == [3]
        assert scans(chunked(product, (0, None), chunk_size=None), X, W) == []
        with autochunk.use(chunk_size=None):
            assert scans(run(), X, W) == []
    assert scans(run(), X, W) == []
    with pytest.raises(ArgumentError, match="must be a number, a tuple or None"):
        autochunk.use(chunk_size="auto").__enter__()  # type: ignore[arg-type]


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number .* got 0"),
        ({"chunk_size": True}, "got True"),
        ({"chunk_size": 2.5}, "got 2.5"),
        ({"chunk_size": (2, "auto")}, "got .2, 'auto'"),
        ({"reduce": "median"}, "reduce must be None, one of 'sum'"),
        ({"reduce": (0.0, 1)}, "reduce must be"),
        ({"in_axes": 1.5}, "in_axes must be an int"),
        ({"in_axes": {"y": 0}}, "in_axes names 'y'; .* x, w, scale, relu"),
        ({"name": ""}, "name must be a text"),
        ({"memory_budget_mb": -1}, "memory_budget_mb must be a positive"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    """What cannot be right is refused before any call."""
    with pytest.raises(ArgumentError, match=message):
        chunked(product, **settings)


def test_fn_must_be_a_function() -> None:
    """Something else is named."""
    with pytest.raises(ArgumentError, match="fn must be a function of arrays; got 3"):
        chunked(3)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("settings", "args", "message"),
    [
        ({"in_axes": (None, None)}, (X, W), "must name the chunked axis"),
        ({"in_axes": (0, 0)}, (X, W), "equally long .* x has 7, w has 4"),
        ({"in_axes": (2, None)}, (X, W), r"axis 2 of x, which is of shape \(7, 4\)"),
        ({"in_axes": (0, None, 0)}, (X, W, 2.0), "axis 0 of scale, which is 2.0"),
        ({"in_axes": (0,)}, (X, W), "entry for each positional argument; there are 2"),
        ({"in_axes": ({"a": 0}, None)}, (X, W), "for x, which is an array"),
        ({"in_axes": ("rows", None)}, (X, W), "for x got 'rows'"),
        ({"in_axes": (0, "split")}, (X, W), 'says "split" of w'),
        ({"in_axes": ((0, 0), None)}, (X, W), "each axis of x once"),
        (
            {"in_axes": (0, None), "out_axes": 1},
            (X, W),
            "results? for each of the 7 .* 5 along axis 1",
        ),
        ({"in_axes": (0, None), "out_axes": (0, None)}, (X, W), "out_axes"),
        ({"in_axes": (0, None), "chunk_size": (2, 2)}, (X, W), "each of the 1 chunked axes"),
        ({"in_axes": ({"b": 0}, None)}, ({"a": X}, W), "prefix of x"),
    ],
)
def test_calls_are_checked(settings: dict[str, Any], args: tuple[Any, ...], message: str) -> None:
    """What does not fit is told with the name of the argument."""
    with pytest.raises(ArgumentError, match=message):
        chunked(product, **{"chunk_size": 2, **settings})(*args)


@pytest.mark.parametrize(
    ("fn", "reduce", "message"),
    [
        (lambda x: x.sum(0), None, "fn must return one result for each of the 7 positions"),
        (lambda x: (x > 0).sum(0), "mean", "needs floating-point or complex results"),
        (lambda x: (x > 0).any(0), "sum", "needs numeric results; the result is bool"),
        (lambda x: x.sum(0), (jnp.zeros(3), lambda _, b: b), "shapes of reduce's first value"),
        (lambda x: x.sum(0), (0.0, lambda a, b: (a, b)), "structure of reduce's first value"),
    ],
)
def test_results_are_checked(fn: Function, reduce: Any, message: str) -> None:
    """Results that cannot be joined or reduced are refused."""
    with pytest.raises(ArgumentError, match=message):
        chunked(fn, reduce=reduce, chunk_size=2)(X)
