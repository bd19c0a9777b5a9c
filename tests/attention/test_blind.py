"""Rows without a key beside fused kernels: the kernels that put them right, step by step."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import lowering_for_an_h100

from autochunk.attention.kernels import in_place
from autochunk.attention.kernels.blind import put_cotangents, with_cotangents_of_means
from autochunk.attention.kernels.tokamax import quiet

# Leading dims, T', H, G, V, T, and the sizes of what says which rows are blind.
SHAPES = {
    "a mask of all rows": ((2,), 5, 2, 1, 8, 7, (2, 1, 1, 1)),
    "one row, one key": ((), 1, 1, 1, 1, 1, (1, 1, 1)),
    "sizes that divide nothing": ((2, 3), 9, 2, 2, 5, 130, (2, 3, 2, 2, 9)),
    "one mask for all heads": ((1, 2), 300, 1, 3, 16, 64, (1, 2, 1, 1, 300)),
    "one mask for all sequences": ((2, 2), 130, 2, 1, 24, 65, (1, 1, 2, 1, 130)),
    "more rows than are looked at at a time": ((2,), 1100, 1, 2, 8, 3, (2, 1, 2, 1100)),
}


def drawn(shape: str, share: float, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An output, values, and which rows are blind."""
    leading, rows, heads, groups, size, keys, sizes = SHAPES[shape]
    rng = np.random.default_rng(0)
    out = rng.normal(size=(*leading, rows, heads, groups, size))
    value = rng.normal(size=(*leading, keys, heads, size)) + 1
    return (
        jnp.asarray(out, dtype),
        jnp.asarray(value, dtype),
        jnp.asarray(rng.random(sizes) < share),
    )


def by_rows(out: jax.Array, blind: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [..., T', H, G, V]."""
    flags = np.moveaxis(np.asarray(blind), -1, -3)[..., None]
    exact = np.asarray(out, np.float64)
    return exact, np.broadcast_to(flags, exact.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_their_means(shape: str, share: float, dtype: Any) -> None:
    """A blind row's cotangent goes to all values in equal parts, on top of what they have."""
    d_out, d_value, blind = drawn(shape, share, dtype)
    exact, flags = by_rows(d_out, blind)
    added = np.where(flags, exact, 0).sum((-4, -2))[..., None, :, :] / d_value.shape[-3]
    expected = np.asarray(d_value, np.float64) + added
    kernel = put_cotangents(d_value, d_out, blind, interpret=True)
    for found in (kernel, with_cotangents_of_means(d_value, d_out, blind)):
        eps = float(jnp.finfo(dtype).eps)
        received = np.asarray(found, np.float64)
        np.testing.assert_allclose(received, expected, rtol=8 * eps, atol=200 * 1e-7 + eps)
        if not flags.any():
            np.testing.assert_array_equal(received, expected)


def test_what_is_not_finite_stays_where_it_is() -> None:
    """Cotangents of rows that are not blind, and of other sequences, do not matter."""
    d_out, d_value, blind = drawn("a mask of all rows", 0.0, jnp.float32)
    blind = blind.at[0].set(True)
    expected = put_cotangents(d_value, d_out, blind, interpret=True)
    received = put_cotangents(d_value, d_out.at[1].set(jnp.nan), blind, interpret=True)
    np.testing.assert_array_equal(received, expected)


def test_values_that_sequences_share() -> None:
    """Fewer sequences of values than of rows: right all the same."""
    d_out, d_value, blind = drawn("one mask for all sequences", 0.3, jnp.float32)
    received = with_cotangents_of_means(jnp.zeros_like(d_value[:1]), d_out, blind)
    whole = with_cotangents_of_means(jnp.zeros_like(d_value), d_out, blind)
    np.testing.assert_allclose(received, whole.sum(0, keepdims=True), rtol=1e-5, atol=1e-6)


def test_exported_programs_have_no_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept, and Triton's form is not stable; but for what is exported to be run here."""
    monkeypatch.setattr(in_place, "_has_triton", lambda: True)

    def has_kernel() -> bool:
        fresh = functools.partial(with_cotangents_of_means)  # nothing traced is taken again
        out, value, blind = drawn("a mask of all rows", 0.3, jnp.float32)
        return "pallas_call" in str(jax.make_jaxpr(fresh)(value, out, blind))

    assert has_kernel()
    with in_place.lowering(for_export=False):
        assert has_kernel()
    with in_place.lowering(for_export=True):
        assert not has_kernel()
    with in_place.for_this_machine(), in_place.lowering(for_export=True):
        assert has_kernel()
    assert has_kernel()


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_takes_the_kernels(shape: str) -> None:
    """As far as can be told without a GPU: what is written is the first operand's own memory."""
    out, value, blind = (jax.typeof(one) for one in drawn(shape, 0.3, jnp.bfloat16))
    with lowering_for_an_h100(), quiet():
        traced = jax.jit(put_cotangents).trace(value, out, blind)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line)
    assert re.search(r"output_operand_alias<.*operand_index = 0", call)
