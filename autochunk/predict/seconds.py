"""Time by physics: what a plan computes, reads and writes, and launches.

The physics is a roofline (Williams 2009): operations at one rate, bytes at another, a time for each
slice, and on CPUs one for the pages of large buffers. Its constants are those of no machine: what
it gets wrong is learned from curves, which know the rates, the caches and the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

from autochunk.plan import Plan
from autochunk.predict import memory
from autochunk.predict.work import HALVES, kind_of, work_of
from autochunk.workload import Workload

# Operations and passes over the logits of a training step, in those of a forward one.
_TRAINING_OPERATIONS = 3.5
_PASSES = {"forward": 2, "training": 6}
_PASSES_OF_OPERANDS = {"forward": 1, "training": 3}
# More passes where sequences share a bias, of slices with some of a sequence's heads: their part of
# its cotangent is taken out and put back. Of ten lengths on an EPYC, of which others were measured.
_PASSES_OF_PARTS = 2


@dataclass(frozen=True)
class Rates:
    """What a kind of device does in a second.

    Attributes:
      operations: of products, in full and in half precision.
      passes: bytes of logits that are read or written, in slices and at once.
      slice_seconds: that each slice takes beside, in forward and in training.
      hash_seconds: that dropout's hash of a logit takes, or a soft cap's tangent.
    """

    operations: tuple[float, float]
    passes: tuple[float, float]
    slice_seconds: tuple[float, float]
    hash_seconds: float


_CPU = Rates(
    operations=(1.2e11, 1.2e11), passes=(2e10, 4e9), slice_seconds=(2e-5, 2e-5), hash_seconds=1e-10
)
_ACCELERATOR = Rates(
    operations=(5e13, 4e14),
    passes=(2e12, 2e12),
    # the middle of 236 slices' of an H100 and an H200, against the same call unsliced
    slice_seconds=(2e-5, 6e-5),
    hash_seconds=1e-12,
)
# How often a logit is hashed, in forward and in training: each fused loop over logits, and each
# product of them, does so anew. Of an H100, on which dropout in a training step of b=8, t=1024,
# h=12 was seen to take 0.3 ms more of dense attention, and 0.4 to 0.9 ms of slices.
_HASHES = {"dense": (1, 2), "sliced": (1, 8), "fused": (1, 2)}
# A fused kernel has a block of so many rows of one head on each of a GPU's multiprocessors: where
# there are fewer blocks than these, some of them wait. Some give them keys of a single row.
_ROWS_OF_ALL_BLOCKS = 64 * 128
_SPLITS_KEYS = ("cudnn",)
# glibc gives larger buffers back to the system (mallopt's M_MMAP_THRESHOLD is at most this): each
# call has their pages anew. Seconds for each of their bytes; on an EPYC that was 0.6 us for a page
# of 4 KB, curves of a Xeon speak for less.
_KEPT, _FAULT_SECONDS = 2**25, 1e-10


def seconds(workload: Workload, plan: Plan, platform: str) -> float:
    """What a plan would take by physics alone."""
    work, rates = work_of(workload, plan), _CPU if platform == "cpu" else _ACCELERATOR
    kind, training = kind_of(plan.implementation), workload.mode == "training"
    operations = 2 * work.logits * (workload.key_size + workload.value_size)
    operations *= _TRAINING_OPERATIONS if training else 1.0
    took = operations / rates.operations[workload.dtype in HALVES]
    if kind == "fused" and not (plan.implementation in _SPLITS_KEYS and workload.query_length == 1):
        rows = workload.batch * workload.num_heads * workload.query_length
        took /= min(1.0, rows / _ROWS_OF_ALL_BLOCKS)
    passes = work.logits * _itemsize(workload, plan, platform) * _PASSES[workload.mode]
    if platform == "cpu" and kind == "sliced" and _shares_a_cotangent(workload):
        parts = work.share * workload.batch < 1
        passes += work.logits * workload.logits_itemsize * _PASSES_OF_PARTS * parts
    if platform != "cpu":  # which has most of them in its caches
        passes += _operand_bytes(workload, plan) * _PASSES_OF_OPERANDS[workload.mode]
    hashes = ((workload.dropout_bits != "none") + workload.soft_cap) * work.logits
    took += hashes * _HASHES[kind][training] * rates.hash_seconds
    took += passes / rates.passes[kind != "sliced"]
    if platform == "cpu" and (held := memory.temp_bytes(workload, plan, platform)) > _KEPT:
        took += held * _FAULT_SECONDS
    return took + rates.slice_seconds[training] * work.slices


def _shares_a_cotangent(workload: Workload) -> bool:
    """Whether all sequences add to the cotangent of one bias."""
    return workload.mode == "training" and workload.bias.startswith("1")


def _operand_bytes(workload: Workload, plan: Plan) -> float:
    """Bytes of operands, of what a fused kernel holds beside, else of keys for all heads."""
    operands = memory.operand_bytes(workload)
    if kind_of(plan.implementation) == "fused":
        return operands + memory.temp_bytes(workload, plan, "gpu")
    return operands + 2 * memory.grouped_bytes(workload)


def _itemsize(workload: Workload, plan: Plan, platform: str) -> float:
    """Bytes of a logit that are written or read: the inputs' own in haiku's order.

    A fused kernel reads those of a mask alone. CPUs compute float16 in float32.
    """
    kind = kind_of(plan.implementation)
    if kind == "fused":
        return memory.mask_itemsize(workload, plan.implementation) / 2
    halves = HALVES[:1] if platform == "cpu" else HALVES
    return 2 if kind == "dense" and workload.dtype in halves else workload.logits_itemsize
