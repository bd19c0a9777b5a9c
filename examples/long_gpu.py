"""Attention whose dense form needs 115 GB, forward and training, on a GPU of 12 GB, or part of one.

The headline of dm-haiku pull request #679: float32, input of 30000 positions, 16 heads of 64, which
is 57.6 GB of logits, twice. The limit is jax's allocator's own, so that it is kept or the run
fails.

    python examples/long_gpu.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def limit_memory(gigabytes: float) -> None:
    """Lets jax take so many 10^9 bytes of the GPU at most; call it before jax's backend starts."""
    from autochunk.nvidia import visible_gpus

    fraction = gigabytes * 1e9 / total_bytes(visible_gpus()[0])
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"


def total_bytes(gpu: str) -> int:
    """All memory of a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", gpu]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def run(
    length: int, heads: int, key_size: int, max_chunk_size_mb: Any, repeats: int = 3
) -> dict[str, float]:
    """Seconds of a forward pass and of a training step."""
    import jax
    import jax.numpy as jnp

    import autochunk

    shape, limit = (1, length, heads, key_size), max_chunk_size_mb
    query, key, value = (jax.random.normal(jax.random.key(seed), shape) for seed in range(3))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return autochunk.dot_product_attention(query, key, value, max_chunk_size_mb=limit)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value))

    training = jax.grad(loss, argnums=(0, 1, 2))
    steps: dict[str, Callable[..., Any]] = {"forward": attend, "training": training}
    seconds = {}
    for name, step in steps.items():
        compiled = jax.jit(step).lower(query, key, value).compile()
        jax.block_until_ready(compiled(query, key, value))
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(compiled(query, key, value))
        seconds[name] = (time.perf_counter() - start) / repeats
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        used = "" if peak is None else f", at most {peak / 1e9:.2f} GB of memory in use"
        dense = f"dense logits are {8 * heads * length**2 / 1e9:.1f} GB"
        print(f"{name:8s} {seconds[name] * 1e3:9.1f} ms{used}; {dense}", flush=True)
    return seconds


def main(arguments: list[str]) -> None:
    """Reads the sizes and runs."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for name, default in (("length", 30000), ("heads", 16), ("key-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-gb", type=float, default=12.0, help="what jax may take")
    parser.add_argument("--max-chunk-size-mb", type=float, help='the default is "auto"')
    read = parser.parse_args(arguments)
    limit_memory(read.memory_gb)
    limit = "auto" if read.max_chunk_size_mb is None else read.max_chunk_size_mb
    run(read.length, read.heads, read.key_size, limit)


if __name__ == "__main__":
    main(sys.argv[1:])
