"""Named families of attention shapes, and the standard set that is tuned where nothing else is asked for."""

from __future__ import annotations

from autochunk.errors import ArgumentError

PRESETS: dict[str, tuple[str, ...]] = {
    "language-model": ("b=2,t=1024,h=12,k=64,causal=yes",),
    "encoder": ("b=16,t=512,h=12,k=64",),
    "vision": ("b=32,t=197,h=12,k=64",),
    "protein-folding": ("b=64,t=256,h=8,k=32,bias=1hts",),
    "cross-attention": ("b=1,t=512,s=16384,h=8,k=64",),
    "long-context": ("b=1,t=4096,h=8,k=64",),
}
"""Shapes as ``--shape`` reads them: a causal decoder, a BERT-like encoder, a ViT, MSA row attention with a pair bias, Perceiver-like cross-attention, and
one long sequence."""

STANDARD_SET = {
    "quick": ("vision", "language-model", "long-context"),
    "standard": tuple(PRESETS),
    "thorough": tuple(PRESETS),
}
"""Presets that an effort tunes unasked, the longest last: time that the others leave is theirs."""


def preset_shapes(name: str) -> tuple[str, ...]:
    """The shapes of a preset.

    Raises:
      ArgumentError: there is no such preset.
    """
    if name not in PRESETS:
        raise ArgumentError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
