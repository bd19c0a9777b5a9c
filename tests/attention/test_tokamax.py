"""Which tiles Tokamax's kernels get, without Tokamax; what they give, on a GPU."""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, draw, operands
from test_libraries import NAMES, available, both

from autochunk.attention.kernels import tokamax
from autochunk.attention.kernels.inputs import Inputs, KeyRange, Settings
from autochunk.attention.kernels.tokamax import tiles_of

PLAIN = Settings(1.0, None, None, None, None)
CAUSAL = PLAIN._replace(right=0)


def call(
    rows: int, keys: int, size: int, dtype: Any = jnp.float32, batch: int = 64, **terms: Any
) -> Inputs:
    """Sequences of four heads; terms are sizes of rows and keys, and a dtype."""
    query, key = (
        jax.ShapeDtypeStruct((batch, count, 4, size), jnp.dtype(dtype)) for count in (rows, keys)
    )
    made: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((1, 4, *shape), kind) for name, (shape, kind) in terms.items()
    }
    return Inputs(cast(Any, query), cast(Any, key), cast(Any, key), **made)


HALF: Any = jnp.bfloat16
PAIR = ((256, 256), HALF)


@pytest.mark.parametrize(
    ("name", "inputs", "settings", "forward", "backward"),
    [
        ("mosaic", call(2048, 2048, 64, HALF), PLAIN, (64, 256), (128, 64)),
        ("mosaic", call(2048, 2048, 64, HALF), CAUSAL, (64, 256), None),
        ("mosaic", call(2048, 384, 64, HALF), PLAIN, None, (128, 64)),
        ("mosaic", call(2048, 2048, 128, HALF), PLAIN, None, None),
        (
            "mosaic",
            call(256, 256, 32, HALF, bias=PAIR),
            PLAIN,
            (128, 64),
            (64, 128),
        ),
        ("mosaic", call(384, 384, 32, HALF, bias=((384, 384), HALF)), PLAIN, None, (64, 128)),
        ("mosaic", call(256, 256, 32, HALF, bias=((256, 256), jnp.float32)), PLAIN, None, None),
        ("triton", call(2048, 2048, 64), PLAIN, (128, 64), (64, 128)),
        ("triton", call(2048, 2048, 128), CAUSAL, (128, 64), (64, 128)),
        ("triton", call(256, 256, 64, bias=((256, 256), jnp.float32)), PLAIN, None, None),
        ("triton", call(256, 256, 64, mask=((256, 256), bool)), PLAIN, (128, 64), (32, 128)),
        ("triton", call(1, 4096, 128), PLAIN, None, None),
        ("triton", call(512, 9999, 64, batch=2), PLAIN, None, (64, 128)),
        ("mosaic", call(512, 8192, 64, HALF, batch=2), PLAIN, (64, 256), None),
        ("mosaic", call(4096, 4096, 64, HALF, batch=2), CAUSAL, None, None),
        ("triton", call(197, 197, 64, HALF), PLAIN, (64, 64), (32, 128)),
        ("triton", call(256, 256, 32, HALF, bias=PAIR), PLAIN, (64, 64), (64, 64)),
        (
            "triton",
            call(256, 256, 32, HALF, bias=PAIR, mask=((1, 256), bool)),
            PLAIN,
            (64, 64),
            (32, 128),
        ),
        ("triton", call(2048, 2048, 64), PLAIN._replace(precision="highest"), None, None),
    ],
)
def test_tiles(
    name: Any,
    inputs: Inputs,
    settings: Settings,
    forward: tuple[int, int] | None,
    backward: tuple[int, int] | None,
) -> None:
    """By sizes, dtype and terms: rows and keys of a tile of the output, and of a cotangent."""
    tiles = tiles_of(name, inputs, settings)
    keys = "block_kv" if name == "mosaic" else "block_k"
    sizes = ("block_q_dq", "block_kv_dq") if name == "mosaic" else ("block_m1", "block_n1")
    assert (tiles.forward and (tiles.forward["block_q"], tiles.forward[keys])) == forward
    assert (tiles.backward and tuple(tiles.backward[size] for size in sizes)) == backward


@given(
    name=st.sampled_from(["mosaic", "triton"]),
    sizes=st.tuples(*[st.integers(1, 5000)] * 2, st.integers(1, 300)),
    dtype=st.sampled_from([jnp.float32, HALF, jnp.float16]),
    terms=st.sets(st.sampled_from(["bias", "mask"])),
)
def test_tiles_are_no_larger_than_a_call(
    name: Any, sizes: tuple[int, int, int], dtype: Any, terms: set[str]
) -> None:
    """Of a kernel that loads tiles of rows and keys; heads of over 128 features are left alone."""
    rows, keys, size = sizes
    made: Any = {term: ((rows, keys), bool if term == "mask" else dtype) for term in terms}
    tiles = tiles_of(name, call(rows, keys, size, dtype, **made), PLAIN)
    if size > 128:
        assert tiles == (None, None)
    if name == "triton":
        for fields in filter(None, tiles):
            assert max(fields.values()) <= max(64, rows, keys)
            assert all(
                number & (number - 1) == 0 or field == "num_stages"
                for field, number in fields.items()
            )


@dataclass(frozen=True)
class Config:
    """As Tokamax's, with what this version has."""

    block_q: int
    block_k: int
    num_stages: int
    num_warps: int


@dataclass(frozen=True)
class Op:
    """As Tokamax's, which has the op of its backward pass."""

    config: Any = None
    vjp: Any = None

    def replace(self, **changes: Any) -> Op:
        """Another with some fields."""
        return replace(self, **changes)

    def __call__(self, *_: Any, mask: Any, **others: Any) -> Any:
        """What it was asked for."""
        return self, mask, others


def installed(monkeypatch: pytest.MonkeyPatch, backward: Any) -> list[Any]:
    """A Tokamax with a Triton kernel only; returns what it will have been asked for."""
    asked: list[Any] = []
    parts: dict[str, dict[str, Any]] = {
        "tokamax": {
            "dot_product_attention": lambda *_, implementation, **__: asked.extend(implementation)
        },
        "tokamax._src": {},
        "tokamax._src.ops": {},
        "tokamax._src.ops.attention": {},
        "tokamax._src.ops.attention.api": {"IMPLEMENTATIONS": {"triton": Op(vjp=Op())}},
        "tokamax._src.ops.attention.pallas_triton": {"Config": Config},
        "tokamax._src.ops.attention.pallas_triton_vjp": {"Config": backward},
    }
    for path, names in parts.items():
        module = types.ModuleType(path)
        module.__path__ = []
        for one, value in names.items():
            setattr(module, one, value)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return asked


@pytest.mark.parametrize(
    ("capability", "version"),
    [("9.0", "0.0.17"), ("9.0", "0.0.18"), ("9.0", ""), ("8.0", "0.0.17"), (None, "0.0.17")],
)
def test_a_kernel_is_told_its_tiles(
    monkeypatch: pytest.MonkeyPatch, capability: str | None, version: str
) -> None:
    """On Hopper GPUs by the version that was measured; else it has its own."""
    device = types.SimpleNamespace(compute_capability=capability)
    if capability is None:  # a CPU
        del device.compute_capability
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: device)
    monkeypatch.setattr(tokamax, "_version", lambda: version)
    asked = installed(monkeypatch, backward=dict)
    tokamax.triton(call(256, 256, 64), PLAIN, None)
    if (capability, version) != ("9.0", "0.0.17"):
        assert asked == ["triton"]
        return
    (op,) = asked
    assert op.config == Config(128, 64, 3, 4)
    assert op.vjp.config["block_n1"] == 128


def test_a_version_with_other_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told nothing."""
    monkeypatch.setattr(tokamax, "_is_measured", lambda: True)
    asked = installed(monkeypatch, backward=Config)
    tokamax.triton(call(256, 256, 64), PLAIN, None)
    assert asked == [Op(vjp=Op())]


def test_a_kernel_is_told_a_range_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its tiles, in its mask."""
    monkeypatch.setattr(tokamax, "_is_measured", lambda: True)
    asked = installed(monkeypatch, backward=dict)

    @dataclass(frozen=True)
    class Mask:
        k_start: Any = None
        k_end: Any = None

        def __and__(self, other: Mask) -> Mask:
            return other

    tokamax.triton(call(256, 256, 64), PLAIN, KeyRange(None, jnp.ones(3)))
    op, mask, others = asked[0](1, 2, mask=Mask(), bias=None)
    assert op.config == Config(128, 64, 3, 4)
    assert mask.k_start is None
    assert mask.k_end.tolist() == [1, 1, 1]
    assert others == {"bias": None}


# On a GPU

TILED = {"batch": 16, "heads": 8, "size": 512}  # enough of each for tiles of our choice


@functools.cache
def tiled_forms() -> dict[str, dict[str, Any]]:
    batch, heads, size = TILED.values()
    mask = draw((batch, 1, size, size), 7) < 0.5
    mask[3, :, 2] = False
    padding = np.arange(size) < np.linspace(0, size, batch).astype(int)[:, None, None, None]
    bias = draw((1, heads, size, size), 8).astype(np.float32)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "bias and mask": {"bias": bias, "mask": padding},
        "key lengths": {"key_value_seq_lengths": np.linspace(0, size, batch).astype(np.int32)},
    }


@pytest.mark.gpu
@pytest.mark.parametrize("form", tiled_forms())
@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [
        ("tokamax_mosaic", jnp.bfloat16, 32),
        ("tokamax_mosaic", jnp.bfloat16, 64),
        ("tokamax_triton", jnp.bfloat16, 32),
        ("tokamax_triton", jnp.bfloat16, 64),
        ("tokamax_triton", jnp.float32, 32),
        ("tokamax_triton", jnp.float32, 64),
        ("tokamax_triton", jnp.float32, 128),
    ],
)
def test_every_tile(name: str, dtype: Any, width: int, form: str) -> None:
    """Calls that are large enough for tiles of our choice are as right as others."""
    terms = dict(tiled_forms()[form])
    batch, heads, size = TILED.values()
    arrays = operands((batch,), size, size, heads, heads // 2, width)
    cotangent = jnp.asarray(arrays.pop("cotangent"))
    moving = {one: jnp.asarray(arrays[one]) for one in NAMES}
    if "bias" in terms:
        moving["bias"] = jnp.asarray(terms.pop("bias")).astype(dtype)
    causal = {"is_causal": terms.pop("is_causal", False)}

    def run(implementation: str, settings: dict[str, Any], dtype: Any) -> Any:
        def of(terms: dict[str, Any], *arrays: Any) -> Any:
            return both(implementation, {**settings, **terms}, dtype)(*arrays)

        return jax.jit(of)(terms, moving, cotangent)  # XLA would take seconds for constants

    received = run(available(name), causal, dtype)
    received = jax.tree.map(lambda x: x.astype(jnp.float32), received)
    expected = run("dense", {**causal, "precision": "highest"}, jnp.float32)
    assert_close(received, expected, 5e-3 if dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("form", tiled_forms())
def test_tiled_forms_have_tiles(form: str) -> None:
    """Of some kernel at least, forward or backward, or the test above shows nothing."""
    batch, heads, size = TILED.values()
    query = jax.ShapeDtypeStruct((batch, size, heads, 64), jnp.float32)
    terms: Any = {
        one: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for one, array in tiled_forms()[form].items()
        if one != "is_causal"
    }
    settings = Settings(1.0, None, 0 if form == "causal" else None, None, None)
    found: list[Any] = []
    for width, dtype in ((32, jnp.float32), (64, jnp.float32), (64, jnp.bfloat16)):
        one: Any = query.update(shape=(batch, size, heads, width), dtype=dtype)
        found += tiles_of("triton", Inputs(one, one, one, **terms), settings)
        found += tiles_of("mosaic", Inputs(one, one, one, **terms), settings)
    assert any(found)
