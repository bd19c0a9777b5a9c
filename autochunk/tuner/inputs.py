"""What is computed when a workload is measured: random arguments, and a function of them.

The measuring process (``worker.py``) and ``bench`` both compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention.arguments import Arguments
from autochunk.attention.op import dot_product_attention, on_one_device, why_not
from autochunk.operands import OPERANDS
from autochunk.plan import Plan
from autochunk.workload import Workload

_SAMPLE_BYTES = 64 * 2**20
_MOST_SAMPLED_ROWS = 16

Attend = Callable[[Arguments], Any]
"""A way to compute attention: [..., T', H, V]."""


class WorkloadInputs:
    """Random arguments of a workload, and a sample of its query rows.

    Attributes:
      workload: whose.
      arguments: every array as large as it can be, with the dims [B, ...].
      cotangent: of the output [B, T', H, V], zero but for the sampled rows.
      rows: indices of the query rows to check.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._random = np.random.default_rng(0)
        shapes = {name: workload.operand_shape(name) for name in OPERANDS}
        drawn: dict[str, Any] = {
            name: self._draw(name, shape) for name, shape in shapes.items() if shape is not None
        }
        self.arguments = Arguments(**drawn, is_causal=workload.causal)
        self.rows = sample_rows(workload)
        # Only sampled rows have a cotangent, so that the reference gradients need no other row.
        # Multiplying by zeros takes as long as by anything else.
        cotangent = np.zeros(self.arguments.output_shape, np.float32)
        own = cotangent[:, self.rows].shape
        cotangent[:, self.rows] = self._random.standard_normal(own, np.float32)
        self.cotangent = jnp.asarray(cotangent, workload.dtype)

    def _draw(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        if OPERANDS[name].dtype == "boolean":
            return self._open_mask(shape)
        return self._normal(shape)

    def _normal(self, shape: tuple[int, ...]) -> jax.Array:
        """Drawn by numpy: JAX would compile a program for every shape."""
        return jnp.asarray(self._random.standard_normal(shape, np.float32), self.workload.dtype)

    def _open_mask(self, shape: tuple[int, ...]) -> jax.Array:
        """Three in four are open; key 0 to all, so that no row is masked throughout."""
        mask = self._random.random(shape, np.float32) < 0.75
        mask[..., 0] = True
        return jnp.asarray(mask)

    @property
    def passed(self) -> tuple[Any, ...]:
        """What the measured function takes."""
        training = self.workload.mode == "training"
        return (self.arguments, self.cotangent) if training else (self.arguments,)

    def function(self, plan: Plan) -> Callable[..., Any]:
        """The workload computed by a plan: the output, and in training the gradients too."""

        def attend(arguments: Arguments) -> jax.Array:
            with on_one_device():
                return by_op(arguments, plan.max_chunk_size_mb, plan.implementation)

        return make_function(self.workload, attend)

    def refusal(self, plan: Plan) -> str:
        """Why the plan's implementation does not take the workload; empty if it does."""
        training = self.workload.mode == "training"
        return why_not(plan.implementation, self.arguments, training=training)

    def sampled(self) -> tuple[Arguments, jax.Array]:
        """Arguments and cotangent with the sampled query rows only; causality becomes a mask."""
        own = {name: self._rows_of(name, one) for name, one in self.arguments.present.items()}
        if self.arguments.is_causal:
            keys = jnp.arange(self.workload.key_length)
            causal = jnp.asarray(self.rows)[None, None, :, None] >= keys[None, None, None, :]
            own["mask"] = causal & own["mask"] if "mask" in own else causal
        return self.arguments.replace(**own, is_causal=False), self.cotangent[:, self.rows]

    def on_sample(self, results: tuple[jax.Array, ...]) -> list[np.ndarray[Any, Any]]:
        """A function's results where the reference has them.

        Output and query gradient on sampled rows, the other gradients whole.
        """
        names = ("query", *self.arguments.moving)[: len(results)]  # the output is like the query
        pairs = zip(names, results, strict=True)
        return [as_float(self._rows_of(name, result)) for name, result in pairs]

    def _rows_of(self, name: str, array: jax.Array) -> jax.Array:
        """An array with the sampled query rows only, where it has any."""
        dim = OPERANDS[name].letters.find("t")
        if dim < 0 or array.shape[dim] == 1:
            return array
        return array[(slice(None),) * dim + (self.rows,)]


def sample_rows(workload: Workload) -> np.ndarray[Any, Any]:
    """Query rows to check.

    The first, the last, and as many others as their float64 logits leave room for.
    """
    w = workload
    fitting = _SAMPLE_BYTES // (w.batch * w.num_heads * w.key_length * 8)
    count = min(w.query_length, _MOST_SAMPLED_ROWS, max(2, fitting))
    inner = np.random.default_rng(0).permutation(np.arange(1, w.query_length - 1))
    rows = np.concatenate([[0, w.query_length - 1], inner[: max(0, count - 2)]])
    return np.unique(rows.astype(np.int64))


def as_float(array: jax.Array) -> np.ndarray[Any, Any]:
    """In numpy, which has no bfloat16."""
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))


def by_op(arguments: Arguments, limit: Any, implementation: str | None = None) -> jax.Array:
    """Attention by autochunk's own op."""
    arrays: dict[str, Any] = arguments.present
    return dot_product_attention(
        **arrays,
        is_causal=arguments.is_causal,
        max_chunk_size_mb=limit,
        implementation=implementation,
    )


def make_function(workload: Workload, attend: Attend) -> Callable[..., Any]:
    """The workload by ``attend``: (output,), and in training the gradients after it.

    It takes ``Arguments``, and in training the output's cotangent.
    """

    def forward(arguments: Arguments) -> Any:
        return (attend(arguments),)

    def training(arguments: Arguments, cotangent: jax.Array) -> Any:
        names = tuple(arguments.moving)

        def from_moving(*arrays: jax.Array) -> Any:
            return attend(arguments.replace(**dict(zip(names, arrays, strict=True))))

        out, pull = jax.vjp(from_moving, *arguments.moving.values())
        return (out, *pull(cotangent))

    return forward if workload.mode == "forward" else training
