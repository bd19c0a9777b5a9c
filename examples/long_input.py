"""The example of dm-haiku pull request #679: forward over a long input on a CPU, whole module.

The full size is input [1, 16000, 1024], 16 heads of 64, where dense self-attention needs about 33
GB and is left out unless it fits; ``--length`` makes it smaller. Each kind of attention runs in a
process of its own, in turn, so that its peak memory is its own.

    python examples/long_input.py --length 4000
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import autochunk
from autochunk.attention.arguments import Arguments
from autochunk.host import available_cpu_bytes
from autochunk.tuner.peers import row_loop

KINDS = ("dense", "row loop", "1000 MB", "auto")


class RowLoopAttention(hk.MultiHeadAttention):
    """The pull request's way: query rows in a Python loop, 1000 MB of logits at a time."""

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """As in ``hk.MultiHeadAttention``."""
        heads = Arguments(
            self._linear_projection(query, self.key_size, "query"),
            self._linear_projection(key, self.key_size, "key"),
            self._linear_projection(value, self.value_size, "value"),
            mask=mask,
        )
        flat = row_loop(heads).reshape((*query.shape[:-1], self.num_heads * self.value_size))
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
        kinds: dict[str, Callable[..., hk.MultiHeadAttention]] = {
            "dense": hk.MultiHeadAttention,
            "row loop": RowLoopAttention,
            "1000 MB": functools.partial(autochunk.MultiHeadAttention, max_chunk_size_mb=1000),
            "auto": functools.partial(autochunk.MultiHeadAttention, max_chunk_size_mb="auto"),
        }
        init = hk.initializers.VarianceScaling()
        attention = kinds[kind](sizes.heads, sizes.key_size, w_init=init, name="attention")
        return attention(x, x, x)

    return hk.without_apply_rng(hk.transform(forward))


def measure(kind: str, sizes: Sizes, repeats: int) -> tuple[float, float]:
    """Median seconds of a forward pass, and MB by which it made this process's peak memory grow.

    Compiling comes before, and counts for neither.
    """
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, sizes.length, sizes.size), np.float32))
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
    kinds = list(KINDS)
    if 2.5 * logits_bytes >= available_cpu_bytes():
        kinds.remove("dense")
        print(f"dense    left out: {logits_bytes / 1e9:.1f} GB of logits, twice, do not fit here")
    results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    spawn = multiprocessing.get_context("spawn")
    for number in range(rounds):
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
                results[kind].append(process.submit(measure, kind, sizes, repeats).result())
    for kind, measured in results.items():
        seconds, memory = (statistics.median(values) for values in zip(*measured, strict=True))
        pairs = zip(measured, results["row loop"], strict=True)
        ratios = [own[0] / other[0] for own, other in pairs]
        share = f"{statistics.median(ratios):.2f} of the row loop's"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{kind:8s} {seconds * 1e3:9.1f} ms ({share}, {spread}) {memory:9.0f} MB")
    return results


def main(arguments: list[str]) -> None:
    """Reads the sizes and runs."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    sizes = {"length": 16000, "size": 1024, "heads": 16, "key-size": 64}
    for name, default in {**sizes, "repeats": 2, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    read = vars(parser.parse_args(arguments))
    repeats, rounds = read.pop("repeats"), read.pop("rounds")
    run(Sizes(**read), repeats, rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
