"""A small Vision Transformer in Equinox that learns where a picture is bright, patched in one line.

The model is written with ``eqx.nn.MultiheadAttention`` and knows nothing of autochunk:
``autochunk.equinox.patched(model)`` makes its attention run in slices. With ``--compare`` a
training step, at the size of ViT-B unless told otherwise, is timed before and after that, and its
memory taken. Needs equinox and optax.

    python examples/equinox_vit.py --steps 30
    python examples/equinox_vit.py --compare --pixels 224
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import compare

from autochunk.equinox import patched

KINDS = ("equinox", "autochunk")
CLASSES = 4  # quadrants


@dataclass(frozen=True)
class Sizes:
    """Of the model and of what it sees."""

    layers: int
    heads: int
    size: int
    pixels: int
    patch: int
    batch: int
    dropout: float = 0.1
    dtype: str = "float32"  # of parameters and pictures, where it is compared


class Block(eqx.Module):
    """A pre-norm Transformer layer."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    hidden: eqx.nn.MLP

    def __init__(self, sizes: Sizes, key: jax.Array) -> None:
        attention, hidden = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(
            sizes.heads, sizes.size, dropout_p=sizes.dropout, key=attention
        )
        self.norms = [eqx.nn.LayerNorm(sizes.size) for _ in range(2)]
        inner = 4 * sizes.size
        self.hidden = eqx.nn.MLP(sizes.size, sizes.size, inner, 1, jax.nn.gelu, key=hidden)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[tokens, size] to the same."""
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, key=key)
        return x + jax.vmap(self.hidden)(jax.vmap(self.norms[1])(x))


class ViT(eqx.Module):
    """Logits [CLASSES] of a picture [3, pixels, pixels]."""

    patches: eqx.nn.Conv2d
    positions: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: jax.Array) -> None:
        keys = jax.random.split(key, sizes.layers + 3)
        self.patches = eqx.nn.Conv2d(3, sizes.size, sizes.patch, sizes.patch, key=keys[0])
        tokens = (sizes.pixels // sizes.patch) ** 2
        self.positions = jax.random.normal(keys[1], (tokens, sizes.size))
        self.blocks = [Block(sizes, one) for one in keys[3:]]
        self.norm = eqx.nn.LayerNorm(sizes.size)
        self.head = eqx.nn.Linear(sizes.size, CLASSES, key=keys[2])

    def __call__(self, picture: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Without a key for dropout the model must be in inference mode."""
        x = self.patches(picture)
        x = x.reshape(x.shape[0], -1).T + self.positions
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, one in zip(self.blocks, keys, strict=True):
            x = block(x, one)
        return self.head(self.norm(x.mean(0)))


def pictures(sizes: Sizes) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Noise [batch, 3, pixels, pixels] that is brighter in one quadrant, and which that is."""
    random, half = np.random.default_rng(0), sizes.pixels // 2
    while True:
        made = random.standard_normal((sizes.batch, 3, sizes.pixels, sizes.pixels), np.float32)
        labels = random.integers(CLASSES, size=sizes.batch)
        for picture, label in zip(made, labels, strict=True):
            row, column = divmod(int(label), 2)
            picture[:, row * half :, column * half :][:, :half, :half] += 2
        yield made, labels


def loss(model: ViT, seen: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Cross-entropy of a batch, with dropout."""
    logits = jax.vmap(model)(seen, jax.random.split(key, len(seen)))
    found: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return found


def train(sizes: Sizes, *, steps: int, learning_rate: float = 2e-3) -> tuple[ViT, list[float]]:
    """Trains a patched model with Adam; returns it and the loss of each step."""
    model = patched(ViT(sizes, jax.random.key(0)))
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: ViT, state: Any, *batch: Any) -> tuple[ViT, Any, jax.Array]:
        value, gradient = eqx.filter_value_and_grad(loss)(model, *batch)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for number, (seen, labels) in zip(range(steps), pictures(sizes), strict=False):
        model, state, value = step(model, state, seen, labels, jax.random.key(number))
        losses.append(float(value))
        if number % max(1, steps // 10) == 0 or number == steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.3f}", flush=True)
    return model, losses


def make(kind: str, sizes: Sizes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradients of a training step with one of KINDS."""
    model = ViT(sizes, jax.random.key(0))
    model = patched(model) if kind == "autochunk" else model
    moving, fixed = eqx.partition(model, eqx.is_array)
    moving = jax.tree.map(lambda one: one.astype(sizes.dtype), moving)

    def step(moving: Any, seen: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        run = lambda moving: loss(eqx.combine(moving, fixed), seen, labels, key)  # noqa: E731
        return jax.value_and_grad(run)(moving)

    seen, labels = map(jnp.asarray, next(pictures(sizes)))
    return step, (moving, seen.astype(sizes.dtype), labels, jax.random.key(1))


def main(arguments: list[str]) -> None:
    """Reads the sizes, then compares or trains."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    small = {"layers": 2, "heads": 2, "size": 32, "pixels": 32, "patch": 4, "batch": 16}
    large = {"layers": 12, "heads": 12, "size": 768, "pixels": 224, "patch": 16, "batch": 1}
    for name in small:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    read = vars(parser.parse_args(arguments))
    defaults = large if read["compare"] else small
    chosen: dict[str, Any] = {n: read[n] or default for n, default in defaults.items()}
    sizes = Sizes(**chosen, dropout=read["dropout"], dtype=read["dtype"])
    if read["compare"]:
        compare(make, KINDS, sizes, rounds=read["rounds"])
    else:
        train(sizes, steps=read["steps"])


if __name__ == "__main__":
    main(sys.argv[1:])
