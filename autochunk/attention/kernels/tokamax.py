"""How Tokamax's kernels are called, and with which tiles.

Tokamax has tiles that were tuned for some shapes on an H100, and the same ones for all others, of
which its functions have no argument. The rules here say which of its search spaces were faster on
Hopper GPUs, by times in ``EXPERIMENTS.md``. What was not measured, or may need more shared memory
than was seen to fit, is left to Tokamax.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import pkgutil
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.extend.backend

from autochunk.attention.kernels.inputs import Inputs, KeyRange, Settings

_Name = Literal["mosaic", "triton"]

_MEASURED_VERSION = "0.0.17"
_OPS = "tokamax._src.ops.attention"
# What has the tiles of its forward and of its backward pass.
_CONFIGS: dict[_Name, tuple[str, str]] = {
    "mosaic": ("pallas_mosaic_gpu:ConfigSM90", "pallas_mosaic_gpu_vjp:Config"),
    "triton": ("pallas_triton:Config", "pallas_triton_vjp:Config"),
}


class Tiles(NamedTuple):
    """Fields of a kernel's configs; None is what Tokamax chooses."""

    forward: dict[str, Any] | None
    backward: dict[str, Any] | None


def _attend(inputs: Inputs, settings: Settings, key_range: KeyRange | None, name: _Name) -> Any:
    import tokamax

    window: tuple[int, int] | None = None
    if settings.left is not None or settings.right not in (None, 0):
        rows, keys = _sizes(inputs)
        left, right = settings.left, settings.right
        window = (rows if left is None else left, keys if right is None else right)
    tiles = tiles_of(name, inputs, settings) if _is_measured() else Tiles(None, None)
    return tokamax.dot_product_attention(
        *inputs[:5],
        scale=settings.scale,
        is_causal=settings.is_causal and window is None,
        local_window_size=window,
        query_seq_lengths=inputs.query_seq_lengths,
        key_value_seq_lengths=inputs.key_value_seq_lengths,
        logits_soft_cap=settings.soft_cap,
        precision="default" if settings.precision is None else settings.precision,
        implementation=[_kernel(name, tiles, key_range)],
    )


mosaic = functools.partial(_attend, name="mosaic")
"""``Kernel.attend`` of the one in Pallas Mosaic GPU."""

triton = functools.partial(_attend, name="triton")
"""``Kernel.attend`` of the one in Pallas Triton."""


def _is_measured() -> bool:
    """Whether tiles were measured on such a GPU, of this version of Tokamax.

    Those of another may need more memory than there is, or be slower than what it chooses.
    """
    device = jax.extend.backend.get_default_device()
    is_hopper = str(getattr(device, "compute_capability", "")).startswith("9.")
    return is_hopper and _version() == _MEASURED_VERSION


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _kernel(name: _Name, tiles: Tiles, key_range: KeyRange | None) -> Any:
    """A kernel that is told its tiles and a range of keys, by itself or by its name.

    Just by its name where a version keeps its kernels elsewhere.
    """
    if tiles == (None, None) and key_range is None:
        return name
    try:
        from tokamax._src.ops.attention.api import IMPLEMENTATIONS

        kernel = _tiled(name, IMPLEMENTATIONS["mosaic_gpu" if name == "mosaic" else name], tiles)
    except (ImportError, KeyError):
        return name
    if key_range is None:
        return kernel

    def attend(*arrays: Any, mask: Any, **others: Any) -> Any:
        mask &= type(mask)(k_start=key_range.first, k_end=key_range.end)
        return kernel(*arrays, mask=mask, **others)

    return attend


def _tiled(name: _Name, kernel: Any, tiles: Tiles) -> Any:
    try:
        configs = [pkgutil.resolve_name(f"{_OPS}.{path}") for path in _CONFIGS[name]]
        forward, backward = (
            None if fields is None else config(**fields)
            for config, fields in zip(configs, tiles, strict=True)
        )
        return kernel.replace(config=forward, vjp=kernel.vjp.replace(config=backward))
    except (AttributeError, ImportError, TypeError, ValueError):  # of a version with others
        return kernel


def tiles_of(name: _Name, inputs: Inputs, settings: Settings) -> Tiles:
    """The tiles of a kernel for a call on a Hopper GPU."""
    precision = getattr(settings.precision, "name", settings.precision)
    if str(precision).lower() not in ("none", "default"):
        return Tiles(None, None)
    if name == "mosaic":
        return Tiles(_mosaic_forward(inputs, settings), _mosaic_backward(inputs, settings))
    if inputs.query.dtype.itemsize < 4:
        return Tiles(_triton_forward_half(inputs), _triton_backward_half(inputs))
    return Tiles(_triton_forward(inputs), _triton_backward(inputs))


def _sizes(inputs: Inputs) -> tuple[int, int]:
    """Rows and keys."""
    return inputs.query.shape[1], inputs.key.shape[1]


def _width(inputs: Inputs) -> int:
    """Features of a head, to a power of two."""
    width = max(inputs.query.shape[-1], inputs.value.shape[-1])
    return 1 << (width - 1).bit_length()


def _of_rows_and_keys(term: jax.Array | None) -> TypeGuard[jax.Array]:
    """Whether there is a term that tiles are loaded of."""
    return term is not None and 1 not in term.shape[-2:]


def _mosaic_forward(inputs: Inputs, settings: Settings) -> dict[str, Any] | None:
    width, bias, (rows, keys) = _width(inputs), inputs.bias, _sizes(inputs)
    if inputs.mask is not None or settings.left is not None or settings.right not in (None, 0):
        return None
    is_enough = not settings.is_causal or _programs(inputs, 128) >= 512
    if bias is None and width <= 64 and keys >= 512 and _is_even(keys) and is_enough:
        stages = 2 if settings.is_causal else 3
        return {"block_q": 64, "block_kv": 256, "num_stages": stages, "persistent": True}
    is_half = _of_rows_and_keys(bias) and bias.dtype.itemsize == 2
    if (
        is_half
        and width <= 32
        and _is_even(rows)
        and not settings.is_causal
        and _fills(inputs, 256)
    ):
        return {"block_q": 128, "block_kv": 64, "num_stages": 2, "persistent": True}
    return None


def _programs(inputs: Inputs, size: int) -> int:
    """How many programs a kernel has, each of so many rows of a head."""
    batch, rows, heads, _ = inputs.query.shape
    return batch * heads * -(-rows // size)


def _fills(inputs: Inputs, size: int) -> bool:
    """Whether such programs are enough for all parts of a GPU; with fewer, larger ones lose."""
    return _programs(inputs, size) >= 128


def _is_even(count: int) -> bool:
    """Whether tiles of 256, twice as many as Tokamax's, pad no more rows or keys."""
    return -(-count // 128) % 2 == 0


def _mosaic_backward(inputs: Inputs, settings: Settings) -> dict[str, Any] | None:
    own = {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64}
    own |= {"num_stages": 2, "compute_wgs": 2}
    if _width(inputs) > 64 or settings.is_causal:
        return None
    if inputs.bias is None:
        return {**own, "block_q_dq": 128} if _fills(inputs, 256) else None
    if inputs.bias.dtype.itemsize > 2 or _of_rows_and_keys(inputs.mask):
        return None
    return {**own, "block_kv_dq": 128}


def _triton_forward(inputs: Inputs) -> dict[str, Any] | None:
    width, has_bias = _width(inputs), _of_rows_and_keys(inputs.bias)
    rows, keys = _sizes(inputs)
    if rows < 128 or keys < 64 or width > 128 or not _fills(inputs, 128):
        return None
    if width > 64:
        is_plain = not has_bias and not _of_rows_and_keys(inputs.mask)
        return _forward(128, 64, stages=2, warps=8) if is_plain else None
    if not has_bias:
        return _forward(128, 64, stages=3)
    if width > 32:
        return None
    return _forward(128, 64, stages=3) if inputs.mask is None else _forward(64, 64, stages=1)


def _triton_forward_half(inputs: Inputs) -> dict[str, Any] | None:
    is_small = min(_sizes(inputs)) < 64 or _width(inputs) > 64
    return None if is_small else _forward(64, 64, stages=3)


def _forward(rows: int, keys: int, *, stages: int, warps: int = 4) -> dict[str, Any]:
    return {"block_q": rows, "block_k": keys, "num_stages": stages, "num_warps": warps}


def _triton_backward(inputs: Inputs) -> dict[str, Any] | None:
    tiled = _of_rows_and_keys(inputs.bias) or _of_rows_and_keys(inputs.mask)
    if min(_sizes(inputs)) < 128 or _width(inputs) > 128:
        return None
    if _width(inputs) > 64:
        return None if tiled else _backward(64, 128, stages=2, warps=8)
    if _of_rows_and_keys(inputs.bias) and _width(inputs) > 32:
        return None
    return _backward(32, 128, stages=3) if tiled else _backward(64, 128, stages=4, warps=8)


def _triton_backward_half(inputs: Inputs) -> dict[str, Any] | None:
    if min(_sizes(inputs)) < 128 or _width(inputs) > 64:
        return None
    if _width(inputs) <= 32 and _of_rows_and_keys(inputs.bias) and inputs.mask is None:
        return _backward(64, 64, stages=3, warps=2)
    return _backward(32, 128, stages=3)


def _backward(small: int, large: int, *, stages: int, warps: int = 4) -> dict[str, Any]:
    return {
        "block_m1": small,
        "block_n1": large,
        "block_m2": large,
        "block_n2": small,
        "num_stages": stages,
        "num_warps": warps,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides Tokamax's warning about each call and gradient that it has no tuned tiles for.

    And JAX's that Triton kernels, which Tokamax and ``in_place`` have, are deprecated.
    """

    def is_kept(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Autotuning cache miss")

    log = logging.getLogger("absl")
    log.addFilter(is_kept)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
            yield
    finally:
        log.removeFilter(is_kept)
