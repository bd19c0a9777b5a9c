"""Arguments: the arrays and settings of one call of attention, checked and named.

The op, the tuner and ``bench`` all describe a call by this class. So they agree about each array:
its dtype, the dims that it may broadcast, its name in a Workload.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from autochunk.attention import checks
from autochunk.attention.kernels import Call, Inputs
from autochunk.attention.kernels.terms import terms_of
from autochunk.errors import ArgumentError
from autochunk.operands import OPERANDS, TERMS, pattern_of
from autochunk.plan import Plan, Plans
from autochunk.workload import Workload

# The static settings of a call, as in ``kernels.Call``.
_SETTINGS = (
    "scale",
    "is_causal",
    "window",
    "offset",
    "soft_cap",
    "dropout_rate",
    "residual",
    "precision",
    "half_logits",
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(OPERANDS),
    meta_fields=[*_SETTINGS],
)
@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arrays and the static settings of a call; a pytree of the arrays.

    H is the number of query heads, N that of key/value heads, [...] are leading dims.

    Attributes:
      query: [..., T', H, K].
      key: [..., T, N, K].
      value: [..., T, N, V].
      bias, mask: of the rank of the logits [..., H, T', T]; dims of size one broadcast.
      query_seq_lengths, key_value_seq_lengths, query_offset: [...], sizes of one broadcast.
      query_segment_ids: [..., T'].
      key_value_segment_ids: [..., T].
      alibi_slopes: [..., H].
      dropout_bits: [..., H, T'], random bits of each row.
      scale: factor on the logits; None is 1 / sqrt(K).
      is_causal: whether query i sees keys 0 to i only.
      window: how many positions to its left and right a query sees; None is all.
      offset: added to the queries' positions, besides ``query_offset``.
      soft_cap, dropout_rate, residual, precision, half_logits: as in ``kernels.Call``.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    key_value_segment_ids: jax.Array | None = None
    query_offset: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    dropout_bits: jax.Array | None = None
    scale: float | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None
    offset: int = 0
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    residual: bool = False
    precision: Any = None
    half_logits: bool = False

    @classmethod
    def checked(
        cls,
        *,
        scale: Any = None,
        is_causal: Any = False,
        local_window_size: Any = None,
        query_offset: Any = None,
        logits_soft_cap: Any = None,
        dropout_rate: Any = 0.0,
        dropout_rng: Any = None,
        broadcast_dropout: bool = True,
        precision: Any = None,
        return_residual: bool = False,
        half_logits: bool = False,
        **arrays: Any,
    ) -> Arguments:
        """Checks what a caller of the op gave, by name.

        Raises:
          ArgumentError: something is not an array, its shape or dtype does not fit, or a setting
            is not usable.
        """
        there = (name for name, array in arrays.items() if array is not None or name not in TERMS)
        given: dict[str, Any] = {name: checks.array_of(name, arrays[name]) for name in there}
        heads = Inputs(**{name: given[name] for name in OPERANDS if name not in TERMS})
        checks.check_shapes(*heads[:3])
        given["query"], scale = checks.scaled(heads.query, scale)
        settings: dict[str, Any] = {
            "scale": scale,
            "is_causal": bool(is_causal),
            "window": checks.window_sides(local_window_size),
            "soft_cap": None if logits_soft_cap is None else checks.positive_cap(logits_soft_cap),
            "dropout_rate": checks.dropout_rate(dropout_rate),
            "residual": bool(return_residual),
            "precision": checks.precision_in_force(precision),
            "half_logits": half_logits,
        }
        positioned = is_causal or local_window_size is not None or "alibi_slopes" in given
        if query_offset is not None and positioned:
            if isinstance(query_offset, numbers.Integral):
                settings["offset"] = int(query_offset)
            else:
                given["query_offset"] = checks.array_of("query_offset", query_offset)
        sizes = checks.sizes_of(*heads[:2])
        if settings["dropout_rate"]:
            given["dropout_bits"] = checks.dropout_bits(
                dropout_rng, heads.query.shape[:-3], sizes, bool(broadcast_dropout)
            )
        checks.check_pairs(given)
        for name in [name for name in TERMS if name in given]:
            given[name] = checks.whole_term(name, given[name], heads.query.shape[:-3], sizes)
        return cls(**given, **settings)

    @property
    def present(self) -> dict[str, jax.Array]:
        """The arrays that are there, by name and in the order of OPERANDS."""
        return {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}

    @property
    def moving(self) -> dict[str, jax.Array]:
        """The arrays that training differentiates."""
        return {name: one for name, one in self.present.items() if OPERANDS[name].differentiable}

    @property
    def terms(self) -> dict[str, jax.Array]:
        """The optional arrays that are there; they broadcast."""
        return {name: one for name, one in self.present.items() if name in TERMS}

    def replace(self, **changes: Any) -> Arguments:
        """The same with other arrays or settings."""
        return dataclasses.replace(self, **changes)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """[..., H, T', T]"""
        return _logits_shape(self.query, self.key)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[..., T', H, V]"""
        return (*self.query.shape[:-1], self.value.shape[-1])

    def symbolic(self) -> bool:
        """Whether a leading dim is unknown while tracing, as under ``jax.export``.

        Raises:
          ArgumentError: another size is unknown, and slices follow from it.
        """
        sizes = (*self.logits_shape, self.query.shape[-1], self.value.shape[-1])
        leading = self.query.ndim - 3
        if not all(isinstance(size, int) for size in sizes[leading:]):
            raise ArgumentError(
                "sizes but the leading ones must be known while tracing, since slices follow from "
                f"them; got {sizes}. Symbolic ones, as for jax.export, take "
                "implementation='dense' with max_chunk_size_mb=None"
            )
        return not all(isinstance(size, int) for size in sizes[:leading])

    def workload(self) -> Workload:
        """The Workload to tune for such a call, when it is not differentiated.

        A batch of symbolic size counts as one element.

        Raises:
          WorkloadError: a size is zero.
        """
        patterns = {name: self._pattern(name) for name in self.terms}
        if self.offset:
            patterns["query_offset"] = "1"
        return Workload.make(
            batch=math.prod(size for size in self.query.shape[:-3] if isinstance(size, int)),
            query_length=self.query.shape[-3],
            key_length=self.key.shape[-3],
            num_heads=self.query.shape[-2],
            num_kv_heads=self.key.shape[-2],
            key_size=self.query.shape[-1],
            value_size=self.value.shape[-1],
            dtype=str(self.query.dtype),
            causal=self.is_causal,
            window="none" if self.window is None else "{}:{}".format(*self.window),
            soft_cap=self.soft_cap is not None,
            residual=self.residual,
            precision=_precision_name(self.precision),
            **patterns,
        )

    def _pattern(self, name: str) -> str:
        shape, own = getattr(self, name).shape, len(TERMS[name].dims)
        leading = (size for size in shape[: len(shape) - own] if isinstance(size, int))
        return pattern_of(name, (math.prod(leading), *shape[len(shape) - own :]))

    def call(self, plans: Plans) -> Call:
        """The static part of the call, for the kernels."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        if self.scale is None:
            settings["scale"] = 1.0 / math.sqrt(self.query.shape[-1] or 1)
        return Call(tuple(self.present), plans=plans, **settings)

    def explicit(self) -> Arguments:
        """The same call, with all that hides keys in its mask and all that is added in its bias.

        For libraries that take nothing else. Cap, dropout and residual stay as they are.
        """
        terms = terms_of(self.inputs(), self.call(Plans(Plan(), Plan())))
        wide = jnp.promote_types(self.query.dtype, jnp.float32)
        added, seen = list(terms.added(wide)), terms.visible()
        bias = functools.reduce(jnp.add, added) if added else None
        given: dict[str, Any] = {name: None for name in self.terms if name != "dropout_bits"}
        given |= {name: _ungrouped(one) for name, one in (("bias", bias), ("mask", seen))}
        return self.replace(**given, is_causal=False, window=None, offset=0)

    def inputs(self) -> Inputs:
        """The arrays in the kernels' form: heads [H] as [N, H / N], at least one leading dim."""
        leading = self.query.shape[:-3] or (1,)
        kv_heads = self.key.shape[-2]
        *_, rows, heads, size = self.query.shape
        query = self.query.reshape((*leading, rows, kv_heads, heads // kv_heads, size))
        key, value = (one.reshape((*leading, *one.shape[-3:])) for one in (self.key, self.value))
        terms = {name: _grouped_term(name, one, kv_heads) for name, one in self.terms.items()}
        return Inputs(query, key, value, **terms)


def _logits_shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    return (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])


def _precision_name(precision: Any) -> str:
    """A precision as a Workload names it, such as "highest"."""
    if precision is None:
        return "default"
    if isinstance(precision, tuple):
        return "-".join(map(_precision_name, precision))
    return str(getattr(precision, "name", precision)).lower()


def _grouped_term(name: str, term: jax.Array, kv_heads: int) -> jax.Array:
    """A term with H as [N, H / N], and at least one leading dim."""
    dims = TERMS[name].dims
    own = term.ndim - len(dims)
    sizes: list[int] = []
    for letter, size in zip(dims, term.shape[own:], strict=True):
        groups = (1, 1) if size == 1 else (kv_heads, size // kv_heads)
        sizes.extend(groups if letter == "h" else (size,))
    return term.reshape((*(term.shape[:own] or (1,)), *sizes))


def _ungrouped(term: jax.Array | None) -> jax.Array | None:
    """[..., N, H / N, T', T] to [..., H, T', T]; both dims of heads are whole, or of size one."""
    if term is None:
        return None
    *leading, heads, groups, rows, keys = term.shape
    return term.reshape((*leading, heads * groups, rows, keys))
