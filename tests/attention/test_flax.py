"""``attention_fn`` against Flax's own functions, alone and in Flax's modules."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from flax import linen, nnx
from reference import assert_close, compiled_text, draw, draw_mask, largest_array

from autochunk.errors import ArgumentError
from autochunk.flax import attention_fn, make_attention_fn

pytestmark = pytest.mark.filterwarnings("ignore::autochunk.errors.MissWarning")

SMALLEST = 8e-6  # MB: one logit at a time, of any dtype
LIMITS = pytest.mark.parametrize("limit", [SMALLEST, None], ids=["smallest", "no limit"])
Q, K, V = (2, 5, 4, 3), (2, 6, 4, 3), (2, 6, 4, 3)
HALF = jnp.bfloat16


def heads(*shapes: tuple[int, ...], dtypes: Any = (np.float32,) * 3) -> list[Any]:
    drawn = zip(shapes or (Q, K, V), dtypes, strict=True)
    return [
        jnp.asarray(draw(shape, seed)).astype(dtype) for seed, (shape, dtype) in enumerate(drawn)
    ]


def all_three(theirs: Callable[..., Any], *arrays: jax.Array, **settings: Any) -> list[jax.Array]:
    """What Flax's function gives, and ours with the smallest slices and with none."""
    limited = (functools.partial(attention_fn, max_chunk_size_mb=one) for one in (SMALLEST, None))
    functions: list[Callable[..., Any]] = [theirs, *limited]
    found: list[jax.Array] = quick_jit(
        lambda *arrays: [function(*arrays, **settings) for function in functions]
    )(*arrays)
    return found


SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "boolean mask": {"mask": draw_mask((2, 1, 5, 6))},
    "float mask": {"mask": draw_mask((2, 4, 5, 6)).astype(np.float32)},
    "integer mask that broadcasts": {"mask": draw_mask((1, 6)).astype(np.int32) * 7},
    "rows that see nothing": {"mask": np.zeros((2, 1, 5, 6), np.float32)},
    "bias": {"bias": draw((1, 4, 5, 6))},
    "integer bias and mask": {"bias": np.arange(30).reshape(1, 1, 5, 6), "mask": draw_mask((5, 6))},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
    "dropout of none": {"dropout_rate": 0.5, "deterministic": True},
    "dtype": {"dtype": HALF},
}
NNX = SHARED | {
    "causal": {"is_causal": True},
    "causal and a mask": {"is_causal": True, "mask": draw_mask((2, 1, 5, 6))},
    "promotion by the caller": {"promote_dtype": nnx.nn.dtypes.promote_dtype, "dtype": HALF},
}
LINEN = SHARED | {"softmax in float32": {"force_fp32_for_softmax": True}}


PAIRS = [
    *(pytest.param(nnx.dot_product_attention, one, id=f"nnx {name}") for name, one in NNX.items()),
    *(
        pytest.param(linen.dot_product_attention, one, id=f"linen {name}")
        for name, one in LINEN.items()
    ),
]


@pytest.mark.parametrize(("theirs", "settings"), PAIRS)
def test_what_flax_computes(theirs: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Outputs are those of Flax's own function, in the smallest slices and in none."""
    expected, *received = all_three(theirs, *heads(), **settings)
    for one in received:
        assert_close(one, expected, 3e-2 if settings.get("dtype") == HALF else 2e-5)
        assert one.dtype == expected.dtype


@pytest.mark.parametrize("name", ["float mask", "integer bias and mask"])
def test_gradients(name: str) -> None:
    """They are those of Flax's own function."""

    def gradients(function: Callable[..., Any]) -> Any:
        loss = lambda *moving: jnp.sum(jnp.sin(function(*moving, **SHARED[name])))  # noqa: E731
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*heads())

    assert_close(
        gradients(make_attention_fn(max_chunk_size_mb=SMALLEST)),
        gradients(linen.dot_product_attention),
    )


@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [
        pytest.param((Q[1:], K[1:], V[1:]), (np.float32,) * 3, id="no leading dims"),
        pytest.param([(3, *one) for one in (Q, K, V)], (np.float32,) * 3, id="two leading dims"),
        pytest.param((Q, (2, 6, 2, 3), (2, 6, 2, 3)), (np.float32,) * 3, id="grouped heads"),
        pytest.param((Q, K, V), (np.float32, HALF, HALF), id="several dtypes"),
        pytest.param((Q, K, V), (HALF, HALF, np.int32), id="integers"),
    ],
)
def test_shapes_and_dtypes(shapes: Any, dtypes: Any) -> None:
    """Any that nnx takes give what nnx gives, promoted as there."""
    arrays = heads(*shapes, dtypes=dtypes)
    expected, *received = all_three(nnx.dot_product_attention, *arrays)
    for one in received:
        assert one.dtype == expected.dtype
        assert_close(one, expected, 2e-5 if expected.dtype == np.float32 else 2e-2)


def test_what_slices_cannot_do_is_linens() -> None:
    """Complex numbers are computed as without ours, dropout included."""
    arrays = [one * (1 + 2j) for one in heads()]
    settings: dict[str, Any] = {
        "bias": draw((1, 4, 5, 6)),
        "mask": draw_mask((2, 1, 5, 6)),
        "dropout_rate": 0.5,
        "dropout_rng": jax.random.key(3),
    }
    expected, *received = all_three(linen.dot_product_attention, *arrays, **settings)
    assert expected.dtype == jnp.complex64
    for one in received:
        np.testing.assert_array_equal(one, expected)


def test_the_output_is_float32_where_the_softmax_must_be() -> None:
    """``force_fp32_for_softmax`` gives linen's dtype of half-precision inputs, too."""
    query, key, value = heads(dtypes=(HALF,) * 3)
    received = attention_fn(query, key, value, force_fp32_for_softmax=True)
    expected = linen.dot_product_attention(query, key, value, force_fp32_for_softmax=True)
    assert received.dtype == expected.dtype == np.float32
    assert_close(received, expected, 2e-2)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"dropout_rate": 0.0}, np.float32),
        ({}, HALF),
        ({"bias": np.zeros((1, 1, 5, 6), HALF)}, HALF),
        ({"bias": np.zeros((1, 1, 5, 6), np.float32)}, np.float32),
        ({"force_fp32_for_softmax": True}, np.float32),
    ],
    ids=["no dropout", "dropout", "bias", "float32 bias", "float32 asked for"],
)
def test_dense_weights_have_flaxs_precision(settings: dict[str, Any], dtype: Any) -> None:
    """What a dense plan keeps of all weights for the backward pass is as wide as Flax's is."""
    given: dict[str, Any] = {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)} | settings

    def kept(function: Callable[..., Any]) -> set[Any]:
        run = functools.partial(jax.vjp, functools.partial(function, **given))
        _, pull = jax.eval_shape(run, *heads(dtypes=(HALF,) * 3))
        shape = (2, 4, 5, 6)
        return {x.dtype for x in jax.tree.leaves(pull) if x.shape == shape and x.dtype != bool}

    dense = functools.partial(attention_fn, max_chunk_size_mb=None, implementation="dense")
    assert kept(dense) == {jnp.dtype(dtype)}
    if given["dropout_rate"]:  # else nnx leaves it to jax.nn, which keeps something else
        assert jnp.result_type(*kept(linen.dot_product_attention)) == dtype


def weights(function: Callable[..., Any], **settings: Any) -> np.ndarray[Any, Any]:
    """What a function weighs values with: [2, H=4, T'=5, T=64]."""
    query, key = draw((2, 5, 4, 3)), draw((2, 64, 4, 3), 1)
    value = jnp.broadcast_to(jnp.eye(64)[None, :, None], (2, 64, 4, 64))
    return np.asarray(jnp.moveaxis(quick_jit(function)(query, key, value, **settings), -2, -3))


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout(broadcast: bool) -> None:
    """A share of the weights is zero, the same for all heads if so asked; others make up for it.

    Slices make no difference.
    """
    whole = weights(attention_fn, max_chunk_size_mb=None)
    settings: dict[str, Any] = {"dropout_rate": 0.25, "broadcast_dropout": broadcast}
    drop = functools.partial(attention_fn, dropout_rng=jax.random.key(3), **settings)
    dropped = weights(functools.partial(drop, max_chunk_size_mb=None))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)
    assert 0.65 < kept.mean() < 0.85
    assert (kept == kept[:1, :1]).all() == broadcast
    np.testing.assert_allclose(
        weights(functools.partial(drop, max_chunk_size_mb=SMALLEST)), dropped, atol=1e-6
    )


# --- In Flax's modules ----------------------------------------------------------------------------


def nnx_module(function: Callable[..., Any] | None, **settings: Any) -> Any:
    given: dict[str, Any] = {} if function is None else {"attention_fn": function}
    settings = {"num_heads": 4, "in_features": 8, "decode": False} | settings
    return nnx.MultiHeadAttention(**settings, **given, rngs=nnx.Rngs(0))


def linen_module(function: Callable[..., Any] | None, **settings: Any) -> Any:
    given: dict[str, Any] = {} if function is None else {"attention_fn": function}
    return linen.MultiHeadDotProductAttention(num_heads=4, **settings, **given)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, None),
        ({"num_kv_heads": 2}, SMALLEST),
        ({"normalize_qk": True}, SMALLEST),
        ({"param_dtype": HALF, "dtype": HALF}, SMALLEST),
    ],
    ids=str,
)
def test_a_module_of_nnx(settings: dict[str, Any], limit: float | None) -> None:
    """Same parameters, same output, with a mask of Flax's makers and grouped heads."""
    x = draw((2, 5, 8))
    mask = nnx.make_causal_mask(jnp.ones((2, 5)))
    assert mask.dtype == np.float32
    ours = nnx_module(make_attention_fn(max_chunk_size_mb=limit), **settings)
    received = nnx.jit(lambda module, x: module(x, mask=mask))(ours, x)
    expected = nnx_module(None, **settings)(x, mask=mask)
    assert_close(received, expected, 3e-2 if settings.get("dtype") else 2e-5)


@LIMITS
def test_a_module_of_linen(limit: float | None) -> None:
    """Same parameters, same output."""
    x, mask = draw((2, 5, 8)), linen.make_causal_mask(jnp.ones((2, 5)))
    theirs, ours = linen_module(None), linen_module(make_attention_fn(max_chunk_size_mb=limit))
    variables = theirs.init(jax.random.key(0), x)
    assert_close(ours.init(jax.random.key(0), x), variables)
    assert_close(
        quick_jit(ours.apply)(variables, x, mask=mask), theirs.apply(variables, x, mask=mask)
    )


@LIMITS
def test_decoding_with_nnx(limit: float | None) -> None:
    """With the cache each position gives what it gives in the whole sequence."""
    x = draw((2, 5, 8))
    module = nnx_module(make_attention_fn(max_chunk_size_mb=limit), num_kv_heads=2)
    whole = module(x, mask=nnx.make_causal_mask(jnp.ones((2, 5))))
    module.init_cache(x.shape)
    step = nnx.jit(lambda module, x: module(x, decode=True))
    outs = [step(module, x[:, position : position + 1]) for position in range(5)]
    assert_close(jnp.concatenate(outs, axis=1), whole)


@LIMITS
def test_decoding_with_linen(limit: float | None) -> None:
    """With the cache each position gives what it gives in the whole sequence."""
    x = draw((2, 5, 8))
    fn = make_attention_fn(max_chunk_size_mb=limit)
    module = linen_module(fn, decode=True)
    variables = module.init(jax.random.key(0), x)
    whole = linen_module(fn).apply(variables, x, mask=linen.make_causal_mask(jnp.ones((2, 5))))
    cache = variables["cache"]
    outs: list[jax.Array] = []
    step = quick_jit(functools.partial(module.apply, mutable=["cache"]))
    for position in range(5):
        variables = {"params": variables["params"], "cache": cache}
        out, changed = step(variables, x[:, position : position + 1])
        cache, outs = changed["cache"], [*outs, out]
    assert_close(jnp.concatenate(outs, axis=1), whole)


def test_dropout_in_modules() -> None:
    """Training drops, anew with another key; evaluation does not."""
    x, settings = draw((2, 5, 8)), {"dropout_rate": 0.5}
    module = nnx_module(attention_fn, **settings)
    without = nnx_module(None)(x)
    assert_close(module(x, deterministic=True), without)
    drawn = [module(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    assert not np.allclose(drawn[0], without)

    made = linen_module(attention_fn, **settings)
    variables = made.init(jax.random.key(0), x, deterministic=True)
    apply = functools.partial(made.apply, variables, x)
    dropped = [apply(deterministic=False, rngs={"dropout": jax.random.key(n)}) for n in (1, 2)]
    assert not np.allclose(dropped[0], dropped[1])
    assert_close(apply(deterministic=True), linen_module(None).apply(variables, x))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a module": ({"module": nnx.Module()}, "module must be None.*sow_weights=False"),
    "a dot_general": ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general must be"),
    "einsums": ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum must be None"),
    "the other einsum": ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum"),
    "a rate": ({"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)}, r"in the range \[0, 1\)"),
    "no key": ({"dropout_rate": 0.5}, "dropout_rng is required"),
    "complex and causal": ({"dtype": jnp.complex64, "is_causal": True}, "pass it as the mask"),
    "a limit": ({"max_chunk_size_mb": 0}, "max_chunk_size_mb must be"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_an_error(settings: dict[str, Any], message: str) -> None:
    """Never silence: an ArgumentError, which is a ValueError as Flax's."""
    with pytest.raises(ArgumentError, match=message):
        attention_fn(*heads(), **settings)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((Q, K[1:], V[1:]), "same rank"),
        ((Q, (3, *K[1:]), (3, *V[1:])), "batch dims"),
        ((Q, K, (2, 5, 4, 3)), "lengths must match"),
        ((Q, (2, 6, 4, 2), V), "depths must match"),
        (((2, 5, 5, 3), (2, 6, 2, 3), (2, 6, 2, 3)), "must be a multiple"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(shapes: Any, message: str) -> None:
    """They are an error in the words of Flax."""
    with pytest.raises(ArgumentError, match=message):
        attention_fn(*heads(*shapes))


def test_weights_that_are_sown_are_an_error() -> None:
    """Both libraries' ``sow_weights`` say so, rather than sow nothing."""
    x = draw((2, 5, 8))
    with pytest.raises(ArgumentError, match="sow"):
        nnx_module(attention_fn)(x, sow_weights=True)
    module = linen_module(attention_fn)
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ArgumentError, match="sow"):
        module.apply(variables, x, sow_weights=True, mutable=["intermediates"])


def test_the_limit_holds_in_a_module() -> None:
    """No array of a compiled module is as large as the logits, forward or training."""
    x = draw((2, 64, 8))
    for limit, holds in ((0.0045, True), (None, False)):
        graph, state = nnx.split(nnx_module(make_attention_fn(max_chunk_size_mb=limit)))
        loss = lambda state, x, graph=graph: jnp.sum(nnx.merge(graph, state)(x) ** 2)  # noqa: E731
        largest = largest_array(compiled_text(quick_jit(jax.grad(loss)), state, x))
        assert (largest < 2 * 4 * 64 * 64 * 4) == holds


def test_equal_settings_give_one_function() -> None:
    """So that modules of equal settings are equal to ``nnx.jit``, and can be pickled."""
    made = [make_attention_fn(max_chunk_size_mb=limit) for limit in (64, 64, 32)]
    assert made[0] is made[1]
    assert made[0] != made[2]
    assert pickle.loads(pickle.dumps(made[0])).keywords == made[0].keywords  # type: ignore[attr-defined]
    graphs = [nnx.graphdef(nnx_module(function)) for function in made]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    "settings", [{"max_chunk_size_mb": -1}, {"implementation": "cuda"}], ids=str
)
def test_settings_are_checked_at_once(settings: dict[str, Any]) -> None:
    """``make_attention_fn`` refuses what no call could use."""
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        make_attention_fn(**settings)
