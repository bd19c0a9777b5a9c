"""What is computed when a workload is measured: random arguments, and a function of them.

The measuring process (``worker.py``) and ``bench`` both compute it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autochunk.attention.arguments import Arguments
from autochunk.attention.op import attend, on_one_device, why_not
from autochunk.operands import OPERANDS
from autochunk.plan import Plan
from autochunk.workload import Workload

_SAMPLE_BYTES = 64 * 2**20
_MOST_DRAWN = 2**22 - 3  # a prime
_MOST_SAMPLED_ROWS = 16

# What is measured where a workload does not say.
_SOFT_CAP = 50.0  # Gemma 2's
_DROPOUT_RATE = 0.1
_SEGMENTS = 8

Attend = Callable[[Arguments], Any]
"""A way to compute attention: [..., T', H, V], or a tuple of that and the residual."""


class WorkloadInputs:
    """Random arguments of a workload, and a sample of its query rows.

    Attributes:
      workload: what is computed.
      arguments: every array as large as it can be, with the dims [B, ...].
      cotangent: of the output [B, T', H, V], zero except in the sampled rows.
      rows: indices of the query rows to check.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._random = np.random.default_rng(0)
        shapes = {name: workload.operand_shape(name) for name in OPERANDS}
        drawn: dict[str, Any] = {
            name: self._draw(name, shape) for name, shape in shapes.items() if shape is not None
        }
        window = None if workload.window == "none" else workload.window.split(":")
        self.arguments = Arguments(
            **drawn,
            is_causal=workload.causal,
            window=None if window is None else (int(window[0]), int(window[1])),
            soft_cap=_SOFT_CAP if workload.soft_cap else None,
            dropout_rate=_DROPOUT_RATE if workload.dropout_bits != "none" else 0.0,
            residual=workload.residual,
            precision=None if workload.precision == "default" else workload.precision,
        )
        self.rows = sample_rows(workload)
        # Only sampled rows have a cotangent, so that the reference gradients need no other row.
        # Multiplying by zeros takes as long as by anything else.
        cotangent = np.zeros(self.arguments.output_shape, np.float32)
        own = cotangent[:, self.rows].shape
        cotangent[:, self.rows] = self._random.standard_normal(own, np.float32)
        self.cotangent = jnp.asarray(cotangent, workload.dtype)

    def _draw(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        match OPERANDS[name].dtype:
            case "boolean":
                return self._mask(shape)
            case "bits":
                return jnp.asarray(self._random.integers(0, 2**32, shape, np.uint32))
            case "integer":
                return jnp.asarray(np.broadcast_to(self._integers(name, shape[0]), shape))
        if name == "alibi_slopes":
            slopes = 2.0 ** (-8 * np.arange(1, shape[-1] + 1) / shape[-1])  # Press et al. 2022
            return jnp.asarray(np.broadcast_to(slopes, shape), np.float32)
        return self._normal(shape)

    def _integers(self, name: str, batch: int) -> Any:
        """As batches have them: lengths from half to all, eight sequences packed, a long cache."""
        rows, keys = self.workload.query_length, self.workload.key_length
        length = rows if name.startswith("query") else keys
        if name.endswith("_seq_lengths"):
            shares = self._random.permutation(np.linspace(1.0, 0.5, batch))
            return np.ceil(shares * length).astype(np.int32)
        if name.endswith("_segment_ids"):
            return (np.arange(length) * _SEGMENTS // length).astype(np.int32)[None]
        return np.int32(max(0, keys - rows))

    def _normal(self, shape: tuple[int, ...]) -> jax.Array:
        """Drawn by numpy: JAX would compile a program for every shape.

        Large arrays repeat a shorter draw, to save seconds; its length is a prime that no row has.
        """
        count = min(math.prod(shape), _MOST_DRAWN)
        drawn = self._random.standard_normal(count, np.float32)
        return jnp.asarray(np.resize(drawn, shape), self.workload.dtype)

    def _mask(self, shape: tuple[int, ...]) -> jax.Array:
        """Padding, of a quarter on average; where rows have their own it is causal, too.

        Most masks of models are one of the two, and kernels leave out what they hide. Key 0 is open
        to all rows, so that no row is masked throughout.
        """
        *leading, rows, keys = shape
        shares = self._random.permutation(np.linspace(1.0, 0.5, math.prod(leading) + 2)[1:-1])
        lengths = np.ceil(shares * keys).reshape((*leading, 1, 1))
        key = np.arange(keys)
        mask = np.broadcast_to(key < lengths, shape).copy()
        if rows > 1:
            mask &= key <= np.arange(rows)[:, None] + keys - rows
        mask[..., 0] = True
        return jnp.asarray(mask)

    @property
    def passed(self) -> tuple[Any, ...]:
        """What the measured function takes."""
        training = self.workload.mode == "training"
        return (self.arguments, self.cotangent) if training else (self.arguments,)

    def function(self, plan: Plan) -> Callable[..., Any]:
        """The workload computed by a plan: the output, and in training the gradients too."""
        return make_function(self.workload, functools.partial(by_plan, plan=plan))

    def refusal(self, plan: Plan) -> str:
        """Why the plan's implementation does not take the workload; empty if it does."""
        training = self.workload.mode == "training"
        return why_not(plan.implementation, self.arguments, training=training)

    def sampled(self) -> tuple[Arguments, jax.Array]:
        """Arguments and cotangent with the sampled query rows only; positions become a mask."""
        given = self.arguments
        own = {name: self._rows_of(name, one) for name, one in given.present.items()}
        if "query_seq_lengths" in own:  # rows are in order
            own["query_seq_lengths"] = jnp.searchsorted(self.rows, own["query_seq_lengths"])
        ahead = self.key_indices() - self.positions()
        left, right = self.workload.reach
        seen = [ahead <= right] if right is not None else []
        seen += [ahead >= -left] if left is not None else []
        masks = [*seen, *([own["mask"]] if "mask" in own else [])]
        if masks:
            own["mask"] = functools.reduce(jnp.logical_and, masks)
        return given.replace(**own, is_causal=False, window=None), self.cotangent[:, self.rows]

    def positions(self) -> jax.Array:
        """Those of the sampled rows among the keys: [B or 1, 1, rows, 1]."""
        offset = self.arguments.query_offset
        rows = jnp.asarray(self.rows)[None, None, :, None]
        return rows if offset is None else rows + offset[:, None, None, None]

    def key_indices(self) -> jax.Array:
        """[1, 1, 1, T]"""
        return jnp.arange(self.workload.key_length)[None, None, None, :]

    def on_sample(self, results: tuple[jax.Array, ...]) -> list[np.ndarray[Any, Any]]:
        """A function's results where the reference has them.

        Output and query gradient on sampled rows, the other gradients whole.
        """
        outputs = ("query", "query_segment_ids")  # which the output and the residual are like
        own = outputs[: 2 if self.arguments.residual else 1]
        names = (*own, *self.arguments.moving)[: len(results)]
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


def by_op(arguments: Arguments, limit: Any, implementation: str | None = None) -> Any:
    """Attention by autochunk's own op."""
    return attend(arguments, limit, implementation)


def by_plan(arguments: Arguments, plan: Plan) -> Any:
    """The same by a plan as it is, however many devices there are."""
    with on_one_device():
        return by_op(arguments, plan.max_chunk_size_mb, plan.implementation)


def make_function(workload: Workload, attend: Attend) -> Callable[..., Any]:
    """The workload by ``attend``: (output,), and in training the gradients after it.

    It takes ``Arguments``, and in training the output's cotangent; a residual follows the output.
    """

    def forward(arguments: Arguments) -> tuple[Any, ...]:
        outs = attend(arguments)
        return tuple(outs) if isinstance(outs, tuple) else (outs,)

    def training(arguments: Arguments, cotangent: jax.Array) -> Any:
        names = tuple(arguments.moving)

        def from_moving(*arrays: jax.Array) -> Any:
            return forward(arguments.replace(**dict(zip(names, arrays, strict=True))))

        outs, pull = jax.vjp(from_moving, *arguments.moving.values())
        return (*outs, *pull((cotangent, *(one * 0 for one in outs[1:]))))

    return forward if workload.mode == "forward" else training
