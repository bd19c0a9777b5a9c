"""What a plan computes at a workload, and what that would cost by simple physics.

The physics is a roofline (Williams 2009): operations at one rate, passes over the logits at
another, and a time for each slice. Its constants are those of no machine: what it gets wrong is
learned from curves, which know the rates, the caches and the compiler.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import Plan, slice_logits
from autochunk.store.profile import sliced_shape
from autochunk.workload import Workload

HALVES = ("bfloat16", "float16")
"""Names of the dtypes of half precision."""

# Operations and passes over the logits of a training step, in those of a forward one.
_TRAINING_OPERATIONS = 3.5
_PASSES = {"forward": 2, "training": 6}


@dataclass(frozen=True)
class Rates:
    """What a kind of device does in a second.

    Attributes:
      operations: of products, in full and in half precision.
      passes: bytes of logits that are read or written, in slices and at once.
      slice_seconds: that each slice takes beside.
    """

    operations: tuple[float, float]
    passes: tuple[float, float]
    slice_seconds: float


_CPU = Rates(operations=(1.2e11, 1.2e11), passes=(2e10, 4e9), slice_seconds=2e-5)
_ACCELERATOR = Rates(operations=(5e13, 4e14), passes=(2e12, 2e12), slice_seconds=1e-5)

@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
      slices: how many.
      rows, keys: of one slice.
      share: of all batch elements and heads that one slice has.
      at_once: bytes of logits of one slice.
      logits: how many are computed in all.
    """

    slices: float
    rows: int
    keys: int
    share: float
    at_once: int
    logits: float


def kind_of(implementation: str) -> str:
    """What sort of implementation it is: "sliced", "fused" or "dense"."""
    if is_sliced(implementation):
        return "sliced"
    return "fused" if is_fused(implementation) else "dense"


@functools.lru_cache(maxsize=10_000)
def work_of(workload: Workload, plan: Plan) -> Work:
    """What a plan computes at a workload.

    Raises:
      ArgumentError: the plan's limit is less than one logit.
    """
    every = workload.batch * workload.num_heads * workload.query_length * workload.key_length
    if not is_sliced(plan.implementation):
        seen = _seen(workload) if is_fused(plan.implementation) else 1.0
        rows, keys = workload.query_length, workload.key_length
        return Work(1.0, rows, keys, 1.0, workload.logits_bytes, every * seen)
    shape = sliced_shape(workload)
    slices = slice_logits(plan, shape)
    blocks = workload.query_length / shape.rows * workload.key_length / shape.keys
    seen = _seen(workload)
    return Work(
        slices=math.prod(slices.counts(shape)) * max(1.0, blocks * seen),
        rows=slices.rows,
        keys=slices.keys,
        share=slices.batch * slices.heads / (shape.batch * shape.heads),
        at_once=slices.chunk_bytes(shape),
        logits=every * seen,
    )


def _seen(workload: Workload) -> float:
    """The share of the logits that positions leave, in blocks."""
    left, right = workload.reach
    if left is None and right is None:
        return 1.0
    if left is not None and right is not None:
        return min(1.0, (left + right + 1) / workload.key_length)
    blocks = max(1, min(8, workload.query_length // 256))
    return (blocks + 1) / (2 * blocks)


def seconds(workload: Workload, plan: Plan, platform: str) -> float:
    """By physics alone."""
    work, rates = work_of(workload, plan), _CPU if platform == "cpu" else _ACCELERATOR
    training, kind = workload.mode == "training", kind_of(plan.implementation)
    operations = 2 * work.logits * (workload.key_size + workload.value_size)
    operations *= _TRAINING_OPERATIONS if training else 1.0
    passes = work.logits * _itemsize(workload, kind, platform) * _PASSES[workload.mode]
    return (
        operations / rates.operations[workload.dtype in HALVES]
        + passes / rates.passes[kind != "sliced"]
        + rates.slice_seconds * work.slices
    )


def _itemsize(workload: Workload, kind: str, platform: str) -> int:
    """Bytes of a logit that is written: none in fused kernels, the inputs' own in haiku's order.

    CPUs compute float16 in float32.
    """
    if kind == "fused":
        return 0
    halves = HALVES[:1] if platform == "cpu" else HALVES
    return 2 if kind == "dense" and workload.dtype in halves else workload.logits_itemsize
