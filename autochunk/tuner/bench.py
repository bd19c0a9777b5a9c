"""``bench``: what tuning bought, in one process and alternating rounds.

Every contender computes the same attention from the same arrays; each round times all of them in
turn, and ratios are taken within a round, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention.op import dot_product_attention
from autochunk.device import default_device
from autochunk.plan import BYTES_PER_MB, DEFAULT_MAX_CHUNK_SIZE_MB
from autochunk.store.profile import relative_spread
from autochunk.store.resolve import resolve
from autochunk.tuner.measure import (
    SHORTEST_TIMING,
    Timed,
    WorkloadInputs,
    available_bytes,
    make_function,
    measure_growth,
    program_bytes,
)
from autochunk.tuner.probe import SHARE_OF_FREE_MEMORY
from autochunk.workload import Workload

HAIKU_DENSE = "haiku dense"

Attend = Callable[..., jax.Array]


@dataclass
class Contender:
    """One way to compute the workload.

    ``run`` does so, often enough to be timed, and returns the seconds that it took once.

    ``detail`` says why it did not run, or what "auto" chose. ``ratios`` are to haiku's dense
    attention in the same round, below one is faster; empty where dense did not run.
    """

    name: str
    run: Callable[[], float] | None = None
    detail: str = ""
    temp_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def seconds_median(self) -> float | None:
        """Median seconds per call."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        """Median time relative to haiku's dense attention."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def spread(self) -> float | None:
        """Half the interquartile range of the ratios, relative to their median."""
        return relative_spread(self.ratios)


def haiku_dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Attention as ``hk.MultiHeadAttention`` computes it, from heads [..., T, H, K].

    A bias is added to the logits.
    """
    key, value = (jnp.repeat(x, query.shape[-2] // x.shape[-2], axis=-2) for x in (key, value))
    logits = jnp.einsum("...thd,...Thd->...htT", query, key)
    logits = logits / np.sqrt(query.shape[-1]).astype(query.dtype)
    if bias is not None:
        logits = logits + bias
    if causal:
        triangle = jnp.tril(jnp.ones((1,) * (logits.ndim - 2) + logits.shape[-2:], bool))
        mask = triangle if mask is None else jnp.logical_and(mask, triangle)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.asarray(-1e30, logits.dtype))
    return jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(logits), value)


def row_loop(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Attention as dm-haiku pull request #679 slices it.

    Query rows in a Python loop, 1000 MB of logits at a time.
    """
    length, logits_bytes = query.shape[-3], 4 * query[..., 0].size * key.shape[-3]
    bounds = np.linspace(
        0, length, 1 + math.ceil(logits_bytes / (DEFAULT_MAX_CHUNK_SIZE_MB * BYTES_PER_MB))
    ).astype(int)
    if causal:
        triangle = jnp.tril(jnp.ones((1, 1, length, key.shape[-3]), bool))
        mask = triangle if mask is None else mask & triangle
    outs = []
    for first, last in itertools.pairwise(bounds):
        terms = [
            term if term is None or term.shape[-2] == 1 else term[..., first:last, :]
            for term in (bias, mask)
        ]
        outs.append(haiku_dense(query[..., first:last, :, :], key, value, *terms, causal=False))
    return jnp.concatenate(outs, axis=-3)


def bench(
    workload: Workload,
    *,
    rounds: int = 10,
    peers: Sequence[str] = ("torch", "tokamax"),
    on_contender: Callable[[str], None] = lambda _: None,
) -> list[Contender]:
    """Times every contender on a workload, in this process.

    Args:
      workload: what to compute.
      rounds: how often each is timed.
      peers: other libraries to time where they are installed.
      on_contender: told of each contender as it is prepared.

    Returns:
      Haiku's dense attention, the 1000 MB default, "auto", above 1000 MB of logits the pull
      request's loop over rows, each implementation of ``jax.nn.dot_product_attention``, and the
      peers; also those that did not run, with the reason. For a causal workload that is tuned
      without causality, too, "auto" there: what leaving out the masked half gains.
    """
    # without it jax computes in float32, with a warning at most
    with jax.enable_x64(workload.dtype == "float64"):
        inputs = WorkloadInputs(workload)
        contenders = []
        for name, attend, detail in _jax_contenders(workload):
            on_contender(name)
            contenders.append(_compile(name, attend, detail, inputs))
        for name in peers:
            if name in _PEERS and importlib.util.find_spec(name) is not None:
                on_contender(name)
                contenders.append(_peer(name, inputs))
        _time_all([contender for contender in contenders if contender.run], rounds)
    return contenders


def _jax_contenders(workload: Workload) -> list[tuple[str, Attend, str]]:
    def ours(limit: Any, causal: bool = workload.causal) -> Attend:
        return lambda q, k, v, b, m: dot_product_attention(
            q, k, v, b, m, is_causal=causal, max_chunk_size_mb=limit
        )

    def jax_nn(implementation: Any) -> Attend:
        return lambda q, k, v, b, m: jax.nn.dot_product_attention(
            q, k, v, b, m, is_causal=workload.causal, implementation=implementation
        )

    resolution = resolve(workload)
    sliced = workload.logits_bytes > DEFAULT_MAX_CHUNK_SIZE_MB * BYTES_PER_MB
    loop: list[tuple[str, Attend, str]] = [
        (
            "row loop",
            lambda q, k, v, b, m: row_loop(q, k, v, b, m, causal=workload.causal),
            "the pull request's way, 1000 MB",
        )
    ]
    whole = resolve(workload.model_copy(update={"causal": False}))
    not_causal: list[tuple[str, Attend, str]] = [
        ("auto, not causal", ours("auto", causal=False), f"{whole.plan}; other results")
    ]
    return [
        (HAIKU_DENSE, lambda q, k, v, b, m: haiku_dense(q, k, v, b, m, causal=workload.causal), ""),
        (f"{DEFAULT_MAX_CHUNK_SIZE_MB:g} MB", ours(DEFAULT_MAX_CHUNK_SIZE_MB), ""),
        ("auto", ours("auto"), f"{resolution.plan} ({resolution.match})"),
        *(not_causal if workload.causal and whole.match == "exact" else []),
        *(loop if sliced else []),
        ("jax.nn xla", jax_nn("xla"), ""),
        ("jax.nn cudnn", jax_nn("cudnn"), ""),
    ]


def _peer(name: str, inputs: WorkloadInputs) -> Contender:
    try:
        return _PEERS[name](inputs)
    except Exception as error:
        return Contender(name, detail=_refusal(error))


def _refusal(error: Exception) -> str:
    """Another library's, in whatever words it has."""
    return (
        f"does not run here: {type(error).__name__}: "
        f"{str(error).splitlines()[0][:200] if str(error) else ''}"
    )


def _compile(name: str, attend: Attend, detail: str, inputs: WorkloadInputs) -> Contender:
    contender = Contender(name, detail=detail)
    try:
        function = make_function(inputs.workload, attend)
        compiled = jax.jit(function).lower(*inputs.arguments).compile()
        temp, out = program_bytes(compiled)
        allowed = available_bytes() * SHARE_OF_FREE_MEMORY
        if temp + out > allowed:
            contender.detail = (
                f"needs {(temp + out) / 1e6:.0f} MB, {allowed / 1e6:.0f} MB may be used"
            )
            return contender
        start = time.perf_counter()
        _, grown = measure_growth(lambda: jax.block_until_ready(compiled(*inputs.arguments)))
        timed = Timed.of(compiled, function, inputs.arguments, time.perf_counter() - start)
    except Exception as error:
        contender.detail = _refusal(error)
        return contender
    contender.temp_bytes = temp if grown is None else max(temp, grown - out)
    contender.run = lambda: timed.seconds(inputs.arguments)
    return contender


def _torch(inputs: WorkloadInputs) -> Contender:
    """Torch's ``scaled_dot_product_attention`` on the same device kind.

    CPU only, where arrays are shared by copying.
    """
    contender = Contender("torch")
    if default_device().platform != "cpu" or inputs.workload.bias != "none":
        contender.detail = "compared on CPU and without a bias only"
        return contender
    import torch

    w = inputs.workload
    dtype = getattr(torch, w.dtype)
    heads: list[Any] = [_to_torch(x, dtype) for x in (inputs.query, inputs.key, inputs.value)]
    mask = None if inputs.mask is None else torch.from_numpy(np.array(inputs.mask))
    causal = w.causal
    if mask is not None and causal:  # torch does not take both
        mask, causal = (
            mask & torch.ones(w.query_length, w.key_length, dtype=torch.bool).tril(),
            False,
        )
    cotangent = _to_torch(inputs.cotangent, dtype)
    grouped = w.num_kv_heads != w.num_heads

    def forward() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )

    def training() -> Any:
        for array in heads:
            array.requires_grad_(True)
        return torch.autograd.grad(forward(), heads, cotangent)

    def without_gradients() -> Any:
        with torch.no_grad():
            return forward()

    contender.run = _repeating(training if w.mode == "training" else without_gradients)
    return contender


def _to_torch(array: jax.Array, dtype: Any) -> Any:
    """[B, T, H, K] as a torch tensor [B, H, T, K]."""
    import torch

    return (
        torch.from_numpy(np.array(array.astype(jnp.float32))).to(dtype).transpose(1, 2).contiguous()
    )


def _repeating(run: Callable[[], Any]) -> Callable[[], float]:
    """Runs a function that waits for its result for long enough to time it; gives seconds per call."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    timed(1)
    calls = max(1, math.ceil(SHORTEST_TIMING / max(timed(1), 1e-6)))
    return lambda: timed(calls)


def _tokamax(inputs: WorkloadInputs) -> Contender:
    import tokamax

    causal = inputs.workload.causal
    return _compile(
        "tokamax",
        lambda q, k, v, b, m: tokamax.dot_product_attention(
            q, k, v, bias=b, mask=m, is_causal=causal
        ),
        "",
        inputs,
    )


_PEERS: dict[str, Callable[[WorkloadInputs], Contender]] = {"torch": _torch, "tokamax": _tokamax}


def _time_all(contenders: list[Contender], rounds: int) -> None:
    dense = next((contender for contender in contenders if contender.name == HAIKU_DENSE), None)
    for step in range(rounds):
        shift = step % max(1, len(contenders))
        for contender in contenders[shift:] + contenders[:shift]:
            assert contender.run is not None
            contender.seconds.append(contender.run())
        if dense is not None:
            for contender in contenders:
                contender.ratios.append(contender.seconds[-1] / dense.seconds[-1])
