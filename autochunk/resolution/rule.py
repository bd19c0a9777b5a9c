"""The plan for what nothing is known of: by the kind of device and the form of the call.

Its figures are of the profiles that ship and of two more CPUs, 72 workloads on CPUs and 92 on GPUs,
as the ratio of the rule's time to the best plan's. On CPUs slices of 17 MB take 1.04 to 1.10 times
as long (medians of three machines; at worst 1.5), 1000 MB 1.17 to 1.38 (at worst 4.4), dense
attention 1.6 to 2.2 (at worst 11). On GPUs a fused kernel wins wherever it takes a call, but for
float32 with few rows (``_is_narrow``); else dense attention is faster than slices, which take 1.5
times as long as it, but keeps all its weights for the backward pass.
"""

from __future__ import annotations

from collections.abc import Collection

from autochunk.device import Device
from autochunk.implementations import is_sliced, kernels_for
from autochunk.plan import BYTES_PER_MB, DEFAULT_MAX_CHUNK_SIZE_MB, Plan
from autochunk.predict.memory import mask_bytes
from autochunk.workload import Workload

# On a CPU; the logits of sizes that are powers of two are cut into slices of 2**24 bytes.
_CPU_MB = 17.0
# Of a GPU's memory, what the logits of dense attention may take: a training step holds them several
# times, and a model has several layers. A mask that is made for a fused kernel may, too.
_MODEST = 1 / 32
# Rows of one head that are a block of a fused kernel, and how many blocks all of a GPU takes.
_ROWS_OF_A_BLOCK, _BLOCKS = 64, 128
# One slice of logits takes at most this share of a memory budget: weights and their cotangents live
# beside it.
_SHARE_OF_BUDGET = 0.25


def usual_plan(
    workload: Workload,
    device: Device,
    *,
    implementation: str | None = None,
    memory_budget_mb: float | None = None,
    without: Collection[str] = (),
) -> tuple[Plan, str]:
    """A plan, and why it is this one.

    Args:
      workload: of any form.
      device: where.
      implementation: the only one that is asked for, if any.
      memory_budget_mb: most working memory in MB (10^6 bytes), if there is such a limit.
      without: fused kernels that do not take the call.
    """
    if implementation is not None and not is_sliced(implementation):
        return Plan(implementation), f"implementation={implementation!r} was asked for"
    if implementation is None and device.platform != "cpu":
        most = _modest(device)
        if memory_budget_mb is not None:
            most = min(most, memory_budget_mb * BYTES_PER_MB * _SHARE_OF_BUDGET)
        kernel = usual_kernel(workload, device, without)
        if kernel and mask_bytes(workload) <= most:
            return Plan(kernel), "a fused kernel, where it takes the call, is the fastest on a GPU"
        if workload.logits_bytes <= most:
            return Plan("dense"), f"all logits are no more than {most / BYTES_PER_MB:.3g} MB"
    limit = _CPU_MB if device.platform == "cpu" else DEFAULT_MAX_CHUNK_SIZE_MB
    if memory_budget_mb is not None:
        limit = min(limit, memory_budget_mb * _SHARE_OF_BUDGET)
    return Plan(implementation or "xla", limit), "slices of a usual size"


def _modest(device: Device) -> float:
    """Bytes that a mask, or all logits, may take."""
    return device.memory_gib * 2**30 * _MODEST


def usual_kernel(workload: Workload, device: Device, without: Collection[str]) -> str | None:
    """The first fused kernel that may be there for such a device and call.

    cuDNN's comes last where it would need a mask or a bias with all rows and keys; none does where
    all would need a mask that takes too much, or where dense attention is faster and fits.
    """
    names = kernels_for(workload, device.platform)
    masked = mask_bytes(workload)
    if masked > _modest(device):
        return None
    if _is_narrow(workload) and workload.logits_bytes <= _modest(device):
        return None
    if workload.mask != "none" or workload.bias != "none" or masked:
        names.sort(key="cudnn".__eq__)
    return next((name for name in names if name not in without), None)


def _is_narrow(workload: Workload) -> bool:
    """Whether a call has too few rows for a kernel in float32, in which dense attention is fast.

    A kernel of few blocks leaves parts of a GPU without one: 512 queries of 8 heads and 16384 keys
    take 1.3 to 2.1 times as long as dense, forward and training, and a training step of single
    queries 2.2 to 2.5 times. In half precision kernels are faster there, too.
    """
    if workload.dtype != "float32":
        return False
    blocks = -(-workload.query_length // _ROWS_OF_A_BLOCK) * workload.batch * workload.num_heads
    return blocks < _BLOCKS or (workload.mode == "training" and workload.query_length == 1)
