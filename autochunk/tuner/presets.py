"""Named families of attention shapes, and the standard set that is tuned where nothing else is asked for."""

from __future__ import annotations

from autochunk.errors import ArgumentError
from autochunk.store.profile import Effort
from autochunk.workload import DType

PRESETS: dict[str, tuple[str, ...]] = {
    "language-model": ("b=2,t=1024,h=12,k=64,causal=yes",),
    "encoder": ("b=16,t=512,h=12,k=64",),
    "vision": ("b=32,t=197,h=12,k=64",),
    "protein-folding": ("b=64,t=256,h=8,k=32,bias=1hts",),
    "cross-attention": ("b=1,t=512,s=16384,h=8,k=64",),
    "long-context": ("b=1,t=4096,h=8,k=64",),
    "long-language-model": ("b=1,t=4096,h=8,k=64,causal=yes",),
}
"""Shapes as ``--shape`` reads them: a causal decoder, a BERT-like encoder, a ViT, MSA row attention with a pair bias, Perceiver-like cross-attention, one
long sequence, and one long causal sequence."""

STANDARD_SET: dict[Effort, tuple[str, ...]] = {
    "quick": ("vision", "language-model", "long-context"),
    "standard": ("language-model", "encoder", "vision", "protein-folding", "cross-attention", "long-context"),
    "thorough": tuple(PRESETS),
}
"""Presets that an effort tunes unasked, the longest last: time that the others leave is theirs."""


def standard_dtypes(effort: Effort, platform: str) -> tuple[DType, ...]:
    """The dtypes of the standard set, for a platform as jax names it: what most models there compute in, first."""
    if effort == "thorough":
        return ("bfloat16", "float32", "float16") if platform != "cpu" else ("float32", "bfloat16", "float16")
    if platform == "cpu":
        return ("float32",)
    return ("bfloat16",) if effort == "quick" else ("bfloat16", "float32")


def preset_shapes(name: str) -> tuple[str, ...]:
    """The shapes of a preset.

    Raises:
      ArgumentError: there is no such preset.
    """
    if name not in PRESETS:
        raise ArgumentError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
