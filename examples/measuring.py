"""Time and memory of one step of a model in several kinds: what the examples beside it print.

On a CPU each kind runs in a process of its own, in turn, so that its memory is its own. On a GPU,
where XLA knows what a program takes, all run in one and take turns.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from autochunk.tuner.measure import available_bytes, measure_growth, program_bytes

Make = Callable[[str, Any], tuple[Callable[..., Any], tuple[Any, ...]]]


def measure(make: Make, kind: str, sizes: Any, repeats: int) -> tuple[float, float] | None:
    """Median seconds of a step, and MB that it takes besides its arguments; None if too many."""
    step, arguments = make(kind, sizes)
    compiled = jax.jit(step).lower(*arguments).compile()
    predicted = sum(program_bytes(compiled))
    if predicted > available_bytes():
        return None
    _, grown = measure_growth(lambda: jax.block_until_ready(compiled(*arguments)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(predicted, grown or 0) / 1e6


def compare(
    make: Make, kinds: Sequence[str], sizes: Any, *, repeats: int = 3, rounds: int = 3
) -> None:
    """Prints the time and memory of every kind, and its time's ratio to the first, over rounds.

    Args:
      make: gives the step of a kind and its arguments; a function of a module, for other processes.
      kinds: the first is what the others are compared with.
      sizes: what ``make`` gets besides.
      repeats: of the step, in each round.
      rounds: each begins with another kind; on a CPU each has a process for every kind.
    """
    run = _in_turn if jax.default_backend() == "cpu" else _side_by_side
    results = run(make, kinds, sizes, repeats, rounds)
    for kind in kinds:
        print(f"{kind:10s} {_summary(results[kind], results[kinds[0]])}", flush=True)


Results = dict[str, list[tuple[float, float] | None]]


def _in_turn(make: Make, kinds: Sequence[str], sizes: Any, repeats: int, rounds: int) -> Results:
    """(seconds, MB) of each kind and round, each from a process."""
    spawn = multiprocessing.get_context("spawn")
    results: Results = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in _rotated(kinds, number):
            with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
                done = process.submit(measure, make, kind, sizes, repeats)
                results[kind].append(done.result())
    return results


def _side_by_side(
    make: Make, kinds: Sequence[str], sizes: Any, repeats: int, rounds: int
) -> Results:
    """The same from this process; of what does not fit None."""
    steps = {kind: make(kind, sizes) for kind in kinds}
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as threads:
        compiling = {
            kind: threads.submit(jax.jit(step).lower(*arguments).compile)
            for kind, (step, arguments) in steps.items()
        }
        programs = {kind: done.result() for kind, done in compiling.items()}
    taken = {kind: sum(program_bytes(program)) for kind, program in programs.items()}
    fitting = [kind for kind in kinds if taken[kind] < available_bytes()]
    results: Results = {kind: [] if kind in fitting else [None] for kind in kinds}
    for number in range(rounds + 1):
        for kind in _rotated(fitting, number):
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(programs[kind](*steps[kind][1]))
            if number:  # the first brings in code and memory
                seconds = (time.perf_counter() - start) / repeats
                results[kind].append((seconds, taken[kind] / 1e6))
    return results


def _rotated(kinds: Sequence[str], number: int) -> list[str]:
    start = number % max(1, len(kinds))
    return [*kinds[start:], *kinds[:start]]


def _summary(own: list[Any], first: list[Any]) -> str:
    if None in own:
        return "does not fit here"
    seconds, memory = (statistics.median(values) for values in zip(*own, strict=True))
    line = f"{seconds * 1e3:9.1f} ms {memory:9.0f} MB"
    if None in first:
        return line
    ratios = [one[0] / other[0] for one, other in zip(own, first, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{line}   {statistics.median(ratios):.2f} of the time ({spread})"
