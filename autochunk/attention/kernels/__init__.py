"""The attention itself, slice by slice, as JAX primitives.

Arrays come in the caller's order: query [..., T', H, G, K], key [..., T, H, K], value [..., T, H, V], bias and mask [..., H, G, T', T] with any dim of size
one broadcasting; H counts key/value heads and G the query heads that share one. Products want heads before rows and keys; slices are brought into that order
one by one, and results back, so that no whole array is ever copied for it. ``attention`` is the entry.

Why primitives: attention, its tangent map and its cotangent map each see their operands' full shapes when they are lowered, vmapped axes included, so
the limit on the logits holds under ``vmap``; and the differentiation rule knows that a call is differentiated, so that forward and training can run
different plans. A ``custom_vjp`` offers neither, nor forward mode. Derivatives beyond the first fall back to plain JAX over checkpointed slices.

Backward: the row maximum and the sum of exponentials are saved and the weights recomputed per slice (Dao et al. 2022, FlashAttention,
https://arxiv.org/abs/2205.14135). A row of keys too long for the limit is taken in pieces with a running maximum and sum (Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682).

Causal attention without a mask is cut into blocks, of which those above the diagonal are left out.

What was tried on CPU (Xeon, 2 cores, jax 0.12, f32, T=4096, 8 heads of 64; ratios to haiku's dense attention in the same run):

- head-major order with the division after the second product 6.8x forward, with the division before it 5.0x to 6.4x;
- masks as an added term 3.1x, as ``where``, which keeps XLA from fusing, 1.2x;
- slices taken from arrays in the caller's order, against arrays brought into head-major order whole, time of the one over the other: 1.2x to 2.0x for short
  sequences with a batch, 1.0x to 1.3x for long ones, at a half to an eighth of the memory. Keys and values of a head are taken once, in an outer loop:
  taken anew for each slice of rows, a head of 16384 keys lost 1.4x;
- backward with transposed logits 2.8x, in the plain orientation 2.5x (both in slices of 1/8). Its one product with a transposed left side ran at 80 to 115
  GFLOP/s; as its own transpose, from narrow transposed keys, at 130 to 195: 1.0x to 1.24x of all training;
- causal in 8 by 8 blocks, those on the diagonal first and then, without a mask, those below it, over the same slices without leaving any out: 1.40x forward and
  1.58x training; arithmetic allows 1.78x (torch 1.5x and 1.5x). With a mask on all of them 1.31x and 1.56x, and with one on a branch (``lax.cond``) no faster
  than that. A square of 2048 positions, two of 1024 and so on down to the diagonal, for fewer and longer blocks, gained 1.03x forward and nothing in the
  backward pass. As 8 programs of growing length it is no faster, but XLA held the memory of several at once (813 MB against 65 MB on jax 0.10); those as
  branches of one loop (``lax.switch``) 0.8x of the blocks' speed; 4, 6, 12 and 16 blocks, and oblong ones, 0.65x to 0.9x; an inner loop of dynamic length
  that keeps a row's sums in its carry, and keys brought into head-major order once, 1.0x;
- slices of a Python loop save no memory under ``jit``; an additional axis for groups of one head costs XLA a fusion and halves the speed of dense attention.

On GPUs (H100 and H200, jax 0.11, f32; a pass over the logits costs as much as a product):

- forward as a plain softmax, of which XLA makes one kernel, 1.2x the speed of dividing last, and that of dense attention (8 x 2048, 16 heads of 64, unsliced;
  1.2x with rows of 8192 and of 12288, too). Rows of 16000 1.05x (H100) and 0.98x (H200); of 20000, 24576 and 32768 0.92x, 0.87x and 0.87x;
- where the sums are asked for, the maximum first and the sum together with the weights: 1.0x to 1.06x the speed of both in one pass (online softmax);
- slices of one head of 16000 positions: forward 1.00x (H100) and 0.95x (H200) of dense, training 1.01x (H200), at a sixteenth to a twelfth of the memory. On
  the H200 no slices of a sixteenth do better (2 heads by half of the rows, 4 by a quarter, all by a sixteenth: 0.93x; keys sliced: 0.96x); two heads 0.98x.
  Single products fill and drain the GPU once for each slice: XLA has no faster kernels for them, and unrolling the loop changes nothing;
- orientation of the backward's logits and barriers: no difference. Slices of rows with all heads lose to slices of heads: 0.9x to 0.5x as they get smaller;
- recomputing what dense attention keeps costs training of short sequences 1.2x (8 x 2048, slices of a sixteenth 1.3x);
- cuDNN, bf16: 4x to 6x dense forward, 3.5x to 4.4x training; ours, with float32 logits, 0.5x to 0.7x.
"""

from __future__ import annotations

from autochunk.attention.kernels.dense import dense
from autochunk.attention.kernels.fused import FUSED, Fused, NotTaken, trace
from autochunk.attention.kernels.inputs import Call, Inputs
from autochunk.attention.kernels.primitives import attention

__all__ = ["FUSED", "Call", "Fused", "Inputs", "NotTaken", "attention", "dense", "trace"]
