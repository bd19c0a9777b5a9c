"""The attention itself, slice by slice, as JAX primitives.

Arrays come in the caller's order: query [..., T', H, G, K], key [..., T, H, K], value [..., T, H,
V], bias and mask [..., H, G, T', T], where any dim of size one broadcasts. H counts key/value
heads, G the query heads that share one. Products need heads before rows and keys. Slices are
brought into that order one by one, and results back, so no whole array is ever copied for it.
``attention`` is the entry point.

Why primitives: attention, its tangent map and its cotangent map each see their operands' full
shapes when they are lowered, vmapped axes included, so the limit on the logits holds under
``vmap``. The differentiation rule knows that a call is differentiated, so that forward and training
can run different plans. A ``custom_vjp`` offers neither, nor forward mode. Derivatives beyond the
first fall back to plain JAX over checkpointed slices.

Backward: the row maximum and the sum of exponentials are saved and the weights recomputed per slice
(Dao et al. 2022, FlashAttention, https://arxiv.org/abs/2205.14135). A row of keys too long for the
limit is taken in pieces with a running maximum and sum (Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682).

Causal or windowed attention, and attention of sequences with lengths or of packed sequences, is cut
into blocks. Blocks without a visible key are skipped.

What is excluded has no effect, even if it is infinite or NaN: a sum that it spoils is computed
again without it (see ``SliceMath``). A row that sees no key gives the mean of all values.

Reading order: ``inputs`` (what a call is), ``terms`` (what its small arrays say), ``maths`` and
``passes`` (one slice), ``grid`` (all slices, ``cells``), ``problem`` (how they are cut), ``maps``
(forward, tangent and cotangent by slices), ``primitives`` (what JAX sees, made by ``primitive``),
``dense`` and ``fused`` (with ``libraries``, ``tokamax`` and ``seen``; ``mending``, with
``tile_call``, and ``blind`` put results right, ``in_place``), which run without slices, and
``shares`` (with ``meshes``), ``derivatives``, ``ring`` and ``rings`` (what each of several devices
does).

What was tried, with figures, is in ``EXPERIMENTS.md`` beside this file.
"""

from __future__ import annotations

from autochunk.attention.kernels.dense import dense, log_sum_exp
from autochunk.attention.kernels.fused import NotTaken, platform, taken, trace
from autochunk.attention.kernels.in_place import for_this_machine
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.meshes import is_mixed, mesh_without_devices
from autochunk.attention.kernels.primitive import promoting
from autochunk.attention.kernels.primitives import attention
from autochunk.attention.kernels.problem import check_slices
from autochunk.attention.kernels.shares import marker
from autochunk.attention.kernels.tokamax import quiet

__all__ = [
    "Call",
    "Inputs",
    "NotTaken",
    "attention",
    "check_slices",
    "dense",
    "for_this_machine",
    "is_mixed",
    "log_sum_exp",
    "marker",
    "mesh_without_devices",
    "platform",
    "promoting",
    "quiet",
    "taken",
    "trace",
]
