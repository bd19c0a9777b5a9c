"""An AlphaFold-like block in haiku: attention, outer-product mean, triangle products, transitions.

Its attention is gated and has a mask and a bias of the pairs, as in AlphaFold 2 (Jumper et al.
2021, supplementary algorithms 7, 13 and 14); beside it are the outer-product mean, the triangle
multiplication with outgoing edges and the transitions (algorithms 9 to 11 and 15). It runs in three
ways: whole; as AlphaFold does it, a fixed number of rows at a time (4 in its configuration),
whatever the sizes are; and by autochunk, attention by ``dot_product_attention`` and all else by
``chunked``. Each is timed and its memory taken, forward as for inference or (``--training``) with
gradients.

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
    outer_size: int = 32
    training: bool = False
    dtype: str = "float32"


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


def by_rows(kind: str, fn: Callable[..., jax.Array], name: str) -> Callable[..., jax.Array]:
    """A function of rows [N, ...] and of what they share, by one of KINDS."""
    if kind == "dense":
        return fn
    if kind == "autochunk":

        def chunked(rows: Any, *shared: Any) -> jax.Array:
            axes = (0, *(None for _ in shared))
            return autochunk.chunked(fn, axes, name=f"evoformer.{name}")(rows, *shared)

        return chunked

    def subbatch(rows: Any, *shared: Any) -> jax.Array:
        one = jax.checkpoint(lambda row: fn(row[None], *shared)[0])
        found: jax.Array = jax.lax.map(one, rows, batch_size=SUBBATCH)
        return found

    return subbatch


def transition(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Two layers over each position [N, R, C]."""
    return jax.nn.relu(x @ up) @ down


def triangle_products(left: jax.Array, right: jax.Array) -> jax.Array:
    """Sums over the third residue of products of the other two's edges, [R, R, C] each."""
    return jnp.einsum("ikc,jkc->ijc", left, right)


def outer_products(left: jax.Array, right: jax.Array, out: jax.Array) -> jax.Array:
    """The mean over sequences of outer products, from [R, S, C] each to [R, R, D]."""
    outer = jnp.einsum("isc,jsd->ijcd", left, right) / left.shape[1]
    return jnp.einsum("ijcd,cde->ije", outer, out)


class Rows(hk.Module):
    """What is no attention in the block, each by ``by_rows``."""

    def __init__(self, kind: str, dtype: str, name: str) -> None:
        super().__init__(name=name)
        self._kind, self._dtype = kind, dtype

    def transition(self, x: jax.Array, factor: int = 4) -> jax.Array:
        """[N, R, C] to the same, with ``factor`` as many hidden units."""
        size = x.shape[-1]
        up = self._weights("up", size, size * factor)
        down = self._weights("down", size * factor, size)
        return by_rows(self._kind, transition, "transition")(_norm(x), up, down)

    def triangle(self, pairs: jax.Array) -> jax.Array:
        """Pairs [R, R, C] to the same, gated."""
        size, x = pairs.shape[-1], _norm(pairs)
        left, right, gate = (
            jax.nn.sigmoid(hk.Linear(size, name=f"{name}_gate")(x)) * hk.Linear(size, name=name)(x)
            for name in ("left", "right", "out")
        )
        return gate * by_rows(self._kind, triangle_products, "triangle")(left, right)

    def outer(self, msa: jax.Array, hidden: int, size: int) -> jax.Array:
        """An MSA [S, R, C] to pairs [R, R, size]."""
        x = _norm(msa)
        left, right = (
            jnp.swapaxes(hk.Linear(hidden, name=name)(x), 0, 1) for name in ("left", "right")
        )
        out = self._weights("out", hidden, hidden, size)
        return by_rows(self._kind, outer_products, "outer_product")(left, right, out)

    def _weights(self, name: str, *shape: int) -> jax.Array:
        deviation = 1 / math.sqrt(math.prod(shape[:-1]))
        init = hk.initializers.TruncatedNormal(deviation)
        return hk.get_parameter(name, shape, self._dtype, init=init)


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
        rows = functools.partial(Rows, kind, sizes.dtype)
        msa += make(heads=sizes.msa_heads, name="msa_row")(msa, msa_seen, pairs)
        msa += rows(name="msa_transition").transition(msa)
        pairs += rows(name="outer").outer(msa, sizes.outer_size, sizes.pair_size)
        pairs += rows(name="triangle_outgoing").triangle(pairs)
        triangle = functools.partial(make, heads=sizes.pair_heads)
        pairs += triangle(name="triangle_starting")(pairs, pair_seen, pairs)
        turned, seen = jnp.swapaxes(pairs, 0, 1), pair_seen.T
        turned += triangle(name="triangle_ending")(turned, seen, turned)
        pairs = jnp.swapaxes(turned, 0, 1)
        return msa, pairs + rows(name="pair_transition").transition(pairs)

    return hk.without_apply_rng(hk.transform(run))


def inputs(sizes: Sizes) -> tuple[jax.Array, ...]:
    """An MSA and pairs, of which the last eighth of the residues is padding."""
    random, residues = np.random.default_rng(0), sizes.residues
    msa = random.standard_normal((sizes.sequences, residues, sizes.msa_size), np.float32)
    pairs = random.standard_normal((residues, residues, sizes.pair_size), np.float32)
    there = np.arange(residues) < residues - residues // 8
    masks = [np.broadcast_to(there, array.shape[:2]) for array in (msa, pairs)]
    arrays = (one.astype(sizes.dtype) for one in map(jnp.asarray, (msa, pairs)))
    return (*arrays, *map(jnp.asarray, masks))


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    read = vars(parser.parse_args(arguments))
    rounds = read.pop("rounds")
    compare(make, KINDS, Sizes(**read), rounds=rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
