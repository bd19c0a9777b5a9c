"""``MultiHeadAttention`` against haiku's own: one must be exchangeable for the other."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from reference import assert_close, draw, draw_mask, structure

from autochunk import MultiHeadAttention
from autochunk.errors import ArgumentError

LIMIT = 1e-4  # MB: slices everything below
Module = Callable[..., Any]
KEY = jax.random.PRNGKey(7)


def w_init() -> hk.initializers.Initializer:
    return hk.initializers.VarianceScaling(2.0)


def applied(module: Module, *arguments: Any, **settings: Any) -> Callable[..., jax.Array]:
    def run(*arrays: Any) -> jax.Array:
        made: jax.Array = module(*arguments, **settings)(*arrays)
        return made

    return run


def transformed(module: Module, **settings: Any) -> hk.Transformed:
    settings = {"num_heads": 2, "key_size": 4, "w_init": w_init()} | settings
    return hk.without_apply_rng(hk.transform(applied(module, **settings)))


def theirs_and_ours(**settings: Any) -> tuple[hk.Transformed, hk.Transformed]:
    """Haiku's module, and this one with slices."""
    return (
        transformed(hk.MultiHeadAttention, **settings),
        transformed(MultiHeadAttention, max_chunk_size_mb=LIMIT, **settings),
    )


def inputs(
    leading: tuple[int, ...] = (2,),
    rows: int = 6,
    keys: int = 5,
    *,
    sizes: tuple[int, int, int] = (7, 5, 3),
    mask: tuple[int, ...] | None = None,
    dtype: Any = np.float32,
) -> list[Any]:
    """Query, key and value, each of its own size, and maybe a mask."""
    arrays = [
        draw((*leading, length, size), size, dtype)
        for length, size in zip((rows, keys, keys), sizes, strict=True)
    ]
    return [*arrays, draw_mask(mask)] if mask is not None else arrays


def results(function: hk.Transformed, params: Any, arrays: list[Any]) -> dict[str, Any]:
    """Output, and gradients of parameters and inputs."""

    @quick_jit
    def both(params: Any, moving: list[Any], rest: list[Any]) -> dict[str, Any]:
        out, pull = jax.vjp(
            lambda params, moving: function.apply(params, *moving, *rest), params, moving
        )
        return {"output": out, "gradients": pull(jnp.cos(out))}

    found: dict[str, Any] = both(params, arrays[:3], arrays[3:])
    return found


CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "value size, without bias": ({"value_size": 3, "with_bias": False}, {}),
    "model size, named": ({"model_size": 9, "name": "cross"}, {}),
    "all sizes, initialised bias": (
        {"value_size": 3, "model_size": 9, "b_init": hk.initializers.RandomNormal()},
        {"mask": (2, 1, 6, 5)},
    ),
    "one head": ({"num_heads": 1, "key_size": 3}, {"mask": (1, 1, 6, 5)}),
    "no leading dims": ({}, {"leading": ()}),
    "no leading dims, mask": ({}, {"leading": (), "mask": (1, 6, 5)}),
    "two leading dims": ({}, {"leading": (2, 3), "rows": 3, "keys": 4}),
    "two leading dims, mask": (
        {},
        {"leading": (2, 3), "rows": 3, "keys": 4, "mask": (2, 1, 1, 3, 4)},
    ),
    "mask by head": ({}, {"mask": (1, 2, 6, 5)}),
    "mask of keys": ({}, {"mask": (2, 1, 1, 5)}),
    "decoding": ({}, {"rows": 1, "keys": 11}),
}


@pytest.mark.parametrize(("settings", "shape"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_like_haiku(settings: dict[str, Any], shape: dict[str, Any]) -> None:
    """With the same rng the parameters have haiku's names, shapes and values.

    Output and gradients are haiku's.
    """
    arrays = inputs(**shape)
    theirs, ours = theirs_and_ours(**settings)
    their_params, our_params = quick_jit(
        lambda: [one.init(KEY, *arrays) for one in (theirs, ours)]
    )()
    assert_close(our_params, their_params, 0.0)
    assert_close(results(ours, their_params, arrays), results(theirs, their_params, arrays))


@pytest.mark.parametrize(
    "settings",
    [{"max_chunk_size_mb": None}, {"implementation": "xla_rows"}, {"implementation": "dense"}],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    """Limit and implementation change how it is computed, not what."""
    arrays = inputs(mask=(2, 1, 6, 5))
    theirs = transformed(hk.MultiHeadAttention)
    ours = transformed(MultiHeadAttention, **{"max_chunk_size_mb": LIMIT} | settings)
    params = quick_jit(theirs.init)(KEY, *arrays)
    assert_close(results(ours, params, arrays), results(theirs, params, arrays))


def test_a_checkpoint_loads(tmp_path: Path) -> None:
    """Parameters that haiku's module wrote to a file are this one's, path by path, and back.

    No conversion is needed.
    """

    def model(module: Module, **settings: Any) -> hk.Transformed:
        def run(x: jax.Array) -> jax.Array:
            for _ in range(2):
                x = x + module(2, 4, w_init=w_init(), **settings)(x, x, x)
            return hk.Linear(1)(x)

        return hk.without_apply_rng(hk.transform(run))

    theirs, ours = model(hk.MultiHeadAttention), model(MultiHeadAttention, max_chunk_size_mb=LIMIT)
    x = draw((2, 3, 8))
    params = quick_jit(theirs.init)(KEY, x)
    flat = {
        f"{module}:{name}": array for module in params for name, array in params[module].items()
    }
    np.savez(tmp_path / "checkpoint.npz", **flat)
    loaded: dict[str, dict[str, Any]] = {}
    for path, array in np.load(tmp_path / "checkpoint.npz").items():
        module, _, name = path.partition(":")
        loaded.setdefault(module, {})[name] = array
    assert structure(jax.eval_shape(ours.init, KEY, x)) == structure(params)
    assert_close(quick_jit(ours.apply)(loaded, x), quick_jit(theirs.apply)(params, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any) -> None:
    """Half-precision inputs give half-precision outputs, as close to float32's as haiku's are."""
    arrays = inputs(mask=(2, 1, 1, 5))
    arrays[3][..., 0] = True
    params = quick_jit(transformed(hk.MultiHeadAttention).init)(KEY, *arrays)
    half = [array.astype(dtype) for array in arrays[:3]] + arrays[3:]
    half_params = jax.tree.map(lambda array: array.astype(dtype), params)
    exact = quick_jit(transformed(hk.MultiHeadAttention).apply)(params, *arrays)
    theirs, ours = (quick_jit(one.apply)(half_params, *half) for one in theirs_and_ours())
    assert ours.dtype == theirs.dtype == dtype
    their_error, our_error = (
        float(jnp.max(jnp.abs(array.astype(jnp.float32) - exact))) for array in (theirs, ours)
    )
    rounding = float(jnp.finfo(dtype).eps / jnp.finfo(jnp.bfloat16).eps)
    assert our_error <= 1.5 * their_error + 0.02 * rounding


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_mask_of_numbers(kind: Any) -> None:
    """As haiku's module takes any number that is not zero for true, so does this."""
    arrays = inputs(mask=(2, 1, 6, 5))
    arrays[3] = 3 * arrays[3].astype(kind)
    theirs, ours = theirs_and_ours()
    params = quick_jit(theirs.init)(KEY, *arrays)
    assert_close(quick_jit(ours.apply)(params, *arrays), quick_jit(theirs.apply)(params, *arrays))


def test_rows_masked_throughout() -> None:
    """A row that is masked throughout behaves as in haiku, in gradients, too."""
    arrays = inputs(mask=(2, 1, 6, 5))
    arrays[3][0, :, :2] = arrays[3][1] = False
    theirs, ours = theirs_and_ours()
    params = quick_jit(theirs.init)(KEY, *arrays)
    assert_close(results(ours, params, arrays), results(theirs, params, arrays))


BROADCASTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "leading dim of one": ((1,), (1,), np.float32),
    "fewer leading dims": ((), (), np.float32),
    "one value for all": ((2,), (1,), np.float32),
    "keys and values of another dtype": ((2,), (2,), jnp.bfloat16),
}


@pytest.mark.parametrize(
    ("key_leading", "value_leading", "dtype"), BROADCASTS.values(), ids=BROADCASTS.keys()
)
def test_keys_that_broadcast(
    key_leading: tuple[int, ...], value_leading: tuple[int, ...], dtype: Any
) -> None:
    """Queries' leading dims may share keys and values, or these have another dtype, as in haiku."""
    arrays = [
        draw((2, 6, 7)),
        draw((*key_leading, 5, 5)).astype(dtype),
        draw((*value_leading, 5, 3)).astype(dtype),
    ]
    theirs, ours = theirs_and_ours()
    with jax.numpy_rank_promotion("allow"):
        params = quick_jit(theirs.init)(KEY, *arrays)
        assert_close(
            quick_jit(ours.apply)(params, *arrays), quick_jit(theirs.apply)(params, *arrays), 2e-2
        )


# --- Errors and signature -------------------------------------------------------------------------


def error_of(
    module: Module, *arguments: Any, call: list[Any] | None = None, **settings: Any
) -> tuple[type, str, list[tuple[type, str]]]:
    """Type and text of what is raised, and the warnings given."""
    initialise = hk.transform(applied(module, *arguments, **settings)).init
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Exception) as error:  # noqa: PT011  (compared by the test)
            jax.eval_shape(initialise, KEY, *(call or inputs()))
    said = [(warning.category, str(warning.message)) for warning in caught]
    return error.type, str(error.value), said


MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no initialiser": ((2, 4), {}),
    "both initialisers": ((2, 4, 1.0), {"w_init": w_init()}),
    "mask of lower rank": ((2, 4), {"w_init": w_init(), "call": inputs(mask=(6, 5))}),
    "mask of higher rank": ((2, 4), {"w_init": w_init(), "call": inputs(mask=(2, 1, 1, 6, 5))}),
    "no heads": ((), {"w_init": w_init()}),
}


@pytest.mark.parametrize(("arguments", "settings"), MISTAKES.values(), ids=MISTAKES.keys())
def test_errors_are_haikus(arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """What haiku refuses is refused with the same type and words, after the same warnings."""
    theirs = error_of(hk.MultiHeadAttention, *arguments, **settings)
    ours = error_of(MultiHeadAttention, *arguments, max_chunk_size_mb=LIMIT, **settings)
    assert ours == theirs


def test_w_init_scale_is_deprecated_as_in_haiku() -> None:
    """``w_init_scale``, third by position, gives haiku's parameters and DeprecationWarning."""
    arrays = inputs()
    init = hk.initializers.VarianceScaling(0.5)
    theirs = hk.transform(applied(hk.MultiHeadAttention, 2, 4, w_init=init))
    ours = hk.transform(applied(MultiHeadAttention, 2, 4, 0.5, max_chunk_size_mb=LIMIT))
    expected = quick_jit(theirs.init)(KEY, *arrays)
    with pytest.warns(DeprecationWarning, match="w_init_scale is deprecated"):
        params = quick_jit(ours.init)(KEY, *arrays)
    assert_close(params, expected, 0.0)


def test_signature() -> None:
    """Whatever haiku takes by position or by name is taken in the same way.

    The two new arguments are by name only.
    """

    def names(function: Callable[..., Any], kind: Any) -> list[str]:
        parameters = inspect.signature(function).parameters
        return [name for name, parameter in parameters.items() if parameter.kind is kind]

    theirs, ours = hk.MultiHeadAttention, MultiHeadAttention
    by_position, by_name = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    assert names(ours.__init__, by_position) == names(theirs.__init__, by_position)
    new = set(names(ours.__init__, by_name)) - inspect.signature(theirs.__init__).parameters.keys()
    assert new == {"max_chunk_size_mb", "implementation"}
    their_call, our_call = (inspect.signature(one.__call__).parameters for one in (theirs, ours))
    assert list(our_call) == list(their_call)
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_chunk_size_mb": 0},
        {"max_chunk_size_mb": "big"},
        {"max_chunk_size_mb": True},
        {"implementation": "cuda"},
    ],
    ids=str,
)
def test_settings_are_checked_at_construction(settings: dict[str, Any]) -> None:
    """A setting that cannot be is refused where it is written, before any array is there."""

    def construct() -> None:
        MultiHeadAttention(2, 4, w_init=w_init(), **settings)

    (name,) = settings
    with pytest.raises(ArgumentError, match=name):
        jax.eval_shape(hk.transform(construct).init, KEY)


@pytest.mark.parametrize("wrap", [hk.remat, hk.vmap, None], ids=["remat", "vmap", "layer_stack"])
def test_haikus_own_transformations(wrap: Any) -> None:
    """Under ``hk.remat``, ``hk.vmap`` and ``hk.experimental.layer_stack`` gradients are haiku's."""

    def model(module: Module, **settings: Any) -> hk.Transformed:
        def layer(x: jax.Array) -> jax.Array:
            attended: jax.Array = module(2, 4, w_init=w_init(), **settings)(x, x, x)
            return x + attended

        def run(x: jax.Array) -> Any:
            if wrap is None:
                return hk.experimental.layer_stack(2)(layer)(x)
            return wrap(layer, **({"split_rng": False} if wrap is hk.vmap else {}))(x)

        return hk.without_apply_rng(hk.transform(run))

    theirs, ours = model(hk.MultiHeadAttention), model(MultiHeadAttention, max_chunk_size_mb=LIMIT)
    x = draw((2, 2, 3, 8))
    with jax.numpy_rank_promotion("allow"):
        params = quick_jit(theirs.init)(KEY, x)
        received, expected = (
            quick_jit(
                jax.grad(lambda params, one: jnp.sum(jnp.sin(one.apply(params, x)))),
                static_argnums=1,
            )(params, one)
            for one in (ours, theirs)
        )
    assert_close(received, expected, 1e-4)


@pytest.mark.parametrize("limit", [None, 1e-4])
def test_strict_promotion_of_dtypes(limit: float | None) -> None:
    """A model that forbids implicit promotion runs in half precision, as with haiku's module."""

    def apply(x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling()
        module = MultiHeadAttention(2, 4, w_init=init, max_chunk_size_mb=limit)
        out: jax.Array = module(x, x, x, jnp.tril(jnp.ones((1, 1, 6, 6), bool)))
        return out

    model: hk.Transformed = hk.without_apply_rng(hk.transform(apply))
    x = jnp.ones((1, 6, 8), jnp.bfloat16)
    parameters = model.init(jax.random.key(0), x)
    half = jax.tree.map(lambda one: one.astype(jnp.bfloat16), parameters)
    with jax.numpy_dtype_promotion("strict"):
        out, pull = jax.vjp(lambda parameters: model.apply(parameters, x), half)
        assert {one.dtype for one in jax.tree.leaves((out, pull(out)))} == {jnp.dtype(jnp.bfloat16)}
