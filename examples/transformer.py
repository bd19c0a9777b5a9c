"""A small haiku Transformer that learns to write English prose, by attention that autochunk slices.

The text is what ships with Python: the docstrings of its standard library. Run ``autochunk tune
--missed`` after a first run and it trains with the plan that is best here. Needs optax.

    python examples/transformer.py --steps 200
"""

from __future__ import annotations

import argparse
import functools
import inspect
import pydoc
import sys
from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import autochunk

VOCABULARY = 128  # ASCII
MODULES = (
    *("argparse", "ast", "asyncio", "collections", "datetime", "decimal", "email"),
    *("enum", "logging", "pathlib", "random", "textwrap"),
)


def standard_library_text() -> np.ndarray[Any, Any]:
    """The docstrings of Python's standard library modules and their public members, as ASCII."""
    texts = []
    for name in MODULES:
        module = pydoc.locate(name)
        for _, member in [(name, module), *inspect.getmembers(module)]:
            documentation = getattr(member, "__doc__", None)
            if isinstance(documentation, str) and callable(member):
                texts.append(documentation)
    return np.frombuffer("\n\n".join(texts).encode("ascii", "ignore"), np.uint8).astype(np.int32)


def batches(text: np.ndarray[Any, Any], batch: int, length: int) -> Iterator[np.ndarray[Any, Any]]:
    """Random windows [batch, length + 1] of the text."""
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(text) - length - 1, batch)
        yield text[starts[:, None] + np.arange(length + 1)]


def transformer(tokens: jax.Array, *, layers: int, heads: int, key_size: int) -> jax.Array:
    """Next-character logits [batch, length, VOCABULARY] of tokens [batch, length]."""
    length, size = tokens.shape[1], heads * key_size
    init = hk.initializers.VarianceScaling(1 / layers)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    small = hk.initializers.TruncatedNormal(0.02)
    positions = hk.get_parameter("positions", [1, length, size], init=small)
    x = hk.Embed(VOCABULARY, size)(tokens) + positions
    for _ in range(layers):
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        attention = autochunk.MultiHeadAttention(
            heads, key_size, w_init=init, max_chunk_size_mb="auto"
        )
        x += attention(h, h, h, mask)
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x += hk.Linear(size, w_init=init)(jax.nn.gelu(hk.Linear(4 * size, w_init=init)(h)))
    return hk.Linear(VOCABULARY)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x))


def train(
    *,
    steps: int,
    batch: int,
    length: int,
    layers: int,
    heads: int,
    key_size: int,
    learning_rate: float = 2e-3,
) -> list[float]:
    """Trains with Adam and returns the loss (nats per character) of each step."""
    forward = functools.partial(transformer, layers=layers, heads=heads, key_size=key_size)
    model: hk.Transformed = hk.without_apply_rng(hk.transform(forward))

    def loss(parameters: Any, window: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(model.apply(parameters, window[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, window[:, 1:, None], axis=-1))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))

    @jax.jit
    def step(parameters: Any, state: Any, window: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(parameters, window)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, value

    windows = batches(standard_library_text(), batch, length)
    parameters = model.init(jax.random.key(0), jnp.asarray(next(windows)[:, :-1]))
    state = optimizer.init(parameters)
    losses = []
    for number, window in zip(range(steps), windows, strict=False):
        parameters, state, value = step(parameters, state, jnp.asarray(window))
        losses.append(float(value))
        if number % max(1, steps // 10) == 0 or number == steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.3f} nats per character", flush=True)
    return losses


def main(arguments: list[str]) -> None:
    """Reads the sizes and trains."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    sizes = {"length": 256, "layers": 2, "heads": 4, "key-size": 32}
    for name, default in {"steps": 200, "batch": 8, **sizes}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
