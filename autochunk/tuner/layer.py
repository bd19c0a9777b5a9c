"""A Transformer layer's step around the attention of a workload: what a model would run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.plan import Plan
from autochunk.tuner.inputs import WorkloadInputs, by_plan

_WIDER = 4  # the inner size of the layer's perceptron, in outer ones

_Arrays = dict[str, jax.Array]


class Layer:
    """One pre-norm Transformer layer (Xiong et al. 2020), H K wide, with a workload's attention.

    Its queries, keys and values are projections of activations, those of the keys' sequence where
    that has another length; its bias and mask are the workload's own. Its step is the layer's
    output, and in training the loss and the gradients of all that is floating point.

    Attributes:
      passed: what the step takes.
    """

    def __init__(self, inputs: WorkloadInputs) -> None:
        self.workload = inputs.workload
        self._arguments = inputs.arguments
        self._random = np.random.default_rng(1)
        w = self.workload
        outer = w.num_heads * w.key_size
        sizes = {
            "query": (outer, w.num_heads, w.key_size),
            "key": (outer, w.num_kv_heads, w.key_size),
            "value": (outer, w.num_kv_heads, w.value_size),
            "out": (w.num_heads * w.value_size, outer),
            "up": (outer, _WIDER * outer),
            "down": (_WIDER * outer, outer),
        }
        moving = {name: self._draw(size, size[0]) for name, size in sizes.items()}
        moving["x"] = self._draw((w.batch, w.query_length, outer))
        if w.key_length != w.query_length:
            moving["keys"] = self._draw((w.batch, w.key_length, outer))
        terms = self._arguments.terms
        moving |= {name: terms[name] for name in terms.keys() & self._arguments.moving.keys()}
        self.passed = moving, {name: one for name, one in terms.items() if name not in moving}

    def _draw(self, shape: tuple[int, ...], inputs: int = 1) -> jax.Array:
        drawn = self._random.standard_normal(shape, np.float32) / math.sqrt(inputs)
        return jnp.asarray(drawn, self.workload.dtype)

    def function(self, plan: Plan) -> Callable[[_Arrays, _Arrays], Any]:
        """The step with its attention computed by a plan."""

        def forward(moving: _Arrays, fixed: _Arrays) -> jax.Array:
            given = moving | fixed
            rows = _normalized(given["x"])
            keys = _normalized(given["keys"]) if "keys" in given else rows
            sources = {"query": rows, "key": keys, "value": keys}
            heads = {
                name: jnp.einsum("bti,ihk->bthk", source, given[name])
                for name, source in sources.items()
            }
            terms = {name: given[name] for name in self._arguments.terms}
            arguments = self._arguments.replace(**heads, **terms, residual=False)
            out: jax.Array = by_plan(arguments, plan)
            x = given["x"] + out.reshape(*out.shape[:2], -1) @ given["out"]
            return x + jax.nn.gelu(_normalized(x) @ given["up"]) @ given["down"]

        def loss(moving: _Arrays, fixed: _Arrays) -> jax.Array:
            return jnp.mean(jnp.square(forward(moving, fixed).astype(jnp.float32)))

        return forward if self.workload.mode == "forward" else jax.value_and_grad(loss)


def _normalized(x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)
