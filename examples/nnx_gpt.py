"""A small GPT in Flax nnx that learns to write English prose with dropout, then writes some.

Its attention is ``nnx.MultiHeadAttention`` with autochunk's function in place of Flax's: training,
and decoding with the cache. The text is what ships with Python (see ``transformer.py``). With
``--compare`` it is not trained: a training step, at the size of GPT-2 small unless told otherwise,
is timed with Flax's function and with autochunk's, and its memory taken. Needs flax and optax.

    python examples/nnx_gpt.py --steps 200
    python examples/nnx_gpt.py --compare --length 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from measuring import compare
from transformer import VOCABULARY, batches, standard_library_text

from autochunk.flax import attention_fn

KINDS: dict[str, Callable[..., Any]] = {
    "flax": nnx.dot_product_attention,
    "autochunk": attention_fn,
}


@dataclass(frozen=True)
class Sizes:
    """Of the model and of what it reads."""

    layers: int
    heads: int
    size: int
    length: int
    batch: int
    vocabulary: int = VOCABULARY
    dropout: float = 0.1
    dtype: str = "float32"  # that it computes in


class Block(nnx.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, sizes: Sizes, function: Callable[..., Any], rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            num_heads=sizes.heads,
            in_features=sizes.size,
            dropout_rate=sizes.dropout,
            dtype=sizes.dtype,
            attention_fn=function,
            rngs=rngs,
        )
        given: dict[str, Any] = {"dtype": sizes.dtype, "rngs": rngs}
        self.norms = nnx.List([nnx.LayerNorm(sizes.size, **given) for _ in range(2)])
        self.up = nnx.Linear(sizes.size, 4 * sizes.size, **given)
        self.down = nnx.Linear(4 * sizes.size, sizes.size, **given)
        self.dropout = nnx.Dropout(sizes.dropout, rngs=rngs)

    def __call__(self, x: jax.Array, *, decode: bool, deterministic: bool) -> jax.Array:
        """[batch, length, size] to the same; one position at a time where it decodes."""
        attended = self.attention(
            self.norms[0](x), is_causal=not decode, decode=decode, deterministic=deterministic
        )
        x += self.dropout(attended, deterministic=deterministic)
        hidden = self.down(jax.nn.gelu(self.up(self.norms[1](x))))
        return x + self.dropout(hidden, deterministic=deterministic)


class GPT(nnx.Module):
    """Next-character logits [batch, length, vocabulary] of tokens [batch, length]."""

    def __init__(self, sizes: Sizes, function: Callable[..., Any], rngs: nnx.Rngs) -> None:
        given: dict[str, Any] = {"dtype": sizes.dtype, "rngs": rngs}
        self.tokens = nnx.Embed(sizes.vocabulary, sizes.size, **given)
        self.positions = nnx.Embed(sizes.length, sizes.size, **given)
        self.blocks = nnx.List([Block(sizes, function, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.LayerNorm(sizes.size, **given)

    def __call__(
        self,
        tokens: jax.Array,
        position: jax.Array | int = 0,
        *,
        decode: bool = False,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits; ``position`` is that of the first token."""
        positions = position + jnp.arange(tokens.shape[1])
        x = self.tokens(tokens) + self.positions(positions)[None]
        for block in self.blocks:
            x = block(x, decode=decode, deterministic=deterministic)
        logits: jax.Array = self.tokens.attend(self.norm(x))
        return logits.astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> None:
        """An empty cache of every layer."""
        for block in self.blocks:
            block.attention.init_cache((batch, length, block.attention.in_features))


def loss(model: GPT, window: jax.Array) -> jax.Array:
    """Nats per character of a window [batch, length + 1], with dropout."""
    logits = model(window[:, :-1], deterministic=False)
    found: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()
    return found


def train(sizes: Sizes, *, steps: int, learning_rate: float = 2e-3) -> tuple[GPT, list[float]]:
    """Trains with Adam; returns the model and the loss of each step."""
    model = GPT(sizes, attention_fn, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: GPT, optimizer: nnx.Optimizer[GPT], window: jax.Array) -> jax.Array:
        value: jax.Array
        value, gradient = nnx.value_and_grad(loss)(model, window)
        optimizer.update(model, gradient)
        return value

    losses = []
    windows = batches(standard_library_text(), sizes.batch, sizes.length)
    for number, window in zip(range(steps), windows, strict=False):
        losses.append(float(step(model, optimizer, jnp.asarray(window))))
        if number % max(1, steps // 10) == 0 or number == steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.3f} nats per character", flush=True)
    return model, losses


def write(model: GPT, prompt: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """The prompt [batch, n] and what the model holds for likeliest after it, [batch, length]."""

    @nnx.jit
    def step(model: GPT, token: jax.Array, position: jax.Array) -> jax.Array:
        return jnp.argmax(model(token, position, decode=True), axis=-1)

    model.init_cache(len(prompt), length)
    tokens = list(jnp.asarray(prompt, jnp.int32).T[:, :, None])  # n of [batch, 1]
    for position in range(length - 1):
        following = step(model, tokens[position], jnp.asarray(position))
        if position + 1 == len(tokens):
            tokens.append(following)
    return np.concatenate(tokens, axis=1)


def make(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradients of a training step with one of KINDS."""
    graph, state = nnx.split(GPT(sizes, KINDS[kind], nnx.Rngs(0)))
    window = np.random.default_rng(0).integers(
        sizes.vocabulary, size=(sizes.batch, sizes.length + 1)
    )

    def step(state: Any, window: jax.Array) -> Any:
        model = nnx.merge(graph, state)
        return nnx.value_and_grad(loss)(model, window)

    return step, (state, jnp.asarray(window))


def main(arguments: list[str]) -> None:
    """Reads the sizes, then compares, or trains and writes."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    small = {"layers": 2, "heads": 4, "size": 128, "length": 256, "batch": 8}
    large = {"layers": 12, "heads": 12, "size": 768, "length": 1024, "batch": 1}
    for name in small:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    read = vars(parser.parse_args(arguments))
    defaults = large if read["compare"] else small
    chosen: dict[str, Any] = {n: read[n] or default for n, default in defaults.items()}
    chosen |= {name: read[name] for name in ("dropout", "dtype")}
    if read["compare"]:
        compare(make, list(KINDS), Sizes(**chosen, vocabulary=50257), rounds=read["rounds"])
        return
    model, _ = train(Sizes(**chosen), steps=read["steps"])
    prompt = np.frombuffer(b"Return the ", np.uint8)[None]
    written = write(model, prompt, min(80, chosen["length"]))
    print(bytes(written[0].astype(np.uint8)).decode("ascii", "replace"))


if __name__ == "__main__":
    main(sys.argv[1:])
