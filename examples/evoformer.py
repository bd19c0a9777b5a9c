"""An AlphaFold-like block in haiku: MSA row attention with pair bias, and triangle attention.

Its attention is gated and has a mask and a bias of the pairs, as in AlphaFold 2 (Jumper et al.
2021, supplementary algorithms 7, 13 and 14). It runs in three ways: dense; as AlphaFold does it,
a fixed number of rows at a time (4 in its configuration), whatever the sizes are; and by autochunk.
Each is timed and its memory taken, forward as for inference or (``--training``) with gradients.

    python examples/evoformer.py --residues 256
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from measuring import compare

import autochunk

KINDS = ("dense", "subbatch", "autochunk")
SUBBATCH = 4  # rows at a time


@dataclass(frozen=True)
class Sizes:
    """Of the block; those of AlphaFold 2 but for the number of sequences."""

    residues: int
    sequences: int = 128
    msa_size: int = 256
    msa_heads: int = 8
    pair_size: int = 128
    pair_heads: int = 4
    head_size: int = 32
    training: bool = False


def dense(query: Any, key: Any, value: Any, seen: Any, bias: Any) -> jax.Array:
    """Attention [N, R, H, K] within each of N rows; ``seen`` [N, R], ``bias`` [H, R, R]."""
    logits = jnp.einsum("nqhk,nshk->nhqs", query, key) / math.sqrt(query.shape[-1])
    logits = jnp.where(seen[:, None, None], logits + bias[None], -1e9)
    return jnp.einsum("nhqs,nshk->nqhk", jax.nn.softmax(logits), value)


def subbatch(query: Any, key: Any, value: Any, seen: Any, bias: Any) -> jax.Array:
    """The same, SUBBATCH rows at a time."""

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, seen = (array[None] for array in row)
        return dense(query, key, value, seen, bias)[0]

    rows = (query, key, value, seen)
    found: jax.Array = jax.lax.map(jax.checkpoint(one), rows, batch_size=SUBBATCH)
    return found


def sliced(query: Any, key: Any, value: Any, seen: Any, bias: Any) -> jax.Array:
    """The same, in the slices that are best here."""
    return autochunk.dot_product_attention(
        query, key, value, bias[None], mask=seen[:, None, None, :]
    )


ATTENTION = dict(zip(KINDS, (dense, subbatch, sliced), strict=True))


class GatedAttention(hk.Module):
    """Attention within each row of x [N, R, C], with a bias of pairs [R, R, D]."""

    def __init__(self, kind: str, heads: int, head_size: int, name: str) -> None:
        super().__init__(name=name)
        self.attention, self.heads, self.head_size = ATTENTION[kind], heads, head_size

    def __call__(self, x: jax.Array, seen: jax.Array, pairs: jax.Array) -> jax.Array:
        """[N, R, C] to the same; positions where ``seen`` [N, R] is false take no part."""
        x = _norm(x)
        split = (*x.shape[:-1], self.heads, self.head_size)
        linear = functools.partial(hk.Linear, self.heads * self.head_size, with_bias=False)
        query, key, value = (
            linear(name=name)(x).reshape(split) for name in ("query", "key", "value")
        )
        bias = hk.Linear(self.heads, with_bias=False, name="bias")(_norm(pairs))
        attended = self.attention(query, key, value, seen, jnp.moveaxis(bias, -1, 0))
        gate = jax.nn.sigmoid(linear(name="gate")(x))
        return hk.Linear(x.shape[-1], name="out")(gate * attended.reshape(gate.shape))


def _norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)


def block(kind: str, sizes: Sizes) -> hk.Transformed:
    """Updates msa [S, R, C] and pairs [R, R, D], given which positions of both there are."""

    def run(msa: Any, pairs: Any, msa_seen: Any, pair_seen: Any) -> tuple[jax.Array, jax.Array]:
        make = functools.partial(GatedAttention, kind, head_size=sizes.head_size)
        msa += make(heads=sizes.msa_heads, name="msa_row")(msa, msa_seen, pairs)
        triangle = functools.partial(make, heads=sizes.pair_heads)
        pairs += triangle(name="triangle_starting")(pairs, pair_seen, pairs)
        turned, seen = jnp.swapaxes(pairs, 0, 1), pair_seen.T
        turned += triangle(name="triangle_ending")(turned, seen, turned)
        return msa, jnp.swapaxes(turned, 0, 1)

    return hk.without_apply_rng(hk.transform(run))


def inputs(sizes: Sizes) -> tuple[jax.Array, ...]:
    """An MSA and pairs, of which the last eighth of the residues is padding."""
    random, residues = np.random.default_rng(0), sizes.residues
    msa = random.standard_normal((sizes.sequences, residues, sizes.msa_size), np.float32)
    pairs = random.standard_normal((residues, residues, sizes.pair_size), np.float32)
    there = np.arange(residues) < residues - residues // 8
    masks = [np.broadcast_to(there, array.shape[:2]) for array in (msa, pairs)]
    return tuple(map(jnp.asarray, (msa, pairs, *masks)))


def make(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The block by one of KINDS, forward or with gradients, and its arguments."""
    msa, pairs, *masks = inputs(sizes)
    function = block(kind, sizes)
    parameters = jax.jit(block("autochunk", sizes).init)(jax.random.key(0), msa, pairs, *masks)

    def loss(parameters: Any, msa: Any, pairs: Any, *masks: Any) -> jax.Array:
        return sum(jnp.sum(one**2) for one in function.apply(parameters, msa, pairs, *masks))  # type: ignore[return-value]

    step = jax.grad(loss, argnums=(0, 1, 2)) if sizes.training else function.apply
    return step, (parameters, msa, pairs, *masks)


def main(arguments: list[str]) -> None:
    """Reads the sizes and compares."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--residues", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    read = vars(parser.parse_args(arguments))
    rounds = read.pop("rounds")
    compare(make, KINDS, Sizes(**read), rounds=rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
