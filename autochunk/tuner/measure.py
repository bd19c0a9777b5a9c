"""How a program is measured: its time and its memory.

The measuring process (``worker.py``) and ``bench`` both measure by it.

A time is that of a call that is made again and again: one timing repeats it for SHORTEST_TIMING at
least, so that a short call finds caches and allocator as its own last repeat left them, and a long
one as the plan before it did. In a model other work stands between two calls. Which plan comes
before is therefore left to chance, anew in each of the joint rounds that decide. Tried, on a busy
machine (AMD EPYC, 2 cores, jax 0.12), against the same plans inside a Transformer layer's step,
with three workloads (2 x 1024 positions forward and training, 16 x 256 training): the mean
deviation of the plans' ratios, in parts of the call's time, was 0.064 with random orders, 0.095
with one order rotated, 0.092 with each plan beside one other, 0.097 with products as of an MLP
before each timing and 0.095 before each call, and 0.117 with an untimed call before each timing.
Nothing is therefore put between. With that, of the standard set on the same machine, all
twelve curves were timed again in a layer's step (``bench --in-layer``, six rounds): rank
correlations were 0.52 to 0.95, 0.78 in the middle, and no two plans whose intervals do not overlap
changed places.

Rounds are summed up by the median of their ratios. On the same machine the ratio of two calls of 50
to 350 ms, one right after the other, scattered by 0.10 to 0.15 from round to round, whichever
allocator was there; the median of 24 such ratios by 0.021 to 0.034 (three workloads), the ratio of
24 calls' medians by 0.039 to 0.056, of their lower quartiles by 0.031 to 0.050, of their shortest
by 0.037 to 0.056. In six processes of eight rounds each the medians scattered by 0.05 to 0.15, of
which the rounds themselves make 0.05 to 0.10: a process favours a plan by some hundredths.

The two virtual cores of that machine are a host's that others use. For 1 to 12 seconds on end some
slices took 1.8 times as long (136 ms, not 76), dense attention beside them the same 130 ms: as if
both cores were threads of one. What is timed in such a while is ordered wrongly, however small its
scatter. So the rounds of plans that are compared are spread over all the time that there is for
them, and joint rounds in which most plans take far longer than they can are made again (``joint``).

The output's cotangent is zero but for the rows that are checked, which takes no less time to
multiply by. Threads and cores are those that any program of this process's gets.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from autochunk import device as devices
from autochunk import host, nvidia
from autochunk.attention.op import for_this_machine
from autochunk.tuner.effort import SHORTEST_TIMING

# Longer computations, begun one after the other, hide what it takes to start them: 20 to 60 us,
# and several times that where all the host's cores are busy. An H100 that takes 185 us for a
# kernel's backward was so seen to take 226 or 628; for the same, repeated in one program, 190.
_LONGEST_REPEATED = 0.0005
_REPEATS = 50  # of shorter ones, in one program
# The kernels of one call in one graph, as in a model's program: of a call with few of them XLA else
# makes none, and to start these one by one was seen to take twice as long as they run.
_TOGETHER: dict[str, str | bool] = {"xla_gpu_graph_min_graph_size": "1"}
# Of a run that is over sooner, what a first run brings in would count: code, and threads' stacks.
_SHORT_RUN = 0.5
_FIRST_RUN_BYTES = 8 * 2**20
# XLA's allocator for accelerators ("BFC") hands out a larger piece whole where it would split off
# less than this: 143 MB were seen to count as 268.
_UNSPLIT_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Timed:
    """A compiled program, and how often it is to be run for one timing.

    Attributes:
      program: takes the workload's arguments.
      repeats: how often it computes the workload each time it is run.
      runs: how often it is run for one timing.
    """

    program: Any
    repeats: int
    runs: int

    @classmethod
    def of(
        cls,
        compiled: Any,
        repeating: Callable[[], Any],
        arguments: tuple[Any, ...],
        first: float,
    ) -> Timed:
        """What makes one timing long enough, given the seconds that the first run took.

        On an accelerator a short workload is repeated within one program, which ``repeating``
        gives: starting one takes longer than it does.
        """
        once = cls(compiled, 1, 1)
        # The first run of a program on an accelerator was seen to take up to twice its time.
        enough = 2 * SHORTEST_TIMING if _platform() == "cpu" else 1.0
        took = first if first > enough else min(once.seconds(arguments) for _ in range(2))
        wanted = max(1, math.ceil(SHORTEST_TIMING / max(took, 1e-6)))
        if _platform() == "cpu" or took > _LONGEST_REPEATED:
            return cls(compiled, 1, wanted)
        program = repeating()
        jax.block_until_ready(program(*arguments))
        return cls(program, _REPEATS, math.ceil(wanted / _REPEATS))

    def seconds(self, arguments: tuple[Any, ...]) -> float:
        """Seconds per computation; an accelerator is given all runs before one is waited for."""
        wait = _platform() == "cpu"
        start = time.perf_counter()
        for _ in range(self.runs):
            results = self.program(*arguments)
            if wait:
                jax.block_until_ready(results)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / self.runs / self.repeats


class LoweredOnce:
    """A function that is traced and lowered once for all programs that it is part of.

    It takes seconds of Python for some Pallas kernels.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._lowered: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives."""
        if self._lowered is None:
            # Nothing of it is kept, so that it need not be stable.
            any_kernel = jax.export.DisabledSafetyCheck.custom_call("ALL")
            export = jax.export.export(jax.jit(self._function), disabled_checks=[any_kernel])
            with for_this_machine():
                lowered: Any = export(*self._arguments)
            self._lowered = lowered.call
        return self._lowered(*arguments)


def repeated(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A compiled program that computes the function _REPEATS times, one after the other."""

    def run(*arguments: Any) -> Any:
        def again(_: Any, carry: Any) -> Any:
            arguments, _ = carry
            # Arguments that seem to wait for the results keep XLA from computing once what is the
            # same each time.
            return jax.lax.optimization_barrier((arguments, function(*arguments)))

        results = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments)
        )
        return jax.lax.fori_loop(0, _REPEATS, again, (arguments, results))[1]

    options = _TOGETHER if _platform() == "gpu" else None
    return jax.jit(run).lower(*arguments).compile(compiler_options=options)


def _platform() -> str:
    """That of jax's default device, which need not be of its default backend."""
    return str(devices.default_device().platform)


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    """A function as a program for such arguments, and the seconds that compiling it took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - start


def program_bytes(compiled: Any) -> tuple[int, int]:
    """(working memory, results) of a compiled program in bytes, by XLA's account.

    Zeros where it gives none.
    """
    memory = compiled.memory_analysis()
    return (int(memory.temp_size_in_bytes), int(memory.output_size_in_bytes)) if memory else (0, 0)


def working_bytes(predicted: int, measured: int) -> int:
    """Working memory of a program by XLA's account and by what was seen to be taken, in bytes.

    The larger, but that a GPU's allocator may hand out more than it was asked for.
    """
    slack = 0 if _platform() == "cpu" else _UNSPLIT_BYTES
    return max(predicted, measured - slack)


def available_bytes() -> int:
    """Memory free for this process on its device, in bytes."""
    if _platform() == "cpu":
        return host.available_cpu_bytes()
    gpu = None
    if _platform() == "gpu":
        gpu = nvidia.gpu_memory(devices.default_device().local_hardware_id or 0)
    return free_bytes(_allocator_stats(), None if gpu is None else gpu[1])


def free_bytes(stats: dict[str, int], free_on_gpu: int | None) -> int:
    """Memory free for this process by two accounts, in bytes.

    Args:
      stats: of its allocator; empty where that keeps none, as "platform" does.
      free_on_gpu: by the GPU's driver; None where there is none.
    """
    in_use = stats.get("bytes_in_use", 0)
    # What jax's allocator holds and does not use is free for this process though not for others.
    held = stats.get("pool_bytes", in_use) - in_use
    by_driver = None if free_on_gpu is None else free_on_gpu + held
    by_allocator = stats["bytes_limit"] - in_use if "bytes_limit" in stats else None
    return min((free for free in (by_driver, by_allocator) if free is not None), default=0)


def _allocator_stats() -> dict[str, int]:
    return devices.default_device().memory_stats() or {}


def measure_growth(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Runs and returns (result, bytes by which memory in use rose above where it stood).

    None where the system cannot tell.

    On CPU that is the process's resident memory. On accelerators it is what jax's allocator handed
    out; its record never goes down, so that only a run that takes more than every earlier one can
    tell.
    """
    if _platform() != "cpu":
        before, result, after = _allocator_stats(), run(), _allocator_stats()
        risen = after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0)
        return result, after["peak_bytes_in_use"] - before.get("bytes_in_use", 0) if risen else None
    start = time.perf_counter()
    result, grown = _resident_growth(run)
    if grown is not None and time.perf_counter() - start < _SHORT_RUN:
        del result
        result, again = _resident_growth(run)
        # If it is less by more, memory was used again that the first run had not returned.
        grown = again if again is not None and 0 <= grown - again < _FIRST_RUN_BYTES else grown
    return result, grown


def _resident_growth(run: Callable[[], Any]) -> tuple[Any, int | None]:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present
        resident = _status_bytes("VmRSS")
        result = run()
        return result, max(0, _status_bytes("VmHWM") - resident)
    except OSError:
        return run(), None


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024
