"""Named shapes, each of a family of models, and the dtypes that they are tuned in where nothing
else is asked for.
"""

from __future__ import annotations

from autochunk.store.profile import Effort
from autochunk.workload import DType

PRESETS = {
    "language-model": "b=2,t=1024,h=12,k=64,causal=yes",
    "encoder": "b=16,t=512,h=12,k=64",
    "vision": "b=32,t=197,h=12,k=64",
    "protein-folding": "b=64,t=256,h=8,k=32,bias=1hts",
    "cross-attention": "b=1,t=512,s=16384,h=8,k=64",
    "long-context": "b=1,t=4096,h=8,k=64",
    "long-language-model": "b=1,t=4096,h=8,k=64,causal=yes",
}
"""A shape each, as ``--shape`` reads it: a causal decoder, a BERT-like encoder, a ViT, MSA row
attention with a pair bias, Perceiver-like cross-attention, one long sequence, and one long causal
sequence."""


def standard_dtypes(effort: Effort, platform: str) -> tuple[DType, ...]:
    """The dtypes of the standard set, for a platform as jax names it.

    What most models there compute in, first.
    """
    if effort == "thorough":
        return (
            ("bfloat16", "float32", "float16")
            if platform != "cpu"
            else ("float32", "bfloat16", "float16")
        )
    if platform == "cpu":
        return ("float32",)
    return ("bfloat16",) if effort == "quick" else ("bfloat16", "float32")
