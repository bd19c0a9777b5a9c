"""What is not attention, in chunks: time and memory of the ways to do it, in one run.

An Evoformer-like transition, triangle multiplication and outer-product mean, a Gram matrix times a
vector, and per-sample gradients of a small network; each whole, by ``jax.lax.map(batch_size=)``, in
sub-batches of 4 as AlphaFold has them, and by ``autochunk.chunked(chunk_size="auto")``. Those that
are timed take turns in each round.

    python examples/functions.py --size 64 --tune
    python examples/functions.py --size 256 --only transition --mode training

``--size`` is the number of residues; of points and samples there are ``--points``. With ``--tune``
"auto" is tuned first, quickly.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autochunk
from autochunk.errors import MissWarning

Function = Callable[..., jax.Array]


@dataclass(frozen=True)
class Task:
    """A function of whole arrays; what is chunked of the first, and the others are shared.

    Attributes:
      fn: treats the rows of its first argument independently.
      args: its arguments.
    """

    fn: Function
    args: tuple[jax.Array, ...]


def transition(pair: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Two layers over each pair of residues [N, N, C]."""
    centred = pair - pair.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return jax.nn.relu(scaled @ up) @ down


def triangle(left: jax.Array, right: jax.Array, gate: jax.Array) -> jax.Array:
    """Triangle multiplication "outgoing edges", [N, N, C] each."""
    a, b = jax.nn.sigmoid(left @ gate) * left, jax.nn.sigmoid(right @ gate) * right
    return jnp.einsum("ikc,jkc->ijc", a, b)


def outer_product_mean(left: jax.Array, right: jax.Array, out: jax.Array) -> jax.Array:
    """The mean over sequences of outer products, from [N, S, C] each to [N, N, D]."""
    outer = jnp.einsum("isc,jsd->ijcd", left, right) / left.shape[1]
    return jnp.einsum("ijcd,cde->ije", outer, out)


def gram(points: jax.Array, others: jax.Array, vector: jax.Array) -> jax.Array:
    """A Gaussian kernel's matrix times a vector."""
    squares = jnp.square(points).sum(-1)[:, None] + jnp.square(others).sum(-1)[None]
    return jnp.exp(points @ others.T - squares / 2) @ vector


def per_sample(samples: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """The norm of each sample's gradient of a small network."""

    def loss(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(x @ weights[0]) @ weights[1]).sum()

    gradients = jax.vmap(jax.grad(loss), (None, 0))((first, second), samples)
    return sum((jnp.square(one).sum((1, 2)) for one in gradients), jnp.float32(0))


def tasks(size: int, points: int) -> dict[str, Task]:
    """By name, with random arguments."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)

    pair, sequences = (size, size, 128), (size, 64, 32)
    return {
        "transition": Task(transition, (draw(*pair), draw(128, 512), draw(512, 128))),
        "triangle": Task(triangle, (draw(*pair), draw(*pair), draw(128, 128))),
        "outer product mean": Task(
            outer_product_mean, (draw(*sequences), draw(*sequences), draw(32, 32, 128))
        ),
        "gram": Task(gram, (draw(points, 8), draw(points, 8), draw(points))),
        "per-sample gradients": Task(per_sample, (draw(points, 64), draw(64, 256), draw(256, 10))),
    }


def by_map(fn: Function, batch: int) -> Function:
    """As with ``jax.lax.map``, which calls the function of one row."""

    def run(first: jax.Array, *shared: jax.Array) -> jax.Array:
        found: jax.Array = jax.lax.map(lambda x: fn(x[None], *shared)[0], first, batch_size=batch)
        return found

    return run


def in_sub_batches(fn: Function, size: int) -> Function:
    """As AlphaFold's ``inference_subbatch``: a loop over slices; the last one overlaps."""

    def run(first: jax.Array, *shared: jax.Array) -> jax.Array:
        like = jax.eval_shape(fn, first, *shared)
        count = -(-len(first) // size)

        def step(number: Any, total: jax.Array) -> jax.Array:
            start = jnp.minimum(number * size, len(first) - size)
            part = fn(jax.lax.dynamic_slice_in_dim(first, start, size), *shared)
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

        total = jnp.zeros(like.shape, like.dtype)
        return jax.lax.scan(lambda t, n: (step(n, t), None), total, jnp.arange(count))[0]

    return run


def ways(name: str, task: Task) -> dict[str, Function]:
    """By name."""
    axes = (0, *(None for _ in task.args[1:]))
    return {
        "whole": task.fn,
        "lax.map": by_map(task.fn, 16),
        "sub-batches of 4": in_sub_batches(task.fn, 4),
        "auto": autochunk.chunked(task.fn, axes, name=name.replace(" ", "-")),
    }


def in_mode(run: Function, mode: str) -> Callable[..., Any]:
    """The function, or its gradients with respect to all arguments."""
    if mode == "forward":
        return run

    def gradients(*args: jax.Array) -> Any:
        return jax.grad(lambda *given: run(*given).sum(), tuple(range(len(args))))(*args)

    return gradients


def measure(name: str, task: Task, mode: str, rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds, and bytes of working memory by XLA's account, of each way."""
    programs, memory = {}, {}
    for way, run in ways(name, task).items():
        programs[way] = jax.jit(in_mode(run, mode)).lower(*task.args).compile()
        analysis: Any = programs[way].memory_analysis()
        memory[way] = int(analysis.temp_size_in_bytes)
    seconds: dict[str, list[float]] = {way: [] for way in programs}
    for step in range(rounds + 1):
        for way, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*task.args))
            if step:  # the first brings in code and memory
                seconds[way].append(time.perf_counter() - start)
    return {way: (statistics.median(seconds[way]), memory[way]) for way in programs}


def main() -> None:
    """Prints a line for each way to compute each task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--points", type=int, default=4096)
    parser.add_argument("--mode", choices=("forward", "training"), default="forward")
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", MissWarning)
    for name, task in tasks(options.size, options.points).items():
        if options.only and name not in options.only:
            continue
        if options.tune:
            run: Any = ways(name, task)["auto"]
            autochunk.tune_chunks(run, task.args, modes=(options.mode,), effort="quick")
        for way, (seconds, temp) in measure(name, task, options.mode, options.rounds).items():
            print(f"{name:21} {way:17} {seconds * 1e3:9.2f} ms {temp / 1e6:9.1f} MB", flush=True)


if __name__ == "__main__":
    main()
