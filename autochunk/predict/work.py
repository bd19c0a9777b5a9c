"""What a plan computes at a workload: how many logits, in which slices."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from operator import mul

from autochunk.implementations import is_fused, is_sliced
from autochunk.plan import Plan, slice_logits
from autochunk.store.profile import sliced_shape
from autochunk.workload import Workload

HALVES = ("bfloat16", "float16")
"""Names of the dtypes of half precision."""

# Whether fused kernels skip, in forward and in training, what lies outside a window on both sides.
_SKIPS_WINDOWS = {"cudnn": (True, True), "tokamax_mosaic": (True, False)}
# Whether they skip keys beyond lengths; other kernels compute them.
_SKIPS_LENGTHS = {
    "cudnn": (False, True),
    "tokamax_mosaic": (True, False),
    "tokamax_triton": (True, False),
}
# With how many keys or more they skip, in forward, what a mask hides from all rows of a block; see
# ``Kernel.skips``.
_SKIPS_MASKED = {"tokamax_mosaic": 1024, "tokamax_triton": 512}
# The share of the blocks that is left by what the tuner has: lengths from half to all, as numbers
# or as a mask, and eight segments. Its masks of each row's own are causal, too.
_WITHIN_LENGTHS = 0.8
_WITHIN_SEGMENTS = 0.15


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
      slices: how many.
      rows, keys: of one slice.
      share: of all batch elements and heads that one slice has.
      at_once: bytes of logits of one slice.
      logits: how many are computed in all, where slices overlap more than once.
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
        seen = _seen(workload) if _skips(workload, plan.implementation) else 1.0
        seen *= _within_lengths(workload, plan.implementation)
        seen *= _within_mask(workload, plan.implementation)
        rows, keys = workload.query_length, workload.key_length
        return Work(1.0, rows, keys, 1.0, workload.logits_bytes, every * seen)
    shape = sliced_shape(workload)
    slices = slice_logits(plan, shape)
    blocks = workload.query_length / shape.rows * workload.key_length / shape.keys
    seen = _causal_share(workload) if _is_causal_by_mask(workload) else _seen(workload)
    counts = slices.counts(shape)
    lengths = (shape.batch, shape.heads, shape.rows, shape.keys)
    overlapping = math.prod(map(mul, counts, slices)) / math.prod(lengths)
    return Work(
        slices=math.prod(counts) * max(1.0, blocks * seen),
        rows=slices.rows,
        keys=slices.keys,
        share=slices.batch * slices.heads / (shape.batch * shape.heads),
        at_once=slices.chunk_bytes(shape),
        logits=every * seen * overlapping,
    )


def _skips(workload: Workload, implementation: str) -> bool:
    """Whether an implementation that does not slice skips logits which positions leave out."""
    if not is_fused(implementation) or None in workload.reach:
        return is_fused(implementation)
    return _SKIPS_WINDOWS.get(implementation, (False, False))[workload.mode == "training"]


def _within_lengths(workload: Workload, implementation: str) -> float:
    """The share of the logits that an implementation computes of what lengths leave."""
    skips = _SKIPS_LENGTHS.get(implementation, (False, False))[workload.mode == "training"]
    return _WITHIN_LENGTHS if skips and workload.key_value_seq_lengths != "none" else 1.0


def _within_mask(workload: Workload, implementation: str) -> float:
    """The same of what a mask or segments leave."""
    fewest = _SKIPS_MASKED.get(implementation, math.inf)
    if workload.mode == "training" or workload.key_length < fewest:
        return 1.0
    if workload.query_segment_ids != "none":
        return _WITHIN_SEGMENTS
    if not workload.mask.endswith("s"):
        return 1.0
    return _WITHIN_LENGTHS * (_causal_share(workload) if _is_causal_by_mask(workload) else 1.0)


def _is_causal_by_mask(workload: Workload) -> bool:
    """Whether a mask says what each row sees: most of these are causal, as the tuner's are."""
    return workload.reach == (None, None) and workload.has_row_mask


def _seen(workload: Workload) -> float:
    """The share of the logits that positions leave, in blocks."""
    left, right = workload.reach
    if left is None and right is None:
        return 1.0
    if left is not None and right is not None:
        return min(1.0, (left + right + 1) / workload.key_length)
    return _causal_share(workload)


def _causal_share(workload: Workload) -> float:
    blocks = max(1, min(8, workload.query_length // 256))
    return (blocks + 1) / (2 * blocks)
