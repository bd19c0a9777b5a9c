"""The attention itself, slice by slice, as JAX primitives.

Arrays come in the caller's order: query [..., T', H, G, K], key [..., T, H, K], value [..., T, H,
V], bias and mask [..., H, G, T', T] with any dim of size one broadcasting; H counts key/value heads
and G the query heads that share one. Products want heads before rows and keys; slices are brought
into that order one by one, and results back, so that no whole array is ever copied for it.
``attention`` is the entry.

Why primitives: attention, its tangent map and its cotangent map each see their operands' full
shapes when they are lowered, vmapped axes included, so the limit on the logits holds under
``vmap``; and the differentiation rule knows that a call is differentiated, so that forward and
training can run different plans. A ``custom_vjp`` offers neither, nor forward mode. Derivatives
beyond the first fall back to plain JAX over checkpointed slices.

Backward: the row maximum and the sum of exponentials are saved and the weights recomputed per slice
(Dao et al. 2022, FlashAttention, https://arxiv.org/abs/2205.14135). A row of keys too long for the
limit is taken in pieces with a running maximum and sum (Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682).

Attention that is causal, in windows, of sequences with lengths or of several in one is cut into
blocks, of which those without a visible key are left out.

What is excluded has no weight, whatever it is; what is summed with infinite or NaN values of it is
computed again without them (see ``SliceMath``). A row that sees no key is the mean of all values.

To read it: ``inputs`` (what a call is), ``terms`` (what its small arrays say), ``maths`` and
``passes`` (one slice), ``grid`` (all slices, ``cells``), ``problem`` (how they are cut), ``maps``
(forward, tangent and cotangent by slices), ``primitives`` (what JAX sees), then ``dense`` and
``fused`` (with ``seen`` and ``libraries``), which run without slices, and ``shares`` and ``ring``,
what each of several devices does.

What was tried. Figures are speed: "A against B 2x" says that A takes half the time of B, in the
same run.

On CPU (Xeon, 2 cores, jax 0.12, f32, T=4096, 8 heads of 64, where nothing else is said):

- head-major order against haiku's dense attention: 6.8x forward with the division after the second
  product, 5.0x to 6.4x with the division before it;
- masks against haiku's dense attention: 3.1x as an added term, 1.2x as ``where``, which keeps XLA
  from fusing;
- slices taken from arrays in the caller's order against arrays brought into head-major order whole:
  1.2x to 2.0x for short sequences with a batch, 1.0x to 1.3x for long ones, at a half to an eighth
  of the memory;
- keys and values of a head taken once, in an outer loop, against taken for each slice of rows: 1.4x
  with 16384 keys;
- backward in slices of 1/8 against haiku's dense attention: 2.8x with transposed logits, 2.5x in
  the plain orientation. The one product with a transposed left side runs at 80 to 115 GFLOP/s; as
  its own transpose, from narrow transposed keys, at 130 to 195, which is 1.0x to 1.24x for all of
  training;
- causal, in 8 by 8 blocks against the same slices with none left out (arithmetic allows 1.78x,
  torch has 1.5x): 1.40x forward and 1.58x training with those on the diagonal first and then,
  without a mask, those below it; 1.31x and 1.56x with a mask on all, no better with one on a branch
  (``lax.cond``);
- causal, others against those 8 by 8 blocks: a square of 2048 positions, two of 1024 and so on down
  to the diagonal 1.03x forward and 1.0x backward; 8 programs of growing length 1.0x, but XLA held
  the memory of several at once (813 MB, not 65 MB, on jax 0.10); those as branches of one loop
  (``lax.switch``) 0.8x; 4, 6, 12 and 16 blocks, and oblong ones, 0.65x to 0.9x; an inner loop of
  dynamic length that keeps a row's sums in its carry, and keys brought into head-major order once,
  1.0x;
- a window of 256 of 8192 positions (EPYC, 2 cores) against all of them: 12.8x forward and 11.4x
  training with a slice's keys in one piece, 7.8x and 6.7x in blocks of 256 that are joined; eight
  packed sequences of 8192: 4.7x and 3.6x in blocks of 384 rows and 256 keys with what each row sees
  worked out once for all heads (4.2x and 3.9x on jax 0.10), 4.8x and 4.3x in blocks of 256 (3.1x
  and 3.0x on 0.10), 2.8x and 3.0x in blocks of 512 with that in each pass;
- sums over keys that are held for one slice of rows, where a loop of dynamic length goes over its
  keys, against held for all rows (T=8192, slices of 8 MB, where plain slices take 16 MB): 18 MB,
  not 34 MB with lengths, 10 MB, not 23 MB of packed sequences, 1.0x to 1.1x forward;
- slices of a Python loop save no memory under ``jit``. An additional axis for groups of one head
  costs XLA a fusion: dense attention with it against without 0.5x.

On GPUs (H100 and H200, jax 0.11, f32; a pass over the logits costs as much as a product):

- forward as a plain softmax, of which XLA makes one kernel, against dividing last: 1.2x with rows
  of 2048, 8192 and 12288; 1.05x (H100) and 0.98x (H200) with 16000; 0.92x, 0.87x and 0.87x with
  20000, 24576 and 32768;
- where the sums are asked for, the maximum first and the sum together with the weights against both
  in one pass (online softmax): 1.0x to 1.06x;
- forward unsliced against dense attention: 1.0x (8 x 2048, 16 heads of 64). Slices of one head of
  16000 positions, a sixteenth of the memory, against dense: forward 1.00x (H100) and 0.95x (H200),
  training 1.01x (H200, a twelfth). Single products fill and drain the GPU once for each slice: two
  heads have 0.98x, and nothing else of a sixteenth does better than one (2 heads by half of the
  rows, 4 by a quarter, all by a sixteenth 0.93x; keys sliced 0.96x; the loop unrolled the same);
- orientation of the backward's logits, and barriers: no difference. Slices of rows with all heads
  against slices of heads: 0.9x to 0.5x as they get smaller;
- training of short sequences, which recomputes what dense attention keeps, against that: 0.8x (8 x
  2048; 0.77x in slices of a sixteenth);
- cuDNN in bf16 against dense attention: 4x to 6x forward, 3.5x to 4.4x training; our slices, with
  float32 logits, 0.5x to 0.7x. Padded batches (H200): 5.9x and 5.9x with lengths, 4.2x and 3.5x
  with a mask of one row, 4.4x and 4.1x with a mask of each row's own, all against dense attention
  with float32 logits; of that setting what no row sees to zero takes 2% of training;
- Tokamax's kernels against haiku's dense attention (H200): in bf16 with a mask of each row's own
  (8 x 2048) 4.2x and 2.4x (forward and training, mosaic; cuDNN 3.2x and 2.7x), with a bias for
  all (64 x 256, 8 heads of 32) 7.6x and 2.0x (4.9x and 1.9x), with that and padding (256 x 384, 4
  heads of 32) 6.5x and 2.0x (2.7x and 1.6x), plain 5.6x and 2.7x (3.2x and 3.1x), causal with
  grouped heads of 128 (4 x 4096) 7.4x and 3.6x (6.9x and 4.6x); in float32 (triton, TF32) 1.6x
  and 0.88x plain, 4.4x and 1.9x causal;
- what is excluded made zero, and rows without a key made the mean of all values, are passes of
  their own over keys, values and output. Time with them against without (H100, bf16, mosaic,
  forward and training, arrays from outside of the program): padding mask of 4 x 1024 1.66x (58 us)
  and 1.34x, of 16 x 2048 1.18x and 1.10x, mask of each row's own (8 x 2048) 1.23x and 1.12x, pair
  bias and padding (256 x 384, 4 heads of 32) 1.34x and 1.06x; cuDNN with lengths (8 x 2048) 1.33x
  and 1.26x. Zeros in the values alone, the least that keeps infinities out, are 1.11x and 1.04x of
  the first, 1.07x and 1.04x of the second. Tried: scatters that find nothing to put right, which
  XLA copies their array for; a branch taken where all is finite (1.31x and 1.41x of the first,
  1.06x and 1.15x of the second, with the values read for it); keys of sequences that are masked
  throughout made zero, so that the kernel gives the mean (1.2x and 1.1x, but what those queries
  are would count);
- round a ring of two GPUs (65536 positions, causal, training) against one: 1.67x with early and
  late parts on each, 1.25x without, 0.34x by slices where the kernel is not used.
"""

from __future__ import annotations

from autochunk.attention.kernels.dense import dense, log_sum_exp
from autochunk.attention.kernels.fused import NotTaken, platform, taken, trace
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.libraries import quiet
from autochunk.attention.kernels.primitives import attention, promoting
from autochunk.attention.kernels.problem import check_slices
from autochunk.attention.kernels.shares import marker

__all__ = [
    "Call",
    "Inputs",
    "NotTaken",
    "attention",
    "check_slices",
    "dense",
    "log_sum_exp",
    "marker",
    "platform",
    "promoting",
    "quiet",
    "taken",
    "trace",
]
