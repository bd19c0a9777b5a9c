"""Named shapes, each of a family of models; the dtypes and modes that shapes are tuned in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autochunk.store.profile import Effort
from autochunk.workload import MODES, DType, Mode, Workload

PRESETS = {
    "language-model": "b=2,t=1024,h=12,k=64,causal=yes",  # a causal decoder
    "encoder": "b=16,t=512,h=12,k=64",  # BERT-like
    "vision": "b=32,t=197,h=12,k=64",  # a ViT
    "protein-folding": "b=64,t=256,h=8,k=32,bias=1hts",  # MSA row attention with a pair bias
    "cross-attention": "b=1,t=512,s=16384,h=8,k=64",  # Perceiver-like
    "long-context": "b=1,t=4096,h=8,k=64",  # one long sequence
    "long-language-model": "b=1,t=4096,h=8,k=64,causal=yes",  # one long causal sequence
    "padding-mask": "b=4,t=1024,h=16,k=64,mask=b11s",  # a padded batch, as most code says it
    "padding-lengths": "b=8,t=2048,h=16,k=64,kv_lengths=yes",  # as lengths
    "packed": "b=1,t=8192,h=8,k=64,causal=yes,q_segments=yes,kv_segments=yes",
    "grouped-heads": "b=1,t=4096,h=32,kv_heads=8,k=128,causal=yes",  # Llama-like
    "alphafold": "b=64,t=384,h=4,k=32,bias=1hts,mask=b11s",  # a pair bias and padding
    "decode": "b=32,t=1,s=4096,h=32,kv_heads=8,k=128,kv_lengths=yes",  # one token, from a cache
    "sliding-window": "b=1,t=8192,h=8,k=64,window=1023:0",  # Mistral-like
}
"""A shape each, as ``--shape`` reads it."""


def standard_dtypes(effort: Effort, platform: str) -> tuple[DType, ...]:
    """The dtypes of the standard set on a platform as jax names it.

    What most models there compute in comes first.
    """
    if platform == "cpu":
        return ("float32", "bfloat16", "float16") if effort == "thorough" else ("float32",)
    by_effort: dict[Effort, tuple[DType, ...]] = {
        "quick": ("bfloat16",),
        "standard": ("bfloat16", "float32"),
        "thorough": ("bfloat16", "float32", "float16"),
    }
    return by_effort[effort]


def workloads_of(
    shapes: Iterable[str], dtypes: Sequence[DType] = ("float32",), modes: Sequence[Mode] = MODES
) -> list[Workload]:
    """Each shape in each dtype and mode.

    Raises:
      WorkloadError: a shape cannot be read.
    """
    return [
        Workload.parse(shape, dtype=dtype, mode=mode)
        for dtype in dtypes
        for shape in shapes
        for mode in modes
    ]


def of_kind(
    workloads: Iterable[Workload], dtypes: Sequence[DType], modes: Sequence[Mode]
) -> list[Workload]:
    """Those that have one of these dtypes, or any if none is given, and one of these modes."""
    return [
        workload
        for workload in workloads
        if (not dtypes or workload.dtype in dtypes) and workload.mode in modes
    ]
