"""What is not attention, in chunks: time and memory of the ways to do it, in one run.

An Evoformer-like transition, triangle multiplication and outer-product mean, a Gram matrix times a
vector, per-sample gradients of a small network, and a ViT's layer over the tiles of an image; each
whole, by ``jax.lax.map(batch_size=)``, in sub-batches of 4 as AlphaFold has them, in chunks as
NetKet has them, by ``autochunk.chunked(chunk_size="auto")``, also within a quarter of the memory of
the whole, and in the chunk that is best of all, found by trying. Those that are timed take turns in
each round.

    python examples/functions.py --size 256 --points 20000 --tune 20
    python examples/functions.py --size 512 --only transition --mode training

With ``--tune`` "auto" is tuned first; without, it runs by what the store has, or by its rule.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autochunk
from autochunk.errors import AutochunkWarning, ProbeError
from autochunk.tuner.effort import SHORTEST_TIMING
from autochunk.tuner.measure import available_bytes, program_bytes

Function = Callable[..., jax.Array]

MOST_SIZES = 10  # that are tried, from large to small


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
    return jax.nn.relu(_norm(pair) @ up) @ down


def _norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)


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


def vision(tiles: jax.Array, qkv: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A layer of a ViT within each tile of a large image, [tiles, tokens, C]."""
    query, key, value = jnp.split(_norm(tiles) @ qkv, 3, axis=-1)
    logits = jnp.einsum("nqc,nkc->nqk", query, key) / tiles.shape[-1] ** 0.5
    tiles = tiles + jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(logits), value)
    return tiles + jax.nn.gelu(_norm(tiles) @ up) @ down


def tasks(size: int, points: int, samples: int) -> dict[str, Task]:
    """By name, with random arguments."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)

    pair, sequences, tiles = (size, size, 128), (size, 64, 32), max(1, samples // 16)
    return {
        "transition": Task(transition, (draw(*pair), draw(128, 512), draw(512, 128))),
        "triangle": Task(triangle, (draw(*pair), draw(*pair), draw(128, 128))),
        "outer product mean": Task(
            outer_product_mean, (draw(*sequences), draw(*sequences), draw(32, 32, 128))
        ),
        "gram": Task(gram, (draw(points, 8), draw(points, 8), draw(points))),
        "per-sample gradients": Task(per_sample, (draw(samples, 64), draw(64, 256), draw(256, 10))),
        "vision": Task(
            vision, (draw(tiles, 64, 192), draw(192, 576), draw(192, 768), draw(768, 192))
        ),
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


def as_netket(fn: Function, size: int) -> Function:
    """As NetKet's ``chunk_size``: a scan over whole chunks, computed again for gradients.

    What is left is a call of its own.
    """

    def run(first: jax.Array, *shared: jax.Array) -> jax.Array:
        count = len(first) // size
        chunks = first[: count * size].reshape(count, size, *first.shape[1:])
        step = jax.checkpoint(lambda _, chunk: (None, fn(chunk, *shared)))
        found = jax.lax.scan(step, None, chunks)[1]
        whole: jax.Array = found.reshape(count * size, *found.shape[2:])
        rest = first[count * size :]
        return jnp.concatenate([whole, fn(rest, *shared)]) if len(rest) else whole

    return run


def in_chunks(name: str, task: Task, chunk_size: Any, budget: float | None = None) -> Function:
    """By autochunk."""
    axes = (0, *(None for _ in task.args[1:]))
    return autochunk.chunked(
        task.fn,
        axes,
        chunk_size=chunk_size,
        name=name.replace(" ", "-"),
        memory_budget_mb=budget,
    )


def ways(name: str, task: Task, budget: float | None = None) -> dict[str, Function]:
    """By name; one of them within a memory budget (MB)."""
    count = len(task.args[0])
    return {
        "whole": task.fn,
        "lax.map 16": by_map(task.fn, min(16, count)),
        "sub-batches of 4": in_sub_batches(task.fn, min(4, count)),
        "NetKet-like 64": as_netket(task.fn, min(64, count)),
        "auto": in_chunks(name, task, "auto"),
        "auto, a quarter": in_chunks(name, task, "auto", budget),
    }


def in_mode(run: Function, mode: str) -> Callable[..., Any]:
    """The function, or its gradients with respect to all arguments."""
    if mode == "forward":
        return run

    def gradients(*args: jax.Array) -> Any:
        return jax.grad(lambda *given: run(*given).sum(), tuple(range(len(args))))(*args)

    return gradients


@dataclass
class Program:
    """A compiled way.

    Attributes:
      call: runs it; None where it does not fit the memory that is free.
      temp: bytes of working memory, by XLA's account.
      seconds: of each run.
    """

    call: Callable[..., Any] | None
    temp: int
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, run: Function, task: Task, mode: str) -> Program:
        """Compiles it."""
        compiled = jax.jit(in_mode(run, mode)).lower(*task.args).compile()
        temp, out = program_bytes(compiled)
        return cls(compiled if temp + out < 0.8 * available_bytes() else None, temp)

    def run(self, task: Task) -> float:
        """Seconds of a call: of so many that the clock can tell."""
        assert self.call is not None
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SHORTEST_TIMING:
            jax.block_until_ready(self.call(*task.args))
            count += 1
        return (time.perf_counter() - start) / count

    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def take_turns(
    programs: Iterable[Program], task: Task, rounds: int, patience: float = math.inf
) -> None:
    """Times those that fit, in each round in a new order: what runs before one may slow it down.

    Those whose first run takes ``patience`` times the shortest are left out.
    """
    fitting = [one for one in programs if one.call is not None]
    once = [one.run(task) for one in fitting]  # brings in code and memory
    most = patience * min(once, default=0.0)
    hopeful = [one for one, seconds in zip(fitting, once, strict=True) if seconds < most]
    for _ in range(rounds):
        for one in random.sample(hopeful, len(hopeful)):
            one.seconds.append(one.run(task))


def best_of_all(name: str, task: Task, mode: str, rounds: int) -> int:
    """The chunk that is fastest of all powers of two, and of all rows at once if that fits."""
    count = len(task.args[0])
    powers = [1 << n for n in range((count - 1).bit_length())]
    sizes = [*powers[-MOST_SIZES:], count]
    found = {one: Program.of(in_chunks(name, task, one), task, mode) for one in sizes}
    take_turns(found.values(), task, rounds, patience=3)
    return min((one for one in sizes if found[one].seconds), key=lambda one: found[one].median())


def measure(name: str, task: Task, mode: str, rounds: int) -> dict[str, Program]:
    """Every way, timed in turns."""
    whole = Program.of(task.fn, task, mode)
    best = best_of_all(name, task, mode, max(1, rounds // 2))
    functions = ways(name, task, max(whole.temp, 1) / 4e6)
    functions[f"best of all: {best}"] = in_chunks(name, task, best)
    programs = {way: Program.of(run, task, mode) for way, run in functions.items()}
    take_turns(programs.values(), task, rounds)
    return programs


def lines(name: str, mode: str, programs: dict[str, Program]) -> Iterator[str]:
    """Time and memory of each way, and their ratios to the best chunk's and to the whole call's."""
    best = next(one for way, one in programs.items() if way.startswith("best"))
    whole = programs["whole"]
    for way, one in programs.items():
        head = f"{name:21} {mode:8} {way:18} {one.temp / 1e6:9.1f} MB"
        if not one.seconds:
            yield f"{head} does not fit here"
            continue
        ratios = f"{one.median() / best.median():5.2f} of the best's time"
        if whole.seconds:
            ratios += f", {one.median() / whole.median():5.2f} of the whole's"
            # XLA's account leaves out what fused calls on a CPU allocate, at times all there is.
            ratios += f", {one.temp / whole.temp:5.2f} of its memory" if whole.temp > 1e5 else ""
        yield f"{head} {one.median() * 1e3:9.2f} ms {ratios}"


def main() -> None:
    """Prints a line for each way to compute each task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="residues")
    parser.add_argument("--points", type=int, default=50_000, help="of the Gram matrix")
    parser.add_argument(
        "--samples", type=int, default=4096, help="of the network; of tiles a sixteenth"
    )
    parser.add_argument("--mode", choices=("forward", "training", "both"), default="both")
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="for each function and mode")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AutochunkWarning)
    modes = ("forward", "training") if options.mode == "both" else (options.mode,)
    every = tasks(options.size, options.points, options.samples)
    for name, mode in itertools.product(options.only or every, modes):
        task = every[name]
        if options.tune:
            run: Any = in_chunks(name, task, "auto")
            given = {"effort": "quick", "timeout": options.tune}
            with contextlib.suppress(ProbeError):  # of what does not fit, or takes too long
                autochunk.tune_chunks(run, task.args, modes=(mode,), **given)
        for line in lines(name, mode, measure(name, task, mode, options.rounds)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
