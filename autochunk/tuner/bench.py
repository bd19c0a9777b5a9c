"""``bench``: times "auto" beside other ways to compute attention, in one process and common rounds.

Every contender computes the same attention from the same arrays; each round times all of them in a
new random order. Ratios are taken within a round, so that drift of the machine affects all alike.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from autochunk import device as devices
from autochunk.attention.arguments import Arguments
from autochunk.attention.op import quiet
from autochunk.plan import BYTES_PER_MB, DEFAULT_MAX_CHUNK_SIZE_MB
from autochunk.resolution.answer import Resolution
from autochunk.resolution.resolve import resolve
from autochunk.store.measurement import relative_spread
from autochunk.tuner import peers as libraries
from autochunk.tuner.effort import SHORTEST_TIMING
from autochunk.tuner.inputs import Attend, WorkloadInputs, by_op, make_function
from autochunk.tuner.measure import (
    Timed,
    available_bytes,
    measure_growth,
    program_bytes,
    repeated,
    working_bytes,
)
from autochunk.tuner.peers import NotCompared, haiku_dense, jax_nn, row_loop
from autochunk.tuner.probe import SHARE_OF_FREE_MEMORY
from autochunk.workload import Workload

HAIKU_DENSE = "haiku dense"


@dataclass
class Contender:
    """One way to compute the workload.

    ``run`` does so, often enough to be timed, and returns the seconds that it took once. ``detail``
    says why it did not run, or what "auto" chose. ``ratios`` are to haiku's dense attention in the
    same round, below one is faster; empty where dense did not run.
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


def bench(
    workload: Workload,
    *,
    rounds: int = 10,
    peers: Sequence[str] = ("torch", "tokamax"),
    beside: Sequence[Workload] = (),
    on_contender: Callable[[str], None] = lambda _: None,
) -> list[Contender]:
    """Times every contender on a workload, in this process.

    Args:
      workload: what to compute.
      rounds: how often each is timed.
      peers: other libraries to time where they are installed.
      beside: other workloads of its dtype, which "auto" is timed on in the same rounds: what a mask
        costs, say, or a window saves.
      on_contender: told of each contender as it is prepared.

    Returns:
      Haiku's dense attention, the 1000 MB default, "auto", above 1000 MB of logits the pull
      request's loop over rows, each implementation of ``jax.nn.dot_product_attention``, and the
      peers; also those that did not run, with the reason. For a causal workload that is tuned
      without causality, too, "auto" there: what leaving out the masked half gains.
    """
    # Without it jax computes in float32, with a warning at most.
    with jax.enable_x64(workload.dtype == "float64"):
        inputs = WorkloadInputs(workload)
        contenders = []
        for name, attend, detail in _jax_contenders(workload):
            on_contender(name)
            contenders.append(_compile(name, attend, detail, inputs))
        for other in beside:
            name = f"auto, {other.shape}"
            on_contender(name)
            detail = f"{_said(resolve(other))}; other results"
            contenders.append(_compile(name, _auto, detail, WorkloadInputs(other)))
        for name in peers:
            if name in _PEERS and importlib.util.find_spec(name) is not None:
                on_contender(name)
                contenders.extend(_peer(name, inputs))
        _time_all([contender for contender in contenders if contender.run], rounds)
    return contenders


def _jax_contenders(workload: Workload) -> Iterator[tuple[str, Attend, str]]:
    """(name, way to compute attention, what to say of it) of all that JAX compiles."""
    resolution = resolve(workload)
    yield HAIKU_DENSE, haiku_dense, ""
    default = DEFAULT_MAX_CHUNK_SIZE_MB
    yield f"{default:g} MB", lambda arguments: by_op(arguments, default), ""
    yield "auto", _auto, _said(resolution)
    if workload.causal:
        whole = resolve(workload.model_copy(update={"causal": False}))
        if whole.match == "exact":
            detail = f"{whole.plan}; other results"
            yield "auto, not causal", lambda given: _auto(given.replace(is_causal=False)), detail
    if workload.logits_bytes > default * BYTES_PER_MB:
        yield "row loop", row_loop, "the pull request's way, 1000 MB"
    for implementation in ("xla", "cudnn"):
        attend = functools.partial(jax_nn, implementation=implementation)
        yield f"jax.nn {implementation}", attend, ""


def _said(resolution: Resolution) -> str:
    return f"{resolution.plan} ({resolution.match})"


def _auto(arguments: Arguments) -> Any:
    return by_op(arguments, "auto")


def _peer(name: str, inputs: WorkloadInputs) -> list[Contender]:
    try:
        return _PEERS[name](inputs)
    except NotCompared as reason:
        return [Contender(name, detail=str(reason))]
    except Exception as error:
        return [Contender(name, detail=_refusal(error))]


def _refusal(error: Exception) -> str:
    """The first line of another library's error."""
    said = str(error).splitlines()[0][:200] if str(error) else ""
    return f"does not run here: {type(error).__name__}: {said}"


def _compile(name: str, attend: Attend, detail: str, inputs: WorkloadInputs) -> Contender:
    return prepare(name, make_function(inputs.workload, attend), inputs.passed, detail)


def prepare(
    name: str, function: Callable[..., Any], passed: tuple[Any, ...], detail: str = ""
) -> Contender:
    """A contender that computes a function of what is passed, compiled and run once.

    One that does not fit, or fails, has no ``run``; ``detail`` says why.
    """
    contender = Contender(name, detail=detail)
    compiling = quiet()(jax.jit(function).lower)
    try:
        compiled = compiling(*passed).compile()
        temp, out = program_bytes(compiled)
        allowed = available_bytes() * SHARE_OF_FREE_MEMORY
        if temp + out > allowed:
            needs = f"needs {(temp + out) / 1e6:.0f} MB, {allowed / 1e6:.0f} MB may be used"
            return dataclasses.replace(contender, detail=needs)
        start = time.perf_counter()
        _, grown = measure_growth(lambda: jax.block_until_ready(compiled(*passed)))
        first = time.perf_counter() - start
        repeating = functools.partial(quiet()(repeated), function, passed)
        timed = Timed.of(compiled, repeating, passed, first)
    except Exception as error:
        contender.detail = _refusal(error)
        return contender
    contender.temp_bytes = temp if grown is None else working_bytes(temp, grown - out)
    contender.run = lambda: timed.seconds(passed)
    return contender


def _repeating(run: Callable[[], Any], wait: Callable[[], Any]) -> Callable[[], float]:
    """Seconds per call of a function, called for long enough to time it, and then waited for."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) / calls

    timed(1)
    calls = max(1, math.ceil(SHORTEST_TIMING / max(timed(1), 1e-6)))
    return lambda: timed(calls)


def _torch(inputs: WorkloadInputs) -> list[Contender]:
    return [Contender("torch", _repeating(*libraries.torch(inputs)))]


def _tokamax(inputs: WorkloadInputs) -> list[Contender]:
    """By each of its kernels, where it has some."""
    on_gpu = devices.default_device().platform == "gpu"
    return [
        _compile(
            " ".join(filter(None, ("tokamax", name))),
            functools.partial(libraries.tokamax, implementation=name),
            "",
            inputs,
        )
        for name in (("mosaic", "triton") if on_gpu else (None,))
    ]


_PEERS: dict[str, Callable[[WorkloadInputs], list[Contender]]] = {
    "torch": _torch,
    "tokamax": _tokamax,
}


def _time_all(contenders: list[Contender], rounds: int) -> None:
    dense = next((contender for contender in contenders if contender.name == HAIKU_DENSE), None)
    for _ in range(rounds):
        order = random.sample(contenders, len(contenders))
        for contender in order:
            assert contender.run is not None
            contender.seconds.append(contender.run())
        if dense is not None:
            for contender in contenders:
                contender.ratios.append(contender.seconds[-1] / dense.seconds[-1])
