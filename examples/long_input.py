"""The example of dm-haiku pull request #679: self-attention over a long input on a CPU, dense against sliced.

The full size is input [1, 16000, 1024], 16 heads of 64, where dense attention needs about 20 GB and is left out unless it fits; ``--length`` makes it smaller.

    python examples/long_input.py --length 4000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

import autochunk
from autochunk.device import available_cpu_bytes


def module(kind: Callable[..., Any], **settings: Any) -> hk.Transformed:
    """Self-attention by one kind of MultiHeadAttention."""
    return hk.without_apply_rng(hk.transform(lambda x: kind(w_init=hk.initializers.VarianceScaling(), **settings)(x, x, x)))


def measure(model: hk.Transformed, parameters: Any, x: jax.Array, repeats: int) -> tuple[float, float]:
    """(median seconds, working memory in MB by XLA's account) of a forward pass."""
    compiled = jax.jit(model.apply).lower(parameters, x).compile()
    jax.block_until_ready(compiled(parameters, x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, x))
        times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return sorted(times)[len(times) // 2], memory.temp_size_in_bytes / 1e6 if memory else float("nan")


def run(length: int, size: int, heads: int, key_size: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Times haiku's module, the 1000 MB default and "auto"; returns (seconds, MB) of those that fit in memory."""
    x = jax.random.normal(jax.random.key(0), (1, length, size))
    sizes = {"num_heads": heads, "key_size": key_size}
    models = {
        "haiku": module(hk.MultiHeadAttention, **sizes),
        "1000 MB": module(autochunk.MultiHeadAttention, max_chunk_size_mb=1000, **sizes),
        "auto": module(autochunk.MultiHeadAttention, max_chunk_size_mb="auto", **sizes),
    }
    parameters = models["auto"].init(jax.random.key(1), jnp.zeros((1, 1, size)))
    results = {}
    for name, model in models.items():
        logits_bytes = 4 * heads * length**2
        if name == "haiku" and 1.5 * logits_bytes > available_cpu_bytes():
            print(f"{name:8s} left out: {logits_bytes / 1e9:.1f} GB of logits do not fit here")
            continue
        results[name] = measure(model, parameters, x, repeats)
        print(f"{name:8s} {results[name][0] * 1e3:9.1f} ms {results[name][1]:9.0f} MB", flush=True)
    return results


def main(arguments: list[str]) -> None:
    """Reads the sizes and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 16000), ("size", 1024), ("heads", 16), ("key-size", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    run(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
