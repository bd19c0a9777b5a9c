"""Run by ``test_transformations`` in a process with four devices.

Prints, as JSON, what went wrong in each case ("" for nothing).
"""

from __future__ import annotations

import functools
import json
import re
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import assert_close, compiled_text, draw, plain, quick_jit

from autochunk import dot_product_attention

MESH = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
ARRAYS = [draw((4, 6, 2, 4)), draw((4, 5, 2, 4)), draw((4, 5, 2, 3))]
BIAS = draw((2, 6, 5))


def spread(mesh: jax.sharding.Mesh, *axes: str | None) -> list[jax.Array]:
    """The operands, each of its dims over the axis of the mesh that is named for it."""
    return [jax.device_put(array, NamedSharding(mesh, P(*axes))) for array in ARRAYS]


def pulled(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jnp.cos(out))

    return run


def attend(implementation: str = "xla", **settings: Any) -> Callable[..., Any]:
    return functools.partial(
        dot_product_attention, implementation=implementation, max_chunk_size_mb=1e-4, **settings
    )


def compare(function: Callable[..., Any], *arrays: Any) -> None:
    assert_close(
        jax.device_get(quick_jit(pulled(function))(*arrays)),
        jax.device_get(quick_jit(pulled(plain))(*arrays)),
    )


def shard_map(check_vma: bool, *specs: Any) -> None:
    """With a bias that all have, whose gradient is a sum over devices; in pieces, of keys, too."""
    for limit in (1e-4, 8e-6):
        function = functools.partial(dot_product_attention, max_chunk_size_mb=limit, is_causal=True)
        mapped = jax.shard_map(
            function, mesh=MESH, in_specs=specs, out_specs=specs[0], check_vma=check_vma
        )
        received = quick_jit(pulled(mapped))(*ARRAYS, BIAS)
        expected = quick_jit(pulled(functools.partial(plain, is_causal=True)))(*ARRAYS, BIAS)
        assert_close(jax.device_get(received), jax.device_get(expected))


def vmapped() -> None:
    """``vmap`` whose axis is one of the mesh."""
    wide = [jnp.stack([array, -array]) for array in ARRAYS]
    received = quick_jit(pulled(jax.vmap(attend("xla_rows"), spmd_axis_name="batch")))(
        *(jax.device_put(array, NamedSharding(MESH, P("batch"))) for array in wide)
    )
    expected = quick_jit(pulled(jax.vmap(plain)))(*wide)
    assert_close(jax.device_get(received), jax.device_get(expected))


def sharded(implementation: str) -> None:
    """Operands that are spread over the mesh, and no word about it in the program."""
    compare(attend(implementation), *spread(MESH, "batch", None, "heads"))


def explicit() -> None:
    """Shardings that are part of the types."""
    with jax.set_mesh(EXPLICIT):
        arrays = spread(EXPLICIT, "batch", None, None)
        received = jax.device_get(quick_jit(pulled(attend("xla_rows")))(*arrays))
    assert_close(received, jax.device_get(quick_jit(pulled(plain))(*ARRAYS)))


def gathers() -> None:
    """With batch and heads sharded, slicing over rows first moves nothing between devices."""
    arrays = spread(MESH, "batch", None, "heads")
    text = compiled_text(jax.jit(pulled(attend("xla_rows"))), *arrays)
    assert re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text) == []


CASES: dict[str, Callable[[], None]] = {
    "shard_map, vma checked": lambda: shard_map(True, *(P("batch"),) * 3, P()),
    "shard_map, vma not checked": lambda: shard_map(False, *(P("batch"),) * 3, P()),
    "shard_map over heads": lambda: shard_map(True, *(P("batch", None, "heads"),) * 3, P("heads")),
    "vmap with spmd_axis_name": vmapped,
    "sharded jit, rows": lambda: sharded("xla_rows"),
    "sharded jit": lambda: sharded("xla"),
    "no gathers": gathers,
    "explicit shardings": explicit,
}


def problem(case: Callable[[], None]) -> str:
    try:
        case()
    except Exception:  # told to the parent
        return traceback.format_exc()[-3000:]
    return ""


if __name__ == "__main__":
    print(json.dumps({name: problem(case) for name, case in CASES.items()}))
