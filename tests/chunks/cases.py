"""Functions of many kinds, small, with arguments and the axes along which they can be chunked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk import chunked


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Random values of moderate size."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32) / 2


@dataclass(frozen=True)
class Case:
    """A function and how to chunk it; gradients are of its first argument and its second.

    Attributes:
      fn: the function.
      args: whole arguments.
      chunks: what ``chunked`` is given.
      whole: what the function is to give, where that is not ``fn(*args)``.
      size: of chunks, which leaves a smaller one.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    chunks: dict[str, Any] = field(default_factory=dict)
    whole: Callable[..., Any] | None = None
    size: Any = 3

    @property
    def expected(self) -> Callable[..., Any]:
        """The function of whole arrays."""
        return self.whole or self.fn

    @property
    def chunked(self) -> Callable[..., Any]:
        """The function in chunks."""
        return chunked(self.fn, **{"chunk_size": self.size, **self.chunks})


def _mlp(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ w) @ w.T


def _norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)


def _gram(x: jax.Array, y: jax.Array, v: jax.Array) -> jax.Array:
    squared = jnp.square(x[:, None] - y[None]).sum(-1)
    return jnp.exp(-squared) @ v


def _per_sample(x: jax.Array, w: jax.Array) -> jax.Array:
    each: jax.Array = jax.vmap(jax.grad(lambda w, x: jnp.sin(x @ w).sum()), (None, 0))(w, x)
    return each


def _recurrent(x: jax.Array, w: jax.Array) -> jax.Array:
    def step(h: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ w + one)
        return h, h

    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))[1], 0, 1)


def _two(x: dict[str, jax.Array], w: jax.Array) -> dict[str, Any]:
    return {"out": x["a"] @ w, "pair": (x["b"].T, jnp.sin(x["a"]))}


def _both(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = x @ w
    return out, jnp.square(out).sum()


def _log_sum_exp(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = x @ w
    largest = jax.lax.stop_gradient(logits.max(0))
    return largest, jnp.exp(logits - largest[None]).sum(0)


def _add_lse(total: Any, one: Any) -> Any:
    largest = jnp.maximum(total[0], one[0])
    parts = [scale * jnp.exp(top - largest) for top, scale in (total, one)]
    return largest, parts[0] + parts[1]


def _attend(q: jax.Array, k: jax.Array) -> jax.Array:
    return jax.nn.softmax(q @ k.T, axis=-1) @ k


def _dropout(x: jax.Array, w: jax.Array, keys: jax.Array) -> jax.Array:
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, x.shape[-1:]))(keys)
    return jnp.where(kept, x, 0) @ w


def _branch(x: jax.Array, w: jax.Array) -> jax.Array:
    each: Callable[..., jax.Array] = lambda one: jax.lax.cond(one[0] > 0, jnp.sin, jnp.square, one)  # noqa: E731
    out: jax.Array = jax.vmap(each)(x) @ w
    return out


@jax.custom_vjp
def _clipped(x: jax.Array) -> jax.Array:
    return x * x


_clipped.defvjp(lambda x: (x * x, x), lambda x, g: (jnp.clip(2 * x * g, -1, 1),))


X, W, SEVEN = draw(7, 4), draw(4, 5), (0, None)
PAIR = draw(5, 7, 3)

CASES: dict[str, Case] = {
    "transition": Case(_mlp, (X, W), {"in_axes": SEVEN}),
    "second axis": Case(
        lambda x, w: jnp.moveaxis(_mlp(jnp.moveaxis(x, 1, 0), w), 0, 1),
        (draw(2, 7, 4), W),
        {"in_axes": (1, None), "out_axes": -2},
    ),
    "layer norm": Case(lambda x, w: _norm(x) * w, (X, draw(7, 4, seed=1)), {"in_axes": 0}),
    "pytrees": Case(
        _two,
        ({"a": X, "b": draw(2, 7)}, W),
        {"in_axes": ({"a": 0, "b": 1}, None), "out_axes": {"out": 0, "pair": 0}},
    ),
    "rows and columns": Case(
        lambda z, w: jax.nn.silu(z @ w),
        (PAIR, draw(3, 2)),
        {"in_axes": ((0, 1), None), "out_axes": (0, 1)},
        size=(2, 3),
    ),
    "outer product mean": Case(
        lambda a, b: jnp.einsum("sic,sjd->ijcd", a, b) / len(a),
        (draw(3, 5, 2), draw(3, 7, 2)),
        {"in_axes": ((1, None), (None, 1)), "out_axes": (0, 1)},
        size=(2, 4),
    ),
    "triangle multiplication": Case(
        lambda a, b: jnp.einsum("ikc,jkc->ijc", a, b),
        (draw(5, 6, 2), draw(5, 6, 2, seed=1)),
        {"in_axes": (0, None)},
        size=2,
    ),
    "gram times vector": Case(
        _gram,
        (X, draw(6, 4), draw(6, 2)),
        {
            "in_axes": ((0, None), (None, 0), (None, 0)),
            "out_axes": (0, None),
            "reduce": "sum",
        },
        size=(3, 4),
    ),
    "per-sample gradients": Case(_per_sample, (X, W), {"in_axes": SEVEN}),
    "recurrent": Case(_recurrent, (draw(7, 3, 4), draw(4, 4)), {"in_axes": SEVEN}),
    "sum": Case(lambda x, w: jnp.square(x @ w).sum(), (X, W), {"in_axes": SEVEN, "reduce": "sum"}),
    "mean": Case(lambda x, w: jnp.sin(x @ w).mean(0), (X, W), {"in_axes": SEVEN, "reduce": "mean"}),
    "max": Case(lambda x, w: (x @ w).max(0), (X, W), {"in_axes": SEVEN, "reduce": "max"}),
    "min": Case(lambda x, w: (x @ w).min(0), (X, W), {"in_axes": SEVEN, "reduce": "min"}),
    "joined and reduced": Case(
        _both, (X, W), {"in_axes": SEVEN, "out_axes": (0, None), "reduce": "sum"}
    ),
    "log-sum-exp": Case(
        _log_sum_exp,
        (X, W),
        {
            "in_axes": SEVEN,
            "reduce": ((jnp.full(5, -jnp.inf), jnp.zeros(5)), _add_lse),
        },
    ),
    "attention": Case(_attend, (X, draw(6, 4)), {"in_axes": SEVEN}),
    "dropout": Case(
        _dropout,
        (X, W, jax.random.key(3)),
        {"in_axes": (0, None, "split")},
        whole=lambda x, w, key: _dropout(x, w, jax.random.split(key, 7)),
    ),
    "branches": Case(_branch, (X, W), {"in_axes": SEVEN}),
    "sorted": Case(lambda x, w: jnp.sort(x @ w, -1), (X, W), {"in_axes": SEVEN}),
    "names": Case(lambda w, x: x @ w, (W, X), {"in_axes": {"x": 0}, "out_axes": 0}),
    "own rule": Case(lambda x, w: _clipped(x @ w), (X, W), {"in_axes": SEVEN}),
}
