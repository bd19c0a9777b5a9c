"""The ring of one device, and the order of a sequence; ``sharded.py`` has rings of several."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import quick_jit
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from reference import draw

from autochunk import dot_product_attention, ring_attention, ring_order
from autochunk.errors import ArgumentError


def alone(*arrays: Any, **settings: Any) -> Any:
    """``ring_attention`` on a ring of one device."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    function = functools.partial(ring_attention, axis_name="x", **settings)
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)


@given(st.integers(1, 9), st.integers(1, 6))
def test_each_device_has_an_early_part_and_a_late_one(devices: int, size: int) -> None:
    """The positions of all parts add up to the same on each; each is there once."""
    order = ring_order(2 * devices * size, devices)
    assert sorted(order) == list(range(2 * devices * size))
    shares = order.reshape(devices, 2, size)
    assert len(set(shares.sum(axis=(1, 2)))) == 1
    assert (np.diff(shares, axis=-1) == 1).all()
    assert list(shares[:, 0, 0]) == [n * size for n in range(devices)]


@pytest.mark.parametrize(("length", "devices"), [(10, 2), (7, 1), (8, 0)])
def test_a_sequence_that_cannot_be_cut(length: int, devices: int) -> None:
    """The error says what the length must be a multiple of."""
    with pytest.raises(ArgumentError, match="multiple of"):
        ring_order(length, devices)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_a_ring_of_one(balanced: bool, dtype: str, leading: tuple[int, ...]) -> None:
    """It is the attention of its own keys, with any leading dims, in the query's dtype."""
    query, key = (jnp.asarray(draw((*leading, 6, 4, 8)), dtype) for _ in "qk")
    settings: dict[str, Any] = {"is_causal": True, "return_residual": True}
    settings["max_chunk_size_mb"] = None
    out, lse = quick_jit(functools.partial(alone, balanced=balanced, **settings))(query, key, key)
    expected = quick_jit(functools.partial(dot_product_attention, **settings))(query, key, key)
    assert (out.dtype, lse.dtype) == (query.dtype, query.dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for received, wanted in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(
            received.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": 0.1}, "has no dropout; .*it takes .*is_causal"),
        ({"scales": 3, "dropped": None}, "has no dropped and no scales"),
        ({"balanced": True}, "an even number of them with balanced=True; got 5"),
        ({"is_causal": True, "local_window_size": -1}, "local_window_size"),
        ({"max_chunk_size_mb": -1}, "max_chunk_size_mb"),
        ({"implementation": "magic"}, "implementation must be"),
    ],
)
def test_what_it_does_not_take(settings: dict[str, Any], said: str) -> None:
    """Errors say what it takes instead."""
    query = draw((1, 5, 2, 4))
    with pytest.raises(ArgumentError, match=said):
        alone(query, query, query, **settings)


def test_masks_are_of_all_keys() -> None:
    """One of this device's keys alone does not fit, where there are more; shapes are told."""
    query = draw((1, 6, 2, 4))
    with pytest.raises(ArgumentError, match=r"mask must broadcast to .*\(1, 2, 6, 6\); got shape"):
        alone(query, query, query, mask=np.ones((1, 2, 6, 5), bool))
