"""What is measured, and how.

A workload's arguments and reference results, the time and the memory of a program.

The measuring process (``worker.py``) and ``bench`` both measure by it.
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
import jax.numpy as jnp
import numpy as np

from autochunk import device as devices
from autochunk.attention.op import dot_product_attention, on_one_device, why_not
from autochunk.plan import Plan
from autochunk.workload import Workload

_SAMPLE_BYTES = 64 * 2**20
_MOST_SAMPLED_ROWS = 16
# One timing takes at least this long, by repeating the call: shorter ones measure the clock and the
# dispatch.
SHORTEST_TIMING = 0.02
# Longer computations hide what it takes to start them.
_LONGEST_REPEATED = 0.002
# Of a run that is over sooner, a few MB that it did not need would count.
_SHORT_RUN = 0.5


class WorkloadInputs:
    """Random arguments of a workload, a sample of query rows, and what float64 arithmetic makes of
    those.
    """

    def __init__(self, workload: Workload) -> None:
        w = self.workload = workload
        self._random = np.random.default_rng(0)
        self.query = self._normal(w.batch, w.query_length, w.num_heads, w.key_size)
        self.key = self._normal(w.batch, w.key_length, w.num_kv_heads, w.key_size)
        self.value = self._normal(w.batch, w.key_length, w.num_kv_heads, w.value_size)
        self.bias = None if w.bias == "none" else self._normal(*self._term_shape(w.bias))
        self.mask = None if w.mask == "none" else self._open_mask(self._term_shape(w.mask))
        self.rows = sample_rows(w)
        # Only sampled rows have a cotangent, so that the reference gradients need no other row.
        # Multiplying by zeros takes as long as by anything else.
        cotangent = np.zeros((w.batch, w.query_length, w.num_heads, w.value_size), np.float32)
        cotangent[:, self.rows] = self._random.standard_normal(
            cotangent[:, self.rows].shape, np.float32
        )
        self.cotangent = jnp.asarray(cotangent, w.dtype)

    def _normal(self, *shape: int) -> jax.Array:
        """Drawn by numpy: JAX would compile a program for every shape."""
        return jnp.asarray(self._random.standard_normal(shape, np.float32), self.workload.dtype)

    def _open_mask(self, shape: tuple[int, ...]) -> jax.Array:
        """Three in four are open; key 0 to all, so that no row is masked throughout."""
        mask = self._random.random(shape, np.float32) < 0.75
        mask[..., 0] = True
        return jnp.asarray(mask)

    def _term_shape(self, pattern: str) -> tuple[int, ...]:
        w = self.workload
        sizes = (w.batch, w.num_heads, w.query_length, w.key_length)
        return tuple(
            1 if letter == "1" else size for letter, size in zip(pattern, sizes, strict=True)
        )

    @property
    def differentiated(self) -> tuple[jax.Array, ...]:
        """The arguments that training differentiates."""
        return (self.query, self.key, self.value, *(() if self.bias is None else (self.bias,)))

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        """Everything the measured function takes."""
        mask = () if self.mask is None else (self.mask,)
        return (
            *self.differentiated,
            *mask,
            *((self.cotangent,) if self.workload.mode == "training" else ()),
        )

    def function(self, plan: Plan) -> Callable[..., Any]:
        """The workload computed by a plan.

        The output, and in training the gradients too, from ``arguments``.
        """

        def attend(*arrays: Any) -> jax.Array:
            with on_one_device():
                return dot_product_attention(
                    *arrays,
                    is_causal=self.workload.causal,
                    max_chunk_size_mb=plan.max_chunk_size_mb,
                    implementation=plan.implementation,
                )

        return make_function(self.workload, attend)

    def refusal(self, plan: Plan) -> str:
        """Why the plan's implementation does not take the workload; empty if it does."""
        arrays = (self.query, self.key, self.value, self.bias, self.mask)
        return why_not(
            plan.implementation,
            *arrays,
            is_causal=self.workload.causal,
            training=self.workload.mode == "training",
        )

    def sampled(
        self,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
        """query, key, value, bias, mask and cotangent with the sampled query rows only.

        A causal mask becomes an array.
        """
        mask = self.mask
        if self.workload.causal:
            causal = (
                jnp.asarray(self.rows)[None, None, :, None]
                >= jnp.arange(self.workload.key_length)[None, None, None, :]
            )
            mask = causal if mask is None else causal & _rows_of(mask, self.rows)
        elif mask is not None:
            mask = _rows_of(mask, self.rows)
        bias = None if self.bias is None else _rows_of(self.bias, self.rows)
        return (
            self.query[:, self.rows],
            self.key,
            self.value,
            bias,
            mask,
            self.cotangent[:, self.rows],
        )

    def on_sample(self, results: tuple[jax.Array, ...]) -> list[np.ndarray[Any, Any]]:
        """A function's results where the reference has them.

        Output and query gradient on sampled rows, the other gradients whole.
        """
        names = ("out", "query", "key", "value", "bias")[: len(results)]
        taken = []
        for name, result in zip(names, results, strict=True):
            array = np.asarray(result.astype(jnp.promote_types(result.dtype, jnp.float32)))
            if name in ("out", "query"):
                array = array[:, self.rows]
            elif name == "bias" and array.shape[2] > 1:
                array = array[:, :, self.rows]
            taken.append(array)
        return taken


def sample_rows(workload: Workload) -> np.ndarray[Any, Any]:
    """Query rows to check.

    The first, the last, and as many others as their float64 logits leave room for.
    """
    w = workload
    fitting = _SAMPLE_BYTES // (w.batch * w.num_heads * w.key_length * 8)
    count = min(w.query_length, _MOST_SAMPLED_ROWS, max(2, fitting))
    inner = np.random.default_rng(0).permutation(np.arange(1, w.query_length - 1))[
        : max(0, count - 2)
    ]
    return np.unique(np.concatenate([[0, w.query_length - 1], inner]).astype(np.int64))


def _rows_of(term: jax.Array, rows: np.ndarray[Any, Any]) -> jax.Array:
    return term if term.shape[2] == 1 else term[:, :, rows]


def make_function(workload: Workload, attend: Callable[..., Any]) -> Callable[..., Any]:
    """The workload from its arguments by ``attend(query, key, value, bias, mask)``.

    (output,), and in training the gradients after it.
    """
    moving = 3 + (workload.bias != "none")

    def forward(*arrays: jax.Array) -> Any:
        bias = arrays[3] if workload.bias != "none" else None
        mask = arrays[-1] if workload.mask != "none" else None
        return attend(*arrays[:3], bias, mask)

    def training(*arrays: jax.Array) -> Any:
        *rest, cotangent = arrays
        out, pull = jax.vjp(lambda *moved: forward(*moved, *rest[moving:]), *rest[:moving])
        return (out, *pull(cotangent))

    return (lambda *arrays: (forward(*arrays),)) if workload.mode == "forward" else training


def reference(inputs: WorkloadInputs) -> list[np.ndarray[Any, Any]]:
    """Output, and in training the gradients, on the sampled rows in float64, by the textbook
    formulas in numpy.
    """
    w = inputs.workload
    groups = w.num_heads // w.num_kv_heads
    query, key, value, bias, mask, cotangent = inputs.sampled()
    q, g = (np.moveaxis(_float64(x), 2, 1) for x in (query, cotangent))  # [B, H, rows, K]
    # [B, H, T, K]
    k, v = (np.repeat(np.moveaxis(_float64(x), 2, 1), groups, axis=1) for x in (key, value))
    scale = 1 / math.sqrt(w.key_size)
    logits = q @ np.swapaxes(k, -1, -2) * scale
    if bias is not None:
        logits += _float64(bias)
    if mask is not None:
        logits = np.where(np.asarray(mask), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    results = [np.moveaxis(out, 1, 2)]
    if w.mode == "training":
        d_weights = g @ np.swapaxes(v, -1, -2)
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        d_query = d_logits @ k * scale
        d_key, d_value = np.swapaxes(d_logits, -1, -2) @ q * scale, np.swapaxes(weights, -1, -2) @ g
        results.append(np.moveaxis(d_query, 1, 2))
        results += [
            np.moveaxis(grad.reshape(w.batch, w.num_kv_heads, groups, *grad.shape[2:]).sum(2), 1, 2)
            for grad in (d_key, d_value)
        ]
        if bias is not None:
            broadcast = tuple(
                dim for dim, size in enumerate(bias.shape) if size == 1 and d_logits.shape[dim] > 1
            )
            results.append(d_logits.sum(broadcast, keepdims=True))
    return results


def _float64(array: jax.Array) -> np.ndarray[Any, Any]:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32))).astype(np.float64)


def dense_on_sample(inputs: WorkloadInputs) -> list[np.ndarray[Any, Any]]:
    """The same by haiku's dense attention in the workload's dtype: how much error is usual."""
    w = inputs.workload
    query, key, value, bias, mask, cotangent = inputs.sampled()
    attend = lambda q, k, v, b, m: dot_product_attention(
        q, k, v, b, m, max_chunk_size_mb=None, implementation="dense"
    )
    function = make_function(w, attend)
    optional = [x for x in (bias, mask) if x is not None]
    results = jax.jit(function)(
        query, key, value, *optional, *([cotangent] if w.mode == "training" else [])
    )
    return [
        np.asarray(result.astype(jnp.promote_types(result.dtype, jnp.float32)))
        for result in results
    ]


def relative_error(
    results: list[np.ndarray[Any, Any]], references: list[np.ndarray[Any, Any]]
) -> float:
    """Largest error over the results, each relative to its reference's largest value.

    Infinite where a result is not finite.

    A reference may be zero throughout (the query's gradient of a single key): a hundredth of the
    largest value of all is the least to compare with.
    """
    largest = [float(np.abs(expected).max()) for expected in references]
    worst = 0.0
    for result, expected, size in zip(results, references, largest, strict=True):
        error = float(np.abs(result - expected).max() / max(size, 0.01 * max(largest), 1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@dataclasses.dataclass(frozen=True)
class Timed:
    """A compiled program, how often it computes the workload each time it is run, and how often it
    is run for one timing.
    """

    program: Any
    repeats: int
    runs: int

    @classmethod
    def of(
        cls,
        compiled: Any,
        function: Callable[..., Any],
        arguments: tuple[jax.Array, ...],
        first: float,
    ) -> Timed:
        """What makes one timing long enough, given the seconds that the first run took.

        On an accelerator a short workload is repeated within one program: starting one takes longer
        than it does.
        """
        once = cls(compiled, 1, 1)
        # The first run of a program on an accelerator was seen to take up to twice its time.
        enough = 2 * SHORTEST_TIMING if _platform() == "cpu" else 1.0
        took = first if first > enough else min(once.seconds(arguments) for _ in range(2))
        wanted = max(1, math.ceil(SHORTEST_TIMING / max(took, 1e-6)))
        if _platform() == "cpu" or took > _LONGEST_REPEATED:
            return cls(compiled, 1, wanted)
        program = jax.jit(repeated(function, wanted)).lower(*arguments).compile()
        jax.block_until_ready(program(*arguments))
        return cls(program, wanted, 1)

    def seconds(self, arguments: tuple[jax.Array, ...]) -> float:
        """Seconds per computation. An accelerator is given all runs before the first is waited for."""
        wait = _platform() == "cpu"
        start = time.perf_counter()
        for _ in range(self.runs):
            results = self.program(*arguments)
            if wait:
                jax.block_until_ready(results)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / self.runs / self.repeats


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The function computed ``times`` times, one after the other, in one program."""

    def run(*arguments: jax.Array) -> Any:
        def again(_: Any, carry: Any) -> Any:
            arguments, _ = carry
            # Arguments that seem to wait for the results keep XLA from computing once what is the
            # same each time.
            return jax.lax.optimization_barrier((arguments, function(*arguments)))

        results = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments)
        )
        return jax.lax.fori_loop(0, times, again, (arguments, results))[1]

    return run


def _platform() -> str:
    """That of the device that jax computes on by default, which need not be of its default backend."""
    return str(devices.default_device().platform)


def program_bytes(compiled: Any) -> tuple[int, int]:
    """(working memory, results) of a compiled program in bytes, by XLA's account.

    Zeros where it gives none.
    """
    memory = compiled.memory_analysis()
    return (int(memory.temp_size_in_bytes), int(memory.output_size_in_bytes)) if memory else (0, 0)


def available_bytes() -> int:
    """Memory free for this process on its device, in bytes."""
    if _platform() == "cpu":
        return devices.available_cpu_bytes()
    gpu = (
        devices.gpu_memory(devices.default_device().local_hardware_id or 0)
        if _platform() == "gpu"
        else None
    )
    return free_bytes(_allocator_stats(), None if gpu is None else gpu[1])


def free_bytes(stats: dict[str, int], free_on_gpu: int | None) -> int:
    """Memory free for this process by its allocator's account (empty where that keeps none, as
    "platform" does) and by the GPU's driver, in bytes.
    """
    in_use = stats.get("bytes_in_use", 0)
    # What jax's allocator holds and does not use is free for this process though not for others.
    by_driver = (
        None if free_on_gpu is None else free_on_gpu + stats.get("pool_bytes", in_use) - in_use
    )
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
        del result  # a program's first run also brings in code, and threads their stacks
        result, again = _resident_growth(run)
        grown = min(grown, again or grown)
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
