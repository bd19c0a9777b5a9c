"""Working memory: what a plan holds beside a call's arguments and results.

Arrays are counted as compiled programs have them: copies of the logits, operands of a slice, what
excluded keys and values are zeroed into, masks that kernels are given, cotangents of grouped heads
before they are summed. How many there are was read off the memory that XLA reports; what remains
(workspace of products, what a compiler fuses) is learned from curves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from autochunk.implementations import is_sliced
from autochunk.plan import Plan
from autochunk.predict.work import HALVES, Work, kind_of, work_of
from autochunk.workload import Workload

LEAST_BYTES = 2**20
"""Working memory below this makes no difference."""


@dataclass(frozen=True)
class _Held:
    """How often arrays are there; of a pair the second is of what is not half precision.

    Attributes:
      logits: those at once, in float32.
      excluding: so many more of them, where keys are left out.
      added: so many more, where a bias, ALiBi, a soft cap or dropout is between two products.
      few: so many more, where a CPU has few heads' at once, or long ones: it does not fuse these.
      slices: operands of a slice, in float32.
      operands: all queries, keys and values, in their dtype.
      zeroed: so many more of these, where keys are left out.
      stacked: so many more of these in the order of slices of some heads, where keys are left out.
      several: so many more of these where slices have several sequences, and no keys are left out.
      by_rows: so many more of these in slices of rows, which all add to the cotangents of all keys.
      unfused: so many more logits, where a CPU computes float16: it fuses none of that.
    """

    logits: tuple[float, float]
    excluding: tuple[float, float] = (0.0, 0.0)
    added: float = 0.0
    few: tuple[float, float] = (0.0, 0.0)
    slices: tuple[float, float] = (0.0, 0.0)
    operands: tuple[float, float] = (0.0, 0.0)
    zeroed: float = 0.0
    stacked: tuple[float, float] = (0.5, 0.5)
    several: float = 0.0
    by_rows: float = 0.0
    unfused: float = 0.0


# CPUs compute half precision in float32, and fuse a part of the logits away, where nothing is done
# to these between two products.
_CPU = {
    ("dense", "forward"): _Held(
        (1.0, 1.0), excluding=(2.0, 2.0), added=1.0, few=(0.0, 1.0), unfused=0.5
    ),
    ("dense", "training"): _Held((3.3, 3.8), excluding=(1.0, 1.0), slices=(0.5, 0.5)),
    ("sliced", "forward"): _Held(
        (0.5, 0.5), added=0.7, few=(0.6, 0.6), slices=(3.0, 1.0), zeroed=0.4, unfused=1.5
    ),
    ("sliced", "training"): _Held((2.4, 2.4), slices=(3.3, 1.3), operands=(1.5, 0.0), zeroed=0.4),
}
# Logits are float32, the weights that are multiplied with values in the inputs' dtype.
_ACCELERATOR = {
    ("dense", "forward"): _Held((1.5, 2.0)),
    ("dense", "training"): _Held((2.5, 3.0), excluding=(0.0, -0.3)),
    ("sliced", "forward"): _Held(
        (1.5, 2.0),
        excluding=(0.6, 0.6),
        operands=(0.2, 0.2),
        zeroed=0.2,
        stacked=(0.8, 0.8),
        several=0.6,
    ),
    ("sliced", "training"): _Held(
        (3.0, 3.8),
        excluding=(0.3, 0.3),
        operands=(1.6, 0.3),
        zeroed=0.5,
        stacked=(1.3, 1.0),
        several=0.5,
        by_rows=0.9,
    ),
}
_FEW_HEADS, _LONG = 8, 4096
_GROUPED = 0.5  # of the operands, with keys and values for all heads: one of these two at a time
_ALIGNED = 8  # elements of half precision, 16 bytes: what Hopper's asynchronous copies need


@dataclass(frozen=True)
class _Kernel:
    """What a fused kernel is given, and gives, in programs around it.

    Attributes:
      zeroed: arrays as large as keys or values where some of these are left out, in forward and in
        training; in training ``queries`` as large as queries.
      masks: bytes of a mask for each row and key.
      given: of which masks a copy is made, by the letter of their rows: "t" where these differ,
        "1" where they do not.
      sums: bytes of float32 sums of the cotangents of queries, for each of their elements.
      rows: bytes for each row and head, of sums and maxima.
      bias: arrays as large as a bias's cotangent before it is summed.
      grouped: whether cotangents of keys and values are there for all heads.
      windows: whether a window that is bounded on both sides is given as a mask.
      odd: bytes for each logit where rows of keys are not aligned to 16 bytes.
    """

    zeroed: tuple[float, float]
    queries: float
    masks: tuple[float, float]
    given: str = ""
    sums: float = 0.0
    rows: float = 12.0
    bias: float = 1.0
    grouped: bool = True
    windows: bool = False
    odd: tuple[float, float] = (0.0, 0.0)


_KERNELS = {
    "cudnn": _Kernel(
        zeroed=(1.0, 2.0), queries=2.0, masks=(2.0, 2.0), given="t1", sums=4.0, rows=8.0
    ),
    "tokamax_mosaic": _Kernel(
        zeroed=(0.0, 2.0),
        queries=1.0,
        masks=(1.0, 2.0),
        given="t",
        bias=2.0,
        grouped=False,
        odd=(3.0, 4.0),
    ),
    "tokamax_triton": _Kernel(zeroed=(0.0, 2.0), queries=1.0, masks=(1.0, 1.0), windows=True),
}
# Of one that nobody has measured yet.
_UNKNOWN = _Kernel(zeroed=(1.0, 2.0), queries=1.0, masks=(1.0, 2.0), given="t1")


def _kernel(name: str) -> _Kernel:
    return _KERNELS.get(name, _UNKNOWN)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a call's arrays, in its dtype: queries, keys with values, those for all heads."""

    queries: int
    keys: int
    every: int


def _sizes(workload: Workload) -> _Sizes:
    size = (workload.key_size + workload.value_size) * _itemsize(workload)
    keys = workload.batch * workload.key_length * size
    return _Sizes(
        workload.batch * workload.query_length * workload.num_heads * size,
        keys * workload.num_kv_heads,
        keys * workload.num_heads,
    )


def _itemsize(workload: Workload) -> int:
    return 2 if workload.dtype in HALVES else workload.logits_itemsize


@functools.lru_cache(maxsize=10_000)
def temp_bytes(workload: Workload, plan: Plan, platform: str) -> float:
    """Working memory by what a plan holds; at least ``LEAST_BYTES``."""
    if kind_of(plan.implementation) == "fused":
        return max(_of_kernel(workload, _kernel(plan.implementation)), LEAST_BYTES)
    return max(_of_logits(workload, plan, platform), LEAST_BYTES)


def _of_logits(workload: Workload, plan: Plan, platform: str) -> float:
    work, sizes = work_of(workload, plan), _sizes(workload)
    table = _CPU if platform == "cpu" else _ACCELERATOR
    held = table[kind_of(plan.implementation), workload.mode]
    full = workload.dtype not in HALVES
    excluding = _zeroes(workload) or workload.reach != (None, None)
    share = work.rows / workload.query_length, work.keys / workload.key_length
    of_slice = (sizes.queries * share[0] + sizes.keys * share[1]) * work.share
    logits, operands = held.logits[full], held.operands[full]
    if plan.implementation == "xla_rows":
        operands += held.by_rows
    if platform == "cpu" and workload.dtype == "float16":
        logits += held.unfused
    if excluding:
        logits += held.excluding[full]
        operands += held.zeroed + (held.stacked[full] if _stacks(workload, work, platform) else 0.0)
    else:
        if _adds(workload):
            logits += held.added
        elif workload.dtype != "float16" and _few(work, workload, plan):
            logits += held.few[full]
        operands += _several(plan, work, workload.batch) * held.several
    if platform == "cpu" and kind_of(plan.implementation) == "dense":
        # Operands in the order of its products are gone when most of the logits are there.
        operands = max(operands, 1.0 - logits * work.at_once / (sizes.queries + sizes.keys))
    return (
        logits * work.at_once
        + held.slices[full] * of_slice * workload.logits_itemsize / _itemsize(workload)
        + operands * (sizes.queries + sizes.keys)
        + _GROUPED * grouped_bytes(workload)
    )


def _stacks(workload: Workload, work: Work, platform: str) -> bool:
    """Whether operands are brought into the order of slices of some heads.

    A GPU takes one head from where it is, and needs no blocks where a mask is given.
    """
    if platform == "cpu":
        return work.share < 1
    return work.share < 1 < _heads(work, workload) and workload.mask == "none"


def _few(work: Work, workload: Workload, plan: Plan) -> bool:
    """Whether a CPU's slice has few heads, or rows of its own of many keys; dense: many keys."""
    if not is_sliced(plan.implementation):
        return work.keys >= _LONG
    by_rows = work.rows < workload.query_length and work.keys > _LONG
    return by_rows or _heads(work, workload) < _FEW_HEADS


def _heads(work: Work, workload: Workload) -> float:
    """How many heads, of all sequences, a slice has."""
    return work.share * workload.batch * workload.num_heads


def _several(plan: Plan, work: Work, batch: int) -> bool:
    """Whether a slice has rows of several sequences, but not all."""
    some = plan.implementation == "xla_rows" if work.share == 1 else work.share * batch > 1
    return batch > 1 and some


def _adds(workload: Workload) -> bool:
    """Whether something is done to logits between two products."""
    absent = {workload.bias, workload.alibi_slopes, workload.dropout_bits} == {"none"}
    return workload.soft_cap or not absent


def _of_kernel(workload: Workload, kernel: _Kernel) -> float:
    sizes, training = _sizes(workload), workload.mode == "training"
    pairs = workload.batch * workload.query_length * workload.key_length * workload.num_heads
    held = kernel.masks[training] * mask_bytes(workload)
    if workload.mask != "none" and workload.mask[2:3] in kernel.given:
        copies = 2 if training and workload.bias != "none" else 1
        held += copies * kernel.masks[0] * _given_mask(workload)
    if kernel.windows and None not in workload.reach and not held:
        held += workload.query_length * workload.key_length
    if workload.key_length % _ALIGNED:
        held += kernel.odd[training] * pairs
    grouped = grouped_bytes(workload) if training and kernel.grouped else 0
    # Those of fewer heads are gone when there are some for all heads.
    held += max(kernel.zeroed[training] * sizes.keys / 2 if _zeroes(workload) else 0, grouped)
    if training:
        held += kernel.queries * sizes.queries / 2 if _zeroes(workload) else 0
        rows = workload.batch * workload.num_heads * workload.query_length
        held += rows * (kernel.rows + kernel.sums * workload.key_size)
        held += kernel.bias * pairs * _itemsize(workload) if workload.bias != "none" else 0
    return held


def operand_bytes(workload: Workload) -> int:
    """Bytes of queries, keys and values, and as many of outputs as of queries."""
    sizes = _sizes(workload)
    return sizes.queries + sizes.keys


def grouped_bytes(workload: Workload) -> int:
    """Bytes of keys and values for all heads, where groups of heads share them; else none."""
    sizes = _sizes(workload)
    return sizes.every if sizes.every > sizes.keys else 0


def mask_itemsize(workload: Workload, kernel: str) -> float:
    """Bytes of a mask or bias that a fused kernel reads for each logit."""
    added = _itemsize(workload) if workload.bias != "none" else 0
    masked = mask_bytes(workload) or workload.mask != "none"
    return added + (_kernel(kernel).masks[0] if masked else 0)


def _zeroes(workload: Workload) -> bool:
    """Whether keys are left out by more than positions that are known: what these hold is zeroed.

    It may be what no number is.
    """
    return (
        workload.mask != "none"
        or bool(workload.covering)
        or (workload.reach != (None, None) and workload.query_offset != "none")
    )


def _given_mask(workload: Workload) -> int:
    """Rows and keys of a given mask, with heads where a bias is added to it."""
    if workload.mask == "none":
        return 0
    heads = workload.num_heads if workload.bias != "none" else 1
    return workload.batch * heads * workload.query_length * workload.key_length


def mask_bytes(workload: Workload) -> int:
    """Bytes of the mask that fused kernels are given for segments and for offset positions.

    One byte for each row and key, of each sequence where these differ.
    """
    patterns = [workload.query_segment_ids, workload.key_value_segment_ids]
    if workload.reach != (None, None):
        patterns.append(workload.query_offset)
    letters = "".join(pattern for pattern in patterns if pattern != "none")
    if not letters:
        return 0
    sequences = workload.batch if "b" in letters else 1
    return sequences * workload.query_length * workload.key_length
