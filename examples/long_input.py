"""The example of dm-haiku pull request #679: forward over a long input on a CPU, whole module.

The full size is input [1, 16000, 1024], 16 heads of 64, where dense self-attention needs about 33
GB and is left out unless it fits; ``--length`` makes it smaller. Each kind of attention runs in a
process of its own, in turn, so that its peak memory is its own.

    python examples/long_input.py --length 4000
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import autochunk
from autochunk.device import available_cpu_bytes
from autochunk.tuner.bench import row_loop

KINDS = ("dense", "row loop", "1000 MB", "auto")


class RowLoopAttention(hk.MultiHeadAttention):
    """The pull request's way: query rows in a Python loop, 1000 MB of logits at a time."""

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """As in ``hk.MultiHeadAttention``."""
        inputs = (
            (query, self.key_size, "query"),
            (key, self.key_size, "key"),
            (value, self.value_size, "value"),
        )
        heads = [self._linear_projection(x, size, name) for x, size, name in inputs]
        attended = row_loop(*heads, None, mask, causal=False)
        flat = attended.reshape((*query.shape[:-1], self.num_heads * self.value_size))
        return hk.Linear(self.model_size, w_init=self.w_init)(flat)


@dataclass(frozen=True)
class Sizes:
    """Input [1, length, size]."""

    length: int
    size: int
    heads: int
    key_size: int


def module(kind: str, sizes: Sizes) -> hk.Transformed:
    """Self-attention by one of KINDS."""

    def forward(x: jax.Array) -> jax.Array:
        settings = {
            "num_heads": sizes.heads,
            "key_size": sizes.key_size,
            "w_init": hk.initializers.VarianceScaling(),
            "name": "attention",
        }
        if kind in ("dense", "row loop"):
            attention = (hk.MultiHeadAttention if kind == "dense" else RowLoopAttention)(**settings)
        else:
            attention = autochunk.MultiHeadAttention(
                max_chunk_size_mb=1000 if kind == "1000 MB" else "auto", **settings
            )
        return attention(x, x, x)

    return hk.without_apply_rng(hk.transform(forward))


def measure(kind: str, sizes: Sizes, repeats: int) -> tuple[float, float]:
    """Median seconds of a forward pass, and the MB by which this process's peak memory grew.

    Compiling counts for the memory and not for the time.
    """
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((1, sizes.length, sizes.size), np.float32)
    )
    parameters = module("dense", sizes).init(jax.random.key(1), x[:, :1])
    compiled = jax.jit(module(kind, sizes).apply).lower(parameters, x).compile()
    before = peak_mb()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, x))
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak_mb() - before


def peak_mb() -> float:
    """Peak resident memory of the running process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(sizes: Sizes, repeats: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, MB) of every kind that fits in memory, once a round."""
    logits_bytes = 4 * sizes.heads * sizes.length**2
    kinds = [
        kind for kind in KINDS if kind != "dense" or 2.5 * logits_bytes < available_cpu_bytes()
    ]
    if "dense" not in kinds:
        print(f"dense    left out: {logits_bytes / 1e9:.1f} GB of logits, twice, do not fit here")
    results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            with concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn")
            ) as process:
                results[kind].append(process.submit(measure, kind, sizes, repeats).result())
    reference = "row loop"
    for kind, measured in results.items():
        seconds, memory = (statistics.median(values) for values in zip(*measured, strict=True))
        ratios = [
            own[0] / other[0] for own, other in zip(measured, results[reference], strict=True)
        ]
        print(
            f"{kind:8s} {seconds * 1e3:9.1f} ms ({statistics.median(ratios):.2f} of the row "
            f"loop's, {min(ratios):.2f} to {max(ratios):.2f}) {memory:9.0f} MB"
        )
    return results


def main(arguments: list[str]) -> None:
    """Reads the sizes and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("length", 16000),
        ("size", 1024),
        ("heads", 16),
        ("key-size", 64),
        ("repeats", 2),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    read = vars(parser.parse_args(arguments))
    repeats, rounds = read.pop("repeats"), read.pop("rounds")
    run(Sizes(**read), repeats, rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
